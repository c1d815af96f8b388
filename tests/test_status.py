"""`dino2 status`: a real run, and runs in every state as their files tell."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ready
from tiny_run import TINY, write_images

from dinov2cli.errors import ConfigError
from dinov2cli.launch.restarts import Restart, record_restart
from dinov2cli.launch.status import read_status


def dino2(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return ready.dino2(*arguments, env={**os.environ, "COLUMNS": "250"}, workers="--gpus" in arguments)


def write_run(run: Path, *, ages: list[float], state: str = "training", data_times: list[float] | None = None) -> Path:
    """The files of a run with a process for each age in seconds, after 40 of 100 iterations."""
    (run / "logs" / "heartbeat").mkdir(parents=True)
    (run / "checkpoints" / "iteration_00000030").mkdir(parents=True)
    for rank, age in enumerate(ages):
        beat: dict[str, Any] = {
            "rank": rank, "world_size": len(ages), "host": f"n{rank // 2}", "pid": 1, "iteration": 40, "total": 100,
            "iter_time": 0.5, "data_time": (data_times or [0.1] * len(ages))[rank], "time": time.time() - age,
            "state": state,
        }  # fmt: skip
        (run / "logs" / "heartbeat" / f"rank_{rank:05d}.json").write_text(json.dumps(beat))
    lines = [{"iteration": i, "total_loss": 5.0, "iter_time": 0.5, "data_time": 0.1, "current_batch_size": 64}
             for i in range(40)]  # fmt: skip
    (run / "training_metrics.json").write_text("\n".join(map(json.dumps, lines)) + '\n{"iteration": 4')
    return run


def test_a_real_run(tmp_path: Path) -> None:
    images, run = write_images(tmp_path / "data"), tmp_path / "run"
    trained = dino2("train", "--cpu", "--gpus", "2", "--data", images, "--output-dir", run, *TINY)
    assert trained.returncode == 0, trained.stderr
    shown = dino2("status", run)
    assert shown.returncode == 0, shown.stderr
    assert "finished" in shown.stdout and "12 of 12 (100%)" in shown.stdout
    assert re.search(r"images/s, [\d.]+ s an iteration", shown.stdout)
    assert re.search(r"processes +2 on ", shown.stdout)
    as_json = json.loads(dino2("status", run, "--json").stdout)
    assert as_json["state"] == "finished" and as_json["checkpoint"] == 12 and len(as_json["processes"]) == 2
    assert as_json["logs"] == [str(run / "logs" / "train.log")]


@pytest.mark.parametrize("age", [1, 1000])
def test_a_run_that_was_killed_after_its_last_checkpoint_is_finished(tmp_path: Path, age: float) -> None:
    run = write_run(tmp_path / "run", ages=[age])
    assert read_status(run).state != "finished"
    (run / "checkpoints" / "iteration_00000100").mkdir()
    now = read_status(run)
    assert (now.state, now.iteration, now.silent) == ("finished", 100, [])


def test_speed_and_what_is_left(tmp_path: Path) -> None:
    now = read_status(write_run(tmp_path / "run", ages=[1, 2, 3, 4]))
    assert (now.state, now.iteration, now.total, now.checkpoint) == ("training", 40, 100, 30)
    assert now.images_per_s == pytest.approx(128) and now.seconds_left == pytest.approx(30)
    assert now.loss == pytest.approx(5.0) and now.silent == []


def test_the_slowest_is_the_one_with_the_slow_data(tmp_path: Path) -> None:
    now = read_status(write_run(tmp_path / "run", ages=[1, 1, 1, 1], data_times=[0.1, 0.1, 0.4, 0.1]))
    assert now.slowest == 2 and now.slowest_by == pytest.approx(0.3)
    shown = dino2("status", tmp_path / "run").stdout
    assert "process 2 on n1: waits 0.3 s longer" in shown


def test_silent_processes_are_named(tmp_path: Path) -> None:
    now = read_status(write_run(tmp_path / "run", ages=[1, 500, 1, 400]))
    assert now.state == "training" and now.silent == [1, 3]
    assert "processes 1, 3: no sign of life" in dino2("status", tmp_path / "run").stdout


def test_all_silent_is_dead(tmp_path: Path) -> None:
    now = read_status(write_run(tmp_path / "run", ages=[500, 500]))
    assert now.state == "dead" and now.seconds_left is None


@pytest.mark.parametrize("state", ["finished", "interrupted", "failed"])
def test_an_ended_run_is_not_missed(state: str, tmp_path: Path) -> None:
    now = read_status(write_run(tmp_path / "run", ages=[5000, 5000], state=state))
    assert now.state == state and now.silent == []


def test_restarts_requeues_and_hangs(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ages=[1, 1])
    record_restart(run, Restart("death", "was killed (SIGKILL)", 1, 30, "s"))
    record_restart(run, Restart("requeue", "job 7 was requeued", -1, 30, "s"))
    (run / "logs" / "stacks").mkdir()
    (run / "logs" / "stacks" / "rank_00001.txt").write_text("Thread 1")
    now = read_status(run)
    assert (now.restarts, now.requeues, now.last_restart) == (1, 1, "job 7 was requeued")
    assert now.hangs == [str(run / "logs" / "stacks" / "rank_00001.txt")]
    assert "1, and 1 requeues" in dino2("status", run).stdout


def test_processes_of_an_earlier_larger_group_do_not_count(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ages=[900, 900, 900, 900])
    for rank in (0, 1):
        path = run / "logs" / "heartbeat" / f"rank_{rank:05d}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "world_size": 2, "time": time.time()}))
    now = read_status(run)
    assert now.state == "training" and now.silent == [] and len(now.processes) == 2


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run here"):
        read_status(tmp_path)


def test_it_imports_no_torch(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ages=[1])
    code = (
        "import sys\nfrom dinov2cli.cli.main import main\n"
        f"try:\n    main(['status', {str(run)!r}])\nfinally:\n    assert 'torch' not in sys.modules\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
