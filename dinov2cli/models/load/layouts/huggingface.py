"""Hugging Face transformers: Dinov2Model and Dinov2WithRegistersModel, their weights and their config.json."""

from collections.abc import Mapping
from typing import Any

from dinov2cli.config.images import Images
from dinov2cli.config.vit import RESIZING, ViTConfig, swiglu_width
from dinov2cli.errors import WeightsError
from dinov2cli.models.load.layouts import dinov3, timm
from dinov2cli.models.load.layouts.layout import State, StateView, first_unknown, join_rows, renamed

# Options by transformers' names.
_SIZES = {"embed_dim": "hidden_size", "depth": "num_hidden_layers", "num_heads": "num_attention_heads"}
_OPTIONS = {"img_size": "image_size", "patch_size": "patch_size", "in_chans": "num_channels", "qkv_bias": "qkv_bias"}
# Parts of names: ours, and those in files, which every version of transformers reads and writes.
_NAMES = (
    ("cls_token", "embeddings.cls_token"),
    ("mask_token", "embeddings.mask_token"),
    ("register_tokens", "embeddings.register_tokens"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
    ("norm.", "layernorm."),
    ("blocks.", "encoder.layer."),
    (".attn.query.", ".attention.attention.query."),
    (".attn.key.", ".attention.attention.key."),
    (".attn.value.", ".attention.attention.value."),
    (".attn.proj.", ".attention.output.dense."),
    (".ls1.gamma", ".layer_scale1.lambda1"),
    (".ls2.gamma", ".layer_scale2.lambda1"),
    (".mlp.w12.", ".mlp.weights_in."),
    (".mlp.w3.", ".mlp.weights_out."),
)
# Those of the modules in memory since transformers 5, which a `state_dict()` saved by hand has, and those in files.
_MODULE_NAMES = (
    (".attention.q_proj.", ".attention.attention.query."),
    (".attention.k_proj.", ".attention.attention.key."),
    (".attention.v_proj.", ".attention.attention.value."),
    (".attention.o_proj.", ".attention.output.dense."),
    (".mlp.down_proj.", ".mlp.weights_out."),
)
_QKV = ("query", "key", "value")


def matches(names: set[str]) -> bool:
    return "embeddings.patch_embeddings.projection.weight" in names


def from_(state: StateView) -> State:
    """transformers' Dinov2 and Dinov2WithRegisters, as saved or as in memory -> canonical."""
    replacements = (*_MODULE_NAMES, *((theirs, ours) for ours, theirs in _NAMES))
    parts = {renamed(name, replacements): tensor for name, tensor in state.items()}
    join_rows(parts, _QKV, "qkv")
    join_rows(parts, ("gate_proj", "up_proj"), "w12")
    return parts


def to_(state: StateView) -> State:
    """canonical -> the names in transformers' files."""
    parts: State = {}
    for name, tensor in state.items():
        if ".attn.qkv." in name:
            parts |= {name.replace("qkv", part): rows.clone() for part, rows in zip(_QKV, tensor.chunk(3), strict=True)}
        else:
            parts[name] = tensor
    return {renamed(name, _NAMES): tensor for name, tensor in parts.items()}


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
    return first_unknown(config, (*_SIZES, *_OPTIONS, *RESIZING, *known))


def resizes_otherwise(config: ViTConfig) -> str | None:
    """How transformers resizes position embeddings, in words; None if as this model does."""
    antialias = config.num_register_tokens > 0  # fixed in its two classes
    if config.is_rotary:
        return None
    if config.interpolate_offset == 0 and config.interpolate_antialias == antialias:
        return None
    return (
        f"transformers resizes position embeddings with offset 0 and antialias={antialias}, this model with offset "
        f"{config.interpolate_offset} and antialias={config.interpolate_antialias}"
    )


def model_type(config: ViTConfig) -> str:
    """transformers' name of the architecture."""
    return "dinov2_with_registers" if config.num_register_tokens else "dinov2"


def config_json(config: ViTConfig, images: Images, classes: int | None = None) -> dict[str, Any]:
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
        # What transformers has no words for: it brings the model back here as it was.
        "dino2": {name: getattr(config, name) for name in RESIZING},
    }
    if special := images.beside_weights():
        written["dino2"]["images"] = special
    if config.num_register_tokens:
        written["num_register_tokens"] = config.num_register_tokens
    if classes is not None:
        written["id2label"] = {str(i): f"LABEL_{i}" for i in range(classes)}
        written["label2id"] = {f"LABEL_{i}": i for i in range(classes)}
    return written


def hints(config: Mapping[str, Any], path: str) -> dict[str, Any]:
    """What a config.json at `path` says of the backbone that its weights do not show.

    Of a model of another type, under `refused`, why it is not loaded: a student of that type may start from it.

    Raises:
        WeightsError: it is of a model that is no DINOv2.
    """
    kind = config.get("model_type")
    if kind is None:
        return timm.hints(config, path)
    if kind == dinov3.MODEL_TYPE:
        return dinov3.hints(config, path)
    if kind not in ("dinov2", "dinov2_with_registers"):
        folder = path.rpartition("/")[0]
        known = f"dinov2, dinov2_with_registers and {dinov3.MODEL_TYPE}"
        return {"refused": f"{folder}: a model of type '{kind}'; dino2 loads {known}"}
    for key, needed in (("hidden_act", "gelu"), ("layer_norm_eps", 1e-6)):
        if config.get(key, needed) != needed:
            raise WeightsError(f"{path}: {key}={config[key]}, but DINOv2 has {needed}")
    return {"from": path, "num_heads": config.get("num_attention_heads", 12), **config.get("dino2", {})}
