"""JPEG 2000 of colours with more than 8 bits through OpenCV, which keeps them; the rest is Pillow's."""

import struct

import cv2
import numpy as np

from dinov2cli.data.formats.stored import Stored, check_memory

_FILE, _CODESTREAM, _END = b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51", b"\xff\xd9"
_HEADER = 4096
"""Bytes in which the codestream begins."""


def read_deep_jpeg2000(data: bytes | memoryview, path: str, limit_gb: float) -> Stored | None:
    """Samples as stored, white as their bits say (ISO/IEC 15444-1, A.5.1); None for what is Pillow's.

    Raises:
        UnreadableImage: too large.
    """
    head = bytes(data[:_HEADER])
    start = head.find(_CODESTREAM)
    if start < 0 or not head.startswith((_FILE, _CODESTREAM)) or _END not in bytes(data[-1024:]):
        return None
    try:
        right, bottom, left, top, *_, channels = struct.unpack_from(">8IH", head, start + 8)
        components = {head[at : at + 3] for at in range(start + 42, start + 42 + 3 * channels, 3)}
    except struct.error:
        return None
    bits = head[start + 42] + 1 if len(head) > start + 42 else 0
    if channels not in (3, 4) or len(components) != 1 or not 8 < bits <= 16:  # above 128 they are signed
        return None
    check_memory(path, bottom - top, right - left, channels, limit_gb, itemsize=2, beside=4)
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None or image.dtype != np.uint16 or image.shape[2:] != (channels,):
        return None
    image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB if channels == 3 else cv2.COLOR_BGRA2RGBA)
    return Stored(image, "JPEG2000", (0, 2**bits - 1), rgb=True, alpha=channels == 4)
