"""Retrieval by the cosine of class tokens: mean average precision and recall@k of labelled sets, and the protocol of
Revisited Oxford and Paris (Radenovic et al., 2018).

Shapes: Q queries, N images of the database, D features.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2cli import distributed
from dinov2cli.console import counting
from dinov2cli.data.datasets.revisited import Truth, read_revisited
from dinov2cli.errors import DataError
from dinov2cli.eval.extract import Extractor
from dinov2cli.eval.features import Features
from dinov2cli.eval.leaks import same_images
from dinov2cli.eval.protocol import Subject, Trial, align_classes, labelled
from dinov2cli.eval.reports import Evaluation, Row
from dinov2cli.files import user_path
from dinov2cli.requests.retrieval import RetrievalRequest

LEAVE_ONE_OUT = "train and val are the same images; each queries the others (leave-one-out)"
SCORES_AT_ONCE = {"cpu": 1 << 21, "cuda": 1 << 26}
"""Scores that are sorted together."""
SETUPS = {
    "easy": (("easy",), ("junk", "hard")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
}
"""Of Revisited: what is to be found, and what is taken out of the ranking."""


class Ranked(NamedTuple):
    """Of each query, NaN where there is nothing to find: average precision, by k whether one of the first k is to be
    found (recall@k), and the share of these that are (precision@k; of Revisited k is at most the last one's rank)."""

    average_precision: Tensor  # float64 [Q]
    recall: Tensor  # float64 [Q, K]
    precision: Tensor  # float64 [Q, K]


def run(request: RetrievalRequest, subject: Subject | None = None) -> Evaluation:
    """Retrieval of labelled images, or of Revisited Oxford or Paris.

    Raises:
        Dino2Error: weights or datasets that are missing, or of which nothing can be found.
    """
    settings = request.model_dump(include={"recall_at", "whole", "query_boxes"})
    trial = Trial.of(request, subject)
    sizes = {"whole": True, "resize_ratio": 1.0} if request.whole else {}
    extract = trial.extractor(request.batch_size, **sizes)
    rows, notes = (_of_revisited if request.is_revisited else _of_classes)(trial, extract, request)
    lines = [{f"{row.name} {name}": value for row in rows for name, value in row.measured.items()}]
    return trial.report(extract, settings, rows, lines, notes=notes)


def _of_classes(trial: Trial, extract: Extractor, request: RetrievalRequest) -> tuple[list[Row], tuple[str, ...]]:
    train_images = labelled(trial.train_dataset, "train", "retrieval")
    val_images = labelled(trial.val_dataset, "val", "retrieval")
    mapping = align_classes(train_images, val_images)
    among_themselves = same_images(train_images, val_images)
    train = extract(train_images, "database")
    queries = train if among_themselves else extract(val_images, "queries").with_classes(mapping)
    ranked = rank_classes(train, queries, request.recall_at, leave_one_out=among_themselves, device=extract.device)
    found = ranked.average_precision.isfinite()
    if not found.any():
        raise DataError(f"{trial.val_dataset}: no image of the class of any query can be found.")
    scores = {"mAP %": _percent(ranked.average_precision)}
    scores |= {f"R@{k} %": _percent(column) for k, column in zip(request.recall_at, ranked.recall.T, strict=True)}
    notes = (LEAVE_ONE_OUT,) if among_themselves else ()
    if alone := int((~found).sum()):
        notes = (*notes, f"{alone} of {len(found)} queries are the only ones of their class, and are left out")
    return [Row("same class", scores=scores, images=int(found.sum()))], notes


def _of_revisited(trial: Trial, extract: Extractor, request: RetrievalRequest) -> tuple[list[Row], tuple[str, ...]]:
    benchmark = read_revisited(user_path(trial.val_dataset), boxes=request.query_boxes)
    database, queries = extract(benchmark.database, "database"), extract(benchmark.queries, "queries")
    for each, images in ((database, benchmark.database), (queries, benchmark.queries)):
        if each.size < len(images):  # a row that is missing would shift all that follow
            raise DataError(f"{images.describe()}: {len(images) - each.size} cannot be read; the benchmark needs all.")
    keys, wanted = (distributed.all_gather_rows(F.normalize(each.cls, dim=1)) for each in (database, queries))
    similarity = wanted.to(extract.device) @ keys.to(extract.device).T
    rows = []
    for setup in SETUPS:
        ranked = rank_revisited(similarity, benchmark.truths, setup, request.recall_at)
        precision = zip(request.recall_at, ranked.precision.T, strict=True)
        scores = {"mAP %": _percent(ranked.average_precision)} | {
            f"mP@{k} %": _percent(column) for k, column in precision
        }
        rows.append(Row(setup, scores=scores, images=int(ranked.average_precision.isfinite().sum())))
    return rows, ()


def rank_revisited(similarity: Tensor, truths: Sequence[Truth], setup: str, ks: Sequence[int]) -> Ranked:
    """The benchmark's measures of one of `SETUPS`.

    Args:
        similarity: [Q, N].
    """
    to_find, left_out = SETUPS[setup]
    relevant, junk = (torch.zeros(similarity.shape, dtype=torch.bool, device=similarity.device) for _ in range(2))
    for query, truth in enumerate(truths):
        for mask, grades in ((relevant, to_find), (junk, left_out)):
            for grade in grades:
                mask[query, torch.from_numpy(getattr(truth, grade)).to(mask.device)] = True
    return rank(similarity, relevant, ks, junk & ~relevant, up_to_the_last=True)


def rank_classes(
    train: Features,
    queries: Features,
    ks: Sequence[int],
    *,
    leave_one_out: bool = False,
    device: torch.device | str = "cpu",
) -> Ranked:
    """Measures of the queries of all processes, in their order; those of the same class are to be found. Collective."""
    keys, labels, ids = (distributed.all_gather_rows(each) for each in (train.cls, train.targets, train.indices))
    keys, labels, ids = F.normalize(keys, dim=1).to(device), labels.to(device), ids.to(device)
    mine = F.normalize(queries.cls, dim=1).to(device)
    targets, own = queries.targets.to(device), queries.indices.to(device)
    parts = [
        rank(
            mine[which] @ keys.T,
            labels == targets[which, None],
            ks,
            ids == own[which, None] if leave_one_out else None,
        )
        for which in _blocks(len(mine), len(keys), torch.device(device))
    ]
    columns = (torch.cat(column) for column in zip(*parts, strict=True))
    return Ranked(*(distributed.all_gather_rows(column.cpu()) for column in columns))


def rank(
    similarity: Tensor,
    relevant: Tensor,
    ks: Sequence[int],
    left_out: Tensor | None = None,
    *,
    up_to_the_last: bool = False,
) -> Ranked:
    """Measures of rankings by similarity [Q, N], ties by row.

    Average precision is the area under the trapezoids: the mean over what is to be found of the precisions just before
    it and at it.

    Args:
        relevant: bool [Q, N], to be found; what is `left_out`, bool [Q, N], is taken out of the ranking.
        up_to_the_last: precision@k with k at most the rank of the last that is to be found.
    """
    if left_out is not None:
        relevant = relevant & ~left_out
        similarity = similarity.masked_fill(left_out, -torch.inf)  # behind all others
    order = similarity.argsort(dim=1, descending=True, stable=True)
    hit = relevant.gather(1, order)
    so_far = hit.cumsum(1)
    ranks = torch.arange(hit.shape[1], device=hit.device, dtype=torch.float64)
    before = torch.where(ranks > 0, (so_far - 1) / ranks.clamp(min=1), 1.0)
    at = so_far / (ranks + 1)
    count = so_far[:, -1]
    nothing = count == 0
    average = (hit * (before + at) / 2).sum(1) / count
    last = (hit * (ranks + 1)).amax(1)
    recall, precision = [], []
    for k in ks:
        depth = torch.full_like(last, k)
        if up_to_the_last:
            depth = torch.minimum(depth, last)
        inside = (hit & (ranks < depth[:, None])).sum(1)
        recall.append((so_far[:, min(k, hit.shape[1]) - 1] > 0).double().masked_fill(nothing, torch.nan))
        precision.append((inside / depth).masked_fill(nothing, torch.nan))
    return Ranked(average.double().masked_fill(nothing, torch.nan), torch.stack(recall, 1), torch.stack(precision, 1))


def _blocks(queries: int, keys: int, device: torch.device) -> Iterator[slice]:
    size = max(1, SCORES_AT_ONCE.get(device.type, 1 << 21) // max(1, keys))
    with counting("ranking", queries) as advance:
        for start in range(0, queries, size):
            yield slice(start, start + size)
            advance(min(size, queries - start))


def _percent(values: Tensor) -> float:
    """The mean of those that are numbers; 0 where there are none."""
    return 100 * float(values[values.isfinite()].mean()) if values.isfinite().any() else 0.0
