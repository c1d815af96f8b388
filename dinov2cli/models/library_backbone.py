"""A backbone of transformers or timm in the place of the vision transformer, as the student of a distillation.

Its class token are the pooled features; its patch tokens the feature map of the last stage, resized to the grid of
patches of the teacher that it learnt from.

Shape legend: B images, D width, N = h*w patches, P patch size.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2cli.config.images import Images
from dinov2cli.config.library import LibraryConfig
from dinov2cli.config.vit import ViTConfig
from dinov2cli.models.libraries import build, run
from dinov2cli.models.vision_transformer import VisionTransformer, parameter_count


class LibraryBackbone(nn.Module):
    """Answers what training, evaluations and pictures ask of a `VisionTransformer`, as far as there is an answer.

    Weights are under `model.` with the library's own names; BatchNorm's running averages are among them.

    Args:
        config: what it is.

    Raises:
        EnvironmentProblem: the library is not installed.
        ConfigError: it has no such architecture, or that has no feature map.
    """

    def __init__(self, config: LibraryConfig) -> None:
        super().__init__()
        self.config = config
        self.images = Images(in_chans=config.in_chans)
        self.model, self.embed_dim = build(config)
        self.patch_size, self.prefix_tokens, self.num_register_tokens = config.patch_size, config.prefix_tokens, 0
        self.depth = self.n_blocks = 1
        self.blocks: tuple[nn.Module, ...] = ()
        """Parts that are compiled and sharded each for itself: none."""

    def extra_repr(self) -> str:
        """All that it is: `repr` tells apart any two that compute differently with the same weights."""
        return ", ".join(f"{name}={value!r}" for name, value in self.config)

    def layer_of(self, name: str) -> int:
        """The last one: learning rates do not decay from layer to layer."""
        return self.depth + 1

    @torch.enable_grad()
    def freeze_unused(self) -> None:
        """Keep gradients off weights that no feature depends on, as some backbones of transformers have."""
        training, side = self.training, self.config.img_size
        pooled, found = self.eval().maps_of(torch.zeros(1, self.config.in_chans, side, side))
        (pooled.sum() + found.sum()).backward()
        for parameter in self.parameters():
            parameter.requires_grad_(parameter.grad is not None)
            parameter.grad = None
        self.train(training)

    def maps_of(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C, H, W] -> pooled features [B, D] and the feature map [B, D, h', w'] of the last stage, float32."""
        pooled, found = run(self.config, self.model, images)
        return pooled.float(), found.float()

    def tokens_of(self, found: Tensor, images: Tensor) -> Tensor:
        """A feature map [B, D, h', w'] as patch tokens [B, N, D] of its images [B, C, h*P, w*P]: resized bilinearly."""
        grid = self.grid_of(images)
        if found.shape[-2:] != grid:
            shrinks = any(there > side for there, side in zip(found.shape[-2:], grid, strict=True))
            found = F.interpolate(found, size=grid, mode="bilinear", align_corners=False, antialias=shrinks)
        return found.flatten(2).transpose(1, 2)

    def grid_of(self, images: Tensor) -> tuple[int, int]:
        """Patches (h, w) of an image of a batch."""
        return images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size

    def forward_tokens(
        self,
        images: Sequence[Tensor],
        masks: Sequence[Tensor | None],
        mask_indices: Tensor,
        drop_generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `VisionTransformer.forward_tokens`, each batch by itself, as BatchNorm sees it; nothing can be masked."""
        assert all(mask is None for mask in masks), "nothing can be masked"
        with _drawing_from(drop_generator, images[0].device):
            found = [self.maps_of(batch) for batch in images]
        patches = self.tokens_of(found[0][1], images[0]).flatten(0, 1)
        return torch.cat([pooled for pooled, _ in found]), patches.index_select(0, mask_indices)

    def forward(self, x: Tensor) -> Tensor:
        """The pooled features, [B, C, H, W] -> float32 [B, D]."""
        return self.maps_of(x)[0]

    def class_tokens(self, x: Tensor) -> Tensor:
        """`forward`, under the name that it has of a vision transformer."""
        return self(x)  # type: ignore[no-any-return]

    def forward_features(self, x: Tensor) -> dict[str, Any]:
        """The keys of `VisionTransformer.forward_features`: there are no registers, and nothing is normalised twice."""
        pooled, found = self.maps_of(x)
        patches = self.tokens_of(found, x)
        return {
            "x_norm_clstoken": pooled,
            "x_norm_regtokens": pooled.new_zeros(len(x), 0, self.embed_dim),
            "x_norm_patchtokens": patches,
            "x_prenorm": torch.cat([pooled[:, None], patches], dim=1),
            "masks": None,
        }

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Any, ...]:
        """As of a vision transformer of one block: the last stage alone, the same with `norm` and without.

        Raises:
            ValueError: another layer is asked for.
        """
        if n != 1 and list(n if not isinstance(n, int) else range(n)) != [0]:
            raise ValueError(f"n={n}: {self.config.arch} has one layer of features, the last stage")
        pooled, found = self.maps_of(x)
        patches = self.tokens_of(found, x)
        if reshape:
            patches = patches.transpose(1, 2).unflatten(2, self.grid_of(x)).contiguous()
        return ((patches, pooled),) if return_class_token else (patches,)


Backbone = VisionTransformer | LibraryBackbone


@lru_cache(maxsize=16)
def size_of(config: ViTConfig | LibraryConfig) -> int:
    """Number of parameters of such a model, which is built without memory for it."""
    if isinstance(config, ViTConfig):
        return parameter_count(config)
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in LibraryBackbone(config).parameters())


@contextmanager
def _drawing_from(generator: torch.Generator | None, device: torch.device) -> Iterator[None]:
    """What layers draw by themselves (dropout, stochastic depth) becomes a function of the seed of `generator`."""
    if generator is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" and torch.cuda.is_available() else []):
        torch.manual_seed(generator.initial_seed())
        yield
