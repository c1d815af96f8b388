"""Main memory of steps that repeat: kept by the process instead of being given back and fetched anew."""

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h
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
        _decided = room and _set_malloc()
    return _decided


def _set_malloc() -> bool:
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 64 << 20))
    results = [mallopt(name, value) for name, value in settings]
    return all(result == 1 for result in results)
