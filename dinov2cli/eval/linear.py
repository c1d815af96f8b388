"""Linear probe of frozen features, to the protocol of the DINOv2 paper (section 7, "Linear classification").

Heads for 13 learning rates on four kinds of features are trained side by side; the best on val is what counts, and is
what further test sets are measured with.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dinov2cli import distributed
from dinov2cli.console import Interrupted, interruption, logger, progress
from dinov2cli.data.randomness import Stream, keyed_rng
from dinov2cli.data.sampler import SampleOrder
from dinov2cli.data.transforms import RandomResizedCrop
from dinov2cli.data.workers import WorkerError, choose_workers, loader_errors, set_up_worker
from dinov2cli.errors import CheckpointError, Dino2Error
from dinov2cli.eval.extract import Extractor
from dinov2cli.eval.features import Features
from dinov2cli.eval.linear_heads import LEARNING_RATES, N_BLOCKS, HeadInput, HeadTrainer, LinearHeads, input_of_head
from dinov2cli.eval.metrics import Accuracy, AccuracyMeter, MetricType

if TYPE_CHECKING:
    from dinov2cli.data.datasets import ImageDataset

CHECKPOINT = "running_checkpoint_linear_eval.pth"
Batch = tuple[Mapping[str, Tensor], Tensor]
"""Features of a batch, on the device where the heads are, and targets [B]."""


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


def evaluate_linear(
    extract: Extractor,
    train_images: "ImageDataset",
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
    start = _resume(folder, trainer, settings) if resume and folder else 0
    make_batches = frozen_batches if settings.frozen_crops else cropped_batches
    batches = make_batches(extract, train_images, settings, start)
    message = "stopping after this step; the same command resumes" if folder else "stopping"
    with progress() as bar, interruption(message) as signals:
        task = bar.add_task("linear heads", total=settings.iterations, completed=start)
        for iteration, (features, targets) in enumerate(batches, start):
            loss = trainer.step(iteration, features, targets)
            bar.advance(task)
            done = iteration + 1
            if folder and (signals or done % settings.checkpoint_period == 0):
                _save(folder, trainer, settings, done)
            if signals:
                raise Interrupted(signals[0])
            if settings.eval_period and done % settings.eval_period == 0 and done < settings.iterations:
                name, accuracy = best_head(heads, measure_heads(heads, val, settings.metric))
                logger.info("iteration %d: loss %.4f, best %s: %.2f %%", done, float(loss), name, accuracy.top1)
    accuracies = measure_heads(heads, val, settings.metric)
    best, accuracy = best_head(heads, accuracies)
    return LinearResult(best, accuracy, dict(zip(heads.names, accuracies, strict=True)), heads.head(best))


def best_head(heads: LinearHeads, accuracies: list[Accuracy]) -> tuple[str, Accuracy]:
    """Name and accuracy of the head with the highest top-1; the first of equals."""
    at = max(range(len(accuracies)), key=lambda i: (accuracies[i].top1, -i))
    return heads.names[at], accuracies[at]


@torch.no_grad()
def measure_heads(
    heads: LinearHeads | nn.Linear,
    features: Features,
    metric: MetricType = MetricType.MEAN_ACCURACY,
    class_mapping: Tensor | None = None,
) -> list[Accuracy]:
    """Accuracies on detailed features of every head, or of one layer.

    Args:
        class_mapping: the classifier's class for each class of the images, int64 [C']; other classes cannot win.
    """
    if isinstance(heads, LinearHeads):
        device, n_heads, n_classes = heads.rates.device, len(heads.names), heads.n_classes
        classify: Any = heads
    else:
        device, n_heads, n_classes = heads.weight.device, 1, heads.out_features
        layer, sees = heads, _input_of(heads, features)

        def classify(batch: Mapping[str, Tensor]) -> Tensor:
            logits: Tensor = layer(sees.of(batch))
            return logits[None]

    meter = AccuracyMeter(n_classes if class_mapping is None else len(class_mapping), n_heads, metric, str(device))
    for rows in torch.arange(len(features.targets)).split(256):
        scores = classify({name: tensor[rows].to(device) for name, tensor in features.tensors.items()})
        if class_mapping is not None:
            scores = scores[:, :, class_mapping.to(device)]
        meter.update(scores, features.targets[rows])
    return meter.compute()


def _input_of(head: nn.Linear, features: Features) -> HeadInput:
    depth, width = features.tensors["last_cls"].shape[1:]
    return input_of_head(head, width, depth)


def cropped_batches(
    extract: Extractor, images: "ImageDataset", settings: LinearSettings, start: int
) -> Iterator[Batch]:
    """Features of random crops (8 to 100 % of the area, flipped half the time) of this process's part of each batch."""
    loader = DataLoader(
        _CroppedImages(images, extract.image_size, settings),
        batch_size=None,
        sampler=range(start, settings.iterations),
        num_workers=choose_workers(extract.num_workers),
        worker_init_fn=set_up_worker,
    )
    with loader_errors():
        for batch in loader:
            if isinstance(batch, WorkerError):
                raise batch.error
            pixels, targets = batch
            yield extract.features_of(pixels), targets.to(extract.device)


def frozen_batches(extract: Extractor, images: "ImageDataset", settings: LinearSettings, start: int) -> Iterator[Batch]:
    """Features of centre crops, extracted once, in the same order of images as with random crops."""
    part = extract(images, "train features")
    tensors = {name: distributed.all_gather_rows(tensor) for name, tensor in part.tensors.items()}
    targets = distributed.all_gather_rows(part.targets)
    order = SampleOrder(part.size, settings.seed)

    def batch(iteration: int) -> Batch:
        rows = torch.tensor([order.index(k) for k in _samples_of(iteration, settings.batch_size)])
        features = {name: tensor[rows].to(extract.device) for name, tensor in tensors.items()}
        return features, targets[rows].to(extract.device)

    return map(batch, range(start, settings.iterations))


class _CroppedImages(Dataset[tuple[Tensor, Tensor] | WorkerError]):
    """Item i is this process's part of the batch of iteration i: float32 [B, 3, S, S], int64 [B]."""

    def __init__(self, images: "ImageDataset", size: int, settings: LinearSettings) -> None:
        self.images = images
        self.crop = RandomResizedCrop(size)
        self.order = SampleOrder(len(images), settings.seed)
        self.seed, self.batch_size = settings.seed, settings.batch_size
        self.rank, self.world_size = distributed.rank(), distributed.world_size()

    def __getitem__(self, iteration: int) -> tuple[Tensor, Tensor] | WorkerError:
        first = (iteration * self.world_size + self.rank) * self.batch_size
        pixels, targets = [], []
        try:
            for k in range(first, first + self.batch_size):
                index = self.order.index(k)
                rng = keyed_rng(self.seed, Stream.LINEAR_PROBE, k)
                pixels.append(self.crop(self.images.image(index), rng))
                targets.append(self.images.target(index))
        except Dino2Error as error:
            return WorkerError(error)
        return torch.stack(pixels), torch.tensor(targets)


def _samples_of(iteration: int, batch_size: int) -> range:
    first = (iteration * distributed.world_size() + distributed.rank()) * batch_size
    return range(first, first + batch_size)


def _identity(heads: LinearHeads, settings: LinearSettings) -> dict[str, Any]:
    ignored = ("eval_period", "checkpoint_period", "metric")
    chosen = {key: value for key, value in asdict(settings).items() if key not in ignored}
    return {**chosen, "heads": heads.names, "n_classes": heads.n_classes, "processes": distributed.world_size()}


def _save(folder: Path, trainer: HeadTrainer, settings: LinearSettings, iteration: int) -> None:
    if not distributed.is_main():
        return
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f"{CHECKPOINT}.tmp"
    state = {
        "identity": _identity(trainer.heads, settings),
        "iteration": iteration,
        "heads": trainer.heads.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
    }
    torch.save(state, aside)
    os.replace(aside, folder / CHECKPOINT)


def _resume(folder: Path, trainer: HeadTrainer, settings: LinearSettings) -> int:
    """Load the checkpoint in `folder`, if there is one; the iteration to go on with."""
    path = folder / CHECKPOINT
    if not path.exists():
        return 0
    device = trainer.heads.rates.device
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        identity = state["identity"]
    except (OSError, RuntimeError, ValueError, KeyError, EOFError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}).", hint="Delete it, or give --no-resume.") from None
    now = _identity(trainer.heads, settings)
    for key, value in now.items():
        if identity.get(key) != value:
            raise CheckpointError(
                f"{path} belongs to a probe with {key}={identity.get(key)}; this one has {key}={value}.",
                hint="Give --no-resume to start anew, or another --output-dir.",
            )
    trainer.heads.load_state_dict(state["heads"])
    trainer.optimizer.load_state_dict(state["optimizer"])
    logger.info("linear heads: resumed at iteration %d", state["iteration"])
    return int(state["iteration"])
