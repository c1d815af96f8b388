"""Memory of steps that repeat: main memory that stays with the process, a GPU's without gaps, Python's objects."""

import ctypes
import gc
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4  # malloc.h
_KEEPING = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1, _M_TOP_PAD: 64 << 20}
_GLIBC = {_M_MMAP_MAX: 65536, _M_MMAP_THRESHOLD: 32 << 20, _M_TRIM_THRESHOLD: 64 << 20, _M_TOP_PAD: 128 << 10}
_decided: bool | None = None  # by the first who asked


def keep_freed_memory(*, room: bool = True) -> bool:
    """Have glibc's malloc reuse freed memory of any size for the rest of the process; say whether it does.

    The first call decides for the process, as malloc's settings are the process's: an evaluation within a training does
    not overrule what the training found. Without `room`, memory goes back to the system.

    By default an array of more than 32 MB is a mapping of its own: every one that a training step makes is fetched from
    the system page by page, zeroed, and given back at once. On a CPU that takes a sixth of a ViT-S step, and a quarter
    where batches are large. The price is that memory freed after a peak stays with the process, and that reuse leaves
    gaps: a training step then needs up to a fifth more. Elsewhere than on Linux with glibc nothing is changed.
    """
    global _decided
    if _decided is None:
        _decided = room and _set_malloc(_KEEPING)
    return _decided


def grow_segments() -> None:
    """Have PyTorch take a GPU's memory in segments that grow, before it takes the first.

    The number of masked patches differs from step to step, and pieces of ever other sizes leave gaps else. Whoever has
    set `PYTORCH_ALLOC_CONF` or `PYTORCH_CUDA_ALLOC_CONF` is left with what they say.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


@contextmanager
def without_collections() -> Iterator[None]:
    """Around a step: Python's garbage collection waits for its end, so that no process makes the others wait."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@contextmanager
def memory_given_back() -> Iterator[None]:
    """Around work in a process that goes on with something else: `keep_freed_memory` within lasts no longer.

    Then malloc has the settings at which glibc arrives by itself once an array of 32 MB was freed, and the memory that
    was kept goes back to the system.
    """
    global _decided
    was_open = _decided is None
    try:
        yield
    finally:
        if was_open and _decided:
            _set_malloc(_GLIBC)
            ctypes.CDLL(None).malloc_trim(0)
        if was_open:
            _decided = None


def _set_malloc(settings: dict[int, int]) -> bool:
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    results = [mallopt(name, value) for name, value in settings.items()]
    return all(result == 1 for result in results)
