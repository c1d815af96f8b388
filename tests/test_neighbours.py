"""Searching features: the same as comparing all with all in float64, whatever the blocks."""

from pathlib import Path

import numpy as np
import pytest

from dinov2cli.errors import DataError
from dinov2cli.search import neighbours as module
from dinov2cli.search.neighbours import neighbours


def brute_force(database: np.ndarray, queries: np.ndarray, k: int, left_out: np.ndarray) -> tuple[np.ndarray, ...]:
    """Scores and rows in float64, ties by row; `left_out` bool [Q, N]."""
    scores = queries.astype(np.float64) @ database.astype(np.float64).T
    scores[left_out] = -np.inf
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, rows, 1), rows


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 13 rows of the database and 19 queries, for 8 dimensions."""
    monkeypatch.setattr(module, "BLOCK_BYTES", 13 * 8 * 4)
    monkeypatch.setattr(module, "QUERY_BYTES", 19 * 8 * 4)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("k", [1, 7, 20])
def test_neighbours_are_those_of_brute_force_and_the_lower_row_comes_first(dtype: str, k: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(k)
    database, queries = (rng.integers(-2, 3, (n, 8)).astype(dtype) for n in (101, 41))  # exact products, many ties
    np.save(tmp_path / "database.npy", database)
    alive = rng.random(101) > 0.3
    exclude = rng.integers(-1, 101, 41)
    left_out = np.tile(~alive, (41, 1))
    left_out[np.arange(41)[exclude >= 0], exclude[exclude >= 0]] = True
    steps: list[float] = []
    found = neighbours(
        np.load(tmp_path / "database.npy", mmap_mode="r"), queries, k, cosine=False, alive=alive, exclude=exclude,
        progress=steps.append,
    )  # fmt: skip
    scores, rows = brute_force(database, queries, k, left_out)
    assert found.scores.dtype == np.float32 and found.rows.dtype == np.int64
    np.testing.assert_array_equal(found.scores, scores)
    np.testing.assert_array_equal(found.rows, rows)
    assert sum(steps) == 101 * 41 and len(steps) > 1


@pytest.mark.usefixtures("small_blocks")
def test_cosines_do_not_depend_on_lengths_and_recall_is_whole() -> None:
    rng = np.random.default_rng(0)
    database, queries = (rng.normal(size=(n, 8)).astype(np.float32) for n in (300, 50))
    database[7] = 0
    found = neighbours(database * rng.uniform(0.1, 9, (300, 1)).astype(np.float32), queries * 3, 10)
    unit = database / np.maximum(np.linalg.norm(database, axis=1, keepdims=True), 1e-9)
    scores, rows = brute_force(
        unit, queries / np.linalg.norm(queries, axis=1, keepdims=True), 10, np.zeros((50, 300), bool)
    )
    np.testing.assert_array_equal(found.rows, rows)
    np.testing.assert_allclose(found.scores, scores, atol=1e-6)


def test_fewer_are_found_where_there_are_not_so_many_and_nothing_is_refused() -> None:
    database = np.eye(5, dtype=np.float32)
    assert neighbours(database, database, 9).rows.shape == (5, 5)
    others = neighbours(database, database, 9, exclude=np.arange(5)).rows
    assert others.shape == (5, 4) and not (others == np.arange(5)[:, None]).any()
    alive = np.array([True, False, False, True, False])
    assert neighbours(database, database, 9, alive=alive).rows[0].tolist() == [0, 3]
    with pytest.raises(DataError, match="at least one"):
        neighbours(database, database, 1, alive=np.zeros(5, bool))
    with pytest.raises(DataError, match=r"\(5, 4\)"):
        neighbours(database, database[:, :4], 1)


def test_features_that_are_not_finite_are_named_by_their_row() -> None:
    database = np.ones((9, 4), np.float16)
    database[6, 2] = np.nan
    with pytest.raises(DataError, match="row 6 of the database"):
        neighbours(database, np.ones((1, 4), np.float32), 1)
