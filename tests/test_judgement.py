"""Whether a run learns: runs that were made to fail are told so and why, and a run that learns is told nothing."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from test_cli_eval import own_cache  # noqa: F401  (a fixture)
from torch import nn

from dinov2cli.cli.main import main
from dinov2cli.config import list_presets, load_config
from dinov2cli.data.datasets import make_dataset
from dinov2cli.losses import DINOLoss, SoftmaxCentering
from dinov2cli.train import objective
from dinov2cli.train.forewarnings import STUDENT_TEMP, forewarnings
from dinov2cli.train.judgement import judge
from dinov2cli.train.verdicts import fall_of

SMALL = [
    "dino.head_n_prototypes=64", "dino.head_bottleneck_dim=32", "dino.head_hidden_dim=64",
    "train.batch_size_per_gpu=32",
    "train.OFFICIAL_EPOCH_LENGTH=20", "train.centering=sinkhorn_knopp", "train.num_workers=0", "train.log_period=2",
    "train.checkpoint_period=100000", "student.arch=vit_tiny", "student.embed_dim=96", "student.depth=3",
    "student.num_heads=2", "student.patch_size=8", "student.drop_path_rate=0", "student.layerscale=1.0",
    "teacher.momentum_teacher=0.9", "teacher.warmup_teacher_temp=0.04", "teacher.teacher_temp=0.04", "optim.epochs=2",
    "optim.warmup_epochs=0", "optim.freeze_last_layer_epochs=0", "optim.layerwise_decay=1.0", "optim.base_lr=0.015",
    "optim.weight_decay_end=0.1", "crops.global_crops_size=48", "crops.local_crops_size=24",
    "crops.local_crops_number=3", "crops.global_crops_scale=[0.5,1.0]", "crops.local_crops_scale=[0.15,0.5]",
    "crops.blur_prob=[0.0,0.0,0.0]", "crops.solarize_prob=0", "evaluation.eval_period_iterations=0",
]  # fmt: skip
"""40 iterations of 32 images that learn something when nothing is wrong with them."""


SHARP = ["teacher.warmup_teacher_temp=0.01", "teacher.teacher_temp=0.01"]
"""The demo's temperatures, with which so short a run learns well."""


def write_photos(folder: Path) -> Path:
    """Photos built in, by texture and shape alone: grey, equalised, each with a gamma of its own."""
    for split, each in (("TRAIN", 50), ("VAL", 25)):
        dataset = make_dataset(f"SamplePhotos:split={split}")
        for number, label in enumerate(dataset.targets()):
            if number % (len(dataset) // len(dataset.class_names)) >= each:
                continue
            grey = cv2.equalizeHist(cv2.cvtColor(dataset.image(number), cv2.COLOR_RGB2GRAY)) / 255
            image = np.rint(255 * grey ** np.random.default_rng(number).uniform(0.6, 1.6)).astype(np.uint8)
            place = folder / split.lower() / dataset.class_names[label] / f"{number}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(place)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"))


def train(run: Path, data: Path, *words: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--cpu", "--data", str(data), "--output-dir", str(run), *SMALL, *words])
    assert not stop.value.code


def knn_on(photos: Path, period: int = 1000) -> list[str]:
    sets = [f"evaluation.knn_{name}_dataset={photos / name}" for name in ("train", "val")]
    return [f"evaluation.knn_period={period}", *sets]


def without_center(n_prototypes: int) -> nn.Module:
    return SoftmaxCentering(n_prototypes, momentum=1.0)  # its center never moves


@pytest.mark.long
@pytest.mark.parametrize(
    ("broken", "found", "change"),
    [
        (["teacher.warmup_teacher_temp=1e-4", "teacher.teacher_temp=1e-4"], "every target one prototype", "temp=0.04"),
        (["teacher.warmup_teacher_temp=1", "teacher.teacher_temp=1"], "targets are uniform", "teacher_temp=0.04"),
        (["train.centering=centering"], "all images to one prototype", "train.centering=sinkhorn_knopp"),
        (["optim.base_lr=0.45"], "the learning rate rises to 0.08", "optim.base_lr=0.011"),
        (["teacher.momentum_teacher=0.9992"], "98% of the teacher", "teacher.momentum_teacher=0.85"),
    ],
)
def test_a_run_that_was_made_to_fail_is_told_why(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    broken: list[str], found: str, change: str,
) -> None:  # fmt: skip
    monkeypatch.setitem(objective.CENTERINGS, "centering", without_center)
    train(tmp_path / "run", photos / "train", *knn_on(photos), *broken)
    judgement = judge(tmp_path / "run")
    # Some rise above a random network all the same, on easy photos: not above what takes no training.
    assert judgement is not None and (judgement.learns is False or "not clearly above" in judgement.advice[0].found)
    assert any(found in each.found and change in each.change for each in judgement.advice), judgement
    capsys.readouterr()
    main_shows(
        ["status", str(tmp_path / "run")], ["does not learn: " if not judgement.learns else "but see below"], capsys
    )


@pytest.mark.long
@pytest.mark.parametrize(
    ("unfit", "found", "change"),
    [
        (["student.layerscale=1e-5"], "layerscale=1e-05 opens too slowly", "student.layerscale=1.0"),
        (["dino.head_n_prototypes=4096"], "head_n_prototypes=4096 is more than", "dino.head_n_prototypes=64"),
    ],
)
def test_settings_that_do_not_fit_are_told_whatever_the_score(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], unfit: list[str], found: str, change: str
) -> None:
    """On these photos the two runs learn all the same, in so few iterations less than they could."""
    train(tmp_path / "run", photos / "train", *knn_on(photos), *unfit)
    judgement = judge(tmp_path / "run")
    assert judgement is not None
    assert any(found in each.found and change in each.change for each in judgement.advice), judgement
    capsys.readouterr()
    main_shows(["status", str(tmp_path / "run")], [change], capsys)


def main_shows(words: list[str], wanted: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(words)
    shown = capsys.readouterr().out
    assert all(each in shown for each in wanted), shown


@pytest.mark.long
def test_images_that_are_all_the_same_are_told(photos: Path, tmp_path: Path) -> None:
    one = next((photos / "train" / "brick").iterdir()).read_bytes()
    (tmp_path / "same").mkdir()
    for number in range(64):
        (tmp_path / "same" / f"{number}.png").write_bytes(one)
    train(tmp_path / "run", tmp_path / "same")
    judgement = judge(tmp_path / "run")
    assert judgement is not None and judgement.learns is False
    assert "the images may be all the same" in judgement.advice[0].found


@pytest.mark.long
def test_a_single_class_is_told(photos: Path, tmp_path: Path) -> None:
    for name in ("train", "val"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "brick").symlink_to(photos / name / "brick")
    train(tmp_path / "run", tmp_path / "train", *knn_on(tmp_path))
    judgement = judge(tmp_path / "run")
    assert judgement is not None and "are of one class" in judgement.advice[0].found
    train(tmp_path / "other", tmp_path / "train", *knn_on(photos))  # and one class, asked for twelve
    judgement = judge(tmp_path / "other")
    assert judgement is not None and judgement.learns is False


@pytest.mark.long
def test_a_run_that_learns_gets_no_warning(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "run", photos / "train", *knn_on(photos, 60), "optim.epochs=6", "optim.warmup_epochs=1", *SHARP)
    judgement = judge(tmp_path / "run")
    assert judgement is not None and judgement.learns is True and judgement.advice == []
    assert "WARNING" not in capsys.readouterr().err
    main_shows(["status", str(tmp_path / "run")], ["learns: k-NN"], capsys)


INITIALISED = ("adapt_518", "continue_from_weights")
"""Presets that continue weights, without which they refuse or warn."""


def test_no_preset_is_forewarned_of() -> None:
    for preset in list_presets():
        weights = ["student.pretrained_weights=weights.pth"] if preset.name in INITIALISED else []
        config = load_config(preset.name, overrides=weights)
        assert forewarnings(config, config.effective_batch()) == [], preset


@pytest.mark.parametrize(
    ("word", "change"),
    [
        ("dino.head_n_prototypes=512", "dino.head_n_prototypes=64"),
        ("teacher.momentum_teacher=0.992", "teacher.momentum_teacher=0.85"),
        ("student.layerscale=1e-5", "student.layerscale=1.0"),
        ("optim.warmup_epochs=2", "optim.warmup_epochs=0"),
        ("teacher.teacher_temp=0.05", "teacher.warmup_teacher_temp_epochs=1"),
        ("optim.freeze_last_layer_epochs=2", "optim.freeze_last_layer_epochs=0"),
        ("teacher.teacher_temp=0.2", "teacher.teacher_temp=0.07"),
        ("optim.base_lr=0.45", "optim.base_lr=0.011"),
    ],
)
def test_settings_that_do_not_fit_a_short_run_are_told_before_it(word: str, change: str) -> None:
    assert forewarnings(load_config(overrides=SMALL), 32) == []
    assert any(change in each.change for each in forewarnings(load_config(overrides=[*SMALL, word]), 32))


def test_the_student_temperature_is_the_losses() -> None:
    assert DINOLoss().student_temp == STUDENT_TEMP


def test_patches_that_degrade_are_told_with_the_keys_that_keep_them(tmp_path: Path) -> None:
    """A locality that stays, wavers or rises is none; one that falls is, with the teacher from about its height."""
    rng = np.random.default_rng(0)
    for looks in (15, 30, 200, 1000):  # a level that wavers as that of small batches does
        for _ in range(50):
            assert fall_of([(1000 * at, each) for at, each in enumerate(rng.normal(0.4, 0.06, looks))]) is None
    waver, at = rng.normal(0, 0.02, 200), np.arange(0, 20_000, 100)
    for localities in (0.3 + waver, 0.2 + at / 100_000 + waver, 0.3 - at / 800_000 + waver):
        assert fall_of(list(zip(at.tolist(), localities.tolist(), strict=True))) is None
    falling = np.where(at < 10_000, 0.2 + at / 100_000, 0.3 - (at - 10_000) / 50_000) + waver
    assert (
        fall_of(list(zip((at // 100).tolist(), falling.tolist(), strict=True))) is None
    )  # short, it is still learning
    fall = fall_of(list(zip(at.tolist(), falling.tolist(), strict=True)))
    assert fall is not None and 8_000 <= fall.at <= 12_000 and fall.best == pytest.approx(0.3, abs=0.03)
    config = load_config(overrides=[*SMALL, "optim.epochs=10"])
    config.save(tmp_path / "config.yaml")
    locality_of = dict(zip(at.tolist(), falling.tolist(), strict=True))
    lines = [{"iteration": i, "crops_matched": 0.9, "patch_locality": each} for i, each in locality_of.items()]
    (tmp_path / "training_metrics.json").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    for iteration in (3999, 9999, 15999):
        (tmp_path / "eval" / f"training_{iteration}").mkdir(parents=True)
    judgement = judge(tmp_path)
    assert judgement is not None and judgement.learns
    (found,) = judgement.advice
    assert "patches lose what they show of their place: patch_locality was 0." in found.found
    keys = found.change.split()
    assert keys[-1] == f"gram.ckpt={tmp_path}/eval/training_9999/teacher_checkpoint.pth"
    assert load_config(overrides=[*SMALL, *keys]).gram.use_loss
