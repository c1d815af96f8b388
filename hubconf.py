"""torch.hub entry points, with the names and arguments of the reference implementation.

model = torch.hub.load("path/to/this/repository", "dinov2_vits14", source="local")
"""

from collections.abc import Callable as _Callable
from typing import Any as _Any

from torch import nn as _nn

dependencies = ["torch", "numpy", "yaml", "pydantic", "rich", "filelock", "safetensors"]


def _backbone(name: str) -> _Callable[..., _nn.Module]:
    def entry(*, pretrained: bool = True, weights: str = "LVD142M", **kwargs: _Any) -> _nn.Module:
        from dinov2cli.models.load import load_model

        return load_model(name if weights == "LVD142M" else weights, pretrained, **kwargs)

    entry.__name__ = name
    entry.__doc__ = f"""{name.replace("_reg", " with 4 registers")}: a DINOv2 backbone, in eval mode.

    Args:
        pretrained: load weights; else the architecture with random ones.
        weights: `LVD142M`, the released weights, or a file, folder or address of others.
        kwargs: to `dinov2cli.load_model`.
    """
    return entry


def _classifier(name: str) -> _Callable[..., _nn.Module]:
    def entry(*, layers: int = 4, pretrained: bool = True, weights: str = "IMAGENET1K", **kwargs: _Any) -> _nn.Module:
        from dinov2cli.models.classifier import load_classifier

        head = None if weights == "IMAGENET1K" else weights
        return load_classifier(name, head, layers=layers, pretrained=pretrained, **kwargs)

    entry.__name__ = name
    entry.__doc__ = f"""{name.removesuffix("_lc")} with a linear classifier for ImageNet-1k, in eval mode.

    Args:
        layers: 1 or 4, the blocks whose class tokens the classifier sees.
        pretrained: load weights; else random ones.
        weights: `IMAGENET1K`, the released head, or a file or address of another.
        kwargs: to `dinov2cli.load_model`, for the backbone.
    """
    return entry


def _depther(name: str) -> _Callable[..., _nn.Module]:
    backbone, _, which = name.rpartition("_")

    def entry(*, layers: int = 4, pretrained: bool = True, weights: str = "NYU", **kwargs: _Any) -> _nn.Module:
        from dinov2cli.models.load.dense import load_dense

        head = weights
        if weights in ("NYU", "KITTI"):
            kind = "dpt" if which == "dd" else {1: "linear", 4: "linear4"}.get(layers, f"linear with layers={layers}")
            head = f"{backbone}_{weights.lower()}_{kind}"
        return load_dense(head, backbone, pretrained=pretrained, **kwargs)

    entry.__name__ = name
    entry.__doc__ = f"""{backbone} with a {"DPT" if which == "dd" else "linear"} head for depth, in eval mode.

    Args:
        layers: 1 or 4, the blocks that a linear head sees; a DPT head sees four.
        pretrained: load weights; else random ones.
        weights: `NYU` (to 10 m) or `KITTI` (to 80 m), the released heads, or a file or address of another.
        kwargs: to `dinov2cli.load_model`, for the backbone.
    """
    return entry


dinov2_vits14 = _backbone("dinov2_vits14")
dinov2_vitb14 = _backbone("dinov2_vitb14")
dinov2_vitl14 = _backbone("dinov2_vitl14")
dinov2_vitg14 = _backbone("dinov2_vitg14")
dinov2_vits14_reg = _backbone("dinov2_vits14_reg")
dinov2_vitb14_reg = _backbone("dinov2_vitb14_reg")
dinov2_vitl14_reg = _backbone("dinov2_vitl14_reg")
dinov2_vitg14_reg = _backbone("dinov2_vitg14_reg")
dinov2_vits14_lc = _classifier("dinov2_vits14_lc")
dinov2_vitb14_lc = _classifier("dinov2_vitb14_lc")
dinov2_vitl14_lc = _classifier("dinov2_vitl14_lc")
dinov2_vitg14_lc = _classifier("dinov2_vitg14_lc")
dinov2_vits14_reg_lc = _classifier("dinov2_vits14_reg_lc")
dinov2_vitb14_reg_lc = _classifier("dinov2_vitb14_reg_lc")
dinov2_vitl14_reg_lc = _classifier("dinov2_vitl14_reg_lc")
dinov2_vitg14_reg_lc = _classifier("dinov2_vitg14_reg_lc")
dinov2_vits14_ld = _depther("dinov2_vits14_ld")
dinov2_vitb14_ld = _depther("dinov2_vitb14_ld")
dinov2_vitl14_ld = _depther("dinov2_vitl14_ld")
dinov2_vitg14_ld = _depther("dinov2_vitg14_ld")
dinov2_vits14_dd = _depther("dinov2_vits14_dd")
dinov2_vitb14_dd = _depther("dinov2_vitb14_dd")
dinov2_vitl14_dd = _depther("dinov2_vitl14_dd")
dinov2_vitg14_dd = _depther("dinov2_vitg14_dd")
