"""Images of val that are in train, too: how much of an accuracy is recognition of what was seen."""

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import torch

from dinov2cli import distributed
from dinov2cli.console import logger, progress, stoppable
from dinov2cli.data.datasets import ImageDataset, UnreadableImage

ALL_UP_TO = 20_000
"""Images of train and val together up to which every image of val is looked for."""
SAMPLED = 500
"""Images of val, chosen at random, that are looked for in larger sets; 1 % in train is missed once in 150 times."""
THREADS = 8
CHUNK = 4096


class Overlap(NamedTuple):
    """How many of the `compared` images of val, of `images` in all, are byte for byte in train, too."""

    found: int
    compared: int
    images: int

    @property
    def percent(self) -> float:
        return 100 * self.found / max(1, self.compared)

    def as_dict(self) -> dict[str, float]:
        """As it stands in `results.json`."""
        return {"percent": round(self.percent, 4), **self._asdict()}

    def __str__(self) -> str:
        of = f"{self.compared} images" if self.compared == self.images else f"{self.compared} sampled images"
        return f"{self.percent:.4g} % of val ({self.found} of {of}) is in train, too, byte for byte"


def overlap(train: ImageDataset, val: ImageDataset) -> Overlap:
    """Look for the files of `val` in `train`, and warn where there are any. Collective; the first process reads.

    Files are compared by SHA-256; of train only those are read that are as long as one of val. Images that are no
    files (`file_size` is None) are told by their names.
    """
    found = Overlap(0, 0, 0)
    if distributed.is_main():
        found = Overlap(len(val), len(val), len(val)) if same_images(train, val) else _compare(train, val)
        if found.found:
            logger.warning("%s: the accuracy says little about images that are new", found)
    return distributed.broadcast_object(found)


def same_images(first: ImageDataset, second: ImageDataset) -> bool:
    """Whether two datasets are the same images in the same order."""
    n = len(first)
    return n == len(second) and first.describe() == second.describe() and first.path(n - 1) == second.path(n - 1)


def _compare(train: ImageDataset, val: ImageDataset) -> Overlap:
    chosen = list(range(len(val)))
    if len(train) + len(val) > ALL_UP_TO:
        chosen = torch.randperm(len(val), generator=torch.Generator().manual_seed(0))[:SAMPLED].tolist()
    with ThreadPoolExecutor(THREADS) as pool, progress() as bar, stoppable() as stop_if_asked:

        def keys_of(images: ImageDataset, which: Iterable[int]) -> list[int | str]:
            return [images.path(i) if (size := images.file_size(i)) is None else size for i in which]

        wanted = keys_of(val, chosen)
        known = set(wanted)
        task = bar.add_task("val in train?", total=len(train))
        chunks = [range(start, min(start + CHUNK, len(train))) for start in range(0, len(train), CHUNK)]
        alike: dict[int, int | str] = {}
        for which, keys in zip(chunks, pool.map(lambda which: keys_of(train, which), chunks), strict=True):
            alike |= {i: key for i, key in zip(which, keys, strict=True) if key in known}
            bar.advance(task, len(which))
            stop_if_asked()
        there = set(alike.values())
        hits = sum(key in there for key in wanted if isinstance(key, str))
        theirs = [i for i, key in alike.items() if isinstance(key, int)]
        mine = [i for i, key in zip(chosen, wanted, strict=True) if isinstance(key, int) and key in there]
        bar.reset(task, total=len(theirs) + len(mine))

        def digests_of(images: ImageDataset, which: list[int]) -> Iterator[bytes | None]:
            for digest in pool.map(partial(_digest, images), which):
                bar.advance(task)
                stop_if_asked()
                yield digest

        in_train = {*digests_of(train, theirs)} - {None}
        hits += sum(digest in in_train for digest in digests_of(val, mine))
    return Overlap(hits, len(chosen), len(val))


def _digest(images: ImageDataset, index: int) -> bytes | None:
    try:
        return hashlib.sha256(images.encoded(index)).digest()
    except UnreadableImage:
        return None
