"""A module imports only from lower layers, and `dino2 --help` imports no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "dinov2cli"
LAYERS = {
    "errors": 1, "console": 1, "distributed": 1, "device": 1, "files": 1,
    "requests": 2,
    "config": 3,
    "data": 4, "models": 4, "losses": 4,
    "checkpoint": 5, "train": 5,
    "eval": 6, "export": 6, "visualize": 6, "launch": 6,
    "doctor": 7, "bench": 7,
    "start": 8,
    "cli": 9,
    "__init__": 10, "__main__": 10,
}  # fmt: skip
# Two parts of a layer may not see each other, except the trainer, which writes checkpoints, and what raises errors.
WITHIN_LAYER = {
    ("train", "checkpoint"),
    ("distributed", "errors"),
    ("console", "errors"),
    ("device", "errors"),
    ("device", "distributed"),
    ("files", "errors"),
    ("console", "files"),
}


def imports_of(path: Path) -> set[str]:
    """Names of the parts of the package that a file imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write it absolute"
            names = [node.module or ""]
            if node.module == "dinov2cli":
                names = [f"dinov2cli.{alias.name}" for alias in node.names]
        for name in names:
            if name.startswith("dinov2cli."):
                found.add(name.split(".")[1])
    return found - {"__version__", "load_model"}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    here = part_of(path)
    for there in imports_of(path) - {here}:
        allowed = LAYERS[there] < LAYERS[here] or (here, there) in WITHIN_LAYER
        assert allowed, f"{path.relative_to(PACKAGE)} ({here}) imports {there}, which is not below it"


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
