"""What every reader returns, and the errors that all of them raise."""

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np

from dinov2cli.errors import DataError

BYTES_BESIDE = 7
"""A pixel as Pillow holds RGB, and as uint8 RGB: needed at once with what is stored."""
BAND = 1 << 18
"""Samples of an image that are worked on at a time."""


class UnreadableImage(DataError):
    """A file that is no image, or a damaged one, or one that cannot become what is asked for."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return UnreadableImage, (self.path, self.reason)


@dataclass(frozen=True)
class Stored:
    """An image as its file stores it.

    Args:
        array: samples [H, W, C], unsigned, signed or floating point.
        type: the file's type, for people: "TIFF".
        span: the values that the file's format calls black and white; None where it does not say.
        inverted: low values are bright (MinIsWhite, MONOCHROME1).
        rgb: the first three channels are red, green and blue; else more than one channel has no meaning known.
        alpha: the last channel is opacity, not multiplied into the others.
        orientation: EXIF's number 1 to 8, not applied to `array`.
        left_out: what the file holds beside this image: "2 more pages".
        names: what the file calls its channels, one each; or none.
    """

    array: np.ndarray
    type: str
    span: tuple[float, float] | None = None
    inverted: bool = False
    rgb: bool = False
    alpha: bool = False
    orientation: int = 1
    left_out: str = ""
    names: tuple[str, ...] = ()

    @property
    def channels(self) -> int:
        """Without opacity."""
        return int(self.array.shape[2]) - self.alpha


def further(count: int, what: str) -> str:
    """`Stored.left_out` of so many."""
    return f"{count} more {what}{'s' * (count > 1)}" if count else ""


def span_of_type(dtype: np.dtype) -> tuple[float, float]:
    """Black and white where the whole type is used: 0 to 1 for floating point and truth values."""
    if dtype.kind in "fb":
        return 0, 1
    limits = np.iinfo(dtype)
    return int(limits.min), int(limits.max)


def stored_numbers(array: np.ndarray, kind: str) -> Stored:
    """An array [H, W, C] that is nothing but numbers, or truth values: three channels are taken for colours."""
    dtype = array.dtype
    span = span_of_type(dtype) if dtype.kind in "bu" and dtype.itemsize <= 2 else None
    kept = np.dtype(np.uint8) if dtype.kind == "b" else dtype.newbyteorder("=")
    return Stored(interleaved(array).astype(kept, copy=False), kind, span, rgb=array.shape[2] == 3)


def check_memory(
    path: str, height: int, width: int, channels: int, limit_gb: float, *, itemsize: int = 1, beside: float = 0
) -> None:
    """Raise `UnreadableImage` for an image that needs more memory than is allowed; its header is all that was read.

    The most that is held at once, from samples to what a network is shown, beside the file itself.

    Args:
        channels: all of a pixel's samples, opacity among them.
        itemsize: bytes of a sample. What has more than one becomes float32, and gray and half-transparent ones RGB.
        beside: further bytes of a pixel that the format's decoder holds.
    """
    as_floats = 4 * channels + (12 if channels in (1, 2, 4) else 0)
    pixel = channels * itemsize + (as_floats if itemsize > 1 else BYTES_BESIDE) + beside
    needed = height * width * pixel / 1e9
    if needed > limit_gb:
        raise UnreadableImage(
            path,
            f"{width} x {height} pixels need {needed:.2g} GB of memory, more than data.max_image_gb={limit_gb:g} "
            "(--max-image-gb) allows; raise it, or cut the image into tiles",
        )


def bands(array: np.ndarray) -> Iterator[slice]:
    """Rows of [H, W, C], some at a time: what is made of them on the way to a result needs little memory."""
    rows = max(1, BAND // max(1, array.shape[1] * array.shape[2]))
    return (slice(first, first + rows) for first in range(0, len(array), rows))


def interleaved(array: np.ndarray) -> np.ndarray:
    """[H, W, C] with the channels of a pixel side by side, of planes [C, H, W] seen as such, in memory of its own.

    numpy copies planes a few numbers at a time: of five channels, OpenCV takes a sixth of its time.
    """
    planes = array.transpose(2, 0, 1)
    same_size = {1: np.uint8, 2: np.uint16, 4: np.int32, 8: np.float64}.get(array.dtype.itemsize)
    if same_size is None or array.shape[2] == 1 or not planes.flags.c_contiguous:
        return np.require(array, requirements=["C", "W"])
    pixels = cv2.transpose(planes.reshape(len(planes), -1).view(same_size))
    return pixels.view(array.dtype).reshape(array.shape)


def turned(array: np.ndarray, orientation: int) -> np.ndarray:
    """[H, W, C] as it is to be seen, by EXIF's number 1 to 8 (Exif 2.3, tag 274)."""
    if orientation in (2, 4, 5, 7):
        array = np.flipud(array) if orientation == 4 else np.fliplr(array)
    quarters = {3: 2, 5: 1, 6: 3, 7: 3, 8: 1}.get(orientation, 0)  # anticlockwise
    return np.ascontiguousarray(np.rot90(array, quarters))
