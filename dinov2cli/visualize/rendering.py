"""From feature maps to pictures: upsampling, background, layouts.

Shape legend: H x W pixels, h x w patches, D feature dimension.
"""

from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from dinov2cli.config.images import Images
from dinov2cli.errors import DataError
from dinov2cli.visualize.basis import ColorBasis
from dinov2cli.visualize.features import FeatureMap, Picture, resize

Smoothing = Callable[[NDArray[np.floating]], NDArray[np.floating]]
"""Changes colours and opacity of the patches, [h, w, 4], before they are resized."""

UPSAMPLING = {"nearest": cv2.INTER_NEAREST, "bicubic": cv2.INTER_CUBIC}
OVERLAY_STRENGTH = 0.65
STRETCH = (0.5, 99.5)
"""Percentiles of a channel that are drawn black and full, where channels are no colours."""


def shown(pixels: NDArray[Any], images: Images, channels: str | None = None) -> Picture:
    """What a network is shown, uint8 or float32 in 0..1 [H, W, C], as RGB to look at: uint8 [H, W, 3].

    `channels` as in `places_shown`; one is drawn grey, two are red and green.
    """
    if images.are_rgb:
        return np.asarray(pixels) if pixels.dtype == np.uint8 else _to_bytes(pixels)
    planes = []
    for place in places_shown(images, channels):
        plane = pixels[..., place].astype(np.float32)
        low, high = np.percentile(plane, STRETCH)
        planes.append(np.clip((plane - low) / max(float(high - low), 1e-6), 0, 1))
    if len(planes) < 3:
        planes = planes * 3 if len(planes) == 1 else [*planes, np.zeros_like(planes[0])]
    return (np.stack(planes, axis=-1) * 255 + 0.5).astype(np.uint8)


def places_shown(images: Images, channels: str | None) -> list[int]:
    """Places of the channels that are drawn as red, green and blue.

    Args:
        channels: "R,G,B", by their names in `images.channels`, or else by number; by default the first three.

    Raises:
        DataError: no such channel, or a choice for a model of colours.
    """
    if channels is None:
        return list(range(min(images.in_chans, 3)))
    if images.are_rgb:
        raise DataError(f"--show-channels {channels}: the model takes red, green and blue, and these are shown")
    names = list(images.channels) or [str(place) for place in range(images.in_chans)]
    wanted = [word.strip() for word in channels.split(",")]
    if not set(wanted) <= set(names) or len(wanted) > 3:
        raise DataError(f"--show-channels {channels}: must be one to three of {', '.join(names)}, with commas between")
    return [names.index(word) for word in wanted]


def render(
    picture: Picture,
    features: FeatureMap,
    basis: ColorBasis,
    *,
    layout: str = "pca",
    upsampling: str = "bicubic",
    smoothing: Smoothing | None = None,
) -> Picture:
    """The picture's features in colour, in one of `LAYOUTS`: uint8 [H, W, 3], or [H, 2W, 3] side by side.

    Args:
        picture: what the features are of; its size is the size of the result.
        upsampling: a key of `UPSAMPLING`.
        smoothing: such as a `TemporalFilter` for the frames of a video.
    """
    return LAYOUTS[layout](picture, *paint(features, basis, picture.shape[:2], upsampling, smoothing))


def paint(
    features: FeatureMap,
    basis: ColorBasis,
    size: tuple[int, int],
    upsampling: str = "bicubic",
    smoothing: Smoothing | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Colours float32 [H, W, 3] and opacity float32 [H, W, 1], both within 0 to 1.

    Coordinates are resized before they are clipped, so that edges of the foreground are drawn finer than patches.
    """
    values = np.concatenate([basis.rgb(features), basis.foreground.opacity(features)[..., None]], axis=-1)
    if smoothing:
        values = smoothing(values)
    resized = cv2.resize(values.astype(np.float32), size[::-1], interpolation=UPSAMPLING[upsampling])
    resized = np.clip(resized, 0, 1, dtype=np.float32)
    return resized[..., :3], resized[..., 3:]


def sheet(rows: Sequence[Sequence[Picture]], *, width: int = 1280, gap: int = 8) -> Picture:
    """Pictures in rows on white, each row stretched to the same `width` in pixels: uint8 [H, width, 3]."""
    drawn = []
    for row in rows:
        aspects = [picture.shape[1] / picture.shape[0] for picture in row]
        height = max(round((width - gap * (len(row) - 1)) / sum(aspects)), 1)
        line = np.full((height, width, 3), 255, dtype=np.uint8)
        left = 0
        for index, (picture, aspect) in enumerate(zip(row, aspects, strict=True)):
            right = width if index == len(row) - 1 else left + max(round(height * aspect), 1)
            line[:, left:right] = resize(picture, (height, right - left))
            left = right + gap
        drawn.append(line)
    space = np.full((gap, width, 3), 255, dtype=np.uint8)
    return np.concatenate([part for line in drawn for part in (line, space)][:-1])


def _overlay(picture: Picture, colors: NDArray[np.float32], opacity: NDArray[np.float32]) -> Picture:
    strength = OVERLAY_STRENGTH * opacity
    return _to_bytes(picture.astype(np.float32) / 255 * (1 - strength) + colors * strength)


def _to_bytes(values: NDArray[np.float32]) -> Picture:
    return (values * 255 + 0.5).astype(np.uint8)


LAYOUTS: dict[str, Callable[[Picture, NDArray[np.float32], NDArray[np.float32]], Picture]] = {
    "pca": lambda picture, colors, opacity: _to_bytes(colors * opacity),
    "colors": lambda picture, colors, opacity: _to_bytes(colors),
    "side-by-side": lambda picture, colors, opacity: np.concatenate([picture, _to_bytes(colors * opacity)], axis=1),
    "overlay": _overlay,
}
