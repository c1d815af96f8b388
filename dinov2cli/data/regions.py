"""Large TIFFs and whole slides by region: what is not needed is not read, and of a pyramid the level that fits.

H, W: of the image; s: how many times smaller a region is read, a power of two.
"""

import os
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
from tifffile import COMPRESSION, PHOTOMETRIC, PLANARCONFIG, TiffFile

from dinov2cli.data.crop_parameters import Box
from dinov2cli.data.decoding import USUAL, ImageSize, LazyImage, Reading, UnreadableImage, pixels_of
from dinov2cli.data.formats.stored import Stored, check_memory
from dinov2cli.data.formats.tiff import REMEDY, named, orientation, refuse_what_is_not_read, stored_samples
from dinov2cli.data.workers import warn_once

SLIDES = (".svs", ".ndpi", ".scn", ".qptiff")
"""TIFFs by other names, which tifffile reads."""
OTHER_SLIDES = (".mrxs", ".czi", ".bif", ".svslide")
"""What is no TIFF, or whose tiles are to be put together."""
SUFFIXES = (".tif", ".tiff", ".btf", ".tf8", *SLIDES)
LARGE_FILE = 64 << 20
"""Bytes of a TIFF from which on it is read by region; smaller ones are read at once, which is faster. Slides are always
read by region: a few bytes of them may be many pixels."""
SHOWN_SIDE = 1024
"""A large image as a whole is read so much smaller that its shorter side still has so many pixels."""
ROWS = 256
"""Rows of an image without tiles that are read at a time."""


def open_image(path: str, reading: Reading = USUAL) -> "LargeImage | None":
    """The image in a large TIFF or a slide, of which its header has been read; None for what is to be read at once."""
    name = path.lower()
    if not name.endswith((*SUFFIXES, *OTHER_SLIDES)) or not os.path.isfile(path):
        return None
    if not name.endswith((*SLIDES, *OTHER_SLIDES)) and os.path.getsize(path) < LARGE_FILE:
        return None
    try:
        image = SlideImage(path, reading) if name.endswith(OTHER_SLIDES) else LargeImage(path, reading)
    except UnreadableImage:
        raise
    except Exception as error:  # tifffile raises whatever its parsing of a damaged file runs into
        kind = "slide" if name.endswith(OTHER_SLIDES) else "TIFF"
        raise UnreadableImage(path, f"damaged {kind} ({str(error) or type(error).__name__})") from error
    return image if image.has_regions else None


class LargeImage(LazyImage):
    """A TIFF whose pixels are read by region, if it `has_regions`.

    Raises:
        UnreadableImage: it is of a kind that is not read.
    """

    def __init__(self, path: str, reading: Reading) -> None:
        self._path, self._reading = path, reading
        self._file = TiffFile(path)
        series = self._file.series[0]
        page: Any = series.keyframe
        self._file.filehandle.seek(0)
        refuse_what_is_not_read(page, self._file.filehandle.read(10), path)
        self._levels: dict[int, Any] = {}
        for level in series.levels:
            factor = round(page.imagewidth / level.keyframe.imagewidth)
            same = abs(page.imagelength / level.keyframe.imagelength - factor) < 0.02 * factor
            if factor & (factor - 1) == 0 and same and level.keyframe.samplesperpixel == page.samplesperpixel:
                self._levels.setdefault(factor, level.keyframe)
        self._page = page
        self.has_regions = bool(
            len(series.shape) == len(page.shape)  # no stack
            and page.bitspersample % 8 == 0
            and page.imagedepth == 1
            and page.photometric not in (PHOTOMETRIC.PALETTE, PHOTOMETRIC.SEPARATED)  # which cannot be averaged
            and (page.photometric != PHOTOMETRIC.YCBCR or page.compression == COMPRESSION.JPEG)
            and orientation(page) == 1
            and (page.is_tiled or _is_plain(page) or page.rowsperstrip <= 2 * ROWS)
        )

    @property
    def can_shrink(self) -> bool:
        return True

    @property
    def dtype(self) -> Any:
        """Of the samples."""
        return self._page.dtype

    @property
    def size(self) -> ImageSize:
        return ImageSize(self._page.imagelength, self._page.imagewidth)

    @property
    def channels(self) -> int:
        return self.described().channels

    def described(self) -> Stored:
        """What the file says of the image; the samples are all the first one."""
        first = self._read(Box(0, 0, 1, 1))
        return replace(first, array=np.broadcast_to(first.array, (*self.size, first.array.shape[2])))

    def stored(self, shrink: int = 1, *, pages_are_channels: bool = False) -> Stored:
        height, width = self.size
        return self._read(Box(0, 0, height, width), power_of_two(min(height, width) / SHOWN_SIDE))

    def pixels(self, shrink: int = 1) -> np.ndarray:
        """The whole, [ceil(H/s), ceil(W/s), C]; by default so much smaller that its short side has `SHOWN_SIDE`."""
        height, width = self.size
        if shrink == 1:
            shrink = power_of_two(min(height, width) / SHOWN_SIDE)
            warn_once("%s: %d x %d pixels; as a whole it is read at 1/%d of its size, and so are others like it",
                      self._path, width, height, shrink)  # fmt: skip
        return self.region(Box(0, 0, height, width), shrink)

    def region(self, box: Box, shrink: int = 1) -> np.ndarray:
        """The pixels in a box, s times smaller by averaging: [ceil(h/s), ceil(w/s), C], as `decode_image` gives them.

        Raises:
            UnreadableImage: damaged, or its values cannot be told from a part of it.
        """
        rule = str(self._reading.images.value_range)
        if rule.startswith("percentile") or (rule == "auto" and self.dtype.kind != "u"):
            raise UnreadableImage(self._path, f"of {self.dtype} samples in a large image, read in parts, "
                                  "black and white have to be said: data.value_range=[LOW, HIGH] (dtype: 0 to 1 for "
                                  "floating point)")  # fmt: skip
        return pixels_of(self._read(box, shrink), self._path, self._reading)

    def _read(self, box: Box, shrink: int = 1) -> Stored:
        factor = max(factor for factor in self._levels if factor <= shrink)
        page = self._levels[factor]
        top, left = box.top // factor, box.left // factor
        bottom = min(-(-(box.top + box.height) // factor), page.imagelength)
        right = min(-(-(box.left + box.width) // factor), page.imagewidth)
        step = shrink // factor
        channels, itemsize = page.samplesperpixel, page.dtype.itemsize
        check_memory(self._path, -(-(bottom - top) // step), -(-(right - left) // step), channels,
                     self._reading.max_image_gb, itemsize=itemsize, beside=channels * itemsize)  # fmt: skip
        parts = []
        try:
            tiles = _Tiles(self._file.filehandle, page)
            rows = max(1, tiles.height // step) * step
            for start in range(top, bottom, rows):
                parts.append(_smaller(tiles.read(start, min(start + rows, bottom), left, right), step))
            return named(stored_samples(np.concatenate(parts), page, self._path, ""), self._file)
        except UnreadableImage:
            raise
        except Exception as error:
            needs = f": {REMEDY}" if "imagecodecs" in str(error) else ""
            raise UnreadableImage(self._path, f"damaged TIFF ({str(error) or type(error).__name__}){needs}") from error


class SlideImage(LargeImage):
    """A slide of a type that is no TIFF, through openslide: RGB, with opacity where nothing was scanned.

    Raises:
        UnreadableImage: openslide is missing, or does not read it.
    """

    has_regions = True
    dtype = np.dtype(np.uint8)

    def __init__(self, path: str, reading: Reading) -> None:
        self._path, self._reading = path, reading
        self._slide = opened_slide(path)

    @property
    def size(self) -> ImageSize:
        width, height = self._slide.dimensions
        return ImageSize(height, width)

    def _read(self, box: Box, shrink: int = 1) -> Stored:
        level = self._slide.get_best_level_for_downsample(shrink + 0.01)  # levels are seldom whole times smaller
        factor = max(1.0, self._slide.level_downsamples[level])
        height, width = (max(1, round(side / factor)) for side in (box.height, box.width))
        check_memory(self._path, height, width, 4, self._reading.max_image_gb)
        area = np.asarray(self._slide.read_region((box.left, box.top), level, (width, height)))
        size = -(-box.width // shrink), -(-box.height // shrink)
        if area.shape[1::-1] != size:
            area = cv2.resize(area, size, interpolation=cv2.INTER_AREA)
        is_opaque = bool((area[..., 3] == 255).all())
        return Stored(area[..., : 3 if is_opaque else 4], "slide", (0, 255), rgb=True, alpha=not is_opaque)


def opened_slide(path: str) -> Any:
    """An `openslide.OpenSlide`. Raises `UnreadableImage`: openslide is missing, or does not read it."""
    try:
        import openslide
    except ImportError:
        raise UnreadableImage(path, "a slide of this type needs openslide: pip install 'dinov2cli[slides]'") from None
    try:
        return openslide.OpenSlide(path)
    except openslide.OpenSlideError as error:
        raise UnreadableImage(path, f"not a slide that openslide reads ({error})") from error


def power_of_two(limit: float) -> int:
    """The largest that is at most `limit`, at least 1."""
    return 1 << max(0, int(limit).bit_length() - 1)


class _Tiles:
    """A page's samples by their place; those of the last rows are kept, as the next may lie in the same tiles."""

    def __init__(self, file: Any, page: Any) -> None:
        self.file, self.page = file, page
        self.height = page.tilelength if page.is_tiled else ROWS if _is_plain(page) else page.rowsperstrip
        self.width = page.tilewidth if page.is_tiled else page.imagewidth
        self.kept: dict[int, np.ndarray] = {}

    def read(self, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        """[bottom - top, right - left, C] as stored."""
        page = self.page
        planes = page.samplesperpixel if page.planarconfig == PLANARCONFIG.SEPARATE else 1
        across, down = -(-page.imagewidth // self.width), -(-page.imagelength // self.height)
        area = np.empty((bottom - top, right - left, page.samplesperpixel), page.dtype)
        if _is_plain(page):
            row_items = page.imagewidth * page.samplesperpixel
            self.file.seek(page.dataoffsets[0] + top * row_items * page.dtype.itemsize)
            rows = self.file.read_array(page.parent.byteorder + page.dtype.char, (bottom - top) * row_items)
            area[:] = rows.reshape(bottom - top, page.imagewidth, page.samplesperpixel)[:, left:right]
            return area
        needed = {}
        for row in range(top // self.height, -(-bottom // self.height)):
            for column in range(left // self.width, -(-right // self.width)):
                for plane in range(planes):
                    number = (plane * down + row) * across + column
                    tile = needed[number] = self.kept[number] if number in self.kept else self.decode(number)
                    y, x = row * self.height, column * self.width
                    rows = slice(max(y, top), min(y + len(tile), bottom))
                    columns = slice(max(x, left), min(x + tile.shape[1], right))
                    channels = slice(plane, plane + 1) if planes > 1 else slice(None)
                    area[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left, channels] = (
                        tile[rows.start - y : rows.stop - y, columns.start - x : columns.stop - x]
                    )
        self.kept = needed
        return area

    def decode(self, number: int) -> np.ndarray:
        page = self.page
        offset, size = page.dataoffsets[number], page.databytecounts[number]
        self.file.seek(offset)
        data = self.file.read(size) if size else None
        options = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader} if page.jpegtables else {}
        segment, _, shape = page.decode(data, number, **options)
        if segment is None:  # a tile without data
            segment = np.full(shape, page.nodata, page.dtype)
        tile: np.ndarray = segment[0]
        return tile


def _is_plain(page: Any) -> bool:
    """Whether the samples lie row after row, as in memory."""
    return bool(page.is_memmappable and page.planarconfig == PLANARCONFIG.CONTIG and not page.is_tiled)


def _smaller(area: np.ndarray, step: int) -> np.ndarray:
    """Averages over `step` x `step` samples; the last row and column are repeated to whole ones."""
    if step == 1:
        return area
    height, width, channels = area.shape
    area = np.pad(area, ((0, -height % step), (0, -width % step), (0, 0)), "edge")
    kept = area.dtype
    if kept not in (np.uint8, np.uint16, np.int16, np.float32):  # which OpenCV takes
        area = area.astype(np.float64)
    size = area.shape[1] // step, area.shape[0] // step
    planes = [cv2.resize(area[..., c], size, interpolation=cv2.INTER_AREA) for c in range(channels)]
    mean = np.stack(planes, axis=2)
    return mean if kept.kind == "f" or mean.dtype == kept else np.rint(mean).astype(kept)
