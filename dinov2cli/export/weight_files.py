"""Files of weights: our own layout as safetensors, and the released one (`official`, a flat `.pth`)."""

import json
from pathlib import Path

import torch
import yaml

from dinov2cli import __version__
from dinov2cli.config.vit import Architecture, ViTOptions
from dinov2cli.errors import WeightsError
from dinov2cli.export.bundle import Bundle, Runner
from dinov2cli.export.graph import ExportGraph
from dinov2cli.models.classifier import head_input, read_linear_head
from dinov2cli.models.load import build_from, read_weights
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
