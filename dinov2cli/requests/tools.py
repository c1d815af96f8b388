"""Requests about what is there: data, weights, runs, presets."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from dinov2cli.requests.base import Argument, AsJson, AtLeastOne, ConfigBeside, Option, Request
from dinov2cli.requests.train import ConfigFile


class PrepareImagenet(Request, command="prepare-imagenet", run_by="dinov2cli.data.prepare.run:run"):
    """Prepare ImageNet-1k, a subset of it, or ImageNet-22k for training.

    Writes `entries-<SPLIT>.npy`, `class-ids-<SPLIT>.npy` and `class-names-<SPLIT>.npy` (22k: `entries.npy` and
    `class-ids.npy`) in the reference implementation's formats: its tools read these files and dino2 reads its.
    Files that are there already are left alone, without `--force`.

    Example:

        dino2 prepare-imagenet --root /data/imagenet --extra /data/imagenet-extra

        dino2 prepare-imagenet --root /data/imagenet --check
    """

    root: Annotated[Path, Option("Folder with train/, val/, test/ (22k: with the <wnid>.tar files).")]
    extra: Annotated[Path | None, Option("Folder to write the metadata files to.", default_text="the root")] = None
    split: Annotated[
        tuple[Literal["TRAIN", "VAL", "TEST"], ...],
        Option("Split to prepare; repeatable.", default_text="all that are there"),
    ] = ()
    variant: Annotated[Literal["1k", "22k"], Option("ImageNet-1k, or ImageNet-22k as tars.")] = "1k"
    check: Annotated[bool, Option("Write nothing; verify layout, labels.txt, counts, and open a sample.")] = False
    force: Annotated[bool, Option("Write files anew that are there already.")] = False
    write_labels: Annotated[bool, Option("Make labels.txt from the class folders' names first.")] = False
    val_labels: Annotated[
        Path | None,
        Option("Sort a flat val/ into class folders first, by the devkit's ground truth or 'image class-id' lines."),
    ] = None
    link: Annotated[bool, Option("With --val-labels: link from the class folders instead of moving.")] = False

    @model_validator(mode="after")
    def _goes_together(self) -> "PrepareImagenet":
        if self.link and not self.val_labels:
            raise ValueError("--link goes with --val-labels")
        if self.variant == "22k" and (self.split or self.check or self.write_labels or self.val_labels):
            raise ValueError("--variant 22k takes --root, --extra and --force only")
        return self


class Info(Request, command="info", run_by="dinov2cli.export.description:run"):
    """Say what a checkpoint is: architecture, parameters, layout, training state, provenance.

    The weights are read and checked as for loading them; what is no DINOv2 backbone is refused, and named.

    Example:

        dino2 info runs/demo
    """

    checkpoint: Annotated[
        str,
        Argument(
            "A run folder, teacher checkpoint, weights file, Hugging Face folder, URL or released name.", metavar="CKPT"
        ),
    ]
    config_file: ConfigBeside = None
    digest: Annotated[bool, Option("Also compute the files' SHA-256.", flags="--sha256")] = False
    as_json: Annotated[bool, Option("Print one JSON object.", flags="--json")] = False


class Plot(Request, command="plot", run_by="dinov2cli.visualize.run_plot:run"):
    """Plot losses, schedules, monitors and evaluation scores of one or several runs.

    Reads what training and evaluation wrote into the run folders; a run may still be going on. Needs matplotlib:
    `pip install 'dinov2cli[plots]'`.

    Example:

        dino2 plot runs/baseline runs/larger-lr --output compare.html --smooth 20
    """

    runs: Annotated[
        tuple[Path, ...], Field(min_length=1), Argument("Run folders; their curves are overlaid.", metavar="RUN...")
    ]
    output: Annotated[
        Path | None,
        Option("A .png or a self-contained .html. Default: plot.png in the first run.", flags="--output -o"),
    ] = None
    smooth: Annotated[AtLeastOne, Option("Logged points in the moving mean drawn over the raw curve.")] = 1


class Results(Request, command="results", run_by="dinov2cli.eval.reports:run"):
    """Show all evaluations of a run's checkpoints, with 95 % confidence intervals.

    The intervals say how sure the accuracy is for the number of images it was measured on.

    Example:

        dino2 results runs/demo
    """

    run: Annotated[Path, Argument("A run folder, or a results.json.", metavar="RUN", default_text=False)]
    task: Annotated[str | None, Option("Only knn, logreg or linear.")] = None
    as_json: AsJson = False


class Status(Request, command="status", run_by="dinov2cli.launch.status:run"):
    """Show how far a run is, how fast, and whether all its processes are well.

    It reads the run folder, from any machine that sees it, and asks Slurm where the run was submitted. "Slowest" is the
    process that waits longest for its own data: the others wait for it in every iteration.

    Example:

        dino2 status runs/demo
    """

    run: Annotated[Path, Argument("A run folder.", metavar="RUN", default_text=False)]
    as_json: Annotated[bool, Option("Print one JSON object instead.", flags="--json")] = False


class ListPresets(Request, command="presets list", run_by="dinov2cli.config.show:list_them"):
    """List the presets, with what each is for.

    Example:

        dino2 presets list
    """

    as_json: AsJson = False


class ShowPreset(Request, command="presets show", run_by="dinov2cli.config.show:show"):
    """Print a preset as YAML: its difference from the defaults, or everything.

    Example:

        dino2 presets show demo > mine.yaml

        dino2 train --config-file mine.yaml --output-dir RUN
    """

    name: Annotated[str, Argument("Name of a preset, as `dino2 presets list` prints it.", completes="presets")]
    full: Annotated[bool, Option("Print every key, with its meaning and what it takes, not only the differences.")] = (
        False
    )


class Doctor(Request, command="doctor", run_by="dinov2cli.doctor.report:run", logs=True):
    """Check machine, data and run folder before a training, and say what to do about what is wrong.

    Takes the options of dino2 train. Without any, it examines the machine alone; with --data also whether the images
    can be read, with --output-dir whether checkpoints can be written there. Nothing is left behind. Under torchrun or
    srun every process checks what it sees, and the processes' connection is measured. Exit code 2: a run would fail.

    Example:

        dino2 doctor --preset vitl14 --data /data/photos --output-dir runs/photos

        torchrun --nproc-per-node 8 -m dinov2cli doctor runs/photos
    """

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
