"""Evaluations from a checkpoint to its report: what `dino2 eval` runs, and the trainer for its teachers.

Each function reads as its protocol: data, features, classifier, report.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dinov2cli import distributed
from dinov2cli.console import logger
from dinov2cli.data.datasets import make_dataset
from dinov2cli.errors import DataError
from dinov2cli.eval.cache import FeatureCache
from dinov2cli.eval.classes import align_classes
from dinov2cli.eval.features import Extractor
from dinov2cli.eval.knn import KnnSettings, evaluate_knn
from dinov2cli.eval.reports import Evaluation, Row, add_result, write_reference_lines
from dinov2cli.eval.subject import Subject

if TYPE_CHECKING:
    from dinov2cli.data.datasets import ImageDataset


@dataclass(frozen=True)
class Extraction:
    """How features are extracted; None means the protocol's or the machine's default."""

    image_size: int | None = None
    batch_size: int = 256
    num_workers: int | None = None
    device: str | None = None
    cache: FeatureCache | None = field(default_factory=FeatureCache)

    def of(self, subject: Subject, **arguments: Any) -> Extractor:
        """An extractor for the subject's model in its configured precision."""
        options = {key: getattr(self, key) for key in ("image_size", "batch_size", "num_workers", "device", "cache")}
        return Extractor(subject.model, autocast_dtype=subject.autocast_dtype, **options, **arguments)


def run_knn(
    subject: Subject,
    train_dataset: str,
    val_dataset: str,
    *,
    settings: KnnSettings | None = None,
    extraction: Extraction | None = None,
    search_on_cpu: bool = False,
    output_dir: Path | None = None,
) -> Evaluation:
    """k-NN of `cls` features (`eval.knn`): 256/224 resize, centre crop; leave-one-out where train and val are one set.

    Args:
        search_on_cpu: compute similarities on the CPU even where the features are extracted on a GPU.

    Raises:
        DataError: datasets that are missing, empty, or do not fit each other.
    """
    settings = settings or KnnSettings()
    train_images, val_images = make_dataset(train_dataset), make_dataset(val_dataset)
    mapping = align_classes(train_images, val_images)
    extract = (extraction or Extraction()).of(subject)
    train = extract(train_images, "train features")
    leave_one_out = same_images(train_images, val_images)
    if leave_one_out:
        logger.info("k-NN: train and val are the same images; each is classified by the others (leave-one-out)")
        val = train
    else:
        val = extract(val_images, "val features").with_classes(mapping)
    device = "cpu" if search_on_cpu else extract.device
    results = evaluate_knn(train, val, settings, leave_one_out=leave_one_out, device=device)
    evaluation = Evaluation(
        **_origin(subject, "knn", extract, train_dataset, val_dataset),
        settings={**asdict(settings), **_settings(extract), "leave_one_out": leave_one_out},
        rows=tuple(Row.of(f"{name}, k={k}", accuracy) for (name, k), accuracy in results.items()),
    )
    lines = [
        {f"{key} Top {n}": value}
        for key, accuracy in results.items()
        for n, value in ((1, accuracy.top1), (5, accuracy.top5))
    ]
    return report(subject, evaluation, lines, output_dir)


def same_images(first: "ImageDataset", second: "ImageDataset") -> bool:
    """Whether two datasets are the same images in the same order."""
    n = len(first)
    return n == len(second) and first.describe() == second.describe() and first.path(n - 1) == second.path(n - 1)


def report(
    subject: Subject, evaluation: Evaluation, lines: Sequence[dict[str, Any]], output_dir: Path | None
) -> Evaluation:
    """Write the files of an evaluation (on one process) and hand it on."""
    if distributed.is_main():
        folder = subject.output_dir(evaluation.task, output_dir)
        if folder is not None:
            write_reference_lines(folder / f"results_eval_{evaluation.task}.json", lines)
        if (gathered := subject.run or output_dir) is not None:
            logger.info("results added to %s", add_result(gathered, evaluation))
    distributed.barrier()
    return evaluation


def labelled(dataset: "ImageDataset", name: str, task: str) -> torch.Tensor:
    """The dataset's labels, int64 [N].

    Raises:
        DataError: some images have none.
    """
    targets = torch.as_tensor(dataset.targets())
    missing = int((targets < 0).sum())
    if missing:
        raise DataError(
            f"The {name} dataset ({dataset.describe()}) has {missing} of {len(targets)} images without a class; "
            f"{task} needs a class for each.",
            hint="Put the images into one subfolder per class.",
        )
    return targets


def _origin(subject: Subject, task: str, extract: Extractor, train: str, val: str) -> dict[str, Any]:
    where = subject.weights
    if subject.run is not None:
        where = where.relative_to(subject.run)
    return {
        "task": task,
        "checkpoint": str(where) if subject.run else subject.name,
        "iteration": subject.iteration,
        "weights_hash": extract.weights_hash,
        "train_dataset": train,
        "val_dataset": val,
    }


def _settings(extract: Extractor) -> dict[str, Any]:
    return {"image_size": extract.image_size, "resize": extract.resize, "precision": str(extract.autocast_dtype)}
