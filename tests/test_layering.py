"""The house of docs/architecture.md: imports point downwards and never in a circle, `dino2 --help` imports no torch, no
file and no signature is long, and what is typed says so."""

import ast
import functools
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dinov2cli"
# Folders and files of one floor do not see each other; a tenth is a step within a floor.
FLOORS = {
    "errors": 1.0, "files": 1.1, "distributed": 1.1, "console": 1.2, "device": 1.2,
    "requests": 2,
    "config": 3.0, "site": 3.1, "cluster": 3.2,
    "data": 4, "models": 4, "losses": 4,
    "checkpoint_reading": 4.9, "checkpoint": 5.0, "train": 5.1,
    "eval": 6, "export": 6, "visualize": 6, "launch": 6, "search": 6.1,
    "doctor": 7, "bench": 7, "curate": 7,
    "start": 8.0, "fit": 8.1,
    "cli": 9,
    "__init__": 10, "__main__": 10,
}  # fmt: skip
LONGEST_FILE, MOST_PARAMETERS = 330, 12

FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: name_of(path))


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def imports_of(path: Path) -> Iterator[Path]:
    """Files of the package that a file imports, at any depth of its code, for annotations as well."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (MODULES[alias.name] for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write it absolute"
            for name in (alias.name for alias in node.names if alias.name != "__version__"):
                imported = MODULES.get(f"{node.module}.{name}", MODULES.get(node.module or ""))
                if imported is not None and imported != path:
                    yield imported


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@each_file
def test_imports_point_downwards(path: Path) -> None:
    here = part_of(path)
    for imported in imports_of(path):
        there = part_of(imported)
        assert there == here or FLOORS[there] < FLOORS[here], f"{name_of(path)} imports {name_of(imported)}"


def test_no_two_files_import_each_other_over_whatever_others() -> None:
    direct = {path: set(imports_of(path)) for path in FILES}

    def below(path: Path) -> set[Path]:
        found, rest = set(), [path]
        while rest:
            new = direct[rest.pop()] - found
            found |= new
            rest += new
        return found

    reached = {path: below(path) for path in FILES}
    circles = {
        (name_of(one), name_of(other))
        for one in FILES
        for other in reached[one]
        if one < other and one in reached[other]
    }
    assert not circles


def test_no_file_is_longer_than_can_be_read_in_one_go() -> None:
    long = {name_of(path) for path in FILES if len(path.read_text().splitlines()) > LONGEST_FILE}
    assert not long


def test_no_function_has_more_parameters_than_can_be_told_apart() -> None:
    long = set()
    for path, tree in ((each, tree_of(each)) for each in FILES):
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                takes = node.args
                names = [*takes.posonlyargs, *takes.args, *takes.kwonlyargs, takes.vararg, takes.kwarg]
                if sum(name is not None and name.arg not in ("self", "cls") for name in names) > MOST_PARAMETERS:
                    long.add(f"{name_of(path)}: {getattr(node, 'name', 'lambda')}")
    assert not long


@pytest.mark.parametrize("command", [["--help"], ["train", "--help"], ["presets", "list"]])
def test_help_imports_no_torch(command: list[str]) -> None:
    code = (
        "import sys\n"
        "from dinov2cli.cli.main import main\n"
        "try:\n"
        f"    main({command!r})\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code, stop.code\n"
        "heavy = {'torch', 'cv2', 'PIL', 'skimage', 'av', 'xformers', 'submitit'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_wheel_says_that_it_is_typed_and_brings_the_presets(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="hatchling is not installed")
    builder = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(builder, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"dinov2cli/py.typed", "dinov2cli/__main__.py", "dinov2cli/presets/demo.yaml"} <= set(names)


@pytest.mark.parametrize("document", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_what_the_documents_name_is_there(document: str) -> None:
    named = set(re.findall(r"`([\w/]+(?:\.py|/))`", (ROOT / document).read_text()))
    assert named, "no file is named any more"
    assert not {name for name in named if not (PACKAGE / name).exists() and not (ROOT / name).exists()}


def test_the_tests_that_promises_name_are_there() -> None:
    named = re.findall(r"`(\w+\.py)::(\w+)`", (ROOT / "docs" / "promises.md").read_text())
    files = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    missing = [f"{file}::{test}" for file, test in named if f"def {test}(" not in files.get(file, "")]
    assert len(named) > 40 and not missing
