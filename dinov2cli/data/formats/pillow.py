"""What Pillow reads: 8-bit types, animations' first frames, and 16-bit gray."""

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from dinov2cli.data.formats.fast import exif_orientation
from dinov2cli.data.formats.stored import Stored, UnreadableImage, check_memory, further

BYTES_OF_MODE = {"I": 4, "F": 4, "I;16": 2, "I;16B": 2, "I;16L": 2}
_BYTES_OF_DECODER = {"WEBP": 15, "JPEG2000": 10, "AVIF": 8, "HEIF": 8}
"""A pixel in a decoder's own memory; of the others, what Pillow holds once more where it converts colours."""
_ONE_PICTURE = ("MPO", "PSD")  # their further frames are previews, views of the other eye, layers
_BEGINNINGS = {
    b"<!doctype html": "a web page: the download led elsewhere",
    b"<html": "a web page: the download led elsewhere",
    b"version https://git-lfs": "a Git LFS pointer: run `git lfs pull`",
}
_OTHERWISE = {
    ".heic": "pip install pillow-heif, or convert it to JPEG or AVIF",
    ".heif": "pip install pillow-heif, or convert it to JPEG or AVIF",
    ".fits": "save its array as .npy (astropy.io.fits.getdata and numpy.save)",
    ".nii": "save its slices as .npy (nibabel.load(...).get_fdata() and numpy.save)",
    ".h5": "name the array in it: FILE.h5::/PATH",
    ".hdf5": "name the array in it: FILE.hdf5::/PATH",
    ".svg": "render it to PNG",
    ".hdr": "save it as float TIFF or .npy",
    ".exr": "save it as float TIFF or .npy",
}


def read_with_pillow(data: bytes | memoryview, path: str, limit_gb: float, shrink: int = 1) -> Stored:
    """A file of any type that Pillow knows; `shrink` as in `decoding.decode_image`. Raises `UnreadableImage`."""
    if len(data) == 0:
        raise UnreadableImage(path, "the file is empty")
    _know_heif(data)
    with _opened(data, path) as image:
        width, height = image.size
        if shrink > 1:
            image.draft("RGB", (-(-width // shrink), -(-height // shrink)))
            width, height = image.size
        itemsize, beside = BYTES_OF_MODE.get(image.mode, 1), _BYTES_OF_DECODER.get(str(image.format), 4)
        check_memory(path, height, width, len(image.getbands()), limit_gb, itemsize=itemsize, beside=beside)
        if image.format == "FITS":
            raise UnreadableImage(path, f"FITS is not read; {_OTHERWISE['.fits']}")
        left_out = ""
        if image.format not in _ONE_PICTURE and getattr(image, "is_animated", False):
            left_out = further(getattr(image, "n_frames", 2) - 1, "frame")
            image.seek(0)
        return replace(of_picture(image, path), left_out=left_out)


@contextmanager
def _opened(data: bytes | memoryview, path: str) -> Iterator[Image.Image]:
    """Around what reads a picture. Raises `UnreadableImage` in place of what Pillow does."""
    # Pillow's own limit is a fixed number of pixels; ours is memory, and is checked before any is decoded.
    pixels, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged EXIF blocks and the like: the pixels decide
            with Image.open(io.BytesIO(data)) as image:
                yield image
    except Image.UnidentifiedImageError:
        begin = bytes(data[:64]).lstrip().lower()
        told = (what for text, what in _BEGINNINGS.items() if begin.startswith(text))
        remedy = next(told, _OTHERWISE.get(Path(path).suffix.lower(), ""))
        reason = "not an image of any type that Pillow reads"
        raise UnreadableImage(path, f"{reason}; {remedy}" if remedy else reason) from None
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, MemoryError) as error:
        raise UnreadableImage(path, f"damaged image ({error})") from error
    finally:
        Image.MAX_IMAGE_PIXELS = pixels


def _know_heif(data: bytes | memoryview) -> None:
    if bytes(data[4:8]) == b"ftyp" and "HEIF" not in Image.OPEN:
        with suppress(ImportError):
            from pillow_heif import register_heif_opener

            register_heif_opener()


def of_picture(image: Image.Image, path: str) -> Stored:
    """What an image of Pillow's holds. Raises `UnreadableImage` for colours that are not read, else as Pillow does."""
    kind = str(image.format)
    turn = exif_orientation(image.info.get("exif") or _exif_in_text(image))
    mode = image.mode
    if mode.startswith("I;16") or (mode == "I" and kind == "PNG"):
        return Stored(np.array(image).astype(np.uint16)[..., None], kind, (0, 65535), orientation=turn)
    if mode in ("I", "F"):
        return Stored(np.array(image)[..., None], kind, orientation=turn)
    if mode == "LAB":
        raise UnreadableImage(path, "its colours are CIE L*a*b*, which are not read; convert it to RGB")
    if mode == "CMYK" and kind == "JPEG" and "adobe" not in image.info:
        # Pillow takes every CMYK JPEG for Adobe's, in which no ink is 255. Without Adobe's marker it is 0.
        image = Image.fromarray(255 - np.asarray(image), "CMYK")
    alpha = "transparency" in image.info or mode in ("LA", "La", "PA", "RGBA", "RGBa")
    gray = mode in ("1", "L", "LA", "La") and not (alpha and mode in ("1", "L"))
    wanted = ("LA" if gray else "RGBA") if alpha else ("L" if gray else "RGB")
    if mode != wanted or "transparency" in image.info:  # else it would be copied
        image = image.convert(wanted)
    array = np.array(image)
    array = array[..., None] if array.ndim == 2 else array
    rgb = array.shape[2] >= 3
    return Stored(array, kind, (0, 255), rgb=rgb, alpha=alpha, orientation=turn)


def _exif_in_text(image: Image.Image) -> bytes:
    """EXIF's block as ImageMagick writes it into the texts of a PNG: hexadecimal digits, after three lines."""
    names = (f"Raw profile type {kind}" for kind in ("exif", "APP1"))
    text = next((image.info[name] for name in names if name in image.info), "")
    try:
        return bytes.fromhex("".join(str(text).split("\n")[3:]))
    except ValueError:
        return b""


def read_indices(data: bytes | memoryview, path: str, limit_gb: float) -> Stored:
    """A picture of one channel, as numbers: of a palette the places in it, of black and white 0 and 1, of greys of two
    or four bits what is stored.

    Raises:
        UnreadableImage: it has colours, is a JPEG, whose compression changes numbers, or is damaged.
    """
    with _opened(data, path) as image:
        check_memory(path, image.height, image.width, BYTES_OF_MODE.get(image.mode, 1), limit_gb)
        if image.format == "JPEG":
            raise UnreadableImage(path, "JPEG changes the numbers that it stores; save index masks as PNG")
        if image.mode not in ("1", "L", "P", "I", "I;16", "I;16B", "I;16L"):
            raise UnreadableImage(path, f"is a picture in colours ({image.mode}), not a mask of class numbers; "
                                  "save each pixel's class as its number, in a grey or palette PNG")  # fmt: skip
        numbers = np.array(image, np.int64)
        if image.format == "PNG" and image.mode == "L" and (bits := data[24]) < 8:
            numbers //= 255 // (2**bits - 1)  # which Pillow spreads over 0 to 255
        turn = exif_orientation(image.info.get("exif") or b"")
        return Stored(numbers[..., None], str(image.format), orientation=turn)
