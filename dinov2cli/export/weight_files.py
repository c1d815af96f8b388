"""Files of weights: our own layout as safetensors, the released one (`official`, a flat `.pth`), and timm's."""

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from dinov2cli import __version__
from dinov2cli.config.vit import Architecture, ViTOptions
from dinov2cli.errors import WeightsError, need
from dinov2cli.export.bundle import Bundle, Outputs, Runner
from dinov2cli.export.graph import ExportGraph
from dinov2cli.models.classifier import head_input, read_linear_head
from dinov2cli.models.load import build_from, read_weights
from dinov2cli.models.load.layouts import timm
from dinov2cli.models.load.locate import architecture_file
from dinov2cli.models.load.tensor_files import write_tensors


def write_safetensors(bundle: Bundle, path: Path) -> None:
    """One file that says by itself how many heads the model has and how it resizes position embeddings."""
    provenance = json.dumps({"dino2": __version__, **bundle.provenance})
    write_tensors(bundle.state, path, {"format": "pt", **bundle.metadata, "dino2.provenance": provenance})
    if bundle.head is not None:
        write_tensors(bundle.head.state_dict(), head_path(bundle, path), {"format": "pt"})


def write_official(bundle: Bundle, path: Path) -> None:
    """The released layout. It holds tensors only; what they are stands beside it, in the keys of a run's config."""
    torch.save({name: tensor.clone() for name, tensor in bundle.state.items()}, path)
    if bundle.head is not None:
        torch.save({name: tensor.clone() for name, tensor in bundle.head.state_dict().items()}, head_path(bundle, path))
    architecture = bundle.vit
    student = architecture.model_dump(include={*Architecture._fields, *ViTOptions.model_fields})
    told = {"student": {"arch": architecture.name, **student}, "crops": {"global_crops_size": architecture.img_size}}
    if images := bundle.model.images.beside_weights():
        told["data"] = images
    architecture_file(path).write_text(yaml.safe_dump(told, sort_keys=False))


def open_ours(bundle: Bundle, path: Path) -> Runner:
    """Read a weights file back as anyone would, and insist on the very same bits."""
    weights = read_weights(path)
    if weights.architecture != bundle.architecture:
        raise WeightsError(f"{path.name} reads back as {weights.architecture.describe()}")
    if weights.images != bundle.model.images:
        raise WeightsError(f"{path.name} reads back with other images: {weights.images}")
    changed = [name for name, tensor in bundle.state.items() if not torch.equal(tensor, weights.state[name])]
    if changed:
        raise WeightsError(f"{path.name} reads back with other numbers in {', '.join(changed[:4])}")
    head = read_linear_head(head_path(bundle, path)) if bundle.head is not None else None
    return ExportGraph(build_from(weights), head).eval().named


def head_path(bundle: Bundle, path: Path) -> Path:
    """Where the linear head goes: beside the backbone, named as the released heads are."""
    assert bundle.head is not None
    blocks, _ = head_input(bundle.head.in_features, bundle.model.embed_dim, bundle.model.depth)
    return path.with_name(f"{path.stem}_linear{'4' if blocks == 4 else ''}_head{path.suffix}")


def write_timm(bundle: Bundle, path: Path) -> None:
    """What timm opens: a file, `timm.create_model(name, checkpoint_path=file, ...)`, or without a suffix a folder,
    `timm.create_model("local-dir:folder", pretrained=True)`. timm is needed to compare only.

    It keeps no mask token, and with registers no position of the class token; both travel in the file's metadata, so
    that reading it back here is exact.

    Raises:
        WeightsError: timm's class cannot hold this model or head.
    """
    if bundle.head is not None:
        raise WeightsError(
            "timm's classifier sees the class token alone, a DINOv2 linear head also patch tokens: it cannot go along",
            hint="Export to onnx or torch-export to have both in one file.",
        )
    if reason := timm.why_not(bundle.vit):
        raise WeightsError(reason)
    if not path.suffix:
        path.mkdir()
        (path / "config.json").write_text(json.dumps(timm.config_json(bundle.vit, bundle.preprocessing)) + "\n")
        path = path / "model.safetensors"
    write_tensors(timm.to_(bundle.state), path, {"format": "pt", **bundle.metadata, **timm.lost(bundle.state)})


def open_timm(bundle: Bundle, path: Path) -> Runner:
    """The file or folder as timm opens it, for images of any size; raises as `opened_by_timm`."""
    model = opened_by_timm(path, *timm.model_of(bundle.vit), dynamic_img_size=True)
    prefix = bundle.model.prefix_tokens

    def run(images: Tensor) -> Outputs:
        tokens = model.forward_features(images)
        return {"cls": tokens[:, 0], "patches": tokens[:, prefix:]}

    return run


def how_to_open_timm(bundle: Bundle, path: Path) -> str:
    """The line of Python that opens what `write_timm` wrote, its preprocessing included."""
    name, arguments = timm.model_of(bundle.vit)
    overlay = timm.pretrained_cfg(bundle.vit.in_chans, bundle.preprocessing)
    return timm_words(path, name, {**arguments, "pretrained_cfg_overlay": overlay})


def opened_by_timm(path: Path, name: str, arguments: dict[str, Any], **options: bool) -> Any:
    """The model that timm makes of what was written: a folder says by itself what it is, a file does not.

    Raises:
        EnvironmentProblem: timm (which needs torchvision) is not installed.
    """
    package: Any = need("timm", "timm torchvision")
    if path.is_dir():
        return package.create_model(f"local-dir:{path}", pretrained=True, **options).eval()
    return package.create_model(name, checkpoint_path=str(path), **options, **arguments).eval()


def timm_words(path: Path, name: str, arguments: dict[str, Any]) -> str:
    """What `opened_by_timm` does, as a line of Python."""
    if path.is_dir():
        return f"timm.create_model('local-dir:{path}', pretrained=True)"
    words = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    return f"timm.create_model({name!r}, checkpoint_path={str(path)!r}, {words})"
