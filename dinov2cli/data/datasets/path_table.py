"""Millions of paths in two arrays, which forked workers share and files can memory-map."""

from collections.abc import Iterable

import numpy as np


class PathTable:
    """An immutable sequence of paths.

    Args:
        blob: the paths' bytes one after another, uint8 [total bytes].
        ends: where each path ends in `blob`, int64 [N].
    """

    def __init__(self, blob: np.ndarray, ends: np.ndarray) -> None:
        self.blob = blob
        self.ends = ends

    @classmethod
    def of(cls, paths: Iterable[str]) -> "PathTable":
        encoded = [path.encode(errors="surrogateescape") for path in paths]
        ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = int(self.ends[index - 1]) if index > 0 else 0
        return bytes(self.blob[start : int(self.ends[index])]).decode(errors="surrogateescape")
