"""PGM, PPM, PAM and PFM with their own white, `maxval`: Pillow scales it away, or clips what is above 255."""

import re

import numpy as np

from dinov2cli.data.formats.stored import Stored, UnreadableImage, check_memory

_TOKEN = re.compile(rb"(?:\s|#[^\n]*\n)*([^\s#]+)")
_BYTES_OF_WORD = 60
"""Of a number written in digits, as an object of Python's, in a list, and as int64."""
_CHANNELS = {b"P2": 1, b"P3": 3, b"P5": 1, b"P6": 3, b"Pf": 1, b"PF": 3}


def read_netpbm(data: bytes | memoryview, path: str, limit_gb: float) -> Stored | None:
    """Samples as stored, white as the header says. Source: netpbm.sourceforge.net/doc. Raises `UnreadableImage`.

    None where the file does not begin as a netpbm of gray or colour values; bitmaps (P1, P4) are Pillow's.
    """
    magic = bytes(data[:2])
    if magic not in (*_CHANNELS, b"P7") or not bytes(data[2:3]).isspace():
        return None
    try:
        if magic == b"P7":
            width, height, channels, white, start = _pam_header(data)
        else:
            width, height, white, start = _header(data)
            channels = _CHANNELS[magic]
        if min(width, height, channels) < 1:
            raise ValueError(f"{width} x {height} x {channels} samples")
        dtype: np.dtype
        if magic in (b"Pf", b"PF"):
            dtype = np.dtype("<f4" if white < 0 else ">f4")
        elif 1 <= white <= 65535:
            dtype = np.dtype(np.uint8 if white < 256 else ">u2")
        else:
            raise ValueError(f"maxval {white}")
        beside = _BYTES_OF_WORD * channels if magic in (b"P2", b"P3") else 0
        check_memory(path, height, width, channels, limit_gb, itemsize=dtype.itemsize, beside=beside)
        size = height * width * channels
        if magic in (b"P2", b"P3"):
            array = np.array(bytes(data[start:]).split(maxsplit=size)[:size], np.int64).astype(dtype)
        else:
            array = np.frombuffer(data, dtype, size, start)
        array = array.reshape(height, width, channels).astype(dtype.newbyteorder("="))
    except (ValueError, AttributeError, KeyError) as error:
        raise UnreadableImage(path, f"damaged image ({error})") from error
    if dtype.kind == "f":
        return Stored(array[::-1], "PFM", rgb=channels == 3)  # rows from the bottom up
    if int(array.max()) > white:
        raise UnreadableImage(path, f"damaged image (a value of {array.max()} above maxval {white:g})")
    alpha = magic == b"P7" and channels in (2, 4)
    return Stored(array, "PNM", (0, white), rgb=channels >= 3, alpha=alpha)


def _header(data: bytes | memoryview) -> tuple[int, int, float, int]:
    head, words, position = bytes(data[:4096]), [], 2
    for _ in range(3):
        found = _TOKEN.match(head, position)
        if found is None:
            raise ValueError("the header ends early")
        words.append(found[1])
        position = found.end()
    return int(words[0]), int(words[1]), float(words[2]), position + 1


def _pam_header(data: bytes | memoryview) -> tuple[int, int, int, float, int]:
    head, ends, _ = bytes(data[:4096]).partition(b"ENDHDR\n")
    if not ends:
        raise ValueError("the header ends early")
    said = dict(line.split(maxsplit=1) for line in head.splitlines()[1:] if len(line.split(maxsplit=1)) == 2)
    width, height, channels, white = (int(said[key]) for key in (b"WIDTH", b"HEIGHT", b"DEPTH", b"MAXVAL"))
    return width, height, channels, white, len(head) + len(ends)
