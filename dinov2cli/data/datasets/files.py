"""Reading parts of files by position, in any process, with a bounded number of files open."""

import ast
import os
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from dinov2cli.data.decoding import UnreadableImage
from dinov2cli.errors import DataError

OPEN_FILES = 16


class OpenFiles:
    """Reads byte ranges of files and keeps the last `OPEN_FILES` of them open.

    Positions are given with every read, so forked processes can share it; a copy sent to another process opens anew.
    """

    def __init__(self) -> None:
        self._descriptors: OrderedDict[str, int] = OrderedDict()

    def read(self, path: str, start: int, size: int) -> bytes:
        """`size` bytes from `start`. Raises `UnreadableImage` if the file is missing or shorter."""
        try:
            data = os.pread(self._open(path), size, start)
        except OSError as error:
            raise UnreadableImage(path, f"cannot be read ({error.strerror})") from error
        if len(data) < size:
            raise UnreadableImage(path, f"ends at byte {start + len(data)}, {start + size} were expected")
        return data

    def _open(self, path: str) -> int:
        if path in self._descriptors:
            self._descriptors.move_to_end(path)
        else:
            self._descriptors[path] = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            if len(self._descriptors) > OPEN_FILES:
                os.close(self._descriptors.popitem(last=False)[1])
        return self._descriptors[path]

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._descriptors = OrderedDict()

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)


class RecordFile:
    """A structured `.npy` read record by record: opening it costs nothing, however many records it has.

    Memory-mapping would do as well, but every page touched would count as each worker's memory.

    Raises:
        DataError: the file is missing or is not a one-dimensional structured array.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                header, self._start = _npy_header(file.read(65536))
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error
        except (ValueError, SyntaxError, struct.error) as error:
            raise DataError(f"{path}: not a .npy file ({error})") from error
        self.dtype = np.dtype([tuple(field) for field in header["descr"]] if _is_fields(header["descr"]) else "V1")
        if self.dtype.names is None or len(header["shape"]) != 1:
            raise DataError(f"{path}: expected a one-dimensional structured array")
        self._length = int(header["shape"][0])
        self._files = OpenFiles()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> np.void:
        """The record; IndexError outside 0 .. len - 1."""
        if not 0 <= index < self._length:
            raise IndexError(f"index {index} is outside {self.path} with {self._length} records")
        size = self.dtype.itemsize
        content = self._files.read(str(self.path), self._start + index * size, size)
        record: np.void = np.frombuffer(content, self.dtype)[0]
        return record

    def column(self, name: str) -> np.ndarray:
        """One field of all records, copied into memory."""
        return np.array(np.load(self.path, mmap_mode="r")[name])


def _npy_header(data: bytes) -> tuple[dict[str, Any], int]:
    if data[:6] != b"\x93NUMPY":
        raise ValueError("no NumPy signature")
    length_format, length_size = ("<H", 2) if data[6] == 1 else ("<I", 4)
    (length,) = struct.unpack_from(length_format, data, 8)
    start = 8 + length_size
    return ast.literal_eval(data[start : start + length].decode("utf-8")), start + length


def _is_fields(descr: Any) -> bool:
    return isinstance(descr, list)
