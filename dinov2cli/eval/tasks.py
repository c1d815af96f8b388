"""Evaluations from a checkpoint to its report: what `dino2 eval` runs, and the trainer for its teachers.

Each function reads as its protocol: data, features, classifier, report.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dinov2cli import distributed
from dinov2cli.console import logger
from dinov2cli.data.datasets import make_dataset
from dinov2cli.errors import DataError, Dino2Error
from dinov2cli.eval.cache import FeatureCache
from dinov2cli.eval.classes import align_classes
from dinov2cli.eval.extract import Extractor
from dinov2cli.eval.features import Features
from dinov2cli.eval.knn import KnnSettings, evaluate_knn
from dinov2cli.eval.linear import LinearSettings, evaluate_linear, measure_heads
from dinov2cli.eval.logreg import LogregSettings, evaluate_logreg
from dinov2cli.eval.metrics import Accuracy, MetricType
from dinov2cli.eval.reports import Evaluation, Row, add_result, write_reference_lines
from dinov2cli.eval.subject import Subject, datasets_for, load_subject
from dinov2cli.eval.test_sets import TestSet, read_class_mapping, read_labels

if TYPE_CHECKING:
    from dinov2cli.config import Config
    from dinov2cli.data.datasets import ImageDataset

FROZEN_CROPS = "approximation: trained on centre crops only (--frozen-crops), not on random crops as in the protocol"


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
        return Extractor(subject.model, precision=subject.precision, **options, **arguments)


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
    labelled(train_images, "train", "k-NN")
    labelled(val_images, "val", "k-NN")
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


def run_logreg(
    subject: Subject,
    train_dataset: str,
    val_dataset: str,
    *,
    finetune_dataset: str | None = None,
    settings: LogregSettings | None = None,
    extraction: Extraction | None = None,
    fit_on: str | None = None,
    output_dir: Path | None = None,
) -> Evaluation:
    """Logistic regression on `cls` features (`eval.logreg`); images are resized to the crop's size, 224.

    Raises:
        DataError: datasets that are missing, empty, or do not fit each other.
    """
    settings = settings or LogregSettings()
    train_images, val_images = make_dataset(train_dataset), make_dataset(val_dataset)
    labelled(train_images, "train", "logistic regression")
    labelled(val_images, "val", "logistic regression")
    mapping = align_classes(train_images, val_images)
    extract = (extraction or Extraction()).of(subject, resize_ratio=1.0)
    finetune = None
    if finetune_dataset is not None:
        finetune_images = make_dataset(finetune_dataset)
        labelled(finetune_images, "fine-tune", "logistic regression")
        classes = align_classes(train_images, finetune_images, "fine-tune")
        finetune = extract(finetune_images, "fine-tune features").with_classes(classes)
    train = extract(train_images, "train features")
    val = extract(val_images, "val features").with_classes(mapping)
    result = evaluate_logreg(train, val, finetune, settings, device=fit_on or extract.device)
    evaluation = Evaluation(
        **_origin(subject, "logreg", extract, train_dataset, val_dataset),
        settings={**asdict(settings), **_settings(extract), "finetune_dataset": finetune_dataset},
        rows=(Row.of(f"C={result.best_C:.3g}", result.accuracy, train_images.class_names),),
        extra={"best_C": result.best_C, "sweep": {f"{C:.6g}": top1 for C, top1 in result.sweep.items()}},
    )
    lines = [{"top-1": result.accuracy.top1}, {"top-5": result.accuracy.top5}, {"best_C": result.best_C}]
    return report(subject, evaluation, lines, output_dir)


def run_linear(
    subject: Subject,
    train_dataset: str,
    val_dataset: str,
    *,
    test_sets: Sequence[TestSet] = (),
    val_mapping: Path | None = None,
    head: torch.nn.Linear | None = None,
    settings: LinearSettings | None = None,
    extraction: Extraction | None = None,
    output_dir: Path | None = None,
    resume: bool = True,
) -> Evaluation:
    """Linear probe (`eval.linear`), or, where a trained `head` is given, its accuracy without any training.

    Args:
        test_sets: measured with the best head (or `head`) besides val.
        val_mapping: class mapping of the val dataset, for a `head` of more classes.

    Raises:
        DataError: datasets, labels or mappings that are missing or do not fit each other.
    """
    settings = settings or LinearSettings()
    val_images = make_dataset(val_dataset)
    labelled(val_images, "val", "a linear probe")
    for test in test_sets:  # before anything expensive
        if test.labels is not None:
            read_labels(test.labels, make_dataset(test.dataset))
    extract = (extraction or Extraction()).of(subject, detailed=True)
    folder = subject.output_dir("linear", output_dir)
    notes: tuple[str, ...] = ()
    extra: dict[str, Any] = {}
    names: tuple[str, ...] = ()
    if head is None:
        train_images = make_dataset(train_dataset)
        targets = labelled(train_images, "train", "a linear probe")
        n_classes, names = int(targets.max()) + 1, train_images.class_names
        val = extract(val_images, "val features").with_classes(align_classes(train_images, val_images))
        result = evaluate_linear(extract, train_images, n_classes, val, settings, folder=folder, resume=resume)
        best, accuracy, head = result.best, result.accuracy, result.head
        extra["heads"] = {name: each.top1 for name, each in result.heads.items()}
        notes = (FROZEN_CROPS,) if settings.frozen_crops else ()
        _save_head(folder, head)
    else:
        best, head = "given head", head.to(extract.device)
        accuracy = _measure(extract, head, TestSet(val_dataset, settings.metric, val_mapping), val_images)
    rows = [Row.of(best, accuracy, names)]
    lines: list[dict[str, Any]] = [{"best_classifier": {"name": best, "accuracy": accuracy.top1 / 100}}]
    for test in test_sets:
        on_test = _measure(extract, head, test, make_dataset(test.dataset), names)
        rows.append(Row.of(f"{test.dataset} ({test.metric})", on_test, names))
        lines.append({f"{test.dataset}_accuracy": on_test.top1})
    evaluation = Evaluation(
        **_origin(subject, "linear", extract, train_dataset, val_dataset),
        settings={**asdict(settings), **_settings(extract), "given_head": not extra},
        rows=tuple(rows),
        notes=notes,
        extra=extra,
    )
    return report(subject, evaluation, lines, output_dir)


def evaluate_teacher(
    checkpoint: Path, config: "Config", tasks: Sequence[str], *, device: str | None = None
) -> list[Evaluation]:
    """What `evaluation.tasks` asks for, on a teacher that a training has just written.

    A task that cannot be done (its data are gone, say) is reported and left out: training goes on.
    """
    subject = replace(load_subject(str(checkpoint)), config=config)
    done = []
    for task in tasks:
        try:
            datasets = datasets_for(config, None, None)
            done.append(TASKS[task](subject, *datasets, extraction=Extraction(device=device)))
        except Dino2Error as error:
            logger.error("evaluation.tasks: %s of %s failed: %s", task, checkpoint, error)
            continue
        for row in done[-1].rows:
            logger.info("%s after %s iterations, %s: top-1 %.2f %%", task, subject.iteration, row.name, row.top1)
    return done


TASKS: dict[str, Callable[..., Evaluation]] = {
    "knn": run_knn,
    "logreg": run_logreg,
    "linear": run_linear,
}
"""What `evaluation.tasks` may name."""


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


def _measure(
    extract: Extractor,
    head: torch.nn.Linear,
    test: TestSet,
    images: "ImageDataset",
    names: tuple[str, ...] = (),
) -> Accuracy:
    """Accuracy of one head on a test set; its classes are numbered by name where both have names."""
    features = extract(images, f"features of {test.dataset}")
    mapping = read_class_mapping(test.class_mapping, head.out_features) if test.class_mapping else None
    if test.labels is not None:
        labels = read_labels(test.labels, images)
        features = replace(features, targets=labels[features.indices])
    elif test.metric is MetricType.IMAGENET_REAL_ACCURACY:
        raise DataError(f"{test.dataset}: {test.metric} needs a file of labels (--test-labels).")
    else:
        labelled(images, "test", "a linear probe")
        if mapping is None and names and set(images.class_names) < set(names):
            features = features.with_classes(torch.tensor([names.index(name) for name in images.class_names]))
    _check_classes(features, test, head.out_features if mapping is None else len(mapping))
    return measure_heads(head, features, test.metric, mapping)[0]


def _check_classes(features: Features, test: TestSet, n_classes: int) -> None:
    largest = int(features.targets.max())
    if largest >= n_classes:
        raise DataError(
            f"{test.dataset} has a class {largest}, but the classifier has {n_classes} classes, 0 to {n_classes - 1}.",
            hint="Give a class mapping, or a head for these classes.",
        )


def _save_head(folder: Path | None, head: torch.nn.Linear) -> None:
    """Keep the best head as `best_head.pth`, in the layout of the released heads; `--head` takes it."""
    if folder is None or not distributed.is_main():
        return
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / "best_head.pth.tmp"
    torch.save({"weight": head.weight.detach().cpu(), "bias": head.bias.detach().cpu()}, aside)
    os.replace(aside, folder / "best_head.pth")


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
    return {"image_size": extract.image_size, "resize": extract.resize, "precision": str(extract.precision.dtype)}
