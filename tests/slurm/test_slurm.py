"""`dino2 ... --nodes 2` with real jobs: to the end, and through everything that happens to jobs."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_run import TINY, metrics_of, write_images

from dinov2cli.launch.restarts import read_restarts

pytestmark = pytest.mark.slurm

LENGTH = ["train.OFFICIAL_EPOCH_LENGTH=20", "train.checkpoint_period=5", "evaluation.eval_period_iterations=0"]
LINES = 60
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "data")


@pytest.fixture(scope="module")
def whole(cluster: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """Metrics of two processes on one machine, without Slurm."""
    run = tmp_path_factory.mktemp("whole") / "run"
    result = dino2(*training(images, run), "--gpus", "2")
    assert result.returncode == 0, result.stderr
    return metrics_of(run)


def dino2(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "dinov2cli", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, env={**ENVIRONMENT, **slurm_conf()}, timeout=300)


def slurm_conf() -> dict[str, str]:
    return {"SLURM_CONF": os.environ["SLURM_CONF"]}


def training(images: Path, run: Path) -> list[str]:
    return ["train", "--cpu", "--data", str(images), "--output-dir", str(run), *TINY, *LENGTH]


class Job:
    """A submitted command."""

    def __init__(self, run: Path, *arguments: str) -> None:
        result = dino2(*arguments)
        assert result.returncode == 0, result.stderr
        said = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
        self.run, self.id, self.log = run, said["job"], Path(said["log"])
        assert said["stop"] == f"scancel {self.id}"

    def state(self) -> str:
        words = ["scontrol", "show", "job", self.id, "--oneliner"]
        shown = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        return shown.partition("JobState=")[2].split()[0]

    def logs(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.log.parent.glob("*_log.out")))

    def wait(self, *states: str, within: float = 240) -> str:
        until = time.monotonic() + within
        while (state := self.state()) not in (states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")):
            assert time.monotonic() < until, f"{state}\n{self.logs()}"
            time.sleep(0.5)
        return state

    def wait_for_line(self, number: int, within: float = 120) -> None:
        metrics, until = self.run / "training_metrics.json", time.monotonic() + within
        while not metrics.exists() or len(metrics.read_text().splitlines()) < number:
            assert time.monotonic() < until and self.state() in ("PENDING", "RUNNING"), self.logs()
            time.sleep(0.1)

    def finish(self) -> None:
        assert self.wait() == "COMPLETED", self.logs()


@pytest.fixture
def submit(cluster: Path, images: Path, tmp_path: Path) -> Callable[..., Job]:
    run = tmp_path / "run"
    return lambda *more: Job(run, *training(images, run), "--nodes", "2", "--timeout-min", "20", *more)


def worker(run: Path, rank: int) -> int:
    """Process number of a worker, as it says itself."""
    return int(json.loads((run / "logs" / "heartbeat" / f"rank_{rank:05d}.json").read_text())["pid"])


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_two_machines_train_as_two_processes(submit: Callable[..., Job], whole: list[dict[str, float]]) -> None:
    job = submit("--comment", "for the queue", "--slurm", "nice=1", "--setup", "export GREETING=hello")
    job.finish()
    assert metrics_of(job.run) == whole
    assert job.log.read_text().count("iteration 1/60") == 1, "rank 0 speaks in the first machine's log"
    script = next(job.log.parent.glob("*_submission.sh")).read_text()
    assert "#SBATCH --comment='for the queue'" in script and "#SBATCH --nice=1" in script
    assert script.index("export GREETING=hello") < script.index("srun")
    status = json.loads(dino2("status", job.run, "--json").stdout)
    assert status["iteration"] == LINES and status["state"] == "finished"
    assert status["jobs"][-1]["job_id"] == job.id


def test_requeued_by_hand(submit: Callable[..., Job], whole: list[dict[str, float]]) -> None:
    job = submit()
    job.wait_for_line(20)
    subprocess.run(["scontrol", "requeue", job.id], check=True)
    job.finish()
    assert metrics_of(job.run) == whole
    assert [each.kind for each in read_restarts(job.run)] == ["requeue"]


def test_told_that_time_is_up(submit: Callable[..., Job], whole: list[dict[str, float]]) -> None:
    job = submit("train.num_workers=1")
    job.wait_for_line(12)
    subprocess.run(["scancel", "--signal", "USR2", job.id], check=True)
    job.finish()
    assert metrics_of(job.run) == whole
    (restart,) = read_restarts(job.run)
    assert restart.kind == "requeue"
    assert f"interrupted: saved at iteration {restart.iteration};" in job.logs()


def test_told_before_anybody_listens(submit: Callable[..., Job], whole: list[dict[str, float]]) -> None:
    """As in a preemption just after the start: it must not be the end of tasks that are still importing."""
    job = submit()
    until = time.monotonic() + 120
    while not (tasks := tasks_of(job)):
        assert time.monotonic() < until, job.state()
        time.sleep(0.01)
    time.sleep(0.1)
    for pid in tasks:
        os.kill(pid, signal.SIGUSR2)
    job.finish()
    assert metrics_of(job.run) == whole


def tasks_of(job: Job) -> list[int]:
    """The processes that Slurm has started for a job's machines."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (path / "cmdline").read_bytes().split(b"\0")
            if b"submitit.core._submit" in words and b"srun" not in words[0] and os.fsencode(job.log.parent) in words:
                found.append(int(path.name))
    return found


def test_the_batch_script_survives_the_signal(submit: Callable[..., Job], whole: list[dict[str, float]]) -> None:
    job = submit()
    job.wait_for_line(12)
    subprocess.run(["scancel", "--signal", "USR2", "--batch", job.id], check=True)
    job.finish()
    assert metrics_of(job.run) == whole


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process(rank: int, submit: Callable[..., Job], whole: list[dict[str, float]]) -> None:
    job = submit()
    job.wait_for_line(12)
    os.kill(worker(job.run, rank), signal.SIGKILL)
    job.finish()
    assert metrics_of(job.run) == whole
    (restart,) = read_restarts(job.run)
    assert (restart.kind, restart.rank) == ("death", rank)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_task(rank: int, submit: Callable[..., Job], whole: list[dict[str, float]]) -> None:
    job = submit()
    job.wait_for_line(12)
    os.kill(parent(worker(job.run, rank)), signal.SIGKILL)
    job.finish()
    assert metrics_of(job.run) == whole
    (restart,) = read_restarts(job.run)
    assert restart.reason == "a machine's task was killed"


def test_a_machine_that_crashes(cluster: Path, submit: Callable[..., Job], whole: list[dict[str, float]]) -> None:
    """All of the job there and Slurm's own daemon die at once; the machine is back a moment later."""
    job = submit()
    job.wait_for_line(12)
    task = parent(trainer := worker(job.run, 1))
    daemon = int((cluster / "run" / "slurmd-n2.pid").read_text())
    for pid in (daemon, parent(task), task, trainer):
        os.kill(pid, signal.SIGKILL)
    time.sleep(2)
    subprocess.run(["bash", str(cluster / "slurmd.sh"), "n2"], check=True)
    job.finish()
    assert metrics_of(job.run) == whole


def test_preempted(submit: Callable[..., Job], whole: list[dict[str, float]]) -> None:
    job = submit()
    job.wait_for_line(12)
    words = ["srun", "--partition", "high", "--nodes", "2", "--exclusive", "true"]
    subprocess.run(words, check=True, timeout=120, capture_output=True)
    job.finish()
    assert metrics_of(job.run) == whole
    assert [each.kind for each in read_restarts(job.run)] == ["requeue"]


def test_srun_by_hand(cluster: Path, images: Path, whole: list[dict[str, float]], tmp_path: Path) -> None:
    words = ["srun", "--nodes", "2", "--ntasks", "2", sys.executable, "-m", "dinov2cli"]
    result = subprocess.run([*words, *training(images, tmp_path / "run")], capture_output=True, text=True,
                            env={**ENVIRONMENT, **slurm_conf()}, timeout=200)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert metrics_of(tmp_path / "run") == whole


def test_cancelled_is_cancelled(submit: Callable[..., Job]) -> None:
    job = submit()
    job.wait_for_line(5)
    subprocess.run(["scancel", job.id], check=True)
    assert job.wait() == "CANCELLED"
    time.sleep(8)
    assert job.state() == "CANCELLED", "it came back"


def test_an_error_of_the_user_ends_the_job_with_one_message(submit: Callable[..., Job], tmp_path: Path) -> None:
    broken = tmp_path / "broken.pth"  # is there, so that only the job, which reads it, can tell
    broken.write_text("no weights")
    job = submit("--init-from", str(broken))
    assert job.wait() == "FAILED"
    said = [line for line in job.logs().splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and str(broken) in said[0], job.logs()
    assert "Traceback" not in job.logs()
    assert read_restarts(job.run) == []


def test_slurm_own_refusal_is_said(submit: Callable[..., Job], images: Path, tmp_path: Path) -> None:
    result = dino2(*training(images, tmp_path / "refused"), "--nodes", "2", "--slurm", "reservation=nobodys")
    assert result.returncode == 2
    assert "Slurm did not take the job" in result.stderr and "reservation" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--nodes", "12"], "--nodes 12: partition main has 2 machines"),
        (
            ["--nodes", "2", "--partition", "nowhere"],
            "--partition nowhere: Slurm has no partition nowhere",
        ),
    ],
)
def test_what_the_cluster_has_not(cluster: Path, images: Path, tmp_path: Path, options: list[str], says: str) -> None:
    result = dino2(*training(images, tmp_path / "refused"), *options)
    assert result.returncode == 2 and says in result.stderr and not (tmp_path / "refused").exists()


# What two small machines can bear of a preset that takes a hundred GPUs and days.
SITE = """# Two machines without GPUs.
slurm: {partition: main, timeout_min: 20, gpus: 0, fewer_nodes: true}
overrides:
  student.arch: vit_tiny
  train.batch_size_per_gpu: 4
  train.OFFICIAL_EPOCH_LENGTH: 4
  train.num_workers: 0
  train.log_period: 1
  optim.epochs: 3
  optim.warmup_epochs: 1
  teacher.warmup_teacher_temp_epochs: 1
  crops.global_crops_size: 98
  crops.local_crops_size: 42
  crops.local_crops_number: 2
  dino.head_n_prototypes: 64
  ibot.head_n_prototypes: 64
"""


def write_imagenets(root: Path) -> None:
    """ImageNet-1k's folders and ImageNet-22k's tars, in one place: two classes of six and of eight images."""
    rng = np.random.default_rng(0)
    ids = ("n01440764", "n01443537")
    root.mkdir()
    (root / "labels.txt").write_text("".join(f"{wnid},class {wnid}\n" for wnid in ids))
    for wnid in ids:
        for number in range(8):
            name = f"{wnid}_{number}" if number < 6 else f"ILSVRC2012_val_{ids.index(wnid) * 8 + number:08d}"
            path = root / ("train" if number < 6 else "val") / wnid / f"{name}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (96, 128, 3), np.uint8)).save(path)
        with tarfile.open(root / f"{wnid}.tar", "w") as tar:
            for path in sorted(root.glob(f"*/{wnid}/*.JPEG")):
                tar.add(path, path.name)


def test_the_first_three_lines(cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Typed one after the other by somebody who has told dino2 of the machines, and of nothing else."""
    home, work = tmp_path / "home", tmp_path / "work"
    (home / ".config" / "dino2").mkdir(parents=True)
    (home / ".config" / "dino2" / "dino2.yaml").write_text(SITE)
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setitem(ENVIRONMENT, "HOME", str(home))
    for variable in ("DINO2_CONFIG", "DINO2_CACHE", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delitem(ENVIRONMENT, variable, raising=False)
    write_imagenets(tmp_path / "imagenet")

    prepared = dino2("prepare-imagenet", "--root", tmp_path / "imagenet")
    assert prepared.returncode == 0 and prepared.stdout.endswith("next: dino2 train --preset vitl14 --nodes 12\n")
    train = ["train", "--preset", "vitl14", "--nodes", "12"]
    planned = dino2(*train, "--dry-run")
    assert planned.returncode == 0 and "#SBATCH --nodes=2\n" in planned.stdout and not list(work.iterdir())
    assert f"ImageNet22k:root={tmp_path / 'imagenet'}" in planned.stderr

    job = Job(work / "runs" / "vitl14", *train)
    job.finish()
    assert len(metrics_of(job.run)) == 12
    config = (job.run / "config.yaml").read_text()
    assert f"dataset_path: ImageNet22k:root={tmp_path / 'imagenet'}\n" in config and "arch: vit_tiny\n" in config
    evaluated = dino2("eval", "knn", "runs/vitl14")
    assert evaluated.returncode == 0, evaluated.stderr
    (evaluation,) = json.loads(dino2("results", "runs/vitl14", "--json").stdout)["evaluations"]
    assert evaluation["train_dataset"] == f"ImageNet:split=TRAIN:root={tmp_path / 'imagenet'}"

    other = dino2(*train, "student.arch=vit_small")
    assert other.returncode == 2 and "holds a finished run of another configuration" in other.stderr
    again = dino2(*train)
    assert again.returncode == 0 and "finished already: 12 of 12 iterations" in again.stderr and not again.stdout


def test_an_evaluation_as_a_job(cluster: Path, images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert dino2("train", "--cpu", "--data", images, "--output-dir", run, *TINY).returncode == 0
    data = ["--train-dataset", str(images), "--val-dataset", str(images), "--nb-knn", "5", "10"]
    job = Job(run, "eval", "knn", str(run), *data, "--nodes", "1", "--device", "cpu", "--timeout-min", "5")
    job.finish()
    (evaluation,) = json.loads(dino2("results", run, "--json").stdout)["evaluations"]
    assert evaluation["task"] == "knn"


def test_evaluations_during_training_as_jobs(submit: Callable[..., Job], images: Path) -> None:
    keys = ["tasks=[knn]", "tasks_as_jobs=true", f"knn_train_dataset={images}", f"knn_val_dataset={images}"]
    job = submit(*[f"evaluation.{key}" for key in keys])
    job.finish()
    assert "evaluation knn of training_59 is job" in job.logs()
    until = time.monotonic() + 120
    while not (run_results := list(job.run.rglob("results.json"))):
        assert time.monotonic() < until, "\n".join(p.read_text() for p in job.run.rglob("slurm/*/*_log.out"))
        time.sleep(1)
    assert run_results


def test_a_folder_with_a_job_takes_no_second_training(submit: Callable[..., Job], images: Path) -> None:
    job = submit("optim.epochs=300")
    job.wait_for_line(2)
    for more in (["--nodes", "2"], []):
        second = dino2(*training(images, job.run), *more)
        assert second.returncode == 2, second.stderr
        assert f"is being trained by process {worker(job.run, 0)}" in second.stderr and f"job {job.id}" in second.stderr
    unknown = dino2(*training(images, job.run.with_name("other")), "--nodes", "2", "--partition", "mian")
    assert unknown.returncode == 2 and "Slurm has no partition mian; did you mean main?" in unknown.stderr
    subprocess.run(["scancel", job.id], check=True)
    job.wait("CANCELLED")
    assert dino2(*training(images, job.run), "optim.epochs=300", "--gpus", "2", "--dry-run").returncode == 0


def test_a_folder_with_a_job_in_the_queue_takes_no_second_one(submit: Callable[..., Job], images: Path) -> None:
    job = submit("--slurm", "hold=true")
    assert job.state() == "PENDING"
    second = dino2(*training(images, job.run), "--nodes", "2")
    assert second.returncode == 2 and f"has a job already: {job.id} is pending" in second.stderr, second.stderr
    subprocess.run(["scancel", job.id], check=True)
