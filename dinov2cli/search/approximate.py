"""Approximate nearest neighbours by faiss: a part of the database is looked at, and what is found is compared exactly.

Shapes: N rows of the database, Q queries, D features, k neighbours.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from dinov2cli.console import Advance, logger
from dinov2cli.errors import DataError, EnvironmentProblem
from dinov2cli.files import replacing
from dinov2cli.search.neighbours import Found

KINDS = ("ivf", "hnsw")
BLOCK_ROWS, QUERIES = 1 << 15, 1 << 10
LINKS = 32
"""Neighbours of each row in the graph of `hnsw`."""
TRAINED_ON = 64
"""Rows for each inverted list that the lists' centres are fitted to; faiss asks for at least 39."""


def check_faiss(kind: str | None) -> None:
    """Raise EnvironmentProblem where faiss is asked for and not installed."""
    if kind is not None:
        _faiss()


def _faiss() -> Any:
    try:
        return import_module("faiss")
    except ImportError:
        raise EnvironmentProblem(
            "faiss is not installed.", "pip install 'dinov2cli[faiss]', or search exactly, without --faiss."
        ) from None


class Approximation:
    """A faiss index of normalised features, which are kept in it in float16.

    `ivf` puts rows into lists by the nearest of 4 sqrt(N) centres and looks into the `nprobe` lists nearest to a query;
    `hnsw` follows a graph of near rows, with `ef_search` candidates at a time.

    Args:
        features: [N, D] float16 or float32, may be memory-mapped.
        kind: one of `KINDS`.
        file: where it is kept. What is there is taken, and rows that are new are added to it, as rows never change;
            lists that have become four times as long as they should be are made anew.
        progress: of the rows.

    Raises:
        EnvironmentProblem: faiss is not installed.
        DataError: features that are not finite.
    """

    def __init__(
        self, features: np.ndarray, kind: str, file: Path | None = None, progress: Advance | None = None
    ) -> None:
        self.features, self.kind = features, kind
        rows, dim = features.shape
        lists = max(1, min(round(4 * rows**0.5), rows // TRAINED_ON))
        kept = _kept(file, rows, dim, lists) if file is not None else None
        self.faiss_index: Any = kept or _made(features, kind, lists)
        before = self.faiss_index.ntotal
        tell = progress or (lambda more: None)
        tell(before)
        for start in range(before, rows, BLOCK_ROWS):
            self.faiss_index.add(_unit(features[start : start + BLOCK_ROWS], start))
            tell(min(BLOCK_ROWS, rows - start))
        if file is not None and self.faiss_index.ntotal > before:
            _keep(self.faiss_index, file)

    def search(
        self,
        queries: np.ndarray,
        k: int,
        *,
        nprobe: int = 128,
        ef_search: int = 256,
        alive: np.ndarray | None = None,
        exclude: np.ndarray | None = None,
        progress: Advance | None = None,
    ) -> Found:
        """As `neighbours` with `cosine`, of the rows that are looked at; where these are fewer than k, the rest of a
        query's rows are -1, and their scores -inf.
        """
        faiss = _faiss()
        how: dict[str, Any] = {}
        if alive is not None and not alive.all():
            how["sel"] = faiss.IDSelectorBitmap(np.packbits(alive, bitorder="little"))
        if self.kind == "ivf":
            parameters = faiss.SearchParametersIVF(nprobe=nprobe, **how)
        else:
            parameters = faiss.SearchParametersHNSW(efSearch=max(ef_search, k + 1), **how)
        wanted = k + (exclude is not None)
        scores, rows = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
        for start in range(0, len(queries), QUERIES):
            block = slice(start, start + QUERIES)
            unit = _unit(queries[block], start)
            _, found = self.faiss_index.search(unit, wanted, params=parameters)
            if exclude is not None:
                found = np.where(found == exclude[block, None], -1, found)
            scores[block], rows[block] = self._compared(unit, found, k)
            if progress is not None:
                progress(len(unit))
        return Found(scores, rows)

    def _compared(self, unit: np.ndarray, found: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best by cosines of float32 of rows int64 [q, k'] that were found for queries [q, D]; -1 is none."""
        order = np.argsort(found, axis=1, kind="stable")  # of equal cosines the lower row
        found = np.take_along_axis(found, order, 1)
        candidates = _unit(self.features[found.reshape(-1)], 0).reshape(*found.shape, -1)
        scores = np.einsum("qd,qkd->qk", unit, candidates)
        scores[found < 0] = -np.inf
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(scores, best, 1), np.take_along_axis(found, best, 1)


def _made(features: np.ndarray, kind: str, lists: int) -> Any:
    faiss = _faiss()
    rows, dim = features.shape
    layout = f"IVF{lists},SQfp16" if kind == "ivf" else f"HNSW{LINKS},SQfp16"
    index = faiss.index_factory(dim, layout, faiss.METRIC_INNER_PRODUCT)
    some = np.sort(np.random.default_rng(0).permutation(rows)[: TRAINED_ON * lists if kind == "ivf" else 1000])
    logger.info("faiss: %s of %d rows", layout, rows)
    index.train(_unit(features[some], 0))
    return index


def _kept(file: Path, rows: int, dim: int, lists: int) -> Any:
    """What is kept in a file; None where it is not there or of no use any more."""
    faiss = _faiss()
    if not file.is_file():
        return None
    try:
        index = faiss.read_index(str(file))
    except RuntimeError as error:
        logger.warning("%s cannot be read, and is made anew: %s", file, str(error).splitlines()[0])
        return None
    outgrown = 4 * getattr(index, "nlist", lists) < lists
    return None if index.ntotal > rows or index.d != dim or outgrown else index


def _keep(index: Any, file: Path) -> None:
    """Write it; a folder that is full or read-only costs the keeping only."""
    faiss = _faiss()
    try:
        with replacing(file) as aside:
            faiss.write_index(index, str(aside))
    except (OSError, RuntimeError) as error:
        logger.warning(
            "%s cannot be written, and is made again at the next search: %s", file, str(error).splitlines()[0]
        )


def _unit(rows: np.ndarray, start: int) -> np.ndarray:
    """float32 [n, D] of length 1; zeros stay zeros."""
    block = np.array(rows, np.float32)
    lengths = np.linalg.norm(block, axis=1, keepdims=True)
    if not np.isfinite(lengths).all():
        raise DataError(f"row {start + int(np.flatnonzero(~np.isfinite(lengths[:, 0]))[0])} is not finite.")
    block /= np.maximum(lengths, np.finfo(np.float32).tiny)
    return block
