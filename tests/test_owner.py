"""One training in a run folder at a time, and its takeover when its owner is gone; folders that dino2 did not write."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import ready
from tiny_run import TINY, metrics_of, write_images

from dinov2cli.console import Interrupted, signals_as_exceptions
from dinov2cli.errors import ConfigError
from dinov2cli.launch import owner
from dinov2cli.launch.owner import NAME, STALE_S, Owner, check_free, owner_of, owning
from dinov2cli.train.run_folder import RunFolder

GOLDEN = Path(__file__).parent / "golden"


def dino2(*words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return ready.dino2(*words, env={**os.environ, "COLUMNS": "250", **environment})


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "data")


def write(run: Path, of: Owner, age: float = 0.0) -> None:
    (run / NAME).write_text(json.dumps(asdict(of)))
    os.utime(run / NAME, (time.time() - age, time.time() - age))


@pytest.fixture
def elsewhere() -> Owner:
    """An owner on another machine."""
    return replace(Owner.this(), token="other", session="other", host="node9", machine="node9 x y")


@pytest.fixture
def training(images: Path, tmp_path: Path) -> Iterator[tuple[ready.Process, Path]]:
    """A training of a minute and more, that has written its first metrics."""
    run = tmp_path / "run"
    words = ["train", "--cpu", "--data", images, "--output-dir", run, *TINY, "optim.epochs=3000"]
    process = ready.server().start(*words)
    until = time.monotonic() + 120
    while not (run / "training_metrics.json").exists() or len(metrics_of(run)) < 2:
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.2)
    yield process, run
    process.kill()
    process.wait()


def test_a_second_training_is_refused_and_the_first_goes_on(training: tuple[ready.Process, Path], images: Path) -> None:
    first, run = training
    words = ["train", "--cpu", "--data", images, "--output-dir", run, *TINY, "optim.epochs=3000"]
    for more in ([], ["--no-resume"], ["--gpus", "2"]):
        second = dino2(*words, *more)
        assert second.returncode == 2 and f"is being trained by process {first.pid}" in second.stderr, second.stderr
    # A launcher's own process has no look beforehand: the lock itself refuses it.
    raw = dino2(*words, RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="0")
    assert raw.returncode == 2 and f"is being trained by process {first.pid}" in raw.stderr, raw.stderr
    first.send_signal(signal.SIGINT)
    assert first.wait(60) == 130
    iterations = [line["iteration"] for line in metrics_of(run)]
    assert iterations == list(range(len(iterations))) and not list(run.glob(f"{NAME}*")), "nothing is left"


def test_a_killed_training_leaves_a_folder_that_goes_on_at_once(
    training: tuple[ready.Process, Path], images: Path
) -> None:
    first, run = training
    first.kill()
    first.wait()
    assert (run / NAME).exists()
    words = ["train", "--cpu", "--data", images, "--output-dir", run, *TINY, "optim.epochs=3000"]
    again = ready.server().start(*words)
    until = time.monotonic() + 120
    while (found := owner_of(run)) is None or found[0].pid != again.pid:
        assert time.monotonic() < until and again.poll() is None
        time.sleep(0.1)
    again.kill()
    again.wait()


def test_who_may_take_over(tmp_path: Path, elsewhere: Owner) -> None:
    mine = Owner.this()
    assert owner_of(tmp_path) is None
    write(tmp_path, elsewhere, age=STALE_S / 2)
    with pytest.raises(ConfigError, match=r"process .* on node9, with a sign of life 150 s ago"), owning(tmp_path):
        pass
    with owning(tmp_path, take_over=True):  # the user says so
        found = owner_of(tmp_path)
        assert found is not None and found[0].machine == mine.machine
        with pytest.raises(ConfigError, match="is being trained by process"):
            check_free(tmp_path)
    assert owner_of(tmp_path) is None
    write(tmp_path, elsewhere, age=STALE_S + 20)  # silent for too long
    with owning(tmp_path):
        pass
    write(tmp_path, replace(mine, pid=2**22 - 3, born="1"))  # here, and its process has ended
    with owning(tmp_path):
        pass
    write(tmp_path, replace(mine, token="earlier", born="1"))  # here, and its number is used again
    with owning(tmp_path):
        pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_before_training_begins_leaves_the_folder_free(tmp_path: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as stop, signals_as_exceptions(), owning(tmp_path):
        signal.raise_signal(number)
    assert stop.value.signal == number and not list(tmp_path.iterdir()) and signal.getsignal(number) is before


def test_restarts_and_requeues_do_not_lock_themselves_out(
    tmp_path: Path, elsewhere: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DINO2_RUN_TOKEN", "a-command")
    write(tmp_path, replace(elsewhere, session="a-command"))
    with owning(tmp_path):  # started again by its supervisor, on another machine
        pass
    monkeypatch.delenv("DINO2_RUN_TOKEN")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    write(tmp_path, replace(elsewhere, job="7", start=0))  # the same job, queued again
    with owning(tmp_path):
        pass
    write(tmp_path, replace(elsewhere, job="7", start=1))  # a second step of the job as it is now
    with pytest.raises(ConfigError, match="job 7"), owning(tmp_path):
        pass


@pytest.mark.parametrize(("state", "refused"), [("RUNNING", True), ("COMPLETED", False), ("CANCELLED", False)])
def test_slurm_knows_whether_a_job_has_ended(
    state: str, refused: bool, tmp_path: Path, elsewhere: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "squeue").write_text(f"#!/bin/sh\necho {state}\n")
    (programs / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    write(tmp_path, replace(elsewhere, job="12"))
    if refused:
        with pytest.raises(ConfigError, match="scancel 12"), owning(tmp_path):
            pass
    else:
        with owning(tmp_path):
            pass


COMPETE = """
import sys, time
from pathlib import Path
from dinov2cli.errors import ConfigError
from dinov2cli.launch.owner import owning
run, mine = map(Path, sys.argv[1:])
try:
    with owning(run):
        mine.touch()
        time.sleep(0.3)
        mine.unlink()
except ConfigError:
    pass
"""


def test_of_many_that_find_a_dead_owner_one_at_a_time_gets_the_folder(tmp_path: Path) -> None:
    run, held = tmp_path / "run", tmp_path / "held"
    run.mkdir()
    held.mkdir()
    write(run, replace(Owner.this(), pid=2**22 - 3, born="1"))
    processes = [ready.server().start(run, held / f"{number}", code=COMPETE) for number in range(6)]
    most = 0
    while None in [process.poll() for process in processes]:
        most = max(most, len(list(held.iterdir())))
        time.sleep(0.005)
    assert most == 1 and {process.returncode for process in processes} == {0}
    assert not list(run.iterdir())


def test_who_has_lost_the_folder_ends_without_writing(tmp_path: Path, elsewhere: Owner) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom dinov2cli.launch import owner\nowner.BEAT_S = 0.2\n"
        f"with owner.owning(Path({str(tmp_path)!r})):\n    print('mine', flush=True)\n    time.sleep(60)\n"
    )
    reading, writing = os.pipe()
    with open(writing, "wb") as written:
        process = ready.server().start(code=code, stdout=written)
    with open(reading) as said:
        assert said.readline() == "mine\n"
    aside = tmp_path / "aside"
    aside.write_text(json.dumps(asdict(elsewhere)))
    aside.rename(tmp_path / NAME)
    assert process.wait(30) == 1
    found = owner_of(tmp_path)
    assert found is not None and found[0] == elsewhere, "what is another's stays"


def test_a_folder_for_which_a_job_waits_takes_no_second_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs, own = tmp_path / "bin", tmp_path / "run" / "slurm" / "1"
    programs.mkdir()
    own.mkdir(parents=True)
    (own / "job.json").write_text(json.dumps({"command": ["train"], "job_id": "31", "nodes": 1}))
    (programs / "squeue").write_text("#!/bin/sh\necho PENDING\n")
    (programs / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    with pytest.raises(ConfigError, match="has a job already: 31 is pending"):
        owner.refuse_jobs_of(tmp_path / "run")
    (programs / "squeue").write_text("#!/bin/sh\necho COMPLETED\n")
    owner.refuse_jobs_of(tmp_path / "run")


@pytest.mark.parametrize("kind", ["config", "metrics", "teacher", "checkpoint"])
def test_a_folder_of_the_reference_is_never_written_to(kind: str, images: Path, tmp_path: Path) -> None:
    run = tmp_path / "reference"
    (run / "eval" / "training_9").mkdir(parents=True)
    if kind == "config":
        shutil.copy(GOLDEN / "reference_config_vitl16_short.yaml", run / "config.yaml")
    elif kind == "metrics":
        (run / "training_metrics.json").write_text('{"iteration": 0}\n')
    elif kind == "teacher":
        (run / "eval" / "training_9" / "teacher_checkpoint.pth").write_bytes(b"theirs")
    else:
        shutil.rmtree(run / "eval")
        (run / "model_0000009.rank_0.pth").write_bytes(b"theirs")
    before = {path: path.stat().st_mtime_ns for path in [run, *run.rglob("*")]}
    for more in ([], ["--no-resume"]):
        result = dino2("train", "--cpu", "--data", images, "--output-dir", run, *TINY, *more)
        assert result.returncode == 2
        assert "holds a run that dino2 has not written" in result.stderr and f"--init-from {run}" in result.stderr
    assert {path: path.stat().st_mtime_ns for path in [run, *run.rglob("*")]} == before


def test_what_killed_trainings_left_aside_is_removed_and_nothing_else(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    teacher = folder.teacher(9)
    kept = [folder.config, folder.metrics, teacher, teacher.parent / ".results.json.7.partial", tmp_path / NAME]
    left = [path.with_name(f".{path.name}.7.partial") for path in (*kept[:3], folder.knn_metrics, folder.heartbeat(0))]
    left += [tmp_path / f".dino2-preflight-{'0' * 32}-0", tmp_path / f"{NAME}.0123.now", tmp_path / f"{NAME}.0123"]
    for path in kept + left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    folder.clear_leftovers()
    assert all(path.exists() for path in kept) and not any(path.exists() for path in left)
