"""Crops and masks of several images as one batch of tensors."""

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from dinov2cli.config.images import IMAGENET, Statistics
from dinov2cli.data.augmentations import GLOBAL_CROPS, Crops, normalize_pixels
from dinov2cli.data.crop_parameters import CropParameters, CropRecipe
from dinov2cli.data.device_augment import ColorDecisions, color_crops, normalize_levels


@dataclass(frozen=True)
class MultiCropBatch:
    """One micro step's input for one process. B images, n local crops, N patches of a global crop, M masked patches.

    global_crops: uint8, or float32 in 0..1, [2B, H, W, C]; or normalised float32 [2B, C, H, W]; the first view of
        all images, then the second.
    local_crops: [n*B, ...] likewise, view by view.
    masks: bool [2B, N].
    mask_indices: int64 [M], where `masks` is true, counted over 2B*N.
    masks_weight: float32 [M], 1 / (masked patches of that patch's image).
    iteration: the micro step.
    samples: int64 [B], dataset indices of the images.
    bad: paths, with the reason, of images that could not be read and were replaced.
    pending: with `data.device_augment`, the colour decisions of (global, local) crops; `to` applies them on the device.
    statistics: with which crops are normalised.
    gram_teacher_crops: the global crops as a Gram teacher sees them, [2B, ...] likewise; None where it sees no others.
    are_normalized: float32 crops are so already. Bytes never are.
    """

    global_crops: Tensor
    local_crops: Tensor
    masks: Tensor
    mask_indices: Tensor
    masks_weight: Tensor
    iteration: int
    samples: Tensor
    bad: list[str] = field(default_factory=list)
    pending: tuple[ColorDecisions, ColorDecisions] | None = None
    statistics: Statistics = IMAGENET
    gram_teacher_crops: Tensor | None = None
    are_normalized: bool = True

    def to(self, device: torch.device | str, *, non_blocking: bool = False, compiled: bool = False) -> "MultiCropBatch":
        """The batch with its tensors on `device`, where pending colour operations are done: float32 crops then.

        `compiled` puts these through torch.compile.
        """
        moved = self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))
        if moved.pending is None:
            return moved
        crops = zip((moved.global_crops, moved.local_crops), moved.pending, strict=True)
        of_global, of_local = (
            normalize_levels(color_crops(views, decisions, compiled=compiled), self.statistics)
            for views, decisions in crops
        )
        larger = moved._normalized(moved.gram_teacher_crops)  # has no colour operations
        changed = {"global_crops": of_global, "local_crops": of_local, "gram_teacher_crops": larger}
        return replace(moved, **changed, pending=None, are_normalized=True)

    def pin_memory(self) -> "MultiCropBatch":
        """The batch with its tensors in page-locked memory, from which copies to a GPU run in the background."""
        pinned = self._map(lambda tensor: tensor.pin_memory())
        if pinned.pending is None:
            return pinned
        of_global, of_local = pinned.pending
        return replace(pinned, pending=(of_global.pin_memory(), of_local.pin_memory()))

    def normalized(self) -> "MultiCropBatch":
        """The batch with float32 crops, as a network takes them."""
        names = ("global_crops", "local_crops", "gram_teacher_crops")
        return replace(self, **{name: self._normalized(getattr(self, name)) for name in names}, are_normalized=True)

    def _normalized(self, crops: Any) -> Any:
        passes = crops is None or (self.are_normalized and crops.dtype != torch.uint8)
        return crops if passes else normalize_pixels(crops, self.statistics)

    def _map(self, function: Any) -> "MultiCropBatch":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: function(value) for name, value in values.items() if isinstance(value, Tensor)})


class CropBuffers:
    """The crops of B images as they are made: each is copied to its place while it is still in the cache.

    They are bytes, until an image comes that is float32 in 0..1: from then on all are.

    Args:
        recipes: of all views, the global ones first.
        batch_size: B.
        channels: C.
    """

    def __init__(self, recipes: tuple[CropRecipe, ...], batch_size: int, channels: int = 3) -> None:
        self.batch_size, self.channels = batch_size, channels
        self._sizes = [recipe.size for recipe in recipes]
        self._larger = [recipe.larger for recipe in recipes if recipe.larger]
        self._put: list[int] = []
        self._allocate(torch.uint8)

    def _allocate(self, dtype: torch.dtype) -> None:
        of = self.batch_size, self.channels, dtype
        self.global_crops = _empty_views(self._sizes[:GLOBAL_CROPS], *of)
        self.local_crops = _empty_views(self._sizes[GLOBAL_CROPS:], *of)
        self.gram_teacher_crops = _empty_views(self._larger, *of)
        self._places = tuple(crops.numpy() for crops in (self.global_crops, self.local_crops, self.gram_teacher_crops))

    def put(self, image: int, crops: Crops) -> None:
        """Store the crops of the batch's image with this number."""
        are_bytes = crops.global_crops[0].dtype == np.uint8
        if not are_bytes and self.global_crops.dtype == torch.uint8:
            before = self._places
            self._allocate(torch.float32)
            for places, bytes_ in zip(self._places, before, strict=True):
                for place in (view + i for view in range(0, len(places), self.batch_size) for i in self._put):
                    np.divide(bytes_[place], np.float32(255), out=places[place])
        elif are_bytes and self.global_crops.dtype != torch.uint8:
            crops = Crops(*([crop / np.float32(255) for crop in views] for views in crops))
        for places, views in zip(self._places, crops, strict=True):
            for view, crop in enumerate(views):
                places[view * self.batch_size + image] = crop
        self._put.append(image)


def collate(
    crops: CropBuffers,
    masks: np.ndarray,
    *,
    iteration: int,
    samples: list[int],
    bad: list[str],
    parameters: list[list[CropParameters]] | None = None,
    statistics: Statistics = IMAGENET,
) -> MultiCropBatch:
    """Crops and masks (bool [2B, N]) as a batch, with the masked patches indexed.

    `parameters` [B][views] are given where the colour operations are left to the device.
    """
    masks_ = torch.from_numpy(masks)
    masked_per_image = masks_.sum(dim=1, keepdim=True).clamp(min=1)
    views = list(zip(*(parameters or ()), strict=True))
    colors = [[p for view in part for p in view] for part in (views[:GLOBAL_CROPS], views[GLOBAL_CROPS:])]
    larger = crops.gram_teacher_crops
    return MultiCropBatch(
        global_crops=crops.global_crops,
        local_crops=crops.local_crops,
        masks=masks_,
        mask_indices=masks_.flatten().nonzero().flatten(),
        masks_weight=(1 / masked_per_image.float()).expand_as(masks_)[masks_],
        iteration=iteration,
        samples=torch.tensor(samples),
        bad=bad,
        pending=(ColorDecisions.of(colors[0]), ColorDecisions.of(colors[1])) if parameters else None,
        statistics=statistics,
        gram_teacher_crops=larger if len(larger) else None,
        are_normalized=False,
    )


def _empty_views(sizes: list[int], batch_size: int, channels: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised [views * B, S, S, C]; in a worker process in shared memory at once, which saves a copy."""
    size = sizes[0] if sizes else 0
    shape = (len(sizes) * batch_size, size, size, channels)
    if get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    storage = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize)
    return torch.empty(0, dtype=dtype).set_(storage).view(shape)
