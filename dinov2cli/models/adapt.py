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

    def get_intermediate_layers(self, x: Tensor, *arguments: Any, **named: Any) -> Any:
        x = fit_to_patches(x, self.patch_size, self.size_policy)
        return super().get_intermediate_layers(x, *arguments, **named)


def adapt_patch_embedding(weight: Tensor, in_chans: int) -> Tensor:
    """Patch filters for another number of channels. [D, C, P, P] -> [D, in_chans, P, P].

    One channel: the sum, so that a grey image gives what its colour version gives. More: channel c takes the filter of
    channel c mod C, times C/in_chans, so that the response to equal channels stays the same when in_chans is a
    multiple of C.
    """
    channels = weight.shape[1]
    if in_chans < 1:
        raise WeightsError(f"in_chans={in_chans}: at least one image channel is needed")
    if in_chans == 1:
        return weight.sum(dim=1, keepdim=True)
    return weight[:, torch.arange(in_chans) % channels] * (channels / in_chans)
