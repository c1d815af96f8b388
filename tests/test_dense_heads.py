"""What heads for every pixel are trained and measured by: losses, windows and scores, beside the reference's."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2cli.eval.dense_heads import (
    DEPTH,
    SEGMENTATION,
    CommonBatchNorm,
    DenseTrainer,
    cosine,
    gradient_loss,
    linear_decay,
    same_start,
    segmentation_loss,
    sig_loss,
)
from dinov2cli.eval.metrics import DEPTH_ERRORS, Confusion, DepthErrors
from dinov2cli.models.dense_heads import DepthHead, SegmentationHead
from dinov2cli.models.sliding import mirrored_mean, multi_scale, sliding, window_starts

GOLDEN = np.load(Path(__file__).parent / "golden" / "dense_training.npz")


def golden(name: str) -> Tensor:
    return torch.from_numpy(GOLDEN[name])


def test_sliding_windows_are_the_references() -> None:
    weight, bias = golden("slide/conv_weight"), golden("slide/conv_bias")

    def maps(images: Tensor) -> Tensor:
        return F.interpolate(F.conv2d(images, weight, bias, stride=4), images.shape[-2:], mode="bilinear")

    expected = golden("slide/out_crop24_stride16")
    for at_once in (1, 3, 100):
        found = sliding(maps, golden("slide/x"), 24, 16, at_once=at_once)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_maps_of_patches_slide_by_patches() -> None:
    torch.manual_seed(0)
    images, patches = torch.randn(2, 3, 20, 36), torch.nn.Conv2d(3, 5, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(sliding(patches, images, 12, 8, cell=4), patches(images))


@pytest.mark.parametrize(
    "size, window, stride", [(512, 512, 341), (683, 512, 341), (40, 24, 16), (10, 24, 16), (49, 24, 24)]
)
def test_windows_cover_every_pixel_and_stay_inside(size: int, window: int, stride: int) -> None:
    seen = np.zeros(size, int)
    for start in window_starts(size, window, stride):
        assert start >= 0 and (start + window <= size or start == 0)
        seen[start : start + window] += 1
    assert seen.min() >= 1


def test_the_mean_over_scales_and_flips_is_that_of_probabilities() -> None:
    torch.manual_seed(0)
    images = [torch.randn(1, 3, side, side + 4) for side in (8, 12)]

    def maps(x: Tensor) -> Tensor:
        return torch.cat([x, -x], 1)  # of two heads

    found = multi_scale(maps, images, (8, 12), 3)
    plain = [F.interpolate(x, (8, 12), mode="bilinear") for x in (images[0], images[1])]
    torch.testing.assert_close(found[:, :3], torch.stack([x.softmax(1) for x in plain]).mean(0))  # flips change nothing
    torch.testing.assert_close(found[:, 3:], torch.stack([(-x).softmax(1) for x in plain]).mean(0))
    down = torch.arange(12.0).expand(1, 1, 8, 12)
    torch.testing.assert_close(mirrored_mean(lambda x: x * torch.arange(12), down)[0, 0, 0, 11], torch.tensor(60.5))


def test_cross_entropy_is_mmsegmentations() -> None:
    class Given(SegmentationHead):
        def predict(self, features: object, size: tuple[int, int]) -> Tensor:
            return golden("ce/logits_up")

    labels = golden("ce/gt")
    assert (labels == 255).any()
    found = segmentation_loss(Given(16, 6), {}, labels)
    torch.testing.assert_close(found, golden("ce/ce_mmseg").float(), rtol=1e-5, atol=1e-6)
    known = found * labels.numel() / (labels != 255).sum()
    torch.testing.assert_close(known, golden("ce/ce_valid_mean").float(), rtol=1e-5, atol=1e-6)


def test_batch_statistics_in_training_are_the_references() -> None:
    head = SegmentationHead(16, 6)
    head.bn.__class__ = CommonBatchNorm
    head.load_state_dict({
        "conv_seg.weight": golden("train/w_conv"), "conv_seg.bias": golden("train/bias"),
        "bn.weight": golden("train/bn_weight"), "bn.bias": golden("train/bn_bias"),
        "bn.running_mean": torch.zeros(16), "bn.running_var": torch.ones(16), "bn.num_batches_tracked": torch.tensor(0),
    })  # fmt: skip
    logits = head.train()([(golden("train/feat"), torch.zeros(2, 16))])
    torch.testing.assert_close(logits, golden("train/logits"), rtol=0, atol=1e-5)
    torch.testing.assert_close(head.bn.running_mean, golden("train/running_mean"), rtol=0, atol=1e-5)
    torch.testing.assert_close(head.bn.running_var, golden("train/running_var"), rtol=0, atol=1e-5)


def test_depth_losses_are_the_references() -> None:
    predicted, there = golden("loss/pred")[:, 0], golden("loss/gt")[:, 0]
    torch.testing.assert_close(sig_loss(predicted, there), golden("loss/sig").float(), rtol=0, atol=1e-5)
    warm = sig_loss(predicted, there, with_variance=False)
    torch.testing.assert_close(warm, golden("loss/sig_warm_up").float(), rtol=0, atol=1e-5)
    one = gradient_loss(predicted[0], there[0])
    torch.testing.assert_close(one, golden("loss/grad_2d_of_image0").float(), rtol=0, atol=1e-5)


def test_schedules_rise_and_fall_as_the_papers() -> None:
    assert linear_decay(0, 40_000) < 1e-5 and linear_decay(1500, 40_000) == pytest.approx(1 - 1500 / 40_000)
    assert linear_decay(750, 40_000) == pytest.approx(0.5 * (1 - 750 / 40_000), rel=1e-4)
    assert cosine(12_800, 38_400) == pytest.approx(0.75) and cosine(38_400, 38_400) == pytest.approx(0, abs=1e-9)
    for schedule in (linear_decay, cosine):
        assert all(0 <= schedule(i, n) <= 1 for n in (1, 2, 7, 100) for i in range(n))


@pytest.mark.parametrize("make, recipe", [
    (lambda: SegmentationHead(8, 3), SEGMENTATION), (lambda: DepthHead(16, 8), DEPTH),
])  # fmt: skip
def test_heads_of_several_rates_are_each_as_if_alone(make: object, recipe: object) -> None:
    torch.manual_seed(0)
    features = {"patches0": torch.randn(4, 8, 3, 3), "cls0": torch.randn(4, 8)}
    labels = torch.randint(1, 3, (4, 12, 12))
    rates = (1e-3, 1e-2)

    def trained(chosen: tuple[float, ...]) -> list[dict[str, Tensor]]:
        heads = [make() for _ in chosen]  # type: ignore[operator]
        same_start(heads, 0)
        trainer = DenseTrainer(heads, chosen, 5, recipe)  # type: ignore[arg-type]
        for i in range(5):
            trainer.step(i, features, labels if isinstance(heads[0], SegmentationHead) else labels.float())
        return [head.state_dict() for head in heads]

    together, alone = trained(rates), [trained((rate,))[0] for rate in rates]
    for one, other in zip(together, alone, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(not torch.equal(together[0][name], together[1][name]) for name in together[0])


def test_mean_iou_is_that_of_sets_of_pixels() -> None:
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 4, (3, 10, 12)), rng.integers(0, 5, (2, 3, 10, 12))
    labels[:, 0] = 255
    confusion = Confusion(2, 6)  # the last class is nowhere
    for i in range(3):
        confusion.update(torch.from_numpy(predicted[:, i]), torch.from_numpy(labels[i]).to(torch.uint8))
    known = labels != 255
    for head, scores in enumerate(confusion.scores()):
        ious, accuracies = [], []
        for c in range(5):
            mine, its = (predicted[head] == c) & known, labels == c
            ious.append(100 * (mine & its).sum() / (mine | its).sum())
            if its.any():
                accuracies.append(100 * (mine & its).sum() / its.sum())
        assert scores.quality == scores.columns["mIoU %"] == pytest.approx(np.mean(ious))
        assert scores.columns["mAcc %"] == pytest.approx(np.mean(accuracies))
        assert scores.columns["aAcc %"] == pytest.approx(100 * (predicted[head] == labels)[known].mean())
        assert scores.per_class == pytest.approx({str(c): iou for c, iou in enumerate(ious)}, abs=1e-4)


def test_depth_errors_are_means_over_images() -> None:
    rng = np.random.default_rng(0)
    errors, rows = DepthErrors(1), []
    for n in (5, 50):
        there, mine = rng.uniform(1, 9, n), rng.uniform(1, 9, n)
        errors.update(torch.from_numpy(mine)[None], torch.from_numpy(there))
        off, logs, ratio = mine - there, np.log(mine) - np.log(there), np.maximum(mine / there, there / mine)
        rows.append([
            np.sqrt(np.mean(off**2)), np.mean(abs(off) / there), np.mean(off**2 / there),
            np.mean(abs(np.log10(mine) - np.log10(there))), np.sqrt(np.mean(logs**2)), 100 * np.std(logs),
            *(100 * np.mean(ratio < 1.25**i) for i in (1, 2, 3)),
        ])  # fmt: skip
    errors.update(torch.empty(1, 0), torch.empty(0))  # an image of which nothing is known counts for nothing
    (scores,) = errors.scores()
    assert scores.line == pytest.approx({**dict(zip(DEPTH_ERRORS, np.mean(rows, 0), strict=True)), "images": 2})
