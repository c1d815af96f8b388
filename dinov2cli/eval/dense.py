"""Training heads on the frozen features of every patch, and the maps that they give."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2cli import distributed
from dinov2cli.console import logger
from dinov2cli.data.datasets.dense import DenseDataset
from dinov2cli.eval.dense_batches import Transform, frozen_batches, random_batches, transform_in_words
from dinov2cli.eval.dense_extract import DenseExtractor, DenseSettings, extractors_beside
from dinov2cli.eval.dense_heads import DenseTrainer, Recipe, features_of_blocks, same_start
from dinov2cli.eval.probe import ProbeCheckpoint, train_heads
from dinov2cli.models.dense_heads import DenseHead, DenseModel
from dinov2cli.models.library_backbone import Backbone

FROZEN_CROPS = "approximation: trained on one fixed crop of each image, its features in half precision (--frozen-crops)"
CHECKPOINT = "running_checkpoint_{}_eval.pth"
Trained = tuple[str, DenseExtractor, list[DenseHead]]
"""A name, features, and the heads that were trained on them."""


def trained_heads(
    extract: DenseExtractor,
    dataset: DenseDataset,
    transform: Transform,
    make_head: Callable[[int], DenseHead],
    settings: DenseSettings,
    recipe: Recipe,
    *,
    checkpoint: tuple[Path, dict[str, Any]] | None = None,
    resume: bool = True,
    period: int = 1000,
) -> list[DenseHead]:
    """A head for each learning rate, trained and in eval mode.

    Args:
        transform: of an image and its labels to a sample; without chance with `settings.frozen_crops`.
        make_head: of the backbone's width.
        checkpoint: the file to keep what is done in, each `period` iterations, and further settings it depends on.

    Raises:
        CheckpointError: the file is of other settings.
    """
    heads = [make_head(extract.dim).to(extract.device) for _ in settings.learning_rates]
    same_start(heads, settings.seed)
    trainer = DenseTrainer(heads, settings.learning_rates, settings.iterations, recipe)
    kept = None
    if checkpoint is not None:
        path, further = checkpoint
        identity = {**asdict(settings), **further, "weights": extract.weights_hash, "dataset": dataset.describe()}
        identity |= {"transform": transform_in_words(transform), "processes": distributed.world_size()}
        kept = ProbeCheckpoint(path, identity)
    start = kept.resume(trainer) if kept and resume else 0
    make_batches = frozen_batches if settings.frozen_crops else random_batches
    batches = make_batches(extract, dataset, transform, settings, start)
    step = max(1, settings.iterations // 10)

    def look(done: int, losses: Tensor) -> None:
        if done % step == 0:
            said = ", ".join(f"{loss:.4f}" for loss in losses.tolist())
            logger.info("iteration %d of %d: loss %s", done, settings.iterations, said)

    train_heads(trainer, batches, range(start, settings.iterations), kept, period, look)
    return [head.eval().requires_grad_(False) for head in heads]


def trained_with_others(
    extract: DenseExtractor, baselines: bool, train: Callable[[DenseExtractor, bool], list[DenseHead]]
) -> Iterator[Trained]:
    """The heads of a model, by the name "", and then of what it is compared with: each when it is asked for.

    Args:
        train: of features, and whether they are the model's.
    """
    yield "", extract, train(extract, True)
    if baselines:
        for name, each in extractors_beside(extract):
            yield name, each, train(each, False)


class MapsOf:
    """Maps of all heads side by side, of normalised images: [B, C, H, W] -> [B, heads * K, H, W]."""

    def __init__(self, extract: DenseExtractor, heads: Sequence[DenseHead]) -> None:
        self.extract, self.heads = extract, heads

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        features = features_of_blocks(self.extract.features_of(images))
        size = images.shape[-2], images.shape[-1]
        return torch.cat([head.predict(features, size) for head in self.heads], dim=1)


def blocks_for(model: Backbone, head: DenseHead) -> tuple[int, ...]:
    """Indices of the blocks that a head reads. Raises WeightsError where it does not fit the model."""
    return DenseModel(model, head).layers
