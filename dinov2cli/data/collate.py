"""Crops and masks of several images as one batch of tensors."""

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from dinov2cli.data.augmentations import GLOBAL_CROPS, Crops, normalize
from dinov2cli.data.crop_parameters import CropParameters, CropRecipe
from dinov2cli.data.device_augment import ColorDecisions, color_crops, normalize_levels


@dataclass(frozen=True)
class MultiCropBatch:
    """One micro step's input for one process. B images, n local crops, N patches of a global crop, M masked patches.

    global_crops: uint8 [2B, H, W, 3], or normalised float32 [2B, 3, H, W]; the first view of
        all images, then the second.
    local_crops: [n*B, ...] likewise, view by view.
    masks: bool [2B, N].
    mask_indices: int64 [M], where `masks` is true, counted over 2B*N.
    masks_weight: float32 [M], 1 / (masked patches of that patch's image).
    iteration: the micro step.
    samples: int64 [B], dataset indices of the images.
    bad: paths, with the reason, of images that could not be read and were replaced.
    pending: with `data.device_augment`, the colour decisions of (global, local) crops; `to` applies them on the device.
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

    def to(self, device: torch.device | str, *, non_blocking: bool = False, compiled: bool = False) -> "MultiCropBatch":
        """The batch with its tensors on `device`, where pending colour operations are done: float32 crops then.

        `compiled` puts these through torch.compile.
        """
        moved = self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))
        if moved.pending is None:
            return moved
        of_global, of_local = moved.pending
        return replace(
            moved,
            global_crops=normalize_levels(color_crops(moved.global_crops, of_global, compiled=compiled)),
            local_crops=normalize_levels(color_crops(moved.local_crops, of_local, compiled=compiled)),
            pending=None,
        )

    def pin_memory(self) -> "MultiCropBatch":
        """The batch with its tensors in page-locked memory, from which copies to a GPU run in the background."""
        pinned = self._map(lambda tensor: tensor.pin_memory())
        if pinned.pending is None:
            return pinned
        of_global, of_local = pinned.pending
        return replace(pinned, pending=(of_global.pin_memory(), of_local.pin_memory()))

    def normalized(self) -> "MultiCropBatch":
        """The batch with float32 crops, as a network takes them."""
        return replace(self, global_crops=normalize(self.global_crops), local_crops=normalize(self.local_crops))

    def _map(self, function: Any) -> "MultiCropBatch":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: function(value) for name, value in values.items() if isinstance(value, Tensor)})


class CropBuffers:
    """The crops of B images as they are made: each is copied to its place while it is still in the cache.

    Args:
        recipes: of all views, the global ones first.
        batch_size: B.
    """

    def __init__(self, recipes: tuple[CropRecipe, ...], batch_size: int) -> None:
        self.batch_size = batch_size
        self.global_crops = _empty_views([recipe.size for recipe in recipes[:GLOBAL_CROPS]], batch_size)
        self.local_crops = _empty_views([recipe.size for recipe in recipes[GLOBAL_CROPS:]], batch_size)
        self._places = self.global_crops.numpy(), self.local_crops.numpy()

    def put(self, image: int, crops: Crops) -> None:
        """Store the crops of the batch's image with this number."""
        for places, views in zip(self._places, crops, strict=True):
            for view, crop in enumerate(views):
                places[view * self.batch_size + image] = crop


def collate(
    crops: CropBuffers,
    masks: np.ndarray,
    *,
    iteration: int,
    samples: list[int],
    bad: list[str],
    parameters: list[list[CropParameters]] | None = None,
) -> MultiCropBatch:
    """Crops and masks (bool [2B, N]) as a batch, with the masked patches indexed.

    `parameters` [B][views] are given where the colour operations are left to the device.
    """
    masks_ = torch.from_numpy(masks)
    masked_per_image = masks_.sum(dim=1, keepdim=True).clamp(min=1)
    views = list(zip(*(parameters or ()), strict=True))
    colors = [[p for view in part for p in view] for part in (views[:GLOBAL_CROPS], views[GLOBAL_CROPS:])]
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
    )


def _empty_views(sizes: list[int], batch_size: int) -> Tensor:
    """Uninitialised uint8 [views * B, S, S, 3]; in a worker process in shared memory at once, which saves a copy."""
    size = sizes[0] if sizes else 0
    shape = (len(sizes) * batch_size, size, size, 3)
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)
