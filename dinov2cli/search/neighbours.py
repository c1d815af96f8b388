"""Nearest neighbours among features that need not fit into memory: exact, block by block, or approximate, by faiss,
where a part of the database is looked at, and what is found is compared exactly.

Shapes: N rows of the database, Q queries, D features, k neighbours.
"""

from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dinov2cli.console import Advance, logger
from dinov2cli.errors import DataError, EnvironmentProblem
from dinov2cli.eval.nearest import grouped_topk
from dinov2cli.files import replacing

BLOCK_BYTES = 64 << 20
"""Largest size of a block of the database in float32, and of its scores."""
QUERY_BYTES = 256 << 20
"""Largest size in float32 of the queries for which the database is read once."""


class Found(NamedTuple):
    """The k best rows of each query, best first; of rows that score the same, the lower one first."""

    scores: np.ndarray
    """float32 [Q, k]."""
    rows: np.ndarray
    """int64 [Q, k]."""


def neighbours(
    database: np.ndarray,
    queries: np.ndarray,
    k: int,
    *,
    cosine: bool = True,
    alive: np.ndarray | None = None,
    exclude: np.ndarray | None = None,
    device: torch.device | str = "cpu",
    progress: Advance = lambda more: None,
) -> Found:
    """The k rows of `database` most similar to each query, by comparing all with all.

    Memory is bounded by `BLOCK_BYTES` and `QUERY_BYTES`, beside what is returned: 12 bytes for each of Q x k. The
    arrays may be memory-mapped; the database is read once for `QUERY_BYTES` of queries. All of PyTorch's threads work.

    Args:
        database: [N, D] float16 or float32; `numpy.load(file, mmap_mode="r")` gives such.
        queries: [Q, D] likewise; may be the database itself.
        k: at least 1. Fewer are returned where there are not so many: min(k, rows that may be found) columns.
        cosine: compare directions; False: inner products. Products are of float32.
        alive: bool [N], the rows that may be found; None: all.
        exclude: int64 [Q], the one row that each query may not find, such as itself; -1: none. Where it is given, one
            row less is returned at most, for all queries.
        device: where products are computed.
        progress: of Q x N scores.

    Raises:
        DataError: shapes that do not go together, nothing to be found, or features that are not finite.
    """
    N, Q, D = len(database), len(queries), database.shape[-1]
    if database.ndim != 2 or queries.ndim != 2 or queries.shape[1] != D:
        raise DataError(
            f"features of {queries.shape} cannot be looked for among {database.shape}; give [Q, D], [N, D]."
        )
    findable = (N if alive is None else int(np.count_nonzero(alive))) - (exclude is not None)
    if k < 1 or findable < 1:
        raise DataError(f"k={k} neighbours of {max(findable, 0)} rows; at least one of at least one can be found.")
    k = min(k, findable)
    scores, rows = np.empty((Q, k), np.float32), np.empty((Q, k), np.int64)
    n_block, q_block = (max(1, size // (4 * D)) for size in (BLOCK_BYTES, QUERY_BYTES))
    at_once = max(1, BLOCK_BYTES // (4 * n_block))  # queries, whose scores to a block are computed together
    for first in range(0, Q, q_block):
        here = slice(first, first + q_block)
        wanted = _block(queries[here], "queries", first, cosine=cosine, device=device).split(at_once)
        best = [Best.none(part) for part in wanted]
        for start in range(0, N, n_block):
            block = _block(database[start : start + n_block], "database", start, cosine=cosine, device=device)
            dead = None if alive is None else torch.from_numpy(~alive[start : start + n_block]).to(block.device)
            for number, part in enumerate(wanted):
                similarity = part @ block.T
                if dead is not None:
                    similarity.masked_fill_(dead, -torch.inf)
                if exclude is not None:
                    at = first + number * at_once
                    _leave_out(similarity, exclude[at : at + len(part)] - start)
                best[number] = best[number].with_columns(similarity, k, start)
                progress(similarity.numel())
        scores[here], rows[here] = (torch.cat(found).cpu().numpy() for found in zip(*best, strict=True))
    return Found(scores, rows)


class Best(NamedTuple):
    """The best so far of some queries: scores [q, k'] and rows int64 [q, k'], in the order of `Found`."""

    scores: Tensor
    rows: Tensor

    @staticmethod
    def none(queries: Tensor) -> "Best":
        """Of queries [q, D], before any row."""
        return Best(queries.new_empty(len(queries), 0), queries.new_empty((len(queries), 0), dtype=torch.int64))

    def with_columns(self, similarity: Tensor, k: int, start: int) -> "Best":
        """The k best of these and of `similarity` [q, n] to the rows from `start` on, which come after all so far."""
        n = similarity.shape[1]
        values, columns = grouped_topk(similarity, min(k + 1, n))
        if n > k:  # where the last that is in scores as the first that is not, the lowest rows of all that do are in
            level_with_next = (values[:, k] == values[:, k - 1]) & values[:, k].isfinite()
            for query in level_with_next.nonzero()[:, 0].tolist():
                last = values[query, k]
                above = (similarity[query] > last).nonzero()[:, 0]
                level = (similarity[query] == last).nonzero()[:, 0]
                columns[query, :k] = torch.cat((above, level))[:k]
            columns = columns[:, :k]
        columns = columns.sort(dim=1).values
        values = similarity.gather(1, columns)
        values, rows = torch.cat((self.scores, values), 1), torch.cat((self.rows, columns + start), 1)
        order = values.sort(dim=1, descending=True, stable=True).indices[:, :k]
        return Best(values.gather(1, order), rows.gather(1, order))


def _block(rows: np.ndarray, name: str, start: int, *, cosine: bool, device: torch.device | str) -> Tensor:
    """float32 [n, D] on the device, of length 1 for cosines (zeros stay zeros)."""
    block = torch.from_numpy(np.array(rows)).to(device).float()  # a copy: a mapped file is read-only
    lengths = torch.linalg.vector_norm(block, dim=1)
    if not bool(lengths.isfinite().all()):
        row = start + int(lengths.isfinite().logical_not().nonzero()[0, 0])
        raise DataError(f"row {row} of the {name} is not finite: it is no image's features.")
    return block.div_(lengths.clamp_(min=torch.finfo(torch.float32).tiny)[:, None]) if cosine else block


def _leave_out(similarity: Tensor, columns: np.ndarray) -> None:
    """Let no query find its one column, where that is one of these."""
    (queries,) = ((columns >= 0) & (columns < similarity.shape[1])).nonzero()
    at = (torch.from_numpy(array).to(similarity.device) for array in (queries, columns[queries]))
    similarity[tuple(at)] = -torch.inf


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
        self, features: np.ndarray, kind: str, file: Path | None = None, progress: Advance = lambda more: None
    ) -> None:
        self.features, self.kind = features, kind
        rows, dim = features.shape
        lists = max(1, min(round(4 * rows**0.5), rows // TRAINED_ON))
        kept = _kept(file, rows, dim, lists) if file is not None else None
        self.faiss_index: Any = kept or _made(features, kind, lists)
        before = self.faiss_index.ntotal
        progress(before)
        for start in range(before, rows, BLOCK_ROWS):
            self.faiss_index.add(_unit(features[start : start + BLOCK_ROWS], start))
            progress(min(BLOCK_ROWS, rows - start))
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
        progress: Advance = lambda more: None,
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
