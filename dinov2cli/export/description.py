"""What a checkpoint is: for `dino2 info`."""

import json
from typing import Any

from rich.table import Table

from dinov2cli.config import load_config
from dinov2cli.config.vit import RESIZING
from dinov2cli.errors import ConfigError
from dinov2cli.files import last_json_lines, sha256
from dinov2cli.models.library_backbone import size_of
from dinov2cli.models.load import RecognisedWeights, read_weights, said_in
from dinov2cli.models.load.locate import newest_teacher
from dinov2cli.requests.tools import InfoRequest


class Description(dict[str, Any]):
    """Everything known of a checkpoint, as plain values; for people as a table."""

    def __rich__(self) -> Table:
        table = Table.grid(padding=(0, 2))
        table.add_column()
        table.add_column(overflow="fold")
        left_out: list[str] = self["left_out"]
        architecture = self["architecture"]
        arguments = json.dumps(architecture["arguments"]) if "library" in architecture else None
        rotary = _rotary(architecture) if architecture.get("pos_embed_type") == "rope" else None
        groups = sorted({name.split(".")[0] for name in left_out})
        rows = {
            "model": self["what"],
            "parameters": f"{self['parameters']:,}",
            "released as": self.get("released"),
            "file": ", ".join(self["files"]),
            "size": f"{self['bytes'] / 1e6:,.1f} MB, {self['layout']} layout, {self['tensors_read']} tensors",
            "left out": f"{len(left_out)} tensors ({', '.join(groups)})" if left_out else None,
            "images": json.dumps(self["images"]) if self["images"] else None,
            "positions": rotary,
            "position embeddings": None if rotary or arguments else _learned(architecture),
            "arguments": arguments,
            "sha256": self.get("sha256"),
            **{f"training {key.replace('_', ' ')}": _short(value) for key, value in self["training"].items()},
            **{f"provenance {key}": value for key, value in self["provenance"].items()},
            "notes": "; ".join(self["notes"]) or None,
        }
        for name, value in rows.items():
            if value is not None:
                table.add_row(name, str(value))
        return table


def _learned(architecture: dict[str, Any]) -> str:
    side, antialias, offset = (architecture[key] for key in ("img_size", *RESIZING))
    return f"for {side}x{side} pixels; elsewhere resized with offset {offset}, antialias {antialias}"


def _rotary(architecture: dict[str, Any]) -> str:
    ends = [architecture[f"pos_embed_rope_{end}_period"] for end in ("min", "max")]
    periods = f"base {architecture['pos_embed_rope_base']:g}" if None in ends else f"periods {ends[0]:g} to {ends[1]:g}"
    sides, dtype = architecture["pos_embed_rope_normalize_coords"], architecture["pos_embed_rope_dtype"]
    return f"rotary, of any size: {periods}, coordinates {sides}, {dtype}; normalisation {architecture['norm_layer']}"


def run(request: InfoRequest) -> Description:
    """Do what `dino2 info` asks.

    Raises:
        WeightsError: the checkpoint cannot be loaded.
    """
    weights = read_weights(request.checkpoint, config_file=request.config_file)
    architecture = weights.architecture
    found = Description(
        source=request.checkpoint,
        files=[str(file) for file in weights.source.files],
        bytes=sum(file.stat().st_size for file in weights.source.files),
        what=architecture.describe(),
        parameters=size_of(architecture),
        architecture=architecture.model_dump(),
        images=weights.images.beside_weights(),
        layout=weights.report.layout,
        tensors_read=weights.report.read,
        left_out=list(weights.report.left_out),
        notes=weights.report.notes,
    )
    if request.digest:
        found["sha256"] = sha256(*weights.source.files)
    if weights.source.released:
        found["released"] = weights.source.released.name
    found["training"] = _training(weights)
    found["provenance"] = said_in(weights.metadata, "dino2.provenance", request.checkpoint)
    return found


def _training(weights: RecognisedWeights) -> dict[str, Any]:
    """State of the run that the weights belong to; empty for weights without one."""
    run = weights.source.run
    if run is None:
        return {}
    state: dict[str, Any] = {
        "run": str(run),
        "iteration": weights.source.iteration,
        "is_newest_teacher": newest_teacher(run) == weights.source.files[0],
    }
    config_file = run / "config.yaml"
    if config_file.is_file():
        try:
            config = load_config(config_file=config_file)
        except ConfigError as error:
            state["config"] = f"not readable: {error.message}"
        else:
            state |= {
                "config": str(config_file),
                "iterations": config.iterations(),
                "dataset": config.train.dataset_path,
                "seed": config.train.seed,
            }
    if metrics := last_json_lines(run / "training_metrics.json", 2):  # a run may be writing to the last
        state["last_metrics"] = metrics[-1]
    return state


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        shown = {key: round(item, 4) if isinstance(item, float) else item for key, item in value.items()}
        return ", ".join(f"{key} {item}" for key, item in list(shown.items())[:8])
    return value
