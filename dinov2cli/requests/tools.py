"""Requests about what is there: data, weights, runs, presets."""

from pathlib import Path
from typing import Literal, Self

from pydantic import model_validator

from dinov2cli.requests.base import AtLeastOne, CheckpointRequest, Paths, Request, argument, option


class PrepareImagenetRequest(Request, command="prepare-imagenet", run_by="dinov2cli.data.prepare.run:run"):
    """Prepare ImageNet-1k, a subset of it, or ImageNet-22k for training.

    Writes `entries-<SPLIT>.npy`, `class-ids-<SPLIT>.npy` and `class-names-<SPLIT>.npy` (22k: `entries.npy` and
    `class-ids.npy`) in the reference implementation's formats: its tools read these files and dino2 reads its.
    Files that are there already are left alone, without `--overwrite`. From then on ImageNet (22k: ImageNet22k) is
    known by its name: presets and evaluations find it without `root=`; see `dino2 datasets`.

    Example:

        dino2 prepare-imagenet --root /data/imagenet --extra /data/imagenet-extra

        dino2 prepare-imagenet --root /data/imagenet --check
    """

    root: Path = option(..., "Folder with train/, val/, test/ (22k: with the <wnid>.tar files).")
    extra: Path | None = option(None, "Folder to write the metadata files to.", default_text="the root")
    split: tuple[Literal["TRAIN", "VAL", "TEST"], ...] = option(
        (), "Split to prepare; repeatable.", default_text="all that are there"
    )
    variant: Literal["1k", "22k"] | None = option(
        None, "ImageNet-1k, or ImageNet-22k as tars.", default_text="what is there, or both"
    )
    check: bool = option(False, "Write nothing; verify layout, labels.txt, counts, and open a sample.")
    force: bool = option(False, "Write files anew that are there already.", flags="--overwrite --force")
    write_labels: bool = option(False, "Make labels.txt from the class folders' names first.")
    val_labels: Path | None = option(
        None, "Sort a flat val/ into class folders first, by the devkit's ground truth or 'image class-id' lines."
    )
    link: bool = option(False, "With --val-labels: link from the class folders instead of moving.")

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if self.link and not self.val_labels:
            raise ValueError("--link goes with --val-labels")
        if self.variant == "22k" and (self.split or self.check or self.write_labels or self.val_labels):
            raise ValueError("--variant 22k takes --root, --extra and --overwrite only")
        return self


class InfoRequest(CheckpointRequest, command="info", run_by="dinov2cli.export.description:run"):
    """Say what a checkpoint is: architecture, parameters, layout, training state, provenance.

    The weights are read and checked as for loading them; what is no DINOv2 backbone is refused, and named.

    Example:

        dino2 info runs/demo
    """

    checkpoint: str = argument(
        "A run folder, teacher checkpoint, weights file, Hugging Face folder, URL or released name.",
        metavar="CKPT",
        default="",
        default_text=False,
    )
    config_file: Path | None = option(None, "The run's config.yaml, if it does not lie beside CKPT.", metavar="YAML")
    digest: bool = option(False, "Also compute the files' SHA-256.", flags="--sha256")
    as_json: bool = option(False, "Print one JSON object.", flags="--json")


class PlotRequest(Request, command="plot", run_by="dinov2cli.visualize.run_plot:run"):
    """Plot losses, schedules, monitors and evaluation scores of one or several runs.

    Reads what training and evaluation wrote into the run folders; a run may still be going on. Needs matplotlib:
    `pip install 'dinov2cli[plots]'`.

    Example:

        dino2 plot runs/baseline runs/larger-lr --output compare.html --smooth 20
    """

    runs: Paths = argument("Run folders; their curves are overlaid.", metavar="RUN...")
    output: Path | None = option(
        None, "A .png or a self-contained .html. Default: plot.png in the first run.", flags="--output -o"
    )
    smooth: AtLeastOne = option(1, "Logged points in the moving mean drawn over the raw curve.")


class ResultsRequest(Request, command="results", run_by="dinov2cli.eval.results:run"):
    """Show all scores of a run: what was evaluated, on which data and how, with 95 % confidence intervals.

    The intervals say how sure the accuracy is for the number of images it was measured on. The k-NN while training is
    among the scores. Several runs are compared: the newest scores of each, side by side.

    Example:

        dino2 results runs/demo

        dino2 results runs/baseline runs/larger-lr --csv > scores.csv
    """

    runs: Paths = argument("Run folders, or results.json files.", metavar="RUN...")
    task: str | None = option(None, "Only the evaluations of this name: knn, logreg, linear, segmentation or depth.")
    as_json: bool = option(False, "Print one JSON object instead of a table.", flags="--json")
    as_csv: bool = option(False, "Print a line of CSV for each score.", flags="--csv")

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if self.as_json and self.as_csv:
            raise ValueError("--json and --csv exclude each other")
        return self


class StatusRequest(Request, command="status", run_by="dinov2cli.launch.status:run"):
    """Show how far a run is, how fast, and whether all its processes are well.

    It reads the run folder, from any machine that sees it, and asks Slurm where the run was submitted. "Slowest" is the
    process that waits longest for its own data: the others wait for it in every iteration.

    Example:

        dino2 status runs/demo
    """

    run: Path = argument("A run folder.", metavar="RUN", default_text=False)
    as_json: bool = option(False, "Print one JSON object instead.", flags="--json")


class ListPresetsRequest(Request, command="presets list", run_by="dinov2cli.config.show:list_them"):
    """List the presets, with what each is for.

    Example:

        dino2 presets list
    """

    as_json: bool = option(False, "Print one JSON object instead of a table.", flags="--json")


class ShowPresetRequest(Request, command="presets show", run_by="dinov2cli.config.show:show"):
    """Print a preset as YAML: its difference from the defaults, or everything.

    Example:

        dino2 presets show demo > mine.yaml

        dino2 train --config-file mine.yaml --output-dir RUN
    """

    name: str = argument("Name of a preset, as `dino2 presets list` prints it.", completes="presets")
    full: bool = option(False, "Print every key, with its meaning and what it takes, not only the differences.")


class DoctorRequest(Request, command="doctor", run_by="dinov2cli.doctor.report:run", logs=True):
    """Check machine, data and run folder before a training, and say what to do about what is wrong.

    Takes the options of dino2 train. Without any, it examines the machine alone; with --data also whether the images
    can be read, with --output-dir whether checkpoints can be written there. Nothing is left behind. Under torchrun or
    srun every process checks what it sees, and the processes' connection is measured. Exit code 2: a run would fail.

    Example:

        dino2 doctor --preset vitl14 --data ~/photos --output-dir runs/vitl14

        torchrun --nproc-per-node 8 -m dinov2cli doctor runs/photos
    """

    arguments: tuple[str, ...] = argument(
        "A run folder whose configuration, data and folder are examined; then changes of single keys.",
        default=(),
        metavar="[RUN] [a.b=value ...]",
        default_text=False,
    )
    preset: str | None = option(
        None, "The configuration of a run to come; see dino2 presets list.", completes="presets"
    )
    config_file: Path | None = option(None, "A configuration file instead of a preset.", metavar="YAML")
    data: str | None = option(None, "The training images: a folder or a dataset string.", metavar="DATASET")
    output_dir: Path | None = option(None, "Where the run folder is going to be.", metavar="DIR")
    cpu: bool = option(False, "As if training on the CPU even if there is a GPU.")
    as_json: bool = option(False, "Print one JSON object instead of a table.", flags="--json")
