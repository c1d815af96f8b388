"""Exact nearest neighbours by inner product, in chunks, on one process or with the keys spread over several.

Shapes: Q queries, N keys, D features, k neighbours.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dinov2cli import distributed

_CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
_MAX_KEYS_PER_CHUNK = 1 << 18


class Neighbours(NamedTuple):
    """The k best keys of each query, best first."""

    similarities: Tensor  # float [Q, k]
    labels: Tensor  # int64 [Q, k]


class KeyBank:
    """The keys of this process, searched together with those of all other processes.

    Args:
        keys: [N, D], the part of this process.
        labels: int64 [N].
        ids: int64 [N], ascending: what identifies a key, so that a query can leave itself out.
        device: where similarities are computed; keys stay where they are and are moved chunk by chunk.
    """

    def __init__(self, keys: Tensor, labels: Tensor, ids: Tensor, device: torch.device | str = "cpu") -> None:
        self.keys, self.labels, self.ids = keys, labels, ids
        self.device = torch.device(device)

    def search(self, queries: Tensor, k: int, exclude: Tensor | None = None) -> Neighbours:
        """The k keys most similar to each query, among the keys of all processes; every process passes the same
        queries [Q, D] and, to leave keys out, the id of the one key that each may not find: `exclude` int64 [Q].
        """
        local = self._search_here(queries, min(k, len(self.keys)), exclude)
        if distributed.world_size() == 1:
            return local
        similarities = _gather_columns(local.similarities)
        best, at = similarities.topk(k, dim=1)
        return Neighbours(best, _gather_columns(local.labels).gather(1, at))

    def query_block(self) -> int:
        """How many queries to search at once, so that their similarities to one chunk of keys fit the budget."""
        budget = _CHUNK_BYTES.get(self.device.type, 64 << 20)
        return max(1, min(1024, budget // (4 * max(1, min(len(self.keys), _MAX_KEYS_PER_CHUNK)))))

    def _search_here(self, queries: Tensor, k: int, exclude: Tensor | None) -> Neighbours:
        queries = queries.to(self.device)
        best = queries.new_empty((len(queries), 0))
        labels = torch.empty((len(queries), 0), dtype=torch.int64, device=self.device)
        for start in range(0, len(self.keys), _MAX_KEYS_PER_CHUNK):
            chunk = slice(start, start + _MAX_KEYS_PER_CHUNK)
            similarities = queries @ self.keys[chunk].to(self.device).T
            if exclude is not None:
                _mask_ids(similarities, self.ids[chunk].to(self.device), exclude.to(self.device))
            found, at = grouped_topk(similarities, min(k, similarities.shape[1]))
            best, order = torch.cat((best, found), 1).topk(min(k, best.shape[1] + found.shape[1]), dim=1)
            labels = torch.cat((labels, self.labels[chunk].to(self.device)[at]), 1).gather(1, order)
        return Neighbours(best, labels)


def grouped_topk(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row and their columns, largest first: `values.topk(k)`, several times faster on long rows.

    Columns are put in groups and only the k groups with the largest maxima are looked into: any value among the k
    largest lies in one of these, since otherwise k groups would each hold a larger one.
    values: [Q, N] -> float [Q, k], int64 [Q, k].
    """
    Q, N = values.shape
    group_size = int((N / max(k, 1)) ** 0.5)  # balances the number of groups with the number of values looked into
    n_groups = N // max(group_size, 1)
    if group_size < 2 or n_groups <= k:
        return values.topk(k, dim=1)
    grouped = values[:, : n_groups * group_size].view(Q, group_size, n_groups)  # a group is a strided set of columns
    groups = grouped.amax(1).topk(k, dim=1, sorted=False).indices  # [Q, k]
    offsets = torch.arange(group_size, device=values.device) * n_groups
    columns = (groups[:, :, None] + offsets).flatten(1)  # [Q, k * group_size]
    rest = torch.arange(n_groups * group_size, N, device=values.device).expand(Q, -1)
    columns = torch.cat((columns, rest), 1)
    best, at = values.gather(1, columns).topk(k, dim=1)
    return best, columns.gather(1, at)


def _mask_ids(similarities: Tensor, ids: Tensor, exclude: Tensor) -> None:
    position = torch.searchsorted(ids, exclude).clamp(max=len(ids) - 1)
    rows = (ids[position] == exclude).nonzero()[:, 0]
    similarities[rows, position[rows]] = -torch.inf


def _gather_columns(tensor: Tensor) -> Tensor:
    """[Q, k_r] of each process -> [Q, sum k_r]."""
    return distributed.all_gather_rows(tensor.T.contiguous()).T
