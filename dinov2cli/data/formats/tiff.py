"""TIFF and BigTIFF through tifffile: any sample type, any number of channels, tiles, planes, stacks.

Which samples are channels: those of a page, or the planes along axis C that OME and ImageJ describe; and, where a
network takes channels, pages that nothing is said of. Further pages, depths and times are left out, and said to be.
"""

import io
import logging
import math
from dataclasses import replace
from typing import Any, Literal
from xml.etree import ElementTree

import numpy as np
from tifffile import COMPRESSION, EXTRASAMPLE, PHOTOMETRIC, PLANARCONFIG, TiffFile, TiffPageSeries

from dinov2cli.data.formats.pillow import read_with_pillow
from dinov2cli.data.formats.stored import (
    Stored,
    UnreadableImage,
    bands,
    check_memory,
    further,
    interleaved,
    span_of_type,
    turned,
)

TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_DNG_VERSION, _ORIENTATION, _GDAL_METADATA = 50706, 274, 42112
REMEDY = "pip install 'dinov2cli[tiff]'"
_READ = {
    PHOTOMETRIC.MINISWHITE, PHOTOMETRIC.MINISBLACK, PHOTOMETRIC.RGB, PHOTOMETRIC.PALETTE, PHOTOMETRIC.SEPARATED,
    PHOTOMETRIC.YCBCR,
}  # fmt: skip

_PILLOWS = {
    COMPRESSION.NONE, COMPRESSION.CCITTRLE, COMPRESSION.CCITT_T4, COMPRESSION.CCITT_T6, COMPRESSION.LZW,
    COMPRESSION.JPEG, COMPRESSION.OJPEG, COMPRESSION.ADOBE_DEFLATE, COMPRESSION.DEFLATE, COMPRESSION.PACKBITS,
    COMPRESSION.ZSTD, COMPRESSION.LZMA,
}  # fmt: skip
"""Compressions that Pillow's wheels decode; at others libtiff writes to standard error."""

logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it has to say is said here, with the file's name


def read_tiff(data: bytes | memoryview, path: str, limit_gb: float, pages_are_channels: bool = False) -> Stored:
    """The first image of a TIFF. Raises `UnreadableImage`: damaged, too large, or of a kind that is not read.

    Args:
        pages_are_channels: so are several pages of which the file does not say what they are.
    """
    try:
        with io.BytesIO(data) as file, TiffFile(file) as tif:  # closed, as tifffile's objects keep it in cycles
            series = tif.series[0]
            page: Any = series.keyframe
            place = _axis_of_channels(series, pages_are_channels)
            refuse_what_is_not_read(page, data, path)
            channels = page.samplesperpixel * (series.shape[place] if place >= 0 else 1)
            check_memory(path, page.imagelength, page.imagewidth, channels, limit_gb, itemsize=page.dtype.itemsize)
            if page.photometric == PHOTOMETRIC.YCBCR and page.compression != COMPRESSION.JPEG:
                return _without_codec(data, path, limit_gb)  # tifffile would give these colours as stored
            array, planes = _samples(series, data, place)
            others = sum(_planes_of(other) for other in tif.series[1:] if not other.keyframe.is_reduced)
            left_out = further(_planes_of(series) - planes + others, "page")
            return named(stored_samples(array, page, path, left_out), tif)
    except UnreadableImage:
        raise
    except Exception as error:  # tifffile raises whatever its parsing of a damaged file runs into
        if "imagecodecs" in str(error) or isinstance(error, ImportError):
            return _without_codec(data, path, limit_gb, error)
        raise UnreadableImage(path, f"damaged TIFF ({str(error) or type(error).__name__})") from error


def refuse_what_is_not_read(page: Any, data: bytes | memoryview, path: str) -> None:
    """Raise `UnreadableImage` for a page of a kind that is not read; `data` begins as the file does."""
    if _DNG_VERSION in page.tags or page.is_reduced or bytes(data[8:10]) == b"CR":
        raise UnreadableImage(path, "a camera's raw file or a preview alone; develop it to a 16-bit TIFF")
    if page.photometric not in _READ:
        name = getattr(page.photometric, "name", page.photometric)
        raise UnreadableImage(path, f"its photometric interpretation {name} is not read; convert it to RGB or gray")
    if page.bitspersample == 1 and page.samplesperpixel > 1 and page.planarconfig == PLANARCONFIG.CONTIG:
        raise UnreadableImage(path, "interleaved channels of one bit each are not read; convert them to 8 bits")
    if page.dtype is None or page.dtype.kind == "c":
        raise UnreadableImage(path, f"samples of {page.bitspersample} bits, {page.dtype}, are not read; convert them")


def _planes_of(series: TiffPageSeries) -> int:
    page = series.keyframe
    return math.prod(series.shape) // (page.imagelength * page.imagewidth * page.samplesperpixel)


def _axis_of_channels(series: TiffPageSeries, pages_are_channels: bool) -> int:
    """The place of the axis of planes that are channels; -1 where there is none."""
    lead = len(series.shape) - len(series.keyframe.shape)
    known = series.axes[:lead].find("C")
    return 0 if known < 0 and lead == 1 and pages_are_channels and series.axes[0] in "QI" else known


def named(stored: Stored, tif: TiffFile) -> Stored:
    """With the names that the file gives its channels, if it names all."""
    names = _names(tif)
    return replace(stored, names=names) if len(names) == stored.channels else stored


def _names(tif: TiffFile) -> tuple[str, ...]:
    """What OME, ImageJ or GDAL call the channels."""
    if tif.is_ome and tif.ome_metadata:
        found = [
            each.get("Name") for each in ElementTree.fromstring(tif.ome_metadata).iter() if each.tag[-8:] == "}Channel"
        ]
    elif tif.is_imagej:
        found = list((tif.imagej_metadata or {}).get("Labels") or [])
    elif tif.is_gdal and (tag := tif.pages.first.tags.get(_GDAL_METADATA)):
        found = [each.text for each in ElementTree.fromstring(tag.value) if each.get("role") == "description"]
    else:
        found = []
    return tuple(map(str, found)) if all(found) else ()


def _samples(series: TiffPageSeries, data: bytes | memoryview, place: int) -> tuple[np.ndarray, int]:
    """[H, W, C] of the first image, and of how many planes it is made."""
    page = series.keyframe
    lead = len(series.shape) - len(page.shape)
    shape = series.shape[:lead]
    channels = shape[place] if place >= 0 else 1
    if lead == 0:
        planes = [_read_page(page, data)]
    elif series.dataoffset is not None:  # one block, of which a file of ImageJ's names the first page alone
        whole = np.frombuffer(data, series.dtype, math.prod(series.shape), series.dataoffset).reshape(series.shape)
        planes = [whole[tuple(c if axis == place else 0 for axis in range(lead))] for c in range(channels)]
    else:
        stride = math.prod(shape[place + 1 :]) if place >= 0 else 1
        planes = [_read_page(series[c * stride], data) for c in range(channels)]
    parts = [_channels_last(plane, page.axes).transpose(2, 0, 1) for plane in planes]
    whole = parts[0] if channels == 1 else np.concatenate(parts)
    return interleaved(whole.transpose(1, 2, 0)), channels


def _channels_last(plane: np.ndarray, axes: str) -> np.ndarray:
    """[H, W, C] of a page's array; of a volume the first depth."""
    for axis in reversed(range(len(axes))):
        if axes[axis] not in "YXS":
            plane, axes = plane.take(0, axis), axes[:axis] + axes[axis + 1 :]
    plane = plane if "S" in axes else plane[..., None]
    return plane.transpose([(axes if "S" in axes else f"{axes}S").index(axis) for axis in "YXS"])


def _read_page(page: Any, data: bytes | memoryview) -> np.ndarray:
    if page.bitspersample % 8 and page.bitspersample > 1 and page.compression == COMPRESSION.NONE and not page.is_tiled:
        return _unpacked(page, data)
    array: np.ndarray = page.asarray()
    return array


def _unpacked(page: Any, data: bytes | memoryview) -> np.ndarray:
    """Samples of any number of bits, most significant bit first, each row from a byte of its own (TIFF 6.0, p. 29)."""
    bits, planes = page.bitspersample, page.samplesperpixel if page.planarconfig == PLANARCONFIG.SEPARATE else 1
    samples = page.imagewidth * (page.samplesperpixel // planes)
    row_bytes = -(-samples * bits // 8)
    strips = zip(page.dataoffsets, page.databytecounts, strict=True)
    packed = np.concatenate([np.frombuffer(data, np.uint8, count, offset) for offset, count in strips])
    rows = packed[: planes * page.imagelength * row_bytes].reshape(-1, row_bytes)
    order: Literal["little", "big"] = "little" if page.fillorder == 2 else "big"
    single = np.unpackbits(rows, axis=1, bitorder=order)[:, : samples * bits].reshape(len(rows), samples, bits)
    weights = (1 << np.arange(bits - 1, -1, -1)).astype(np.uint32)
    return (single @ weights).astype(page.dtype.newbyteorder("=")).reshape(page.shape)


def stored_samples(array: np.ndarray, page: Any, path: str, left_out: str) -> Stored:
    """The samples with the meaning that the page's tags give them."""
    if array.dtype.kind == "b" or page.bitspersample == 1:
        array = array.astype(np.uint8)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    span = (0, 2**page.bitspersample - 1) if array.dtype.kind == "u" else None
    kind = page.photometric
    rgb = kind not in (PHOTOMETRIC.MINISWHITE, PHOTOMETRIC.MINISBLACK)
    stored = Stored(array, "TIFF", span, rgb=rgb, orientation=orientation(page), left_out=left_out)
    if kind == PHOTOMETRIC.PALETTE:
        table = _levels_of(page.colormap.T)
        return replace(stored, array=table[np.minimum(array[..., 0], len(table) - 1)], span=span_of_type(table.dtype))
    opacity = [
        place
        for place, means in enumerate(page.extrasamples, start=page.samplesperpixel - len(page.extrasamples))
        if means in (EXTRASAMPLE.ASSOCALPHA, EXTRASAMPLE.UNASSALPHA)
    ]
    if kind == PHOTOMETRIC.SEPARATED:
        if array.shape[2] < 4 or span is None:
            raise UnreadableImage(path, f"inks in {array.shape[2]} channels of {array.dtype}; convert it to RGB")
        array = _without_inks(array, span[1])
        opacity = [place - 1 for place in opacity]
    if opacity:
        if opacity[0] < array.shape[2] - 1:
            alpha = array[..., opacity[0], None]
            array = np.concatenate([np.delete(array, opacity[0], axis=2), alpha], axis=2)
        if EXTRASAMPLE.ASSOCALPHA in page.extrasamples:
            array = _not_multiplied(array, span[1] if span else 1)
    return replace(stored, array=array, inverted=kind == PHOTOMETRIC.MINISWHITE, alpha=bool(opacity))


def _levels_of(table: np.ndarray) -> np.ndarray:
    """A palette's colours as bytes, where they are such: written as they are, or times 256 or 257."""
    if table.max() < 256:
        return table.astype(np.uint8)
    if any((table % times == 0).all() for times in (256, 257)):
        return (table >> 8).astype(np.uint8)
    return table


def orientation(page: Any) -> int:
    """EXIF's number, 1 to 8; 1 where the tag is not there or damaged."""
    tag = page.tags.get(_ORIENTATION)
    return int(tag.value) if tag is not None and tag.value in range(1, 9) else 1


def _without_inks(array: np.ndarray, white: float) -> np.ndarray:
    """Cyan, magenta, yellow, black, and what follows -> red, green, blue, and what follows; as Pillow does it."""
    colors = np.empty((*array.shape[:2], array.shape[2] - 1), array.dtype)
    for rows in bands(array):
        paper = white - array[rows, :, :4].astype(np.float64)
        colors[rows, :, :3] = paper[..., :3] * paper[..., 3:] / white + 0.5
        colors[rows, :, 3:] = array[rows, :, 4:]
    return colors


def _not_multiplied(array: np.ndarray, opaque: float) -> np.ndarray:
    """Colours that were multiplied with the opacity that follows them, divided by it."""
    straight = np.empty_like(array)
    for rows in bands(array):
        colors, alpha = array[rows, :, :-1], array[rows, :, -1:]
        divided = colors * (opaque / np.maximum(alpha, 1e-12 if array.dtype.kind == "f" else 1).astype(np.float64))
        straight[rows, :, :-1] = divided.clip(0, opaque) + 0.5 if array.dtype.kind == "u" else divided
        straight[rows, :, -1:] = alpha
    return straight


def _without_codec(data: bytes | memoryview, path: str, limit_gb: float, error: Exception | None = None) -> Stored:
    """What Pillow decodes to the same values; the rest needs imagecodecs."""
    with io.BytesIO(data) as file, TiffFile(file) as tif:
        page: Any = tif.series[0].keyframe
        white_is_zero = page.photometric == PHOTOMETRIC.MINISWHITE
        turn, pages = orientation(page), _planes_of(tif.series[0]) + len(tif.series) - 2
        extra = {int(means) for means in page.extrasamples}
        gray16 = page.samplesperpixel == 1 and page.bitspersample == 16 and page.dtype.kind == "u"
        known = page.samplesperpixel in (1, 3) or (page.samplesperpixel in (2, 4) and extra in ({2}, set()))
        compression = getattr(page.compression, "name", page.compression)
        known = known and page.compression in _PILLOWS
    if (gray16 and page.compression in _PILLOWS) or (
        page.bitspersample <= 8 and page.dtype.kind != "i" and known and page.photometric in _READ
    ):
        read = read_with_pillow(data, path, limit_gb)
        # Pillow has turned it already, and of 8 bits and fewer inverted it.
        array, inverted = turned(read.array, {6: 8, 8: 6}.get(turn, turn)), gray16 and white_is_zero
        return replace(read, array=array, inverted=inverted, orientation=turn, left_out=further(pages, "page"))
    what = f"{page.samplesperpixel} channels of {page.bitspersample} bits, compression {compression}"
    raise UnreadableImage(path, f"a TIFF of {what}, needs imagecodecs: {REMEDY}") from error
