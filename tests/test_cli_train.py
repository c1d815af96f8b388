"""`dino2 train` as people type it: the reference's own arguments, wrong input, and what it leaves behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ready
from PIL import Image
from tiny_run import TINY, metrics_of, write_images

GOLDEN = Path(__file__).parent / "golden"


def dino2(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return ready.dino2(*arguments, env={**os.environ, "COLUMNS": "250"})  # wide, so that no line is folded


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "data")


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ImageNet's layout with two classes."""
    root = tmp_path_factory.mktemp("imagenet")
    source = write_images(root / "source", per_class=12)
    number = 0
    for label, wnid in enumerate(("n01440764", "n01443537")):
        for split in ("train", "val"):
            (root / split / wnid).mkdir(parents=True)
        for index, png in enumerate(sorted((source / f"class{label}").iterdir())):
            number += 1
            name = f"{wnid}_{index}.JPEG" if index < 8 else f"ILSVRC2012_val_{number:08d}.JPEG"
            Image.open(png).save(root / ("train" if index < 8 else "val") / wnid / name, "JPEG")
    (root / "labels.txt").write_text("n01440764,tench\nn01443537,goldfish\n")
    return root


def test_the_reference_arguments_work_unchanged(imagenet: Path, tmp_path: Path) -> None:
    prepared = dino2("prepare-imagenet", "--root", imagenet, "--split", "TRAIN", "--split", "VAL")
    assert prepared.returncode == 0, prepared.stderr
    data = {split: f"ImageNet:split={split}:root={imagenet}:extra={imagenet}" for split in ("TRAIN", "VAL")}
    run = tmp_path / "run"
    config = GOLDEN / "reference_config_vitl16_short.yaml"
    trained = dino2("train", "--config-file", config, "--output-dir", run, f"train.dataset_path={data['TRAIN']}",
                    *TINY, "student.block_chunks=0")  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    assert len(metrics_of(run)) == 12
    scored = dino2("eval", "knn", "--config-file", run / "config.yaml", "--pretrained-weights",
                   run / "eval" / "training_11" / "teacher_checkpoint.pth", "--output-dir", tmp_path / "knn",
                   "--train-dataset", data["TRAIN"], "--val-dataset", data["VAL"], "--nb_knn", "5", "10",
                   "--json")  # fmt: skip
    assert scored.returncode == 0, scored.stderr
    assert json.loads(scored.stdout)
    text = (tmp_path / "knn" / "results_eval_knn.json").read_text()
    assert "('full', 10) Top 1" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "/no/such/folder"], "/no/such/folder"),
        (["optim.epoch=3"], "optim.epoch=3: no such key; did you mean optim.epochs?"),
        (["student.attention_backend=xformers"], "it has CUDA kernels only"),
        (["--data", "ImageNet:split=TRAIN:root=/no/such"], "/no/such"),
        (["--preset", "demo", "--config-file", "x.yaml"], "--preset and --config-file are both given"),
        (["--init-from", "/no/such/weights.pth"], "/no/such/weights.pth"),
        (["evaluation.knn_period=5", "evaluation.knn_train_dataset=/no/such/labels",
          "evaluation.knn_val_dataset=/no/such/labels"], "/no/such/labels"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_message_and_leaves_nothing(
    arguments: list[str], message: str, images: Path, tmp_path: Path
) -> None:
    result = dino2("train", "--cpu", "--data", images, "--output-dir", tmp_path / "run", *TINY, *arguments)
    assert result.returncode == 2
    assert message in result.stderr and "Traceback" not in result.stderr
    assert not result.stdout
    assert not list(tmp_path.rglob("*.*")), "files were left behind"


def test_no_resume_sets_the_earlier_run_aside_and_says_so(images: Path, tmp_path: Path) -> None:
    short = [*TINY, "optim.epochs=1", "optim.warmup_epochs=0"]
    command = ["train", "--cpu", "--data", images, "--output-dir", tmp_path / "run", *short]
    first = dino2(*command)
    assert first.returncode == 0, first.stderr
    again = dino2(*command)
    assert again.returncode == 0 and "finished already: 4 of 4 iterations" in again.stderr
    anew = dino2(*command, "--no-resume")
    assert anew.returncode == 0 and "previous_1" in anew.stderr
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "run" / "previous_1")


def test_a_dry_run_reports_and_writes_nothing(images: Path, tmp_path: Path) -> None:
    result = dino2("train", "--cpu", "--data", images, "--output-dir", tmp_path / "run", *TINY, "--dry-run")
    assert result.returncode == 0, result.stderr
    for expected in ("16 images", "12 iterations", "checkpoint", "memory", "sdpa"):
        assert expected in result.stderr, expected
    assert list((tmp_path / "run").iterdir()) == []


def test_an_idle_thread_of_an_executor_does_not_keep_the_command_from_ending() -> None:
    """As the writer of checkpoints that the traceback of an error still holds."""
    code = """if True:
        from concurrent.futures import ThreadPoolExecutor
        from dinov2cli.cli.main import leave
        kept = ThreadPoolExecutor(1)
        kept.submit(print, "written", flush=True).result()
        leave(3)
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 3 and result.stdout == "written\n", result.stderr
