"""The projection heads that training checkpoints hold beside a backbone: recognised, and named as ours."""

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dinov2cli.errors import WeightsError
from dinov2cli.models.load.tensor_files import refuse_odd_tensors

HEADS = ("dino_head", "ibot_head")
_OTHER_NAMES = (  # of others' last layers: a later PyTorch's weight normalisation; a head whose MLP is one layer
    (re.compile(r"last_layer\.parametrizations\.weight\.original0$"), "last_layer.weight_g"),
    (re.compile(r"last_layer\.parametrizations\.weight\.original1$"), "last_layer.weight_v"),
    (re.compile(r"^mlp\.(weight|bias)$"), r"mlp.0.\1"),
)
_LAYER = re.compile(r"mlp\.(\d+)\.weight")


class HeadSizes(NamedTuple):
    """Arguments of `DINOHead`."""

    in_dim: int
    out_dim: int
    nlayers: int
    hidden_dim: int
    bottleneck_dim: int


class Head(NamedTuple):
    """A head's sizes, and its float32 weights under `DINOHead`'s names."""

    sizes: HeadSizes
    state: dict[str, Tensor]


def heads_of(tensors: Mapping[str, Tensor], source: str) -> dict[str, Head]:
    """The heads among the tensors that lie beside a backbone, by their names in `HEADS`; empty where there are none.

    A last layer without weight normalisation (DINOv3's) becomes one with it, which computes the same.

    Raises:
        WeightsError: a head of another kind, or an incomplete one.
    """
    found = {}
    for name in HEADS:
        own = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
        if own:
            found[name] = _head(own, f"{source}: {name}")
    if found and "dino_head" not in found:
        raise WeightsError(f"{source}: it has an ibot_head and no dino_head")
    return found


def _head(own: dict[str, Tensor], source: str) -> Head:
    refuse_odd_tensors(own, source)
    state = {}
    for key, tensor in own.items():
        for pattern, name in _OTHER_NAMES:
            key = pattern.sub(name, key)
        state[key] = tensor.to(torch.float32)
    if (plain := state.pop("last_layer.weight", None)) is not None:
        state |= {"last_layer.weight_v": plain, "last_layer.weight_g": plain.norm(dim=1, keepdim=True)}
    layers = sorted(int(found[1]) for key in state if (found := _LAYER.fullmatch(key)))
    expected = {f"mlp.{2 * i}.{part}" for i in range(len(layers)) for part in ("weight", "bias")}
    expected |= {"last_layer.weight_g", "last_layer.weight_v"}
    if odd := sorted(expected ^ state.keys()):
        missing = [key for key in odd if key in expected]
        said = f"{missing[0]} is missing" if missing else f"it has {odd[0]}, which no head of DINOv2's has"
        raise WeightsError(f"{source} cannot be read: {said}")
    first, prototypes = state["mlp.0.weight"], state["last_layer.weight_v"]
    hidden = first.shape[0] if len(layers) > 1 else 1
    return Head(HeadSizes(first.shape[1], prototypes.shape[0], len(layers), hidden, prototypes.shape[1]), state)
