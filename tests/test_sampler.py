"""The order of samples: a permutation an epoch, cheap at any position."""

import tracemalloc

import numpy as np
import pytest
from scipy import stats

from dinov2cli.data.sampler import SampleOrder, WeightedOrder, permute


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 17, 64, 100, 1025])
def test_every_epoch_visits_every_index_once(size: int) -> None:
    order = SampleOrder(size, seed=0)
    for epoch in range(4):
        assert sorted(order.index(epoch * size + i) for i in range(size)) == list(range(size))


def test_epochs_and_seeds_differ() -> None:
    orders = {
        tuple(SampleOrder(50, seed).index(epoch * 50 + i) for i in range(50)) for seed in range(3) for epoch in range(3)
    }
    assert len(orders) == 9


@pytest.mark.parametrize("size", [5, 10, 16])
def test_every_index_is_as_likely_at_every_position(size: int) -> None:
    counts = np.zeros((size, size))
    for key in range(3000):
        for position in range(size):
            counts[position, permute(position, size, key=key * 2**40 + 17)] += 1
    assert stats.chisquare(counts, axis=1).pvalue.min() > 1e-5


def test_neighbours_are_not_neighbours_after_shuffling() -> None:
    size = 100_000
    order = SampleOrder(size, seed=1)
    indices = np.array([order.index(k) for k in range(20_000)])
    assert abs(np.corrcoef(indices[:-1], indices[1:])[0, 1]) < 0.03
    assert stats.kstest(indices / size, "uniform").pvalue > 1e-3
    assert stats.kstest(np.diff(indices) % size / size, "uniform").pvalue > 1e-3


def test_a_hundred_million_images_cost_nothing() -> None:
    tracemalloc.start()
    order = SampleOrder(100_000_000, seed=0)
    indices = [order.index(10**12 + i) for i in range(100)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(indices)) == 100 and all(0 <= i < 100_000_000 for i in indices)
    assert peak < 1_000_000


def test_an_empty_dataset_cannot_be_sampled() -> None:
    with pytest.raises(ValueError, match="0 images"):
        SampleOrder(0, seed=0)


def test_weights_set_how_often_a_part_is_seen() -> None:
    order = WeightedOrder([10, 40], [2.0, 0.5], seed=0)
    assert order.size == 40
    for epoch in range(3):
        seen = np.bincount([order.index(epoch * 40 + i) for i in range(40)], minlength=50)
        assert (seen[:10] == 2).all(), "weight 2: every image twice an epoch"
        assert seen[10:].sum() == 20
    two_epochs = np.bincount([order.index(k) for k in range(80)], minlength=50)
    assert (two_epochs[10:] == 1).all(), "weight 0.5: every image once in two epochs"
