"""Heads for every patch: what they read, losses, schedules, and one step of several heads side by side.

The recipes are those with which the DINOv2 paper's heads were trained (section 7.4; mmsegmentation's linear decay, and
the depth toolbox's cosine). Shapes: B images, K classes, H x W pixels of the labels, h x w of a map.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2cli import distributed
from dinov2cli.config.images import RGB
from dinov2cli.data.datasets.dense import IGNORED
from dinov2cli.eval.baselines import random_network
from dinov2cli.eval.extract import Extractor
from dinov2cli.eval.features import Recipe
from dinov2cli.models.dense_heads import DenseHead, DepthHead, Features, SegmentationHead, pad_to_patches
from dinov2cli.models.library_backbone import Backbone

BatchFeatures = Mapping[str, Tensor]
"""What the heads read of a batch, by name: `patches<i>` [B, D, h, w] and `cls<i>` [B, D] of the i-th block."""
LOSS_IMAGES = 2
"""Images over which a depth's loss is one: in the paper's training, those of one of eight GPUs."""
STEADY = 100
"""First iterations of a depth head, in which the loss leaves out the variance."""
GRADIENT_STRIDES = (1, 2, 4, 6)


@dataclass(frozen=True)
class HeadRecipe:
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

    def __init__(self, heads: Sequence[DenseHead], rates: Sequence[float], iterations: int, recipe: HeadRecipe) -> None:
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


SEGMENTATION = HeadRecipe(segmentation_loss, linear_decay, weight_decay=1e-4)
DEPTH = HeadRecipe(depth_loss, cosine, weight_decay=0.01, clip=35.0)


def same_start(heads: Sequence[DenseHead], seed: int) -> None:
    """Give all heads the same random weights, normal with a deviation of 0.01."""
    for head in heads:
        last = head.conv_depth if isinstance(head, DepthHead) else cast(SegmentationHead, head).conv_seg
        last.weight.data.normal_(std=0.01, generator=torch.Generator().manual_seed(seed))


RAW_COLOURS, RANDOM_NETWORK = "raw colours", "random network"


@dataclass(frozen=True)
class DenseSettings:
    """What may be chosen in training.

    Args:
        layers: blocks that the heads read.
        batch_size: images in a step, of all processes.
        frozen_crops: train on the features of a fixed crop of each image: an approximation.
        seed: of the heads' start and of the order and crops of the images.
    """

    layers: int
    iterations: int
    batch_size: int
    learning_rates: tuple[float, ...]
    frozen_crops: bool = False
    seed: int = 0


class DenseExtractor(Extractor):
    """Runs a frozen backbone for what heads read of every patch.

    Args:
        blocks: indices of the blocks.
        norm: whether the final norm is applied.
        options: those of `Extractor`.
    """

    def __init__(
        self, model: nn.Module, *, blocks: Sequence[int], norm: bool, image_size: int | None = None, **options: Any
    ) -> None:
        super().__init__(model, **options)
        self.blocks, self.norm = tuple(blocks), norm
        self.keeps_halves, self.words = False, ""

    def used(self) -> dict[str, Any]:
        return {"precision": str(self.precision.dtype)}

    def kept(self, transform: Callable[[np.ndarray], Tensor], sizes: tuple[int, int], words: str) -> "DenseExtractor":
        """One that extracts datasets in half precision.

        Args:
            transform: of an image, without chance.
            sizes: height and width of what it gives.
            words: all that it does.
        """
        other = self.with_model(self.model)
        other.notes = self.notes
        other.keeps_halves, other.transform, other.words = True, transform, words
        other.image_size = max(sizes)
        return other

    @property
    def recipe(self) -> Recipe:
        names = tuple(f"{part}{i}" for i in range(len(self.blocks)) for part in ("patches", "cls"))
        words = f"{self.words}, {self.reading}, blocks {self.blocks}, norm {self.norm}, half precision"
        return Recipe(self.weights_hash, str(self.precision.dtype), words, names)

    def _forward(self, images: Tensor) -> dict[str, Tensor]:
        model: Any = self.model
        images = pad_to_patches(images, model.patch_size)
        layers = model.get_intermediate_layers(
            images, n=self.blocks, reshape=True, return_class_token=True, norm=self.norm
        )
        dtype = torch.float16 if self.keeps_halves else torch.float32
        found: dict[str, Tensor] = {}
        for i, (patches, cls) in enumerate(layers):
            found |= {f"patches{i}": patches.to(dtype), f"cls{i}": cls.to(dtype)}
        return found


class RawColours(nn.Module):
    """In place of a backbone: of every patch the colours of its pixels, and as class token their mean over patches."""

    def __init__(self, model: Backbone) -> None:
        super().__init__()
        self.config, self.patch_size, self.images = model.config, model.patch_size, getattr(model, "images", RGB)
        self.embed_dim, self.depth = model.config.in_chans * model.patch_size**2, 1

    def extra_repr(self) -> str:
        return f"patches of {self.patch_size}, {self.config.in_chans} channels"  # by which features are kept

    def get_intermediate_layers(self, x: Tensor, **_: Any) -> tuple[tuple[Tensor, Tensor], ...]:
        """[B, C, H, W] -> patches [B, C * P * P, h, w] and mean [B, C * P * P]."""
        patches = nn.functional.pixel_unshuffle(x.float(), self.patch_size)
        return ((patches, patches.mean((2, 3))),)


def extractors_beside(extract: DenseExtractor) -> Iterator[tuple[str, DenseExtractor]]:
    """What the same heads are trained on to compare: the colours alone, and a network that has learned nothing."""
    model: Any = extract.model
    colours = extract.with_model(RawColours(model))
    colours.blocks = (0,)
    yield RAW_COLOURS, colours
    network: Any = random_network(model.config)
    network.images = extract.images
    yield RANDOM_NETWORK, extract.with_model(network)
