"""Linear depth of frozen features, to the protocol of the DINOv2 paper (section 7.4).

A 1x1 convolution gives patch and class tokens of the last block, or of four, weights of 256 depths; what counts is the
root mean squared error on val.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2cli import distributed
from dinov2cli.console import logger
from dinov2cli.data import pixels
from dinov2cli.data.datasets.dense import DepthDataset, over_labels
from dinov2cli.data.datasets.depth import NYU, DepthProtocol
from dinov2cli.data.datasets.recognise_dense import dense_dataset
from dinov2cli.data.dense_transforms import DepthCrop, counted_part, resize, size_for, used_part
from dinov2cli.errors import ConfigError, DataError
from dinov2cli.eval.dense import (
    CHECKPOINT,
    FROZEN_CROPS,
    MapsOf,
    Trained,
    blocks_for,
    trained_heads,
    trained_with_others,
)
from dinov2cli.eval.dense_batches import measured_images
from dinov2cli.eval.dense_extract import DenseExtractor, DenseSettings
from dinov2cli.eval.dense_heads import DEPTH
from dinov2cli.eval.dense_metrics import DepthErrors, DepthScores
from dinov2cli.eval.protocol import Trial
from dinov2cli.eval.reports import Evaluation, Row
from dinov2cli.eval.subject import Subject
from dinov2cli.models.dense_heads import DenseHead, DepthHead, HeadConfig, last_blocks, spread_blocks
from dinov2cli.models.load.dense import read_head, save_head
from dinov2cli.models.sliding import mirrored_mean
from dinov2cli.requests.dense import DepthRequest

BEST_HEAD = "best_head.pth"


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
    trial = Trial.of(request, subject)
    val = _depths(trial.val_dataset, request)
    model = trial.subject.model
    how = trial.subject.extraction(request)
    if request.head is not None:
        head = read_head(request.head)
        if head.config.task != "depth":
            raise ConfigError(f"--head {request.head} is a head for {head.config.task}, not for depth")
        extract = DenseExtractor(model, blocks=blocks_for(model, head), norm=head.config.uses_norm, **how)
        protocol = _protocol(request, val, (head.config.min_depth, head.config.max_depth))
        measured: Iterable[Trained] = [("given head", extract, [head.to(extract.device)])]
        rates = ["given head"]
    else:
        train = _depths(trial.train_dataset, request)
        protocol = _protocol(request, train)
        count = min(request.layers, model.depth)
        blocks = spread_blocks(model.depth) if count == 4 else last_blocks(model.depth, count)
        extract = DenseExtractor(model, blocks=blocks, norm=False, **how)
        rates = [f"lr {rate:g}" for rate in request.learning_rates]
    settings = DepthSettings(
        request.layers, request.iterations, request.batch_size, request.learning_rates, request.frozen_crops,
        short_side=request.image_size, crop=protocol.crop, range=protocol.range,
    )  # fmt: skip
    if request.head is None:
        transform = DepthCrop(protocol, request.image_size, extract.images.statistics, fixed=settings.frozen_crops)
        config = HeadConfig(
            task="depth", layers=blocks, min_depth=protocol.range[0], max_depth=protocol.range[1],
            dataset=train.describe(), backbone=request.checkpoint, short_side=request.image_size,
        )  # fmt: skip

        def train_on(each: DenseExtractor, is_model: bool) -> list[DenseHead]:
            kept = trial.folder / CHECKPOINT.format("depth") if trial.folder and is_model else None
            return trained_heads(
                each, train, transform, lambda width: DepthHead(2 * width * len(each.blocks), config=config),
                settings, DEPTH, checkpoint=(kept, {"scale": train.scale}) if kept else None,
                resume=not request.no_resume, period=request.checkpoint_period,
            )  # fmt: skip

        measured = trained_with_others(extract, request.baselines, train_on)
    rows: list[Row] = []
    lines, further = [], {}
    for name, each, heads in measured:
        found = measure(each, heads, val, settings, protocol, name or "model")
        place = min(range(len(found)), key=lambda i: (found[i].rmse, i))
        if not name and trial.folder is not None and distributed.is_main():
            save_head(heads[place], trial.folder / BEST_HEAD, model)
        said = ", ".join(filter(None, (name, rates[place] if name != "given head" else "")))
        rows.append(_row(said, found[place]))
        lines.append({said: found[place]._asdict()})
        further[said] = {key: getattr(found[place], key) for key in ("sq_rel", "log10", "rmse_log", "silog")}
    notes = (FROZEN_CROPS,) if settings.frozen_crops and request.head is None else ()
    given = request.head is not None
    return trial.report(extract, settings, rows, lines, notes=notes, extra={"further": further}, given_head=given)


def measure(
    extract: DenseExtractor,
    heads: Sequence[DenseHead],
    val: DepthDataset,
    settings: DepthSettings,
    protocol: DepthProtocol,
    description: str,
) -> list[DepthScores]:
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

    for (image,), labels in measured_images(extract, val, prepare, f"{description}: val"):
        size = labels.shape[0], labels.shape[1]
        found = F.interpolate(mirrored_mean(maps, image), size=size, mode="bilinear", align_corners=False)
        box = counted_part(*size, protocol)
        there = labels[box]
        known = (there > low) & (there < high)
        errors.update(found[0].clamp(low, high)[:, *box][:, known], there[known])
    if not int(distributed.all_reduce_sum(torch.tensor(errors.images))):
        raise DataError(f"{val.describe()}: no depth between {low:g} and {high:g} m", "See --depth-scale, --max-depth.")
    return errors.scores()


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
    protocol: DepthProtocol | None = getattr(dataset, "protocol", None)
    if protocol is None:
        protocol = NYU._replace(cut="", counted="")
        if not request.crop_size:
            first = dataset.image(0)
            height, width = size_for(first, request.image_size or min(first.shape[:2]))
            protocol = protocol._replace(crop=(min(height, NYU.crop[0]), min(width, NYU.crop[1])))
        if request.max_depth is None and range_of_head is None:
            largest = 0.0
            with distributed.same_error_everywhere():
                if distributed.is_main():
                    largest = max(over_labels(dataset, lambda depth: float(depth.max()), "depths"))
            largest = distributed.broadcast_object(largest)
            if not largest > request.min_depth:
                raise DataError(f"{dataset.describe()}: no depth above {request.min_depth:g} m", "See --depth-scale.")
            above = math.floor(1000 * largest + 1) / 1000  # what is not below the range is not measured
            logger.info("depths below %g m, by the largest of the train labels (--max-depth)", above)
            protocol = protocol._replace(range=(request.min_depth, above))
    changed: dict[str, Any] = {"crop": request.crop_size} if request.crop_size else {}
    low, high = range_of_head or protocol.range
    if range_of_head is None:
        low = low if request.min_depth == 0.001 else request.min_depth
        high = request.max_depth or high
    if low >= high:
        raise ConfigError(f"--min-depth {low:g} is not below --max-depth {high:g}")
    return protocol._replace(range=(low, high), **changed)


def _row(name: str, scores: DepthScores) -> Row:
    shown = {"RMSE m": scores.rmse, "AbsRel": scores.abs_rel}
    shown |= {f"d{i} %": value for i, value in enumerate((scores.delta1, scores.delta2, scores.delta3), 1)}
    return Row(name or "head", images=scores.images, scores=shown)
