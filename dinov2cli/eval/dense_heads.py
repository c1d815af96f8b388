"""Training heads for every patch: losses, schedules, and one step of several heads side by side.

The recipes are those with which the DINOv2 paper's heads were trained (section 7.4; mmsegmentation's linear decay, and
the depth toolbox's cosine). Shapes: B images, K classes, H x W pixels of the labels, h x w of a map.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2cli import distributed
from dinov2cli.data.datasets.dense import IGNORED
from dinov2cli.models.dense_heads import DenseHead, DepthHead, Features, SegmentationHead

BatchFeatures = Mapping[str, Tensor]
"""What the heads read of a batch, by name: `patches<i>` [B, D, h, w] and `cls<i>` [B, D] of the i-th block."""
LOSS_IMAGES = 2
"""Images over which a depth's loss is one: in the paper's training, those of one of eight GPUs."""
STEADY = 100
"""First iterations of a depth head, in which the loss leaves out the variance."""
GRADIENT_STRIDES = (1, 2, 4, 6)


@dataclass(frozen=True)
class Recipe:
    """How heads are trained.

    Args:
        loss: of a head, on a batch's features and labels at an iteration.
        factor: of the learning rate, at an iteration of so many.
        weight_decay: of AdamW.
        clip: largest norm of a head's gradient; None: any.
    """

    loss: Callable[[DenseHead, BatchFeatures, Tensor, int], Tensor]
    factor: Callable[[int, int], float]
    weight_decay: float
    clip: float | None = None


class DenseTrainer:
    """Heads with a learning rate each, trained on the same batches.

    The features are frozen, so that the losses do not touch each other.
    """

    def __init__(self, heads: Sequence[DenseHead], rates: Sequence[float], iterations: int, recipe: Recipe) -> None:
        self.heads, self.rates, self.iterations, self.recipe = nn.ModuleList(heads), rates, iterations, recipe
        for head in heads:
            if isinstance(head, SegmentationHead):
                head.bn.__class__ = CommonBatchNorm
        groups = [{"params": list(head.parameters()), "lr": rate} for head, rate in zip(heads, rates, strict=True)]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=recipe.weight_decay)

    def step(self, iteration: int, features: BatchFeatures, labels: Tensor) -> Tensor:
        """One step on this process's part of a batch; gradients are averaged over processes. Returns the losses."""
        factor = self.recipe.factor(iteration, self.iterations)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.zero_grad()
        self.heads.train()
        losses = []
        for head in self.heads:  # one after the other: maps of the labels' size take memory
            loss = self.recipe.loss(cast(DenseHead, head), features, labels, iteration)
            loss.backward()
            losses.append(loss.detach())
        for head in self.heads:
            for parameter in head.parameters():
                assert parameter.grad is not None
                distributed.all_reduce_mean(parameter.grad)
            if self.recipe.clip is not None:
                nn.utils.clip_grad_norm_(head.parameters(), self.recipe.clip)
        self.optimizer.step()
        return torch.stack(losses)


class CommonBatchNorm(nn.BatchNorm2d):
    """BatchNorm with the mean and variance of all processes' batches, for an input that takes no gradient."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or distributed.world_size() == 1:
            return super().forward(input)
        mean = distributed.all_reduce_mean(input.mean((0, 2, 3)))
        square = distributed.all_reduce_mean(input.double().square().mean((0, 2, 3))).float()
        variance = square - mean.square()
        n = input.numel() / input.shape[1] * distributed.world_size()
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        self.running_mean.lerp_(mean, self.momentum or 0.0)
        self.running_var.lerp_(variance * n / (n - 1), self.momentum or 0.0)
        self.num_batches_tracked += 1
        return F.batch_norm(input, mean, variance, self.weight, self.bias, training=False, eps=self.eps)


def features_of_blocks(features: BatchFeatures) -> Features:
    """The same as heads take them."""
    return [(features[f"patches{i}"], features[f"cls{i}"]) for i in range(len(features) // 2)]


def segmentation_loss(head: DenseHead, features: BatchFeatures, labels: Tensor, iteration: int = 0) -> Tensor:
    """Cross-entropy at the labels' size; a pixel that is ignored counts as one of loss 0, as in mmsegmentation."""
    logits = head.predict(features_of_blocks(features), (labels.shape[-2], labels.shape[-1]))
    total = F.cross_entropy(logits.float(), labels.to(torch.int64), ignore_index=IGNORED, reduction="sum")
    return total / labels.numel()


def depth_loss(head: DenseHead, features: BatchFeatures, labels: Tensor, iteration: int) -> Tensor:
    """SigLoss and half of the gradient loss, at the labels' size, of every two images; labels [B, H, W], 0 unknown."""
    predicted = head.predict(features_of_blocks(features), (labels.shape[-2], labels.shape[-1]))[:, 0]
    parts = []
    for mine, there in zip(predicted.split(LOSS_IMAGES), labels.split(LOSS_IMAGES), strict=True):
        if (there > 0).sum() > 1:
            sigma = sig_loss(mine, there, with_variance=iteration >= STEADY)
            parts.append(sigma + 0.5 * gradient_loss(mine, there))
    return torch.stack(parts).mean() if parts else 0 * predicted.sum()


def sig_loss(predicted: Tensor, there: Tensor, *, with_variance: bool = True) -> Tensor:
    """Scale-invariant loss of logarithms (Eigen et al. 2014, as in AdaBins): sqrt(var + 0.15 mean^2), over what is
    known. [B, H, W] metres."""
    known = there > 0
    difference = torch.log(predicted[known] + 0.001) - torch.log(there[known] + 0.001)
    squared = 0.15 * difference.mean().square()
    return torch.sqrt(difference.var() + squared if with_variance else squared)


def gradient_loss(predicted: Tensor, there: Tensor) -> Tensor:
    """Differences, two pixels apart, of the error of logarithms, over four strides (MiDaS). [B, H, W] metres.

    The strides are those of the two last axes; the reference's, of [B, 1, H, W], are of the first two by mistake.
    """
    total = predicted.new_zeros(())
    for stride in GRADIENT_STRIDES:
        mine, its = predicted[..., ::stride, ::stride], there[..., ::stride, ::stride]
        known = its > 0
        error = torch.where(known, torch.log(mine + 0.001) - torch.log(its + 0.001), 0)
        down = (error[..., :-2, :] - error[..., 2:, :]).abs() * (known[..., :-2, :] & known[..., 2:, :])
        across = (error[..., :-2] - error[..., 2:]).abs() * (known[..., :-2] & known[..., 2:])
        total = total + (down.sum() + across.sum()) / known.sum().clamp(min=1)
    return total


def linear_decay(iteration: int, iterations: int) -> float:
    """Down to 0, after a linear rise over 1500 of 40,000 iterations."""
    warmup = max(1, round(iterations * 1500 / 40_000))
    return (1 - iteration / iterations) * min(1.0, 1e-6 + (1 - 1e-6) * iteration / warmup)


def cosine(iteration: int, iterations: int) -> float:
    """Down to 0, after a linear rise over a third of the iterations."""
    warmup = max(1, round(iterations / 3))
    return (1 + math.cos(math.pi * iteration / iterations)) / 2 * min(1.0, 1e-3 + (1 - 1e-3) * iteration / warmup)


SEGMENTATION = Recipe(segmentation_loss, linear_decay, weight_decay=1e-4)
DEPTH = Recipe(depth_loss, cosine, weight_decay=0.01, clip=35.0)


def same_start(heads: Sequence[DenseHead], seed: int) -> None:
    """Give all heads the same random weights, normal with a deviation of 0.01."""
    for head in heads:
        last = head.conv_depth if isinstance(head, DepthHead) else cast(SegmentationHead, head).conv_seg
        last.weight.data.normal_(std=0.01, generator=torch.Generator().manual_seed(seed))
