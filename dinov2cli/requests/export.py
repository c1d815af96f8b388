"""The request to write a model in another format."""

from pathlib import Path
from typing import Literal

from pydantic import field_validator

from dinov2cli.requests.base import CheckpointRequest, argument, option


class ExportRequest(CheckpointRequest, command="export", run_by="dinov2cli.export.exporter:run"):
    """Write a model in another format, and check that it gives the same features there.

    The export is opened by its own ecosystem (transformers, timm, onnxruntime, torch.export), run on random images at
    two sizes, and compared. If the features differ, nothing is left behind.

    Example:

        dino2 export runs/demo --format hf --output demo-hf

        dino2 export dinov2_vits14_reg --format onnx --output vits14_reg.onnx
    """

    checkpoint: str = argument(
        "A run folder, teacher checkpoint, weights file, Hugging Face folder, URL or released name; a name ending "
        "in _lc brings its linear head.",
        metavar="CKPT",
        default="",
        default_text=False,
    )
    format: Literal["safetensors", "official", "hf", "timm", "onnx", "torch-export"] = option(
        ...,
        "safetensors: our weights; official: a flat .pth as released; hf: a folder for transformers; timm: a "
        ".safetensors or a folder for timm; onnx; torch-export: a .pt2.",
    )
    output: Path = option(..., "The file to write (hf: the folder; timm: either).", metavar="PATH")
    linear_head: Path | None = option(None, "A linear classifier (weight and bias) to go along.", metavar="FILE")
    layers: int = option(4, "Released head of a _lc name: on 1 or 4 layers.")
    image_size: str | None = option(
        None,
        "onnx, torch-export: one image size only; by default any size that is a multiple of the patch size, two "
        "patches or more. The others: position embeddings for this side; by default the model's own.",
        metavar="H[xW]",
    )
    opset: int = option(18, "onnx: operator set.", ge=18, le=23)
    config_file: Path | None = option(None, "The run's config.yaml, if it does not lie beside CKPT.", metavar="YAML")
    overwrite: bool = option(False, "Replace an existing output.")
    as_json: bool = option(False, "Print one JSON object.", flags="--json")

    def size(self) -> tuple[int, int] | None:
        """(height, width) in pixels that `image_size` says."""
        sides = self.image_size.lower().split("x") if self.image_size else []
        return (int(sides[0]), int(sides[-1])) if sides else None

    @field_validator("image_size")
    @classmethod
    def _is_a_size(cls, text: str | None) -> str | None:
        sides = text.lower().split("x") if text is not None else ["1"]
        if not all(side.isdecimal() for side in sides) or len(sides) > 2:
            raise ValueError(f"--image-size {text}: give a side in pixels such as 224, or HxW such as 224x448")
        return text
