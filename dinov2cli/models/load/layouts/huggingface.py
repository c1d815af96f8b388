"""Hugging Face transformers: Dinov2Model and Dinov2WithRegistersModel, their weights and their config.json."""

import re
from collections.abc import Mapping
from typing import Any

import torch

from dinov2cli.config.vit import ViTConfig, swiglu_width
from dinov2cli.errors import WeightsError
from dinov2cli.models.load.layouts.layout import State, StateView, first_unknown

# Options by transformers' names.
_SIZES = {"embed_dim": "hidden_size", "depth": "num_hidden_layers", "num_heads": "num_attention_heads"}
_OPTIONS = {"img_size": "image_size", "patch_size": "patch_size", "in_chans": "num_channels", "qkv_bias": "qkv_bias"}
# Options for which transformers has no words: they bring the model back here as it was.
_OURS = ("interpolate_antialias", "interpolate_offset")
# The names in files, which every version of transformers reads and writes.
_NAMES = (
    (r"^embeddings\.(cls_token|mask_token|register_tokens)$", r"\1"),
    (r"^embeddings\.position_embeddings$", r"pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", r"patch_embed.proj."),
    (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.output\.dense\.", r".attn.proj."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", r".mlp.w12."),
    (r"\.mlp\.weights_out\.", r".mlp.w3."),
    (r"^layernorm\.", r"norm."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
)
# The names of the modules in memory since transformers 5; a `state_dict()` saved by hand has them.
_MODULE_NAMES = (
    (r"\.attention\.q_proj\.", r".attention.attention.query."),
    (r"\.attention\.k_proj\.", r".attention.attention.key."),
    (r"\.attention\.v_proj\.", r".attention.attention.value."),
    (r"\.attention\.o_proj\.", r".attention.output.dense."),
    (r"\.mlp\.down_proj\.", r".mlp.weights_out."),
)
_QKV = ("query", "key", "value")


def matches(names: set[str]) -> bool:
    return any(re.search(r"^embeddings\.patch_embeddings\.projection\.weight$", name) for name in names)


def from_(state: StateView) -> State:
    """transformers' Dinov2 and Dinov2WithRegisters, as saved or as in memory -> canonical."""
    parts: State = {}
    for name, tensor in state.items():
        for pattern, replacement in _MODULE_NAMES + _NAMES:
            name = re.sub(pattern, replacement, name)
        parts[name] = tensor
    _join(parts, r"^(blocks\.\d+\.attn)\.query\.(weight|bias)$", "{0}.{part}.{1}", _QKV, "{0}.qkv.{1}")
    _join(parts, r"^(blocks\.\d+\.mlp)\.gate_proj\.(weight|bias)$", "{0}.{part}.{1}", ("gate_proj", "up_proj"),
          "{0}.w12.{1}")  # fmt: skip
    return parts


def to_(state: StateView) -> State:
    """canonical -> the names in transformers' files."""
    renamed: State = {}
    for name, tensor in state.items():
        if found := re.match(r"^blocks\.(\d+)\.attn\.qkv\.(weight|bias)$", name):
            for part, rows in zip(_QKV, tensor.chunk(3), strict=True):
                renamed[f"encoder.layer.{found[1]}.attention.attention.{part}.{found[2]}"] = rows.clone()
            continue
        for pattern, replacement in (
            (r"^(cls_token|mask_token|register_tokens)$", r"embeddings.\1"),
            (r"^pos_embed$", r"embeddings.position_embeddings"),
            (r"^patch_embed\.proj\.", r"embeddings.patch_embeddings.projection."),
            (r"^norm\.", r"layernorm."),
            (r"^blocks\.(\d+)\.", r"encoder.layer.\1."),
            (r"\.attn\.proj\.", r".attention.output.dense."),
            (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1"),
            (r"\.mlp\.w12\.", r".mlp.weights_in."),
            (r"\.mlp\.w3\.", r".mlp.weights_out."),
        ):
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def why_not(config: ViTConfig) -> str | None:
    """What of a model transformers' classes cannot hold, in words; None if nothing."""
    hidden, dim = config.hidden_dim, config.embed_dim
    if config.ffn_layer == "mlp" and hidden % dim:
        return f"an MLP of {hidden} is not a whole multiple of the width {dim}, and transformers' mlp_ratio is whole"
    if config.ffn_layer != "mlp" and hidden != swiglu_width(4 * dim):
        return f"a SwiGLU layer of {hidden} instead of {swiglu_width(4 * dim)} cannot be described"
    if not (config.proj_bias and config.ffn_bias):
        return "transformers' attention projection and feed-forward layers always have a bias"
    if config.layerscale is None:
        return "transformers' blocks always have LayerScale"
    known = ("hidden_dim", "ffn_layer", "proj_bias", "ffn_bias", "layerscale", "num_register_tokens")
    return first_unknown(config, (*_SIZES, *_OPTIONS, *_OURS, *known))


def resizes_otherwise(config: ViTConfig) -> str | None:
    """How transformers resizes position embeddings, in words; None if as this model does."""
    antialias = config.num_register_tokens > 0  # fixed in its two classes
    if config.interpolate_offset == 0 and config.interpolate_antialias == antialias:
        return None
    return (
        f"transformers resizes position embeddings with offset 0 and antialias={antialias}, this model with offset "
        f"{config.interpolate_offset} and antialias={config.interpolate_antialias}"
    )


def model_type(config: ViTConfig) -> str:
    """transformers' name of the architecture."""
    return "dinov2_with_registers" if config.num_register_tokens else "dinov2"


def config_json(config: ViTConfig, classes: int | None = None) -> dict[str, Any]:
    """The config.json of such a model; with `classes`, of one that classifies."""
    class_name = "Dinov2WithRegisters" if config.num_register_tokens else "Dinov2"
    written: dict[str, Any] = {
        "architectures": [class_name + ("Model" if classes is None else "ForImageClassification")],
        "model_type": model_type(config),
        **{theirs: getattr(config, ours) for ours, theirs in _SIZES.items()},
        "mlp_ratio": config.hidden_dim // config.embed_dim if config.ffn_layer == "mlp" else 4,
        "use_swiglu_ffn": config.ffn_layer != "mlp",
        **{theirs: getattr(config, ours) for ours, theirs in _OPTIONS.items()},
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "layerscale_value": 1.0,
        "drop_path_rate": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "hidden_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "dtype": "float32",
        "dino2": {name: getattr(config, name) for name in _OURS},
    }
    if config.num_register_tokens:
        written["num_register_tokens"] = config.num_register_tokens
    if classes is not None:
        written["id2label"] = {str(i): f"LABEL_{i}" for i in range(classes)}
        written["label2id"] = {f"LABEL_{i}": i for i in range(classes)}
    return written


def hints(config: Mapping[str, Any], path: str) -> dict[str, Any]:
    """What a config.json at `path` says of the backbone that its weights do not show.

    Raises:
        WeightsError: it is of a model that is no DINOv2.
    """
    kind = config.get("model_type")
    if kind is None:  # timm's: the architecture's name only, and the weights show all of it
        return {}
    if kind not in ("dinov2", "dinov2_with_registers"):
        folder = path.rpartition("/")[0]
        raise WeightsError(f"{folder}: a model of type '{kind}'; dino2 loads dinov2 and dinov2_with_registers")
    for key, needed in (("hidden_act", "gelu"), ("layer_norm_eps", 1e-6)):
        if config.get(key, needed) != needed:
            raise WeightsError(f"{path}: {key}={config[key]}, but DINOv2 has {needed}")
    return {"from": path, "num_heads": config.get("num_attention_heads", 12), **config.get("dino2", {})}


def _join(state: State, pattern: str, part_name: str, parts: tuple[str, ...], joined: str) -> None:
    for name in [name for name in state if re.match(pattern, name)]:
        found = re.match(pattern, name)
        assert found is not None
        names = [part_name.format(*found.groups(), part=part) for part in parts]
        missing = [part for part in names if part not in state]
        if missing:
            raise WeightsError(f"incomplete weights, '{missing[0]}' is missing beside '{names[0]}'")
        state[joined.format(*found.groups())] = torch.cat([state.pop(part) for part in names])
