"""A file that timm opens: `timm.create_model(name, checkpoint_path=file, ...)`.

timm is needed to compare, not to write. It keeps no mask token, and with registers no position of the class token;
both travel in the file's metadata, so that reading it back here is exact.
"""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from dinov2cli.errors import WeightsError
from dinov2cli.export.bundle import Bundle, Outputs, Runner, need
from dinov2cli.models.load.layouts import timm
from dinov2cli.models.load.tensor_files import write_tensors


def write(bundle: Bundle, path: Path) -> None:
    """Write the weights in timm's layout.

    Raises:
        WeightsError: timm's class cannot hold this model or head.
    """
    if path.suffix != ".safetensors":
        raise WeightsError(f"{path.name}: the timm format is written as .safetensors")
    if bundle.head is not None:
        raise WeightsError(
            "timm's classifier sees the class token alone, a DINOv2 linear head also patch tokens: it cannot go along",
            hint="Export to onnx or torch-export to have both in one file.",
        )
    if reason := timm.why_not(bundle.architecture):
        raise WeightsError(reason)
    metadata = {
        "format": "pt",
        "dino2.architecture": json.dumps(bundle.architecture.model_dump()),
        **timm.lost(bundle.state),
    }
    write_tensors(timm.to_(bundle.state), path, metadata)


def open_(bundle: Bundle, path: Path) -> Runner:
    """The file as timm opens it, for images of any size.

    Raises:
        EnvironmentProblem: timm (which needs torchvision) is not installed.
    """
    package: Any = need("timm")
    name, arguments = timm.model_of(bundle.architecture)
    model = package.create_model(name, checkpoint_path=str(path), dynamic_img_size=True, **arguments).eval()
    prefix = bundle.model.prefix_tokens

    def run(images: Tensor) -> Outputs:
        tokens = model.forward_features(images)
        return {"cls": tokens[:, 0], "patches": tokens[:, prefix:]}

    return run
