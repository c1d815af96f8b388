"""The request to train."""

from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from dinov2cli.requests.base import AtLeastOne, Request, argument, option
from dinov2cli.requests.launch import Slurm


class ConfiguredRequest(Request):
    """What commands share that make a configuration: of a preset or of a file, and changes of single keys."""

    overrides: tuple[str, ...] = argument(
        "Changes of single keys, such as optim.epochs=10.", default=(), completes="overrides"
    )
    preset: str | None = option(
        None,
        "A ready configuration; see dino2 presets list. To train on --data: by default chosen, and said why.",
        completes="presets",
    )
    config_file: Path | None = option(None, "A configuration file instead of a preset.", metavar="YAML")


class TrainRequest(
    ConfiguredRequest,
    command="train",
    run_by="dinov2cli.start:run",
    launched_by="dinov2cli.launch.training:launch",
    checked_by="dinov2cli.launch.training:first_look",
    logs=True,
):
    """Pretrain a vision transformer with DINOv2 on a set of images.

    Ctrl-C saves; the same command resumes, with the same losses as if it had never stopped. The run folder gets
    config.yaml, training_metrics.json, checkpoints/ and eval/training_*/teacher_checkpoint.pth.

    Several processes, on this machine or as a Slurm job, start again from the last checkpoint when one of them dies.
    `dino2 status RUN` shows how they are doing.

    Example:

        dino2 train --preset demo --output-dir runs/demo

        dino2 train --data ~/photos --output-dir runs/photos

        dino2 train --preset vits14 --data ~/photos --output-dir runs/photos optim.epochs=30

        dino2 train --preset vitb14 --data ~/photos --output-dir runs/photos --gpus 4

        dino2 train --preset vits14_distilled --teacher runs/vitl14 --data ~/photos --output-dir runs/small --gpus 8

        dino2 train --preset vitl14 --output-dir runs/vitl14 --nodes 12 --gpus 8 --partition gpu --timeout-min 1440
    """

    data: str | None = option(
        None,
        "A folder of images, or a string such as ImageNet:split=TRAIN:root=/data:extra=/data. "
        "Short for train.dataset_path.",
        metavar="DATASET",
        flags="--data --train-dataset",
    )
    output_dir: Path | None = option(
        None,
        "The run folder [runs/ and the name of the preset, file or data]. If it holds a run, that run is resumed.",
        metavar="DIR",
    )
    gpus: AtLeastOne | None = option(
        None,
        "GPUs to use on each machine, a process for each [all; with Slurm 8]; with --cpu, processes [1].",
        metavar="N",
    )
    cpu: bool = option(False, "Train on the CPU even if there is a GPU.")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "cpu is the same as --cpu; cuda: only with a GPU.")
    init_from: str | None = option(
        None,
        "Start student and teacher from these backbone weights: a run, a file, a URL or a released name. "
        "Short for student.pretrained_weights.",
        metavar="WEIGHTS",
    )
    teacher: str | None = option(
        None,
        "Learn from this frozen teacher: a run, a file, a URL or a released name. Short for distillation.teacher.",
        metavar="WEIGHTS",
    )
    no_resume: bool = option(False, "Start over; an earlier run's files move to previous_1/ and so on.")
    take_over: bool = option(
        False, "Train in a folder that another training owns which is surely gone, and of which nobody here can tell."
    )
    dry_run: bool = option(
        False, "Check everything, estimate time and memory; do not train. With Slurm options: print the script."
    )
    slurm: Slurm = Slurm()

    @model_validator(mode="before")
    @classmethod
    def _cpu_is_a_device(cls, values: dict[str, Any]) -> dict[str, Any]:
        if values.get("cpu") and values.get("device") == "cuda":
            raise ValueError("--cpu and --device cuda exclude each other")
        return {**values, "cpu": True} if values.get("device") == "cpu" else values
