"""All that is wrong with an evaluation, told at once, before anything slow; and what `--dry-run` prints of one."""

import re
from pathlib import Path
from typing import Any

from dinov2cli import cluster
from dinov2cli.config import Config, load_config
from dinov2cli.console import logger
from dinov2cli.data.datasets import check_dataset, make_dataset
from dinov2cli.data.spelling import complete
from dinov2cli.errors import ConfigError, Problems, WeightsError
from dinov2cli.files import check_folder, user_path
from dinov2cli.requests.eval import EvalRequest
from dinov2cli.site import read_site


def look(request: EvalRequest) -> None:
    """Check what takes no time; nothing is listed, downloaded or written.

    Raises:
        Dino2Error: all that is wrong, in the order in which to mend it.
    """
    wrong, config, sets = Problems(), None, {}
    with wrong.noted():
        config = known_config(request)
    with wrong.noted():
        train = request.train_dataset or (None if request.trains else "none")
        found = datasets_for(config, train, request.val_dataset, request.labels)
        sets = dict(zip(("train", "val"), found, strict=True))
    given = (request.train_dataset, request.val_dataset, getattr(request, "finetune_dataset", None))
    are_whole = request.labels == "classes"  # else what is given is a folder with both
    further = (*(given if are_whole else ()), *getattr(request, "test_datasets", ()))
    for dataset in dict.fromkeys((*further, *sets.values())):
        with wrong.noted():
            if dataset not in (None, "none"):
                check_dataset(dataset)
    with wrong.noted():
        check_checkpoint(request)
    if (head := getattr(request, "head", None)) and not request.slurm.is_asked:
        with wrong.noted():
            from dinov2cli.models import classifier
            from dinov2cli.models.load import dense

            (classifier if request.labels == "classes" else dense).check_head(head, "--head")
    if request.output_dir is not None:
        with wrong.noted():
            check_folder(request.output_dir, "--output-dir")
    if request.slurm.is_asked:
        with wrong.noted():
            cluster.check(request.slurm, submits=not request.dry_run)
    for name in () if request.slurm.is_asked else ("device", "train_features_device"):
        with wrong.noted():
            from dinov2cli.device import choose_device

            choose_device(getattr(request, name, None), f"--{name.replace('_', '-')}")
    wrong.tell()
    logger.info("train %s, val %s", sets["train"], sets["val"])


def check_checkpoint(request: EvalRequest) -> None:
    """Whether there are such weights. For a job, only what its name tells: the rest takes torch, and seconds."""
    if not request.slurm.is_asked:
        from dinov2cli.models.load.locate import check_there

        check_there(request.checkpoint)
    elif not user_path(request.checkpoint).exists() and not re.match(r"https?://|dinov2_", request.checkpoint):
        raise WeightsError(f"'{request.checkpoint}' is neither a file or folder nor a released name")


def known_config(request: EvalRequest) -> Config | None:
    """The configuration that belongs to the checkpoint, as far as its path tells; None where there is none."""
    run = run_of(request.checkpoint)
    beside = run / "config.yaml" if run and (run / "config.yaml").is_file() else None
    file = request.config_file or beside
    return load_config(config_file=file, overrides=request.overrides) if file else None


def run_of(checkpoint: str) -> Path | None:
    """The run folder of a checkpoint, by its path; `models.load.locate` finds the same, but takes torch."""
    path = user_path(checkpoint)
    if path.is_dir():
        return path if (path / "eval").is_dir() or (path / "checkpoints").is_dir() else None
    return path.parent.parent.parent if path.parent.parent.name == "eval" else None


def datasets_for(config: Config | None, train: str | None, val: str | None, labels: str = "classes") -> tuple[str, str]:
    """The strings of the train and the val dataset, complete: as given, else from a run's configuration, else ImageNet.

    With `labels` of every pixel (`masks`, `depth`) they are what is given, else what the configuration names for them.

    A run names labelled data for its online k-NN, or else trained on a split TRAIN of a dataset that has a VAL.
    ImageNet it is where that is known (`dinov2cli.site`) and neither of the two is given.

    Raises:
        ConfigError: one of them is not known; DataError: a known one is gone.
    """
    if labels != "classes":
        return _dense_datasets(config, train, val, labels)
    if config is not None:
        online = config.evaluation.knn_train_dataset, config.evaluation.knn_val_dataset
        trained_on = config.train.dataset_path
        if all(online):
            train, val = train or online[0], val or online[1]
        elif "split=TRAIN" in trained_on:
            train, val = train or trained_on, val or trained_on.replace("split=TRAIN", "split=VAL")
    if not val and train in (None, "none") and "ImageNet" in read_site().settings.datasets:
        train, val = train or "ImageNet", "ImageNet"
    if train and val:
        return train if train == "none" else complete(train, "TRAIN"), complete(val, "VAL")
    missing = " and ".join(name for name, given in (("--train-dataset", train), ("--val-dataset", val)) if not given)
    raise ConfigError(
        f"{missing} missing: evaluation needs labelled images to learn from and labelled images to classify.",
        hint="For example: --train-dataset photos/train --val-dataset photos/val, folders with a subfolder per class. "
        "Once dino2 prepare-imagenet has made ImageNet known, it is the default.",
    )


def _dense_datasets(config: Config | None, train: str | None, val: str | None, labels: Any) -> tuple[str, str]:
    from dinov2cli.data.datasets.recognise_dense import dense_string

    key = {"masks": "segmentation_dataset", "depth": "depth_dataset"}[labels]
    train = train or (getattr(config.evaluation, key) if config else None) or None
    given = val or (None if train == "none" else train)
    if not given:
        raise ConfigError(
            f"--data missing: this evaluation needs images with {labels}.",
            hint=f"For example: --data FOLDER, or in the run's configuration evaluation.{key}.",
        )
    return (
        "none" if train in (None, "none") else dense_string(train, "TRAIN", labels),
        dense_string(given, "VAL", labels, of_train=not val),
    )


class Plan(dict[str, str]):
    """What would be done; as text a line each."""

    def __str__(self) -> str:
        return "\n".join(f"{name:<12} {value}" for name, value in self.items())


def plan(request: EvalRequest) -> Plan:
    """What the evaluation would do, once its images have been listed; the weights are not read.

    Raises:
        Dino2Error: the datasets cannot be read.
    """
    from dinov2cli.device import choose_device

    config = known_config(request)
    train = request.train_dataset or (None if request.trains else "none")
    train, val = datasets_for(config, train, request.val_dataset, request.labels)
    beside = (
        "beside the run's teacher"
        if run_of(request.checkpoint)
        else "printed only: the weights are in no run; --output-dir DIR keeps them"
    )
    rows = {"evaluation": request.command}
    rows["checkpoint"] = request.checkpoint + ("" if Path(request.checkpoint).exists() else " (downloaded if need be)")
    if request.trains:
        rows["train"] = make_dataset(train).describe()
    rows["val"] = make_dataset(val).describe()
    if getattr(request, "baselines", False):
        if request.labels == "classes":
            from dinov2cli.eval.baselines import names

            beside_it = names(config.student.in_chans if config else 3)
        else:
            beside_it = ("raw colours", "random network")
        rows["beside it"] = ", ".join(beside_it)
    rows["device"] = str(choose_device(request.device))
    rows["results"] = str(request.output_dir or beside)
    return Plan(rows)
