"""Pictures as frames: the images of a folder, and animated pictures that FFmpeg does not read."""

import re
from collections.abc import Iterator
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageSequence

from dinov2cli.console import logger
from dinov2cli.data.channels import over_background
from dinov2cli.data.datasets.listing import image_extensions
from dinov2cli.data.decoding import Reading, read_image
from dinov2cli.errors import DataError
from dinov2cli.files import is_drawn_here
from dinov2cli.visualize.rendering import shown

USUAL_MILLISECONDS = 100
"""Of a frame that says none, as browsers show it."""


class Frame(NamedTuple):
    """One frame of a source."""

    image: NDArray[np.uint8]
    """RGB [H, W, 3]; every frame of a source has the size of its first."""
    time: Fraction
    """Seconds from the first frame."""
    duration: Fraction
    """Seconds."""


class ImageFolder:
    """The images of a folder as a video of constant frame rate, at the size of the first one."""

    def __init__(self, path: Path, rate: Fraction, reading: Reading) -> None:
        self.path, self.paths, self.reading = path, list_images(path), reading
        self.rate, self.time_base, self.start = rate, 1 / rate, Fraction(0)
        self.pixel_aspect = Fraction(1)
        self.size = read_image(self.paths[0], reading).shape[:2]

    def count(self) -> int:
        return len(self.paths)

    def frames(self, every: int = 1) -> Iterator[Frame]:
        for index in range(0, len(self.paths), every):
            image = of_size(shown(read_image(self.paths[index], self.reading), self.reading.images), self.size)
            yield Frame(image, index * self.time_base, self.time_base)


class AnimatedPicture:
    """An animated WebP, whose frames have times of their own in milliseconds."""

    def __init__(self, path: Path, reading: Reading) -> None:
        self.path, self.reading = path, reading
        self.time_base, self.start = Fraction(1, 1000), Fraction(0)
        self.pixel_aspect = Fraction(1)
        try:
            with Image.open(path) as picture:
                self.size = picture.height, picture.width
                self._count = getattr(picture, "n_frames", 1)
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(f"{path}: not a picture that can be read ({error})") from error

    @cached_property
    def rate(self) -> Fraction:
        *_, last = self.frames(0)
        return self._count / max(last.time + last.duration, self.time_base)

    def count(self) -> int:
        return self._count

    def frames(self, every: int = 1) -> Iterator[Frame]:
        """Frames 0, `every`, 2 * `every`, ...; 0 for the times of all, without pixels."""
        at = 0
        with Image.open(self.path) as picture:
            for index, frame in enumerate(ImageSequence.Iterator(picture)):
                frame.load()  # which tells the duration
                lasts = int(frame.info.get("duration") or USUAL_MILLISECONDS)
                if every == 0:
                    yield Frame(np.empty((0, 0, 3), np.uint8), at * self.time_base, lasts * self.time_base)
                elif index % every == 0:
                    rgba = np.asarray(frame.convert("RGBA"))
                    image = over_background(rgba[..., :3], rgba[..., 3:], self.reading.images)
                    yield Frame(image, at * self.time_base, lasts * self.time_base)
                at += lasts


def is_animated_webp(path: Path) -> bool:
    """Whether a file is a WebP with the flag of animation (RFC 9649, 2.7.1)."""
    with path.open("rb") as file:
        head = file.read(21)
    return len(head) > 20 and head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X" and bool(head[20] & 2)


def list_images(folder: Path) -> list[Path]:
    """Images of a folder in natural order (`frame2` before `frame10`), without pictures that dino2 drew of the others.

    Raises:
        DataError: there is none.
    """
    found = images_in(folder)
    photos = [path for path in found if not is_drawn_here(path)]
    if photos and (drawn := sorted(set(found) - set(photos))):
        logger.info("%s: left out, as dino2 drew them: %s", folder, ", ".join(path.name for path in drawn[:4]))
        found = photos
    return sorted(found, key=lambda p: [int(s) if s.isdigit() else s.lower() for s in re.split(r"(\d+)", p.name)])


def images_in(folder: Path) -> list[Path]:
    """Images of a folder by their names alone, none of which is opened. Raises DataError where there is none."""
    known = image_extensions()
    found = [path for path in folder.iterdir() if path.suffix.lower() in known and not path.name.startswith(".")]
    if not found:
        raise DataError(f"{folder}: no images (.png, .jpg, .tif, ...) in this folder")
    return found


def of_size(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """[H, W, 3] at `size` (H, W)."""
    if image.shape[:2] == size:
        return image
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA).astype(np.uint8)
