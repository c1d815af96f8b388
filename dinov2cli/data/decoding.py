"""Image files to RGB pixels."""

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageOps

from dinov2cli.errors import DataError


class UnreadableImage(DataError):
    """A file that is no image, or a damaged one."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return UnreadableImage, (self.path, self.reason)


class ImageSize(NamedTuple):
    """Of the stored pixels, before any EXIF rotation."""

    height: int
    width: int


def read_image(path: Path) -> np.ndarray:
    """An image file as people look at it: upright, alpha laid over black; uint8 [H, W, 3]. Raises `UnreadableImage`."""
    return decode_image(read_file(str(path)), str(path), upright=True, alpha=True)


def read_file(path: str) -> bytes:
    """A file's bytes; raises `UnreadableImage` with the operating system's reason."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise UnreadableImage(path, f"cannot be read ({error.strerror})") from error


def decode_image(
    data: bytes | memoryview, path: str, *, shrink: int = 1, upright: bool = False, alpha: bool = False
) -> np.ndarray:
    """RGB pixels of an encoded image, uint8 [H, W, 3]. Grayscale, palette, CMYK and 16-bit images become RGB.

    Args:
        shrink: with 2, 4 or 8, a JPEG is decoded directly at that fraction of its size.
        upright: apply EXIF rotation; the reference implementation does not.
        alpha: lay what is transparent over black; else its colours are taken, as in the reference implementation.

    Raises:
        UnreadableImage: what `path` holds is not an image or is damaged or cut short.
    """
    if upright or alpha:
        return _decode_with_pillow(data, path, shrink, upright, alpha)
    header = jpeg_header(data)
    if header is not None and header.components in (1, 3) and _ends_as_jpeg(data):
        image = _decode_jpeg(data, shrink)
        if image is not None:
            return image
    if shrink == 1 and is_plain_png(data):
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
        if image is not None:
            return image
    return _decode_with_pillow(data, path, shrink)


class JpegHeader(NamedTuple):
    height: int
    width: int
    components: int  # 1 grayscale, 3 colour, 4 CMYK


def jpeg_header(data: bytes | memoryview) -> JpegHeader | None:
    """Size and components from a JPEG's frame header; None if it is not a JPEG of 8 bits a component."""
    if bytes(data[:2]) != b"\xff\xd8":
        return None
    position = 2
    while position + 10 <= len(data):
        marker, kind = data[position], data[position + 1]
        if marker != 0xFF:
            return None
        if kind == 0xFF:  # padding before a marker
            position += 1
            continue
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            bits, height, width, components = struct.unpack_from(">BHHB", data, position + 4)
            return JpegHeader(height, width, components) if bits == 8 and height and width else None
        position += 2 + struct.unpack_from(">H", data, position + 2)[0]
    return None


_PNG = b"\x89PNG\r\n\x1a\n"
_GRAY_OR_RGB = (0, 2)
_CHUNKS_THAT_CHANGE_NOTHING = frozenset(b"IHDR IDAT IEND pHYs tEXt zTXt iTXt tIME sRGB gAMA cHRM".split())


def is_plain_png(data: bytes | memoryview) -> bool:
    """Whether `data` is a whole PNG, by its checksums, of 8-bit gray or RGB: what OpenCV decodes as Pillow does.

    Decoding it is several times faster with OpenCV, which tells of others' damage only on standard error.
    """
    if bytes(data[:8]) != _PNG or len(data) < 33 or data[24] != 8 or data[25] not in _GRAY_OR_RGB:
        return False
    view, position = memoryview(data), 8
    while position + 12 <= len(view):
        (length,) = struct.unpack_from(">I", view, position)
        end = position + 8 + length
        kind = bytes(view[position + 4 : position + 8])
        if kind not in _CHUNKS_THAT_CHANGE_NOTHING or end + 4 > len(view):
            return False
        if zlib.crc32(view[position + 4 : end]) != struct.unpack_from(">I", view, end)[0]:
            return False
        if kind == b"IEND":
            return True
        position = end + 4
    return False


_REDUCED = {2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4, 8: cv2.IMREAD_REDUCED_COLOR_8}


def _decode_jpeg(data: bytes | memoryview, shrink: int) -> np.ndarray | None:
    encoded = np.frombuffer(data, np.uint8)
    if shrink == 1:
        return cv2.imdecode(encoded, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    image = cv2.imdecode(encoded, _REDUCED[shrink] | cv2.IMREAD_IGNORE_ORIENTATION)
    return None if image is None else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _ends_as_jpeg(data: bytes | memoryview) -> bool:
    # libjpeg fills what is missing with gray and only warns, so OpenCV would pass a truncated file off as an image.
    # Tars pad members with up to 511 zero bytes.
    return b"\xff\xd9" in bytes(data[-2:]) or b"\xff\xd9" in bytes(data[-1024:])


def _decode_with_pillow(
    data: bytes | memoryview, path: str, shrink: int, upright: bool = False, alpha: bool = False
) -> np.ndarray:
    if len(data) == 0:
        raise UnreadableImage(path, "the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged EXIF blocks and the like: the pixels decide
            with Image.open(io.BytesIO(data)) as image:
                width, height = image.size
                if shrink > 1:
                    image.draft("RGB", (-(-width // shrink), -(-height // shrink)))
                turned = ImageOps.exif_transpose(image) if upright else image
                return _over_black_or_rgb(turned) if alpha else np.array(_as_rgb(turned))
    except Image.UnidentifiedImageError:
        raise UnreadableImage(path, "not an image of any type that Pillow reads") from None
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise UnreadableImage(path, f"damaged image ({error})") from error


def _over_black_or_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):  # 16 bits, or 16 bits in 32
        return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if "A" in image.mode or "transparency" in image.info:
        return over_black(np.asarray(image.convert("RGBA")))
    return np.array(_as_rgb(image))


def over_black(rgba: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 4] with straight alpha, laid over black: uint8 [H, W, 3]."""
    laid: np.ndarray = ((rgba[..., :3].astype(np.uint16) * rgba[..., 3:] + 127) // 255).astype(np.uint8)
    return laid


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
