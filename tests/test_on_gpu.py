"""What only a GPU can show: nobody waits within a step, and its numbers are those of the CPU, compiled or not."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from tiny_run import AUGMENTED_ROPE, DINOV3, TINY, metrics_of, write_images

from dinov2cli.config import Config, load_config
from dinov2cli.config.images import IMAGENET_STD
from dinov2cli.data.loaders import make_train_loader
from dinov2cli.eval.extract import Extractor
from dinov2cli.train.networks import build_backbone
from dinov2cli.train.trainer import Trainer

pytestmark = pytest.mark.gpu
# Heads of 32 channels, which every attention kernel has; features that differ, so that rounding decides nothing.
WIDE = ["student.embed_dim=64", "student.layerscale=0.5", "optim.warmup_epochs=0"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "data")


def configure(images: Path, run: Path, *overrides: str) -> Config:
    paths = [f"train.dataset_path={images}", f"train.output_dir={run}"]
    return load_config(overrides=[*TINY, *WIDE, *paths, *overrides])


def cuda() -> torch.device:
    return torch.device("cuda", 0)


@contextmanager
def nobody_waits() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.compile=false"],
        ["train.compile=false", "student.drop_path_rate=0", "ibot.separate_head=true", "ibot.head_n_prototypes=24"],
        ["train.compile=false", "train.centering=sinkhorn_knopp", "train.gradient_accumulation=2"],
        ["train.compile=false", "data.device_augment=true"],
        ["train.compile=true", "data.device_augment=true"],
        ["train.compile=true", *DINOV3, *AUGMENTED_ROPE],
    ],
    ids=["plain", "no drop path", "sinkhorn", "device_augment", "compiled", "rotary"],
)
def test_nobody_waits_for_the_gpu_within_a_step(images: Path, tmp_path: Path, overrides: list[str]) -> None:
    trainer = Trainer(configure(images, tmp_path, *overrides), cuda())
    batches = iter(trainer.make_loader())
    readings = []
    with ExitStack() as stack:
        trainer.record.open(0, stack)
        for number in range(6):
            micro_batches = [next(batches) for _ in range(trainer.accumulation)]
            # The first steps make what is kept: compiled code, masks, workspaces.
            with nobody_waits() if number >= 4 else nullcontext():
                result = trainer.train_step([trainer.on_device(batch) for batch in micro_batches])
                readings.append(trainer.record.take(result))
            trainer.iteration += 1
    assert all(value == value for reading in readings for value in reading.numbers()[0].values())


def losses_on(device: torch.device, images: Path, run: Path, *overrides: str) -> torch.Tensor:
    trainer = Trainer(configure(images, run, *overrides), device)
    found = []
    for batch in trainer.make_loader():
        losses, _ = trainer.record.take(trainer.train_step([trainer.on_device(batch)])).numbers()
        found.append(list(losses.values()))
        trainer.iteration += 1
    return torch.tensor(found)


def test_losses_are_those_of_the_cpu(images: Path, tmp_path: Path) -> None:
    on_cpu = losses_on(torch.device("cpu"), images, tmp_path / "cpu", "train.compile=false")
    exact = ["compute_precision.precision=fp32"]
    found = losses_on(cuda(), images, tmp_path / "fp32", "train.compile=false", *exact)
    torch.testing.assert_close(found[:4], on_cpu[:4], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found, on_cpu, rtol=2e-2, atol=1e-2)
    for name, overrides in (("bf16", ["train.compile=false"]), ("compiled", ["train.compile=true"])):
        found = losses_on(cuda(), images, tmp_path / name, *overrides)
        torch.testing.assert_close(found[:4], on_cpu[:4], rtol=3e-2, atol=2e-2)


def test_a_run_is_resumed(images: Path, tmp_path: Path) -> None:
    whole, parts = (configure(images, tmp_path / name, "train.compile=false") for name in ("whole", "parts"))
    Trainer(whole, cuda()).train()
    first = Trainer(parts, cuda())
    first.total = 8
    first.train()
    Trainer(parts, cuda()).train()
    expected, found = (metrics_of(tmp_path / name) for name in ("whole", "parts"))
    assert [line["iteration"] for line in found] == [line["iteration"] for line in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["total_loss"] == pytest.approx(theirs["total_loss"], rel=2e-2)


def test_colours_on_the_device_are_those_of_the_cpu(images: Path, tmp_path: Path) -> None:
    config = configure(images, tmp_path, "data.device_augment=true")
    batch = next(iter(make_train_loader(config, start=0, stop=1)))
    expected = batch.to("cpu")
    levels = torch.tensor(IMAGENET_STD)[:, None, None] * 255
    for compiled in (False, True):
        found = batch.pin_memory().to(cuda(), non_blocking=True, compiled=compiled)
        for ours, theirs in ((found.global_crops, expected.global_crops), (found.local_crops, expected.local_crops)):
            assert ((ours.cpu() - theirs).abs() * levels).mean() < 0.2


def test_features_are_those_of_the_cpu(images: Path, tmp_path: Path) -> None:
    from dinov2cli.data.datasets import make_dataset

    model = build_backbone(configure(images, tmp_path)).eval()
    found = []
    for device, precision in ((torch.device("cpu"), "fp32"), (cuda(), "fp32"), (cuda(), "bf16")):
        extract = Extractor(model, device=device, precision=precision, batch_size=3, num_workers=0, detailed=True)
        found.append(extract(make_dataset(str(images))).tensors)
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name].cpu(), expected, rtol=1e-2, atol=5e-3)
        torch.testing.assert_close(found[2][name].cpu(), expected, rtol=0.1, atol=0.1)
