"""From the channels that a file has to those that a network takes: red, green and blue, or others."""

import cv2
import numpy as np

from dinov2cli.config.images import Images
from dinov2cli.data.formats.stored import Stored, UnreadableImage, bands, span_of_type
from dinov2cli.data.workers import warn_once
from dinov2cli.requests.images import background as background_of

LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def to_rgb(image: np.ndarray, stored: Stored, images: Images, path: str) -> np.ndarray:
    """What is not asked to be N channels: `values` [H, W, C] as RGB [H, W, 3].

    Of files of 8 bits and fewer they are uint8, else float32 in 0..1, so that nothing is rounded.

    One channel is repeated; of more than three that begin with red, green and blue, these are taken, with a warning.

    Raises:
        UnreadableImage: two channels, or more than three with no colours among them.
    """
    channels = image.shape[2]
    if channels > 3 and stored.rgb:
        warn_once("%s: of its %d channels red, green and blue are read; the same holds for others like it", path,
                  channels)  # fmt: skip
        image = image[..., :3]
    elif channels not in (1, 3):
        raise UnreadableImage(path, f"has {channels} channels, and gray (1) or RGB (3) is asked for")
    colors = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_GRAY2RGB) if channels == 1 else image
    if stored.alpha and images.background != "drop":
        colors = over_background(colors, opacity_of(stored) if colors.dtype != np.uint8 else _opacity(stored), images)
    return np.ascontiguousarray(colors)


def _opacity(stored: Stored) -> np.ndarray:
    are_bytes = stored.array.dtype == np.uint8 and stored.span == (0, 255)
    return stored.array[..., -1:] if are_bytes else as_bytes(opacity_of(stored))


def over_background(colors: np.ndarray, opacity: np.ndarray, images: Images) -> np.ndarray:
    """[H, W, 3] with opacity [H, W, 1], both uint8 or float32 in 0..1, laid over what `images` names: [H, W, 3].

    Over the mean, what is transparent reaches the network as zeros, of bytes to within half a level.
    """
    rule, color = background_of(images.background)
    if rule == "drop":
        return colors
    background = np.array(color or np.multiply(images.statistics.mean, 255))
    are_bytes = colors.dtype == np.uint8
    below = (background + 0.5).astype(np.uint32) if are_bytes else (background / 255).astype(np.float32)
    laid = np.empty_like(colors, order="C")
    for rows in bands(colors):
        above, share = colors[rows], opacity[rows]
        if are_bytes:
            share = share.astype(np.uint32)
            laid[rows] = (above * share + below * (255 - share) + 127) // 255
        else:
            laid[rows] = above * share + below * (1 - share)
    return laid


def to_channels(image: np.ndarray, stored: Stored, images: Images, path: str) -> np.ndarray:
    """The channels that are asked for, [H, W, C] -> [H, W, images.in_chans], uint8 or float32 in 0..1 as they are.

    Those that `images.channels` names; else all of them, where there are as many. Colours become one channel as their
    luma. Opacity comes after the last channel: it is one where it is named or counted, else shows the mean behind.

    Raises:
        UnreadableImage: the file does not have these channels.
    """
    wanted, found = images.in_chans, image.shape[2]
    places = [place_of(name, stored, path) for name in images.channels]
    if not places and wanted == found + stored.alpha:
        places = list(range(wanted))
    if stored.alpha and found in places:
        opacity = opacity_of(stored)
        image = np.concatenate([image, opacity if image.dtype != np.uint8 else as_bytes(opacity)], axis=2)
    elif not places and wanted == 1 and stored.rgb:
        image, places = _luma(image), [0]
    if places == list(range(image.shape[2])) or (not places and wanted == found):
        chosen = image
    elif places:
        chosen = image[..., places]
    else:
        named = f", {', '.join(stored.names)}" if stored.names else ""
        raise UnreadableImage(
            path,
            f"has {found} channel{'s' * (found > 1)}{named}, and the model takes {wanted}; say which with "
            f"data.channels, such as [{', '.join(str(i % found) for i in range(wanted))}]",
        )
    if stored.alpha and found not in places:
        chosen = _over_mean(chosen, opacity_of(stored), images)
    return np.ascontiguousarray(chosen)


def place_of(name: str, stored: Stored, path: str) -> int:
    """Which channel of an image a name or number means; raises `UnreadableImage` where it has none such."""
    if name in stored.names:
        return stored.names.index(name)
    if stored.alpha and name == "alpha":
        return stored.channels
    colors = ("red", "green", "blue")
    if stored.rgb and name in colors:
        return colors.index(name)
    if name.isdecimal():
        if (place := int(name)) < stored.channels + stored.alpha:
            return place
        raise UnreadableImage(path, f"has no channel {name}: it has {stored.channels + stored.alpha}, the first is 0")
    names = ", ".join(stored.names or (colors if stored.rgb else ())) or "none"
    raise UnreadableImage(path, f"has no channel named {name!r} (data.channels); its names: {names}")


def _luma(image: np.ndarray) -> np.ndarray:
    luma = image[..., :3].astype(np.float32) @ LUMA
    return (luma + np.float32(0.5)).astype(np.uint8)[..., None] if image.dtype == np.uint8 else luma[..., None]


def opacity_of(stored: Stored) -> np.ndarray:
    """That of an image that has it: float32 [H, W, 1] in 0..1."""
    opacity = stored.array[..., -1:]
    low, opaque = stored.span if stored.span and opacity.dtype.kind == "u" else span_of_type(opacity.dtype)
    share = np.empty(opacity.shape, np.float32)
    for rows in bands(opacity):
        share[rows] = ((opacity[rows] - np.float64(low)) / (opaque - low)).clip(0, 1)
    return share


def as_bytes(share: np.ndarray) -> np.ndarray:
    """0..1 as uint8."""
    return (share * np.float32(255) + np.float32(0.5)).astype(np.uint8)


def _over_mean(image: np.ndarray, opacity: np.ndarray, images: Images) -> np.ndarray:
    of_bytes = image.dtype == np.uint8
    mean = np.array(images.statistics.mean, np.float32) * (255 if of_bytes else 1)
    laid: np.ndarray = image * opacity + mean * (1 - opacity)
    return (laid + np.float32(0.5)).astype(np.uint8) if of_bytes else laid
