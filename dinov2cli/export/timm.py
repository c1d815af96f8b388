"""What timm opens: a file, `timm.create_model(name, checkpoint_path=file, ...)`, or without a suffix a folder,
`timm.create_model("local-dir:folder", pretrained=True)`. timm is needed to compare only.
"""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from dinov2cli.errors import WeightsError, need
from dinov2cli.export.bundle import Bundle, Outputs, Runner, known_of_library, runner_of_library
from dinov2cli.models.load.layouts import timm
from dinov2cli.models.load.library import MODEL
from dinov2cli.models.load.locate import OWN_KEY
from dinov2cli.models.load.tensor_files import write_tensors


def write(bundle: Bundle, path: Path) -> None:
    """The weights under timm's names; in a folder with the config.json by which timm opens it.

    Of a vision transformer it keeps no mask token, and with registers no position of the class token; both travel in
    the file's metadata, so that reading it back here is exact.

    Raises:
        WeightsError: timm's class cannot hold this model or head.
    """
    metadata, is_folder = {"format": "pt"}, not path.suffix
    if bundle.library is not None:
        tensors = {name.removeprefix(MODEL): tensor for name, tensor in bundle.state.items()}
        metadata |= {} if is_folder else bundle.metadata
        architecture = bundle.library.config
        config: dict[str, Any] = {
            "architecture": architecture.name,
            "num_classes": 0,
            "model_args": {**architecture.arguments, "in_chans": architecture.in_chans},
            "pretrained_cfg": {"num_classes": 0, **timm.pretrained_cfg(architecture.in_chans, bundle.preprocessing)},
            OWN_KEY: known_of_library(bundle.library, bundle.preprocessing),
        }
    else:
        if bundle.head is not None:
            raise WeightsError(
                "timm's classifier sees the class token alone, a DINOv2 linear head also patch tokens: it cannot go "
                "along",
                hint="Export to onnx or torch-export to have both in one file.",
            )
        if reason := timm.why_not(bundle.vit):
            raise WeightsError(reason)
        tensors, config = timm.to_(bundle.state), timm.config_json(bundle.vit, bundle.preprocessing)
        metadata |= {**bundle.metadata, **timm.lost(bundle.state)}
    if is_folder:
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        path = path / "model.safetensors"
    write_tensors(tensors, path, metadata)


def open_(bundle: Bundle, path: Path) -> Runner:
    """The file or folder as timm opens it, for images of any size: a folder says by itself what it is, a file does not.

    Raises:
        EnvironmentProblem: timm (which needs torchvision) is not installed.
    """
    package: Any = need("timm", "timm torchvision")
    name, arguments = _model_of(bundle)
    sizes = {} if bundle.library else {"dynamic_img_size": True}
    if path.is_dir():
        model = package.create_model(f"local-dir:{path}", pretrained=True, **sizes).eval()
    else:
        model = package.create_model(name, checkpoint_path=str(path), **sizes, **arguments).eval()
    if bundle.library is not None:
        return runner_of_library(bundle.library, model)
    prefix = bundle.model.prefix_tokens

    def run(images: Tensor) -> Outputs:
        tokens = model.forward_features(images)
        return {"cls": tokens[:, 0], "patches": tokens[:, prefix:]}

    return run


def how_to_open(bundle: Bundle, path: Path) -> str:
    """The line of Python that opens what was written, its preprocessing included."""
    if path.is_dir():
        return f"timm.create_model('local-dir:{path}', pretrained=True)"
    name, arguments = _model_of(bundle)
    if bundle.library is None:
        overlay = timm.pretrained_cfg(bundle.vit.in_chans, bundle.preprocessing)
        arguments = {**arguments, "pretrained_cfg_overlay": overlay}
    words = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    return f"timm.create_model({name!r}, checkpoint_path={str(path)!r}, {words})"


def _model_of(bundle: Bundle) -> tuple[str, dict[str, Any]]:
    if bundle.library is None:
        return timm.model_of(bundle.vit)
    config = bundle.library.config
    return config.name, {**config.arguments, "in_chans": config.in_chans, "num_classes": 0}
