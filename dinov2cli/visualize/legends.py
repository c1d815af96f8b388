"""What colours mean: scales of depth, palettes of classes, and the strips below pictures that say so."""

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from dinov2cli.visualize.features import Picture

Color = tuple[int, int, int]


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
