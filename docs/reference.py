"""Write docs/commands.md and docs/configuration.md, from what the commands and the configuration say of themselves.

python docs/reference.py
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from dinov2cli.cli.main import TREE
from dinov2cli.cli.tree import Command, Parameter
from dinov2cli.config import Config
from dinov2cli.config.tree import FIELDS, GROUPS, expectation
from dinov2cli.train.resuming import on_resume

DOCS = Path(__file__).parent
NEEDED = {
    r"--nodes|--partition": "needs a Slurm cluster",
    r"--gpus [2-9]|nproc-per-node|bench gpu|--attention xformers|--compile on": "needs GPUs",
    r"roxford5k": "needs Revisited Oxford",
    r" /data/|ImageNet": "needs ImageNet",
    r"cells/\*": "needs a model of five channels",
    r"web\.safetensors": "needs features of a collection",
    r"HEAD\.pth": "needs a trained head",
    r"--against": "needs an evaluation set of other images",
    r"(embed|export|segmentation) dinov2_|pca-video (?!.*--model)|dino2 (depth|segment) ": "downloads weights",
}
"""What the examples of `--help` need that is not there when tests type them."""


def commands_page() -> Iterator[str]:
    """Every command with its arguments and options; options that several commands share as a group stand once."""
    yield "# Commands\n"
    yield "What `dino2 COMMAND --help` prints, of all commands. Exit codes: 0 done, 2 the user's input, 1 a failure of"
    yield "dino2's own, 130 interrupted. With `--json`, standard output holds one JSON object and nothing else.\n"
    panels: dict[str, list[Parameter]] = {}
    for command in {each.request: each for each in TREE.walk() if each.request}.values():
        own: list[Parameter] = []
        for parameter in command.parameters:
            group = own if parameter.panel is None else panels.setdefault(parameter.panel, [])
            if parameter.name != "help" and parameter.name not in {each.name for each in group}:
                group.append(parameter)
        yield from section(command)
        yield from table(own)
        for panel in dict.fromkeys(each.panel for each in command.parameters if each.panel):
            yield f"Also: [{panel}](#{anchor(panel)}).\n"
    for panel, found in panels.items():
        yield f"## {panel}\n"
        yield from table(found)


def section(command: Command) -> Iterator[str]:
    """The heading and the text of `--help`, its examples as a block."""
    text, _, examples = command.help.partition("Example:")
    yield f"## {command.words}\n\n{text.strip()}\n"
    same = [each.words for each in TREE.walk() if each.request is command.request and each is not command]
    if same:
        yield f"The same: `{'`, `'.join(same)}`.\n"
    reasons = {line.strip(): reason_not_to_run(line) for line in examples.splitlines() if line.strip()}
    for reason in dict.fromkeys(reasons.values()):
        if reason:
            yield f"<!-- not run: {reason} -->\n"
        yield "\n".join(["```sh", *(line for line, its in reasons.items() if its == reason), "```\n"])


def reason_not_to_run(line: str) -> str | None:
    """Why a test cannot type this example."""
    return next((reason for pattern, reason in NEEDED.items() if re.search(pattern, line)), None)


def table(parameters: list[Parameter]) -> Iterator[str]:
    """A row for each argument and option."""
    if not parameters:
        return
    yield "| option | takes | default | meaning |\n|---|---|---|---|"
    for each in parameters:
        spelled = " ".join(f"`{flag}`" for flag in each.flags) or f"`{each.as_typed}`"
        yield f"| {spelled} | {cell(takes(each))} | {cell(default(each))} | {cell(each.help)} |"
    yield ""


def takes(each: Parameter) -> str:
    """What stands behind an option."""
    if each.is_argument or not each.takes_value:
        return ""
    if "completes" not in each.typed and each.words:
        return ", ".join(f"`{word}`" for word, _ in each.words)
    kinds: dict[Any, str] = {int: "whole number", float: "number", Path: "path", str: "text"}
    return (f"`{each.metavar}`" if each.metavar else kinds[each.plain]) + (", several" if each.many else "")


def default(each: Parameter) -> str:
    """What holds without the option; nothing for what must be given, is off, or is chosen by the program."""
    said = each.typed.get("default_text", True)
    if isinstance(said, str):
        return said
    value = each.field.get_default()
    if not said or each.field.is_required() or value in (None, (), False, ""):
        return "required" if each.field.is_required() else ""
    return (
        " ".join(f"`{one}`" for one in (value if isinstance(value, tuple) else (value,))) if value is not True else "on"
    )


def configuration_page() -> Iterator[str]:
    """Every key of the configuration, by group."""
    yield "# Configuration keys\n"
    yield "Keys are set in a file (`--config-file`) or behind a command, as `group.key=value`. The defaults are those"
    yield "of the reference's `vitl16_short` run; presets change some (`dino2 presets show NAME`). Names are the"
    yield "reference's, and what it does not have is marked (dino2). A run's folder holds its own in `config.yaml`.\n"
    yield "`dino2 presets show NAME --full > mine.yaml` writes all of them with these texts.\n"
    yield "Whether a key may change in a run that goes on stands in the table. `no`: such a run is refused;"
    yield "`named`: it goes on otherwise from there, and says so; `schedules shown`: with the schedules before"
    yield "and after; `images kept`: on another number of processes, an iteration has as many images as before."
    yield "A checkpoint remembers how many images and classes there were, and a digest of names: data that has"
    yield "changed is told. A run that has gone further than its new length is refused.\n"
    usual = Config().model_dump(mode="json")
    for name, group in GROUPS.items():
        yield f"## {name}\n\n{(group.__doc__ or '').strip()}\n"
        yield "| key | takes | default | on resuming | meaning |\n|---|---|---|---|---|"
        for key in group.model_fields:
            value = yaml.safe_dump(usual[name][key], default_flow_style=True, width=10_000)
            field = FIELDS[f"{name}.{key}"]
            shown = value.removesuffix("...\n").strip()
            resumed, meaning = on_resume(f"{name}.{key}"), cell(field.description or "")
            yield f"| `{key}` | {cell(expectation(field))} | `{shown}` | {resumed} | {meaning} |"
        yield ""


def cell(text: str) -> str:
    """Text inside of a table."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def anchor(title: str) -> str:
    """The id that mkdocs gives a heading."""
    return "".join(letter for letter in title.lower() if letter.isalnum() or letter in " -").replace(" ", "-")


PAGES = {"commands.md": commands_page, "configuration.md": configuration_page}


def write(folder: Path) -> list[Path]:
    """The pages' paths."""
    paths = [folder / name for name in PAGES]
    for path, page in zip(paths, PAGES.values(), strict=True):
        path.write_text("\n".join(page()).rstrip() + "\n")
    return paths


if __name__ == "__main__":
    for written in write(DOCS):
        print(written)
