"""What segmentation and depth share: heads that are trained on the frozen features of every patch, and their report."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dinov2cli import distributed
from dinov2cli.console import logger
from dinov2cli.data.datasets.dense import DenseDataset
from dinov2cli.errors import ConfigError
from dinov2cli.eval.dense_batches import Transform, batches_of, transform_in_words
from dinov2cli.eval.dense_heads import (
    DenseExtractor,
    DenseSettings,
    DenseTrainer,
    HeadRecipe,
    extractors_beside,
    features_of_blocks,
    same_start,
)
from dinov2cli.eval.probe import ProbeCheckpoint, train_heads
from dinov2cli.eval.protocol import Subject, Trial
from dinov2cli.eval.reports import Evaluation, Row
from dinov2cli.models.dense_heads import DenseHead, HeadConfig
from dinov2cli.models.load.dense import read_head, save_head
from dinov2cli.requests.dense import DenseRequest

FROZEN_CROPS = "approximation: trained on one fixed crop of each image, its features in half precision (--frozen-crops)"
BEST_HEAD, CHECKPOINT = "best_head.pth", "running_checkpoint_{}_eval.pth"
GIVEN = "given head"


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


class Scores(NamedTuple):
    """What is told of a head.

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
        measure: Callable[[DenseExtractor, Sequence[DenseHead], str], Mapping[str, Sequence[Scores]]],
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
            self.extract, settings, rows, lines, extra={"further": further} if further else {},
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
