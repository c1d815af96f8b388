"""JPEG and PNG through OpenCV: Pillow's pixels, several times faster, and colours of more bits, which Pillow drops.

What is rarer or damaged is Pillow's.
"""

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import cv2
import numpy as np

from dinov2cli.data.formats.stored import Stored, check_memory


class JpegHeader(NamedTuple):
    """Of the stored pixels, before any turn."""

    height: int
    width: int
    components: int  # 1 grayscale, 3 colour, 4 CMYK
    orientation: int  # EXIF's, 1 to 8


def jpeg_header(data: bytes | memoryview) -> JpegHeader | None:
    """What a JPEG says of itself before its pixels; None if it is not a JPEG of 8 bits a component."""
    if bytes(data[:2]) != b"\xff\xd8":
        return None
    position, orientation = 2, 1
    while position + 10 <= len(data):
        marker, kind = data[position], data[position + 1]
        if marker != 0xFF:
            return None
        if kind == 0xFF:  # padding before a marker
            position += 1
            continue
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            bits, height, width, components = struct.unpack_from(">BHHB", data, position + 4)
            return JpegHeader(height, width, components, orientation) if bits == 8 and height and width else None
        (length,) = struct.unpack_from(">H", data, position + 2)
        if kind == 0xE1 and bytes(data[position + 4 : position + 10]) == b"Exif\0\0":
            orientation = exif_orientation(data[position + 10 : position + 2 + length])
        position += 2 + length
    return None


def exif_orientation(exif: bytes | memoryview) -> int:
    """EXIF's orientation, 1 to 8, from a block that begins with its byte order; 1 where it says none or is damaged."""
    exif = exif[6:] if bytes(exif[:6]) == b"Exif\0\0" else exif
    order = {b"II": "<", b"MM": ">"}.get(bytes(exif[:2]))
    if order is None:
        return 1
    try:
        (first,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, first)
        for entry in range(first + 2, first + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(f"{order}HH", exif, entry)
            if tag == 0x0112:
                (turn,) = struct.unpack_from(f"{order}{ {1: 'B', 4: 'I'}.get(kind, 'H') }", exif, entry + 8)
                return int(turn) if 1 <= turn <= 8 else 1
    except struct.error:
        pass
    return 1


_REDUCED = {2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4, 8: cv2.IMREAD_REDUCED_COLOR_8}
_REDUCED_GRAY = {
    1: cv2.IMREAD_GRAYSCALE,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}


def read_jpeg(
    data: bytes | memoryview, path: str, limit_gb: float, shrink: int = 1, header: JpegHeader | None = None
) -> Stored | None:
    """A whole JPEG of one or three components, gray or RGB; None where OpenCV does not read it.

    Args:
        shrink: 1, 2, 4 or 8: decode it so much smaller.
        header: if it has been read.

    Raises:
        UnreadableImage: too large.
    """
    header = header or jpeg_header(data)
    if header is None or header.components not in (1, 3):
        return None
    check_memory(path, header.height // shrink, header.width // shrink, header.components, limit_gb)
    # libjpeg fills what is missing with gray and only warns, so OpenCV would pass a truncated file off as an image.
    # Tars pad members with up to 511 zero bytes.
    if b"\xff\xd9" not in bytes(data[-2:]) and b"\xff\xd9" not in bytes(data[-1024:]):
        return None
    how = _REDUCED_GRAY[shrink] if header.components == 1 else _REDUCED.get(shrink, cv2.IMREAD_COLOR_RGB)
    image = cv2.imdecode(np.frombuffer(data, np.uint8), how | cv2.IMREAD_IGNORE_ORIENTATION)
    if image is None:
        return None
    if header.components == 1:
        image = image[..., None]
    elif shrink > 1:
        image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    return Stored(image, "JPEG", (0, 255), rgb=header.components == 3, orientation=header.orientation)


PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""By colour type: gray, RGB, palette, gray with alpha, RGBA."""
_CHUNKS_THAT_CHANGE_NOTHING = frozenset(b"IHDR IDAT IEND pHYs tEXt zTXt iTXt tIME sRGB gAMA cHRM".split())


def _png_chunks(data: bytes | memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """Type and bytes of each chunk, header and checksum among these; ValueError where one is damaged or IEND missing.

    OpenCV tells of damage only on standard error.
    """
    view, position = memoryview(data), 8
    while position + 12 <= len(view):
        (length,) = struct.unpack_from(">I", view, position)
        end = position + 12 + length
        kind = bytes(view[position + 4 : position + 8])
        yield kind, view[position:end]
        if end > len(view) or zlib.crc32(view[position + 4 : end - 4]) != struct.unpack_from(">I", view, end - 4)[0]:
            raise ValueError(kind)
        if kind == b"IEND":
            return
        position = end
    raise ValueError("no IEND")


def is_plain_png(data: bytes | memoryview) -> bool:
    """Whether `data` is a whole PNG, by its checksums, with nothing that changes its pixels."""
    try:
        return all(
            kind in _CHUNKS_THAT_CHANGE_NOTHING and bytes(chunk[8:24]) != b"Raw profile type"  # EXIF, as a text
            for kind, chunk in _png_chunks(data)
        )
    except ValueError:
        return False


def read_png(data: bytes | memoryview, path: str, limit_gb: float) -> Stored | None:
    """A PNG that OpenCV decodes as the format says; None for the rest, which is Pillow's.

    Of 8 bits what is plain; of 16 all, as Pillow drops low bytes of colours; and gray of fewer bits where one level is
    transparent, which Pillow takes for another.

    Raises:
        UnreadableImage: too large.
    """
    if bytes(data[:8]) != b"\x89PNG\r\n\x1a\n" or len(data) < 33:
        return None
    width, height, bits, color = struct.unpack_from(">IIBB", data, 16)
    check_memory(path, height, width, PNG_CHANNELS.get(color, 4), limit_gb, itemsize=-(-bits // 8))
    if bits == 8 and color in (0, 2) and is_plain_png(data):
        how = cv2.IMREAD_GRAYSCALE if color == 0 else cv2.IMREAD_COLOR_RGB
        image = cv2.imdecode(np.frombuffer(data, np.uint8), how | cv2.IMREAD_IGNORE_ORIENTATION)
        return None if image is None else Stored(image.reshape(height, width, -1), "PNG", (0, 255), rgb=color == 2)
    if color == 3 or not (bits == 16 or (color == 0 and bits < 8)):
        return None
    try:
        chunks = list(_png_chunks(data))
    except ValueError:
        return None
    further = {kind: bytes(chunk[8:-4]) for kind, chunk in chunks if kind[:1].islower()}
    if b"acTL" in further or (bits < 8 and b"tRNS" not in further):
        return None
    alone = b"".join([bytes(data[:8]), *(chunk for kind, chunk in chunks if kind[:1].isupper())])
    image = cv2.imdecode(np.frombuffer(alone, np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None or image.dtype != (np.uint16 if bits == 16 else np.uint8):
        return None
    if color == 0:
        image = image[..., None]
    elif color == 2:
        image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    else:
        image = cv2.cvtColor(image, cv2.COLOR_BGRA2RGBA)[..., 0 if color == 6 else 2 :]
    alpha, white = color in (4, 6), 65535 if bits == 16 else 255
    if not alpha and (level := further.get(b"tRNS")):
        values = np.frombuffer(level, ">u2")
        if len(values) != image.shape[2]:
            return None
        hidden = (image == values * (white // (2**bits - 1))).all(axis=2, keepdims=True)
        image, alpha = np.concatenate([image, np.where(hidden, 0, white).astype(image.dtype)], axis=2), True
    turn = exif_orientation(further.get(b"eXIf", b""))
    array = np.ascontiguousarray(image)
    return Stored(array, "PNG", (0, white), rgb=color in (2, 6), alpha=alpha, orientation=turn)


_JP2, _CODESTREAM, _END = b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51", b"\xff\xd9"
_HEAD = 4096
"""Bytes in which the codestream of a JPEG 2000 begins."""


def read_deep_jpeg2000(data: bytes | memoryview, path: str, limit_gb: float) -> Stored | None:
    """A JPEG 2000 of colours with more than 8 bits: samples as stored, white as these say (ISO/IEC 15444-1, A.5.1).

    None for what is Pillow's.

    Raises:
        UnreadableImage: too large.
    """
    head = bytes(data[:_HEAD])
    start = head.find(_CODESTREAM)
    if start < 0 or not head.startswith((_JP2, _CODESTREAM)) or _END not in bytes(data[-1024:]):
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
