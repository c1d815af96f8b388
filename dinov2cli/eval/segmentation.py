"""Linear segmentation of frozen features, to the protocol of the DINOv2 paper (section 7.4).

A BatchNorm and a 1x1 convolution give the patch tokens of the last block, or of the last four, a class; what counts is
the mean IoU on val.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2cli import distributed
from dinov2cli.config.images import Statistics
from dinov2cli.data import pixels
from dinov2cli.data.datasets.dense import SegmentationDataset
from dinov2cli.data.datasets.recognise_dense import dense_dataset
from dinov2cli.data.dense_transforms import CentreCrop, SegmentationCrop, resize, size_for
from dinov2cli.errors import ConfigError, DataError
from dinov2cli.eval.dense import Course, DenseTrial, MapsOf, Transform, measured_images
from dinov2cli.eval.dense_heads import SEGMENTATION, DenseExtractor, DenseSettings
from dinov2cli.eval.metrics import Confusion, MapScores
from dinov2cli.eval.protocol import Subject
from dinov2cli.eval.reports import Evaluation
from dinov2cli.models.dense_heads import DenseHead, SegmentationHead, last_blocks
from dinov2cli.models.sliding import multi_scale, sliding
from dinov2cli.requests.dense import SegmentationRequest

SCALES = (1.0, 1.32, 1.73, 2.28, 3.0)
IN_WORDS = {"whole": "whole image", "slide": "sliding window", "ms": "multi-scale"}


@dataclass(frozen=True)
class SegmentationSettings(DenseSettings):
    """Also the sizes in pixels: short side of images, side of crops and windows, stride of windows."""

    short_side: int = 512
    crop: int = 512
    stride: int = 341
    inference: tuple[str, ...] = ("slide",)

    @classmethod
    def of(cls, request: SegmentationRequest) -> "SegmentationSettings":
        """With the paper's sizes where none are said; raises ConfigError for a stride above the window."""
        short_side = request.image_size or (512 if request.layers == 1 else 640)
        crop = request.crop_size or short_side
        stride = request.stride or (max(1, crop * 2 // 3) if request.layers == 1 else max(1, crop // 2))
        if stride > crop:
            raise ConfigError(f"--stride {stride} is more than a window's side, {crop}: pixels would be left out")
        return cls(
            request.layers, request.iterations, request.batch_size, request.learning_rates, request.frozen_crops,
            short_side=short_side, crop=crop, stride=stride, inference=tuple(dict.fromkeys(request.inference)),
        )  # fmt: skip

    def transform(self, statistics: Statistics) -> Transform:
        """Of training."""
        if self.frozen_crops:
            return CentreCrop(self.short_side, self.crop, statistics)
        factors = (0.5, 2.0) if self.layers == 1 else (1.0, 3.0)
        return SegmentationCrop(self.short_side, self.crop, factors, statistics)


def run(request: SegmentationRequest, subject: Subject | None = None) -> Evaluation:
    """Train heads and measure them, or measure one that is given.

    Raises:
        Dino2Error: weights, datasets, masks or a head that are missing or do not fit each other.
    """
    settings = SegmentationSettings.of(request)
    trial = DenseTrial(request, subject, lambda depth: last_blocks(depth, min(settings.layers, depth)), norm=True)
    val = cast(SegmentationDataset, dense_dataset(trial.trial.val_dataset, "masks"))
    course = None
    if isinstance(trial.head, SegmentationHead):
        n_classes = trial.head.conv_seg.out_channels
        val.with_classes(n_classes, trial.head.config.classes)
    else:
        train = cast(SegmentationDataset, dense_dataset(trial.trial.train_dataset, "masks"))
        n_classes = _same_classes(train, val)
        config = trial.config(train, classes=train.class_names, short_side=settings.short_side, window=settings.crop)

        def make_head(width: int, blocks: int) -> SegmentationHead:
            return SegmentationHead(width * blocks, n_classes, config)

        transform = settings.transform(trial.extract.images.statistics)
        course = Course(train, transform, make_head, settings, SEGMENTATION, {"n_classes": n_classes})

    return trial.report(
        course, settings, lambda extract, heads, what: measure(extract, heads, what, val, settings, n_classes)
    )


def measure(
    extract: DenseExtractor,
    heads: Sequence[DenseHead],
    description: str,
    val: SegmentationDataset,
    settings: SegmentationSettings,
    n_classes: int,
) -> dict[str, list[MapScores]]:
    """For each way of inference, in words, the scores of every head."""
    maps = MapsOf(extract, heads)
    confusions = {how: Confusion(len(heads), n_classes) for how in settings.inference}

    def windows(images: Tensor) -> Tensor:
        return sliding(maps, images, settings.crop, settings.stride)

    def prepare(image: np.ndarray, labels: np.ndarray) -> tuple[list[Tensor], Tensor]:
        sides = [settings.short_side * scale for scale in (SCALES if "ms" in settings.inference else SCALES[:1])]
        sizes = [size_for(image, side) for side in sides]
        scaled = [pixels.normalize_image(resize(image, *size), extract.images.statistics) for size in sizes]
        return scaled, torch.from_numpy(np.ascontiguousarray(labels))

    for scaled, labels in measured_images(extract, val, prepare, description):
        size = labels.shape[0], labels.shape[1]
        for how, confusion in confusions.items():
            if how == "ms":
                found = multi_scale(windows, scaled, size, n_classes)
            else:
                found = windows(scaled[0]) if how == "slide" else maps(scaled[0])
                found = F.interpolate(found.float(), size=size, mode="bilinear", align_corners=False)
            confusion.update(found[0].unflatten(0, (-1, n_classes)).argmax(1), labels)
    return {IN_WORDS[how]: confusion.scores(val.class_names) for how, confusion in confusions.items()}


def _same_classes(train: SegmentationDataset, val: SegmentationDataset) -> int:
    """The number of classes, by the train masks, which val is told. Collective."""
    with distributed.same_error_everywhere():
        found = train.n_classes if distributed.is_main() else 0
    found = distributed.broadcast_object(found)
    if train.class_names and val.class_names and train.class_names != val.class_names:
        raise DataError(f"train ({train.describe()}) and val ({val.describe()}) have classes of other names or order")
    train.with_classes(found)
    val.with_classes(found, train.class_names)
    return found
