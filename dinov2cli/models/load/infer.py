"""What a DINOv2 backbone is made of, inferred from the shapes of its weights and from what is said beside them."""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dinov2cli.config.vit import ARCHITECTURES, RESIZING, ROPE, ViTConfig
from dinov2cli.errors import WeightsError

Shape = tuple[int, ...]
# Hints about what shapes cannot show: fields of ViTConfig, from a config.yaml, an HF config.json or file metadata.
Hints = Mapping[str, Any]


def infer_architecture(state: Mapping[str, Tensor], hints: Hints, source: str) -> ViTConfig:
    """The architecture of canonical weights; `hints` add what shapes cannot show and must not contradict them.

    Raises:
        WeightsError: a part is missing, shapes contradict each other or the hints, or the heads cannot be known.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    shows_rotation = shapes.keys() & {"rope_embed.periods", "storage_tokens", "blocks.0.attn.qkv.bias_mask"}
    rotary = "pos_embed" not in shapes and bool(shows_rotation or hints.get("pos_embed_type") == "rope")
    for key in ("cls_token", *(() if rotary else ("pos_embed",)), "patch_embed.proj.weight"):
        if key not in shapes:
            raise WeightsError(f"{source}: incomplete weights, '{key}' is missing")
    for key, ndim in DIMENSIONS.items():
        if len(shapes.get(key, range(ndim))) != ndim:
            raise WeightsError(f"{source}: '{key}' has shape {shapes[key]}, expected {ndim} dimensions")
    dim, in_chans, patch, patch_w = shapes["patch_embed.proj.weight"]
    if patch != patch_w:
        raise WeightsError(f"{source}: patches of {patch}x{patch_w} pixels; only square ones are supported")
    indices = {int(found[1]) for name in shapes if (found := re.match(r"blocks\.(\d+)\.", name))}
    if not indices or indices != set(range(len(indices))):
        gaps = sorted(set(range(max(indices, default=0) + 1)) - indices)
        raise WeightsError(f"{source}: incomplete weights, transformer blocks {gaps} are missing")
    ffn_layer, hidden = _feed_forward(shapes, source)
    registers = shapes.get("register_tokens", (1, 0, dim))[1]
    shown = {
        "embed_dim": dim,
        "depth": len(indices),
        "patch_size": patch,
        "img_size": _side_of_rotary(hints, patch) if rotary else _grid(shapes["pos_embed"], source) * patch,
        "in_chans": in_chans,
        "hidden_dim": hidden,
        "ffn_layer": ffn_layer,
        "num_register_tokens": registers,
        "layerscale": 1.0 if "blocks.0.ls1.gamma" in shapes else None,  # what it was at first is over
        "qkv_bias": "blocks.0.attn.qkv.bias" in shapes,
        "proj_bias": "blocks.0.attn.proj.bias" in shapes,
        "ffn_bias": "blocks.0.mlp.fc1.bias" in shapes or "blocks.0.mlp.w3.bias" in shapes,
        "pos_embed_type": "rope" if rotary else "learned",
        "n_storage_tokens": shapes.get("storage_tokens", (1, 0, dim))[1],
        "mask_k_bias": "blocks.0.attn.qkv.bias_mask" in shapes,
        "untie_cls_and_patch_norms": "cls_norm.weight" in shapes,
        "untie_global_and_local_cls_norm": "local_cls_norm.weight" in shapes,
    }
    for key, value in shown.items():
        if key in hints and _differ(key, hints[key], value):
            words = f"{hints.get('from', 'its description')} says {key}={hints[key]}"
            raise WeightsError(f"{source}: {words}, but the weights have {value}")
    # How the released models resize: those with registers exactly and antialiased, the others with an offset.
    resizing = {"interpolate_antialias": bool(registers), "interpolate_offset": 0.0 if registers else 0.1}
    resizing |= {key: hints[key] for key in RESIZING if hints.get(key) is not None}
    norm = hints.get("norm_layer") or ("layernormbf16" if rotary else "layernorm")  # all of DINOv3 that are released
    norm = norm if "norm.bias" in shapes else "rmsnorm"
    rope = {key: hints[key] for key in ROPE if hints.get(key) is not None}
    if rotary and "rope_embed.periods" in shapes:
        periods = state["rope_embed.periods"].double()
        heads = _heads_of_periods(dim, len(periods), hints, source)
        rope |= {} if rope.keys() & _PERIODS else _how_periods_are_made(periods)
    else:
        heads = _heads(dim, hints, source, _HEADS_OF_DINOV3 if rotary else {})
    try:
        return ViTConfig(**shown, num_heads=heads, norm_layer=norm, **resizing, **rope)
    except ValueError as error:
        raise WeightsError(f"{source}: {error}") from None


DIMENSIONS = {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4, "register_tokens": 3, "storage_tokens": 3,
              "rope_embed.periods": 1, "blocks.0.mlp.fc1.weight": 2, "blocks.0.mlp.w12.weight": 2,
              "blocks.0.mlp.w1.weight": 2}  # fmt: skip
"""Of the weights whose shapes are read here; the others are compared with what these say."""


def _feed_forward(shapes: Mapping[str, Shape], source: str) -> tuple[str, int]:
    if "blocks.0.mlp.fc1.weight" in shapes:
        return "mlp", shapes["blocks.0.mlp.fc1.weight"][0]
    if "blocks.0.mlp.w12.weight" in shapes:
        return "swiglu", shapes["blocks.0.mlp.w12.weight"][0] // 2
    if "blocks.0.mlp.w1.weight" in shapes:
        return "swiglu", shapes["blocks.0.mlp.w1.weight"][0]
    raise WeightsError(
        f"{source}: incomplete weights, block 0 has neither 'blocks.0.mlp.fc1.weight' (MLP) nor "
        "'blocks.0.mlp.w12.weight' (SwiGLU)"
    )


def _grid(pos_embed: Shape, source: str) -> int:
    patches = pos_embed[1] - 1
    grid = math.isqrt(max(patches, 0))
    if grid < 1 or grid * grid != patches:
        raise WeightsError(f"{source}: {pos_embed[1]} position embeddings are not 1 + a square number of patches")
    return grid


def _side_of_rotary(hints: Hints, patch: int) -> int:
    """Rotary positions are for no size; that of the crops which trained the model is taken for it, or 224 pixels."""
    side = hints.get("img_size") or hints.get("crop_size") or 224
    return max(round(side / patch), 1) * patch if isinstance(side, int) else 224


_PERIODS = {"pos_embed_rope_base", "pos_embed_rope_min_period", "pos_embed_rope_max_period"}


def _heads_of_periods(dim: int, periods: int, hints: Hints, source: str) -> int:
    heads = dim // max(4 * periods, 1)
    if heads * 4 * periods != dim or hints.get("num_heads") not in (None, heads):
        raise WeightsError(f"{source}: {periods} RoPE periods are of heads {4 * periods} wide, which do not fit {dim}")
    return heads


def _how_periods_are_made(periods: Tensor) -> dict[str, Any]:
    """The roundest base that gives such periods, which may have been rounded to bfloat16; else both ends of them."""
    number = len(periods)
    if number > 1 and periods[0] == 1 and periods[-1] > 1:
        base = float(periods[-1]) ** (number / (number - 1))
        for tolerance, digits in ((t, d) for t in (1e-5, 2**-7) for d in range(1, 8)):
            round_base = float(f"{base:.{digits}g}")
            made = round_base ** (torch.arange(number, dtype=torch.float64) / number)
            if torch.allclose(made, periods, rtol=tolerance, atol=0):
                return {"pos_embed_rope_base": round_base}
    ends = (float(f"{float(end):.6g}") for end in (periods[0], periods[-1]))
    return dict(zip(("pos_embed_rope_min_period", "pos_embed_rope_max_period"), ends, strict=True))


def _differ(key: str, stated: Any, found: Any) -> bool:
    if key == "layerscale":  # trained weights show whether it is there
        return bool(stated) != bool(found)
    if key == "ffn_layer":
        stated = str(stated).removesuffix("fused").removesuffix("64")
    return stated is not None and bool(stated != found)


_HEADS_OF_DINOV3 = {1280: 20, 4096: 32}
"""By width, where files have no periods: ViT-H+ and 7B. ViT-H of others has 16 heads."""


def _heads(dim: int, hints: Hints, source: str, further: Mapping[int, int]) -> int:
    usual = {**{size.embed_dim: size.num_heads for size in ARCHITECTURES.values()}, **further}
    heads = hints.get("num_heads") or usual.get(dim)
    if not heads:
        known = ", ".join(map(str, sorted(usual)))
        raise WeightsError(
            f"{source}: the number of attention heads of a model {dim} wide cannot be known from "
            f"its weights (known widths: {known})",
            hint="Put the run's config.yaml beside the file, or pass num_heads=... to load_model.",
        )
    if not isinstance(heads, int):
        raise WeightsError(
            f"{source}: {hints.get('from', 'its description')} says num_heads={heads!r}, which is no whole number"
        )
    return heads
