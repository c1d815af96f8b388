"""Fit a backbone to other images than it was trained on: other sizes, other channels.

Shape legend: B images, C channels, D width, N patches at the native size, P patch size.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2cli.config.vit import ViTConfig
from dinov2cli.errors import WeightsError
from dinov2cli.models.attention import TokenLayout
from dinov2cli.models.vision_transformer import VisionTransformer

SIZE_POLICIES = ("error", "pad", "crop")


def fit_to_patches(images: Tensor, patch_size: int, policy: str) -> Tensor:
    """Images with sides that are multiples of the patch size. [B, C, H, W] -> [B, C, h*P, w*P].

    Args:
        images: normalised, so that 0 is the mean colour.
        patch_size: P in pixels.
        policy: `pad` adds zeros to the right and below (the patches keep their places), `crop` keeps the centre,
            `error` refuses.

    Raises:
        ValueError: an unknown policy, or a size that the policy does not take.
    """
    height, width = images.shape[-2:]
    extra_h, extra_w = height % patch_size, width % patch_size
    if policy not in SIZE_POLICIES:
        raise ValueError(f"size policy {policy!r} is unknown; known: {', '.join(SIZE_POLICIES)}")
    if not (extra_h or extra_w):
        return images
    if policy == "error":
        raise ValueError(f"image of {height}x{width} pixels: both must be multiples of patch size {patch_size}")
    if policy == "pad":
        return F.pad(images, (0, -width % patch_size, 0, -height % patch_size))
    if height < patch_size or width < patch_size:
        raise ValueError(f"image of {height}x{width} pixels: smaller than one patch of {patch_size}")
    top, left = extra_h // 2, extra_w // 2
    return images[..., top : top + height - extra_h, left : left + width - extra_w]


class AnySizeVisionTransformer(VisionTransformer):
    """A backbone that takes images of any size, by a policy of `fit_to_patches` instead of an error.

    Args:
        size_policy: `pad` or `crop`.
        config, arguments: of `VisionTransformer`.
    """

    def __init__(self, size_policy: str, config: ViTConfig, **arguments: Any) -> None:
        super().__init__(config, **arguments)
        self.size_policy = size_policy

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, size_policy={self.size_policy!r}"

    def prepare_tokens_with_masks(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().prepare_tokens_with_masks(fit_to_patches(images, self.patch_size, self.size_policy), mask)

    def prepare_tokens(self, images: Sequence[Tensor], masks: Sequence[Tensor | None]) -> tuple[Tensor, TokenLayout]:
        return super().prepare_tokens([fit_to_patches(x, self.patch_size, self.size_policy) for x in images], masks)

    def grid_of(self, images: Tensor) -> tuple[int, int]:
        extra = self.patch_size - 1 if self.size_policy == "pad" else 0
        return (images.shape[-2] + extra) // self.patch_size, (images.shape[-1] + extra) // self.patch_size

    def get_intermediate_layers(self, x: Tensor, *arguments: Any, **named: Any) -> Any:
        x = fit_to_patches(x, self.patch_size, self.size_policy)
        return super().get_intermediate_layers(x, *arguments, **named)


def adapt_patch_embedding(weight: Tensor, in_chans: int, how: str = "repeat") -> Tensor:
    """Patch filters for another number of channels. [D, C, P, P] -> [D, in_chans, P, P].

    Args:
        weight: of the model that there is.
        in_chans: of the model to be made.
        how: `repeat`: channel c takes the filter of channel c mod C. `mean`: every channel takes the mean of all. Both
            times C/in_chans, so that images whose channels are all equal give what they gave (`repeat`: where in_chans
            is a multiple of C); one channel is the sum of all. `zero-new`: the first C channels keep their filters, and
            those that are new begin as zeros.

    Raises:
        WeightsError: no channel at all; `zero-new` for fewer channels than there are.
    """
    channels = weight.shape[1]
    if in_chans < 1:
        raise WeightsError(f"in_chans={in_chans}: at least one image channel is needed")
    if how == "zero-new":
        if in_chans < channels:
            raise WeightsError(
                f"zero-new adds channels: the weights have {channels}, more than the {in_chans} asked for"
            )
        return torch.cat([weight, weight.new_zeros(weight.shape[0], in_chans - channels, *weight.shape[2:])], dim=1)
    if in_chans == 1:
        return weight.sum(dim=1, keepdim=True)
    if how == "mean":
        weight = weight.mean(dim=1, keepdim=True)
    return weight[:, torch.arange(in_chans) % weight.shape[1]] * (channels / in_chans)


def resize_patch_embedding(weight: Tensor, patch_size: int) -> Tensor:
    """Patch filters for patches of another size. [D, C, P, P] -> [D, C, patch_size, patch_size], float32.

    A patch that is enlarged bilinearly gives the enlarged filters what it gave the old ones: they are the solution of
    least norm, by a pseudo-inverse (FlexiViT, Beyer et al. 2023, section 3.4). For smaller patches it is the nearest.
    """
    size = weight.shape[-1]
    pixels = torch.eye(size**2, dtype=torch.float64).view(size**2, 1, size, size)
    to = F.interpolate(pixels, size=(patch_size, patch_size), mode="bilinear", antialias=True).flatten(1)
    filters = torch.linalg.pinv(to) @ weight.double().flatten(2).transpose(1, 2)  # [D, patch_size^2, C]
    resized: Tensor = filters.transpose(1, 2).unflatten(2, (patch_size, patch_size)).float()
    return resized
