"""Spherical k-means of features that need not fit into memory, alone or as one of several processes.

Points and centres have length 1; the similarity of a point to its centre is their cosine. Source of the seeding:
Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding" (2007), here drawn in rounds.

Shapes: N points, D features, K centres, M points that seeds are drawn from.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from dinov2cli import distributed
from dinov2cli.console import Advance
from dinov2cli.files import replacing, writing

BLOCK_BYTES = 64 << 20
"""Largest size in float32 of the points that are read at once, and of their similarities to the centres."""
SEEDED_FROM = 4, 1 << 15
"""Seeds are drawn from so many points for each centre, at least from so many, chosen at random."""
ROUNDS = 256
"""Seeds are drawn one by one up to so many centres, else in so many rounds."""
SAME = 1e-6
"""Points whose cosine is within this of 1 are one point."""
GAIN = 1e-4
"""It ends when the mean similarity grows by less."""


class Points:
    """Rows of an array of features as points of length 1, read block by block.

    Args:
        array: float16 or float32 [*, D], may be memory-mapped.
        rows: int64 [N], ascending, those that are meant; None: all.
    """

    def __init__(self, array: np.ndarray, rows: np.ndarray | None = None) -> None:
        self.array, self.rows = array, rows

    def __len__(self) -> int:
        return len(self.array) if self.rows is None else len(self.rows)

    @property
    def dim(self) -> int:
        return int(self.array.shape[1])

    def __getitem__(self, which: slice | np.ndarray) -> Tensor:
        """float32 [n, D]."""
        block = self.array[which if self.rows is None else self.rows[which]]
        return normalize(torch.from_numpy(np.array(block, np.float32)), dim=1)


class Clusters(NamedTuple):
    """A cluster for each point. K may be less than was asked for: no cluster is empty."""

    centres: np.ndarray
    """float32 [K, D] of length 1."""
    labels: np.ndarray
    """int64 [N]: each point's centre, the nearest."""
    similarity: np.ndarray
    """float32 [N], to that centre."""


class State(NamedTuple):
    """How far it is: iterations done, the centres after them, and the mean similarity to those before."""

    done: int
    centres: Tensor
    reached: float


def kmeans(
    points: Points,
    k: int,
    *,
    seed: int = 0,
    iterations: int = 20,
    device: torch.device | str = "cpu",
    kept_in: Path | None = None,
    told: Advance = lambda more: None,
) -> Clusters:
    """Cluster points by Lloyd's iterations from k-means++ seeds. Collective: every process gets the whole result.

    Depends on points, k, seed and iterations alone (on their rounding beside it, which number of processes and device
    change). A centre that loses all its points becomes one of the points that are farthest from theirs.

    Args:
        k: clusters, at most; fewer where there are fewer distinct points.
        iterations: at most; it ends before when they gain nothing (`GAIN`).
        kept_in: a .npz file for the state after each iteration, from which it goes on if it is there.
        told: of points that have been compared with all centres, or need not be as an iteration is left out.
    """
    state = _recalled(kept_in) or State(0, _seeds(points, min(k, len(points)), seed), -1.0)
    each = len(_mine(points))
    told(state.done * each)
    while state.done < iterations:
        centres = state.centres
        sums, counts, reached, worst = _step(points, centres.to(device), told)
        moved = torch.where(counts[:, None] > 0, normalize(sums, dim=1), centres)
        empty = (counts == 0).nonzero()[:, 0][: len(worst)]
        moved[empty] = worst[: len(empty)]
        settled = reached - state.reached < GAIN and not len(empty)
        if settled:
            told((iterations - state.done - 1) * each)
        state = State(iterations if settled else state.done + 1, moved, reached)
        if kept_in is not None and distributed.is_main():
            with writing(kept_in), replacing(kept_in) as aside, aside.open("wb") as file:
                np.savez(file, done=state.done, centres=moved.numpy(), reached=reached)
    return assigned(points, state.centres, device=device, told=told)


def assigned(
    points: Points, centres: Tensor, *, device: torch.device | str = "cpu", told: Advance = lambda more: None
) -> Clusters:
    """The nearest of the centres, float32 [K, D], for each point; those that have none are left out. Collective."""
    labels, similarity = nearest_centres(points, centres, device=device, told=told)
    used, labels = labels.unique(return_inverse=True)
    return Clusters(centres[used].numpy(), labels.numpy(), similarity.numpy())


def nearest_centres(
    points: Points, centres: Tensor, *, device: torch.device | str = "cpu", told: Advance = lambda more: None
) -> tuple[Tensor, Tensor]:
    """The nearest of the centres, float32 [K, D], for each point, int64 [N], and their cosines [N]. Collective."""
    mine = [nearest for _, *nearest in _nearest(points, centres.to(device), told)]
    none = torch.empty(0, dtype=torch.int64), torch.empty(0)
    labels, similarity = (
        distributed.all_gather_rows(torch.cat([nothing, *(part[i].cpu() for part in mine)]))
        for i, nothing in enumerate(none)
    )
    return labels, similarity


def comparisons(points: int, iterations: int) -> int:
    """How many points of so many `kmeans` tells this process of: those of each iteration, and of the assignment."""
    return points * (iterations + 1) // distributed.world_size()


def _mine(points: Points) -> range:
    """The part that falls to this process."""
    return range(*(len(points) * (distributed.rank() + i) // distributed.world_size() for i in (0, 1)))


def _nearest(points: Points, centres: Tensor, told: Advance) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of this process's points, block by block: the points [n, D], their nearest centres int64 [n], cosines [n]."""
    size = max(1, BLOCK_BYTES // (4 * max(points.dim, len(centres))))
    mine = _mine(points)
    for start in mine[::size]:
        block = points[slice(start, min(start + size, mine.stop))].to(centres.device)
        similarity, labels = (block @ centres.T).max(dim=1)
        yield block, labels, similarity
        told(len(block))


def _step(points: Points, centres: Tensor, told: Advance) -> tuple[Tensor, Tensor, float, Tensor]:
    """Of all processes' points: their sums [K, D] and numbers [K] by nearest centre, the mean similarity, and the
    distinct points farthest from their centres, at most as many as there are centres without one."""
    sums, counts = torch.zeros_like(centres), torch.zeros(len(centres), device=centres.device)
    total, n_worst = 0.0, min(len(centres), 256)
    worst, how_bad = centres.new_empty((0, centres.shape[1])), centres.new_empty(0)
    for block, labels, similarity in _nearest(points, centres, told):
        sums.index_add_(0, labels, block)
        counts += torch.bincount(labels, minlength=len(centres))
        total += float(similarity.double().sum())
        low, at = similarity.topk(min(n_worst, len(similarity)), largest=False)
        how_bad, order = torch.cat((how_bad, low)).sort(stable=True)
        how_bad, worst = how_bad[:n_worst], torch.cat((worst, block[at]))[order[:n_worst]]
    sums, counts = distributed.all_reduce_sum(sums.cpu()), distributed.all_reduce_sum(counts.cpu())
    total = float(distributed.all_reduce_sum(torch.tensor(total, dtype=torch.float64)))
    n_empty = int((counts == 0).sum())
    if n_empty:
        worst, how_bad = distributed.all_gather_rows(worst.cpu()), distributed.all_gather_rows(how_bad.cpu())
        how_bad, at = how_bad.sort(stable=True)
        worst = worst[at][how_bad < 1 - SAME]
        worst = _distinct(worst[: 4 * n_empty])
    return sums, counts, total / max(len(points), 1), worst[:n_empty]


def _distinct(points: Tensor) -> Tensor:
    """The points without those that are the same as one before, in their order."""
    same = (points @ points.T > 1 - SAME).tril(-1).any(dim=1)
    return points[~same]


def _seeds(points: Points, k: int, seed: int) -> Tensor:
    """Centres to begin with: points, each drawn with a probability as its squared distance from those before it."""
    chosen = torch.empty(0)
    if distributed.is_main():
        rng = np.random.default_rng(seed)
        m = min(len(points), max(SEEDED_FROM[0] * k, SEEDED_FROM[1]))
        sample = points[np.sort(rng.choice(len(points), m, replace=False))]  # [M, D]
        picked = [rng.integers(m, size=1)]
        distance = np.full(m, np.inf)
        while (left := k - sum(map(len, picked))) > 0:
            similarity = (sample @ sample[picked[-1]].T).amax(1).double().numpy()
            distance = np.minimum(distance, np.where(similarity > 1 - SAME, 0, 1 - similarity))
            there = int(np.count_nonzero(distance))
            if there == 0:
                break  # all distinct points are seeds
            at_once = min(left, there, -(-k // ROUNDS))
            picked.append(rng.choice(m, at_once, replace=False, p=distance / distance.sum()))
        chosen = sample[np.concatenate(picked)]
    return distributed.broadcast_object(chosen)


def _recalled(file: Path | None) -> State | None:
    state = None
    if file is not None and file.exists() and distributed.is_main():
        with np.load(file) as kept:
            state = State(int(kept["done"]), torch.from_numpy(kept["centres"]), float(kept["reached"]))
    return distributed.broadcast_object(state)
