"""`dino2 doctor`: whether a run can succeed on these machines."""

from pathlib import Path
from typing import Annotated

import typer

from dinov2cli.cli.completion import complete_preset


def doctor(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN] [a.b=value ...]",
            show_default=False,
            help="A run folder whose configuration, data and folder are examined; then changes of single keys.",
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset",
            metavar="NAME",
            help="The configuration of a run to come; see dino2 presets list.",
            autocompletion=complete_preset,
        ),
    ] = None,
    config_file: Annotated[
        Path | None, typer.Option("--config-file", metavar="YAML", help="A configuration file instead of a preset.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="DATASET", help="The training images: a folder or a dataset string."),
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option("--output-dir", metavar="DIR", help="Where the run folder is going to be.")
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="As if training on the CPU even if there is a GPU.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Check machine, data and run folder before a training, and say what to do about what is wrong.

    Takes the options of dino2 train. Without any, it examines the machine alone; with --data also whether the images
    can be read, with --output-dir whether checkpoints can be written there. Nothing is left behind. Under torchrun or
    srun every process checks what it sees, and the processes' connection is measured. Exit code 2: a run would fail.

    Example:

        dino2 doctor --preset vitl14 --data /data/photos --output-dir runs/photos

        torchrun --nproc-per-node 8 -m dinov2cli doctor runs/photos
    """  # fmt: skip
    from dinov2cli.doctor.report import run

    run(arguments or [], preset, config_file, data, output_dir, cpu=cpu, as_json=as_json)
