"""The images that heads are trained and measured on, as batches of this process."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

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
from dinov2cli.data.sampler import SampleOrder
from dinov2cli.device import main_memory
from dinov2cli.errors import ConfigError, DataError
from dinov2cli.eval.dense_extract import DenseExtractor, DenseSettings
from dinov2cli.eval.dense_heads import BatchFeatures
from dinov2cli.eval.features import part_of_this_process

Transform = Callable[[np.ndarray, np.ndarray, np.random.Generator], DenseSample]
Batch = tuple[BatchFeatures, Tensor]
Prepare = Callable[[np.ndarray, np.ndarray], tuple[list[Tensor], Tensor]]
"""Of pixels [H, W, C] and labels [H, W], what is measured: normalised images [C, h, w] and labels."""


class _Parts:
    """The part of each iteration's batch that falls to this process."""

    def __init__(self, dataset: DenseDataset, transform: Transform, settings: DenseSettings, reading: Reading) -> None:
        self.dataset, self.transform, self.reading = dataset, transform, reading
        self.order = SampleOrder(len(dataset), settings.seed)
        self.seed, self.rank = settings.seed, distributed.rank()
        self.world_size = distributed.world_size()
        if settings.batch_size % self.world_size:
            raise ConfigError(
                f"--batch-size {settings.batch_size} cannot be shared evenly by {self.world_size} processes; give a "
                f"multiple of {self.world_size}"
            )
        self.batch_size = settings.batch_size // self.world_size

    def samples_of(self, iteration: int) -> range:
        """Places in the order of the run."""
        first = (iteration * self.world_size + self.rank) * self.batch_size
        return range(first, first + self.batch_size)

    def batch(self, iteration: int) -> tuple[Tensor, Tensor, list[str]]:
        """Images [B, C, H, W], labels [B, H, W], and what could not be read and was replaced by the next image."""
        bad: list[str] = []
        samples = [first_readable(self.order, k, partial(self.sample, k), bad) for k in self.samples_of(iteration)]
        return torch.stack([it.image for it in samples]), torch.stack([it.labels for it in samples]), bad

    def sample(self, k: int, index: int) -> DenseSample:
        image, labels = self.dataset.pair(index, self.reading)
        return self.transform(image, labels, keyed_rng(self.seed, Stream.DENSE_PROBE, k))


def random_batches(
    extract: DenseExtractor, dataset: DenseDataset, transform: Transform, settings: DenseSettings, start: int
) -> Iterator[Batch]:
    """Features and labels of random crops, of this process's part of each batch."""
    parts, bad = _Parts(dataset, transform, settings, extract.reading), 0
    loader = Loader(dataset, parts.batch, range(start, settings.iterations), extract.num_workers, False)
    for seen, (images, labels, messages) in enumerate(loader, 1):
        bad += len(messages)
        if messages:
            refuse_too_many_bad(bad, max(seen * settings.batch_size, 256), extract.max_bad_fraction, messages)
        yield extract.features_of(images), labels.to(extract.device)


class ImageAlone:
    """A transform without chance, of an image without labels."""

    def __init__(self, transform: Transform) -> None:
        self.transform = transform

    def __call__(self, image: np.ndarray) -> Tensor:
        nothing = np.zeros(image.shape[:2], np.uint8)
        return self.transform(image, nothing, np.random.default_rng(0)).image


def frozen_batches(
    extract: DenseExtractor, dataset: DenseDataset, transform: Transform, settings: DenseSettings, start: int
) -> Iterator[Batch]:
    """Features of fixed crops, extracted once, in the same order of images as with random crops."""
    parts = _Parts(dataset, transform, settings, extract.reading)
    first = first_readable(parts.order, 0, partial(parts.sample, 0), [])
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
    part = extract.kept(ImageAlone(transform), sides, words)(dataset, "train features")
    tensors = {name: distributed.all_gather_rows(tensor) for name, tensor in part.tensors.items()}
    row_of = torch.full((len(dataset),), -1)
    row_of[part.positions()] = torch.arange(part.size)
    known: dict[int, Tensor] = {}

    def row(index: int) -> tuple[int, Tensor]:
        if row_of[index] < 0:
            raise UnreadableImage(dataset.path(index), "cannot be read")
        if index not in known:
            known[index] = parts.sample(0, index).labels
        return int(row_of[index]), known[index]

    for iteration in range(start, settings.iterations):
        found = [first_readable(parts.order, k, row, []) for k in parts.samples_of(iteration)]
        rows = torch.tensor([place for place, _ in found])
        features = {name: tensor[rows].to(extract.device).float() for name, tensor in tensors.items()}
        yield features, torch.stack([labels for _, labels in found]).to(extract.device)


def transform_in_words(transform: Transform) -> str:
    """All that it does."""
    return ", ".join(f"{name} {value}" for name, value in vars(transform).items())


class _Reader:
    def __init__(self, dataset: DenseDataset, prepare: Prepare, reading: Reading, indices: Sequence[int]) -> None:
        self.dataset, self.prepare, self.reading, self.indices = dataset, prepare, reading, indices

    def __call__(self, number: int) -> tuple[list[Tensor], Tensor] | str:
        """What is measured of an image; or why it cannot be."""
        try:
            return self.prepare(*self.dataset.pair(self.indices[number], self.reading))
        except UnreadableImage as error:
            return str(error)


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
    reader = _Reader(dataset, prepare, extract.reading, indices)
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
