"""Features of the images of a dataset: what the evaluations learn from.

Shapes: N images (of this process), D features, n blocks.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dinov2cli import distributed


@dataclass(frozen=True)
class Features:
    """Features of the images of this process; the processes' parts are consecutive, in rank order."""

    tensors: dict[str, Tensor]
    """`cls` float32 [N, D]; where asked for, `mean_patch` [N, D] (of the last block, normalised tokens) and `last_cls`
    [N, n, D] (class tokens of the last n blocks, earliest first, normalised)."""
    targets: Tensor
    """int64 [N], -1 where an image has no class."""
    indices: Tensor
    """int64 [N], ascending positions in the dataset; what is missing could not be read."""
    size: int
    """Images of all processes together."""

    @property
    def cls(self) -> Tensor:
        """The normalised class token of the last block: float32 [N, D]."""
        return self.tensors["cls"]

    def positions(self) -> Tensor:
        """Positions in the dataset of the images of all processes, int64 [size]. Collective."""
        return distributed.all_gather_rows(self.indices)

    def with_classes(self, mapping: Tensor | None) -> "Features":
        """The same features with class `mapping[c]` in place of class c, -1 left as it is; None leaves all."""
        if mapping is None:
            return self
        return replace(self, targets=torch.where(self.targets < 0, self.targets, mapping[self.targets.clamp(min=0)]))


@dataclass(frozen=True)
class Recipe:
    """What features depend on, beside the images: the key of a cached entry."""

    weights: str
    """SHA-256 of the model."""
    precision: str
    """dtype of the matrix products."""
    transform: str
    """Sizes in pixels, in words."""
    detailed: bool
    """All tensors are kept, not the class token alone."""
    further: tuple[str, ...] = ()
    """Names of the tensors, where these are others."""


def part_of_this_process(size: int) -> Tensor:
    """The consecutive positions of `size` images that fall to this process, int64."""
    return torch.arange(size).tensor_split(distributed.world_size())[distributed.rank()]
