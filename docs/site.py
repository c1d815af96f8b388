"""A hook of mkdocs: pages that lie elsewhere in the repository join the site, and links lead to them."""

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
ELSEWHERE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "examples/README.md": "examples.md",
}
"""Where a file of the repository stands in the site."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, target in ELSEWHERE.items():
        text = (ROOT / source).read_text()
        if source == "examples/README.md":
            programs = sorted((ROOT / "examples").glob("*.py"))
            text += "".join(f"\n## {path.name}\n\n```python\n{path.read_text()}```\n" for path in programs)
        files.append(File.generated(config, target, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links, which in the repository are from file to file, lead to the pages of the site."""
    sources = {target: source for source, target in ELSEWHERE.items()}
    here = ROOT / sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def link(found: re.Match[str]) -> str:
        text, address = found.groups()
        path, _, anchor = address.partition("#")
        there = (here.parent / path).resolve()
        if "://" in address or not path or not there.is_relative_to(ROOT):
            return found[0]
        name = str(there.relative_to(ROOT))
        if name == "examples" or (name.startswith("examples/") and name.endswith(".py")):
            name, anchor = "examples/README.md", there.name.replace(".", "") if there.is_file() else ""
        if name not in ELSEWHERE and not name.startswith("docs/"):
            return text  # in the repository alone
        return f"[{text}]({ELSEWHERE.get(name, name.removeprefix('docs/'))}{'#' * bool(anchor)}{anchor})"

    return re.sub(r"\[([^\]]*)\]\(([^)\s]+)\)", link, markdown)
