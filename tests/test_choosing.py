"""A training without a preset gets one by its images and its machine, says why, and goes on without choosing again."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_run import write_images

import dinov2cli
from dinov2cli.config import find_preset, load_config
from dinov2cli.config.choosing import CONTINUING, RECIPES, Machine, choose
from dinov2cli.console import logger
from dinov2cli.doctor.report import training_of
from dinov2cli.errors import ConfigError, DataError
from dinov2cli.launch.training import completed, first_look, resolve_config
from dinov2cli.launch.typed import tell_of_more_images, with_preset
from dinov2cli.requests.launch import Slurm
from dinov2cli.requests.tools import DoctorRequest
from dinov2cli.requests.train import TrainRequest

CPU, LAPTOP, A100, EIGHT = Machine(2), Machine(8, 1, 8.0), Machine(16, 1, 80.0), Machine(128, 8, 80.0)
JOB = Machine(2, 8, None)


@pytest.mark.parametrize(
    ("images", "side", "machine", "preset"),
    [
        (60_000, 28, CPU, "small_pictures"),
        (60_000, 64, EIGHT, "small_pictures"),
        (1_000, 65, CPU, "small_1k"),
        (3_000, 500, A100, "small_1k"),
        (3_001, 500, A100, "small_10k"),
        (1_000, None, CPU, "small_1k"),
        (30_001, 500, A100, "small_100k"),
        (30_001, 500, LAPTOP, "small_10k"),
        (2_000_000, 500, CPU, "small_10k"),
        (2_000_000, 500, A100, "single_gpu"),
        (2_000_000, 500, EIGHT, "vitb14"),
        (2_000_000, 500, Machine(128, 8, 40.0), "vits14"),
        (2_000_000, 500, JOB, "single_gpu"),
    ],
)
def test_the_first_recipe_that_fits_is_chosen(images: int, side: int | None, machine: Machine, preset: str) -> None:
    assert choose(images, side, machine).preset == preset


def test_every_recipe_is_a_preset_that_fits_the_memory_it_asks_for() -> None:
    from dinov2cli.train.cost import estimate

    for recipe in (*RECIPES, CONTINUING):
        assert find_preset(recipe.preset).kind == "training"
        if recipe.gpus:
            need = estimate(load_config(recipe.preset), world_size=1, sharding="none", precision="bf16").total
            assert need <= recipe.gb, recipe.preset


@pytest.fixture()
def said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level("INFO", logger="dino2")
    return caplog


@pytest.fixture()
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_images(tmp_path / "photos", size=100)


def test_it_is_said_why_and_the_run_is_named_after_its_data(photos: Path, said: pytest.LogCaptureFixture) -> None:
    config = resolve_config(completed(TrainRequest(data="photos", cpu=True, overrides=("optim.epochs=70",))))
    assert (config.train.output_dir, config.optim.epochs) == ("runs/photos", 70)
    assert config.student == load_config("small_1k").student
    assert "no preset given: 16 RGB images, of about 100 pixels, no GPU, " in said.text
    assert "-> preset small_1k (up to 3,000 images)" in said.text
    for words, of_train in (({}, "small_1k"), ({"preset": "demo"}, "demo")):  # dino2 doctor takes the same, no folder
        training = training_of(DoctorRequest(data="photos", cpu=True, **words))
        assert (training.preset, training.output_dir) == (of_train, None)
    assert training_of(DoctorRequest(data="/gone", cpu=True)).preset is None, "the check of the data tells of it"
    for index in range(30):
        Image.fromarray(np.zeros((28, 40), np.uint8)).save(photos / "class0" / f"gray{index}.png")
    assert with_preset(TrainRequest(data="photos", cpu=True)).preset == "small_pictures"
    assert "no preset given: 46 " in said.text and "images, of about 28 pixels" in said.text


@pytest.mark.parametrize(
    "given",
    [
        {"preset": "demo"}, {"config_file": Path("mine.yaml")}, {"overrides": ("student.arch=vit_small",)},
        {"data": None},
    ],
)  # fmt: skip
def test_who_has_said_how_is_not_asked(photos: Path, given: dict[str, Any]) -> None:
    request = TrainRequest(**{"data": "photos", "cpu": True, **given})
    assert with_preset(request) is request


def test_other_wishes(photos: Path) -> None:
    continued = with_preset(TrainRequest(data="photos", cpu=True, init_from="dinov2_vits14"))
    assert continued.preset == "continue_from_weights"
    job = with_preset(TrainRequest(data="photos", slurm=Slurm(partition="gpu")))
    assert (job.preset, job.output_dir) == ("small_1k", Path("runs/photos"))
    with pytest.raises(DataError, match="neither a folder"):
        first_look(TrainRequest(data="/gone", cpu=True))
    with pytest.raises(ConfigError, match=r"optim.epoch=3: no such key; did you mean optim.epochs\?"):
        first_look(TrainRequest(data="photos", cpu=True, overrides=("optim.epoch=3",)))
    with pytest.raises(ConfigError, match=r"crops.global_crops_size=50: must be a multiple"):
        first_look(TrainRequest(data="photos", cpu=True, overrides=("crops.global_crops_size=50",)))


@pytest.mark.parametrize(
    ("preset", "overrides", "processes", "message"),
    [
        ("small_1k", (), 1, ""),
        (
            "small_1k",
            (),
            8,
            "made for 64 images an iteration, and 8 processes take 512; train.batch_size_per_gpu=8 keeps",
        ),
        ("small_1k", (), 3, "made for 64 images an iteration, and 3 processes take 192\n"),
        ("demo.yaml", ("train.batch_size_per_gpu=16",), 2, ""),
        ("vits14", (), 64, ""),
    ],
)
def test_more_images_than_a_preset_is_made_for_are_told(
    preset: str, overrides: tuple[str, ...], processes: int, message: str, said: pytest.LogCaptureFixture
) -> None:
    request = TrainRequest(preset=preset, overrides=overrides)
    tell_of_more_images(request, load_config(preset, overrides=overrides), processes)
    assert message in said.text and bool(message) == bool(said.text)


def test_a_run_goes_on_as_it_began_whatever_would_be_chosen_now(photos: Path, said: pytest.LogCaptureFixture) -> None:
    small = ["train.OFFICIAL_EPOCH_LENGTH=1", "train.batch_size_per_gpu=2", "train.num_workers=0", "optim.epochs=1",
             "optim.warmup_epochs=0"]  # fmt: skip
    fit = dinov2cli.train("photos", device="cpu", overrides=small)
    assert fit.output_dir == Path("runs/photos") and len(fit.metrics) == 1
    begun = load_config(config_file=fit.output_dir)
    assert begun.student == load_config("small_1k").student
    for index in range(30):
        Image.fromarray(np.zeros((28, 40), np.uint8)).save(photos / "class0" / f"gray{index}.png")
    said.clear()
    for output_dir in (None, fit.output_dir):
        again = completed(TrainRequest(data="photos", output_dir=output_dir, cpu=True))
        assert resolve_config(again).student == begun.student and "no preset given" not in said.text
    assert with_preset(TrainRequest(data="photos", cpu=True, no_resume=True)).preset == "small_pictures"
    other = write_images(photos.parent / "elsewhere" / "photos", size=100)
    with pytest.raises(ConfigError, match=r"runs/photos holds a .*run of another configuration"):
        completed(TrainRequest(data=str(other), cpu=True))
