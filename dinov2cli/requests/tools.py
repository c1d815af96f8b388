"""Requests about what is there: weights, runs, presets."""

from pathlib import Path
from typing import Annotated, ClassVar

from dinov2cli.requests.base import Argument, Option, Request


class Info(Request):
    """Say what a checkpoint is: architecture, parameters, layout, training state, provenance.

    The weights are read and checked as for loading them; what is no DINOv2 backbone is refused, and named.

    Example:

        dino2 info runs/demo
    """

    command: ClassVar[str] = "info"
    run_by: ClassVar[str] = "dinov2cli.export.description:run"

    checkpoint: Annotated[
        str,
        Argument(
            "A run folder, teacher checkpoint, weights file, Hugging Face folder, URL or released name.", metavar="CKPT"
        ),
    ]
    config_file: Annotated[
        Path | None, Option("The run's config.yaml, if it does not lie beside CKPT.", metavar="YAML")
    ] = None
    digest: Annotated[bool, Option("Also compute the files' SHA-256.", flags="--sha256")] = False
    as_json: Annotated[bool, Option("Print one JSON object.", flags="--json")] = False
