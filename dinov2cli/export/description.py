"""What a checkpoint is: for `dino2 info`."""

import json
from pathlib import Path
from typing import Any

from dinov2cli.config import load_config
from dinov2cli.errors import ConfigError
from dinov2cli.models.file_digest import sha256
from dinov2cli.models.sources import newest_teacher
from dinov2cli.models.weights import RecognisedWeights, read_weights


def describe(source: str | Path, *, config_file: str | Path | None = None, digest: bool = False) -> dict[str, Any]:
    """Everything known of a checkpoint, as plain values.

    Args:
        source: anything that `load_model` takes.
        config_file: the run's config.yaml, where none lies beside the weights.
        digest: read the files once more for their SHA-256.

    Raises:
        WeightsError: it cannot be loaded.
    """
    weights = read_weights(source, config_file=config_file)
    architecture = weights.architecture
    found: dict[str, Any] = {
        "source": str(source),
        "files": [str(file) for file in weights.source.files],
        "bytes": sum(file.stat().st_size for file in weights.source.files),
        "what": architecture.describe(),
        "parameters": architecture.parameter_count(),
        "architecture": architecture.as_dict(),
        "layout": weights.report.layout,
        "tensors_read": weights.report.read,
        "left_out": list(weights.report.left_out),
        "notes": weights.report.notes,
    }
    if digest:
        found["sha256"] = sha256(weights.source.files)
    if weights.source.released:
        found["released"] = weights.source.released.name
    found["training"] = _training(weights)
    found["provenance"] = {
        key.removeprefix("dino2."): json.loads(value)
        for key, value in weights.metadata.items()
        if key == "dino2.provenance"
    }.get("provenance", {})
    return found


def _training(weights: RecognisedWeights) -> dict[str, Any]:
    """State of the run that the weights belong to; empty for weights without one."""
    run = weights.source.run
    if run is None:
        return {}
    newest = newest_teacher(run)
    state: dict[str, Any] = {
        "run": str(run),
        "iteration": weights.source.iteration,
        "is_newest_teacher": newest is not None and newest == weights.source.files[0],
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
    metrics = _last_metrics(run / "training_metrics.json")
    if metrics:
        state["last_metrics"] = metrics
    return state


def _last_metrics(path: Path) -> dict[str, Any]:
    """The last complete line of a metrics file; a run may be writing to it."""
    if not path.is_file():
        return {}
    for line in reversed(path.read_text().splitlines()):
        try:
            return dict(json.loads(line))
        except ValueError:
            continue
    return {}
