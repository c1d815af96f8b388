"""Crops and masks of several images as one batch of tensors."""

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from dinov2cli.data.augmentations import GLOBAL_CROPS, Crops, normalize
from dinov2cli.data.crop_parameters import CropParameters
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

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "MultiCropBatch":
        """The batch with its tensors on `device`, where pending colour operations are done: float32 crops then."""
        moved = self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))
        if moved.pending is None:
            return moved
        of_global, of_local = moved.pending
        return replace(
            moved,
            global_crops=normalize_levels(color_crops(moved.global_crops, of_global)),
            local_crops=normalize_levels(color_crops(moved.local_crops, of_local)),
            pending=None,
        )

    def pin_memory(self) -> "MultiCropBatch":
        """The batch with its tensors in page-locked memory, from which copies to a GPU run in the background."""
        return self._map(lambda tensor: tensor.pin_memory())

    def normalized(self) -> "MultiCropBatch":
        """The batch with float32 crops, as a network takes them."""
        return replace(self, global_crops=normalize(self.global_crops), local_crops=normalize(self.local_crops))

    def _map(self, function: Any) -> "MultiCropBatch":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: function(value) for name, value in values.items() if isinstance(value, Tensor)})


def collate(
    crops: list[Crops],
    masks: np.ndarray,
    *,
    iteration: int,
    samples: list[int],
    bad: list[str],
    parameters: list[list[CropParameters]] | None = None,
) -> MultiCropBatch:
    """Stack the views of B images, view by view, and index the masked patches.

    `parameters` [B][views] are given where the colour operations are left to the device.
    """
    masks_ = torch.from_numpy(masks)
    masked_per_image = masks_.sum(dim=1, keepdim=True).clamp(min=1)
    return MultiCropBatch(
        global_crops=_stack([image.global_crops for image in crops]),
        local_crops=_stack([image.local_crops for image in crops]),
        masks=masks_,
        mask_indices=masks_.flatten().nonzero().flatten(),
        masks_weight=(1 / masked_per_image.float()).expand_as(masks_)[masks_],
        iteration=iteration,
        samples=torch.tensor(samples),
        bad=bad,
        pending=_color_decisions(parameters) if parameters else None,
    )


def _color_decisions(parameters: list[list[CropParameters]]) -> tuple[ColorDecisions, ColorDecisions]:
    views = list(zip(*parameters, strict=True))
    return (
        ColorDecisions.of([p for view in views[:GLOBAL_CROPS] for p in view]),
        ColorDecisions.of([p for view in views[GLOBAL_CROPS:] for p in view]),
    )


def _stack(views: list[list[np.ndarray]]) -> Tensor:
    """[B][n] arrays [S, S, 3] -> [n*B, S, S, 3], view by view."""
    in_order = [image[view] for view in range(len(views[0])) for image in views]
    if not in_order:
        return torch.empty(0, 0, 0, 3, dtype=torch.uint8)
    stacked = _empty((len(in_order), *in_order[0].shape))
    np.stack(in_order, out=stacked.numpy())
    return stacked


def _empty(shape: tuple[int, ...]) -> Tensor:
    """Uninitialised uint8 tensor; in a worker process it lies in shared memory at once, which saves a copy."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)
