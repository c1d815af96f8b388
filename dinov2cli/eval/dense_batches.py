"""The images that heads are trained and measured on, as batches of this process."""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial

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
from dinov2cli.eval.dense_heads import DenseExtractor, DenseSettings
from dinov2cli.eval.features import part_of_this_process
from dinov2cli.eval.probe import Batch, Parts, frozen_batches, random_batches

Transform = Callable[[np.ndarray, np.ndarray, np.random.Generator], DenseSample]
Prepare = Callable[[np.ndarray, np.ndarray], tuple[list[Tensor], Tensor]]
"""Of pixels [H, W, C] and labels [H, W], what is measured: normalised images [C, h, w] and labels."""


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
