"""The layouts in which weights are found: a module each, with both directions side by side.

A module of a layout that is also written has `matches`, `from_`, `to_`, `why_not` (what of a model it cannot hold) and
`resizes_otherwise`.
"""

from dinov2cli.models.load.layouts import huggingface, official, timm
from dinov2cli.models.load.layouts.layout import Layout

LAYOUTS = (
    Layout("transformers", huggingface.matches, huggingface.from_),
    Layout("DINOv2 in block chunks", official.is_chunked, official.from_chunked),
    Layout("DINOv2", official.matches, dict),
    Layout("timm", timm.matches, timm.from_),
)
"""In the order in which they are tried."""
