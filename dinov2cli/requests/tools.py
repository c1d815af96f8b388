"""Requests about what is there: weights, runs, presets."""

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from dinov2cli.requests.base import Argument, AsJson, AtLeastOne, Option, Request
from dinov2cli.requests.train import ConfigFile


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


class Plot(Request):
    """Plot losses, schedules, monitors and evaluation scores of one or several runs.

    Reads what training and evaluation wrote into the run folders; a run may still be going on. Needs matplotlib:
    `pip install 'dinov2cli[plots]'`.

    Example:

        dino2 plot runs/baseline runs/larger-lr --output compare.html --smooth 20
    """

    command: ClassVar[str] = "plot"
    run_by: ClassVar[str] = "dinov2cli.visualize.run_plot:run"

    runs: Annotated[
        tuple[Path, ...], Field(min_length=1), Argument("Run folders; their curves are overlaid.", metavar="RUN...")
    ]
    output: Annotated[
        Path | None,
        Option("A .png or a self-contained .html. Default: plot.png in the first run.", flags="--output -o"),
    ] = None
    smooth: Annotated[AtLeastOne, Option("Logged points in the moving mean drawn over the raw curve.")] = 1


class Results(Request):
    """Show all evaluations of a run's checkpoints, with 95 % confidence intervals.

    The intervals say how sure the accuracy is for the number of images it was measured on.

    Example:

        dino2 results runs/demo
    """

    command: ClassVar[str] = "results"
    run_by: ClassVar[str] = "dinov2cli.eval.reports:run"

    run: Annotated[Path, Argument("A run folder, or a results.json.", metavar="RUN", default_text=False)]
    task: Annotated[str | None, Option("Only knn, logreg or linear.")] = None
    as_json: AsJson = False


class Status(Request):
    """Show how far a run is, how fast, and whether all its processes are well.

    It reads the run folder, from any machine that sees it, and asks Slurm where the run was submitted. "Slowest" is the
    process that waits longest for its own data: the others wait for it in every iteration.

    Example:

        dino2 status runs/demo
    """

    command: ClassVar[str] = "status"
    run_by: ClassVar[str] = "dinov2cli.launch.status:run"

    run: Annotated[Path, Argument("A run folder.", metavar="RUN", default_text=False)]
    as_json: Annotated[bool, Option("Print one JSON object instead.", flags="--json")] = False


class ListPresets(Request):
    """List the presets, with what each is for.

    Example:

        dino2 presets list
    """

    command: ClassVar[str] = "presets list"
    run_by: ClassVar[str] = "dinov2cli.config.show:list_them"

    as_json: AsJson = False


class ShowPreset(Request):
    """Print a preset as YAML: its difference from the defaults, or everything.

    Example:

        dino2 presets show demo > mine.yaml

        dino2 train --config-file mine.yaml --output-dir RUN
    """

    command: ClassVar[str] = "presets show"
    run_by: ClassVar[str] = "dinov2cli.config.show:show"

    name: Annotated[str, Argument("Name of a preset, as `dino2 presets list` prints it.", completes="presets")]
    full: Annotated[bool, Option("Print every key, with its meaning and what it takes, not only the differences.")] = (
        False
    )


class Doctor(Request):
    """Check machine, data and run folder before a training, and say what to do about what is wrong.

    Takes the options of dino2 train. Without any, it examines the machine alone; with --data also whether the images
    can be read, with --output-dir whether checkpoints can be written there. Nothing is left behind. Under torchrun or
    srun every process checks what it sees, and the processes' connection is measured. Exit code 2: a run would fail.

    Example:

        dino2 doctor --preset vitl14 --data /data/photos --output-dir runs/photos

        torchrun --nproc-per-node 8 -m dinov2cli doctor runs/photos
    """

    command: ClassVar[str] = "doctor"
    run_by: ClassVar[str] = "dinov2cli.doctor.report:run"
    logs: ClassVar[bool] = True

    arguments: Annotated[
        tuple[str, ...],
        Argument(
            "A run folder whose configuration, data and folder are examined; then changes of single keys.",
            metavar="[RUN] [a.b=value ...]",
            default_text=False,
        ),
    ] = ()
    preset: Annotated[
        str | None,
        Option("The configuration of a run to come; see dino2 presets list.", metavar="NAME", completes="presets"),
    ] = None
    config_file: ConfigFile = None
    data: Annotated[str | None, Option("The training images: a folder or a dataset string.", metavar="DATASET")] = None
    output_dir: Annotated[Path | None, Option("Where the run folder is going to be.", metavar="DIR")] = None
    cpu: Annotated[bool, Option("As if training on the CPU even if there is a GPU.")] = False
    as_json: AsJson = False
