"""The one decoder, of training, evaluation, features and pictures: an image file's bytes to what a network is shown.

    bytes --read_stored--> Stored: samples [H, W, C] as the file has them, and what it says of them   (formats/)
          --upright------> turned by EXIF's orientation                                      data.exif_orientation
          --values-------> uint8 where the file's black and white are 0 and 255, else float32 in 0..1  data.value_range
          --to_rgb-------> [H, W, 3]: grey repeated, transparent parts over one background             data.background
          or --to_channels-> [H, W, C], where a network takes other channels than red, green and blue    data.channels

`Reading` holds these settings; it is made of a configuration's `data` keys or of a command's options. What is left out
of an image, a fourth band or further pages, is said once, with the first file's name.
"""

import errno
import json
import os
import stat
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from dinov2cli.config.images import RGB, Images
from dinov2cli.data.channels import to_channels, to_rgb
from dinov2cli.data.formats import fast
from dinov2cli.data.formats.arrays import read_array
from dinov2cli.data.formats.dicom import read_dicom
from dinov2cli.data.formats.netpbm import read_netpbm
from dinov2cli.data.formats.pillow import read_with_pillow
from dinov2cli.data.formats.stacks import Stack
from dinov2cli.data.formats.stored import Stored, bands, check_memory, span_of_type, turned
from dinov2cli.data.formats.stored import UnreadableImage as UnreadableImage
from dinov2cli.data.formats.tiff import TIFF_SIGNATURES, read_tiff
from dinov2cli.data.spelling import inside
from dinov2cli.data.workers import warn_once
from dinov2cli.requests.images import value_range as range_of

PERCENTILE_SAMPLES = 1_000_000
"""Percentiles of a larger image are those of so many of its samples, evenly spread."""
DIM = 4
"""An image of 16 bits none of whose values reaches white / DIM has, most likely, fewer bits than its file says."""


@dataclass(frozen=True)
class Reading:
    """How files become pixels.

    Args:
        images: what the network expects: `value_range`, `exif_orientation`, `background`, and which channels.
        max_image_gb: largest memory that one image may need.
    """

    images: Images = RGB
    max_image_gb: float = 3.0

    @classmethod
    def of(cls, images: Images, config: Any = None, request: Any = None) -> "Reading":
        """As a network expects it; options of an `ImagesRequest` count more than a configuration."""
        said = {name: getattr(request, name, None) for name in ("value_range", "background")}
        if getattr(request, "no_exif_orientation", False):
            said["exif_orientation"] = False
        limit = getattr(request, "max_image_gb", None) or (
            config.data.max_image_gb if config is not None else cls.max_image_gb
        )
        return cls(images.model_copy(update={name: text for name, text in said.items() if text is not None}), limit)

    def __str__(self) -> str:
        turned = "turned as EXIF says" if self.images.exif_orientation else "not turned"
        return f"{turned}, {json.dumps(self.images.beside_weights())}"


USUAL = Reading()


class ImageSize(NamedTuple):
    """In pixels, after any turn."""

    height: int
    width: int


def read_file(path: str) -> bytes:
    """A file's bytes; raises `UnreadableImage` with the operating system's reason."""
    try:
        with open(path, "rb", opener=_open_file) as file:
            return file.read()
    except OSError as error:
        raise UnreadableImage(path, f"cannot be read ({error.strerror})") from error
    except ValueError as error:  # a NUL in the name
        raise UnreadableImage(path, f"cannot be read ({error})") from error


def _open_file(path: str, flags: int) -> int:
    """Open what has an end: at a pipe one would wait for ever, and a device may give bytes without end."""
    handle = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a file")
    return handle


def read_image(path: Path, reading: Reading = USUAL) -> np.ndarray:
    """An image file's pixels as `decode_image` gives them; or those of an array, `FILE::PATH`. Raises likewise."""
    if (place := inside(str(path))) and not path.exists():
        stored = Stack(place.file, place.path).stored(place.image or 0, reading.max_image_gb)
        return StoredImage(stored, str(path), reading).pixels()
    return decode_image(read_file(str(path)), str(path), reading)


def decode_image(data: bytes | memoryview, path: str, reading: Reading = USUAL, *, shrink: int = 1) -> np.ndarray:
    """Pixels of an encoded image: RGB [H, W, 3]; or what channels are asked for, those as they are stored.

    They are uint8 where the file has 8 bits (of channels that are no colours: and 0 and 255 are black and white), else
    float32 in 0..1.

    Args:
        path: for messages, and for types that have no signature of their own.
        shrink: with 2, 4 or 8, a JPEG is decoded directly at that fraction of its size.

    Raises:
        UnreadableImage: it is no image, damaged, cut short, too large, or cannot become what `reading` asks for.
    """
    return LazyImage(data, path, reading).pixels(shrink)


def pixels_of(stored: Stored, path: str, reading: Reading) -> np.ndarray:
    """What `decode_image` makes of what a file stores. Raises `UnreadableImage`."""
    images = reading.images
    if images.exif_orientation and stored.orientation != 1:
        stored = replace(stored, array=turned(stored.array, stored.orientation), orientation=1)
    if stored.left_out:
        warn_once("%s: only its first image is read; %s left out, here and of others", path, stored.left_out)
    become = to_rgb if images.are_rgb else to_channels
    return become(values(stored, reading, path), stored, images, path)


def read_stored(
    data: bytes | memoryview,
    path: str,
    limit_gb: float = USUAL.max_image_gb,
    shrink: int = 1,
    pages_are_channels: bool = False,
    jpeg: fast.JpegHeader | None = None,
) -> Stored:
    """An image as its file stores it. Raises `UnreadableImage` as `decode_image` does, but for values and channels.

    `jpeg` is the file's header, if it has been read.
    """
    if (stored := fast.read_jpeg(data, path, limit_gb, shrink, jpeg)) is not None:
        return stored
    if bytes(data[:4]) in TIFF_SIGNATURES:
        return read_tiff(data, path, limit_gb, pages_are_channels)
    found = (read(data, path, limit_gb) for read in READERS)
    return next(filter(None, found), None) or read_with_pillow(data, path, limit_gb, shrink)


READERS = (fast.read_png, fast.read_deep_jpeg2000, read_dicom, read_array, read_netpbm)
"""Each gives None for a file of another type."""


def values(stored: Stored, reading: Reading, path: str) -> np.ndarray:
    """The samples from black to white, opacity apart: float32 in 0..1, or uint8.

    uint8 are those for which black and white are 0 and 255 in the file, and colours of files of 8 bits and fewer, as
    levels lose nothing of them.

    Returns:
        [H, W, C], the image's channels without opacity.

    Raises:
        UnreadableImage: the file does not say what black and white are, and neither does `reading`; or it is too large.
    """
    samples = stored.array[..., : stored.channels]
    black, white = _black_and_white(samples, stored, reading.images.value_range, path)
    if samples.dtype == np.uint8 and (black, white) == (0, 255):
        return 255 - samples if stored.inverted else samples
    as_levels = samples.dtype.itemsize == 1 and reading.images.are_rgb
    if samples.dtype.itemsize == 1 and not as_levels:  # which its header did not tell
        height, width, channels = samples.shape
        check_memory(path, height, width, channels, reading.max_image_gb, beside=4 * channels)
    low, high = (-np.inf, np.inf) if samples.dtype.kind == "f" else span_of_type(samples.dtype)
    # float32 would not tell large whole numbers apart.
    is_narrow = samples.dtype.itemsize <= 2 or (black, white) == (0, 1)
    shown: np.ndarray = np.empty(samples.shape, np.uint8 if as_levels else np.float32)
    for rows in bands(samples):
        part = _finite(samples[rows], black, white, path)
        scaled = (
            shown[rows] if is_narrow and not as_levels else np.empty(part.shape, np.float32 if is_narrow else float)
        )
        np.copyto(scaled, part, casting="unsafe")
        if black:
            np.subtract(scaled, black, out=scaled)
        if white - black != 1:
            np.divide(scaled, white - black, out=scaled)
        if low < black or high > white:
            np.clip(scaled, 0, 1, out=scaled)
        if stored.inverted:
            np.subtract(1, scaled, out=scaled)
        if as_levels:
            shown[rows] = cv2.convertScaleAbs(scaled, alpha=255).reshape(scaled.shape)
        elif not is_narrow:
            shown[rows] = scaled
    return shown


def _finite(samples: np.ndarray, black: float, white: float, path: str) -> np.ndarray:
    if samples.dtype.kind != "f" or np.isfinite(samples).all():
        return samples
    warn_once("%s: samples that are no finite number become black; the same holds for others like it", path)
    finite: np.ndarray = np.nan_to_num(samples, nan=black, posinf=white, neginf=black)
    return finite


def _black_and_white(samples: np.ndarray, stored: Stored, value_range: str, path: str) -> tuple[float, float]:
    rule, *numbers = range_of(value_range)
    if rule == "values":
        return numbers[0], numbers[1]
    if rule == "percentile":
        flat = samples.reshape(-1)
        flat = flat[:: -(-flat.size // PERCENTILE_SAMPLES)]
        flat = flat[np.isfinite(flat)] if flat.dtype.kind == "f" else flat
        low, high = np.percentile(flat, numbers) if flat.size else (0.0, 1.0)
        return float(low), float(high) if high > low else float(low) + 1
    if rule == "dtype":
        return stored.span if stored.span and samples.dtype.kind == "u" else span_of_type(samples.dtype)
    remedy = "say which values are black and white with data.value_range=[LOW, HIGH] (--value-range), or 'percentile " \
             "[1, 99]' of each image"  # fmt: skip
    if stored.span is not None:
        if stored.span == (0, 65535) and samples.dtype == np.uint16 and 0 < (most := int(samples.max())) < 65536 // DIM:
            warn_once("%s: its largest value is %d, but white is 65535 in a file of 16 bits, so it is nearly black; "
                      "where white is less (4095 for 12 bits), say data.value_range=[0, 4095] (--value-range)",
                      path, most)  # fmt: skip
        return stored.span
    low, high = samples.min(), samples.max()
    if samples.dtype.kind == "f" and low >= 0 and high <= 1:
        return 0, 1
    what = {"i": "signed samples", "u": "samples", "f": "floating point samples"}[samples.dtype.kind]
    raise UnreadableImage(path, f"{what} ({samples.dtype}) from {low:g} to {high:g}; {remedy}")


class LazyImage:
    """An encoded image whose size may be asked for before it is decoded, so that a JPEG can be decoded smaller."""

    def __init__(self, data: bytes | memoryview, path: str, reading: Reading = USUAL) -> None:
        self._data = data
        self._path = path
        self._reading = reading
        self._pixels: np.ndarray | None = None
        self._header = fast.jpeg_header(data)

    @property
    def can_shrink(self) -> bool:
        return self._header is not None

    @property
    def channels(self) -> int:
        """How many the file has, opacity apart."""
        if self._header is not None and self._header.components in (1, 3):
            return self._header.components
        return self.stored(pages_are_channels=True).channels

    def described(self) -> Stored:
        """What the file says of the image. Of a JPEG only its header is read: the samples are zeros."""
        if self._header is not None and self._header.components in (1, 3):
            height, width, channels, orientation = self._header
            zeros = np.broadcast_to(np.uint8(0), (height, width, channels))
            return Stored(zeros, "JPEG", (0, 255), orientation=orientation)
        return self.stored()

    def stored(self, shrink: int = 1, *, pages_are_channels: bool = False) -> Stored:
        """The samples as they are stored. Pages are channels also where the network takes other ones than RGB."""
        pages_are_channels |= not self._reading.images.are_rgb
        limit = self._reading.max_image_gb
        return read_stored(self._data, self._path, limit, shrink, pages_are_channels, self._header)

    @property
    def size(self) -> ImageSize:
        if self._header is None:
            return ImageSize(*self.pixels().shape[:2])
        height, width, _, orientation = self._header
        return ImageSize(width, height) if self._reading.images.exif_orientation and orientation > 4 else ImageSize(
            height, width)  # fmt: skip

    def pixels(self, shrink: int = 1) -> np.ndarray:
        """[ceil(H/shrink), ceil(W/shrink), C], as of `decode_image`. `shrink` above 1 only where `can_shrink`."""
        if self._pixels is None:
            self._pixels = pixels_of(self.stored(shrink), self._path, self._reading)
        return self._pixels


class StoredImage(LazyImage):
    """Samples that are no file of their own."""

    def __init__(self, stored: Stored, path: str, reading: Reading = USUAL) -> None:
        super().__init__(b"", path, reading)
        self._kept = stored

    def stored(self, shrink: int = 1, *, pages_are_channels: bool = False) -> Stored:
        return self._kept
