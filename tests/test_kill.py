"""A run killed with SIGKILL at random moments and resumed each time equals one that was left alone, bit for bit."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_run import TINY, metrics_of, write_images

KILLS = 10
LENGTH = ["train.OFFICIAL_EPOCH_LENGTH=50", "train.checkpoint_period=5", "evaluation.eval_period_iterations=50"]


def start(images: Path, run: Path, workers: int) -> subprocess.Popen[bytes]:
    overrides = [*TINY, *LENGTH, f"train.num_workers={workers}"]
    command = [sys.executable, "-m", "dinov2cli", "train", "--cpu", "--data", str(images), "--output-dir", str(run)]
    log = (run.parent / f"{run.name}.log").open("ab")
    # A session of its own, so that loader workers are killed with their parent as a node failure would.
    return subprocess.Popen([*command, *overrides], stdout=log, stderr=log, start_new_session=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip


def progress(run: Path) -> int:
    metrics = run / "training_metrics.json"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_ten_kills_change_nothing(workers: int, tmp_path: Path) -> None:
    images = write_images(tmp_path / "data")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(images, whole, workers).wait(timeout=300) == 0
    rng = random.Random(workers)
    for kill in range(KILLS):
        process = start(images, killed, workers)
        # Past what the last attempt reached, then a random moment: in a step, a checkpoint, a line of metrics.
        target = min(140, progress(killed) + rng.randint(1, 12))
        while progress(killed) < target and process.poll() is None:
            time.sleep(0.005)
        time.sleep(rng.random() * 0.05)
        assert process.poll() is None, f"ended by itself before kill {kill}"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert start(images, killed, workers).wait(timeout=300) == 0, (tmp_path / "killed.log").read_text()
    assert metrics_of(killed) == metrics_of(whole)
    final = "eval/training_149/teacher_checkpoint.pth"
    one, other = (torch.load(run / final, weights_only=True)["teacher"] for run in (whole, killed))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
def test_ctrl_c_saves_exits_130_and_resumes(tmp_path: Path) -> None:
    images, run = write_images(tmp_path / "data"), tmp_path / "run"
    process = start(images, run, workers=1)
    while progress(run) < 20 and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 130
    log = (tmp_path / "run.log").read_text()
    assert "the same command resumes" in log and "Traceback" not in log
    reached = progress(run)
    assert start(images, run, workers=1).wait(timeout=300) == 0
    assert f"resumed after {reached} iterations" in (tmp_path / "run.log").read_text()
