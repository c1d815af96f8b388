"""The DINOv2 vision transformer: names, outputs and state dict of the reference, computed on packed tokens.

Shape legend: B images, N = h*w patches of one, R registers, S storage tokens, D width, T tokens of all sequences.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dinov2cli.config.images import Images
from dinov2cli.config.vit import ViTConfig
from dinov2cli.models.attention import TokenLayout
from dinov2cli.models.last_block import LastBlock
from dinov2cli.models.layers import Block, FinalNorms, PatchEmbed, exact_under_autocast
from dinov2cli.models.positions import RopeAugmentation, RopePositionEmbedding, resize_positions
from dinov2cli.models.recomputation import Recomputation
from dinov2cli.models.stochastic_depth import KeptByBlock, draw_by_block


class VisionTransformer(FinalNorms):
    """Vision transformer with registers, SwiGLU, LayerScale and batch-subset stochastic depth as in DINOv2; or as in
    DINOv3, with rotary positions, storage tokens and norms of their own for class tokens.

    Args:
        config: what the backbone is. Instead of it, or to change parts of it, its fields are keywords: see
            `dinov2cli.config.vit.ViTConfig`, whose `mlp_ratio` may stand for `hidden_dim`.
        drop_path_rate: share of the sequences that a residual branch skips in training.
        drop_path_uniform: the same rate for every block; else it grows linearly from 0 to the rate.
        attention_backend: a key of `attention.ATTENTION_BACKENDS`; `auto` means `sdpa`, which runs everywhere.
        rope_augmentation: of rotary positions, in training.
        activation_checkpointing: what the backward pass computes again: nothing, all of each block, or what is cheap.
        options: fields of `ViTConfig`; also the reference's `init_values` for `layerscale` and `block_chunks`, which is
            passed over: blocks are flat.

    Raises:
        ValueError: options that are unknown, out of bounds, or do not fit each other.
    """

    def __init__(
        self,
        config: ViTConfig | None = None,
        *,
        drop_path_rate: float = 0.0,
        drop_path_uniform: bool = True,
        attention_backend: str = "auto",
        rope_augmentation: RopeAugmentation = RopeAugmentation(),
        activation_checkpointing: Recomputation = False,
        **options: Any,
    ) -> None:
        super().__init__()
        options.pop("block_chunks", None)
        if "init_values" in options:
            options["layerscale"] = options.pop("init_values")
        config = ViTConfig(**options) if config is None else config.changed(**options)
        self.config = config
        self.images = Images(in_chans=config.in_chans)
        """Which channels it was trained on, and how they are normalised; loading weights tells."""
        self.embed_dim = self.num_features = config.embed_dim
        self.depth = self.n_blocks = config.depth
        self.num_heads, self.patch_size = config.num_heads, config.patch_size
        self.num_register_tokens = config.num_register_tokens
        self.num_tokens, self.chunked_blocks = 1, False  # the reference's words: class tokens, and how blocks are kept
        self.prefix_tokens = config.prefix_tokens
        """Tokens of a sequence before its patches, `config.prefix_names`."""
        self.drop_path_rates = [
            drop_path_rate if drop_path_uniform else drop_path_rate * i / max(self.depth - 1, 1)
            for i in range(self.depth)
        ]

        self.patch_embed = PatchEmbed(config.img_size, config.patch_size, config.in_chans, config.embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, self.embed_dim))
        positions = torch.zeros(1, 1 + self.patch_embed.num_patches, self.embed_dim)
        self.pos_embed = None if config.is_rotary else nn.Parameter(positions)
        self.rope_embed = RopePositionEmbedding(config, rope_augmentation) if config.is_rotary else None
        registers = torch.zeros(1, self.num_register_tokens, self.embed_dim)
        self.register_tokens = nn.Parameter(registers) if self.num_register_tokens else None
        storage = torch.zeros(1, config.n_storage_tokens, self.embed_dim)
        self.storage_tokens = nn.Parameter(storage) if config.n_storage_tokens else None
        self.mask_token = nn.Parameter(torch.zeros(1, self.embed_dim))
        self.attention_backend = backend = "sdpa" if attention_backend == "auto" else attention_backend
        self.activation_checkpointing = again = activation_checkpointing
        self.blocks = nn.ModuleList(kind(config, backend, again) for kind in [Block] * (self.depth - 1) + [LastBlock])
        self.make_final_norms(config)
        self.head = nn.Identity()
        if not self.cls_token.is_meta:  # there is nothing to draw there, and the first attempt imports for seconds
            self.init_weights()

    def extra_repr(self) -> str:
        """All options, so that `repr` tells apart any two models that compute differently with the same weights."""
        return ", ".join(f"{name}={value!r}" for name, value in self.config)

    def init_weights(self) -> None:
        """Draw fresh weights: truncated normal 0.02 for linear layers and position embeddings, as the reference."""
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=0.02 if self.config.is_rotary else 1e-6)
        if self.register_tokens is not None:
            nn.init.normal_(self.register_tokens, std=1e-6)
        if self.storage_tokens is not None:
            nn.init.normal_(self.storage_tokens, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def layer_of(self, name: str) -> int:
        """Layer of a parameter: 0 for embeddings and tokens, i+1 for block i, depth+1 for what follows the blocks."""
        part, _, rest = name.partition(".")
        if part == "blocks":
            return int(rest.split(".")[0]) + 1
        return self.depth + 1 if part in ("norm", "cls_norm", "local_cls_norm", "head") else 0

    def forward(self, x: Tensor, masks: Tensor | None = None, is_training: bool = False) -> Any:
        """The normalised class token, [B, C, H, W] -> [B, D]; with `is_training`, what `forward_features` gives."""
        features = self.forward_features(x, masks)
        return features if is_training else self.head(features["x_norm_clstoken"])

    def class_tokens(self, x: Tensor) -> Tensor:
        """`forward` for less work, as the last block is computed for the class tokens alone; equal but for rounding."""
        stream, layout = self.prepare_tokens([x], [None])
        return self.norm_class(self.forward_blocks(stream, layout, used=layout.sequence_starts(x.device)))

    def forward_features(
        self, x: Tensor | Sequence[Tensor], masks: Tensor | Sequence[Tensor | None] | None = None
    ) -> Any:
        """Features of a batch, or of several batches of different image sizes in one packed pass.

        Args:
            x: images [B, C, H, W], H and W multiples of the patch size; or a list of such batches.
            masks: bool [B, N], True where a patch is replaced by the mask token; for a list, one (or None) each.

        Returns:
            A dict (for a list, a list of dicts) with `x_norm_clstoken` [B, D], `x_norm_regtokens` [B, R, D],
            `x_storage_tokens` [B, S, D] (of DINOv3's), `x_norm_patchtokens` [B, N, D], `x_prenorm` and `masks`.
        """
        if isinstance(x, Tensor):
            assert masks is None or isinstance(masks, Tensor)
            prenorm = self.forward_blocks(self.prepare_tokens_with_masks(x, masks), self.layout_of(x))
            return self._features(self.norm_tokens(prenorm), prenorm, masks)
        masks = list(masks) if masks is not None else [None] * len(x)
        stream, layout = self.prepare_tokens(x, masks)
        batches = list(layout.split(self.forward_blocks(stream, layout)))
        normed = [self.norm_tokens(batch, local=i > 0) for i, batch in enumerate(batches)]
        return [self._features(*part) for part in zip(normed, batches, masks, strict=True)]

    def _features(self, normed: Tensor, prenorm: Tensor, masks: Tensor | None) -> dict[str, Tensor | None]:
        registers = 1 + self.num_register_tokens
        of_dinov3 = self.config.is_rotary or self.storage_tokens is not None
        return ({"x_storage_tokens": normed[:, registers : self.prefix_tokens]} if of_dinov3 else {}) | {
            "x_norm_clstoken": normed[:, 0],
            "x_norm_regtokens": normed[:, 1:registers],
            "x_norm_patchtokens": normed[:, self.prefix_tokens :],
            "x_prenorm": prenorm,
            "masks": masks,
        }

    def prepare_tokens(self, images: Sequence[Tensor], masks: Sequence[Tensor | None]) -> tuple[Tensor, TokenLayout]:
        """Embed batches of images as one packed stream [T, D] of (cls, registers, patches) sequences."""
        batches = [self.prepare_tokens_with_masks(batch, mask) for batch, mask in zip(images, masks, strict=True)]
        groups = tuple((tokens.shape[0], tokens.shape[1]) for tokens in batches)
        layout = TokenLayout(groups, tuple(map(self.grid_of, images)))
        stream = torch.cat([tokens.flatten(0, 1) for tokens in batches])
        return stream, layout.prepared(self.attention_backend, stream.device)

    def forward_blocks(
        self,
        stream: Tensor,
        layout: TokenLayout | None = None,
        drop_generator: torch.Generator | None = None,
        used: Tensor | None = None,
    ) -> Tensor:
        """All blocks, before the final norm. [T, D] -> [T, D], or [U, D] of the tokens `used` (int64 [U]) alone.

        Images alone stay [B, N, D] through every block, with the numbers of a packed stream.

        In training mode with a drop path rate, each residual branch draws its own sequences from `drop_generator`
        (a CPU generator; the global one if None); then rotary positions are drawn, if they are augmented.
        """
        whole = layout or TokenLayout(((stream.shape[0], stream.shape[1]),))
        rates = self.drop_path_rates if self.training else [0.0] * self.depth
        kept_by_block = draw_by_block(rates, whole, drop_generator, stream.device, self.attention_backend)
        layouts, kept_by_block = self.layouts(layout, kept_by_block, drop_generator)
        stream, again = exact_under_autocast(stream), self.activation_checkpointing is True and torch.is_grad_enabled()
        for i, (block, layout, kept) in enumerate(zip(self.blocks, layouts, kept_by_block, strict=True)):
            # Of the last block, only what is used afterwards is computed.
            known: tuple[Any, ...] = (layout, kept) if i < self.depth - 1 or used is None else (layout, kept, used)
            if layout is None and kept is None:
                known = ()  # hooks see what they see of the reference's blocks
            # Around what is compiled: in it, attention done twice would keep the states of random generators.
            stream = checkpoint(block, stream, *known, use_reentrant=False) if again else block(stream, *known)
        return stream

    def forward_tokens(
        self,
        images: Sequence[Tensor],
        masks: Sequence[Tensor | None],
        mask_indices: Tensor,
        drop_generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What training needs of one packed pass: the normed class tokens, and the normed masked patches.

        Args:
            images: batches [B_i, C, H_i, W_i]; patches are taken from the first.
            masks: one for each batch, as in `forward_features`.
            mask_indices: int64 [M], patches of the first batch, counted through as image * N + patch.
            drop_generator: as in `forward_blocks`.

        Returns:
            class tokens of all images in order [sum B_i, D], and patch tokens [M, D].
        """
        stream, layout = self.prepare_tokens(images, masks)
        prefix, length = self.prefix_tokens, layout.groups[0][1]
        places = mask_indices + (mask_indices // (length - prefix) + 1) * prefix  # in the stream
        used = torch.cat([layout.sequence_starts(stream.device), places])
        n_cls = sum(count for count, _ in layout.groups)
        tokens = self.forward_blocks(stream, layout, drop_generator, used)
        if self.cls_norm is None and self.local_cls_norm is None:
            cls, patches = self.norm(tokens).split([n_cls, mask_indices.shape[0]])
            return cls, patches
        n_first = layout.groups[0][0]
        first, others, patches = tokens.split([n_first, n_cls - n_first, mask_indices.shape[0]])
        return torch.cat([self.norm_class(first), self.norm_class(others, local=True)]), self.norm(patches)

    def layout_of(self, images: Tensor) -> TokenLayout | None:
        """What blocks need to know of images alone: with rotary positions their grid, else nothing."""
        if self.rope_embed is None:
            return None
        h, w = self.grid_of(images)
        layout = TokenLayout(((images.shape[0], self.prefix_tokens + h * w),), ((h, w),))
        return layout.prepared(self.attention_backend, images.device)

    def layouts(
        self, layout: TokenLayout | None, kept_by_block: KeptByBlock, generator: torch.Generator | None = None
    ) -> tuple[list[TokenLayout | None], KeptByBlock]:
        """The layout, and what is kept, for each block, with the block's rotary positions if the model has such."""
        if self.rope_embed is None:
            return [layout] * self.depth, kept_by_block
        assert layout is not None, "with rotary positions, images alone come with `layout_of`"
        turned = self.rope_embed.rotations(layout.grids, self.depth, generator)
        kept = [each and (each[0].turned(by), each[1]) for each, by in zip(kept_by_block, turned, strict=True)]
        return [replace(layout, rotation=by) for by in turned], kept

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
        return_extra_tokens: bool = False,
    ) -> tuple[Tensor, ...] | tuple[tuple[Tensor, ...], ...]:
        """Patch tokens (without registers) after chosen blocks, in block order.

        Args:
            x: images [B, C, H, W].
            n: the last `n` blocks, or the blocks' indices.
            reshape: give patch tokens as [B, D, h, w] instead of [B, N, D].
            return_class_token: give pairs (patch tokens, class token [B, D]).
            norm: apply the final norm.
            return_extra_tokens: append to each of them the registers and storage tokens [B, R+S, D].

        Raises:
            ValueError: a block that the model does not have.
        """
        wanted = set(range(self.depth - n, self.depth)) if isinstance(n, int) else set(n)
        if not wanted or min(wanted) < 0 or max(wanted) >= self.depth:
            raise ValueError(f"n={n}: the model has blocks 0 to {self.depth - 1}")
        stream = exact_under_autocast(self.prepare_tokens_with_masks(x))
        grid = self.grid_of(x)
        layouts, _ = self.layouts(self.layout_of(x), [None] * self.depth)
        outputs: list[tuple[Tensor, ...]] = []
        for i, (block, layout) in enumerate(zip(self.blocks, layouts, strict=True)):
            stream = block(stream) if layout is None else block(stream, layout)
            if i in wanted:
                tokens = self.norm_tokens(stream) if norm else stream
                patches = tokens[:, self.prefix_tokens :]
                if reshape:
                    patches = patches.transpose(1, 2).unflatten(2, grid).contiguous()
                extra = (tokens[:, 0],) * return_class_token + (
                    tokens[:, 1 : self.prefix_tokens],
                ) * return_extra_tokens
                outputs.append((patches, *extra))
        return tuple(outputs) if return_class_token or return_extra_tokens else tuple(each[0] for each in outputs)

    def grid_of(self, images: Tensor) -> tuple[int, int]:
        """Patches (h, w) of an image of a batch."""
        return images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size

    def interpolate_pos_encoding(self, x: Tensor, w: int, h: int) -> Tensor:
        """Position embeddings [1, 1+N, D] in the dtype of the tokens `x`, for images [B, C, w, h].

        `w` is the first side, the height: names and order are the reference's.
        """
        assert self.pos_embed is not None, "rotary positions are no embeddings"
        return resize_positions(self.pos_embed, (w // self.patch_size, h // self.patch_size), self.config).to(x.dtype)

    def prepare_tokens_with_masks(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, C, H, W] -> [B, 1+R+S+N, D]. Registers have no position, so they join after it is added."""
        patches = self.patch_embed(images)
        if mask is not None:
            patches = torch.where(mask.unsqueeze(-1), self.mask_token.to(patches.dtype), patches)
        tokens = torch.cat([self.cls_token.expand(patches.shape[0], -1, -1).to(patches.dtype), patches], dim=1)
        if self.pos_embed is not None:
            tokens = tokens + self.interpolate_pos_encoding(tokens, *images.shape[-2:])
        if others := [each for each in (self.register_tokens, self.storage_tokens) if each is not None]:
            joined = (each.expand(patches.shape[0], -1, -1) for each in others)
            tokens = torch.cat([each.to(tokens.dtype) for each in (tokens[:, :1], *joined, tokens[:, 1:])], dim=1)
        return tokens


@lru_cache(maxsize=64)
def _without_memory(config: ViTConfig) -> VisionTransformer:
    with torch.device("meta"):
        return VisionTransformer(config)


def shapes_of(config: ViTConfig) -> Mapping[str, tuple[int, ...]]:
    """Keys and shapes of the state dict of such a model, which is built without memory for it."""
    return {name: tuple(tensor.shape) for name, tensor in _without_memory(config).state_dict().items()}


def parameter_count(config: ViTConfig) -> int:
    """Number of parameters of such a model."""
    return sum(parameter.numel() for parameter in _without_memory(config).parameters())
