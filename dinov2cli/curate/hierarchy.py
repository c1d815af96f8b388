"""Balanced sampling by clusters of clusters: as many images of each kind, and within a kind of each of its kinds.

Source: Vo et al., "Automatic Data Curation for Self-Supervised Learning: A Clustering-Based Approach" (2024): k-means
of the points, then of its centres, and so on; at each level, centres are fitted again to the few points closest to
each, which spreads them evenly over the space instead of over the data; then as many points of each as can be.

Shapes: N points, D features, K_l clusters of level l.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dinov2cli.curate.kmeans import Clusters, Points, assigned, comparisons, kmeans

CLOSEST = 0.5
"""Share of the mean cluster's points, the closest to each centre, that it is fitted to again."""


def usual_clusters(n: int) -> tuple[int, ...]:
    """Clusters of each level for n points: 4 x sqrt(n), at most n, then a twentieth of the level before while it is 20
    or more."""
    sizes = [max(1, min(n, round(4 * n**0.5)))]
    while sizes[-1] // 20 >= 20:
        sizes.append(sizes[-1] // 20)
    return tuple(sizes)


def hierarchy(
    points: Points, sizes: Sequence[int], *, resamplings: int, seed: int, folder: Path, **how: Any
) -> list[np.ndarray]:
    """Clusters of clusters. Collective.

    Args:
        sizes: K_1, K_2, ..., each less than the one before.
        resamplings: how often the centres of a level are fitted again to the points closest to them.
        folder: for the state of each k-means, by which an interrupted one goes on.
        how: of `kmeans`: iterations, device, told.

    Returns:
        for each level the cluster of what is clustered there, int64: [N] of points, [K_1] of clusters, [K_2] ...
    """
    labels = []
    for level, k in enumerate(sizes, 1):
        clusters = _spread(points, k, resamplings, seed=seed + 1000 * level, name=folder / f"level{level}", **how)
        labels.append(clusters.labels)
        points = Points(clusters.centres)
    return labels


def all_comparisons(points: int, sizes: Sequence[int], resamplings: int, iterations: int) -> int:
    """How many points `hierarchy` tells this process of; of fewer, where a level has fewer clusters."""
    total = 0
    for n, k in zip((points, *sizes), sizes, strict=False):
        total += comparisons(n, iterations)
        total += resamplings * (comparisons(max(int(CLOSEST * n), k), iterations) + comparisons(n, 0))
    return total


def _spread(points: Points, k: int, resamplings: int, *, seed: int, name: Path, **how: Any) -> Clusters:
    clusters = kmeans(points, k, seed=seed, kept_in=name.with_name(f"{name.name}-0.npz"), **how)
    for again in range(1, resamplings + 1):
        each = max(1, int(CLOSEST * len(points) / len(clusters.centres)))
        chosen = closest(clusters, each)
        rows = chosen if points.rows is None else points.rows[chosen]
        state = name.with_name(f"{name.name}-{again}.npz")
        fitted = kmeans(Points(points.array, rows), k, seed=seed + again, kept_in=state, **how)
        if "told" in how:  # as if each cluster had had as many
            most, few = (comparisons(n, how["iterations"]) for n in (max(int(CLOSEST * len(points)), k), len(rows)))
            how["told"](most - few)
        places = {key: how[key] for key in ("device", "told") if key in how}
        clusters = assigned(points, torch.from_numpy(fitted.centres), **places)
    return clusters


def closest(clusters: Clusters, each: int) -> np.ndarray:
    """The points, at most `each` of a cluster, that are closest to its centre: int64, ascending."""
    order = np.lexsort((-clusters.similarity, clusters.labels))
    ordered = clusters.labels[order]
    place = np.arange(len(order)) - np.searchsorted(ordered, ordered)
    chosen: np.ndarray = np.sort(order[place < each])
    return chosen


def balanced_sample(labels: Sequence[np.ndarray], n: int, rng: np.random.Generator) -> np.ndarray:
    """Points, the same number of each cluster of the last level as far as it has them, of these the same number of each
    of its clusters, and so on, and in a cluster of points at random.

    Args:
        labels: as `hierarchy` returns them.
        n: how many points; all where there are no more.

    Returns:
        int64 [min(n, N)], ascending.
    """
    top = np.zeros(int(labels[-1].max(initial=0)) + 1, np.int64)
    levels = [*labels, top]  # all in one cluster
    held = [np.ones(len(labels[0]), np.int64)]  # points in each cluster of each level
    for level in levels[:-1]:
        held.append(np.bincount(level, held[-1], minlength=int(level.max(initial=0)) + 1).astype(np.int64))
    wanted = np.array([min(n, len(labels[0]))])
    for level, caps in zip(reversed(levels), reversed(held), strict=True):
        shares = np.zeros(len(level), np.int64)
        order = np.argsort(level, kind="stable")
        for parent, members in enumerate(np.split(order, np.cumsum(np.bincount(level, minlength=len(wanted)))[:-1])):
            shares[members] = evenly(int(wanted[parent]), caps[members], rng)
        wanted = shares
    chosen: np.ndarray = np.flatnonzero(wanted)
    return chosen


def evenly(total: int, caps: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`total` shared out as evenly as can be, to each at most its cap; what is left over to some at random: int64."""
    low, high = 0, int(caps.max(initial=0))
    while low < high:  # the largest level up to which all can be filled
        middle = (low + high + 1) // 2
        low, high = (middle, high) if np.minimum(caps, middle).sum() <= total else (low, middle - 1)
    shares: np.ndarray = np.minimum(caps, low)
    more = rng.permutation(np.flatnonzero(caps > low))[: total - int(shares.sum())]
    shares[more] += 1
    return shares
