"""Balanced sampling: even shares at every level, and centres that spread over the space instead of over the data."""

from pathlib import Path

import numpy as np
import pytest

from dinov2cli.curate.hierarchy import all_comparisons, balanced_sample, closest, evenly, hierarchy, usual_clusters
from dinov2cli.curate.kmeans import Clusters, Points


@pytest.mark.parametrize("seed", range(5))
def test_shares_are_as_even_as_the_caps_allow(seed: int) -> None:
    rng = np.random.default_rng(seed)
    caps = rng.integers(0, 20, 30)
    for total in (0, 1, 17, 100, int(caps.sum()) - 1, int(caps.sum()), 10_000):
        shares = evenly(total, caps, rng)
        assert shares.sum() == min(total, caps.sum()) and (shares <= caps).all() and (shares >= 0).all()
        not_full = shares[shares < caps]
        if len(not_full):  # nobody has two more than one who could have more
            assert shares.max() <= not_full.min() + 1


def test_the_rest_goes_to_some_at_random() -> None:
    given = sum(evenly(1, np.ones(4, np.int64), np.random.default_rng(seed)) for seed in range(200))
    assert given.min() > 20


def test_a_sample_is_balanced_at_every_level() -> None:
    # Points: 900 of cluster 0, 90 of 1, 9 of 2, 1 of 3; clusters 0 and 1 are one kind, 2 and 3 the other.
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 3], [900, 90, 9, 1]))
    kinds = np.array([0, 0, 1, 1])
    rng = np.random.default_rng(0)
    for n, expected in ((8, [2, 2, 3, 1]), (20, [5, 5, 9, 1]), (210, [110, 90, 9, 1])):
        rows = balanced_sample([labels, kinds], n, rng)
        assert len(rows) == n and (np.diff(rows) > 0).all()
        assert np.bincount(labels[rows]).tolist() == expected
    assert np.bincount(labels[balanced_sample([labels], 40, rng)]).tolist() == [15, 15, 9, 1]
    assert np.array_equal(balanced_sample([labels, kinds], 5000, rng), np.arange(1000))


def test_which_of_a_cluster_are_chosen_depends_on_the_seed_alone() -> None:
    labels = [np.zeros(100, np.int64)]
    one, same, other = (balanced_sample(labels, 10, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(one, same) and not np.array_equal(one, other)


def test_the_closest_of_each_cluster() -> None:
    labels, similarity = np.array([0, 1, 0, 0, 1]), np.array([0.5, 0.9, 0.7, 0.6, 0.8], np.float32)
    assert closest(Clusters(np.eye(2), labels, similarity), 2).tolist() == [1, 2, 3, 4]
    assert closest(Clusters(np.eye(2), labels, similarity), 1).tolist() == [1, 2]


def test_levels_for_a_number_of_points() -> None:
    assert usual_clusters(1_000_000) == (4000, 200) and usual_clusters(100) == (40,)
    assert usual_clusters(9) == (9,) and usual_clusters(1) == (1,)
    assert usual_clusters(100_000_000) == (40_000, 2000, 100)


def test_resampling_spreads_centres_and_a_sample_over_the_space(tmp_path: Path) -> None:
    """On an arc nine tenths of whose points lie in its first tenth, as in the paper's figure."""
    rng = np.random.default_rng(0)
    angle = np.concatenate((rng.uniform(0, 0.15, 4500), rng.uniform(0.15, 1.5, 500)))
    points = Points(np.stack((np.cos(angle), np.sin(angle)), 1).astype(np.float32))

    def crowded(resamplings: int) -> float:
        folder = tmp_path / str(resamplings)
        told: list[float] = []
        labels = hierarchy(points, (100, 10), resamplings=resamplings, seed=0, folder=folder, iterations=20,
                           told=told.append)  # fmt: skip
        in_all = all_comparisons(5000, (100, 10), resamplings, 20)
        assert sum(told) == in_all  # where a bar ends
        assert [len(each) for each in labels] == [5000, 100] and labels[1].max() == 9
        return float((angle[balanced_sample(labels, 400, rng)] < 0.15).mean())

    plain, spread = crowded(0), crowded(5)
    assert abs(spread - 0.1) < 0.05 < plain - 0.1 < 0.5  # 0.9 of the points lie there, 0.1 of the space
