"""The nearest images of each image, in files by blocks, which processes share and an interrupted search goes on with.

Exact, or among the images of the nearest cells alone: an inverted file as in Sivic and Zisserman, "Video Google"
(2003).
Then what their edges join: connected components, of a graph that need not fit into memory.

Shapes: N images or nodes, D features, b images of a block, k neighbours, E edges.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from dinov2cli.console import Advance, counting
from dinov2cli.curate.kmeans import Points, assigned, comparisons, kmeans
from dinov2cli.curate.stage import Stage, share
from dinov2cli.files import replacing, writing
from dinov2cli.search.neighbours import Found, neighbours

BLOCK = 1 << 14
"""Images of a block, about so many where they go by cells."""
EXACT_UP_TO = 200_000
PROBES = 8
ITERATIONS, TRAINED_ON = 10, 64
"""Of the k-means that makes cells, and images for each cell that it looks at."""
CHECKED = 1000
"""Images whose neighbours are looked for among all, to say what probing misses."""
EDGES_AT_ONCE = 1 << 22

Edges = tuple[np.ndarray, np.ndarray, np.ndarray]
"""One node and the other, int [E], and how similar they are, float [E]."""


class Block(NamedTuple):
    """Neighbours of some images, nearest first."""

    queries: np.ndarray
    """int64 [b]."""
    rows: np.ndarray
    """int64 [b, k]; -1 where there are fewer."""
    scores: np.ndarray
    """float32 [b, k], -2 there."""


class Graph:
    """What a search has found, in files.

    Args:
        stage: where the blocks are; done.
        n: rows that may have been looked for.
    """

    def __init__(self, stage: Stage, n: int) -> None:
        self.stage, self.n = stage, n

    def __iter__(self) -> Iterator[Block]:
        for file in sorted(self.stage.folder.glob("block-*.npz")):
            yield _read(file)

    def edges(self, above: float) -> Iterator[Edges]:
        """The edges of each block that are more similar than that."""
        for queries, rows, scores in self:
            at, column = (scores > above).nonzero()
            yield queries[at], rows[at, column], scores[at, column]

    def nearest(self) -> Found:
        """How similar the nearest of each is, float32 [N], and which it is, int64 [N]; -2 and -1 for none."""
        scores, nearest = np.full(self.n, -2, np.float32), np.full(self.n, -1, np.int64)
        for queries, rows, similarity in self:
            scores[queries], nearest[queries] = similarity[:, 0], rows[:, 0]
        return Found(scores, nearest)


def usual_probes(n: int) -> int:
    """Cells to look into of so many images; 0: all."""
    return PROBES if n > EXACT_UP_TO else 0


def graph(
    features: np.ndarray, readable: np.ndarray, k: int, probes: int, work: Stage, *, seed: int, device: torch.device
) -> Graph:
    """Find the neighbours of all images that can be read; an image is none of its own. Collective.

    Args:
        features: float16 [N, D].
        readable: bool [N].
        probes: nearest cells whose images are looked into; 0: all images.
        work: depends on these; what it holds already is not looked for again.
    """
    alive, n = np.flatnonzero(readable), len(features)
    if work.done or len(alive) < 2:
        return Graph(work, n)
    if not probes:

        def among_all(rows: np.ndarray, tell: Advance) -> Found:
            how = {"alive": readable, "exclude": rows, "device": device, "progress": tell}
            return neighbours(features, features[rows], k, **how)  # type: ignore[arg-type]

        return search(work, "neighbours", _blocks(alive), k, among_all, n)
    cells, centres = _cells(features, alive, work, seed=seed, device=device)
    starts = {int(cell[0]): number for number, cell in enumerate(cells)}

    def among_near_cells(rows: np.ndarray, tell: Advance) -> Found:
        return _of_cells(features, rows, cells, starts[int(rows[0])], centres, (k, probes), device)

    return search(work, "neighbours", [np.concatenate(group) for group in _grouped(cells)], k, among_near_cells, n)


def near(
    queries: np.ndarray, rows: np.ndarray, database: np.ndarray, alive: np.ndarray, k: int, work: Stage, name: str,
    device: torch.device,
) -> Graph:  # fmt: skip
    """Find, for some rows of the queries [Q, D], the nearest of the alive rows of a database [N, D]. Collective."""

    def among_others(block: np.ndarray, tell: Advance) -> Found:
        return neighbours(database, queries[block], k, alive=alive, device=device, progress=tell)

    return search(work, name, _blocks(rows), k, among_others, len(queries))


def search(
    work: Stage, name: str, blocks: Sequence[np.ndarray], k: int, find: Callable[[np.ndarray, Advance], Found], n: int
) -> Graph:
    """Write what is found for each block of rows that has no file yet; the blocks are shared among processes."""
    if not work.done:
        files = [work / f"block-{number:06d}.npz" for number in range(len(blocks))]
        with counting(name, sum(len(blocks[number]) for number in share(len(blocks)))) as advance:
            for number in share(len(blocks)):
                if not files[number].exists():
                    found = find(blocks[number], lambda more: advance(0))
                    _write(files[number], Block(blocks[number], found.rows, found.scores), k)
                advance(len(blocks[number]))
        work.finish(blocks=len(blocks))
    return Graph(work, n)


def recall(
    features: np.ndarray, readable: np.ndarray, found: Graph, k: int, above: float, device: torch.device
) -> float:
    """Of the k nearest of some images that are more similar than `above`, the share that was found."""
    sample = np.sort(np.random.default_rng(0).permutation(np.flatnonzero(readable))[:CHECKED])
    exact = neighbours(features, features[sample], k, alive=readable, exclude=sample, device=device)
    theirs: dict[int, np.ndarray] = {}
    for queries, rows, _ in found:
        chosen = np.isin(queries, sample)
        theirs |= dict(zip(queries[chosen].tolist(), rows[chosen], strict=True))
    counts = [
        (np.isin(wanted[scores > above], theirs[row]).sum(), (scores > above).sum())
        for row, wanted, scores in zip(sample.tolist(), exact.rows, exact.scores, strict=True)
    ]
    hits, of = np.sum(counts, axis=0) if counts else (0, 0)
    return float(hits / of) if of else 1.0


def _cells(
    features: np.ndarray, alive: np.ndarray, work: Stage, *, seed: int, device: torch.device
) -> tuple[list[np.ndarray], np.ndarray]:
    """Images of each cell, and the cells' centres."""
    k = max(1, round(4 * len(alive) ** 0.5))
    some = np.sort(np.random.default_rng(seed).permutation(alive)[: TRAINED_ON * k])
    with counting("cells", comparisons(len(some), ITERATIONS) + comparisons(len(alive), 0)) as tell:
        cells = kmeans(
            Points(features, some), k, seed=seed, iterations=ITERATIONS, device=device, kept_in=work / "cells.npz",
            told=tell,
        )  # fmt: skip
        centres = torch.from_numpy(cells.centres)
        found = assigned(Points(features, alive), centres, device=device, told=tell)
    order = np.argsort(found.labels, kind="stable")
    ends = np.cumsum(np.bincount(found.labels))
    return np.split(alive[order], ends[:-1]), found.centres


def _grouped(cells: list[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Cells, as many together as make a block."""
    group: list[np.ndarray] = []
    for cell in cells:
        group.append(cell)
        if sum(map(len, group)) >= BLOCK:
            yield group
            group = []
    if group:
        yield group


def _of_cells(
    features: np.ndarray, queries: np.ndarray, cells: list[np.ndarray], first: int, centres: np.ndarray,
    how_many: tuple[int, int], device: torch.device,
) -> Found:  # fmt: skip
    """Neighbours of the images of some cells, from `first` on, among those of the cells whose centres are nearest.

    Args:
        how_many: neighbours, and cells.
    """
    k, probes = how_many
    rows, scores = np.full((len(queries), k), -1, np.int64), np.full((len(queries), k), -2, np.float32)
    start, number = 0, first
    while start < len(queries):
        near_cells = np.argsort(-(centres @ centres[number]), kind="stable")[:probes]
        among, cell = np.sort(np.concatenate([cells[i] for i in near_cells])), cells[number]
        if len(among) > 1:
            own = np.searchsorted(among, cell)
            found = neighbours(features[among], features[cell], k, exclude=own, device=device)
            here = slice(start, start + len(cell)), slice(0, found.rows.shape[1])
            rows[here], scores[here] = among[found.rows], found.scores
        start, number = start + len(cell), number + 1
    return Found(scores, rows)


def _blocks(rows: np.ndarray) -> list[np.ndarray]:
    return [rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK)]


def _write(file: Path, block: Block, k: int) -> None:
    """A block, in 6 bytes for each neighbour (10 of more than two thousand million images): a half holds 1 - cosine,
    where it is finest for what is most alike."""
    queries, rows, scores = block
    missing = k - rows.shape[1]
    if missing:
        rows = np.pad(rows, ((0, 0), (0, missing)), constant_values=-1)
        scores = np.pad(scores, ((0, 0), (0, missing)), constant_values=-2)
    fits = rows.max(initial=0) <= np.iinfo(np.int32).max
    with writing(file), replacing(file, flush=True) as aside, aside.open("wb") as opened:
        rows, distances = rows.astype(np.int32 if fits else np.int64), (1 - scores).astype(np.float16)
        np.savez(opened, queries=queries, rows=rows, distances=distances)


def _read(file: Path) -> Block:
    with np.load(file) as kept:
        return Block(kept["queries"], kept["rows"].astype(np.int64), 1 - kept["distances"].astype(np.float32))


class Components:
    """Which nodes edges have joined so far: a forest, in which the lowest node of a component is its root.

    Edges may come in any order and any number of pieces; the components are the same. Memory: 8 bytes a node.
    """

    def __init__(self, n: int) -> None:
        self._parent = np.arange(n)

    def join(self, one: np.ndarray, other: np.ndarray) -> None:
        """Join the components of `one[i]` and `other[i]`, int [E], for every i."""
        for start in range(0, len(one), EDGES_AT_ONCE):
            a, b = (self._find(nodes[start : start + EDGES_AT_ONCE]) for nodes in (one, other))
            while len(a):
                apart = a != b
                low, high = np.minimum(a, b)[apart], np.maximum(a, b)[apart]
                # Of several roots that one is to be joined to, the lowest takes it; the others come again.
                np.minimum.at(self._parent, high, low)
                a, b = self._find(low), self._find(high)

    def roots(self) -> np.ndarray:
        """For each node the lowest of its component, int64 [N]."""
        return self._find(np.arange(len(self._parent)))

    def _find(self, nodes: np.ndarray) -> np.ndarray:
        """The roots of nodes, to which these are tied directly from now on."""
        root: np.ndarray = self._parent[nodes]
        while True:
            above = self._parent[root]
            self._parent[nodes] = above  # each pass halves the way of those that follow one another
            if np.array_equal(above, root):
                return root
            root = above


class AtThreshold(NamedTuple):
    """What a threshold would do: the share of nodes that are dropped if one of each component is kept, and the size of
    the largest component."""

    threshold: float
    dropped: float
    largest: int


def sweep(
    n: int, edges: Callable[[float], Iterable[Edges]], thresholds: Iterable[float]
) -> Iterator[tuple[AtThreshold, np.ndarray]]:
    """What each threshold would do, from the highest to the lowest, and for each node the lowest of its component,
    int64 [N].

    Args:
        edges: pieces of the edges of a graph of n nodes that are above a similarity; called once a threshold.
    """
    components, before = Components(n), np.inf
    for threshold in sorted(thresholds, reverse=True):
        for one, other, similarity in edges(threshold):
            new = (similarity > threshold) & (similarity <= before)
            components.join(one[new], other[new])
        roots, before = components.roots(), threshold
        sizes = np.bincount(roots)
        yield AtThreshold(threshold, 1 - np.count_nonzero(sizes) / max(n, 1), int(sizes.max(initial=0))), roots
