"""Small models with distinct random weights, for the tests of loading and exporting."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2cli.config import ViTConfig
from dinov2cli.export.exporter import ExportResult, run
from dinov2cli.models.vision_transformer import VisionTransformer
from dinov2cli.requests.export import ExportRequest

PLAIN = ViTConfig(embed_dim=192, depth=2, num_heads=3, patch_size=14, img_size=56, layerscale=1.0)
REGISTERS = PLAIN.changed(num_register_tokens=4, interpolate_antialias=True, interpolate_offset=0.0)
SWIGLU = PLAIN.changed(ffn_layer="swiglu", hidden_dim=512)
SAMPLES = {"plain": PLAIN, "registers": REGISTERS, "swiglu": SWIGLU}


def sample_model(architecture: ViTConfig, seed: int = 0, **overrides: Any) -> VisionTransformer:
    """A model whose every tensor is random, those that start as constants too."""
    torch.manual_seed(seed)
    model = VisionTransformer(architecture, **overrides).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def sample_state(architecture: ViTConfig, seed: int = 0) -> dict[str, Tensor]:
    return sample_model(architecture, seed).state_dict()


def save(state: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    return path


def assert_same_state(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """The same keys and the same bits."""
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def export_model(checkpoint: Path | str, format_name: str, output: Path, **options: Any) -> ExportResult:
    """`dino2 export`."""
    return run(ExportRequest(checkpoint=str(checkpoint), format=format_name, output=output, **options))


def to_chunked(state: dict[str, Tensor], chunks: int) -> dict[str, Tensor]:
    """Flat weights as the reference writes them with block_chunks, for a depth that divides into `chunks`."""
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    size = depth // chunks

    def rename(name: str) -> str:
        found = re.match(r"^blocks\.(\d+)\.", name)
        return f"blocks.{int(found[1]) // size}.{name.removeprefix('blocks.')}" if found else name

    return {rename(name): tensor for name, tensor in state.items()}
