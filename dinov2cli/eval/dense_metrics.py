"""Scores of maps: of classes by a confusion matrix, of depth by its errors. Sums over all processes.

Shapes: R heads, K classes, H x W pixels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dinov2cli import distributed
from dinov2cli.data.datasets.dense import IGNORED


class SegmentationScores(NamedTuple):
    """In percent, of so many images. iou: of each class, NaN where it is neither there nor predicted."""

    mean_iou: float
    mean_accuracy: float
    accuracy: float
    iou: list[float]
    images: int


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

    def scores(self) -> list[SegmentationScores]:
        """Of each head. Collective."""
        images = int(distributed.all_reduce_sum(torch.tensor(self.images)))
        return [scores_of(counts.double(), images) for counts in distributed.all_reduce_sum(self.counts.clone())]


def scores_of(counts: Tensor, images: int) -> SegmentationScores:
    """Of a confusion matrix float64 [K, K], rows the true classes.

    As usual, means are over the classes that occur: of IoU, where they are there or predicted; of accuracy, where they
    are there.
    """
    hits, there, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    iou = 100 * hits / (there + predicted - hits)
    of_class = 100 * hits / there
    accuracy = 100 * hits.sum() / there.sum()
    of_each = [round(float(each), 4) for each in iou]
    return SegmentationScores(float(iou.nanmean()), float(of_class.nanmean()), float(accuracy), of_each, images)


class DepthScores(NamedTuple):
    """Means over so many images, as the benchmarks have them. rmse in metres; abs_rel, sq_rel (metres), log10,
    rmse_log, silog (100 times the standard deviation of the difference of logarithms); deltas in percent."""

    rmse: float
    abs_rel: float
    sq_rel: float
    log10: float
    rmse_log: float
    silog: float
    delta1: float
    delta2: float
    delta3: float
    images: int


class DepthErrors:
    """Sums of each image's errors, by head."""

    def __init__(self, heads: int) -> None:
        self.sums = torch.zeros(heads, len(DepthScores._fields) - 1, dtype=torch.float64)
        self.images = 0

    def update(self, predicted: Tensor, labels: Tensor) -> None:
        """Add an image: metres [R, n] as predicted and [n] as they are, of the pixels where that is known."""
        if labels.numel():
            self.sums += torch.stack([errors_of(each.double(), labels.double()) for each in predicted]).cpu()
            self.images += 1

    def scores(self) -> list[DepthScores]:
        """Of each head. Collective."""
        images = int(distributed.all_reduce_sum(torch.tensor(self.images)))
        means = distributed.all_reduce_sum(self.sums.clone()) / images
        errors = DepthScores._fields[:-1]
        return [DepthScores(**dict(zip(errors, each.tolist(), strict=True)), images=images) for each in means]


def errors_of(predicted: Tensor, there: Tensor) -> Tensor:
    """Of an image, in the order of `DepthScores`: float64 [9] of two float64 [n] above 0."""
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
