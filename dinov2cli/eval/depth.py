"""Linear depth of frozen features, to the protocol of the DINOv2 paper (section 7.4).

A 1x1 convolution gives patch and class tokens of the last block, or of four, weights of 256 depths; what counts is the
root mean squared error on val.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2cli import distributed
from dinov2cli.console import logger
from dinov2cli.data import pixels
from dinov2cli.data.datasets.dense import DepthDataset, over_labels
from dinov2cli.data.datasets.dense_layouts import NYU, DepthProtocol
from dinov2cli.data.datasets.recognise_dense import dense_dataset
from dinov2cli.data.dense_transforms import DepthCrop, counted_part, resize, size_for, used_part
from dinov2cli.errors import ConfigError, DataError
from dinov2cli.eval.dense import Course, DenseTrial, MapsOf, measured_images
from dinov2cli.eval.dense_heads import DEPTH, DenseExtractor, DenseSettings
from dinov2cli.eval.metrics import DepthErrors, MapScores
from dinov2cli.eval.protocol import Subject
from dinov2cli.eval.reports import Evaluation
from dinov2cli.models.dense_heads import DenseHead, DepthHead, last_blocks, spread_blocks
from dinov2cli.models.sliding import mirrored_mean
from dinov2cli.requests.dense import DepthRequest


@dataclass(frozen=True)
class DepthSettings(DenseSettings):
    """Also the sizes in pixels, short side to resize to (None: images stay) and crop, and the range in metres."""

    short_side: int | None = None
    crop: tuple[int, int] = NYU.crop
    range: tuple[float, float] = NYU.range


def run(request: DepthRequest, subject: Subject | None = None) -> Evaluation:
    """Train heads and measure them, or measure one that is given.

    Raises:
        Dino2Error: weights, datasets, depth or a head that are missing or do not fit each other.
    """

    def blocks(depth: int) -> tuple[int, ...]:
        count = min(request.layers, depth)
        return spread_blocks(depth) if count == 4 else last_blocks(depth, count)

    trial = DenseTrial(request, subject, blocks, norm=False)
    val, course = _depths(trial.trial.val_dataset, request), None
    train = _depths(trial.trial.train_dataset, request) if trial.head is None else None
    given = (trial.head.config.min_depth, trial.head.config.max_depth) if trial.head else None
    protocol = _protocol(request, train or val, given)
    settings = DepthSettings(
        request.layers, request.iterations, request.batch_size, request.learning_rates, request.frozen_crops,
        short_side=request.image_size, crop=protocol.crop, range=protocol.range,
    )  # fmt: skip
    if train is not None:
        low, high = protocol.range
        config = trial.config(train, min_depth=low, max_depth=high, short_side=request.image_size)

        def make_head(width: int, blocks: int) -> DepthHead:
            return DepthHead(2 * width * blocks, config=config)

        statistics = trial.extract.images.statistics
        transform = DepthCrop(protocol, request.image_size, statistics, fixed=settings.frozen_crops)
        course = Course(train, transform, make_head, settings, DEPTH, {"scale": train.scale})

    return trial.report(
        course, settings, lambda extract, heads, what: measure(extract, heads, what, val, settings, protocol)
    )


def measure(
    extract: DenseExtractor,
    heads: Sequence[DenseHead],
    description: str,
    val: DepthDataset,
    settings: DepthSettings,
    protocol: DepthProtocol,
) -> dict[str, list[MapScores]]:
    """Scores of every head, of the mean over an image and its mirror image, where depth is known and in the range.

    Raises:
        DataError: that is nowhere.
    """
    maps, errors = MapsOf(extract, heads), DepthErrors(len(heads))
    low, high = protocol.range

    def prepare(image: np.ndarray, labels: np.ndarray) -> tuple[list[Tensor], Tensor]:
        image, labels = used_part(image, labels, protocol, trains=False)
        size = size_for(image, settings.short_side) if settings.short_side else image.shape[:2]
        shown = pixels.normalize_image(resize(image, *size), extract.images.statistics)
        return [shown], torch.from_numpy(np.ascontiguousarray(labels))

    for (image,), labels in measured_images(extract, val, prepare, description):
        size = labels.shape[0], labels.shape[1]
        found = F.interpolate(mirrored_mean(maps, image), size=size, mode="bilinear", align_corners=False)
        box = counted_part(*size, protocol)
        there = labels[box]
        known = (there > low) & (there < high)
        errors.update(found[0].clamp(low, high)[:, *box][:, known], there[known])
    if not int(distributed.all_reduce_sum(torch.tensor(errors.images))):
        raise DataError(f"{val.describe()}: no depth between {low:g} and {high:g} m", "See --depth-scale, --max-depth.")
    return {"": errors.scores()}


def _depths(dataset: str, request: DepthRequest) -> DepthDataset:
    found = cast(DepthDataset, dense_dataset(dataset, "depth"))
    found.scale = request.depth_scale or found.scale
    return found


def _protocol(
    request: DepthRequest, dataset: DepthDataset, range_of_head: tuple[float, float] | None = None
) -> DepthProtocol:
    """The benchmark's, or for other data without its parts; with what the request says. Collective.

    Args:
        range_of_head: of a head that is given, which then counts.
    """
    known: DepthProtocol | None = getattr(dataset, "protocol", None)
    protocol = known or NYU._replace(cut="", counted="")
    if request.crop_size:
        height, width = request.crop_size
        protocol = protocol._replace(crop=(height, width))
    elif known is None:
        first = dataset.image(0)
        height, width = size_for(first, request.image_size or min(first.shape[:2]))
        protocol = protocol._replace(crop=(min(height, NYU.crop[0]), min(width, NYU.crop[1])))
    if range_of_head is None:
        high = request.max_depth or (known.range[1] if known else _above_largest(dataset, request.min_depth))
        range_of_head = request.min_depth, high
    if range_of_head[0] >= range_of_head[1]:
        raise ConfigError("--min-depth {:g} is not below --max-depth {:g}".format(*range_of_head))
    return protocol._replace(range=range_of_head)


def _above_largest(dataset: DepthDataset, least: float) -> float:
    """Metres just above the largest depth in the labels. Collective."""
    largest = 0.0
    with distributed.same_error_everywhere():
        if distributed.is_main():
            largest = max(over_labels(dataset, lambda depth: float(depth.max()), "depths"))
    largest = distributed.broadcast_object(largest)
    if not largest > least:
        raise DataError(f"{dataset.describe()}: no depth above {least:g} m", "See --depth-scale.")
    above = math.floor(1000 * largest + 1) / 1000  # what is not below the range is not measured
    logger.info("depths below %g m, by the largest of the train labels (--max-depth)", above)
    return above
