"""k-means in blocks: Lloyd's own result, whatever the blocks; seeds, empty clusters, resuming."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from dinov2cli.curate import kmeans as module
from dinov2cli.curate.kmeans import Points, assigned, comparisons, kmeans


def groups(sizes: list[int], dim: int = 16, noise: float = 0.1, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Points around random directions, as many as each size says, and which direction each is of."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    directions = np.linalg.qr(rng.normal(size=(dim, dim)))[0][: len(sizes)]
    return (directions[labels] + noise * rng.normal(size=(len(labels), dim))).astype(np.float32), labels


def unit(array: np.ndarray) -> np.ndarray:
    return array / np.linalg.norm(array, axis=1, keepdims=True)


def test_groups_of_very_different_sizes_are_found() -> None:
    features, labels = groups([500, 100, 20, 5], noise=0.01)
    for seed in range(3):
        found = kmeans(Points(features), 4, seed=seed)
        assert adjusted_rand_score(labels, found.labels) == 1
        assert np.allclose(np.linalg.norm(found.centres, axis=1), 1, atol=1e-6)
        # A fixed point of Lloyd's iteration: each point has its nearest centre, each centre is its points' mean.
        similarity = unit(features) @ found.centres.T
        assert (similarity.argmax(1) == found.labels).all()
        assert np.allclose(similarity.max(1), found.similarity, atol=1e-6)
        means = unit(np.stack([unit(features)[found.labels == c].sum(0) for c in range(4)]))
        assert np.allclose(means, found.centres, atol=1e-3)


def test_blocks_and_stored_halves_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    features, _ = groups([60] * 10, noise=0.3)
    halves = features.astype(np.float16)
    whole = kmeans(Points(halves), 10, seed=1)
    assert (kmeans(Points(halves.astype(np.float32)), 10, seed=1).labels == whole.labels).all()
    monkeypatch.setattr(module, "BLOCK_BYTES", 7 * 4 * 16)
    in_blocks = kmeans(Points(halves), 10, seed=1)
    assert (in_blocks.labels == whole.labels).all() and np.allclose(in_blocks.centres, whole.centres, atol=1e-5)


def test_rows_of_an_array_are_clustered_as_if_they_were_alone() -> None:
    features, _ = groups([40] * 5, noise=0.3)
    rows = np.arange(3, 200, 2)
    of_rows, alone = kmeans(Points(features, rows), 5), kmeans(Points(features[rows]), 5)
    assert (of_rows.labels == alone.labels).all() and np.array_equal(of_rows.centres, alone.centres)


def test_a_seed_is_a_result_and_another_is_another() -> None:
    features, _ = groups([100] * 3, noise=1.0)
    first, again, other = (kmeans(Points(features), 12, seed=seed) for seed in (5, 5, 6))
    assert np.array_equal(first.centres, again.centres) and not np.array_equal(first.labels, other.labels)


def test_seeds_are_spread_where_chosen_points_would_not_be() -> None:
    features, labels = groups([3000, *[3] * 9], noise=0.01)
    for at_once in (256, 2):
        module_rounds, module.ROUNDS = module.ROUNDS, at_once
        try:
            seeds = module._seeds(Points(features), 30, seed=0).numpy()
        finally:
            module.ROUNDS = module_rounds
        nearest = labels[(seeds @ unit(features).T).argmax(1)]
        assert len(set(nearest)) >= 9  # of ten groups; at random it would be two or so


def test_fewer_distinct_points_than_clusters() -> None:
    features = np.repeat(np.eye(3, 8, dtype=np.float32), 5, axis=0)
    found = kmeans(Points(features), 7)
    assert len(found.centres) == 3 and (found.similarity > 1 - 1e-6).all()
    assert len({*found.labels}) == 3 and (found.labels.reshape(3, 5) == found.labels[::5, None]).all()
    assert len(kmeans(Points(features[:1]), 7).centres) == 1


def test_a_centre_that_has_no_points_takes_the_farthest(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = groups([50, 50], noise=0.05)
    of_both = unit(features.mean(0, keepdims=True))
    centres = torch.from_numpy(np.concatenate((of_both, -of_both)))  # to the second, no point is near
    assert (unit(features) @ centres.numpy().T).argmax(1).max() == 0
    monkeypatch.setattr(module, "_seeds", lambda *how: centres)
    assert adjusted_rand_score(labels, kmeans(Points(features), 2).labels) == 1


def test_an_interrupted_one_goes_on_and_gives_the_same(tmp_path: Path) -> None:
    features, _ = groups([80] * 6, noise=0.8)
    whole = kmeans(Points(features), 9, kept_in=tmp_path / "whole.npz")
    compared = 0

    def stop(count: int) -> None:
        nonlocal compared
        compared += count
        if compared > 3.5 * len(features):
            raise KeyboardInterrupt

    module_bytes, module.BLOCK_BYTES = module.BLOCK_BYTES, 4 * 16 * 100
    try:
        with pytest.raises(KeyboardInterrupt):
            kmeans(Points(features), 9, kept_in=tmp_path / "cut.npz", told=stop)
    finally:
        module.BLOCK_BYTES = module_bytes
    assert np.load(tmp_path / "cut.npz")["done"] == 3
    told: list[int] = []
    again = kmeans(Points(features), 9, kept_in=tmp_path / "cut.npz", told=told.append)
    in_all = comparisons(len(features), 20)  # where a bar ends, with what was done before and what is left out
    assert (again.labels == whole.labels).all() and sum(told) == in_all
    told.clear()  # what has ended is not begun again: one pass gives each point its centre
    assert (kmeans(Points(features), 9, kept_in=tmp_path / "cut.npz", told=told.append).labels == whole.labels).all()
    assert told == [20 * len(features), len(features)] and sum(told) == in_all


def test_centres_without_points_are_left_out() -> None:
    found = assigned(Points(np.eye(2, 4, dtype=np.float32)), torch.eye(4)[[3, 1, 0]])
    assert found.labels.tolist() == [1, 0] and np.array_equal(found.centres, np.eye(4)[[1, 0]])
