"""A disk that fills up during training: a clear end, nothing good lost, and the run goes on once there is space."""

import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ready
import torch
from tiny_run import TINY, metrics_of, write_images

from dinov2cli.errors import EnvironmentProblem
from dinov2cli.files import write_text
from dinov2cli.launch.notes import reported

LENGTH = ["train.OFFICIAL_EPOCH_LENGTH=40", "optim.epochs=1", "train.checkpoint_period=5",
          "evaluation.eval_period_iterations=40", "train.batch_size_per_gpu=4"]  # fmt: skip


@pytest.fixture()
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def start(images: Path, run: Path, processes: int, log: Path) -> ready.Process:
    words = ["train", "--cpu", "--gpus", str(processes), "--data", images, "--output-dir", run, *TINY, *LENGTH]
    with log.open("wb") as file:
        return ready.server().start(*words, stderr=file, env={**os.environ, "COLUMNS": "250"}, workers=True)


def fill(folder: Path, leave: int) -> None:
    with (folder / "filler").open("wb") as file:
        file.write(b"\0" * (shutil.disk_usage(folder).free - leave))


def test_what_the_machine_refuses_anywhere_is_one_message_and_what_is_missing_stays_a_fault(tmp_path: Path) -> None:
    name = tmp_path / ("long" * 100)
    with pytest.raises(EnvironmentProblem, match=rf"^{name}: File name too long\nMend that"), reported():
        write_text(name, "")  # under another name at first
    with pytest.raises(EnvironmentProblem, match=r"^File too large"), reported(), files_of_at_most(10):
        (tmp_path / "large").write_bytes(b"0" * 20)
    with pytest.raises(FileNotFoundError), reported():
        (tmp_path / "missing").read_text()


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.long)])
@pytest.mark.parametrize("leave", [100_000, 0], ids=["no space for a checkpoint", "no space at all"])
def test_a_full_disk_ends_a_run_that_resumes_later(
    tmp_path: Path, small_disk: Path, processes: int, leave: int
) -> None:
    images = write_images(tmp_path / "data")
    whole, run, log = tmp_path / "whole", small_disk / "run", tmp_path / "log.txt"
    assert start(images, whole, processes, log).wait(timeout=200) == 0, log.read_text()

    first = start(images, run, processes, log)
    until = time.monotonic() + 120
    while not (run / "checkpoints" / "iteration_00000010").exists():
        assert time.monotonic() < until and first.poll() is None
        time.sleep(0.01)
    first.send_signal(signal.SIGINT)
    assert first.wait(timeout=100) == 130
    good = sorted(path.name for path in (run / "checkpoints").iterdir())

    fill(small_disk, leave)
    code, said = start(images, run, processes, log).wait(timeout=200), log.read_text()
    assert code == 2, said
    assert said.count("error:") == 1 and "No space left on device" in said and "run the same command again" in said
    assert "Traceback" not in said
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == good

    (small_disk / "filler").unlink()
    assert start(images, run, processes, log).wait(timeout=200) == 0, log.read_text()
    assert metrics_of(run) == metrics_of(whole)
    final = "eval/training_39/teacher_checkpoint.pth"
    one, other = (torch.load(folder / final, weights_only=True)["teacher"] for folder in (whole, run))
    assert all(torch.equal(one[key], other[key]) for key in one)
