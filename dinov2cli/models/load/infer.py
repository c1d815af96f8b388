"""What a DINOv2 backbone is made of, inferred from the shapes of its weights and from what is said beside them."""

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dinov2cli.config.vit import ARCHITECTURES, RESIZING, ViTConfig
from dinov2cli.errors import WeightsError
from dinov2cli.models.vision_transformer import shapes_of

Shape = tuple[int, ...]
# Hints about what shapes cannot show: fields of ViTConfig, from a config.yaml, an HF config.json or file metadata.
Hints = Mapping[str, Any]


def infer_architecture(state: Mapping[str, Tensor], hints: Hints, source: str) -> ViTConfig:
    """The architecture of canonical weights; `hints` add what shapes cannot show and must not contradict them.

    Raises:
        WeightsError: a part is missing, shapes contradict each other or the hints, or the heads cannot be known.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if "pos_embed" not in shapes and shapes.keys() & {"storage_tokens", "rope_embed.periods"}:
        raise WeightsError(f"{source}: a DINOv3 model; dino2 loads DINOv2 models")
    for key in ("cls_token", "pos_embed", "patch_embed.proj.weight"):
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
        "img_size": _grid(shapes["pos_embed"], source) * patch,
        "in_chans": in_chans,
        "hidden_dim": hidden,
        "ffn_layer": ffn_layer,
        "num_register_tokens": registers,
        "layerscale": 1.0 if "blocks.0.ls1.gamma" in shapes else None,  # what it was at first is over
        "qkv_bias": "blocks.0.attn.qkv.bias" in shapes,
        "proj_bias": "blocks.0.attn.proj.bias" in shapes,
        "ffn_bias": f"blocks.0.mlp.{'fc1' if ffn_layer == 'mlp' else 'w12'}.bias" in shapes,
    }
    for key, value in shown.items():
        if key in hints and _differ(key, hints[key], value):
            words = f"{hints.get('from', 'its description')} says {key}={hints[key]}"
            raise WeightsError(f"{source}: {words}, but the weights have {value}")
    # How the released models resize: those with registers exactly and antialiased, the others with an offset.
    resizing = {"interpolate_antialias": bool(registers), "interpolate_offset": 0.0 if registers else 0.1}
    resizing |= {key: hints[key] for key in RESIZING if hints.get(key) is not None}
    try:
        return ViTConfig(**shown, num_heads=_heads(dim, hints, source), **resizing)
    except ValueError as error:
        raise WeightsError(f"{source}: {error}") from None


def check_complete(state: Mapping[str, Tensor], config: ViTConfig, source: str) -> None:
    """Refuse weights that do not have exactly the keys and shapes of `config`, with finite numbers.

    Raises:
        WeightsError: naming the keys that are missing, too many or of another shape.
    """
    expected = shapes_of(config)
    missing = [name for name in expected if name not in state]
    unknown = [name for name in state if name not in expected]
    if missing or unknown:
        parts = [f"missing: {_some(missing)}"] * bool(missing) + [f"unknown: {_some(unknown)}"] * bool(unknown)
        raise WeightsError(f"{source}: not the weights of {config.describe()}; {'; '.join(parts)}")
    for name, shape in expected.items():
        if tuple(state[name].shape) != shape:
            raise WeightsError(f"{source}: '{name}' has shape {tuple(state[name].shape)}, expected {shape}")
    broken = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if broken:
        raise WeightsError(f"{source}: weights that are not finite numbers (NaN or infinity): {_some(broken)}")


DIMENSIONS = {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4, "register_tokens": 3,
              "blocks.0.mlp.fc1.weight": 2, "blocks.0.mlp.w12.weight": 2}  # fmt: skip
"""Of the weights whose shapes are read here; the others are compared with what these say."""


def _feed_forward(shapes: Mapping[str, Shape], source: str) -> tuple[str, int]:
    if "blocks.0.mlp.fc1.weight" in shapes:
        return "mlp", shapes["blocks.0.mlp.fc1.weight"][0]
    if "blocks.0.mlp.w12.weight" in shapes:
        return "swiglu", shapes["blocks.0.mlp.w12.weight"][0] // 2
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


def _differ(key: str, stated: Any, found: Any) -> bool:
    if key == "layerscale":  # trained weights show whether it is there
        return bool(stated) != bool(found)
    if key == "ffn_layer":
        stated = str(stated).removesuffix("fused")
    return stated is not None and bool(stated != found)


def _heads(dim: int, hints: Hints, source: str) -> int:
    usual = {size.embed_dim: size.num_heads for size in ARCHITECTURES.values()}
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


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
