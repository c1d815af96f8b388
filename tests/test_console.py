"""What a person sees: bars at 80 columns and without a terminal, quiet and verbose, one name for one thing, the end."""

import io
import json
import os
import re
import subprocess
import time
from pathlib import Path

import pytest
import ready
from rich.console import Console
from tiny_run import TINY, write_images

from dinov2cli import console
from dinov2cli.console import Manner, clock, counted, progress
from dinov2cli.errors import ConfigError
from dinov2cli.requests.eval import EmbedRequest, KnnRequest
from dinov2cli.requests.tools import InfoRequest
from dinov2cli.requests.train import TrainRequest
from dinov2cli.train.display import TrainingDisplay


def terminal(monkeypatch: pytest.MonkeyPatch, module: str = "dinov2cli.console") -> io.StringIO:
    """Standard error as a terminal of 80 columns."""
    text = io.StringIO()
    of_80 = Console(file=text, force_terminal=True, width=80, color_system=None, legacy_windows=False)
    monkeypatch.setattr(f"{module}.err", of_80)
    return text


def frames(text: io.StringIO) -> list[str]:
    return [line for line in re.split(r"[\r\n]|\x1b\[[0-9;?]*[A-Za-z]", text.getvalue()) if line.strip()]


def test_a_bar_has_name_count_rate_and_time_left_at_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = terminal(monkeypatch)
    with progress() as bar:
        task = bar.add_task("features of /a/very/long/path/of/a/dataset/train", total=1_281_167, completed=0)
        for _ in range(4):
            time.sleep(0.05)
            bar.advance(task, 256)
    last = frames(shown)[-1]
    assert len(last) <= 80 and last.startswith("features of /a/very/")
    assert "1024/1281167" in last and re.search(r"\d/s +\S*:\d\d", last)


def test_work_without_a_terminal_says_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(console, "SPEAK_SECONDS", 0.05)
    monkeypatch.setattr(console.logger, "propagate", True)
    with caplog.at_level("INFO", logger="dino2"), progress() as bar:
        for _ in bar.track(range(12), description="linear heads"):
            time.sleep(0.02)
    said = [record.getMessage() for record in caplog.records]
    assert 2 <= len(said) <= 6 and re.fullmatch(r"linear heads: \d+ of 12.*", said[-1])


def test_the_training_bar_keeps_its_label_and_time_left_at_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = terminal(monkeypatch, "dinov2cli.train.display")
    losses = {"total_loss": 10.5, "dino_local_crops_loss": 8.0, "koleo_loss": 0.5, "ibot_loss": 2.0}
    with TrainingDisplay(125_000, 0, 1024) as display:
        for iteration in range(1, 4):
            time.sleep(0.02)
            display.update(iteration, losses, 0.001, log=True)
    last = frames(shown)[-1]
    assert len(last) <= 80 and last.startswith("training") and "3/125000" in last
    assert re.search(r"left \d+:\d\d:\d\d", last) and "loss 10.5" in last


def test_numbers_in_words() -> None:
    assert [counted(n, "frame") for n in (0, 1, 2)] == ["0 frames", "1 frame", "2 frames"]
    assert [clock(s) for s in (59, 3661, 90061)] == ["0:00:59", "1:01:01", "1 d 1:01:01"]


def test_names_that_others_use_mean_the_same() -> None:
    from dinov2cli.cli.command import checked
    from dinov2cli.cli.tree import parameters

    assert TrainRequest(device="cpu").cpu and not TrainRequest().cpu
    assert KnnRequest(checkpoint="run", cpu=True).device == "cpu"
    assert EmbedRequest(model="run", data="a", output=Path("f.csv")).checkpoint == "run"
    assert InfoRequest(model="run").checkpoint == "run"
    for wrong, message in (({}, "CKPT is missing"), ({"checkpoint": "a", "model": "b"}, "both given")):
        with pytest.raises(ConfigError, match=message):
            checked(InfoRequest, wrong)
    with pytest.raises(ConfigError, match="--cpu and --device cuda exclude each other"):
        checked(KnnRequest, {"checkpoint": "a", "cpu": True, "device": "cuda"})
    flags = {flag for request in (TrainRequest, KnnRequest) for each in parameters(request) for flag in each.flags}
    assert {"--data", "--train-dataset", "--model", "--pretrained-weights", "--cpu", "--device", "--quiet"} <= flags


def typed(*words: str | Path, cwd: Path) -> tuple[float, subprocess.CompletedProcess[str]]:
    """Seconds from the last line to the end of the process, and what it said."""
    reading, writing = os.pipe()
    with open(writing, "wb") as written:
        environment = {**os.environ, "DINO2_CACHE": str(cwd / "cache")}
        process = ready.server().start(*words, stdout=written, stderr=written, env=environment, cwd=cwd)
    said, last = b"", time.monotonic()
    with open(reading, "rb"):
        while block := os.read(reading, 1 << 16):
            said, last = said + block, time.monotonic()
    code = process.wait()
    took = time.monotonic() - last
    return took, subprocess.CompletedProcess(process.args, code, said.decode(), "")


def test_a_process_ends_with_its_last_line_and_quiet_and_verbose(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images")
    train = ["train", "--device", "cpu", "--train-dataset", images, "--output-dir", "run", *TINY]
    took, done = typed(*train, "--quiet", cwd=tmp_path)
    assert done.returncode == 0 and "INFO" not in done.stdout and "learning rate" not in done.stdout, done.stdout
    assert took < 1.0
    sets = ["--data", images, "--val-dataset", images, "--nb-knn", "3", "--cpu"]
    took, done = typed("eval", "knn", "--model", "run", *sets, "--json", "--quiet", cwd=tmp_path)
    assert done.returncode == 0 and json.loads(done.stdout)["task"] == "knn" and took < 1.0
    took, done = typed("info", "nowhere.pth", "--verbose", cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" in done.stdout and took < 1.0
    took, done = typed("info", "nowhere.pth", cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stdout and took < 1.0


def test_manner_is_that_of_the_last_command() -> None:
    assert not Manner.quiet and not Manner.verbose
