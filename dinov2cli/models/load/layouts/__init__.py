"""The layouts in which weights are found: a module each, with both directions side by side.

A module of a layout that is also written has `matches`, `from_`, `to_`, `why_not` (what of a model it cannot hold) and
`resizes_otherwise`.
"""

from types import ModuleType

from dinov2cli.config.vit import ViTConfig
from dinov2cli.models.load.layouts import dinov3, huggingface, official, timm
from dinov2cli.models.load.layouts.layout import Layout

LAYOUTS = (
    Layout("transformers", huggingface.matches, huggingface.from_),
    Layout("transformers DINOv3", dinov3.matches, dinov3.from_),
    Layout("DINOv3", official.is_dinov3, official.from_dinov3),
    Layout("DINOv2 in block chunks", official.is_chunked, official.from_chunked),
    Layout("DINOv2", official.matches, dict),
    Layout("timm", timm.matches, timm.from_),
    Layout("timm DINOv3", timm.is_dinov3, timm.from_dinov3),
)
"""In the order in which they are tried."""


def of_transformers(config: ViTConfig) -> ModuleType:
    """The module of transformers' layout for a model: that of its DINOv3, or of its two DINOv2."""
    return dinov3 if config.is_rotary else huggingface
