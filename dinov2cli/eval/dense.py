"""What segmentation and depth share: heads that are trained on the frozen features of every patch, the images that they
are trained and measured on, as batches of this process, and their report.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dinov2cli import distributed
from dinov2cli.console import counting, logger
from dinov2cli.data.datasets import UnreadableImage
from dinov2cli.data.datasets.dense import DenseDataset
from dinov2cli.data.decoding import Reading
from dinov2cli.data.dense_transforms import DenseSample
from dinov2cli.data.loaders import Loader, first_readable, refuse_too_many_bad
from dinov2cli.data.randomness import Stream, keyed_rng
from dinov2cli.device import main_memory
from dinov2cli.errors import ConfigError, DataError
from dinov2cli.eval.dense_heads import (
    DenseExtractor,
    DenseSettings,
    DenseTrainer,
    HeadRecipe,
    extractors_beside,
    features_of_blocks,
    same_start,
)
from dinov2cli.eval.features import part_of_this_process
from dinov2cli.eval.metrics import MapScores
from dinov2cli.eval.probe import Batch, Parts, ProbeCheckpoint, frozen_batches, random_batches, train_heads
from dinov2cli.eval.protocol import Subject, Trial
from dinov2cli.eval.reports import Evaluation, Row
from dinov2cli.models.dense_heads import DenseHead, HeadConfig
from dinov2cli.models.load.dense import read_head, save_head
from dinov2cli.requests.dense import DenseRequest

FROZEN_CROPS = "approximation: trained on one fixed crop of each image, its features in half precision (--frozen-crops)"
BEST_HEAD, CHECKPOINT = "best_head.pth", "running_checkpoint_{}_eval.pth"
GIVEN = "given head"

Transform = Callable[[np.ndarray, np.ndarray, np.random.Generator], DenseSample]
Prepare = Callable[[np.ndarray, np.ndarray], tuple[list[Tensor], Tensor]]
"""Of pixels [H, W, C] and labels [H, W], what is measured: normalised images [C, h, w] and labels."""


class Course(NamedTuple):
    """What heads are trained on, and how.

    Args:
        transform: of an image and its labels to a sample; without chance with `settings.frozen_crops`.
        make_head: of the backbone's width and the number of blocks.
        identity: what a training that goes on depends on, beside the settings.
    """

    train: DenseDataset
    transform: Transform
    make_head: Callable[[int, int], DenseHead]
    settings: DenseSettings
    recipe: HeadRecipe
    identity: Mapping[str, Any]


class DenseTrial:
    """A request, its model, and either the head that it gives or those that are to be trained.

    Args:
        blocks: those that are read, of so many, where no head is given; `norm`, whether the final norm is applied.

    Raises:
        Dino2Error: weights, datasets or a head that are missing or do not fit each other.
    """

    def __init__(
        self, request: DenseRequest, subject: Subject | None, blocks: Callable[[int], tuple[int, ...]], *, norm: bool
    ) -> None:
        self.request, self.task = request, request.protocol()
        self.trial = Trial.of(request, subject)
        self.model = self.trial.subject.model
        self.head = read_head(request.head) if request.head else None
        if self.head is not None and self.head.config.task != self.task:
            raise ConfigError(f"--head {request.head} is a head for {self.head.config.task}, not for {self.task}")
        read = self.head.blocks_read(self.model) if self.head else blocks(self.model.depth)
        norm = self.head.config.uses_norm if self.head else norm
        how = self.trial.subject.extraction(request)
        self.extract = DenseExtractor(self.model, blocks=read, norm=norm, **how)

    def config(self, train: DenseDataset, **said: Any) -> HeadConfig:
        """Of a head that is trained here. It names the weights themselves: a run may have newer ones later."""
        subject: Subject = self.trial.subject
        backbone = str(subject.weights) if subject.run else subject.name
        what: Any = {"task": self.task, "layers": self.extract.blocks, "dataset": train.describe()}
        return HeadConfig(**what, backbone=backbone, **said)

    def _heads(self, course: Course | None) -> Iterator[tuple[str, DenseExtractor, list[DenseHead]]]:
        """The given head; or the heads of the model, by the name "", and of what it is compared with: each when it is
        asked for."""
        if self.head is not None or course is None:
            assert self.head is not None
            yield GIVEN, self.extract, [self.head.to(self.extract.device)]
            return
        yield "", self.extract, self._trained(self.extract, course)
        for name, each in extractors_beside(self.extract) if self.request.baselines else ():
            yield name, each, self._trained(each, course)

    def _trained(self, extract: DenseExtractor, course: Course) -> list[DenseHead]:
        """A head for each learning rate, in eval mode. Raises CheckpointError where one goes on from other settings."""
        settings, kept = course.settings, None
        heads = [course.make_head(extract.dim, len(extract.blocks)).to(extract.device) for _ in settings.learning_rates]
        same_start(heads, settings.seed)
        trainer = DenseTrainer(heads, settings.learning_rates, settings.iterations, course.recipe)
        if self.trial.folder is not None and extract is self.extract:
            words = {"transform": transform_in_words(course.transform), "processes": distributed.world_size()}
            words |= {"weights": extract.weights_hash, "dataset": course.train.describe(), **course.identity}
            kept = ProbeCheckpoint(self.trial.folder / CHECKPOINT.format(self.task), {**asdict(settings), **words})
        start = kept.resume(trainer) if kept and not self.request.no_resume else 0
        iterations = range(start, settings.iterations)
        batches = batches_of(extract, course.train, course.transform, settings, iterations)
        step = max(1, settings.iterations // 10)

        def look(done: int, losses: Tensor) -> None:
            if done % step == 0:
                said = ", ".join(f"{loss:.4f}" for loss in losses.tolist())
                logger.info("iteration %d of %d: loss %s", done, settings.iterations, said)

        period = self.request.checkpoint_period
        train_heads(trainer, batches, iterations, kept, period, look)
        return [head.eval().requires_grad_(False) for head in heads]

    def report(
        self,
        course: Course | None,
        settings: DenseSettings,
        measure: Callable[[DenseExtractor, Sequence[DenseHead], str], Mapping[str, Sequence[MapScores]]],
    ) -> Evaluation:
        """Train and measure, keep the head that does best, and tell.

        Args:
            course: None where a head is given.
            measure: for each way of measuring, by name, the scores of every head; the first way chooses the best.
        """
        rows, lines = list[Row](), list[dict[str, Any]]()
        further: dict[str, dict[str, float]] = {}
        for name, extract, heads in self._heads(course):
            found = measure(extract, heads, f"{name or 'model'}: val")
            first = next(iter(found.values()))
            place = max(range(len(first)), key=lambda i: (first[i].quality, -i))
            if not name and self.trial.folder is not None and distributed.is_main():
                save_head(heads[place], self.trial.folder / BEST_HEAD, self.model)
            rate = "" if self.head else f"lr {settings.learning_rates[place]:g}"
            for way, each in found.items():
                scores, said = each[place], ", ".join(filter(None, (name, rate, way)))
                rows.append(Row(said, images=scores.images, scores=scores.columns, per_class=scores.per_class))
                lines.append({said: scores.line})
                further |= {said: scores.further} if scores.further else {}
        return self.trial.report(
            self.extract, asdict(settings), rows, lines, extra={"further": further} if further else {},
            notes=(FROZEN_CROPS,) if settings.frozen_crops and course else (), given_head=self.head is not None,
        )  # fmt: skip


class MapsOf:
    """Maps of all heads side by side, of normalised images: [B, C, H, W] -> [B, heads * K, H, W]."""

    def __init__(self, extract: DenseExtractor, heads: Sequence[DenseHead]) -> None:
        self.extract, self.heads = extract, heads

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        features = features_of_blocks(self.extract.features_of(images))
        size = images.shape[-2], images.shape[-1]
        return torch.cat([head.predict(features, size) for head in self.heads], dim=1)


def batches_of(
    extract: DenseExtractor, dataset: DenseDataset, transform: Transform, settings: DenseSettings, iterations: range
) -> Iterator[Batch]:
    """Features and labels of random crops, or of fixed ones, extracted once; of this process's part of each batch."""
    processes = distributed.world_size()
    if settings.batch_size % processes:
        raise ConfigError(
            f"--batch-size {settings.batch_size} cannot be shared evenly by {processes} processes; give a "
            f"multiple of {processes}"
        )
    sample = partial(_sample, dataset, transform, extract.reading, settings.seed)
    parts = Parts(dataset, sample, settings.seed, settings.batch_size // processes)
    if not settings.frozen_crops:
        return random_batches(extract, parts, iterations)
    first = first_readable(parts.order, 0, partial(sample, 0), [])
    with torch.no_grad():
        one = extract.features_of(first.image[None])
    needed = 2 * len(dataset) * sum(tensor.numel() for tensor in one.values())
    if needed > 0.8 * main_memory():
        raise ConfigError(
            f"--frozen-crops: the features of {len(dataset)} crops take {needed / 1e9:.1f} GB in half precision, and "
            f"there are {main_memory() / 1e9:.1f} GB of memory; leave it out, or give a smaller --crop-size"
        )
    sides = first.labels.shape[0], first.labels.shape[1]
    words = f"{type(transform).__name__} {sides}, {transform_in_words(transform)}"
    features = extract.kept(partial(_image_alone, transform), sides, words)(dataset, "train features")
    return frozen_batches(parts, features, cache(lambda index: sample(0, index).labels), iterations, extract.device)


def _sample(
    dataset: DenseDataset, transform: Transform, reading: Reading, seed: int, k: int, index: int
) -> DenseSample:
    """The image `index` and its labels for the sample `k`."""
    return transform(*dataset.pair(index, reading), keyed_rng(seed, Stream.DENSE_PROBE, k))


def _image_alone(transform: Transform, image: np.ndarray) -> Tensor:
    """What a transform without chance makes of an image without labels."""
    return transform(image, np.zeros(image.shape[:2], np.uint8), np.random.default_rng(0)).image


def transform_in_words(transform: Transform) -> str:
    """All that it does."""
    return ", ".join(f"{name} {value}" for name, value in vars(transform).items())


def measured_images(
    extract: DenseExtractor,
    dataset: DenseDataset,
    prepare: Prepare,
    description: str,
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Of this process's images, one after the other, what `prepare` makes of pixels and labels, on the device.

    Raises:
        DataError: fewer images than processes, or more than `max_bad_fraction` that cannot be read; fewer are left out
            and named in the extractor's notes. Collective.
    """
    if len(dataset) < distributed.world_size():
        raise DataError(f"{dataset.describe()}: too few to evaluate.")
    indices, bad = part_of_this_process(len(dataset)).tolist(), []
    reader = partial(_prepared, dataset, prepare, extract.reading, indices)
    with counting(description, len(indices)) as advance:
        for found in Loader(dataset, reader, range(len(indices)), extract.num_workers, False):
            if isinstance(found, str):
                logger.warning("unreadable image left out: %s", found)
                bad.append(found)
            else:
                scales, labels = found
                yield [each[None].to(extract.device) for each in scales], labels.to(extract.device)
            advance(1)
    bad = [message for messages in distributed.all_gather_objects(bad) for message in messages]
    refuse_too_many_bad(len(bad), len(dataset), extract.max_bad_fraction, bad)
    if bad:
        note = f"{len(bad)} of {len(dataset)} images could not be read and are left out: {'; '.join(bad[:5])}"
        extract.notes[:] = [*dict.fromkeys([*extract.notes, note])]


def _prepared(
    dataset: DenseDataset, prepare: Prepare, reading: Reading, indices: Sequence[int], number: int
) -> tuple[list[Tensor], Tensor] | str:
    """What is measured of an image; or why it cannot be."""
    try:
        return prepare(*dataset.pair(indices[number], reading))
    except UnreadableImage as error:
        return str(error)
