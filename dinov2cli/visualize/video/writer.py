"""Rendered frames to an H.264 video, a GIF or a folder of PNG files, which appears complete or not at all."""

import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import av
import cv2
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from numpy.typing import NDArray

from dinov2cli.errors import DataError, EnvironmentProblem
from dinov2cli.files import GIF_COMMENT, MARK, keep_others, marked, write_bytes, writing
from dinov2cli.visualize.video.audio import AudioTracks

VIDEO_FORMATS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska"}


def open_writer(path: Path, *, time_base: Fraction, rate: Fraction, pixel_aspect: Fraction = Fraction(1)) -> "Writer":
    """A writer for what the name says: `.mp4`, `.mov`, `.mkv` (H.264), `.gif`, or, without a suffix, a PNG folder.

    It is a context manager: leaving it normally moves the finished output into place, leaving it by an exception
    (Ctrl-C too) removes what was written and leaves an earlier output as it was.

    Args:
        time_base, rate, pixel_aspect: as in `FrameSource`.

    Raises:
        DataError: an unknown suffix.
        EnvironmentProblem: a place that cannot be written.
    """
    suffix = path.suffix.lower()
    if suffix in VIDEO_FORMATS:
        return VideoWriter(path, time_base, rate, pixel_aspect)
    if suffix == ".gif":
        return GifWriter(path)
    if suffix:
        known = ", ".join([*VIDEO_FORMATS, ".gif"])
        raise DataError(f"{path}: unknown output type {suffix!r}; give {known}, or a name without suffix (PNG folder)")
    return FolderWriter(path)


def check_output(path: Path) -> None:
    """Raise what `open_writer` and a write would raise, before hours of work."""
    with open_writer(path, time_base=Fraction(1, 25), rate=Fraction(25)):
        pass  # leaving a writer without a frame removes what it prepared


class Writer:
    """What the three writers share: an output prepared aside under a hidden name, then renamed."""

    square_pixels = True
    """Whether the output cannot say that its pixels are not square."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.aside = path.with_name(f".{path.name}.partial")
        self.frames_written = 0
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._check_place()
            self._create()

    def write(self, image: Any, time: Fraction, duration: Fraction) -> None:
        """Append a frame: RGB uint8 [H, W, 3], with its time and duration in seconds; times must grow."""
        with writing(self.path):  # FFmpeg's errors of the file system are OSErrors as well
            self._write(image, time, duration)
        self.frames_written += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None or not self.frames_written:
            return self._abandon()
        try:
            with writing(self.path):
                self._finish()
                os.replace(self.aside, self.path)
        except BaseException:
            self._abandon()
            raise

    def _check_place(self) -> None:
        if self.path.is_dir():
            raise EnvironmentProblem(f"{self.path}: is a folder; give a file name")
        keep_others(self.path)

    def _create(self) -> None:
        self.aside.touch()

    def _write(self, image: NDArray[np.uint8], time: Fraction, duration: Fraction) -> None:
        raise AssertionError("each writer has its own")

    def _finish(self) -> None:
        """Complete the output aside."""

    def _abandon(self) -> None:
        self.aside.unlink(missing_ok=True)


class ContainerWriter(Writer):
    """What goes through FFmpeg."""

    _container: Any

    def _finish(self) -> None:
        self._container.close()

    def _abandon(self) -> None:
        try:
            with suppress(av.error.FFmpegError, OSError):  # without frames there is no valid header to complete
                self._container.close()
        finally:
            super()._abandon()


class VideoWriter(ContainerWriter):
    """H.264, yuv420p, BT.709: plays everywhere. An odd side is extended by repeating its last row or column."""

    square_pixels = False

    def __init__(self, path: Path, time_base: Fraction, rate: Fraction, pixel_aspect: Fraction) -> None:
        self._time_base, self._rate, self._pixel_aspect = time_base, rate, pixel_aspect
        self._stream: Any = None
        self._audio: AudioTracks | None = None
        self._durations: dict[int, int] = {}
        self._converter = VideoReformatter()
        super().__init__(path)

    def add_audio(self, source: Path, start: Fraction) -> None:
        """Carry over the sound of a file; call before the first frame. `start` as in `AudioTracks`."""
        self._audio = AudioTracks(source, self._container, start)

    def _create(self) -> None:
        super()._create()
        suffix = self.path.suffix.lower()
        # The index first, so that the video plays while it downloads.
        options = {"movflags": "+faststart"} if suffix != ".mkv" else {}
        self._container = av.open(str(self.aside), "w", format=VIDEO_FORMATS[suffix], options=options)
        self._container.metadata["comment"] = MARK
        # No frames out of order: with them, mp4's duration of a video of variable frame rate comes out wrong.
        self._stream = self._container.add_stream("libx264", rate=self._rate, options={"crf": "18", "bf": "0"})

    def _write(self, image: NDArray[np.uint8], time: Fraction, duration: Fraction) -> None:
        height, width = image.shape[:2]
        image = np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        if not self.frames_written:
            context = self._stream.codec_context
            context.height, context.width = image.shape[:2]
            context.pix_fmt = "yuv420p"
            context.time_base = self._time_base
            context.sample_aspect_ratio = self._pixel_aspect
            context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
            context.color_range = 1  # limited
        drawn = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), "rgb24")
        frame = self._converter.reformat(
            drawn, format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
        )
        frame.time_base = self._time_base
        frame.pts = round(time / self._time_base)
        frame.duration = max(round(duration / self._time_base), 1)
        self._durations[frame.pts] = frame.duration
        self._mux(self._stream.encode(frame))
        if self._audio:
            self._audio.write_until(time + duration)

    def _mux(self, packets: list[Any]) -> None:
        for packet in packets:
            # The encoder would give the last frame the average duration, and the video a wrong length.
            ticks = self._durations.pop(round(packet.pts * packet.time_base / self._time_base), None)
            if ticks is not None:
                packet.duration = round(ticks * self._time_base / packet.time_base)
            self._container.mux(packet)

    def _finish(self) -> None:
        self._mux(self._stream.encode(None))
        if self._audio:
            self._audio.write_until(None)
            self._audio.close()
        super()._finish()

    def _abandon(self) -> None:
        if self._audio:
            self._audio.close()
        super()._abandon()


class GifWriter(ContainerWriter):
    """A looping GIF with a palette for every frame. Its clock ticks in 1/100 s, and viewers slow down frames shorter
    than two ticks, so above 50 frames a second some are left out."""

    SHORTEST = 2

    def __init__(self, path: Path) -> None:
        self._stream: Any = None
        self._graph: Any = None
        self._last_tick = -self.SHORTEST
        self._duration = self.SHORTEST
        super().__init__(path)

    def _create(self) -> None:
        super()._create()
        self._container = av.open(str(self.aside), "w", format="gif")

    def _write(self, image: NDArray[np.uint8], time: Fraction, duration: Fraction) -> None:
        tick = round(time * 100)
        if tick < self._last_tick + self.SHORTEST:
            return
        if self._graph is None:
            self._start(*image.shape[:2])
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), "rgb24")
        frame.pts, frame.time_base = tick, Fraction(1, 100)
        self._duration = max(round(duration * 100), self.SHORTEST)
        self._last_tick = tick
        self._graph.push(frame)
        self._drain()

    def _start(self, height: int, width: int) -> None:
        self._stream = self._container.add_stream("gif", rate=100)
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "pal8"
        self._stream.codec_context.time_base = Fraction(1, 100)
        graph, ticks = av.filter.Graph(), Fraction(1, 100)
        source = graph.add_buffer(width=width, height=height, format=av.VideoFormat("rgb24"), time_base=ticks)
        split, palette = graph.add("split"), graph.add("palettegen", "stats_mode=single")
        # Ordered dithering stays put from frame to frame, where error diffusion would crawl.
        use, sink = graph.add("paletteuse", "new=1:dither=bayer:bayer_scale=4"), graph.add("buffersink")
        source.link_to(split)
        split.link_to(palette, 0, 0)
        split.link_to(use, 1, 0)
        palette.link_to(use, 0, 1)
        use.link_to(sink)
        graph.configure()
        self._graph = graph

    def _drain(self) -> None:
        while True:
            try:
                frame = self._graph.pull()
            except (av.error.BlockingIOError, av.error.EOFError):
                return
            for packet in self._stream.encode(frame):
                packet.duration = self._duration  # matters for the last frame: the others end where the next begins
                self._container.mux(packet)

    def _finish(self) -> None:
        self._graph.push(None)
        self._drain()
        super()._finish()
        with self.aside.open("r+b") as file:
            file.seek(-1, os.SEEK_END)  # the last byte says that it ends
            file.write(GIF_COMMENT)


class FolderWriter(Writer):
    """`frame_000001.png`, `frame_000002.png`, ... A folder that holds anything else is never replaced.

    Args:
        suffix: of the files.
        save: writes what is given for a frame as such a file; by default `write_png`.
    """

    def __init__(self, path: Path, suffix: str = ".png", save: Callable[[Path, Any], None] | None = None) -> None:
        self._suffix, self._save = suffix, save or write_png
        super().__init__(path)

    def _check_place(self) -> None:
        if self.path.is_file():
            raise EnvironmentProblem(f"{self.path}: is a file; a name without suffix means a folder of files")
        names = sorted(p.name for p in self.path.iterdir()) if self.path.is_dir() else []
        ours = re.compile(rf"frame_\d{{6,}}{re.escape(self._suffix)}")
        if foreign := next((name for name in names if not ours.fullmatch(name)), None):
            raise EnvironmentProblem(
                f"{self.path}: holds other files ({foreign}); give a new or empty folder for the frames"
            )

    def _create(self) -> None:
        shutil.rmtree(self.aside, ignore_errors=True)
        self.aside.mkdir()

    def _write(self, image: Any, time: Fraction, duration: Fraction) -> None:
        self._save(self.aside / f"frame_{self.frames_written + 1:06d}{self._suffix}", image)

    def _finish(self) -> None:
        # A rename replaces an empty folder only; what is there was rendered before (see _check_place).
        shutil.rmtree(self.path, ignore_errors=True)

    def _abandon(self) -> None:
        shutil.rmtree(self.aside, ignore_errors=True)


def write_png(path: Path, image: NDArray[np.uint8]) -> None:
    """Write RGB [H, W, 3] as a PNG file, atomically.

    Raises:
        OSError: the place cannot be written.
    """
    written, encoded = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    assert written
    write_bytes(path, marked(encoded.tobytes()))
