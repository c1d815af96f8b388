"""Linear probe: heads equal to separate layers, resumable, on two processes; test sets; released heads."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from processes import run_in_processes
from tiny_run import write_images
from torch import Tensor

from dinov2cli.data.datasets import make_dataset
from dinov2cli.errors import CheckpointError, DataError, WeightsError
from dinov2cli.eval.extract import Extractor
from dinov2cli.eval.features import Features
from dinov2cli.eval.linear import CHECKPOINT, LinearResult, LinearSettings, evaluate_linear
from dinov2cli.eval.linear_heads import (
    HeadTrainer,
    LinearHeads,
    input_of_head,
    measure_heads,
    rate_names,
    read_class_mapping,
    read_labels,
)
from dinov2cli.eval.metrics import AccuracyMeter, MetricType
from dinov2cli.models.vision_transformer import VisionTransformer

D, C = 6, 3


def make_batch(size: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, C, (size,), generator=generator)
    last_cls = torch.randn(size, 4, D, generator=generator) + F.one_hot(targets, D)[:, None] * 2.0
    return {"last_cls": last_cls, "mean_patch": torch.randn(size, D, generator=generator)}, targets


def test_heads_equal_separate_layers() -> None:
    rates, steps, batch = (1e-3, 0.02, 0.5), 25, 32
    heads = LinearHeads(D, C, learning_rates=rates, batch=batch, generator=torch.Generator().manual_seed(0))
    assert len(heads.names) == len(set(heads.names)) == 12
    layers = {}
    for name in heads.names:
        layer = torch.nn.Linear(1, 1)
        copy = heads.head(name)
        layer.weight, layer.bias = (torch.nn.Parameter(tensor.clone()) for tensor in (copy.weight, copy.bias))
        layers[name] = layer
    optimizers = []
    for index, layer in enumerate(layers.values()):
        optimizer = torch.optim.SGD(layer.parameters(), lr=rates[index % 3] * batch / 256, momentum=0.9)
        optimizers.append((optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=0)))
    trainer = HeadTrainer(heads, steps)
    for step in range(steps):
        features, targets = make_batch(batch, step)
        trainer.step(step, features, targets)
        last, mean = features["last_cls"], features["mean_patch"]
        inputs = {
            "1_blocks_avgpool_False": last[:, 3],
            "1_blocks_avgpool_True": torch.cat((last[:, 3], mean), 1),
            "4_blocks_avgpool_False": torch.cat((last[:, 0], last[:, 1], last[:, 2], last[:, 3]), 1),
            "4_blocks_avgpool_True": torch.cat((last[:, 0], last[:, 1], last[:, 2], last[:, 3], mean), 1),
        }
        for (name, layer), (optimizer, schedule) in zip(layers.items(), optimizers, strict=True):
            x = next(value for key, value in inputs.items() if f"classifier_{key}_lr" in name)
            optimizer.zero_grad()
            F.cross_entropy(layer(x), targets).backward()
            optimizer.step()
            schedule.step()
    for name, layer in layers.items():
        torch.testing.assert_close(heads.head(name).weight, layer.weight.data, rtol=0, atol=1e-5)
        torch.testing.assert_close(heads.head(name).bias, layer.bias.data, rtol=0, atol=1e-5)
    features, _ = make_batch(10, 99)
    for name, logits in zip(heads.names, heads(features), strict=True):
        head = heads.head(name)
        torch.testing.assert_close(logits, head(input_of_head(head, D, 4).of(features)), rtol=1e-5, atol=1e-5)


def test_names_of_small_rates_do_not_collide() -> None:
    assert rate_names([0.005, 0.1]) == ["0_00500", "0_10000"]
    assert rate_names([5e-6, 1e-5, 2.5e-5]) == ["0_000005", "0_000010", "0_00003"]  # both 0_00001 with five digits


def tiny_model() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=2, layerscale=1.0).eval()


def probe(images: Path, folder: Path | None = None, **chosen: object) -> LinearResult:
    settings = LinearSettings(
        **{"epochs": 1, "epoch_length": 24, "batch_size": 16, "learning_rates": (0.01, 0.5), "eval_period": 5, **chosen}
    )
    extract, dataset = Extractor(tiny_model(), num_workers=0, detailed=True, device="cpu"), make_dataset(str(images))
    return evaluate_linear(extract, dataset, 12, extract(dataset), settings, folder=folder)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images", classes=12)


@pytest.mark.parametrize("frozen_crops", [False, True])
def test_interrupted_and_resumed_equals_uninterrupted(frozen_crops: bool, images: Path, tmp_path: Path) -> None:
    whole = probe(images, frozen_crops=frozen_crops)
    assert whole.accuracy.top1 > 25  # chance is 8

    class KilledError(Exception):
        pass

    step, count = HeadTrainer.step, 0

    def dies(self: HeadTrainer, iteration: int, features: dict[str, Tensor], targets: Tensor) -> Tensor:
        nonlocal count
        count += 1
        if count == 9:
            raise KilledError
        return step(self, iteration, features, targets)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(HeadTrainer, "step", dies)
        probe(images, tmp_path, frozen_crops=frozen_crops, checkpoint_period=5)
    assert torch.load(tmp_path / CHECKPOINT)["iteration"] == 5
    resumed = probe(images, tmp_path, frozen_crops=frozen_crops, checkpoint_period=5)
    assert resumed.heads == whole.heads
    assert torch.equal(resumed.head.weight, whole.head.weight)
    with pytest.raises(CheckpointError, match="batch_size=16; this one has batch_size=8"):
        probe(images, tmp_path, frozen_crops=frozen_crops, batch_size=8)


def probe_of_part(images: Path) -> list[tuple[Any, ...]]:
    results = [probe(images, batch_size=8, frozen_crops=frozen) for frozen in (False, True)]
    return [(result.best, result.accuracy, result.head.state_dict()) for result in results]


def test_two_processes_equal_one(images: Path) -> None:
    results = run_in_processes(2, probe_of_part, images)
    for i, frozen in enumerate((False, True)):
        alone = probe(images, batch_size=16, frozen_crops=frozen)
        for of_process in results:
            best, accuracy, head = of_process[i]
            assert best == alone.best and accuracy == alone.accuracy
            torch.testing.assert_close(head["weight"], alone.head.weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("n_blocks", "avgpool"), [(1, True), (4, True)])
def test_released_layouts(n_blocks: int, avgpool: bool) -> None:
    """Released heads take 2D or 5D inputs: class tokens, earliest first, then the mean patch token."""
    batch, targets = make_batch(40, 1)
    head = torch.nn.Linear((n_blocks + avgpool) * D, C)
    inputs = torch.cat([*batch["last_cls"][:, -n_blocks:].unbind(1), batch["mean_patch"]], 1)
    expected = 100 * (head(inputs).argmax(1) == targets).double().mean()
    features = Features({**batch, "cls": batch["last_cls"][:, -1]}, targets, torch.arange(40), 40)
    assert measure_heads(head, features)[0].top1 == pytest.approx(float(expected))
    with pytest.raises(WeightsError, match="does not fit a backbone 6 wide"):
        measure_heads(torch.nn.Linear(7, C), features)


def test_class_mapping_leaves_other_classes_no_chance(tmp_path: Path) -> None:
    batch, _ = make_batch(3, 1)
    head = torch.nn.Linear(4 * D, 5)
    torch.nn.init.zeros_(head.weight)
    head.bias.data = torch.tensor([9.0, 1.0, 8.0, 2.0, 7.0])  # class 3 beats class 1; the others beat both
    features = Features({**batch, "cls": batch["last_cls"][:, -1]}, torch.tensor([0, 1, 1]), torch.arange(3), 3)
    np.save(tmp_path / "map.npy", np.array([1, 3]))
    mapping = read_class_mapping(tmp_path / "map.npy", 5)
    assert measure_heads(head, features, class_mapping=mapping)[0].top1 == pytest.approx(200 / 3)
    with pytest.raises(DataError, match="class 3 is outside the classifier's 3 classes"):
        read_class_mapping(tmp_path / "map.npy", 3)


def test_imagenet_real_counts_any_label_and_skips_unlabelled() -> None:
    meter = AccuracyMeter(4, metric=MetricType.IMAGENET_REAL_ACCURACY)
    scores = torch.eye(4)  # image i is taken for class i
    meter.update(scores, torch.tensor([[2, 0, -1], [0, -1, -1], [-1, -1, -1], [3, -1, -1]]))
    (accuracy,) = meter.compute()
    assert accuracy.images == 3 and accuracy.top1 == pytest.approx(200 / 3)


def test_mean_per_class_weighs_classes_alike() -> None:
    scores, targets = torch.eye(3)[[0, 0, 0, 1, 1]], torch.tensor([0, 0, 0, 0, 1])
    tops = {}
    for metric in (MetricType.MEAN_ACCURACY, MetricType.MEAN_PER_CLASS_ACCURACY):
        meter = AccuracyMeter(3, metric=metric)
        meter.update(scores, targets)
        tops[metric] = meter.compute()[0].top1
    assert list(tops.values()) == [pytest.approx(80), pytest.approx((75 + 100) / 2)]


def test_label_files(tmp_path: Path) -> None:
    images = make_dataset("SamplePhotos:split=VAL")
    path = tmp_path / "real.json"
    path.write_text(json.dumps([[1, 2], []] * 150))
    assert read_labels(path, images)[:2].tolist() == [[1, 2], [-1, -1]]
    path.write_text(json.dumps([0] * 299))
    with pytest.raises(DataError, match=r"299 labels, but .* has 300 images"):
        read_labels(path, images)
    path.write_text("{")
    with pytest.raises(DataError, match="not a JSON list"):
        read_labels(path, images)


def test_real_labels_are_in_the_order_of_the_image_numbers(tmp_path: Path) -> None:
    import cv2

    for folder, number in (("n1", 3), ("n2", 1), ("n2", 2)):
        (tmp_path / "val" / folder).mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(tmp_path / f"val/{folder}/ILSVRC2012_val_{number:08d}.JPEG"), np.zeros((8, 8, 3), np.uint8))
    np.save(tmp_path / "labels.npy", np.array([10, 20, 30]))
    assert read_labels(tmp_path / "labels.npy", make_dataset(str(tmp_path / "val"))).tolist() == [30, 10, 20]
