"""Connected components of a graph of neighbours, whose edges need not fit into memory.

Shapes: N nodes, E edges.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

EDGES_AT_ONCE = 1 << 22

Edges = tuple[np.ndarray, np.ndarray, np.ndarray]
"""One node and the other, int [E], and how similar they are, float [E]."""


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
