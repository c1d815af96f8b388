"""Frames of a video file or of a folder of images, upright, in 8-bit RGB, with their own times; high dynamic range
as the standard one that models and screens expect.
"""

import heapq
import math
from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import Colorspace, VideoReformatter
from numpy.typing import NDArray

from dinov2cli.console import logger
from dinov2cli.data.channels import over_background
from dinov2cli.data.decoding import USUAL, Reading
from dinov2cli.errors import DataError
from dinov2cli.visualize.video.stills import (
    AnimatedPicture,
    Frame,
    ImageFolder,
    images_in,
    is_animated_webp,
    of_size,
)

UNSPECIFIED_COLORSPACE = 2
MOST_REORDERED = 4
"""Frames that a time stamp may be off its place; streams reorder by one or two."""


def check_source(path: Path, fps: float | None = None) -> None:
    """Raise `DataError` before any work for what is not there, and for --fps of what has its own times."""
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if path.is_dir():
        images_in(path)
        if fps is not None and fps <= 0:
            raise DataError("--fps must be above 0")
    elif fps is not None:
        raise DataError(f"--fps: {path} is a video and has its own times; --fps is for folders of images")


def open_source(path: Path, fps: float | None = None, reading: Reading = USUAL) -> "FrameSource":
    """Open a video file (anything FFmpeg reads), an animated picture or a folder of images (in natural order of names).

    Args:
        fps: frames per second of an image folder (default 10). Others keep their own times.
        reading: how the images of a folder become pixels, and what shows where a frame is transparent.

    Raises:
        DataError: nothing there, no video stream, no frame that can be decoded, no images.
    """
    check_source(path)
    if path.is_dir():
        return ImageFolder(path, Fraction(fps if fps is not None else 10).limit_denominator(1001), reading)
    if is_animated_webp(path):
        return AnimatedPicture(path, reading)
    return VideoFile(path, reading)


class VideoFile:
    """A video file. Rotation metadata is applied, the background shows through, HDR is mapped to the standard range.

    As of every source, `path`, `size` (height and width in pixels, upright), `pixel_aspect` (width over height of a
    pixel), `rate` (average frames a second), `time_base` (seconds; all times are its multiples) and `start` (the file's
    own time of the first frame in seconds, where the sound is cut).
    """

    def __init__(self, path: Path, reading: Reading = USUAL) -> None:
        self.path, self.reading = path, reading
        with self._open() as container:
            stream = _video_stream(container, path)
            self.time_base = stream.time_base or Fraction(1, 90000)
            self.rate = stream.average_rate or stream.guessed_rate or Fraction(25)
            aspect = stream.sample_aspect_ratio or Fraction(1)
        first = next(self.frames(), None)
        if first is None:
            raise DataError(f"{path}: no frame can be decoded; the file is empty or damaged")
        self.size = first.image.shape[:2]
        self.pixel_aspect = 1 / aspect if self._turns % 2 == 1 else aspect  # turned by a quarter

    def count(self) -> int:
        """Number of frames, without decoding them; an upper bound where the file is damaged."""
        with self._open() as container:
            stream = _video_stream(container, self.path)
            try:
                return max(sum(1 for packet in container.demux(stream) if packet.size), 1)
            except av.error.FFmpegError:
                return max(int(stream.frames), 1)

    def frames(self, every: int = 1) -> Iterator[Frame]:
        """Frames 0, `every`, 2 * `every`, ... from the start; may be called again."""
        with self._open() as container:
            stream = _video_stream(container, self.path)
            stream.thread_type = "AUTO"
            start: int | None = None
            last = -1
            size: tuple[int, int] | None = None
            # One for all frames: a frame's own conversion would start and end a thread per core each time.
            converter = VideoReformatter()
            for index, (frame, ticks) in enumerate(_with_ticks(self._decode(container, stream))):
                usual = max(round(1 / (self.rate * self.time_base)), 1)
                if start is None:
                    start = ticks if ticks is not None else 0
                    self.start = start * self.time_base
                    self._turns = round(getattr(frame, "rotation", 0) / 90) % 4
                # Times must grow, or no container takes them; damaged files and old AVIs have gaps and repeats.
                at = max(ticks - start if ticks is not None else last + usual, last + 1)
                last = at
                if index % every:
                    continue
                image = _upright_rgb(frame, self._turns, converter, self.reading)
                size = size or image.shape[:2]
                yield Frame(of_size(image, size), at * self.time_base, (frame.duration or usual) * self.time_base)

    def _open(self) -> Any:
        try:
            # A playlist may name files of this machine, and no address; titles need not be UTF-8.
            return av.open(
                str(self.path), metadata_errors="replace", options={"protocol_whitelist": "file,crypto,data"}
            )
        except (av.error.FFmpegError, OSError) as error:
            raise DataError(f"{self.path}: not a video that can be read ({_reason(error)})") from error

    def _decode(self, container: Any, stream: Any) -> Iterator[Any]:
        """Decoded frames; a damaged packet is passed over, a damaged end is the end. Both are logged once."""
        damaged = 0
        packets = iter(container.demux(stream))
        while True:
            try:
                yield from next(packets).decode()
            except (av.error.EOFError, StopIteration):
                break
            except av.error.InvalidDataError:
                damaged += 1
            except av.error.FFmpegError as error:
                logger.warning("%s: ends early (%s)", self.path, _reason(error))
                break
        if damaged:
            logger.warning("%s: %d damaged packets passed over", self.path, damaged)


FrameSource = VideoFile | ImageFolder | AnimatedPicture


def sampling_step(count: int, wanted: int) -> int:
    """The step at which at most `wanted` of `count` frames are taken, evenly over all."""
    return max(math.ceil(count / wanted), 1)


def _video_stream(container: Any, path: Path) -> Any:
    pictures = [s for s in container.streams.video if not s.disposition & s.disposition.attached_pic]
    if not pictures:
        kinds = sorted({s.type for s in container.streams}) or ["nothing"]
        raise DataError(f"{path}: no video stream in this file, only {', '.join(kinds)}")
    return pictures[0]


def _with_ticks(frames: Iterator[Any]) -> Iterator[tuple[Any, int | None]]:
    """Frames with their times in ticks; None where a frame has none.

    Decoders give frames in the order of display, but in an AVI with B-frames, which stores no such times, neighbours
    carry each other's: the earliest time at hand is the next frame's.
    """
    waiting: deque[tuple[Any, bool]] = deque()
    ticks: list[int] = []

    def release() -> tuple[Any, int | None]:
        frame, timed = waiting.popleft()
        return frame, heapq.heappop(ticks) if timed else None

    for frame in frames:
        at = frame.pts if frame.pts is not None else frame.dts
        waiting.append((frame, at is not None))
        if at is not None:
            heapq.heappush(ticks, at)
        if len(waiting) > MOST_REORDERED:
            yield release()
    while waiting:
        yield release()


def _upright_rgb(frame: Any, quarter_turns: int, converter: VideoReformatter, reading: Reading) -> NDArray[np.uint8]:
    colorspace = None
    if not frame.format.is_rgb and frame.colorspace == UNSPECIFIED_COLORSPACE and frame.height >= 720:
        colorspace = Colorspace.ITU709  # what untagged high-definition video means

    def pixels(layout: str) -> Any:
        return converter.reformat(frame, format=layout, src_colorspace=colorspace).to_ndarray()

    if frame.color_trc in (PQ, HLG):
        image = tone_map(pixels("rgb48le"), frame.color_trc)
    elif any(component.is_alpha for component in frame.format.components):
        rgba = pixels("rgba")
        image = over_background(rgba[..., :3], rgba[..., 3:], reading.images)
    else:
        image = pixels("rgb24")
    return np.ascontiguousarray(np.rot90(image, quarter_turns))


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


PQ = 16
"""Transfer characteristic SMPTE ST 2084 (HDR10, Dolby Vision), as numbered in ITU-T H.273."""
HLG = 18
"""Transfer characteristic ARIB STD-B67 (hybrid log-gamma), as numbered in ITU-T H.273."""
SDR_WHITE_NITS = 203.0
"""Luminance of diffuse white in HDR material (ITU-R BT.2408)."""
KNEE = 0.8

# Linear light, BT.2020 to BT.709 primaries (ITU-R BT.2087).
BT2020_TO_BT709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], dtype=np.float32
)


def tone_map(image: NDArray[np.uint16], transfer: int) -> NDArray[np.uint8]:
    """BT.2020 signal to sRGB: uint16 [H, W, 3] (full range) -> uint8 [H, W, 3].

    Values up to 0.8 of diffuse white keep their brightness; highlights above it are compressed, not cut.

    Args:
        transfer: `PQ` or `HLG`.
    """
    linear = _linear_light(transfer)[image] @ BT2020_TO_BT709.T
    np.maximum(linear, 0, out=linear)
    over = np.maximum(linear - KNEE, 0)
    compressed = np.minimum(linear, KNEE) + (1 - KNEE) * over / (over + (1 - KNEE))
    result: NDArray[np.uint8] = _srgb_table()[(compressed * 4095 + 0.5).astype(np.uint16)]
    return result


@cache
def _linear_light(transfer: int) -> NDArray[np.float32]:
    """Linear light over diffuse white for each 16-bit signal value: float32 [65536]."""
    signal = np.arange(65536) / 65535
    if transfer == PQ:  # SMPTE ST 2084
        m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
        root = signal ** (1 / m2)
        nits = 10000 * (np.maximum(root - c1, 0) / (c2 - c3 * root)) ** (1 / m1)
    elif transfer == HLG:  # ITU-R BT.2100, system gamma 1.2 at a nominal peak of 1000 nits, applied per channel
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        scene = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
        nits = 1000 * scene**1.2
    else:
        raise ValueError(f"transfer {transfer} is not one of high dynamic range")
    return (nits / SDR_WHITE_NITS).astype(np.float32)


@cache
def _srgb_table() -> NDArray[np.uint8]:
    """sRGB value of each of 4096 steps of linear light: uint8 [4096]."""
    linear = np.arange(4096) / 4095
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return (255 * encoded + 0.5).astype(np.uint8)
