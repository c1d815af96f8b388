"""A backbone with a linear classifier on its features, as released for ImageNet-1k.

Shape legend: B images, D width, K classes, n blocks, F features of the head.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov2cli.errors import WeightsError
from dinov2cli.models.library_backbone import Backbone
from dinov2cli.models.load import load_model
from dinov2cli.models.load.fetch import fetch, is_url
from dinov2cli.models.load.released import IMAGENET_CLASSES, RELEASED
from dinov2cli.models.load.tensor_files import read_tensors, refuse_odd_tensors

# Blocks and mean of the patch tokens that a head's input is made of, in the order tried: F = (n + avgpool) * D.
_HEAD_INPUTS = ((1, True), (4, True), (1, False), (4, False))


class LinearClassifier(nn.Module):
    """Logits from the class tokens of the last n blocks (earliest first) and the mean patch token of the last.

    Args:
        backbone: the feature extractor.
        linear_head: F -> K, with F = n*D, or (n+1)*D with the mean patch token.

    Raises:
        WeightsError: F fits no such features.
    """

    def __init__(self, backbone: Backbone, linear_head: nn.Linear) -> None:
        super().__init__()
        self.backbone = backbone
        self.linear_head = linear_head
        self.layers, self.avgpool = head_input(linear_head.in_features, backbone.embed_dim, backbone.depth)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, K]."""
        outputs = self.backbone.get_intermediate_layers(x, n=self.layers, return_class_token=True)
        logits: Tensor = self.linear_head(pool_features(outputs, self.avgpool))
        return logits


def pool_features(outputs: Any, avgpool: bool) -> Tensor:
    """Pairs (patch tokens [B, N, D], class token [B, D]) of successive blocks -> [B, F]."""
    parts = [cls for _, cls in outputs]
    return torch.cat([*parts, outputs[-1][0].mean(dim=1)] if avgpool else parts, dim=-1)


def head_input(features: int, embed_dim: int, depth: int) -> tuple[int, bool]:
    """The number of blocks and whether the mean patch token is in the input of a head with `features` inputs.

    Raises:
        WeightsError: no such input, from a backbone of this width and depth.
    """
    possible = [(blocks, avgpool) for blocks, avgpool in _HEAD_INPUTS if blocks <= depth]
    for blocks, avgpool in possible:
        if features == (blocks + avgpool) * embed_dim:
            return blocks, avgpool
    sizes = ", ".join(str((blocks + avgpool) * embed_dim) for blocks, avgpool in possible)
    raise WeightsError(
        f"a linear head with {features} inputs does not fit a backbone {embed_dim} wide with {depth} blocks (it would "
        f"take {sizes})"
    )


def read_linear_head(source: str | Path, layers: int = 4) -> nn.Linear:
    """A linear head from a file of `weight` [K, F] and `bias` [K], a URL of one, or the name of a released model.

    Args:
        layers: 1 or 4, which of the heads of a released model.

    Raises:
        WeightsError: the file holds something else.
    """
    if (released := RELEASED.get(str(source))) is not None:
        file = fetch(released.head_url(layers), expect_bytes=released.head_bytes(layers))
    else:
        file = fetch(str(source)) if is_url(str(source)) else Path(source)
    content, _ = read_tensors(file)
    tensors = {str(name): value for name, value in content.items()} if isinstance(content, dict) else {}
    tensors = {name.removeprefix("linear."): value for name, value in tensors.items()}
    weight, bias = tensors.get("weight"), tensors.get("bias")
    if not isinstance(weight, Tensor) or not isinstance(bias, Tensor) or set(tensors) != {"weight", "bias"}:
        raise WeightsError(f"{file}: no linear head; it would hold 'weight' and 'bias', it holds {sorted(tensors)[:4]}")
    refuse_odd_tensors(tensors, str(file))
    if weight.ndim != 2 or tuple(bias.shape) != (weight.shape[0],):
        raise WeightsError(f"{file}: weight {tuple(weight.shape)} and bias {tuple(bias.shape)} are no linear layer")
    with torch.device("meta"):
        head = nn.Linear(weight.shape[1], weight.shape[0])
    head.to_empty(device="cpu").load_state_dict({"weight": weight.float(), "bias": bias.float()})
    return head.requires_grad_(False)


def check_head(source: str | Path, option: str) -> None:
    """Raise WeightsError where there is no file that `read_linear_head` could read; nothing is downloaded."""
    if str(source) not in RELEASED and not is_url(str(source)) and not Path(source).is_file():
        raise WeightsError(f"{option} {source}: no such file")


def load_classifier(
    name_or_path: str | Path,
    head: str | Path | None = None,
    *,
    layers: int = 4,
    pretrained: bool = True,
    **arguments: Any,
) -> LinearClassifier:
    """A backbone and its linear head, in eval mode.

    Args:
        name_or_path: a released name with or without `_lc`, or anything that `load_model` takes.
        head: a file of `weight` and `bias`; by default the released head of a released name.
        layers: 1 or 4, the released head to use.
        pretrained: False gives random weights.
        arguments: to `load_model`.

    Raises:
        WeightsError: there is no such head, or it does not fit.
    """
    if layers not in (1, 4):
        raise WeightsError(f"layers={layers}: heads are released for 1 and for 4 layers")
    released = RELEASED.get(str(name_or_path))
    if released is None and head is None:
        raise WeightsError(f"{name_or_path}: only released names have a released head; give the head's file")
    backbone = load_model(str(name_or_path).removesuffix("_lc") if released else name_or_path, pretrained, **arguments)
    if head is not None:
        linear = read_linear_head(head)
    elif released is not None and pretrained:
        linear = read_linear_head(released.name, layers)
    else:
        linear = nn.Linear((layers + 1) * backbone.embed_dim, IMAGENET_CLASSES)
    return LinearClassifier(backbone, linear).eval()
