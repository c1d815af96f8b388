"""Heartbeats of a run, and what it says before it ends when it hangs."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import ready
from tiny_run import TINY, metrics_of, write_images

from dinov2cli.train.run_folder import RunFolder
from dinov2cli.train.watch import Watch

HANGING = """
import sys, time
from pathlib import Path
from dinov2cli.train.run_folder import RunFolder
from dinov2cli.train import watch
from dinov2cli.train.watch import Watch

watch.GRACE_S = 0.5

def stuck_here():
    time.sleep(60)

with Watch(RunFolder(Path(sys.argv[1])), total=100, iteration=7, hang_timeout=1) as watch:
    with watch.doing("evaluating"):
        time.sleep(2)
    watch.beat(8, 0.5, 0.1)
    stuck_here()
"""
HANGING_IN_AN_EVALUATION = """
import sys, time
from pathlib import Path
from dinov2cli.console import progress
from dinov2cli.train.run_folder import RunFolder
from dinov2cli.train import watch
from dinov2cli.train.watch import Watch

watch.GRACE_S = 0.5

def stuck_there():
    time.sleep(60)

with Watch(RunFolder(Path(sys.argv[1])), total=100, iteration=8, hang_timeout=0.25) as watch, progress() as bar:
    with watch.doing("evaluating"):
        for _ in bar.track(range(4)):
            time.sleep(0.5)
        print("longer than one", flush=True)
        stuck_there()
"""
HANGING_WITH_ANOTHER = """
import sys, time
from pathlib import Path
from dinov2cli.train.run_folder import RunFolder
from dinov2cli.train import watch
from dinov2cli.train.watch import Watch

watch.GRACE_S = 0.5

def stuck_here():
    time.sleep(60)

first, second = (Watch(RunFolder(Path(sys.argv[1]) / name), total=9, iteration=0, hang_timeout=1) for name in "ab")
with first, second:
    for iteration in range(1, 9):
        time.sleep(0.25)
        second.beat(iteration, 0.25, 0.0)
    print("longer than one", flush=True)
    stuck_here()
"""


def test_heartbeats_tell_state_and_pace(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with Watch(folder, total=10, iteration=3, hang_timeout=0) as watch:
        started = json.loads(folder.heartbeat(0).read_text())
        assert started["pid"] == os.getpid() and started["iteration"] == 3 and started["iter_time"] is None
        for iteration, seconds in ((4, 0.2), (5, 0.4), (6, 9.0)):
            watch.beat(iteration, seconds, seconds / 2)
    ended = json.loads(folder.heartbeat(0).read_text())
    assert ended["state"] == "finished" and ended["iteration"] == 6
    assert (ended["iter_time"], ended["data_time"]) == (0.4, 0.2)  # medians
    with pytest.raises(KeyboardInterrupt), Watch(folder, total=10, iteration=6, hang_timeout=0):
        raise KeyboardInterrupt
    assert json.loads(folder.heartbeat(0).read_text())["state"] == "interrupted"


def test_a_hang_leaves_stacks_and_ends_the_process(tmp_path: Path) -> None:
    result = ready.server().run(tmp_path, code=HANGING, timeout=120)
    assert result.returncode == 1
    stacks = RunFolder(tmp_path).stacks(0).read_text()
    assert "stuck_here" in stacks and "after 8 iterations" in stacks
    assert "train.hang_timeout=1" in result.stderr and "logs/stacks" in result.stderr.replace("\n", "")
    assert json.loads(RunFolder(tmp_path).heartbeat(0).read_text())["state"] == "hanging"


def test_of_several_runs_in_a_process_each_is_alive_while_one_is(tmp_path: Path) -> None:
    result = ready.server().run(tmp_path, code=HANGING_WITH_ANOTHER, timeout=120)
    assert result.returncode == 1 and "longer than one" in result.stdout
    stacks = [RunFolder(tmp_path / name).stacks(0).read_text() for name in "ab"]
    assert all("stuck_here" in each for each in stacks)
    assert "after 0 iterations" in stacks[0] and "after 8 iterations" in stacks[1]


def test_an_evaluation_may_take_long_but_not_stand_still(tmp_path: Path) -> None:
    result = ready.server().run(tmp_path, code=HANGING_IN_AN_EVALUATION, timeout=120)
    assert result.returncode == 1 and "longer than one" in result.stdout
    assert "stuck_there" in RunFolder(tmp_path).stacks(0).read_text()
    assert "no progress of the evaluation" in result.stderr and "4 times train.hang_timeout=0.25" in result.stderr


@pytest.mark.long
@pytest.mark.parametrize("known", [True, False], ids=["in a run folder", "in none yet"])
def test_a_hang_before_the_first_iteration_ends_the_process(known: bool, tmp_path: Path) -> None:
    """The data are a pipe that nobody writes to, as a network disk that does not answer."""
    images, run = tmp_path / "data", tmp_path / "run"
    (run / "logs").mkdir(parents=True) if known else None
    os.mkfifo(tmp_path / "listing")
    code = f"""if True:
        import dinov2cli.start, dinov2cli.train.watch, sys
        from dinov2cli.cli.main import main
        dinov2cli.train.watch.GRACE_S = 0.5
        def stuck_here(*arguments):
            return open({str(tmp_path / "listing")!r})
        dinov2cli.start.make_dataset = stuck_here
        main(sys.argv[1:])
    """
    words = ["train", "--cpu", "--data", write_images(images), "--output-dir", run, *TINY, "train.hang_timeout=1"]
    result = ready.server().run(*words, code=code, timeout=120)
    said = " ".join(result.stderr.split())
    assert result.returncode == 1 and "the run hangs" in said and "4 times train.hang_timeout=1" in said
    assert "stuck_here" in (RunFolder(run).stacks(0).read_text() if known else result.stderr)
    assert known or not run.exists()


@pytest.mark.long
def test_a_run_with_a_process_that_hangs_reports_it_and_goes_on(tmp_path: Path) -> None:
    """One of two processes is frozen: the other waits for it, says so, and both start again from the checkpoint."""
    images, run = write_images(tmp_path / "data"), tmp_path / "run"
    length = ["train.OFFICIAL_EPOCH_LENGTH=60", "train.checkpoint_period=10", "optim.epochs=1",
              "evaluation.eval_period_iterations=60", "train.hang_timeout=8"]  # fmt: skip
    words = ["train", "--cpu", "--gpus", "2", "--data", images, "--output-dir", run, *TINY, *length]
    with (tmp_path / "log.txt").open("wb") as log:
        process = ready.server().start(*words, stderr=log, workers=True)
    metrics = run / "training_metrics.json"
    until = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 15):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.01)
    frozen = json.loads(RunFolder(run).heartbeat(1).read_text())["pid"]
    os.kill(frozen, signal.SIGSTOP)
    code, said = process.wait(timeout=240), (tmp_path / "log.txt").read_text()
    assert code == 0, said
    assert "the run hangs after" in " ".join(said.split())
    stacks = RunFolder(run).stacks(0).read_text()
    assert "next_batches" in stacks or "train_step" in stacks
    assert [line["iteration"] for line in metrics_of(run)] == list(range(60))
