"""Heads that are trained on frozen features: their batches, the loop, and what one that is cut short resumes from.

Shapes: B images of a batch of this process.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dinov2cli import distributed
from dinov2cli.console import Interrupted, interruption, logger, progress
from dinov2cli.data.datasets import ImageDataset, UnreadableImage
from dinov2cli.data.loaders import Loader, first_readable, refuse_too_many_bad
from dinov2cli.data.sampler import SampleOrder
from dinov2cli.errors import CheckpointError
from dinov2cli.eval.extract import Extractor
from dinov2cli.eval.features import Features
from dinov2cli.files import replacing

Batch = tuple[Mapping[str, Tensor], Tensor]
"""Features of a batch, by name, and targets or labels of its images, on the device where the heads are."""


class Trainer(Protocol):
    """Heads with their optimizer."""

    @property
    def heads(self) -> nn.Module: ...

    @property
    def optimizer(self) -> torch.optim.Optimizer: ...

    def step(self, iteration: int, features: Any, targets: Any) -> Tensor:
        """One step on this process's part of a batch; returns the loss."""
        ...


@dataclass(frozen=True)
class ProbeCheckpoint:
    """Where a probe is kept to be resumed.

    Args:
        path: the file.
        identity: all that it depends on; a file of another one is refused.
    """

    path: Path
    identity: dict[str, Any]

    def save(self, trainer: Trainer, iteration: int) -> None:
        state = {"heads": trainer.heads.state_dict(), "optimizer": trainer.optimizer.state_dict()}
        write_from_one_process(self.path, {"identity": self.identity, "iteration": iteration, **state})

    def resume(self, trainer: Trainer) -> int:
        """Load the file, if there is one; the iteration to go on with.

        Raises:
            CheckpointError: it is damaged, or belongs to another probe.
        """
        if not self.path.exists():
            return 0
        try:
            device = next(trainer.heads.parameters()).device
            state = torch.load(self.path, map_location=device, weights_only=True)
            identity = state["identity"]
        except (OSError, RuntimeError, ValueError, KeyError, EOFError) as error:
            hint = "Delete it, or give --no-resume."
            raise CheckpointError(f"{self.path} cannot be read ({error}).", hint=hint) from None
        for key, value in self.identity.items():
            if identity.get(key) != value:
                raise CheckpointError(
                    f"{self.path} belongs to a probe with {key}={identity.get(key)}; this one has {key}={value}.",
                    hint="Give --no-resume to start anew, or another --output-dir.",
                )
        trainer.heads.load_state_dict(state["heads"])
        trainer.optimizer.load_state_dict(state["optimizer"])
        logger.info("linear heads: resumed at iteration %d", state["iteration"])
        return int(state["iteration"])


class Parts:
    """The part of each iteration's batch that falls to this process, in an order of the images.

    Args:
        sample: of a place in that order and the index of an image, its pixels and its target or labels.
        seed: of the order.
        batch_size: images in a step on each process.
    """

    def __init__(
        self, images: ImageDataset, sample: Callable[[int, int], tuple[Tensor, Tensor]], seed: int, batch_size: int
    ) -> None:
        self.images, self.sample, self.batch_size = images, sample, batch_size
        self.order = SampleOrder(len(images), seed)
        self.rank, self.world_size = distributed.rank(), distributed.world_size()  # workers are told

    def samples(
        self, iteration: int, read: Callable[[int, int], tuple[Tensor, Tensor]], bad: list[str]
    ) -> list[Tensor]:
        """What `read` makes of these images, each part stacked; to `bad` is added what the next image replaces."""
        first = (iteration * self.world_size + self.rank) * self.batch_size
        places = range(first, first + self.batch_size)
        found = [first_readable(self.order, k, partial(read, k), bad) for k in places]
        return [torch.stack(part) for part in zip(*found, strict=True)]

    def batch(self, iteration: int) -> tuple[Tensor, Tensor, list[str]]:
        """Images [B, C, H, W], targets [B] or labels [B, H, W], and what could not be read and was replaced."""
        bad: list[str] = []
        images, labels = self.samples(iteration, self.sample, bad)
        return images, labels, bad


def random_batches(extract: Extractor, parts: Parts, iterations: range) -> Iterator[Batch]:
    """Features of samples that are read anew each time."""
    bad = 0
    loader = Loader(parts.images, parts.batch, iterations, extract.num_workers, False)
    for seen, (images, labels, messages) in enumerate(loader, 1):
        bad += len(messages)
        if messages:
            refuse_too_many_bad(bad, max(seen * parts.batch_size, 256), extract.max_bad_fraction, messages)
        yield extract.features_of(images), labels.to(extract.device)


def frozen_batches(
    parts: Parts, part: Features, label_of: Callable[[int], Tensor], iterations: range, device: torch.device
) -> Iterator[Batch]:
    """Features that were extracted once, in the same order of images as `random_batches` has.

    Args:
        part: those of this process.
        label_of: target or labels of an image, by its index.
    """
    tensors = {name: distributed.all_gather_rows(tensor) for name, tensor in part.tensors.items()}
    row_of = torch.full((len(parts.images),), -1)
    row_of[part.positions()] = torch.arange(part.size)

    def read(k: int, index: int) -> tuple[Tensor, Tensor]:
        if row_of[index] < 0:
            raise UnreadableImage(parts.images.path(index), "cannot be read")
        return row_of[index], label_of(index)

    for iteration in iterations:
        rows, labels = parts.samples(iteration, read, [])
        yield {name: tensor[rows].to(device).float() for name, tensor in tensors.items()}, labels.to(device)


def train_heads(
    trainer: Trainer,
    batches: Iterable[tuple[Any, Any]],
    iterations: range,
    checkpoint: ProbeCheckpoint | None,
    period: int,
    look: Callable[[int, Tensor], None] | None = None,
) -> None:
    """A step for each of `iterations`, saved each `period` of them, at the end and when it is interrupted.

    Args:
        batches: features and targets, on the device where the heads are, from the first of the iterations on.
        look: called after a step with the number of steps done and its loss.

    Raises:
        Interrupted: after the step in which a signal came.
    """
    message = "stopping after this step; the same command resumes" if checkpoint else "stopping"
    with progress() as bar, interruption(message) as signals:
        task = bar.add_task("linear heads", total=iterations.stop, completed=iterations.start)
        for iteration, (features, targets) in zip(iterations, batches, strict=True):
            loss = trainer.step(iteration, features, targets)
            bar.advance(task)
            done = iteration + 1
            if checkpoint and (signals or done % period == 0 or done == iterations.stop):
                checkpoint.save(trainer, done)
            if signals:
                raise Interrupted(signals[0])
            if look is not None:
                look(done, loss)


def write_from_one_process(path: Path, content: dict[str, Any]) -> None:
    """Write a file whole or not at all."""
    if distributed.is_main():
        with replacing(path) as aside, aside.open("wb") as file:
            torch.save(content, file)
