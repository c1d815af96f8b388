"""`dino2 train --gpus N`: several processes of this machine, their errors, signals, deaths and restarts."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ready
import torch
from tiny_run import TINY, metrics_of, write_images, write_teacher

from dinov2cli.launch.restarts import MAX_CRASHES, Restart, enough, read_restarts

LONGER = ["train.OFFICIAL_EPOCH_LENGTH=20", "train.checkpoint_period=5", "evaluation.eval_period_iterations=20"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "250"}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "data")


def command(images: Path, run: Path, *more: str) -> list[str]:
    return ["train", "--cpu", "--data", str(images), "--output-dir", str(run), *TINY, *more]


def start(images: Path, run: Path, *more: str) -> ready.Process:
    with run.with_suffix(".log").open("ab") as log:
        words = [*command(images, run, *more), "--gpus", "2"]
        return ready.server().start(*words, stdout=log, stderr=log, env=ENVIRONMENT, workers=True)


def lines_of(run: Path) -> int:
    metrics = run / "training_metrics.json"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def wait_for_line(process: ready.Process, run: Path, number: int) -> None:
    while lines_of(run) < number:
        assert process.poll() is None, run.with_suffix(".log").read_text()
        time.sleep(0.01)


def workers_of(run: Path) -> list[int]:
    """Process numbers of the workers, by rank, as they say themselves."""
    return [json.loads(path.read_text())["pid"] for path in sorted((run / "logs/heartbeat").glob("rank_*.json"))]


def loaders_of(worker: int) -> list[int]:
    return [int(pid) for file in Path(f"/proc/{worker}/task").glob("*/children") for pid in file.read_text().split()]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pids: list[int], within: float = 20) -> bool:
    until = time.monotonic() + within
    while any(map(is_alive, pids)) and time.monotonic() < until:
        time.sleep(0.1)
    return not any(map(is_alive, pids))


def teacher_of(run: Path, iteration: int) -> dict[str, torch.Tensor]:
    file = run / "eval" / f"training_{iteration}" / "teacher_checkpoint.pth"
    state: dict[str, torch.Tensor] = torch.load(file, weights_only=True)["teacher"]
    return state


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that nothing disturbed."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert start(images, run, *LONGER).wait(timeout=300) == 0, run.with_suffix(".log").read_text()
    return run


def assert_equal_runs(run: Path, whole: Path) -> None:
    assert metrics_of(run) == metrics_of(whole)
    one, other = teacher_of(run, 59), teacher_of(whole, 59)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_two_processes_are_those_of_torchrun_by_hand(images: Path, tmp_path: Path) -> None:
    by_us, by_hand = tmp_path / "us", tmp_path / "hand"
    # Each process begins with the start of Python, as those of the other tests do not.
    dino2 = ["-m", "dinov2cli"]
    words = [sys.executable, *dino2, *command(images, by_us), "--gpus", "2"]
    result = subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT)
    assert result.returncode == 0, result.stderr
    log = result.stderr
    assert "2; sharding" in log and "elastic" not in log and log.count("iteration 1/12") == 1
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", *dino2]
    result = subprocess.run([*torchrun, *command(images, by_hand)], capture_output=True, text=True, env=ENVIRONMENT)
    assert result.returncode == 0, result.stderr
    assert metrics_of(by_us) == metrics_of(by_hand)
    assert metrics_of(by_us)[0]["current_batch_size"] == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "/no/such/folder"], "/no/such/folder"),
        (["optim.epoch=3"], "did you mean optim.epochs?"),
        (["--init-from", "/no/such/weights.pth"], "/no/such/weights.pth"),
    ],
)
def test_an_error_of_all_is_said_once_and_leaves_nothing(
    arguments: list[str], message: str, images: Path, tmp_path: Path
) -> None:
    words = [*command(images, tmp_path / "run"), "--gpus", "2", *arguments]
    result = ready.dino2(*words, env=ENVIRONMENT, workers=True)
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("error: ") == 1 and message in result.stderr
    assert "Traceback" not in result.stderr and "start again" not in result.stderr
    assert not list(tmp_path.rglob("*.*")), "files were left behind"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_more_gpus_than_there_are(images: Path, tmp_path: Path) -> None:
    words = [word for word in command(images, tmp_path / "run") if word != "--cpu"]
    result = ready.dino2(*words, "--gpus", "2", env=ENVIRONMENT)
    assert result.returncode == 2
    assert "--gpus 2: this machine has no GPU" in result.stderr and "--cpu" in result.stderr


@pytest.mark.long
def test_an_evaluation_in_two_processes_is_said_once_and_as_in_one(images: Path, tmp_path: Path) -> None:
    """Of features that differ: a short run's are alike to the last digits, and neighbours a matter of rounding."""
    data = ["--train-dataset", str(images), "--val-dataset", str(images), "--nb-knn", "5", "--device", "cpu"]
    words = ["eval", "knn", str(write_teacher(tmp_path)), *data, "--no-cache", "--json"]
    results = []
    for more in ([], ["--gpus", "2"]):
        result = ready.dino2(*words, *more, env=ENVIRONMENT, workers=True)
        assert result.returncode == 0, result.stderr
        results.append(json.loads(result.stdout)["rows"])
    assert results[0] == results[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_ends_all_processes_saved(number: signal.Signals, images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(images, run, *LONGER, "train.num_workers=1")
    wait_for_line(process, run, 7)
    workers = workers_of(run)
    assert len(workers) == 2
    process.send_signal(number)
    assert process.wait(timeout=60) == 130
    assert gone(workers, within=0)
    log = run.with_suffix(".log").read_text()
    assert log.count("the same command resumes") == 1
    assert "Traceback" not in log and "start again" not in log
    reached = lines_of(run)
    assert (run / "checkpoints" / f"iteration_{reached:08d}").is_dir()


def test_a_second_ctrl_c_does_not_wait(images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(images, run, *LONGER)
    wait_for_line(process, run, 3)
    workers = workers_of(run)
    os.kill(workers[1], signal.SIGSTOP)  # so that the first cannot be obeyed
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert gone(workers)


@pytest.mark.long
def test_a_process_that_hangs_is_replaced(images: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(images, run, *LONGER, "train.hang_timeout=8")
    wait_for_line(process, run, 12)
    os.kill(workers_of(run)[1], signal.SIGSTOP)
    assert process.wait(timeout=300) == 0, run.with_suffix(".log").read_text()
    (restart,) = read_restarts(run)
    assert restart.kind == "crash" and "rank_00000.txt" in restart.reason
    assert_equal_runs(run, whole)


@pytest.mark.long
def test_starting_over_is_done_once_not_at_every_restart(images: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert start(images, run, "optim.epochs=1", "optim.warmup_epochs=0").wait(timeout=120) == 0
    process = start(images, run, *LONGER, "--no-resume")
    while not (run / "previous_1").exists():
        time.sleep(0.05)
    wait_for_line(process, run, 12)
    os.kill(workers_of(run)[0], signal.SIGKILL)
    assert process.wait(timeout=300) == 0, run.with_suffix(".log").read_text()
    assert_equal_runs(run, whole)
    assert [path.name for path in run.glob("previous_*")] == ["previous_1"]


@pytest.mark.slow
def test_a_killed_process_or_loader_is_no_more_than_a_pause(images: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(images, run, *LONGER, "train.num_workers=1")
    wait_for_line(process, run, 12)
    os.kill(workers_of(run)[1], signal.SIGKILL)
    wait_for_line(process, run, 30)
    os.kill(loaders_of(workers_of(run)[0])[0], signal.SIGKILL)
    assert process.wait(timeout=300) == 0, run.with_suffix(".log").read_text()
    first, second = read_restarts(run)
    assert (first.kind, first.rank, first.reason) == ("death", 1, "was killed (SIGKILL)")
    assert second.kind == "death" and second.reason.startswith("a data loader process was killed by the system")
    assert second.iteration >= 25, "nothing is lost beyond the last checkpoint"
    assert_equal_runs(run, whole)


@pytest.mark.slow
def test_no_process_outlives_the_launcher(images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(images, run, *LONGER, "train.num_workers=1")
    wait_for_line(process, run, 3)
    workers = workers_of(run)
    loaders = [loader for worker in workers for loader in loaders_of(worker)]
    assert len(workers) == 2 and len(loaders) >= 2
    process.kill()
    process.wait()
    assert gone([*workers, *loaders])


SUPERVISE = """
import sys
from pathlib import Path
from dinov2cli.cli.main import main
from dinov2cli.console import set_up_logging
from dinov2cli.errors import Dino2Error
from dinov2cli.launch.supervisor import Group, supervise
set_up_logging()
try:
    supervise(Group(["-c", sys.argv[1]], 2, Path(sys.argv[2]), Path(sys.argv[3])))
except Dino2Error as error:
    print(type(error).__name__, error)
    sys.exit(error.exit_code)
"""


def waiting(limits: dict[str, float]) -> str:
    return "import dinov2cli.launch.supervisor as s\n" + "".join(
        f"s.{key} = {value}\n" for key, value in limits.items()
    )


def supervise(code: str, tmp_path: Path, **limits: float) -> subprocess.CompletedProcess[str]:
    """Run two processes of `code` under a supervisor of their own, which waits so long and no longer."""
    run = tmp_path / "run"
    words = [code, str(tmp_path / "notes"), str(run)]
    return ready.server().run(*words, code=waiting(limits) + SUPERVISE, env=ENVIRONMENT, timeout=200, workers=True)


@pytest.mark.long
def test_failures_without_progress_end_with_the_failing_process_own_error(tmp_path: Path) -> None:
    code = """if True:
        import os, time
        from dinov2cli.launch.notes import reported
        with reported():
            if os.environ["RANK"] == "1":
                raise ArithmeticError("the cat ate it")
            time.sleep(60)
    """
    result = supervise(code, tmp_path, LAST_WORDS=1.0)
    assert result.returncode == 1
    assert "process 1 failed, again and again" in result.stdout and "ArithmeticError: the cat ate it" in result.stdout
    assert result.stdout.count("Traceback") == 1 and "Traceback" not in result.stderr
    restarts = read_restarts(tmp_path / "run")
    assert [(each.rank, each.kind) for each in restarts] == [(1, "crash")] * MAX_CRASHES


@pytest.mark.long
def test_a_process_that_has_reported_its_failure_and_does_not_end_is_ended(tmp_path: Path) -> None:
    code = """if True:
        import os, time
        from pathlib import Path
        from dinov2cli.launch.notes import note_of, write_note
        if Path(os.environ["DINO2_NOTES"]).name == "start_0":
            if os.environ["RANK"] == "1":
                write_note(Path(os.environ["DINO2_NOTES"]), note_of(ArithmeticError("the cat ate it"), 1))
            time.sleep(600)
    """
    result = supervise(code, tmp_path, PATIENCE=5.0)
    assert result.returncode == 0, result.stderr
    assert [(each.rank, each.kind) for each in read_restarts(tmp_path / "run")] == [(1, "crash")]


@pytest.mark.long
def test_a_process_that_does_not_begin_is_replaced(tmp_path: Path) -> None:
    code = """if True:
        import os, time
        from pathlib import Path
        from dinov2cli.launch.notes import mark
        if Path(os.environ["DINO2_NOTES"]).name == "start_0" and os.environ["RANK"] == "1":
            time.sleep(600)
        mark("joining")
    """
    result = supervise(code, tmp_path, BEGINNING=3, LOOK=0.5)
    assert result.returncode == 0, result.stderr
    (restart,) = read_restarts(tmp_path / "run")
    assert (restart.rank, restart.kind, restart.reason) == (1, "crash", "did not begin within 0.05 minutes")


@pytest.mark.long
def test_a_process_that_does_not_end_after_the_others_is_replaced(tmp_path: Path) -> None:
    code = """if True:
        import os, time
        from pathlib import Path
        if Path(os.environ["DINO2_NOTES"]).name == "start_0" and os.environ["RANK"] == "1":
            time.sleep(600)
    """
    result = supervise(code, tmp_path, FINISHING=3, LOOK=0.5)
    assert result.returncode == 0, result.stderr
    (restart,) = read_restarts(tmp_path / "run")
    assert (restart.rank, restart.kind) == (1, "crash")
    assert restart.reason == "did not end within 0.05 minutes of the first"


def test_progress_allows_any_number_of_failures(tmp_path: Path) -> None:
    code = f"""if True:
        import os
        from pathlib import Path
        checkpoints = Path({str(tmp_path)!r}) / "run" / "checkpoints"
        done = len(list(checkpoints.glob("*")))
        if os.environ["RANK"] == "0" and done < 7:
            (checkpoints / f"iteration_{{done + 1:08d}}").mkdir(parents=True)
            os._exit(3)
    """
    result = supervise(code, tmp_path)
    assert result.returncode == 0, result.stdout
    assert [each.iteration for each in read_restarts(tmp_path / "run")] == [1, 2, 3, 4, 5, 6, 7]


def test_the_first_error_counts_not_those_that_follow_from_it(tmp_path: Path) -> None:
    code = """if True:
        import os, time
        from dinov2cli.errors import DataError
        from dinov2cli.launch.notes import reported
        with reported():
            if os.environ["RANK"] == "1":
                raise DataError("no such folder", "look again")
            time.sleep(0.5)
            raise RuntimeError("connection closed by peer")
    """
    result = supervise(code, tmp_path)
    assert result.returncode == 2
    assert result.stdout == "Dino2Error no such folder\nlook again\n"
    assert not read_restarts(tmp_path / "run")


TWO_MACHINES = """
import sys
from pathlib import Path
from torch.distributed import TCPStore
from dinov2cli.console import set_up_logging
from dinov2cli.launch.supervisor import Group, supervise
set_up_logging()
node, port = int(sys.argv[4]), int(sys.argv[5])
store = TCPStore("localhost", port, is_master=node == 0, wait_for_workers=False)
supervise(Group(["-c", sys.argv[1]], 2, Path(sys.argv[2]), Path(sys.argv[3]), session="s", nodes=2, node=node), store)
"""


def test_a_death_on_one_machine_starts_the_processes_of_both_again(tmp_path: Path) -> None:
    code = f"""if True:
        import os, signal, time
        import torch.distributed as dist
        from pathlib import Path
        rank, start = os.environ["RANK"], Path(os.environ["DINO2_NOTES"]).name
        dist.init_process_group("gloo")
        dist.barrier()
        (Path({str(tmp_path)!r}) / f"{{start}} rank {{rank}} local {{os.environ['LOCAL_RANK']}}").touch()
        dist.barrier()
        if start == "start_0":
            if rank == "3":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
    """
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    words = [code, tmp_path / "notes", tmp_path / "run"]
    machines = [
        ready.server().start(*words, str(node), str(port), code=TWO_MACHINES, env=ENVIRONMENT, workers=True)
        for node in (0, 1)
    ]
    assert [machine.wait(timeout=200) for machine in machines] == [0, 0]
    (restart,) = read_restarts(tmp_path / "run")
    assert (restart.kind, restart.rank, restart.reason) == ("death", 3, "was killed (SIGKILL)")
    seen = sorted(path.name for path in tmp_path.glob("start_*"))
    assert seen == [f"start_{start} rank {rank} local {rank % 2}" for start in (0, 1) for rank in range(4)]


@pytest.mark.long
def test_machines_that_are_ready_wait_for_one_that_is_not(tmp_path: Path) -> None:
    """As where it fetches weights first, which the others have."""
    code = """if True:
        import os, time
        import torch.distributed as dist
        from dinov2cli.launch.notes import mark
        if os.environ["RANK"] == "3":
            time.sleep(8)
        mark("joining")
        dist.init_process_group("gloo")
        mark("joined")
        dist.barrier()
    """
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    limited = waiting({"JOINING": 2, "LOOK": 0.5}) + TWO_MACHINES
    words = [code, tmp_path / "notes", tmp_path / "run"]
    machines = [
        ready.server().start(*words, str(node), str(port), code=limited, env=ENVIRONMENT, workers=True)
        for node in (0, 1)
    ]
    assert [machine.wait(timeout=200) for machine in machines] == [0, 0]
    assert not read_restarts(tmp_path / "run")


def test_kills_are_forgiven_longer_than_crashes() -> None:
    crashes = [Restart("crash", "", 0, 10, "s")] * MAX_CRASHES
    deaths = [Restart("death", "", 0, 10, "s")] * MAX_CRASHES
    requeues = [Restart("requeue", "", -1, 10, "s")] * 100
    assert enough(crashes, "s", 10)
    assert not enough(crashes, "s", 20), "a newer checkpoint is progress"
    assert not enough(crashes, "another", 10), "only this command's count"
    assert not enough(deaths, "s", 10) and enough(deaths * 4, "s", 10)
    assert not enough(requeues, "s", 10)
