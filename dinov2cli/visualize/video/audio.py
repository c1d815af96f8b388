"""Sound of the input carried to the output: copied where the container takes the codec, else encoded as AAC."""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av

from dinov2cli.console import logger

COPIED_CODECS = {"aac", "ac3", "alac", "eac3", "flac", "mp3", "opus"}
"""Codecs that mp4, mov and mkv all hold and players know."""

LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}


class AudioTracks:
    """All sound tracks of a file, muxed alongside the video so that memory does not grow with the length.

    Args:
        path: the file with the sound.
        container: the open output, before its first packet.
        start: the source's own time of the first video frame in seconds: it becomes time 0 of the sound too.
    """

    def __init__(self, path: Path, container: Any, start: Fraction) -> None:
        self._path, self._container, self._start = path, container, start
        self._input = av.open(str(path), metadata_errors="replace")
        self._tracks = {s.index: _Track(s, container) for s in self._input.streams.audio if s.codec_context}
        streams = [self._input.streams[index] for index in self._tracks]
        self._packets: Iterator[Any] = iter(self._input.demux(streams)) if streams else iter(())
        self._next: Any = None

    def write_until(self, seconds: Fraction | None) -> None:
        """Mux the sound up to a time from the first frame; None: to its end."""
        while self._advance():
            packet = self._next
            at = (packet.pts if packet.pts is not None else packet.dts) * packet.time_base - self._start
            if seconds is not None and at > seconds:
                return
            self._next = None
            # What sounds before the first frame goes, but not a codec's short lead-in.
            if at + Fraction(1, 20) >= 0:
                self._container.mux(self._tracks[packet.stream.index].write(packet, self._start))
        if seconds is None:
            for track in self._tracks.values():
                self._container.mux(track.flush(self._start))

    def close(self) -> None:
        self._input.close()

    def _advance(self) -> bool:
        """Have the next packet with a time at hand; False at the end, which damage brings early."""
        while self._next is None:
            try:
                packet = next(self._packets)
            except (StopIteration, av.error.EOFError):
                return False
            except av.error.FFmpegError as error:
                logger.warning("%s: the sound ends early (%s)", self._path, error.strerror)
                return False
            if packet.size and (packet.pts is not None or packet.dts is not None):
                self._next = packet
        return True


class _Track:
    """One sound track of the output, made from the packets of one of the input."""

    def __init__(self, stream: Any, container: Any) -> None:
        self._copied = stream.codec_context.name in COPIED_CODECS
        if self._copied:
            self._output = container.add_stream_from_template(stream)
            return
        rate = stream.codec_context.sample_rate
        self._output = container.add_stream("aac", rate=rate if 8000 <= rate <= 96000 else 48000)
        # By number of channels: raw sound often does not say where its speakers are, and the encoder must know.
        layout = LAYOUTS.get(stream.codec_context.channels, "stereo")
        self._output.layout = layout
        self._resampler = av.AudioResampler("fltp", layout, self._output.rate, frame_size=1024)
        self._damaged = 0

    def write(self, packet: Any, start: Fraction) -> list[Any]:
        if self._copied:
            shift = round(start / packet.time_base)
            packet.pts = None if packet.pts is None else packet.pts - shift
            packet.dts = None if packet.dts is None else packet.dts - shift
            packet.stream = self._output
            return [packet]
        try:
            frames = packet.decode()
        except av.error.InvalidDataError:
            self._damaged += 1
            if self._damaged == 1:
                logger.warning("damaged sound passed over")
            return []
        return [out for frame in frames for out in self._encode(self._resampler.resample(frame), start)]

    def flush(self, start: Fraction) -> list[Any]:
        if self._copied:
            return []
        return [*self._encode(self._resampler.resample(None), start), *self._output.encode(None)]

    def _encode(self, frames: list[Any], start: Fraction) -> list[Any]:
        for frame in frames:
            if frame.pts is not None and frame.time_base:
                frame.pts -= round(start / frame.time_base)
        return [packet for frame in frames for packet in self._output.encode(frame)]
