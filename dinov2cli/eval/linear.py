"""Linear probe of frozen features, to the protocol of the DINOv2 paper (section 7, "Linear classification").

Heads for 13 learning rates on four kinds of features are trained side by side; the best on val is what counts, and is
what further test sets are measured with.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dinov2cli import distributed
from dinov2cli.console import logger
from dinov2cli.data.datasets import ImageDataset, make_dataset
from dinov2cli.data.decoding import Reading
from dinov2cli.data.randomness import Stream, keyed_rng
from dinov2cli.data.transforms import RandomResizedCrop
from dinov2cli.eval.extract import Extractor
from dinov2cli.eval.features import Features
from dinov2cli.eval.linear_heads import (
    LEARNING_RATES,
    N_BLOCKS,
    HeadTrainer,
    LinearHeads,
    TestSet,
    accuracy_on,
    best_head,
    measure_heads,
    read_labels,
    test_sets_of,
)
from dinov2cli.eval.metrics import Accuracy, MetricType
from dinov2cli.eval.probe import (
    Batch,
    Parts,
    ProbeCheckpoint,
    frozen_batches,
    random_batches,
    train_heads,
    write_from_one_process,
)
from dinov2cli.eval.protocol import Subject, Trial, align_classes, labelled
from dinov2cli.eval.reports import Evaluation, Row
from dinov2cli.models.classifier import read_linear_head
from dinov2cli.requests.eval import LinearRequest

CHECKPOINT = "running_checkpoint_linear_eval.pth"
BEST_HEAD = "best_head.pth"
"""The best head in the layout of the released heads; `--head` takes it."""
FROZEN_CROPS = "approximation: trained on centre crops only (--frozen-crops), not on random crops as in the protocol"


@dataclass(frozen=True)
class LinearSettings:
    """What may be chosen in the protocol; the defaults are the paper's and the reference implementation's.

    Args:
        batch_size: images in a step on each process.
        eval_period: iterations between measurements on val while training; 0 for none.
        checkpoint_period: iterations between checkpoints to resume from.
        frozen_crops: train on the features of the centre crops instead of random crops: an approximation.
        seed: of the heads' start and of the order and crops of the images.
    """

    epochs: int = 10
    epoch_length: int = 1250
    batch_size: int = 128
    learning_rates: tuple[float, ...] = LEARNING_RATES
    n_blocks: tuple[int, ...] = N_BLOCKS
    eval_period: int = 1250
    checkpoint_period: int = 1250
    metric: MetricType = MetricType.MEAN_ACCURACY
    frozen_crops: bool = False
    seed: int = 0

    @property
    def iterations(self) -> int:
        """Steps in all."""
        return self.epochs * self.epoch_length


class LinearResult(NamedTuple):
    """The best head on val, its accuracy, and the accuracy of every head by name."""

    best: str
    accuracy: Accuracy
    heads: dict[str, Accuracy]
    head: nn.Linear


def run(request: LinearRequest, subject: Subject | None = None) -> Evaluation:
    """Linear probe, or, where a trained head is given, its accuracy without any training.

    Raises:
        Dino2Error: weights, datasets, labels or mappings that are missing or do not fit each other.
    """
    settings = LinearSettings(
        epochs=request.epochs,
        epoch_length=request.epoch_length,
        batch_size=request.batch_size,
        learning_rates=request.learning_rates,
        eval_period=request.eval_period_iterations,
        checkpoint_period=request.save_checkpoint_frequency * request.epoch_length,
        metric=MetricType(request.val_metric_type),
        frozen_crops=request.frozen_crops,
    )
    test_sets = test_sets_of(request)
    trial = Trial.of(request, subject)
    val_images = labelled(trial.val_dataset, "val", "a linear probe")
    for test in test_sets:  # before anything expensive
        if test.labels is not None:
            read_labels(test.labels, make_dataset(test.dataset))
    extract = trial.extractor(256, detailed=True)
    notes: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    extra: dict[str, Any] = {}
    leak = None
    if request.head is None:
        if trial.folder is None:
            logger.warning("%s is in no run: the head is not kept, and a probe cut short begins anew; --output-dir DIR "
                           "keeps both", request.checkpoint)  # fmt: skip
        train_images = labelled(trial.train_dataset, "train", "a linear probe")
        leak = trial.overlap(train_images, val_images)
        n_classes, names = int(torch.as_tensor(train_images.targets()).max()) + 1, train_images.class_names
        val = extract(val_images, "val features").with_classes(align_classes(train_images, val_images))
        resume = not request.no_resume
        result = evaluate_linear(extract, train_images, n_classes, val, settings, folder=trial.folder, resume=resume)
        best, accuracy, head = result.best, result.accuracy, result.head
        extra = {"heads": {name: each.top1 for name, each in result.heads.items()}}
        notes = (FROZEN_CROPS,) if settings.frozen_crops else ()
        if trial.folder is not None:
            write_from_one_process(
                trial.folder / BEST_HEAD, {"weight": head.weight.detach().cpu(), "bias": head.bias.detach().cpu()}
            )
    else:
        best, head = "given head", read_linear_head(request.head, request.head_layers).to(extract.device)
        on_val = TestSet(trial.val_dataset, settings.metric, request.val_class_mapping_fpath)
        accuracy = accuracy_on(on_val, extract, head)
    rows = [Row.of(best, accuracy, names)]
    lines: list[dict[str, Any]] = [{"best_classifier": {"name": best, "accuracy": accuracy.top1 / 100}}]
    for test in test_sets:
        on_test = accuracy_on(test, extract, head, names)
        rows.append(Row.of(f"{test.dataset} ({test.metric})", on_test, names))
        lines.append({f"{test.dataset}_accuracy": on_test.top1})
    chosen = asdict(settings)
    return trial.report(extract, chosen, rows, lines, notes=notes, extra=extra, leak=leak, given_head=not extra)


def evaluate_linear(
    extract: Extractor,
    train_images: ImageDataset,
    n_classes: int,
    val: Features,
    settings: LinearSettings | None = None,
    *,
    folder: Path | None = None,
    resume: bool = True,
) -> LinearResult:
    """Train all heads, measure them on val and choose the best.

    Args:
        extract: extracts detailed features (`Extractor(detailed=True)`).
        train_images: labelled images, classes 0 to n_classes - 1.
        val: detailed features of the images to choose the best head on.
        folder: where a checkpoint is kept, and resumed from if `resume`.

    Raises:
        CheckpointError: the checkpoint in `folder` is of other settings.
    """
    settings = settings or LinearSettings()
    depth, width = val.tensors["last_cls"].shape[1:]
    heads = LinearHeads(
        width,
        n_classes,
        learning_rates=settings.learning_rates,
        batch=settings.batch_size * distributed.world_size(),
        n_blocks=sorted({min(n, depth) for n in settings.n_blocks}),
        generator=torch.Generator().manual_seed(settings.seed),
    ).to(extract.device)
    trainer = HeadTrainer(heads, settings.iterations)
    checkpoint = ProbeCheckpoint(folder / CHECKPOINT, _identity(heads, settings)) if folder else None
    start = checkpoint.resume(trainer) if resume and checkpoint else 0

    def look(done: int, loss: Tensor) -> None:
        if settings.eval_period and done % settings.eval_period == 0 and done < settings.iterations:
            name, accuracy = best_head(heads, measure_heads(heads, val, settings.metric))
            logger.info("iteration %d: loss %.4f, best %s: %.2f %%", done, float(loss), name, accuracy.top1)

    iterations = range(start, settings.iterations)
    batches = batches_of(extract, train_images, settings, iterations)
    train_heads(trainer, batches, iterations, checkpoint, settings.checkpoint_period, look)
    accuracies = measure_heads(heads, val, settings.metric)
    best, accuracy = best_head(heads, accuracies)
    return LinearResult(best, accuracy, dict(zip(heads.names, accuracies, strict=True)), heads.head(best))


def batches_of(
    extract: Extractor, images: ImageDataset, settings: LinearSettings, iterations: range
) -> Iterator[Batch]:
    """Features of random crops (8 to 100 % of the area, flipped half the time), or of centre crops, extracted once."""
    crop = RandomResizedCrop(extract.image_size, extract.images.statistics)
    sample = partial(_cropped, images, crop, extract.reading, settings.seed)
    parts = Parts(images, sample, settings.seed, settings.batch_size)
    if not settings.frozen_crops:
        return random_batches(extract, parts, iterations)
    features, targets = extract(images, "train features"), torch.as_tensor(images.targets())
    return frozen_batches(parts, features, lambda index: targets[index], iterations, extract.device)


def _cropped(
    images: ImageDataset, crop: RandomResizedCrop, reading: Reading, seed: int, k: int, index: int
) -> tuple[Tensor, Tensor]:
    """A crop of the image `index` for the sample `k`, and its class."""
    pixels = crop(images.image(index, reading), keyed_rng(seed, Stream.LINEAR_PROBE, k))
    return pixels, torch.tensor(images.target(index))


def _identity(heads: LinearHeads, settings: LinearSettings) -> dict[str, Any]:
    ignored = ("eval_period", "checkpoint_period", "metric")
    chosen = {key: value for key, value in asdict(settings).items() if key not in ignored}
    return {**chosen, "heads": heads.names, "n_classes": heads.n_classes, "processes": distributed.world_size()}
