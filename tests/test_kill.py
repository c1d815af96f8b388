"""A run killed with SIGKILL at random moments and resumed each time equals one that was left alone, bit for bit."""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import ready
import torch
from tiny_run import TINY, metrics_of, write_images

KILLS = 10
LENGTH = ["train.OFFICIAL_EPOCH_LENGTH=30", "train.checkpoint_period=5", "evaluation.eval_period_iterations=30"]


def start(images: Path, run: Path, workers: int) -> ready.Process:
    words = ["train", "--cpu", "--data", images, "--output-dir", run, *TINY, *LENGTH, f"train.num_workers={workers}"]
    with (run.parent / f"{run.name}.log").open("ab") as log:
        # A session of its own, so that loader workers are killed with their parent as a node failure would.
        return ready.server().start(*words, stdout=log, stderr=log, start_new_session=True)


def progress(run: Path) -> int:
    metrics = run / "training_metrics.json"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.long)])
def test_ten_kills_change_nothing(workers: int, tmp_path: Path) -> None:
    images = write_images(tmp_path / "data")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(images, whole, workers).wait(timeout=300) == 0
    rng = random.Random(workers)
    for kill in range(KILLS):
        process = start(images, killed, workers)
        # Past what the last attempt reached, then a random moment: in a step, a checkpoint, a line of metrics.
        target = min(80, progress(killed) + rng.randint(1, 7))
        while progress(killed) < target and process.poll() is None:
            time.sleep(0.005)
        time.sleep(rng.random() * 0.05)
        assert process.poll() is None, f"ended by itself before kill {kill}"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert start(images, killed, workers).wait(timeout=300) == 0, (tmp_path / "killed.log").read_text()
    assert metrics_of(killed) == metrics_of(whole)
    final = "eval/training_89/teacher_checkpoint.pth"
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


@pytest.mark.long
def test_twenty_kills_of_a_supervised_run_change_nothing(tmp_path: Path) -> None:
    """Two processes under one command; each kill takes a random one, with a checkpoint in writing much of the time.

    Nobody restarts anything by hand.
    """
    images = write_images(tmp_path / "data")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start_pair(images, whole).wait(timeout=300) == 0, (tmp_path / "whole.log").read_text()
    rng = random.Random(0)
    process = start_pair(images, killed)
    for kill in range(20):
        target = min(PAIR_LENGTH - 10, progress(killed) + rng.randint(1, 7))
        wait_for(lambda goal=target: progress(killed) >= goal or process.poll() is not None, 120)
        time.sleep(rng.random() * 0.05)
        assert process.poll() is None, f"ended by itself before kill {kill}\n{(tmp_path / 'killed.log').read_text()}"
        pids = pids_of(killed)
        os.kill(rng.choice(pids), signal.SIGKILL)
        wait_for(lambda old=pids: not set(old) & set(pids_of(killed)) or process.poll() is not None, 120)
    assert process.wait(timeout=300) == 0, (tmp_path / "killed.log").read_text()
    assert metrics_of(killed) == metrics_of(whole)
    final = f"eval/training_{PAIR_LENGTH - 1}/teacher_checkpoint.pth"
    one, other = (torch.load(run / final, weights_only=True)["teacher"] for run in (whole, killed))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    restarts = [json.loads(line) for line in (killed / "logs" / "restarts.jsonl").read_text().splitlines()]
    assert len(restarts) == 20 and all(restart["reason"] == "was killed (SIGKILL)" for restart in restarts)
    # Nothing is lost beyond the last checkpoint: each restart goes on from one at most a period and a writing old.
    resumed_at = [restart["iteration"] for restart in restarts]
    assert resumed_at[-1] > 0 and resumed_at == sorted(resumed_at)


PAIR_LENGTH = 180
PAIR = [f"train.OFFICIAL_EPOCH_LENGTH={PAIR_LENGTH}", "train.checkpoint_period=3",
        f"evaluation.eval_period_iterations={PAIR_LENGTH}", "optim.epochs=1", "train.num_workers=1",
        "optim.freeze_last_layer_epochs=0", "optim.warmup_epochs=0"]  # fmt: skip


def start_pair(images: Path, run: Path) -> ready.Process:
    words = ["train", "--cpu", "--gpus", "2", "--data", images, "--output-dir", run, *TINY, *PAIR]
    with (run.parent / f"{run.name}.log").open("ab") as log:
        return ready.server().start(*words, stdout=log, stderr=log, workers=True)


def pids_of(run: Path) -> list[int]:
    """Of the training processes, as they say in their heartbeats."""
    return [json.loads(path.read_text())["pid"] for path in sorted((run / "logs" / "heartbeat").glob("rank_*.json"))]


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.005)
