"""k-NN classification of frozen features, to the protocol of the DINOv2 paper (section 7, "k-NN").

The neighbours of an image vote for their classes with weights softmax(similarity / T) over the cosine similarities of
the `cls` features. Shapes: Q queries, N train images, D features, C classes, k neighbours.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2cli import distributed
from dinov2cli.console import few, logger, progress, stoppable
from dinov2cli.data.datasets import ImageDataset
from dinov2cli.errors import DataError
from dinov2cli.eval.baselines import Compared, compared, drawn_in_words
from dinov2cli.eval.extract import Extractor
from dinov2cli.eval.features import Features
from dinov2cli.eval.leaks import same_images
from dinov2cli.eval.metrics import Accuracy, AccuracyMeter
from dinov2cli.eval.nearest import KeyBank, Neighbours
from dinov2cli.eval.protocol import Subject, Trial, align_classes, check_labels, labelled
from dinov2cli.eval.reports import Evaluation, Row
from dinov2cli.requests.eval import KnnRequest

LEAVE_ONE_OUT = "train and val are the same images; each is classified by the others (leave-one-out)"
FILLED_UP = "top-5 of fewer than five classes with a vote, filled up as in the reference implementation"
ONLINE_LARGEST = 512 << 20
"""Bytes of the baselines' features while a training has its own memory."""
KnnResults = dict[tuple[str, int], Accuracy]
"""(`full` or `<n> per class`, k) -> accuracy."""


@dataclass(frozen=True)
class KnnSettings:
    """What may be chosen in the protocol; the defaults are the paper's and the reference implementation's.

    Args:
        n_per_class: train images of each class, chosen at random `n_tries` times; -1 for all.
    """

    ks: tuple[int, ...] = (10, 20, 100, 200)
    temperature: float = 0.07
    n_per_class: tuple[int, ...] = (-1,)
    n_tries: int = 1


def run(request: KnnRequest, subject: Subject | None = None) -> Evaluation:
    """k-NN of `cls` features: 256/224 resize, centre crop; leave-one-out where train and val are the same images.

    Raises:
        Dino2Error: weights or datasets that are missing, empty, or do not fit each other.
    """
    settings = KnnSettings(request.nb_knn, request.temperature, request.n_per_class_list, request.n_tries)
    trial = Trial.of(request, subject)
    train_images = labelled(trial.train_dataset, "train", "k-NN")
    val_images = labelled(trial.val_dataset, "val", "k-NN")
    mapping = align_classes(train_images, val_images)
    leave_one_out = same_images(train_images, val_images)
    if leave_one_out:
        logger.info("k-NN: %s", LEAVE_ONE_OUT)
    leak = None if leave_one_out else trial.overlap(train_images, val_images)
    extract = trial.extractor(request.batch_size)
    val = train = extract(train_images, "train features")
    if not leave_one_out:
        val = extract(val_images, "val features").with_classes(mapping)
    device = "cpu" if request.gather_on_cpu else extract.device
    results = evaluate_knn(train, val, settings, leave_one_out=leave_one_out, device=device)
    n_classes = len(set(train_images.targets().tolist()))
    rows, filled = [], []
    for (name, k), accuracy in results.items():
        row = Row.of(f"{name}, k={k}", accuracy)
        if min(k, n_classes) < 5:  # fewer than five classes can have a vote
            row = replace(row, top5=None)
        elif accuracy.filled:
            filled.append(f"{accuracy.filled:.3g} % ({row.name})")
        rows.append(row)
    extra: dict[str, Any] = {}
    if request.baselines:
        beside = compared(extract, train_images, None if leave_one_out else val_images, mapping, (train, val))
        extra["baselines"] = knn_beside(beside, settings, results, leave_one_out=leave_one_out, device=device)
    notes = [LEAVE_ONE_OUT] if leave_one_out else []
    if "baselines" in extra and (drawn := drawn_in_words(extra["baselines"], train.size, val.size)):
        notes.append(drawn)
    if filled:
        notes.append(f"{FILLED_UP}: {', '.join(filled)} of the images")
    lines = [{f"{key} Top {n}": getattr(results[key], f"top{n}")} for key in results for n in (1, 5)]
    notes += short_classes(distributed.all_gather_rows(train.targets), train_images.class_names, settings.n_per_class)
    return trial.report(
        extract, asdict(settings), rows, lines, notes=tuple(notes), extra=extra, leak=leak, leave_one_out=leave_one_out
    )


def evaluate_knn(
    train: Features,
    val: Features,
    settings: KnnSettings | None = None,
    *,
    leave_one_out: bool = False,
    device: torch.device | str = "cpu",
    warn: bool = True,
) -> KnnResults:
    """Accuracy of k-NN for every number of train images per class and every k; few-shot numbers are means over tries.

    Args:
        train: features of the train images; with several processes each holds its own part.
        val: features of the images to classify, likewise.
        leave_one_out: `val` is the train set itself, and no image may be its own neighbour.
        device: where similarities are computed. The features may lie elsewhere, and move chunk by chunk.
        warn: say what is left out; not again for other features of the same images.

    Raises:
        DataError: the two sets share no classes, or no k is at most the number of train images.
    """
    settings = settings or KnnSettings()
    labels, positions = distributed.all_gather_rows(train.targets), train.positions()
    val_labels = distributed.all_gather_rows(val.targets)
    _check_labels(labels, val_labels, warn)
    n_classes = 1 + int(max(labels.max(), val_labels.max()))
    exclude = val.indices if leave_one_out else None
    keys, queries = F.normalize(train.cls, dim=1), F.normalize(val.cls, dim=1)
    results: KnnResults = {}
    for n_per_class in settings.n_per_class:
        name = "full" if n_per_class < 0 else f"{n_per_class} per class"
        tries = []
        for seed in range(1 if n_per_class < 0 else settings.n_tries):
            chosen = choose_images(labels, n_per_class, seed)
            ks = usable_ks(settings.ks, n_per_class, len(chosen) - leave_one_out, warn)
            here = torch.isin(train.indices, positions[chosen])
            bank = KeyBank(keys[here], train.targets[here], train.indices[here], device)
            meter = AccuracyMeter(n_classes, n_heads=len(ks), device=str(bank.device))
            filled = torch.zeros(len(ks), dtype=torch.float64, device=bank.device)
            for found, targets in _neighbours(bank, queries, val.targets, max(ks), exclude):
                votes = knn_scores(found, ks, settings.temperature, n_classes)
                targets = targets.to(votes.device)
                meter.count(knn_hits(votes, targets), targets)
                filled += ((votes > 0).sum(-1) < min(5, n_classes)).sum(-1)
            shares = (100 * distributed.all_reduce_sum(filled) / len(val_labels)).tolist()
            measured = zip(meter.compute(), shares, strict=True)
            tries.append(dict(zip(ks, (each._replace(filled=share) for each, share in measured), strict=True)))
        results |= {(name, k): _mean([accuracies[k] for accuracies in tries]) for k in tries[0]}
    return results


def knn_beside(
    beside: Iterable[Compared],
    settings: KnnSettings,
    results: KnnResults,
    *,
    leave_one_out: bool,
    device: torch.device | str,
) -> dict[str, Any]:
    """The same with other features of the same images, as it stands in `results.json` under `baselines`.

    Returns:
        `top1`: by row (`full, k=10`) and name of the features, percent; `train_images` and `val_images`: how many.
    """
    top1: dict[str, dict[str, float]] = {f"{name}, k={k}": {} for name, k in results}
    for name, train, val in beside:
        logger.info("k-NN of %s", name)
        found = evaluate_knn(train, val, settings, leave_one_out=leave_one_out, device=device, warn=False)
        for group, k in results:
            top1[f"{group}, k={k}"][name] = found[group, k].top1
        sizes = {"train_images": train.size, "val_images": val.size}
    return {"top1": top1, **sizes}


def knn_scores(neighbours: Neighbours, ks: Sequence[int], temperature: float, n_classes: int) -> Tensor:
    """Votes for each class, for each k: float [len(ks), Q, C].

    The weights are a softmax over all given neighbours, then cut to the nearest k, as in the reference implementation.
    """
    weights = (neighbours.similarities / temperature).softmax(1)
    scores = weights.new_zeros((len(ks), len(weights), n_classes))
    for votes, k in zip(scores, ks, strict=True):
        votes.scatter_add_(1, neighbours.labels[:, :k], weights[:, :k])
    return scores


def knn_hits(votes: Tensor, targets: Tensor) -> Tensor:
    """Whether an image's class, int64 [Q], is the first, and is among the first five: bool [2, H, Q].

    As in the reference implementation: `argmax`, and `torch.topk`, in whose own order the classes without any vote fill
    up a top-5 that has fewer with one.
    """
    first_five = votes.topk(min(5, votes.shape[-1]), dim=-1).indices
    return torch.stack((votes.argmax(-1) == targets, (first_five == targets[:, None]).any(-1)))


def choose_images(labels: Tensor, n_per_class: int, seed: int) -> Tensor:
    """Positions of `n_per_class` random images of each class (all of a class that has fewer), ascending: int64 [n]."""
    if n_per_class < 0:
        return torch.arange(len(labels))
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label in labels.unique():
        images = (labels == label).nonzero()[:, 0]
        chosen.append(images[torch.randperm(len(images), generator=generator)[:n_per_class]])
    return torch.cat(chosen).sort().values


def short_classes(labels: Tensor, names: Sequence[str], n_per_class: Sequence[int]) -> tuple[str, ...]:
    """For each number of images per class, which classes have fewer, and how many, in words."""
    counts = dict(zip(*(found.tolist() for found in labels.unique(return_counts=True)), strict=True))
    notes = []
    for n in n_per_class:
        short = [f"{names[c] if names else c} ({count})" for c, count in counts.items() if count < n]
        if short:
            notes.append(f"{n} per class: {len(short)} of {len(counts)} classes have fewer train images: {few(short)}")
    return tuple(notes)


def usable_ks(ks: Sequence[int], n_per_class: int, n_images: int, warn: bool = True) -> tuple[int, ...]:
    """The k that make sense for `n_images`; in few-shot runs those up to n per class, and that number itself.

    A k above the number of train images is left out with a warning.
    """
    wanted = sorted({*ks} if n_per_class < 0 else {k for k in (*ks, n_per_class) if k <= n_per_class})
    usable = tuple(k for k in wanted if k <= n_images)
    if not usable:
        raise DataError(
            f"k-NN with k = {', '.join(map(str, wanted))} needs at least {min(wanted)} train images, "
            f"but there are {n_images}.",
            hint="Give a smaller k (--nb-knn) or a larger train dataset.",
        )
    if warn and len(usable) < len(wanted):
        dropped = ", ".join(str(k) for k in wanted if k not in usable)
        logger.warning("k-NN: left out k = %s, more than the %d train images", dropped, n_images)
    return usable


def online_knn(model: nn.Module, train_dataset: ImageDataset, val_dataset: ImageDataset, **options: Any) -> float:
    """Top-1 accuracy in percent of the 20 nearest neighbours: one number to follow during a training.

    `model` is left in the mode (training or not) in which it came. 20 is lowered to half of a smaller train set.
    `options` are the `Extractor`'s.
    """
    mapping = align_classes(train_dataset, val_dataset)
    was_training = model.training
    model.eval()
    try:
        extract = Extractor(model, num_workers=0, device=next(model.parameters()).device, **options)
        train = extract(train_dataset)
        same = same_images(train_dataset, val_dataset)
        val = train if same else extract(val_dataset).with_classes(mapping)
    finally:
        model.train(was_training)
    results = evaluate_knn(train, val, _online_settings(train), leave_one_out=same, device=extract.device)
    return next(iter(results.values())).top1


def online_baselines(
    model: nn.Module, train_dataset: ImageDataset, val_dataset: ImageDataset, **options: Any
) -> dict[str, Any]:
    """What `online_knn` finds with features that nobody has learned, as it stands in `knn_baselines.json`.

    Returns:
        `k`; `top1` by name, percent; `train_images` and `val_images`, drawn so that they take `ONLINE_LARGEST`;
        `classes` of val.
    """
    extract = Extractor(model, num_workers=0, device=next(model.parameters()).device, **options)
    same = same_images(train_dataset, val_dataset)
    mapping = align_classes(train_dataset, val_dataset)
    beside = list(compared(extract, train_dataset, None if same else val_dataset, mapping, largest=ONLINE_LARGEST))
    top1 = {}
    for name, train, val in beside:
        settings = _online_settings(train)
        (found,) = evaluate_knn(train, val, settings, leave_one_out=same, device=extract.device, warn=False).values()
        top1[name] = found.top1
    classes = len(distributed.all_gather_rows(val.targets).unique())
    sizes = {"train_images": train.size, "val_images": val.size, "classes": classes}
    return {"k": settings.ks[0], "top1": top1, **sizes}


def _online_settings(train: Features) -> KnnSettings:
    return KnnSettings(ks=(max(1, min(20, train.size // 2)),))


def _neighbours(
    bank: KeyBank, queries: Tensor, targets: Tensor, k: int, exclude: Tensor | None
) -> Iterator[tuple[Neighbours, Tensor]]:
    """Of this process's queries, block by block: their neighbours and targets. Ctrl-C ends it between two blocks."""
    block = int(-distributed.all_reduce_max(torch.tensor(-bank.query_block())))  # the smallest of all processes
    n_blocks = int(distributed.all_reduce_max(torch.tensor(-(-len(queries) // block))))
    with progress() as bar, stoppable() as stop_if_asked:
        for number in bar.track(range(n_blocks), description="k-NN"):
            here = slice(number * block, (number + 1) * block)
            # Every process searches its own keys for the queries of all, and then scores its own queries.
            sizes = distributed.all_gather_objects(len(queries[here]))
            excluded = None if exclude is None else distributed.all_gather_rows(exclude[here])
            found = bank.search(distributed.all_gather_rows(queries[here]), k, excluded)
            mine = slice(sum(sizes[: distributed.rank()]), sum(sizes[: distributed.rank() + 1]))
            yield Neighbours(found.similarities[mine], found.labels[mine]), targets[here]
            stop_if_asked()


def _mean(accuracies: Sequence[Accuracy]) -> Accuracy:
    n = len(accuracies)
    top1, top5, filled = (sum(getattr(a, name) for a in accuracies) / n for name in ("top1", "top5", "filled"))
    return Accuracy(top1, top5, accuracies[0].images, filled=filled)


def _check_labels(train: Tensor, val: Tensor, warn: bool) -> None:
    check_labels(train, "train dataset", "k-NN")
    check_labels(val, "val dataset", "k-NN")
    unknown = sorted(set(val.unique().tolist()) - set(train.unique().tolist()))
    if len(unknown) == len(val.unique()):
        raise DataError(
            f"The train and the val dataset have no class in common (val has the classes {unknown[:5]}...), "
            "so nothing can be classified."
        )
    if unknown and warn:
        logger.warning("k-NN: %d classes of val are not in train and count as misses: %s", len(unknown), unknown[:10])
