"""Logistic regression on frozen features, to the protocol of the DINOv2 evaluation.

C is chosen among 45 values on held-out images: a fine-tune set, the val set if so wished, or a random tenth of the
train set. With it the classifier is fitted again to all images but those of val, and measured on val. The reference
implementation fits every C in float64. Here all are fitted in float32, and again in float64 those that come within a
few images of the best, so that the choice is that of float64.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dinov2cli import distributed
from dinov2cli.console import counting, logger
from dinov2cli.errors import DataError
from dinov2cli.eval.features import Features
from dinov2cli.eval.metrics import Accuracy, AccuracyMeter, MetricType
from dinov2cli.eval.protocol import Subject, Trial, align_classes, labelled
from dinov2cli.eval.reports import Evaluation, Row
from dinov2cli.eval.softmax_regression import Classifiers, fit
from dinov2cli.requests.eval import LogregRequest

C_VALUES = tuple((10 ** torch.linspace(-6, 5, 45, dtype=torch.float64)).tolist())
CONTENDERS = 0.02
"""Percent of the images, and at least two images, by which a C may be behind in float32 and still be the best."""


@dataclass(frozen=True)
class LogregSettings:
    """What may be chosen in the protocol; the defaults are the reference implementation's."""

    Cs: tuple[float, ...] = C_VALUES
    max_iter: int = 1000
    tol: float = 1e-12
    dtype: str = "float64"  # float32 saves the second look at the best values of C as well
    finetune_on_val: bool = False
    metric: MetricType = MetricType.MEAN_ACCURACY


class LogregResult(NamedTuple):
    """Accuracy on val, the C it was reached with, and the accuracy of each C on the images it was chosen on."""

    accuracy: Accuracy
    best_C: float  # noqa: N815 (the field's letter)
    sweep: dict[float, float]
    classifier: Classifiers


def run(request: LogregRequest, subject: Subject | None = None) -> Evaluation:
    """Logistic regression on `cls` features; images are resized to the crop's size, 224.

    Raises:
        Dino2Error: weights or datasets that are missing, empty, or do not fit each other.
    """
    settings = LogregSettings(
        max_iter=request.max_train_iters,
        dtype=request.train_dtype,
        finetune_on_val=request.finetune_on_val,
        metric=MetricType(request.metric_type),
    )
    trial = Trial.of(request, subject)
    train_images = labelled(trial.train_dataset, "train", "logistic regression")
    val_images = labelled(trial.val_dataset, "val", "logistic regression")
    mapping = align_classes(train_images, val_images)
    leak = trial.overlap(train_images, val_images)
    extract = trial.extractor(request.batch_size, resize_ratio=1.0)
    finetune = None
    if request.finetune_dataset is not None:
        images = labelled(request.finetune_dataset, "fine-tune", "logistic regression")
        classes = align_classes(train_images, images, "fine-tune")
        finetune = extract(images, "fine-tune features").with_classes(classes)
    train = extract(train_images, "train features")
    val = extract(val_images, "val features").with_classes(mapping)
    result = evaluate_logreg(train, val, finetune, settings, device=request.train_features_device or extract.device)
    return trial.report(
        extract,
        asdict(settings),
        [Row.of(f"C={result.best_C:.3g}", result.accuracy, train_images.class_names)],
        [{"top-1": result.accuracy.top1}, {"top-5": result.accuracy.top5}, {"best_C": result.best_C}],
        extra={"best_C": result.best_C, "sweep": {f"{C:.6g}": top1 for C, top1 in result.sweep.items()}},
        leak=leak,
        finetune_dataset=request.finetune_dataset,
    )


def evaluate_logreg(
    train: Features,
    val: Features,
    finetune: Features | None = None,
    settings: LogregSettings | None = None,
    *,
    device: torch.device | str = "cpu",
) -> LogregResult:
    """Choose C, fit, measure. With several processes each holds its own part of every set.

    Raises:
        DataError: fewer than two classes, or too few train images to hold a tenth out.
    """
    settings = settings or LogregSettings()
    n_classes = 1 + max(_largest(part) for part in (train, val, finetune) if part is not None)
    fitted_on, chosen_on = train, val if finetune is None else finetune
    if finetune is None and not settings.finetune_on_val:
        fitted_on, chosen_on = hold_out_tenth(train)
    _, accuracies = sweep(fitted_on, chosen_on, settings, n_classes, device=device)
    scores = [accuracy.top1 for accuracy in accuracies]
    best = scores.index(max(scores))  # of equals the smallest C, the most regularised
    best_C = settings.Cs[best]
    logger.info("logistic regression: C = %.3g is best with %.2f %%", best_C, scores[best])
    final = _fit([train] if finetune is None else [train, finetune], [best_C], settings, device)
    (accuracy,) = measure(final, val, n_classes, settings.metric)
    return LogregResult(accuracy, best_C, dict(zip(settings.Cs, scores, strict=True)), final)


def sweep(
    train: Features, chosen_on: Features, settings: LogregSettings, n_classes: int, device: torch.device | str = "cpu"
) -> tuple[Classifiers, list[Accuracy]]:
    """Classifiers for all C, and their accuracies on the images that C is chosen on."""
    rough = _fit([train], settings.Cs, replace(settings, dtype="float32"), device)
    accuracies = measure(rough, chosen_on, n_classes, settings.metric)
    if settings.dtype == "float32":
        return rough, accuracies
    margin = max(CONTENDERS, 200 / max(1, accuracies[0].images))
    needed = max(accuracy.top1 for accuracy in accuracies) - margin - 1e-9
    contenders = [i for i, accuracy in enumerate(accuracies) if accuracy.top1 >= needed]
    Cs = [settings.Cs[i] for i in contenders]
    exact = _fit([train], Cs, settings, device, ftol=1e-9, start=rough.select(contenders))
    for i, accuracy in zip(contenders, measure(exact, chosen_on, n_classes, settings.metric), strict=True):
        accuracies[i] = accuracy
    rough.weight[contenders], rough.bias[contenders] = exact.weight, exact.bias
    return rough, accuracies


def hold_out_tenth(features: Features) -> tuple[Features, Features]:
    """A random tenth of the images taken out: (the rest, the tenth). The same images whatever the processes."""
    order = torch.randperm(features.size, generator=torch.Generator().manual_seed(0))
    held = torch.zeros(features.size, dtype=torch.bool)
    held[order[: features.size // 10]] = True
    if not held.any():
        raise DataError(f"{features.size} train images are too few to choose C on a tenth of them; give at least 10.")
    here = held[torch.searchsorted(features.positions(), features.indices)]
    return _select(features, ~here), _select(features, here)


def measure(classifiers: Classifiers, features: Features, n_classes: int, metric: MetricType) -> list[Accuracy]:
    """Accuracy of every classifier on `features`."""
    device = classifiers.weight.device
    meter = AccuracyMeter(n_classes, len(classifiers.Cs), metric, device=str(device))
    for cls, targets in zip(features.cls.split(512), features.targets.split(512), strict=True):
        meter.update(classifiers.scores(cls.to(device), n_classes), targets)
    return meter.compute()


def _fit(
    parts: Sequence[Features], Cs: Sequence[float], settings: LogregSettings, device: torch.device | str, **options: Any
) -> Classifiers:
    """`softmax_regression.fit` on all parts together, by the settings; further options are `fit`'s."""
    features, targets = torch.cat([part.cls for part in parts]), torch.cat([part.targets for part in parts])
    options |= {"max_iter": settings.max_iter, "tol": settings.tol, "dtype": getattr(torch, settings.dtype)}
    with counting("logistic regression") as advance:  # who knows how many steps it takes
        return fit(features.to(device), targets.to(device), Cs, after_step=partial(advance, 1), **options)


def _select(features: Features, mask: Tensor) -> Features:
    tensors = {name: tensor[mask] for name, tensor in features.tensors.items()}
    size = int(distributed.all_reduce_sum(mask.sum()))
    return Features(tensors, features.targets[mask], features.indices[mask], size)


def _largest(features: Features) -> int:
    here = features.targets.max() if len(features.targets) else torch.tensor(-1)
    return int(distributed.all_reduce_max(here.clone()))
