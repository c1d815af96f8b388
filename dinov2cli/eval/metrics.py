"""Scores of one classifier or head, or of many at once, on one process or several: accuracies and their confidence
intervals; of maps of classes by a confusion matrix, of depths by their errors.

Shapes: H classifiers, B images, C classes, L labels of one image; of maps R heads, K classes, H x W pixels.
"""

import math
from collections.abc import Sequence
from enum import StrEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dinov2cli import distributed
from dinov2cli.data.datasets.dense import IGNORED


class MetricType(StrEnum):
    """How hits are averaged; names as in the reference implementation."""

    MEAN_ACCURACY = "mean_accuracy"
    MEAN_PER_CLASS_ACCURACY = "mean_per_class_accuracy"
    PER_CLASS_ACCURACY = "per_class_accuracy"
    IMAGENET_REAL_ACCURACY = "imagenet_real_accuracy"


class Accuracy(NamedTuple):
    """Accuracies in percent, of `images` images.

    `per_class`: top-1 by class index, NaN for a class without image. `filled`: percent of the images for which fewer
    than five classes had any score, so that their top-5 holds others.
    """

    top1: float
    top5: float
    images: int
    per_class: tuple[float, ...] | None = None
    filled: float = 0.0


class AccuracyMeter:
    """Counts hits batch by batch; `compute` sums over all processes.

    Args:
        n_classes, n_heads: C, and H, the number of classifiers that are measured side by side.
        metric: how hits are averaged. With `imagenet_real_accuracy` targets are [B, L], padded with -1, a hit is any of
            an image's labels, and images without a label do not count ("Are we done with ImageNet?", Beyer et al.).
    """

    def __init__(
        self, n_classes: int, n_heads: int = 1, metric: MetricType = MetricType.MEAN_ACCURACY, device: str = "cpu"
    ) -> None:
        self.metric = metric
        bins = 1 if metric is MetricType.IMAGENET_REAL_ACCURACY else n_classes
        self._hits = torch.zeros(2, n_heads, bins, dtype=torch.float64, device=device)  # top-1, top-5
        self._seen = torch.zeros(bins, dtype=torch.float64, device=device)

    def update(self, scores: Tensor, targets: Tensor) -> None:
        """Add a batch. scores: float [H, B, C] or [B, C]; targets: int64 [B], or [B, L] for ReaL labels."""
        scores = scores.to(self._seen.device)
        targets = targets.to(self._seen.device)
        if scores.dim() == 2:
            scores = scores[None]
        if self.metric is MetricType.IMAGENET_REAL_ACCURACY:
            labelled = (targets >= 0).any(1)
            scores, targets = scores[:, labelled], targets[labelled]
            ranks = torch.stack([rank_of(scores, labels.clamp(min=0)) for labels in targets.T])  # [L, H, B]
            rank = ranks.masked_fill((targets.T < 0)[:, None], torch.iinfo(torch.int64).max).amin(0)
            bins = torch.zeros(len(targets), dtype=torch.int64, device=targets.device)
        else:
            rank, bins = rank_of(scores, targets), targets
        self.count(torch.stack((rank < 1, rank < 5)), bins)

    def count(self, hits: Tensor, bins: Tensor) -> None:
        """Add images by what was hit: bool [2, H, B], top-1 and top-5, and each image's class, int64 [B]."""
        self._hits.index_add_(2, bins, hits.to(self._hits.dtype))
        self._seen.index_add_(0, bins, torch.ones_like(bins, dtype=self._seen.dtype))

    def compute(self) -> list[Accuracy]:
        """Accuracy of each classifier over the images of all processes."""
        hits = distributed.all_reduce_sum(self._hits.clone())
        seen = distributed.all_reduce_sum(self._seen.clone())
        if self.metric in (MetricType.MEAN_ACCURACY, MetricType.IMAGENET_REAL_ACCURACY):
            fractions = hits.sum(-1) / seen.sum()
        else:
            fractions = (hits / seen)[:, :, seen > 0].mean(-1)
        per_class = None
        if self.metric is MetricType.PER_CLASS_ACCURACY:
            per_class = [tuple(row) for row in (100 * hits[0] / seen).tolist()]
        return [
            Accuracy(100 * top1, 100 * top5, int(seen.sum()), per_class[head] if per_class else None)
            for head, (top1, top5) in enumerate(fractions.T.tolist())
        ]


def rank_of(scores: Tensor, targets: Tensor) -> Tensor:
    """How many classes come before the target: int64 [..., B] from scores [..., B, C] and targets [B].

    Equal scores are ordered by class index, so that classes without any vote are no free hits.
    """
    own = scores.gather(-1, targets.expand(scores.shape[:-1])[..., None])
    earlier = torch.arange(scores.shape[-1], device=scores.device) < targets[:, None]
    return ((scores > own) | ((scores == own) & earlier)).sum(-1)


def wilson_interval(percent: float, count: int) -> tuple[float, float]:
    """95 % confidence interval of an accuracy of `percent` on `count` images, in percent.

    Wilson's score interval: unlike the normal approximation it stays inside 0 to 100.
    """
    if count <= 0:
        return (0.0, 100.0)
    p, z = percent / 100, 1.96
    centre = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return (max(0.0, 100 * (centre - half)), min(100.0, 100 * (centre + half)))


class MapScores(NamedTuple):
    """What is told of a head for every pixel.

    Args:
        quality: by which heads are compared; the larger, the better.
        columns: of the table.
        line: of the file that the reference writes.
        further: what is in the report alone.
    """

    quality: float
    columns: dict[str, float]
    line: dict[str, Any]
    images: int
    per_class: dict[str, float] | None = None
    further: dict[str, float] | None = None


class Confusion:
    """Counts of pixels by head, true class and predicted class."""

    def __init__(self, heads: int, classes: int) -> None:
        self.classes, self.images = classes, 0
        self.counts = torch.zeros(heads, classes, classes, dtype=torch.int64)

    def update(self, predicted: Tensor, labels: Tensor) -> None:
        """Add an image: classes int64 [R, H, W] as predicted, and as they are, [H, W], 255 where that is not known."""
        self.images += 1
        known = labels != IGNORED
        rows = labels[known].to(torch.int64) * self.classes
        for counts, each in zip(self.counts, predicted, strict=True):
            found = torch.bincount(rows + each[known], minlength=self.classes**2)
            counts += found.view(self.classes, self.classes).cpu()

    def scores(self, names: Sequence[str] = ()) -> list[MapScores]:
        """Of each head, in percent; classes have these names, or else their numbers. Collective.

        As usual, means are over the classes that occur: of IoU, where they are there or predicted; of accuracy, where
        they are there.
        """
        images, told = int(distributed.all_reduce_sum(torch.tensor(self.images))), []
        for counts in distributed.all_reduce_sum(self.counts.clone()).double():
            hits, there, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
            iou = 100 * hits / (there + predicted - hits)
            mean_iou, accuracy = float(iou.nanmean()), float(100 * hits.sum() / there.sum())
            columns = {"mIoU %": mean_iou, "mAcc %": float((100 * hits / there).nanmean()), "aAcc %": accuracy}
            by_class = {
                names[i] if i < len(names) else str(i): round(v, 4) for i, v in enumerate(iou.tolist()) if v == v
            }
            told.append(
                MapScores(mean_iou, columns, {"mIoU": mean_iou / 100, "aAcc": accuracy / 100}, images, by_class)
            )
        return told


DEPTH_ERRORS = ("rmse", "abs_rel", "sq_rel", "log10", "rmse_log", "silog", "delta1", "delta2", "delta3")
"""As the benchmarks have them: rmse in metres; abs_rel, sq_rel (metres), log10, rmse_log, silog (100 times the standard
deviation of the difference of logarithms); deltas in percent."""


class DepthErrors:
    """Sums of each image's errors, by head."""

    def __init__(self, heads: int) -> None:
        self.sums = torch.zeros(heads, len(DEPTH_ERRORS), dtype=torch.float64)
        self.images = 0

    def update(self, predicted: Tensor, labels: Tensor) -> None:
        """Add an image: metres [R, n] as predicted and [n] as they are, of the pixels where that is known."""
        if labels.numel():
            self.sums += torch.stack([errors_of(each.double(), labels.double()) for each in predicted]).cpu()
            self.images += 1

    def scores(self) -> list[MapScores]:
        """Means over the images, of each head. Collective."""
        images, told = int(distributed.all_reduce_sum(torch.tensor(self.images))), []
        for means in (distributed.all_reduce_sum(self.sums.clone()) / images).tolist():
            error = dict(zip(DEPTH_ERRORS, means, strict=True))
            columns = {"RMSE m": error["rmse"], "AbsRel": error["abs_rel"]}
            columns |= {f"d{i} %": error[f"delta{i}"] for i in (1, 2, 3)}
            further = {key: error[key] for key in ("sq_rel", "log10", "rmse_log", "silog")}
            told.append(MapScores(-error["rmse"], columns, {**error, "images": images}, images, further=further))
        return told


def errors_of(predicted: Tensor, there: Tensor) -> Tensor:
    """Of an image, in the order of `DEPTH_ERRORS`: float64 [9] of two float64 [n] above 0."""
    ratio = torch.maximum(predicted / there, there / predicted)
    logs = predicted.log() - there.log()
    difference = predicted - there
    return torch.stack([
        difference.square().mean().sqrt(),
        (difference.abs() / there).mean(),
        (difference.square() / there).mean(),
        (predicted.log10() - there.log10()).abs().mean(),
        logs.square().mean().sqrt(),
        100 * (logs.square().mean() - logs.mean().square()).clamp(min=0).sqrt(),
        *(100 * (ratio < 1.25**power).double().mean() for power in (1, 2, 3)),
    ])  # fmt: skip
