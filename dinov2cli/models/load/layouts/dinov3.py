"""Hugging Face transformers: DINOv3ViTModel, its weights and its config.json."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dinov2cli.config.images import Images
from dinov2cli.config.vit import ViTConfig
from dinov2cli.console import logger
from dinov2cli.errors import WeightsError
from dinov2cli.models.layers import key_bias_mask
from dinov2cli.models.load.layouts.layout import State, StateView, first_unknown, join_rows, renamed

MODEL_TYPE = "dinov3_vit"
# Options by transformers' names.
_SIZES = {"embed_dim": "hidden_size", "depth": "num_hidden_layers", "num_heads": "num_attention_heads",
          "hidden_dim": "intermediate_size"}  # fmt: skip
_OPTIONS = {"img_size": "image_size", "patch_size": "patch_size", "in_chans": "num_channels", "proj_bias": "proj_bias",
            "ffn_bias": "mlp_bias", "n_storage_tokens": "num_register_tokens",
            "pos_embed_rope_base": "rope_theta"}  # fmt: skip
_EPSILONS = {"layernorm": 1e-6, "layernormbf16": 1e-5}
# Parts of names: ours, and theirs.
_NAMES = (
    ("cls_token", "embeddings.cls_token"),
    ("mask_token", "embeddings.mask_token"),
    ("storage_tokens", "embeddings.register_tokens"),
    ("patch_embed.proj.", "embeddings.patch_embeddings."),
    ("blocks.", "model.layer."),
    (".attn.q.", ".attention.q_proj."),
    (".attn.k.", ".attention.k_proj."),
    (".attn.v.", ".attention.v_proj."),
    (".attn.proj.", ".attention.o_proj."),
    (".ls1.gamma", ".layer_scale1.lambda1"),
    (".ls2.gamma", ".layer_scale2.lambda1"),
)
_MLP = ((".mlp.fc1.", ".mlp.up_proj."), (".mlp.fc2.", ".mlp.down_proj."))
_SWIGLU = ((".mlp.w1.", ".mlp.gate_proj."), (".mlp.w2.", ".mlp.up_proj."), (".mlp.w3.", ".mlp.down_proj."))


def matches(names: set[str]) -> bool:
    return "embeddings.patch_embeddings.weight" in names


def from_(state: StateView) -> State:
    """transformers' DINOv3ViT -> canonical. The periods of its rotary positions are in no file: see `config_json`."""
    gated = any(".gate_proj." in name for name in state)
    replacements = [(theirs, ours) for ours, theirs in (*_NAMES, *(_SWIGLU if gated else _MLP))]
    parts: State = {}
    for name, tensor in state.items():
        name = f"model.{name}" if name.startswith("layer.") else name  # as transformers 4 wrote it
        parts[renamed(name, replacements)] = tensor
    if "mask_token" in parts:
        parts["mask_token"] = parts["mask_token"].flatten(0, 1)
    if "storage_tokens" in parts and not parts["storage_tokens"].shape[1]:
        del parts["storage_tokens"]
    for name in [name for name in parts if name.endswith(".attn.q.weight")]:
        attention = name.removesuffix("q.weight")
        parts |= biases(attention, *(parts.pop(f"{attention}{letter}.bias", None) for letter in "qkv"))
    join_rows(parts, "qkv", "qkv")
    return parts


def biases(attention: str, q: Tensor | None, k: Tensor | None, v: Tensor | None) -> State:
    """Those of one block in one, under our names; where the keys alone have none, zeros and the mask of it.

    Raises:
        WeightsError: no model of the reference has some of them without the others.
    """
    if q is k is v is None:
        return {}
    if q is None or v is None:
        raise WeightsError(f"biases of '{attention}' that no model of the reference has")
    joined = torch.cat([q, torch.zeros_like(q) if k is None else k, v])
    mask = {f"{attention}qkv.bias_mask": key_bias_mask(len(joined))} if k is None else {}
    return {f"{attention}qkv.bias": joined, **mask}


def to_(state: StateView) -> State:
    """canonical -> the names in transformers' files. What evaluation does not read is left out, and said."""
    gated = any(".mlp.w1." in name for name in state)
    parts: State = {}
    for name, tensor in state.items():
        if name.startswith(("rope_embed.", "local_cls_norm.")) or name.endswith(".bias_mask"):
            continue
        if ".attn.qkv." in name:
            rows = dict(zip("qkv", tensor.chunk(3), strict=True))
            if f"{name}_mask" in state:
                del rows["k"]
            parts |= {name.replace(".qkv.", f".{letter}."): part.clone() for letter, part in rows.items()}
        else:
            parts[name] = tensor[None] if name == "mask_token" else tensor
    if "local_cls_norm.weight" in state:
        logger.warning(
            "left out: local_cls_norm, which is for training on local crops; transformers has no place for it"
        )
    if "storage_tokens" not in parts:
        parts["storage_tokens"] = parts["cls_token"][:, :0].clone()
    replacements = (*_NAMES, *(_SWIGLU if gated else _MLP))
    return {renamed(name, replacements): tensor for name, tensor in parts.items()}


def why_not(config: ViTConfig) -> str | None:
    """What of a model transformers' class cannot hold, in words; None if nothing."""
    if config.norm_layer not in _EPSILONS:
        return f"transformers' DINOv3 has LayerNorm, this model {config.norm_layer}"
    if config.layerscale is None:
        return "transformers' blocks always have LayerScale"
    if config.pos_embed_rope_min_period is not None:
        return "transformers makes RoPE's periods from a base, this model's are between two ends"
    known = ("ffn_layer", "qkv_bias", "mask_k_bias", "layerscale", "norm_layer", "pos_embed_type",
             "untie_global_and_local_cls_norm", "interpolate_antialias", "interpolate_offset")  # fmt: skip
    return first_unknown(config, (*_SIZES, *_OPTIONS, *known))


def config_json(config: ViTConfig, images: Images) -> dict[str, Any]:
    """The config.json of such a model."""
    gated = config.ffn_layer != "mlp"
    written: dict[str, Any] = {
        "architectures": ["DINOv3ViTModel"],
        "model_type": MODEL_TYPE,
        **{theirs: getattr(config, ours) for ours, theirs in (_SIZES | _OPTIONS).items()},
        "query_bias": config.qkv_bias,
        "key_bias": config.qkv_bias and not config.mask_k_bias,
        "value_bias": config.qkv_bias,
        "use_gated_mlp": gated,
        "hidden_act": "silu" if gated else "gelu",
        "layer_norm_eps": _EPSILONS[config.norm_layer],
        "layerscale_value": 1.0,
        "pos_embed_shift": None,
        "pos_embed_jitter": None,
        "pos_embed_rescale": None,
        "dtype": "float32",
    }
    if special := images.beside_weights():
        written["dino2"] = {"images": special}
    return written


def hints(config: Mapping[str, Any], path: str) -> dict[str, Any]:
    """What a config.json at `path` says of the backbone that its weights do not show.

    Raises:
        WeightsError: it is of a model that the reference does not have.
    """
    act = "silu" if config.get("use_gated_mlp") else "gelu"
    if config.get("hidden_act", act) != act:
        raise WeightsError(f"{path}: hidden_act={config['hidden_act']}, but DINOv3 has {act} here")
    eps = config.get("layer_norm_eps", 1e-5)
    if eps not in _EPSILONS.values():
        raise WeightsError(f"{path}: layer_norm_eps={eps}, but DINOv3 has 1e-5 or 1e-6")
    said = {
        "from": path,
        "pos_embed_type": "rope",
        "num_heads": config.get("num_attention_heads", 6),
        "norm_layer": next(name for name, known in _EPSILONS.items() if known == eps),
        "pos_embed_rope_base": float(config.get("rope_theta", 100.0)),
    }
    side, patch = config.get("image_size", 224), config.get("patch_size", 16)
    if isinstance(side, int) and isinstance(patch, int) and patch and side % patch == 0:
        said["img_size"] = side
    return {**said, **config.get("dino2", {})}
