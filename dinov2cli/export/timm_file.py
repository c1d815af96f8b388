"""A file that timm opens: `timm.create_model(name, checkpoint_path=file, ...)`.

timm is needed to compare, not to write. It keeps no mask token, and with registers no position of the class token;
both travel in the file's metadata, so that reading it back here is exact.
"""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from dinov2cli.config import ViTConfig
from dinov2cli.errors import WeightsError
from dinov2cli.export.bundle import Bundle, Outputs, Runner, need
from dinov2cli.models.conversion import lost_in_timm, to_timm
from dinov2cli.models.tensor_files import write_tensors
from dinov2cli.models.weights import write_lost_tensors
from dinov2cli.models.zoo import RELEASED

_SIZES = {"vit_small": "small", "vit_base": "base", "vit_large": "large", "vit_giant2": "giant"}


def write_timm(bundle: Bundle, path: Path) -> None:
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
    if bundle.architecture.ffn_bias != bundle.architecture.proj_bias:
        raise WeightsError(
            "timm has one switch for the biases of attention projection and feed-forward layers; this model has only "
            "one of the two"
        )
    metadata = {
        "format": "pt",
        "dino2.architecture": json.dumps(bundle.architecture.model_dump()),
        **write_lost_tensors(lost_in_timm(bundle.state)),
    }
    tensors = to_timm(bundle.state)
    write_tensors(tensors, path, metadata)


def timm_model(architecture: ViTConfig) -> tuple[str, dict[str, Any]]:
    """The name and arguments for `timm.create_model` that make this architecture."""
    registers = architecture.num_register_tokens
    size = _SIZES.get(architecture.name, "small") if architecture.ffn_layer == "mlp" else "giant"
    name = f"vit_{size}_patch14{'_reg4' if registers else ''}_dinov2"
    arguments: dict[str, Any] = {"num_classes": 0, "img_size": architecture.img_size}
    released = next(
        model.architecture
        for model in RELEASED.values()
        if model.name == f"dinov2_vit{size[0]}14{'_reg' if registers else ''}"
    )
    for key in ("patch_size", "embed_dim", "depth", "num_heads", "in_chans", "qkv_bias", "proj_bias"):
        if getattr(architecture, key) != getattr(released, key):
            arguments[key] = getattr(architecture, key)
    if registers != released.num_register_tokens:
        arguments["reg_tokens"] = registers
    if not architecture.layerscale:
        arguments["init_values"] = None
    packed = 1 if architecture.ffn_layer == "mlp" else 2  # timm counts both halves of a SwiGLU layer
    if architecture.hidden_dim * released.embed_dim != released.hidden_dim * architecture.embed_dim:
        arguments["mlp_ratio"] = (packed * architecture.hidden_dim + 0.5) / architecture.embed_dim
    return name, arguments


def open_timm(bundle: Bundle, path: Path) -> Runner:
    """The file as timm opens it, for images of any size.

    Raises:
        EnvironmentProblem: timm (which needs torchvision) is not installed.
    """
    timm: Any = need("timm")
    name, arguments = timm_model(bundle.architecture)
    model = timm.create_model(name, checkpoint_path=str(path), dynamic_img_size=True, **arguments).eval()
    prefix = bundle.model.prefix_tokens

    def run(images: Tensor) -> Outputs:
        tokens = model.forward_features(images)
        return {"cls": tokens[:, 0], "patches": tokens[:, prefix:]}

    return run


def timm_differs_away_from_native(bundle: Bundle) -> str | None:
    """Why timm gives other features than ours at other image sizes; None if it does not."""
    architecture = bundle.architecture
    if architecture.interpolate_offset == 0 and architecture.interpolate_antialias:
        return None
    return (
        "timm resizes position embeddings with offset 0 and antialiasing, this model with offset "
        f"{architecture.interpolate_offset} and antialias={architecture.interpolate_antialias}"
    )
