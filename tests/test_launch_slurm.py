"""Submission to Slurm, as far as it goes without a cluster: the script, what it must not import, what it says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import ready

from dinov2cli.errors import ConfigError
from dinov2cli.launch.environment import SLURM_OPTIONS
from dinov2cli.launch.slurm import (
    Wanted,
    last_line,
    new_folder,
    outside_of_any_job,
    script,
    slurm_of_this_job,
    split_parameter,
    write_record,
)
from dinov2cli.launch.status import read_jobs
from dinov2cli.requests.eval import KnnRequest
from dinov2cli.requests.launch import GPUS_PER_NODE, Slurm
from dinov2cli.requests.train import TrainRequest

TRAIN = ["train", "--preset", "vitl16_short", "--data", "SamplePhotos:split=TRAIN", "--output-dir"]


def run(arguments: list[str], path: str, *, torch_too: bool = False) -> subprocess.CompletedProcess[str]:
    """`dino2 arguments` in a process that fails if it has imported torch at the end, unless `torch_too`."""
    code = (
        "import sys\n"
        "from dinov2cli.cli.main import main\n"
        "try:\n"
        f"    main({arguments!r})\n"
        "finally:\n"
        f"    assert {torch_too} or 'torch' not in sys.modules, 'torch was imported'\n"
    )
    environment = {**os.environ, "PATH": path, "COLUMNS": "200"}
    if torch_too:
        return ready.server().run(code=code, env=environment)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


def directives(text: str) -> dict[str, str]:
    words = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH --")]
    return {word.partition("=")[0]: word.partition("=")[2] for word in words}


def test_a_dry_run_prints_the_script_and_writes_nothing(tmp_path: Path) -> None:
    more = ["--nodes", "4", "--gpus", "8", "--partition", "gpu", "--account", "vision", "--qos", "long",
            "--constraint", "a100", "--exclude", "n[3-4]", "--comment", "a run", "--timeout-min", "600",
            "--mem", "900G", "--slurm", "reservation=spring", "--slurm", "exclusive=true",
            "--slurm", "signal_delay_s=300",
            "--setup", "module load cuda", "--setup", "export A=1"]  # fmt: skip
    result = run([*TRAIN, str(tmp_path / "run"), "--dry-run", *more], "/nowhere", torch_too=True)
    assert result.returncode == 0, result.stderr
    assert not list(tmp_path.iterdir())
    shown = " ".join(result.stderr.split())
    assert "batch 2048 images (64 per process x 32 x 1 accumulated)" in shown and "GB a process" in shown
    assert "on H100s that do as well" in shown
    found = directives(result.stdout)
    expected = {
        "nodes": "4", "ntasks-per-node": "1", "gpus-per-node": "8", "cpus-per-task": "64", "partition": "gpu",
        "account": "vision", "qos": "long", "constraint": "a100", "exclude": "'n[3-4]'", "comment": "'a run'",
        "time": "600", "mem": "900G", "reservation": "spring", "exclusive": "", "signal": "USR2@300", "requeue": "",
        "job-name": "dino2-run",
    }  # fmt: skip
    assert {key: found.get(key) for key in expected} == expected
    assert "wckey" not in found
    lines = result.stdout.splitlines()
    (srun,) = [line for line in lines if line.startswith("srun ")]
    assert "--kill-on-bad-exit=1" in srun and "--cpus-per-task=64" in srun
    assert lines.index("module load cuda") < lines.index("export A=1") < lines.index(srun)


def test_the_configuration_is_checked_before_anything_is_submitted(tmp_path: Path) -> None:
    result = run([*TRAIN, str(tmp_path / "run"), "--nodes", "4", "optim.epoch=3"], "/nowhere")
    assert result.returncode == 2
    assert "did you mean optim.epochs?" in result.stderr and not list(tmp_path.iterdir())


def test_without_slurm_one_line_says_so_and_names_the_alternative(tmp_path: Path) -> None:
    result = run([*TRAIN, str(tmp_path / "run"), "--nodes", "4"], "/nowhere")
    assert result.returncode == 2
    first, second = result.stderr.strip().splitlines()
    assert "no Slurm here" in first and "--gpus N" in second
    assert not list(tmp_path.iterdir())


def test_any_slurm_option_submits(tmp_path: Path) -> None:
    for option in (["--partition", "gpu"], ["--slurm", "nice=3"], ["--timeout-min", "10"]):
        result = run([*TRAIN, str(tmp_path / "run"), *option], "/nowhere")
        assert result.returncode == 2 and "no Slurm here" in result.stderr
    evaluation = run(["eval", "knn", "runs/x", "--partition", "gpu"], "/nowhere")
    assert evaluation.returncode == 2 and "no Slurm here" in evaluation.stderr


def test_jobs_on_the_cpu_ask_for_no_gpus(tmp_path: Path) -> None:
    found = directives(script(Wanted(Slurm(), 6, cpu=True), folder=tmp_path, name="x"))
    assert "gpus-per-node" not in found and found["cpus-per-task"] == "6"


def test_parameters_win_over_the_options_of_their_name(tmp_path: Path) -> None:
    slurm = Slurm(partition="gpu", parameters=("partition=big", "mail-type=END", "requeue=false"))
    found = directives(script(Wanted(slurm, GPUS_PER_NODE, cpu=False), folder=tmp_path, name="x"))
    assert found["partition"] == "big" and found["mail-type"] == "END" and "requeue" not in found


@pytest.mark.parametrize("word", ["partition", "=x", "--=x"])
def test_parameters_that_are_none(word: str) -> None:
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        split_parameter(word)


def test_a_short_limit_leaves_time_to_train_before_the_signal(tmp_path: Path) -> None:
    found = directives(script(Wanted(Slurm(timeout_min=3), GPUS_PER_NODE, cpu=False), folder=tmp_path, name="x"))
    assert found["signal"] == "USR2@60"


def test_a_job_submits_others_with_its_own_options_but_those_of_size(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Slurm(nodes=3, partition="gpu", mem="9G", cpus_per_task=4, setup=("a", "b"), parameters=("x=1",))
    monkeypatch.setenv(SLURM_OPTIONS, own.model_dump_json())
    assert slurm_of_this_job("x=2") == Slurm(partition="gpu", setup=("a", "b"), parameters=("x=1", "x=2"))
    monkeypatch.delenv(SLURM_OPTIONS)
    assert slurm_of_this_job() == Slurm()


def test_status_knows_the_trainings_among_the_jobs_of_a_run(tmp_path: Path) -> None:
    wanted = Wanted(Slurm(nodes=2), 8, cpu=False)
    for job_id, request in (("7", TrainRequest(preset="demo")), ("8", KnnRequest(checkpoint="run"))):
        write_record(new_folder(tmp_path / "slurm"), job_id, request, wanted)
    (job,) = read_jobs(tmp_path)
    assert (job["job_id"], job["nodes"], job["request"]) == ("7", 2, {"preset": "demo"})


def test_every_job_gets_a_folder_of_its_own(tmp_path: Path) -> None:
    folders = {new_folder(tmp_path) for _ in range(5)}
    assert len(folders) == 5 and all(folder.is_dir() for folder in folders)


def test_a_job_does_not_hand_its_own_variables_to_those_it_submits(monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"SLURM_JOB_ID", "SLURM_CPUS_PER_TASK", "RANK", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE", "DINO2_NOTES"}
    of_the_user = {"SLURM_CONF", "DINO2_CACHE", "DINO2_WEIGHTS_URL", "HOME"}
    for name in own | of_the_user:
        monkeypatch.setenv(name, "1")
    before = dict(os.environ)
    with outside_of_any_job():
        assert os.environ.keys() >= of_the_user
        assert {name for name in os.environ if name.startswith("SLURM_")} == {"SLURM_CONF"}
        assert not own & os.environ.keys()
    assert dict(os.environ) == before


def test_the_reason_of_a_refusal_is_found() -> None:
    text = "sbatch: hint: x\nsbatch: error: invalid partition specified: nowhere\nFailed to run"
    assert last_line(text) == "sbatch: error: invalid partition specified: nowhere"
    assert last_line("") == "no reason given"
