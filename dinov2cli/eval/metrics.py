"""Classification accuracies, for one classifier or many at once, on one process or several; confidence intervals.

Shapes: H classifiers, B images, C classes, L labels of one image.
"""

import math
from enum import StrEnum
from typing import NamedTuple

import torch
from torch import Tensor

from dinov2cli import distributed


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
