"""Names and shapes of DINOv2 weights in other ecosystems, to and from ours (the released, flat layout).

The directions of a layout stand side by side, so that a round trip is seen to be one. Only renaming, concatenation
and slicing happen here: numbers never change, with one exception (timm's registers, see `to_timm`).
Legend: D width, N patches, R registers.
"""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dinov2cli.config.vit import ViTConfig, swiglu_width
from dinov2cli.errors import WeightsError

State = dict[str, Tensor]
StateView = Mapping[str, Tensor]


class Layout(NamedTuple):
    """A way of naming the weights: `matches` looks at the keys only, `to_canonical` renames."""

    name: str
    matches: Callable[[set[str]], bool]
    to_canonical: Callable[[StateView], State]


# ---- Reference: blocks in chunks -------------------------------------------------------------------------------------


def from_chunked(state: StateView) -> State:
    """`blocks.<chunk>.<i>.*` (block_chunks > 0; i counts over the whole model) -> `blocks.<i>.*`."""
    return {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name): tensor for name, tensor in state.items()}


def to_chunked(state: StateView, chunks: int) -> State:
    """The reverse of `from_chunked`, for a model whose depth divides into `chunks`."""
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    size = depth // chunks

    def rename(name: str) -> str:
        found = re.match(r"^blocks\.(\d+)\.", name)
        return f"blocks.{int(found[1]) // size}.{name.removeprefix('blocks.')}" if found else name

    return {rename(name): tensor for name, tensor in state.items()}


# ---- Hugging Face transformers: Dinov2Model, Dinov2WithRegistersModel ------------------------------------------------

# The names in files, which every version of transformers reads and writes.
_HF_NAMES = (
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
_HF_MODULE_NAMES = (
    (r"\.attention\.q_proj\.", r".attention.attention.query."),
    (r"\.attention\.k_proj\.", r".attention.attention.key."),
    (r"\.attention\.v_proj\.", r".attention.attention.value."),
    (r"\.attention\.o_proj\.", r".attention.output.dense."),
    (r"\.mlp\.down_proj\.", r".mlp.weights_out."),
)
_HF_PREFIXES = ("dinov2.", "dinov2_with_registers.")
_QKV = ("query", "key", "value")


def is_hf(names: set[str]) -> bool:
    return any(re.search(r"^embeddings\.patch_embeddings\.projection\.weight$", name) for name in names)


def from_hf(state: StateView) -> State:
    """transformers' Dinov2 and Dinov2WithRegisters, as saved or as in memory -> canonical."""
    parts: State = {}
    for name, tensor in state.items():
        for pattern, replacement in _HF_MODULE_NAMES + _HF_NAMES:
            name = re.sub(pattern, replacement, name)
        parts[name] = tensor
    _join(parts, r"^(blocks\.\d+\.attn)\.query\.(weight|bias)$", "{0}.{part}.{1}", _QKV, "{0}.qkv.{1}")
    _join(parts, r"^(blocks\.\d+\.mlp)\.gate_proj\.(weight|bias)$", "{0}.{part}.{1}", ("gate_proj", "up_proj"),
          "{0}.w12.{1}")  # fmt: skip
    return parts


def to_hf(state: StateView) -> State:
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


def why_not_hf(architecture: ViTConfig) -> str | None:
    """What of a model transformers' classes cannot hold, in words; None if nothing."""
    hidden, dim = architecture.hidden_dim, architecture.embed_dim
    if architecture.ffn_layer == "mlp" and hidden % dim:
        return f"an MLP of {hidden} is not a whole multiple of the width {dim}, and transformers' mlp_ratio is whole"
    if architecture.ffn_layer != "mlp" and hidden != swiglu_width(4 * dim):
        return f"a SwiGLU layer of {hidden} instead of {swiglu_width(4 * dim)} cannot be described"
    if not (architecture.proj_bias and architecture.ffn_bias):
        return "transformers' attention projection and feed-forward layers always have a bias"
    if not architecture.layerscale:
        return "transformers' blocks always have LayerScale"
    return None


def _join(state: State, pattern: str, part_name: str, parts: tuple[str, ...], joined: str) -> None:
    for name in [name for name in state if re.match(pattern, name)]:
        found = re.match(pattern, name)
        assert found is not None
        names = [part_name.format(*found.groups(), part=part) for part in parts]
        missing = [part for part in names if part not in state]
        if missing:
            raise WeightsError(f"incomplete weights, '{missing[0]}' is missing beside '{names[0]}'")
        state[joined.format(*found.groups())] = torch.cat([state.pop(part) for part in names])


# ---- timm: vit_*_patch14_dinov2, vit_*_patch14_reg4_dinov2 -----------------------------------------------------------


def is_timm(names: set[str]) -> bool:
    # timm's models have no mask token; LayerScale tells DINOv2's from its supervised vision transformers.
    return "mask_token" not in names and "patch_embed.proj.weight" in names and "blocks.0.ls1.gamma" in names


def from_timm(state: StateView) -> State:
    """timm -> canonical. The mask token, which timm does not keep, becomes zeros (its value before training)."""
    renamed: State = {}
    for name, tensor in state.items():
        if name.startswith("head."):
            continue
        swiglu = ".mlp." in name and _is_packed_swiglu(state)
        if swiglu:
            name = name.replace(".mlp.fc1.", ".mlp.w12.").replace(".mlp.fc2.", ".mlp.w3.")
        renamed[name] = tensor
    dim = state["patch_embed.proj.weight"].shape[0]
    if "reg_token" in renamed:
        renamed["register_tokens"] = renamed.pop("reg_token")
        # With registers, timm has no position for the class token: it is part of the token itself.
        position = renamed["pos_embed"]
        renamed["pos_embed"] = torch.cat([position.new_zeros(1, 1, dim), position], dim=1)
    renamed["mask_token"] = state["patch_embed.proj.weight"].new_zeros(1, dim)
    return renamed


def to_timm(state: StateView) -> State:
    """canonical -> timm. The mask token is left out, and with registers the class token takes in its position.

    That sum is the one lossy step of all conversions; an export writes what is lost into the file's metadata
    (`lost_in_timm`), so that reading it back here is exact.
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


def lost_in_timm(state: StateView) -> State:
    """The tensors that timm's layout cannot give back, for the file's metadata."""
    lost = {"mask_token": state["mask_token"]}
    if "register_tokens" in state:
        lost |= {"cls_token": state["cls_token"], "cls_position": state["pos_embed"][:, :1]}
    return lost


def restore_from_timm(state: State, lost: StateView) -> State:
    """Put back what `lost_in_timm` saved, unless the weights were changed since (then the state as it is)."""
    restored = dict(state, mask_token=lost["mask_token"])
    if "cls_token" in lost:
        restored["cls_token"] = lost["cls_token"]
        restored["pos_embed"] = torch.cat([lost["cls_position"], state["pos_embed"][:, 1:]], dim=1)
        if not torch.equal(_cls_with_position(restored), state["cls_token"]):
            return state
    return restored


def _cls_with_position(state: StateView) -> Tensor:
    return state["cls_token"] + state["pos_embed"][:, :1]


def _is_packed_swiglu(state: StateView) -> bool:
    fc1, fc2 = state.get("blocks.0.mlp.fc1.weight"), state.get("blocks.0.mlp.fc2.weight")
    return fc1 is not None and fc2 is not None and fc1.shape[0] == 2 * fc2.shape[1]


# ---- Which layout is it? ---------------------------------------------------------------------------------------------


def _is_flat(names: set[str]) -> bool:
    return "patch_embed.proj.weight" in names and "mask_token" in names and not _is_chunked(names)


def _is_chunked(names: set[str]) -> bool:
    return "mask_token" in names and any(re.match(r"blocks\.\d+\.\d+\.", name) for name in names)


LAYOUTS = (
    Layout("transformers", is_hf, from_hf),
    Layout("DINOv2 in block chunks", _is_chunked, from_chunked),
    Layout("DINOv2", _is_flat, dict),
    Layout("timm", is_timm, from_timm),
)
