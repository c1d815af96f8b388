"""A look at a set before a day is spent on it: types, bits, channels, sizes, orientations and opacity of its files."""

import statistics
import time
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from dinov2cli.console import few
from dinov2cli.data.datasets.base import ImageDataset
from dinov2cli.data.decoding import Reading
from dinov2cli.data.formats.stored import Stored, UnreadableImage

MOST, SECONDS = 1000, 5.0
KINDS = ("type", "bits", "channels")
SOME = {"turned": "turned by EXIF", "alpha": "with transparency", "left_out": "with more images"}


class Facts(NamedTuple):
    """Of one file."""

    type: str
    bits: str
    channels: str
    height: int
    width: int
    turned: bool
    alpha: bool
    left_out: bool


class Look(NamedTuple):
    """What was seen.

    Args:
        files: of the images that were looked at, the facts with the path of the file; those unreadable are left out.
        unreadable: how many could not be read.
        size: images of the whole set.
    """

    files: list[tuple[Facts, str]]
    unreadable: int
    size: int

    def __str__(self) -> str:
        """One line."""
        seen = [facts for facts, _ in self.files]
        if not seen:
            return f"none of {self.unreadable} that were looked at can be read"
        sizes = sorted((facts.height * facts.width, facts) for facts in seen)
        small, large = sizes[0][1], sizes[-1][1]
        heights, widths = ([getattr(facts, side) for facts in seen] for side in ("height", "width"))
        size = f"{small.width} x {small.height}"
        if small[3:5] != large[3:5]:
            median = f"{statistics.median_low(widths)} x {statistics.median_low(heights)}"
            size += f" to {large.width} x {large.height}, median {median}"
        parts = [*(_counted(Counter(getattr(each, what) for each in seen)) for what in KINDS), size]
        for what, name in SOME.items():
            if count := sum(getattr(facts, what) for facts in seen):
                parts.append(f"{count} {name}")
        if self.unreadable:
            parts.append(f"{self.unreadable} unreadable")
        looked = len(seen) + self.unreadable
        of = "all" if looked == self.size else f"{looked:,} looked at"
        return f"{of}: {'; '.join(parts)}"

    @property
    def side(self) -> int | None:
        """Median of the shorter sides in pixels; None where nothing could be read."""
        return statistics.median_low(min(facts.height, facts.width) for facts, _ in self.files) if self.files else None

    def in_short(self) -> str:
        """Such as `1,234 RGB images of about 96 pixels`."""
        if self.side is None:
            return f"{self.size:,} images that could not be read"
        channels = Counter(facts.channels for facts, _ in self.files).most_common(1)[0][0]
        kind = f"{channels} images" if channels in ("RGB", "gray") else f"images of {channels}"
        return f"{self.size:,} {kind}, of about {self.side} pixels"

    def mixtures(self) -> Iterator[str]:
        """What differs within the set and seldom should: bits and channels, each with a file of the rarer kinds."""
        for what in ("bits", "channels"):
            kinds = Counter(getattr(facts, what) for facts, _ in self.files)
            first = {getattr(facts, what): path for facts, path in reversed(self.files)}
            if len(kinds) > 1:
                named = ", ".join(f"{count} of {kind} (such as {first[kind]})" for kind, count in kinds.most_common(4))
                yield f"the images differ in their {what}: {named}"


def _counted(kinds: Counter[str]) -> str:
    if len(kinds) == 1:
        return next(iter(kinds))
    return few([f"{kind} {count}" for kind, count in kinds.most_common()])


def look_at(dataset: ImageDataset, reading: Reading, most: int | None = None) -> Look:
    """Facts of up to `most` images (1,000), evenly over the set, as many as take 5 seconds."""
    started = time.perf_counter()
    files: list[tuple[Facts, str]] = []
    unreadable = 0
    for index in range(0, len(dataset), -(-len(dataset) // (most or MOST))):
        path = dataset.path(index)
        try:
            files.append((_facts(dataset.open(index, reading).described()), path))
        except UnreadableImage:
            unreadable += 1
        if time.perf_counter() - started > SECONDS:
            break
    return Look(files, unreadable, len(dataset))


def _facts(stored: Stored) -> Facts:
    array, kind = stored.array, stored.array.dtype
    bits = f"{kind.itemsize * 8} bits"
    if kind.kind in "if":
        bits = f"{'signed' if kind.kind == 'i' else 'floating point'} {bits}"
    elif stored.span is not None and stored.span[0] == 0 and stored.span[1] < 2 ** (8 * kind.itemsize) - 1:
        bits = f"white {stored.span[1]:g}"
    channels = {1: "gray", 3: "RGB"}.get(stored.channels, f"{stored.channels} channels")
    turned, more = stored.orientation > 1, bool(stored.left_out)
    return Facts(stored.type, bits, channels, array.shape[0], array.shape[1], turned, stored.alpha, more)
