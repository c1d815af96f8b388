"""Checks before a run: real faults are found, named alike on all processes, and nothing is left behind."""

import json
import os
import re
import resource
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ready
import torch
import torch.multiprocessing as mp
from tiny_run import TINY, write_images

from dinov2cli.cli.main import main
from dinov2cli.config import Config, load_config
from dinov2cli.data.loaders import make_train_loader
from dinov2cli.doctor import machine
from dinov2cli.doctor.finding import Situation, Status, failure, merge, ok, wait_for_all, warning
from dinov2cli.doctor.report import ALL, preflight
from dinov2cli.doctor.run import checkpoint_bytes, memory, within
from dinov2cli.errors import DataError, Dino2Error, EnvironmentProblem

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "data")


def config_of(images: Path, run: Path, *overrides: str) -> Config:
    return load_config(overrides=[*TINY, f"train.dataset_path={images}", f"train.output_dir={run}", *overrides])


def doctor(*words: str | Path) -> int:
    """Exit code of `dino2 doctor`, run in this process."""
    with pytest.raises(SystemExit) as stop:
        main(["doctor", *map(str, words)])
    return int(stop.value.code or 0)


def dino2_in_two_processes(*words: str | Path) -> list[subprocess.CompletedProcess[str]]:
    """With the variables that torchrun sets."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    ranks = [os.environ | common | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    server = ready.server()
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda variables: server.run(*words, env=variables, timeout=200), ranks))


def found_by(stdout: str) -> dict[str, dict]:
    return {each["check"]: each for each in json.loads(stdout)["checks"]}


def test_two_processes_find_all_well_and_leave_nothing(images: Path, tmp_path: Path) -> None:
    words = ["doctor", "--data", images, "--output-dir", tmp_path / "runs" / "one", *TINY, "--json"]
    finished = dino2_in_two_processes(*words)
    assert [each.returncode for each in finished] == [0, 0], finished[0].stderr
    assert not finished[1].stdout
    found = found_by(finished[0].stdout)
    assert set(found) == set(ALL)
    assert {each["status"] for each in found.values()} == {"ok"}
    assert found["communication"]["facts"]["processes"] == 2
    assert found["communication"]["facts"]["bandwidth_gb_s"] > 0
    assert "gloo: 64 MB summed over 2 processes on 1 host" in found["communication"]["finding"]
    assert "the same for all 2 processes" in found["output folder"]["finding"]
    assert not list(tmp_path.iterdir())


def test_the_machine_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor() == 0
    shown = capsys.readouterr().out
    assert f"PyTorch {torch.__version__}" in shown and "Not checked: dataset" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "NOWHERE"], "NOWHERE' is neither a folder nor a known dataset"),
        (["--data", "BROKEN"], "12 of 12 random images cannot be read"),
        (["--output-dir", "FILE/run"], "FILE/run cannot be written to: Not a directory"),
        (["--output-dir", "/proc/dino2-run"], "/proc/dino2-run cannot be written to: No such file"),
        (["NOWHERE"], "NOWHERE: no run folder; there is no config.yaml in it"),
    ],
)
def test_failures_end_with_2(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "BROKEN"
    broken.mkdir()
    (tmp_path / "FILE").write_text("not a folder")
    for number in range(12):
        (broken / f"{number}.png").write_bytes(b"no image")
    places = [str(tmp_path / word) if word.isupper() or word == "FILE/run" else word for word in words]
    assert doctor(*places, "--json") == 2
    shown = capsys.readouterr()
    assert message in shown.err and "Traceback" not in shown.err
    if "--data" in words:
        assert found_by(shown.out)["dataset"]["status"] == "failure"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_disk_too_small(images: Path, small_disk: Path) -> None:
    larger = ["student.embed_dim=96", "train.keep=20"]
    with pytest.raises(EnvironmentProblem, match="20 checkpoints and one being written take") as raised:
        preflight(config_of(images, small_disk / "run", *larger), CPU)
    assert "lower train.keep" in str(raised.value.hint)
    preflight(config_of(images, small_disk / "run", "train.keep=1"), CPU)


def test_sizes_are_those_of_a_real_run(images: Path, tmp_path: Path) -> None:
    config = config_of(images, tmp_path, "student.embed_dim=96", "dino.head_hidden_dim=256")
    batch = next(iter(make_train_loader(config, start=0, stop=1)))
    crops = batch.global_crops.nbytes + batch.local_crops.nbytes
    assert crops == machine.batch_bytes(config)

    from dinov2cli.train.trainer import Trainer

    trainer = Trainer(config, CPU)
    written = trainer.checkpointer.save(0, trainer.state())
    size = sum(file.stat().st_size for file in written.iterdir())
    assert checkpoint_bytes(config) == pytest.approx(size, rel=0.1)


HEADS = ["dino.head_n_prototypes=512", "student.layerscale=1e-5"]


@pytest.mark.parametrize(
    ("gigabytes", "status", "remedy"),
    [
        (100, Status.OK, ""),
        (1.23, Status.WARNING, "This would fit: train.activation_checkpointing=selective"),
        (1.1, Status.FAILURE, "This would fit: train.batch_size_per_gpu=8 train.gradient_accumulation=4"),
        (0.5, Status.FAILURE, "Choose a smaller student.arch"),
    ],
)
def test_memory_too_small(gigabytes: float, status: Status, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinov2cli.train.memory.main_memory", lambda: int(gigabytes * 1e9))
    found = memory(Situation(load_config(preset="demo", overrides=["train.batch_size_per_gpu=32", *HEADS]), CPU))
    assert found.status is status and f"{gigabytes:,.1f} GB are there" in found.text
    assert found.remedy.startswith(remedy)


def test_an_attention_backend_that_cannot_run_here() -> None:
    asked = load_config(overrides=["student.attention_backend=xformers"])
    found = machine.attention(Situation(asked, CPU))
    assert found.status is Status.FAILURE and "CUDA kernels only" in found.text


def test_few_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        found = machine.open_files(Situation(Config(), CPU))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert found.status is Status.WARNING and "ulimit -n" in found.remedy
    assert machine.open_files(Situation(Config(), CPU)).status is Status.OK


def test_the_worst_finding_counts_and_names_its_processes() -> None:
    fine, slow, bad = ok("fine"), warning("slow", "x"), failure("bad", "y")
    assert merge([("n1", fine), ("n2", fine)]) == fine
    assert merge([("n1", fine), ("n2", slow)]).text == "process 1 of 2 (n2): slow"
    found = merge([("n1", slow), ("n2", bad), ("n2", bad)])
    assert (found.status, found.text) == (Status.FAILURE, "processes 1, 2 of 3 (n2): bad")
    assert merge([("n1", bad), ("n2", bad)]) == bad


def test_a_disk_that_hangs() -> None:
    with pytest.raises(EnvironmentProblem, match="/far: no answer within"):
        within(0.05, "/far", lambda: time.sleep(5))
    with pytest.raises(DataError):
        within(5, "/near", lambda: make_train_loader(load_config(overrides=["train.dataset_path=no"]), start=0, stop=1))


def one_of_two(rank: int, case: str, folder: Path) -> None:
    """A process of two; writes what it is told to `folder`."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    shared = folder / "run"
    try:
        if case == "fine":
            preflight(config_of(folder / "images", shared), CPU)
            outcome = "fine"
        elif case == "own folders":  # each process has a file system of its own there
            (folder / f"run{rank}").mkdir()
            preflight(config_of(folder / "images", folder / f"run{rank}"), CPU)
        elif case == "other images":
            if rank == 0:
                write_images(folder / "images0", per_class=3)
            torch.distributed.barrier()
            preflight(config_of(folder / ("images0" if rank == 0 else "images"), shared), CPU)
        elif case == "images missing":
            preflight(config_of(folder / ("images" if rank == 0 else "gone"), shared), CPU)
        elif case == "clocks":
            real = time.time
            machine.time.time = lambda: real() + 60 * rank
            outcome = machine.clocks(Situation(Config(), CPU)).text
        else:
            while rank == 1 and not (folder / "outcome0").exists():
                time.sleep(0.05)
            wait_for_all(seconds=1)
    except Dino2Error as error:
        outcome = f"{type(error).__name__}: {error.message}"
    (folder / f"outcome{rank}").write_text(outcome)
    os._exit(0)  # the process group of a case with a missing process cannot be left in order


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("fine", "fine"),
        ("own folders", "EnvironmentProblem: output folder: process 1 of 2 .*run1 is not the folder that process 0 "),
        ("other images", "DataError: dataset: process 0 of 2 .* process 0 finds 6 images where others find 16"),
        ("images missing", "DataError: dataset: process 1 of 2 .*gone' is neither a folder"),
        ("clocks", "the nodes' clocks are 60.0 s apart"),
        ("process missing", "EnvironmentProblem: not all of the 2 processes answer within 1 s"),
    ],
)
def test_two_processes_stop_for_the_same_reason(
    case: str, message: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dinov2cli.doctor.run.SEEN_SECONDS", 1)
    (tmp_path / "images").symlink_to(images)
    mp.start_processes(one_of_two, args=(case, tmp_path), nprocs=2, start_method="fork")
    outcomes = [(tmp_path / f"outcome{rank}").read_text() for rank in range(2)]
    assert re.match(message, outcomes[0]), outcomes
    if case != "process missing":
        assert outcomes[0] == outcomes[1]
    assert not list(tmp_path.rglob(".dino2*"))
