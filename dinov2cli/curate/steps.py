"""A curation as it goes on: what has become of each image, and why; and its steps, each of which drops images.

Source of the first three: Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision" (2023), section
3; of the last: `hierarchy`.

Shapes: N images.
"""

import hashlib
import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from dinov2cli import distributed
from dinov2cli.console import counting, logger
from dinov2cli.curate.collection import Collection
from dinov2cli.curate.graph import AtThreshold, Components, Graph, near, sweep
from dinov2cli.curate.hierarchy import all_comparisons, balanced_sample, hierarchy, usual_clusters
from dinov2cli.curate.kmeans import Points, comparisons, kmeans, nearest_centres
from dinov2cli.curate.stage import Stage
from dinov2cli.data.datasets import ImageDataset, UnreadableImage
from dinov2cli.errors import DataError
from dinov2cli.requests.curate import CurateRequest

KEPT, UNREADABLE, DUPLICATE, AGAINST, NOT_ALIKE, NOT_DRAWN = range(6)
"""What became of an image."""
REASONS = ("kept", "unreadable", "near-duplicate", "near an evaluation set", "not like the given sets", "not drawn")
"""In words."""
SWEPT = (0.99, 0.98, 0.97, 0.96, 0.95, 0.93, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)
"""Thresholds of which the report says what they would do."""
LARGE_SET = 1_000_000
"""Images of a set above which its neighbours are retrieved, and not clusters that it is in."""
MOST_CLUSTERS = 100_000
IMPLAUSIBLE = 0.05
"""Share of the images in one component of near-duplicates above which a threshold is called too low."""
FEW = 20
"""Images below which nothing is called implausible."""
THREADS = 8


@dataclass
class Step:
    """What a step did: how many images it found and left, its seconds, and whatever else is to be said of it."""

    name: str
    before: int
    after: int
    seconds: float
    said: dict[str, Any] = field(default_factory=dict)


@dataclass
class Curation:
    """A curation as it goes on.

    Attributes:
        fate: uint8 [N], what became of each image.
        beside: int64 [N], the image it is shown beside, or -1: of a near-duplicate the one that is kept, else one of
            the sets, by its row, these one after the other.
        score: float32 [N], their cosine.
        swept: what other thresholds of near-duplicates would do.
        sets: those that images were compared with, by what became of the images.
        nearest: float32 [N], how similar the nearest image of each is.
    """

    request: CurateRequest
    pool: Collection
    device: torch.device
    fate: np.ndarray
    beside: np.ndarray
    score: np.ndarray
    steps: list[Step] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    swept: list[AtThreshold] = field(default_factory=list)
    sets: dict[int, list[Collection]] = field(default_factory=dict)
    nearest: np.ndarray | None = None

    @property
    def work(self) -> Path:
        return self.request.output / "work"

    @property
    def alive(self) -> np.ndarray:
        """bool [N]."""
        kept: np.ndarray = self.fate == KEPT
        return kept

    def warn(self, text: str) -> None:
        self.warnings.append(text)
        if distributed.is_main():
            logger.warning("%s", text)

    def set_of(self, fate: int, row: int) -> tuple[Collection, int]:
        """The collection in which an image's `beside` is a row, and that row."""
        for each in self.sets.get(fate, [self.pool]):
            if row < len(each):
                return each, row
            row -= len(each)
        raise IndexError(row)

    def drop(self, rows: np.ndarray, fate: int, beside: Any = -1, score: Any = np.nan) -> None:
        self.fate[rows], self.beside[rows], self.score[rows] = fate, beside, score


def drop_duplicates(state: Curation, found: Graph) -> dict[str, Any]:
    """Keep one image of each connected component of images more similar than the threshold."""
    request, pool = state.request, state.pool
    roots = np.arange(len(pool))
    for at, components in sweep(len(pool), found.edges, {*SWEPT, request.duplicates}):
        state.swept.append(at)
        if at.threshold == request.duplicates:
            roots = components
            this = at
    kept = roots if request.keep == "first" or pool.images is None else largest_of(roots, pool.images)
    rows = np.flatnonzero(state.alive & (kept != np.arange(len(pool))))
    state.drop(rows, DUPLICATE, kept[rows], _cosines(pool.features, rows, kept[rows]))
    _warn_if_implausible(state, this)
    sizes = np.bincount(roots)
    return {"threshold": request.duplicates, "components": int((sizes > 1).sum()), "largest": int(sizes.max(initial=0))}


def _warn_if_implausible(state: Curation, at: AtThreshold) -> None:
    n = len(state.pool)
    if n < FEW or at.largest <= max(IMPLAUSIBLE * n, 2):
        return
    fitting = [each for each in state.swept if each.largest <= max(0.01 * n, 2)]
    better = min(fitting, key=lambda each: each.threshold, default=None)
    advice = (
        f"At {better.threshold} the largest has {better.largest} and {better.dropped:.1%} are dropped: --duplicates "
        f"{better.threshold}" if better else "No threshold up to 0.99 parts them: these features do not tell copies"
    )  # fmt: skip
    state.warn(
        f"--duplicates {at.threshold:g} is too low for these features: {at.largest} of {n} images are one chain of "
        f"near-duplicates, and {at.dropped:.1%} are dropped. {advice}; look at the report."
    )


def drop_near(state: Curation, found: Graph, sets: list[Collection]) -> dict[str, Any]:
    """Drop every component of images more similar than the threshold that an image of an evaluation set belongs to.

    The nearest image of the sets is known exactly for each image; components are those of the neighbours of all images,
    dropped near-duplicates included.
    """
    request, pool, state.sets[AGAINST] = state.request, state.pool, sets
    work = Stage(state.work / "against", images=pool.key, sets=[each.key for each in sets])
    database = np.concatenate([each.features for each in sets])
    alive = np.concatenate([each.readable for each in sets])
    rows = np.flatnonzero(pool.readable)
    score, row = near(pool.features, rows, database, alive, 1, work, "evaluation sets", state.device).nearest()
    components = Components(len(pool))
    for one, other, _ in found.edges(request.against_threshold):
        components.join(one, other)
    roots = components.roots()
    hit = score > request.against_threshold
    marked = np.zeros(len(pool), bool)
    marked[roots[hit]] = True
    dropped = np.flatnonzero(state.alive & marked[roots])
    n, state.score[dropped] = len(dropped), score[dropped]
    state.drop(dropped, AGAINST, row[dropped], score[dropped])
    before = n + int(state.alive.sum())
    if before >= FEW and n > 0.5 * before:
        state.warn(f"--against-threshold {request.against_threshold:g} drops {n / before:.1%} of the images, and "
                   f"{int(hit.sum())} are that near themselves: it is too low for these features.")  # fmt: skip
    return {"threshold": request.against_threshold, "near": int((hit & pool.readable).sum()), "images": len(database)}


def keep_alike(state: Curation, sets: list[Collection]) -> dict[str, Any]:
    """Keep the images that are retrieved for any of the sets."""
    request, pool, state.sets[NOT_ALIKE] = state.request, state.pool, sets
    alive, chosen = state.alive.copy(), np.zeros(len(pool), bool)
    score, beside = np.full(len(pool), -2, np.float32), np.full(len(pool), -1, np.int64)
    said, offset = {}, 0
    depends = {"images": pool.key, "kept": _digest(alive)}
    for number, each in enumerate(sets):
        way, picked = request.retrieval, np.zeros(len(pool), bool)
        if way == "auto":
            way = "neighbours" if len(each) > LARGE_SET else "clusters"
        if way == "neighbours":
            work = Stage(state.work / f"like-{number}-neighbours", **depends, of=each.key, k=request.per_query)
            mine = np.flatnonzero(each.readable)
            for queries, rows, cosines in near(each.features, mine, pool.features, alive, request.per_query, work,
                                               "retrieval", state.device):  # fmt: skip
                one, column = (rows >= 0).nonzero()
                found, cosine = rows[one, column], cosines[one, column]
                picked[found] = True
                np.maximum.at(score, found, cosine)
                best = cosine == score[found]
                beside[found[best]] = offset + queries[one[best]]
        else:
            work = Stage(state.work / f"like-{number}-clusters", **depends, clusters=request.pool_clusters,
                         iterations=request.iterations, seed=request.seed)  # fmt: skip
            picked[_of_clusters(state, each, np.flatnonzero(alive), work, number)] = True
        chosen |= picked
        said[each.name] = {"way": way, "images": len(each), "retrieved": int(picked.sum())}
        offset += len(each)
    state.drop(np.flatnonzero(alive & ~chosen), NOT_ALIKE)
    kept = np.flatnonzero(chosen)
    state.beside[kept], state.score[kept] = beside[kept], np.where(score[kept] > -2, score[kept], np.nan)
    return said


def _of_clusters(state: Curation, each: Collection, rows: np.ndarray, work: Stage, number: int) -> np.ndarray:
    """Of some rows, those of the clusters that hold more than `hits` of a set, at random where there are too many."""
    request, points = state.request, Points(state.pool.features, rows)
    k = request.pool_clusters or min(MOST_CLUSTERS, max(1, round(4 * len(rows) ** 0.5)))
    with counting("clusters", comparisons(len(points), request.iterations)) as tell:
        found = kmeans(points, k, seed=request.seed, iterations=request.iterations, device=state.device,
                       kept_in=work / "centres.npz", told=tell)  # fmt: skip
        of_set = Points(each.features, np.flatnonzero(each.readable))
        theirs, _ = nearest_centres(of_set, torch.from_numpy(found.centres), device=state.device)
    hits = np.bincount(theirs.numpy(), minlength=len(found.centres))
    rng = np.random.default_rng([request.seed, number])
    order = rng.permutation(len(rows))
    order = order[np.argsort(found.labels[order], kind="stable")]
    ordered = found.labels[order]
    place = np.arange(len(order)) - np.searchsorted(ordered, ordered)
    chosen = order[(hits[ordered] > request.hits) & (place < request.per_cluster)]
    work.finish()
    picked: np.ndarray = rows[rng.permutation(chosen)[: request.at_most]]
    return picked


def draw(state: Curation) -> dict[str, Any]:
    """Keep a balanced sample."""
    request, rows = state.request, np.flatnonzero(state.alive)
    assert request.sample is not None
    sizes = request.clusters or usual_clusters(len(rows))
    if request.sample >= len(rows):
        state.warn(f"--sample {request.sample}: there are {len(rows)} images; all are kept.")
        return {"clusters": list(sizes), "asked": request.sample}
    if sizes[0] > len(rows):
        raise DataError(f"--clusters {sizes[0]}: there are {len(rows)} images; give fewer clusters than images.")
    work = Stage(
        state.work / "clusters", images=state.pool.key, kept=_digest(state.alive), sizes=sizes,
        resamplings=request.resamplings, iterations=request.iterations, seed=request.seed,
    )  # fmt: skip
    in_all = all_comparisons(len(rows), sizes, request.resamplings, request.iterations)
    with counting("clusters", in_all) as tell:
        labels = hierarchy(
            Points(state.pool.features, rows), sizes, resamplings=request.resamplings, seed=request.seed,
            folder=work.folder, iterations=request.iterations, device=state.device, told=tell,
        )  # fmt: skip
    chosen = balanced_sample(labels, request.sample, np.random.default_rng(request.seed))
    state.drop(np.delete(rows, chosen), NOT_DRAWN)
    work.finish()
    sizes_of = np.bincount(labels[0])
    return {"clusters": [int(each.max()) + 1 for each in labels], "largest": int(sizes_of.max())}


def _cosines(features: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """float32, of pairs of rows."""
    found = np.empty(len(one), np.float32)
    for start in range(0, len(one), 1 << 14):
        a, b = (Points(features)[rows[start : start + (1 << 14)]] for rows in (one, other))
        found[start : start + len(a)] = (a * b).sum(1).numpy()
    return found


def largest_of(roots: np.ndarray, images: ImageDataset) -> np.ndarray:
    """For each image the one of its component (whose lowest is its root) that has most pixels, of these the one of most
    bytes, of these the first: int64 [N]. Only images that are not alone are looked at."""
    kept, sizes = roots.copy(), np.bincount(roots)
    members = np.flatnonzero(sizes[roots] > 1)
    measured = []
    with ThreadPoolExecutor(THREADS) as pool, counting("sizes of duplicates", len(members)) as advance:
        for size in pool.map(lambda row: _size(images, row), members.tolist()):
            measured.append(size)
            advance(1)
    if len(members):
        pixels, data = np.array(measured, np.int64).T
        order = np.lexsort((members, -data, -pixels, roots[members]))  # of each component, the best first
        of, first = np.unique(roots[members][order], return_index=True)
        best = np.arange(len(roots))
        best[of] = members[order][first]
        kept = best[roots]
    return kept


def _size(images: ImageDataset, row: int) -> tuple[int, int]:
    """Pixels and bytes of an image's file; zeros where they cannot be told."""
    try:
        data = images.encoded(row)
        with Image.open(io.BytesIO(data)) as image:
            return image.width * image.height, len(data)
    except (UnreadableImage, UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return 0, images.file_size(row) or 0


def _digest(alive: np.ndarray) -> str:
    return hashlib.sha256(np.packbits(alive).tobytes()).hexdigest()[:24]
