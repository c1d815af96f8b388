"""Connected components: those of scipy, in whatever order and pieces the edges come."""

import numpy as np
import pytest
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from dinov2cli.curate import graph
from dinov2cli.curate.graph import AtThreshold, Components, sweep


def lowest_of_component(n: int, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """By scipy: of each node, the lowest in its component."""
    _, labels = connected_components(coo_matrix((np.ones(len(one)), (one, other)), (n, n)), directed=False)
    _, first = np.unique(labels, return_index=True)
    return first[labels]


@pytest.mark.parametrize("n_edges", [0, 1, 30, 60, 300])
@pytest.mark.parametrize("at_once", [1, 7, 1 << 22])
def test_components_are_those_of_scipy(n_edges: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "EDGES_AT_ONCE", at_once)
    for seed in range(5):
        one, other = np.random.default_rng([seed, n_edges]).integers(0, 100, (2, n_edges))
        found = Components(100)
        for part in np.array_split(np.arange(n_edges), 3):
            found.join(one[part], other[part])
        expected = lowest_of_component(100, one, other)
        assert np.array_equal(found.roots(), expected)


@pytest.mark.parametrize("order", [1, -1])
def test_a_long_chain_is_one_component_from_either_end(order: int) -> None:
    nodes = np.arange(20_000)[::order]
    found = Components(len(nodes))
    found.join(nodes[:-1], nodes[1:])
    assert not found.roots().any()


def test_a_sweep_says_of_each_threshold_what_components_of_it_alone_are() -> None:
    n, rng = 60, np.random.default_rng(0)
    one, other, similarity = *rng.integers(0, n, (2, 80)), rng.uniform(-1, 1, 80)
    pieces = [(one[:50], other[:50], similarity[:50]), (one[50:], other[50:], similarity[50:])]
    for found, roots in sweep(n, lambda above: pieces, [-1.0, 0.5, 0.0, 0.9]):
        expected = lowest_of_component(n, *(each[similarity > found.threshold] for each in (one, other)))
        sizes = np.unique(expected, return_counts=True)[1]
        assert np.array_equal(roots, expected)
        assert found == AtThreshold(found.threshold, 1 - len(sizes) / n, sizes.max())
