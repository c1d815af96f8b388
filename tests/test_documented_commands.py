"""What README.md and docs/ say to type is typed: blocks run page by page, in order, with small data and tiny networks.

A block that needs what is not here says so in a comment before it, `<!-- not run: REASON -->`. Its words, as those of
all others and of the examples of `--help`, are given to the real command line, which must take them.
"""

import ast
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import pytest
import ready
import tifffile
import yaml
import zarr
from dense_sets import write_depths, write_masks
from test_pca_video import write_video
from tiny_run import TINY, write_images

from dinov2cli.cli import command as command_line
from dinov2cli.cli.main import TREE, app
from dinov2cli.cli.tree import Command
from dinov2cli.config import load_config
from dinov2cli.config.reference import WITHOUT_EFFECT
from dinov2cli.config.tree import FIELDS, GROUPS
from dinov2cli.errors import Dino2Error
from dinov2cli.launch import slurm
from dinov2cli.launch.typed import overrides_of
from dinov2cli.requests.base import Request
from dinov2cli.requests.train import ConfiguredRequest, TrainRequest
from dinov2cli.site import read_site

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md", *sorted(ROOT.glob("docs/*.md"))]
SHELL, PROGRAM, NEITHER = {"sh", "bash", "console"}, {"python"}, {"", "text", "yaml", "json"}
SMALLER = {
    "train": TINY,
    "doctor": TINY,
    "bench train": [*TINY, "--steps", "1"],
    "bench extract": [*TINY, "--batches", "1", "--image-size", "32"],
    "bench augment": [*TINY, "--images", "8", "--repeats", "1", "--workers", "0"],
    "bench knn": ["--queries", "100", "--keys", "1000"],
    "bench logreg": ["--images", "200", "--every", "45"],
    "bench linear": ["--steps", "1"],
    "eval linear": ["--epochs", "1", "--epoch-length", "3"],
    "linear": ["--epochs", "1", "--epoch-length", "3"],
    "eval segmentation": ["--iterations", "2", "--image-size", "32"],
    "eval depth": ["--iterations", "2"],
}
"""What is typed behind the words of a command, to make it a matter of seconds."""


class Block(NamedTuple):
    """A block of a page; `reason` says why it is not run, if so."""

    page: str
    line: int
    language: str
    text: str
    reason: str | None

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(path: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    lines, name = path.read_text().splitlines(), str(path.relative_to(ROOT))
    opened, before = 0, ""
    for number, line in enumerate(lines, start=1):
        if line.startswith("```") and not opened:
            opened, language = number, line.removeprefix("```").split(" ")[0]
        elif line.startswith("```"):
            reason = re.fullmatch(r"<!-- not run: (.+) -->", before)
            text = "\n".join(lines[opened : number - 1])
            yield Block(name, opened, language, text, reason and reason[1])
            opened, before = 0, ""
        elif line.strip() and not opened:
            before = line.strip()


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
RUN = {page: [each for each in BLOCKS if each.page == page and each.reason is None and each.language not in NEITHER]
       for page in dict.fromkeys(block.page for block in BLOCKS)}  # fmt: skip
EXAMPLES = [
    (f"{each.words} --help", line.strip())
    for each in TREE.walk()
    for line in each.help.partition("Example:")[2].splitlines()
    if line.strip()
]


def lines_for_dino2(text: str) -> Iterator[list[str]]:
    """The words behind `dino2`, of each line that calls it, by itself or through a launcher."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        for start, word in enumerate(words):
            if word.rpartition("/")[2] == "dino2" or words[start : start + 2] == ["-m", "dinov2cli"]:
                found = words[start + (1 if word != "-m" else 2) :]
                ends = [found.index(sign) for sign in ("&&", "|", ">", ";", "||", "&") if sign in found]
                yield found[: min(ends, default=len(found))]


def request_of(words: list[str], monkeypatch: pytest.MonkeyPatch) -> Request | None:
    """What the real command line makes of the words; None for `--help` and the like. Nothing is done."""
    found: list[Request] = []
    monkeypatch.setattr(command_line, "perform", found.append)
    with pytest.raises(SystemExit) as stop:
        app(words)
    assert not stop.value.code, f"dino2 {shlex.join(words)}"
    return found[0] if found else None


def assert_taken(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command, option, preset and key exists, every value fits; Slurm's options make a script."""
    request = request_of(words, monkeypatch)
    changes = getattr(request, "overrides", None) or [word for word in getattr(request, "arguments", ()) if "=" in word]
    if isinstance(request, TrainRequest):  # its options for keys, too
        changes = overrides_of(request)
    if isinstance(request, ConfiguredRequest) or changes:
        # A file that the reader has made is not here; those that the pages make are of a short run.
        base = "demo" if getattr(request, "config_file", None) else getattr(request, "preset", None)
        load_config(base, overrides=changes)
    if isinstance(request, TrainRequest) and request.slurm.is_asked:
        wanted = slurm.Wanted(request.slurm, request.gpus or 8, request.cpu)
        assert "#SBATCH" in slurm.script(wanted, folder=Path("slurm"), name="job")


@pytest.mark.parametrize(("where", "line"), EXAMPLES, ids=[f"{where} {line}"[:80] for where, line in EXAMPLES])
def test_examples_of_help_are_taken(where: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = list(lines_for_dino2(line))
    assert calls, f"{where}: {line!r} does not call dino2"
    for words in calls:
        assert_taken(words, monkeypatch)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_words_of_a_block_are_taken(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    assert block.language in SHELL | PROGRAM | NEITHER, f"{block.name}: ```{block.language} is none that is looked at"
    if block.language in NEITHER:
        typed = re.findall(r"^ {0,3}(?:\$ )?(?:dino2|python|pip) .*", block.text, re.MULTILINE)
        assert not typed, f"{block.name}: commands stand in ```sh: {typed}"
    elif block.language in PROGRAM:
        compile(block.text, block.name, "exec")
    else:
        for words in lines_for_dino2(block.text):
            try:
                assert_taken(words, monkeypatch)
            except Dino2Error as error:
                pytest.fail(f"{block.name}: dino2 {' '.join(words)}\n{error}")


WRONG = [
    "dino2 trian", "dino2 train --output RUN", "dino2 train --preset vits", "dino2 train optim.epoch=3", "dino2 info",
    "dino2 embed RUN --data D --output F --batch-size none",
]  # fmt: skip


@pytest.mark.parametrize("line", WRONG)
def test_what_dino2_does_not_take_is_noticed(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (words,) = lines_for_dino2(f".venv/bin/{line} && ls  # and so on")
    with pytest.raises((Dino2Error, AssertionError)):
        assert_taken(words, monkeypatch)


def test_the_pages_of_commands_and_keys_are_up_to_date(tmp_path: Path) -> None:
    reference = runpy.run_path(str(ROOT / "docs/reference.py"))
    for path in reference["write"](tmp_path):
        assert path.read_text() == (ROOT / "docs" / path.name).read_text(), "python docs/reference.py writes them anew"
    text = (tmp_path / "commands.md").read_text() + (tmp_path / "configuration.md").read_text()
    for each in (option for command in TREE.walk() if command.request for option in command.options):
        assert each.name == "help" or all(f"`{flag}`" in text for flag in each.flags)
    for key, field in FIELDS.items():
        assert f"`{key.partition('.')[2]}`" in text and len(field.description or "") > 5, key


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_options_and_keys_named_in_a_sentence_exist(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    everything = {flag for command in TREE.walk() for option in command.options for flag in option.flags}
    for code in re.findall(r"`([^`]+)`", text):
        words = code.replace("\n", " ").split()
        if words[0] == "dino2":
            command = TREE
            for word in words[1:]:
                names = [name for name in word.split("|") if command.commands and not name.startswith("-")]
                assert all(name in command.commands or name.isupper() for name in names), f"{page.name}: {code}"
                command = command.commands.get(names[0], Command(("",), "")) if names else command
            known = {flag for option in command.options for flag in option.flags} if command.request else everything
            assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known, f"{page.name}: {code}"
        for group, key in re.findall(r"^(\w+)\.(\w+)(?:=|$)", words[0] if len(words) == 1 else ""):
            known_key = f"{group}.{key}" in FIELDS or (group, key) in WITHOUT_EFFECT
            assert known_key or group not in GROUPS, f"{page.name}: no key {code}"


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "yaml"], ids=lambda block: block.name)
def test_files_of_a_site_and_of_runs_are_read(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if re.findall(r"^(\w+):", block.text, re.MULTILINE)[0] in GROUPS:
        (tmp_path / "run.yaml").write_text(block.text)
        assert load_config(config_file=tmp_path / "run.yaml") != load_config()
        return
    (tmp_path / "dino2.yaml").write_text(block.text)
    monkeypatch.chdir(tmp_path)
    assert {key.partition(".")[0] for key in read_site().sources} == {"datasets", "slurm", "runs", "cache", "overrides"}
    load_config(site=read_site().keys())


def messages() -> set[str]:
    """Every text in the package, with ... for what is filled in."""
    found = set()
    for path in (ROOT / "dinov2cli").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.add("".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


def test_messages_of_troubleshooting_are_ones_that_dino2_gives() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text()
    tables = re.findall(r"^\| message \|.*\n((?:\|.*\n)+)", page, re.MULTILINE)
    rows = re.findall(r"^\| (.*?) \|", "".join(tables), re.MULTILINE)
    assert len(rows) > 40
    quoted = [text for row in rows for text in re.findall(r"`([^`]+)`", row)]
    said = messages()
    for text in quoted:
        parts = [part.strip() for part in re.split(r"'?\.\.\.'?|\bN\b", text) if part.strip()]
        assert any(all(part in message for part in parts) for message in said), f"no such message: {text}"


def write_cells(folder: Path) -> None:
    """Labelled images of five channels of 16 bits: as files in train/ and val/, and as arrays in HDF5 and Zarr."""
    pixels = np.random.default_rng(0).integers(0, 4096, (12, 5, 40, 40), dtype=np.uint16)
    for split in ("train", "val"):
        for number, image in enumerate(pixels):
            file = folder / split / ("round", "long")[number % 2] / f"{number}.tif"
            file.parent.mkdir(parents=True, exist_ok=True)
            tifffile.imwrite(file, image, photometric="minisblack")
        with h5py.File(folder / f"{split}.h5", "w") as arrays:
            arrays["images"], arrays["classes"] = pixels, np.arange(12) % 2
    zarr.save_group(str(folder / "train.zarr"), images=pixels)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder with what the pages take for granted: photos, labelled photos, a video, a trained model."""
    home = tmp_path_factory.mktemp("home")
    for name in ("photos", "labelled/train", "labelled/val"):
        write_images(home / name, per_class=6)
    shutil.copytree(home / "photos/class0", home / "album")
    write_video(home / "holiday.mp4")
    write_masks(home / "shapes")
    write_depths(home / "rooms")
    (home / "cells").mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 4096, (5, 40, 40), dtype=np.uint16)
        tifffile.imwrite(home / "cells" / f"{number}.tif", pixels, photometric="minisblack")
    write_cells(home / "labelled-cells")
    run, (train, val) = home / "runs/photos", (str(home / "labelled" / split) for split in ("train", "val"))
    for words in (
        ["train", "--preset", "demo", "--data", str(home / "photos"), "--output-dir", str(run), "--cpu", *TINY],
        ["eval", "knn", str(run), "--train-dataset", train, "--val-dataset", val, "--device", "cpu"],
    ):
        done = ready.dino2(*words, timeout=300)
        assert done.returncode == 0, done.stderr
    return home


@pytest.fixture(scope="module")
def dino2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The program, ready (`ready.py`), with what makes its commands small."""
    program, server = tmp_path_factory.mktemp("bin") / "dino2", ready.Server(more=SMALLER)
    program.write_text(ready.PROGRAM.format(python=sys.executable, address=server.address))
    program.chmod(0o755)
    yield program
    server.close()


@pytest.mark.long
@pytest.mark.parametrize("page", [page for page, blocks in RUN.items() if blocks])
def test_blocks_of_a_page_run(page: str, data: Path, dino2: Path, tmp_path: Path) -> None:
    """In a folder in which lies what `data` has, but for the model where the page itself trains it."""
    home, here = tmp_path / "home", tmp_path / "here"
    here.mkdir()
    shutil.copytree(data, home)
    for name in ("holiday.mp4", "labelled", "album", "shapes", "rooms"):
        (here / name).symlink_to(home / name)
    if page == "docs/images.md":
        (here / "cells").symlink_to(home / "labelled-cells")
    if not any(re.search(r"dino2 train.* --output-dir runs/photos", block.text) for block in RUN[page]):
        (home / "runs").rename(here / "runs")
        shutil.copytree(data / "runs/photos", here / "runs/other")
    if page != "docs/site-file.md":  # there it is the name of a dataset
        (here / "photos").symlink_to(home / ("labelled" if page == "docs/commands.md" else "photos"))
    if page == "docs/python.md":  # its training is not typed
        keys = {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in TINY)}
        (tmp_path / "dino2.yaml").write_text(yaml.safe_dump({"overrides": keys}))
    if page == "docs/commands.md":  # the examples of --help
        (tmp_path / "dino2.yaml").write_text(f"datasets: {{photos: {home}/photos}}")
        for name in ("RUN", "runs/demo", "runs/baseline", "runs/larger-lr"):
            shutil.copytree(data / "runs/photos", here / name)
    for name, photo in zip(("dog.jpg", "other-dog.jpg"), sorted(home.glob("photos/*/*.png")), strict=False):
        (here / name).symlink_to(photo)
    path = f"{dino2.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    settings = {**os.environ, "PATH": path, "HOME": str(home), "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "",
                "DINO2_CACHE": str(tmp_path / "cache"), "DINO2_CONFIG": str(tmp_path / "dino2.yaml")}  # fmt: skip
    for block in RUN[page]:
        text = re.sub(r"^\$ ", "", block.text, flags=re.MULTILINE)
        if block.language in SHELL:
            words = ["bash", "-euo", "pipefail", "-c", text]
            done = subprocess.run(words, cwd=here, env=settings, capture_output=True, text=True, timeout=600)
        else:
            done = ready.server().run(code=text, cwd=here, env=settings)
        assert done.returncode == 0, f"{block.name}\n{block.text}\n{done.stdout}\n{done.stderr}"
