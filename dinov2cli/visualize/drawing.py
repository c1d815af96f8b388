"""How depths and classes are drawn and written: colours, what says what they mean, and files of the values.

Shape legend: H x W pixels, h x w of a head's map, K classes.
"""

import io
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from dinov2cli.errors import DataError
from dinov2cli.files import marked
from dinov2cli.models.dense_heads import DenseHead, SegmentationHead
from dinov2cli.visualize.features import FeatureMap, Picture, classes_of, depths_of
from dinov2cli.visualize.rendering import LAYOUTS, OVERLAY_STRENGTH

Values = NDArray[Any]
"""Depths in metres, float32 [H, W]; or classes, uint8 or uint16 [H, W]."""
Color = tuple[int, int, int]


class DepthDrawing:
    """Depths, bright near by and dark far away.

    As any drawing it sees all pictures, or a sample of them, before it draws the first.

    Args:
        head: gives the range.
        colormap: of `near_is_bright`.
        near, far: metres at the ends of the colours; None: of the nearest and farthest percent of what was observed.
    """

    name, usual_layout, opacity = "depth", "colors", OVERLAY_STRENGTH
    """In names of files of values; of pictures; of the colours in an overlay."""
    PERCENT = 1
    BINS = 10_000

    def __init__(self, head: DenseHead, near: float | None, far: float | None, colormap: str = "inferno") -> None:
        self.colormap = colormap
        self.span = (head.config.min_depth, head.config.max_depth)
        self._given = near, far
        self.near, self.far = self.span
        self._counts = np.zeros(self.BINS, np.int64)
        # PNG files hold whole numbers up to 65535: millimetres as NYU's, else 1/256 m as KITTI's.
        self._scale = next((scale for scale in (1000, 256) if scale * self.span[1] <= 65535), 0)

    def observe(self, low: FeatureMap) -> None:
        """Take note of a picture's map [h, w, 1]."""
        self._counts += np.histogram(np.clip(low, *self.span), self.BINS, self.span)[0]

    def settle(self) -> None:
        """Decide, from all that was observed, what colours show."""
        share = np.cumsum(self._counts) / self._counts.sum()
        ends = np.searchsorted(share, [self.PERCENT / 100, 1 - self.PERCENT / 100]) + np.array([0, 1])
        found = self.span[0] + ends * (self.span[1] - self.span[0]) / self.BINS
        near, far = (float(end) if given is None else given for given, end in zip(self._given, found, strict=True))
        if near >= far:
            option, given, what = (
                ("--near", near, "farther") if self._given[0] is not None else ("--far", far, "nearer")
            )
            seen = f"depths are about {found[0]:.3g} to {found[1]:.3g} m"
            raise DataError(f"{option} {given:g}: nothing in the pictures is {what}; {seen}")
        self.near, self.far = near, far

    def values(self, low: FeatureMap, size: tuple[int, int]) -> Values:
        """What a map says of each pixel of a picture of `size` (H, W)."""
        return depths_of(low, self.span, size)

    def colors(self, values: Values) -> Picture:
        """uint8 [H, W, 3]; where it is black, an overlay shows the picture."""
        return near_is_bright((values - self.near) / (self.far - self.near), self.colormap)

    def legend(self, width: int, values: Values | None) -> Picture:
        """A strip that says what colours mean: of these values, or of all that was observed."""
        return depth_legend(self.near, self.far, width, self.colormap)

    def note(self) -> str:
        """What was found, in words."""
        return f"from {self.near:.3g} m (bright) to {self.far:.3g} m (dark)"

    def check_values(self, kind: str) -> None:
        """Raise DataError where a file, `png` or `npy`, cannot hold the values."""
        if kind == "png" and not self._scale:
            raise DataError(
                f"--save-values png: holds depths up to 256 m, and the head's go to {self.span[1]:g} m; npy does"
            )

    def png(self, values: Values) -> bytes:
        """A PNG file of the values."""
        written, content = cv2.imencode(".png", (values * self._scale + 0.5).astype(np.uint16))
        assert written
        return content.tobytes()

    def about_values(self, kind: str) -> str:
        """What the numbers in such a file mean."""
        return "metres, float32" if kind == "npy" else f"metres times {self._scale}, 16 bits"


class ClassDrawing:
    """Classes, each in its colour.

    Args:
        head: gives names and colours.
        opacity: of the colours in an overlay.
    """

    name, usual_layout = "classes", "overlay"
    SHOWN_FROM = 0.002
    """Least share of the pixels with which a class is in a legend."""
    NAMED = 5
    """Classes that are named in words."""

    def __init__(self, head: DenseHead, opacity: float) -> None:
        assert isinstance(head, SegmentationHead)
        self.count, config = head.conv_seg.out_channels, head.config
        self.names = config.classes or tuple(f"class {index}" for index in range(self.count))
        self.palette = list(config.palette) or palette_of(config.classes, self.count)
        self.opacity = opacity
        self._observed = np.zeros(self.count, np.int64)

    def observe(self, low: FeatureMap) -> None:
        self._observed += np.bincount(low.argmax(axis=2).ravel(), minlength=self.count)

    def settle(self) -> None:
        """Classes have their colours."""

    def values(self, low: FeatureMap, size: tuple[int, int]) -> Values:
        return classes_of(low, size)

    def colors(self, values: Values) -> Picture:
        return np.array(self.palette, np.uint8)[values]

    def legend(self, width: int, values: Values | None) -> Picture:
        counts = self._observed if values is None else np.bincount(values.ravel(), minlength=self.count)
        return class_legend([(self.palette[index], self.names[index]) for index in self._present(counts)], width)

    def _present(self, counts: NDArray[np.int64]) -> list[int]:
        """Classes that are there, the most frequent first."""
        order = np.argsort(-counts, kind="stable")
        return [int(index) for index in order if counts[index] >= max(self.SHOWN_FROM * counts.sum(), 1)]

    def note(self) -> str:
        present, total = self._present(self._observed), self._observed.sum()
        words = [f"{self.names[index]} {100 * self._observed[index] / total:.0f} %" for index in present[: self.NAMED]]
        more = f" and {len(present) - self.NAMED} more" if len(present) > self.NAMED else ""
        return ", ".join(words) + more

    def check_values(self, kind: str) -> None:
        if kind == "png" and self.count > 256:
            raise DataError(
                f"--save-values png: has a palette of 256 colours, and the head {self.count} classes; npy does"
            )

    def png(self, values: Values) -> bytes:
        picture = Image.fromarray(values, mode="L")
        picture.putpalette(np.array(self.palette, np.uint8).tobytes())
        file = io.BytesIO()
        picture.save(file, "PNG")
        return file.getvalue()

    def about_values(self, kind: str) -> str:
        return "indices of classes" if kind == "npy" else "indices of classes, with a palette"


Drawing = DepthDrawing | ClassDrawing


def draw(drawing: Drawing, picture: Picture, values: Values, layout: str) -> Picture:
    """The picture [H, W, 3] with its values in colour, in a layout of `rendering.LAYOUTS`."""
    colors = drawing.colors(values)
    opacity = np.ones((*values.shape, 1), np.float32)
    if layout == "overlay":
        opacity[:] = drawing.opacity / OVERLAY_STRENGTH
        opacity[~colors.any(axis=2)] = 0
    return LAYOUTS[layout](picture, colors.astype(np.float32) / np.float32(255), opacity)


def with_legend(drawing: Drawing, picture: Picture, values: Values | None = None) -> Picture:
    """The picture, and below it a strip."""
    return np.concatenate([picture, drawing.legend(picture.shape[1], values)])


def encoded(drawing: Drawing, values: Values, kind: str) -> bytes:
    """A file of the values: `png` or `npy`."""
    if kind == "png":
        return marked(drawing.png(values))
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def near_is_bright(share: NDArray[np.floating], scale: str = "inferno") -> Picture:
    """Colours of shares of the way from near (0) to far (1): uint8 [..., 3] of a scale that is even to the eye, by
    matplotlib's name."""
    levels = (np.clip(1 - share, 0, 1) * 255 + 0.5).astype(np.uint8)
    colored = cv2.applyColorMap(levels.reshape(levels.shape[0], -1), getattr(cv2, f"COLORMAP_{scale.upper()}"))
    return np.ascontiguousarray(colored[..., ::-1]).reshape(*levels.shape, 3)


def voc_palette(count: int) -> list[Color]:
    """The palette of Pascal VOC's masks, which tells up to 256 classes apart; black is the first."""
    colors = []
    for index in range(count):
        levels = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                levels[channel] |= ((index >> (3 * bit + channel)) & 1) << (7 - bit)
        colors.append((levels[0], levels[1], levels[2]))
    return colors


def palette_of(classes: Sequence[str], count: int) -> list[Color]:
    """Colours of `count` classes: VOC's, where black is left to a background, the first class by its name."""
    has_background = bool(classes) and classes[0].lower() in ("background", "unlabeled", "unlabelled", "void")
    return voc_palette(count) if has_background else voc_palette(count + 1)[1:]


def depth_legend(near: float, far: float, width: int, scale: str = "inferno") -> Picture:
    """A strip with the scale's colours and the metres at its ends and middle: uint8 [height, width, 3]."""
    font, size = _font(width)
    strip = np.full((round(2.4 * size), width, 3), 255, np.uint8)
    strip[size // 4 : size] = near_is_bright(np.linspace(0, 1, width)[None], scale)
    picture = Image.fromarray(strip)
    draw = ImageDraw.Draw(picture)
    for share, anchor in ((0.0, "la"), (0.5, "ma"), (1.0, "ra")):
        metres = f"{near + share * (far - near):.3g} m"
        if share != 0.5 or width > 3.5 * font.getlength(metres):
            at = size // 4 + share * (width - size // 2)
            draw.text((at, 1.1 * size), metres, fill=(0, 0, 0), font=font, anchor=anchor)
    return np.asarray(picture)


def class_legend(entries: Sequence[tuple[Color, str]], width: int) -> Picture:
    """A strip of colours with names, in as many lines as they take: uint8 [height, width, 3]."""
    font, size = _font(width)
    places, left, line = [], size // 2, 0
    for _, name in entries:
        taken = round(2.1 * size + font.getlength(name))
        if left > size // 2 and left + taken > width:
            left, line = size // 2, line + 1
        places.append((left, round((0.35 + 1.5 * line) * size)))
        left += taken
    picture = Image.new("RGB", (width, round((1.7 + 1.5 * line) * size)), (255, 255, 255))
    draw = ImageDraw.Draw(picture)
    for (color, name), (x, y) in zip(entries, places, strict=True):
        draw.rectangle((x, y, x + size, y + size), fill=color, outline=(90, 90, 90))
        draw.text((x + 1.4 * size, y + size / 2), name, fill=(0, 0, 0), font=font, anchor="lm")
    return np.asarray(picture)


def _font(width: int) -> tuple[ImageFont.FreeTypeFont, int]:
    size = min(max(width // 36, 11), 36)
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow's wheels have FreeType"
    return font, size
