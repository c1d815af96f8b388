"""timm: vit_*_patch14_dinov2, vit_*_patch14_reg4_dinov2 and, to read, vit_*_patch16_dinov3.

timm keeps no mask token, and with registers no position of the class token; both travel in the metadata of a file that
is written here, so that reading it back is exact.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dinov2cli.config.vit import RESIZING, ViTConfig
from dinov2cli.errors import WeightsError
from dinov2cli.files import parse_json
from dinov2cli.models.load.layouts.dinov3 import biases
from dinov2cli.models.load.layouts.layout import State, StateView, first_unknown, images_said, renamed
from dinov2cli.models.load.released import RELEASED

_SIZES = {"vit_small": "small", "vit_base": "base", "vit_large": "large", "vit_giant2": "giant"}
# Options whose names timm shares.
_OPTIONS = ("patch_size", "embed_dim", "depth", "num_heads", "in_chans", "qkv_bias", "proj_bias")
# Parts of names: those of timm's DINOv3, which is of its class for EVA, and ours.
_DINOV3 = (("reg_token", "storage_tokens"), (".gamma_1", ".ls1.gamma"), (".gamma_2", ".ls2.gamma"))
_GATED = ((".mlp.fc1_g.", ".mlp.w1."), (".mlp.fc1_x.", ".mlp.w2."), (".mlp.fc2.", ".mlp.w3."))
_OF_DINOV3 = {"cls_token", "reg_token", "blocks.0.gamma_1", "blocks.0.attn.qkv.weight", "norm.bias"}


def matches(names: set[str]) -> bool:
    # timm's models have no mask token; LayerScale tells DINOv2's from its supervised vision transformers.
    return "mask_token" not in names and "patch_embed.proj.weight" in names and "blocks.0.ls1.gamma" in names


def is_dinov3(names: set[str]) -> bool:
    """Among others of timm with rotary positions, these have a class token, LayerNorm, and no bias of keys."""
    return names >= _OF_DINOV3 and not names & {"pos_embed", "blocks.0.attn.qkv.bias"}


def from_dinov3(state: StateView) -> State:
    """timm's DINOv3 -> canonical. It keeps neither the periods of positions, all of base 100, nor the mask token."""
    gated = "blocks.0.mlp.fc1_g.weight" in state
    parts: State = {"mask_token": state["cls_token"].new_zeros(1, state["cls_token"].shape[-1])}
    replacements = (*_DINOV3, *(_GATED if gated else ()))
    parts |= {renamed(name, replacements): tensor for name, tensor in state.items()}
    for name in [name for name in parts if name.endswith(".attn.q_bias")]:
        attention = name.removesuffix("q_bias")
        parts |= biases(attention, parts.pop(name), None, parts.pop(f"{attention}v_bias", None))
    return parts


def from_(state: StateView) -> State:
    """timm -> canonical. The mask token, which timm does not keep, becomes zeros (its value before training)."""
    renamed = dict(state)
    fc1, fc2 = state.get("blocks.0.mlp.fc1.weight"), state.get("blocks.0.mlp.fc2.weight")
    if fc1 is not None and fc2 is not None and fc1.shape[0] == 2 * fc2.shape[1]:  # SwiGLU
        renamed = {
            name.replace(".mlp.fc1.", ".mlp.w12.").replace(".mlp.fc2.", ".mlp.w3."): tensor
            for name, tensor in state.items()
        }
    dim = state["patch_embed.proj.weight"].shape[0]
    if "reg_token" in renamed:
        renamed["register_tokens"] = renamed.pop("reg_token")
        # With registers, timm has no position for the class token: it is part of the token itself.
        position = renamed["pos_embed"]
        renamed["pos_embed"] = torch.cat([position.new_zeros(1, 1, dim), position], dim=1)
    renamed["mask_token"] = state["patch_embed.proj.weight"].new_zeros(1, dim)
    return renamed


def to_(state: StateView) -> State:
    """canonical -> timm. The mask token is left out, and with registers the class token takes in its position.

    That sum is the one lossy step of all conversions; an export writes what is lost into the file's metadata
    (`lost`), so that reading it back here is exact.
    """
    renamed = {
        name.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2."): tensor
        for name, tensor in state.items()
        if name != "mask_token"
    }
    if "register_tokens" in renamed:
        renamed["reg_token"] = renamed.pop("register_tokens")
        renamed["cls_token"] = _cls_with_position(state)
        renamed["pos_embed"] = state["pos_embed"][:, 1:].clone()
    return renamed


def lost(state: StateView) -> dict[str, str]:
    """The tensors that timm's layout cannot give back, as metadata of the file: float32 in hexadecimal."""
    tensors = {"mask_token": state["mask_token"]}
    if "register_tokens" in state:
        tensors |= {"cls_token": state["cls_token"], "cls_position": state["pos_embed"][:, :1]}
    plain = {name: (list(t.shape), t.contiguous().numpy().tobytes().hex()) for name, t in tensors.items()}
    return {"dino2.lost": json.dumps(plain)}


def restore(state: State, metadata: dict[str, str]) -> State:
    """Put back what `lost` saved, bit for bit, unless the weights were changed since (then the state as it is)."""
    try:
        lost = {
            name: torch.frombuffer(bytearray.fromhex(data), dtype=torch.float32).reshape(shape)
            for name, (shape, data) in parse_json(metadata["dino2.lost"]).items()
        }
        restored = dict(state, mask_token=lost["mask_token"])
    except (ValueError, TypeError, AttributeError, KeyError, RuntimeError):
        raise WeightsError("the metadata under 'dino2.lost' are damaged: no tensors of a timm export") from None
    if "cls_token" in lost:
        restored["cls_token"] = lost["cls_token"]
        cls, position = lost["cls_token"], lost.get("cls_position")
        if cls.shape != state["cls_token"].shape or position is None or position.shape != cls.shape:
            return state
        restored["pos_embed"] = torch.cat([position, state["pos_embed"][:, 1:]], dim=1)
        if not torch.equal(_cls_with_position(restored), state["cls_token"]):
            return state
    return restored


def _cls_with_position(state: StateView) -> Tensor:
    return state["cls_token"] + state["pos_embed"][:, :1]


def why_not(config: ViTConfig) -> str | None:
    """What of a model timm's class cannot hold, in words; None if nothing."""
    if config.ffn_bias != config.proj_bias:
        return (
            "timm has one switch for the biases of attention projection and feed-forward layers; this model has only "
            "one of the two"
        )
    known = ("img_size", "hidden_dim", "ffn_layer", "ffn_bias", "layerscale", "num_register_tokens")
    if config.is_rotary:
        return "timm cannot hold this model: its DINOv3 has other names, which dino2 does not write (use hf or onnx)"
    unknown = first_unknown(config, (*_OPTIONS, *known, *RESIZING))
    return f"timm cannot hold this model: {unknown}" if unknown else None


def resizes_otherwise(config: ViTConfig) -> str | None:
    """How timm resizes position embeddings, in words; None if as this model does."""
    if config.interpolate_offset == 0 and config.interpolate_antialias:
        return None
    return (
        "timm resizes position embeddings with offset 0 and antialiasing, this model with offset "
        f"{config.interpolate_offset} and antialias={config.interpolate_antialias}"
    )


def model_of(config: ViTConfig) -> tuple[str, dict[str, Any]]:
    """The name and arguments for `timm.create_model` that make this architecture."""
    registers = config.num_register_tokens
    size = _SIZES.get(config.name, "small") if config.ffn_layer == "mlp" else "giant"
    name = f"vit_{size}_patch14{'_reg4' if registers else ''}_dinov2"
    released = RELEASED[f"dinov2_vit{size[0]}14{'_reg' if registers else ''}"].architecture
    arguments: dict[str, Any] = {"num_classes": 0, "img_size": config.img_size}
    arguments |= {key: getattr(config, key) for key in _OPTIONS if getattr(config, key) != getattr(released, key)}
    if registers != released.num_register_tokens:
        arguments["reg_tokens"] = registers
    if config.layerscale is None:
        arguments["init_values"] = None
    packed = 1 if config.ffn_layer == "mlp" else 2  # timm counts both halves of a SwiGLU layer
    if config.hidden_dim * released.embed_dim != released.hidden_dim * config.embed_dim:
        arguments["mlp_ratio"] = (packed * config.hidden_dim + 0.5) / config.embed_dim
    return name, arguments


def hints(config: Mapping[str, Any], path: str) -> dict[str, Any]:
    """What a config.json at `path` says that the weights do not show."""
    arguments, images = (config.get(key) for key in ("model_args", "pretrained_cfg"))
    arguments, images = (each if isinstance(each, dict) else {} for each in (arguments, images))
    said = {"num_heads": arguments.get("num_heads"), "pos_embed_rope_base": arguments.get("rope_temperature")}
    size = images.get("input_size")
    if isinstance(size, list) and size:
        said["crop_size"] = size[-1]
    known = {key: value for key, value in said.items() if value is not None}
    return {"from": path, **known, **images_said(images.get("mean"), images.get("std"))}


def pretrained_cfg(in_chans: int, how: Mapping[str, Any]) -> dict[str, Any]:
    """timm's words for `EvalTransform.as_dict`, as `timm.data.resolve_model_data_config` reads them."""
    crop, resized = how["center_crop"], how["resize_shorter_side"]
    return {
        "input_size": (in_chans, crop, crop),
        "interpolation": how["interpolation"],
        # timm resizes to crop / crop_pct, rounded down: a hair more than that keeps rounding from taking a pixel.
        "crop_pct": math.nextafter(crop / resized, 0),
        "crop_mode": "center",
        "mean": how["mean"],
        "std": how["std"],
    }


def config_json(config: ViTConfig, how: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a folder that timm opens as `local-dir:`."""
    name, arguments = model_of(config)
    return {
        "architecture": name,
        "num_classes": arguments.pop("num_classes"),
        "model_args": arguments,
        "pretrained_cfg": {"num_classes": 0, **pretrained_cfg(config.in_chans, how)},
    }
