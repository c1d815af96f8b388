"""The parts of a transformer block, working on packed token streams `[tokens, dim]`.

Shape legend: T tokens, D dim, H heads.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2cli.config.vit import ViTConfig
from dinov2cli.device import autocast_dtype
from dinov2cli.models.attention import ATTENTION_BACKENDS, TokenLayout
from dinov2cli.models.positions import rotate
from dinov2cli.models.recomputation import Recomputation, checkpointed
from dinov2cli.models.stochastic_depth import KeptSequences


class PatchEmbed(nn.Module):
    """Image to patch tokens by a strided convolution. [B, C, h*p, w*p] -> [B, h*w, D].

    Sizes are pairs (height, width), as in the reference.
    """

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.img_size = (img_size, img_size)
        self.patch_size = (patch_size, patch_size)
        self.patches_resolution = (img_size // patch_size, img_size // patch_size)
        self.num_patches = (img_size // patch_size) ** 2
        self.in_chans, self.embed_dim = in_chans, embed_dim
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        if images.dim() != 4 or not images.is_floating_point():
            what = f"{images.dtype} {list(images.shape)}".removeprefix("torch.")
            hint = "; for one image give images[None]" if images.dim() == 3 else ""
            raise ValueError(f"the model takes normalised floating-point images [B, C, H, W]; these are {what}{hint}")
        height, width = images.shape[-2:]
        if height % self.patch_size[0] or width % self.patch_size[1]:
            size = f"image of {height}x{width} pixels"
            raise ValueError(f"{size}: both must be multiples of patch size {self.patch_size[0]}")
        tokens: Tensor = self.proj(images).flatten(2).transpose(1, 2)
        return tokens


class LayerNorm(nn.LayerNorm):
    """With parameters that FSDP has gathered in half precision it takes a float32 stream, on the CPU, too."""

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dtype.itemsize >= x.dtype.itemsize:
            return super().forward(x)
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class RMSNorm(nn.RMSNorm):
    """Likewise."""

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dtype.itemsize >= x.dtype.itemsize:
            return super().forward(x)
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


NORM_LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "layernorm": lambda dim: LayerNorm(dim, eps=1e-6),
    "layernormbf16": lambda dim: LayerNorm(dim, eps=1e-5),
    "rmsnorm": lambda dim: RMSNorm(dim, eps=1e-5),
}


class FinalNorms(nn.Module):
    """The normalisation after the blocks, which class tokens may have for themselves: part of a vision transformer."""

    prefix_tokens: int
    norm: nn.Module
    cls_norm: nn.Module | None
    local_cls_norm: nn.Module | None

    def make_final_norms(self, config: ViTConfig) -> None:
        """Add them, after the blocks: state dicts keep the order."""
        make = NORM_LAYERS[config.norm_layer]
        self.norm = make(config.embed_dim)
        self.cls_norm = make(config.embed_dim) if config.untie_cls_and_patch_norms else None
        self.local_cls_norm = make(config.embed_dim) if config.untie_global_and_local_cls_norm else None

    def norm_tokens(self, tokens: Tensor, local: bool = False) -> Tensor:
        """The last normalisation of whole sequences [B, L, D]; `local`: of local crops, while training."""
        if self.cls_norm is None and not self._has_norm_for(local):
            return self.norm(tokens)  # type: ignore[no-any-return]
        prefix, patches = tokens.split([self.prefix_tokens, tokens.shape[1] - self.prefix_tokens], dim=1)
        return torch.cat([self.norm_class(prefix, local), self.norm(patches)], dim=1)

    def norm_class(self, tokens: Tensor, local: bool = False) -> Tensor:
        """The last normalisation of class, register and storage tokens [.., D]."""
        norm = self.local_cls_norm if self._has_norm_for(local) else self.cls_norm or self.norm
        return norm(tokens)  # type: ignore[no-any-return,misc]

    def _has_norm_for(self, local: bool) -> bool:
        return local and self.training and self.local_cls_norm is not None


class KeyMaskedLinear(nn.Linear):
    """Queries, keys and values, the keys without bias: what DINOv3 saves of them is multiplied by `bias_mask`."""

    bias_mask: Tensor

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__(dim, out_dim)
        self.register_buffer("bias_mask", key_bias_mask(out_dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias * self.bias_mask.to(self.bias.dtype))


def key_bias_mask(out_dim: int) -> Tensor:
    """1 for the biases of queries and values, 0 in the middle for those of keys: float32 [3 D]."""
    third = out_dim // 3
    return torch.cat([torch.ones(third), torch.zeros(third), torch.ones(third)])


class Attention(nn.Module):
    """Multi-head self-attention within the sequences of a packed stream. [T, D] -> [T, D]."""

    def __init__(self, config: ViTConfig, backend: str) -> None:
        super().__init__()
        dim = config.embed_dim
        self.num_heads = config.num_heads
        self.scale = (dim // self.num_heads) ** -0.5
        self.backend, self.is_rotary = backend, config.is_rotary
        masked = config.qkv_bias and config.mask_k_bias
        self.qkv = KeyMaskedLinear(dim, 3 * dim) if masked else nn.Linear(dim, 3 * dim, bias=config.qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=config.proj_bias)

    def forward(self, x: Tensor, layout: TokenLayout | None = None, scale: nn.Module | None = None) -> Tensor:
        """Attention, then the output projection, whose output `scale` (a LayerScale) multiplies if there is one.

        A packed stream [T, D] comes with its layout; images alone [B, N, D] need none.
        """
        layout = layout or TokenLayout(((x.shape[0], x.shape[1]),)).prepared(self.backend, x.device)
        attended = ATTENTION_BACKENDS[self.backend](self.queries_keys_values(x, layout), layout)
        return linear_and_scale(attended.reshape(x.shape), self.proj, scale)

    def queries_keys_values(self, x: Tensor, layout: TokenLayout | None = None) -> Tensor:
        """[T, D] or [B, N, D] -> [T, 3, H, C]; with rotary positions turned by them, which the layout holds.

        Raises:
            ValueError: it does not.
        """
        qkv: Tensor = self.qkv(x)
        qkv = qkv.view(-1, 3, self.num_heads, x.shape[-1] // self.num_heads)
        if not self.is_rotary:
            return qkv
        if layout is None or layout.rotation is None:
            raise ValueError("a block with rotary positions needs the layout that VisionTransformer.layouts gives")
        return rotate(qkv, layout)

    def weights(self, x: Tensor, queries: int | None = None, layout: TokenLayout | None = None) -> Tensor:
        """What the softmax gives, which fused attention never forms: for pictures of it.

        Args:
            x: tokens of images alone, [B, N, D].
            queries: this many first tokens ask, by default all; N x N numbers a head are many.

        Returns:
            float32 [B, H, queries, N].
        """
        q, k, _ = self.queries_keys_values(x, layout).float().unflatten(0, x.shape[:2]).unbind(2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q[:, :queries], k) / q.shape[-1] ** 0.5
        weights: Tensor = scores.softmax(-1)
        return weights


class Mlp(nn.Module):
    """Two linear layers with GELU between. [T, D] -> [T, D]."""

    def __init__(self, dim: int, hidden_dim: int, bias: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim, bias=bias)
        self.fc2 = nn.Linear(hidden_dim, dim, bias=bias)

    def forward(self, x: Tensor, scale: nn.Module | None = None) -> Tensor:
        return linear_and_scale(F.gelu(self.fc1(x)), self.fc2, scale)


class SwiGLUFFN(nn.Module):
    """Gated feed-forward layer: w3(silu(a) * b) with a, b the halves of w12(x). [T, D] -> [T, D]."""

    def __init__(self, dim: int, hidden_dim: int, bias: bool) -> None:
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden_dim, bias=bias)
        self.w3 = nn.Linear(hidden_dim, dim, bias=bias)

    def forward(self, x: Tensor, scale: nn.Module | None = None) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return linear_and_scale(F.silu(gate) * value, self.w3, scale)


class SplitSwiGLUFFN(nn.Module):
    """The same with DINOv3's names: w3(silu(w1(x)) * w2(x)). [T, D] -> [T, D]."""

    def __init__(self, dim: int, hidden_dim: int, bias: bool) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=bias)
        self.w2 = nn.Linear(dim, hidden_dim, bias=bias)
        self.w3 = nn.Linear(hidden_dim, dim, bias=bias)

    def forward(self, x: Tensor, scale: nn.Module | None = None) -> Tensor:
        return linear_and_scale(F.silu(self.w1(x)) * self.w2(x), self.w3, scale)


def feed_forward(config: ViTConfig) -> nn.Module:
    """The feed-forward layer, with the names of weights that the reference of its generation has."""
    kinds: dict[str, Callable[[int, int, bool], nn.Module]] = {"mlp": Mlp, "swiglu": SwiGLUFFN}
    kind = SplitSwiGLUFFN if config.is_rotary and config.ffn_layer == "swiglu" else kinds[config.ffn_layer]
    return kind(config.embed_dim, config.hidden_dim, config.ffn_bias)


class LayerScale(nn.Module):
    """A learned factor for each channel, small at first so that a deep network starts near the identity."""

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.init = init
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def linear_and_scale(x: Tensor, layer: nn.Linear, scale: nn.Module | None) -> Tensor:
    """`scale(layer(x))`, where `scale` is a LayerScale, or no scale at all.

    The factors go into the layer's weight, which is small beside the stream: neither a scaled stream is made, forward
    or backward, nor the unscaled one kept. A new network's factors of 1e-5 would leave float16's range there.
    """
    half = (autocast_dtype(x.device.type) or x.dtype) == torch.float16
    if half or not is_plain(layer) or not isinstance(scale, LayerScale) or not is_plain(scale):
        y: Tensor = layer(x) if scale is None else scale(layer(x))
        return y
    bias = None if layer.bias is None else scale.gamma * layer.bias
    return F.linear(x, scale.gamma[:, None] * layer.weight, bias)


def is_plain(module: nn.Module) -> bool:
    """Whether a linear layer or LayerScale does what its weights say: nothing hooks it, no adapter took its place."""
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return type(module) in (nn.Linear, LayerScale) and not hooked


class Block(nn.Module):
    """Pre-norm transformer block: x + ls1(attn(norm1(x))), then x + ls2(mlp(norm2(x)))."""

    def __init__(
        self, config: ViTConfig, attention_backend: str, activation_checkpointing: Recomputation = False
    ) -> None:
        super().__init__()
        dim, scale = config.embed_dim, config.layerscale
        self.activation_checkpointing = activation_checkpointing
        self.norm1 = NORM_LAYERS[config.norm_layer](dim)
        self.attn = Attention(config, attention_backend)
        self.ls1 = nn.Identity() if scale is None else LayerScale(dim, scale)
        self.norm2 = NORM_LAYERS[config.norm_layer](dim)
        self.mlp = feed_forward(config)
        self.ls2 = nn.Identity() if scale is None else LayerScale(dim, scale)

    def forward(
        self, x: Tensor, layout: TokenLayout | None = None, kept: tuple[KeptSequences, KeptSequences] | None = None
    ) -> Tensor:
        """[T, D] -> [T, D], or [B, N, D] -> [B, N, D].

        Args:
            x: the packed stream, or the tokens of images alone.
            layout: the stream's sequences; None for images alone.
            kept: each branch runs on its own random sequences alone, which saves their cost.
        """
        stream, residual = checkpointed(self.activation_checkpointing, self.up_to_last_sum, x, layout, kept)
        return stream + residual if kept is None else kept[1].add(stream, residual).view(x.shape)

    def up_to_last_sum(
        self, x: Tensor, layout: TokenLayout | None, kept: tuple[KeptSequences, KeptSequences] | None
    ) -> tuple[Any, ...]:
        """The stream after the first residual, and the second one: what may be computed again for the backward pass.

        It ends there as a sum needs nothing of either, so that the last product is not computed again.
        """
        if kept is None:
            x = x + self.attention_branch(x, layout)
            return x, self.mlp_branch(x, layout)
        attending, transformed = kept
        stream, chosen = attending.select(x.flatten(0, -2))
        x = attending.add(stream, self.attention_branch(chosen, attending.layout))
        stream, chosen = transformed.select(x)
        return stream, self.mlp_branch(chosen, transformed.layout)

    def attention_branch(self, x: Tensor, layout: TokenLayout | None) -> Tensor:
        """The first residual, in the shape of `x`."""
        residual: Tensor = self.attn(self.norm1(x), layout, scale=self.ls1)
        return residual

    def mlp_branch(self, x: Tensor, layout: TokenLayout | None = None) -> Tensor:
        """The second residual, likewise; tokens are independent, so the layout does not matter."""
        residual: Tensor = self.mlp(self.norm2(x), self.ls2)
        return residual


def exact_under_autocast(stream: Tensor) -> Tensor:
    """The residual stream in float32, though patches are embedded in half precision.

    So it is in the reference wherever nothing is dropped, as LayerScale's float32 factors promote it; with stochastic
    depth it is in half precision there, where a residual of LayerScale's first 1e-5 is rounded away (docs/speed.md).
    """
    return stream.float() if autocast_dtype(stream.device.type) else stream
