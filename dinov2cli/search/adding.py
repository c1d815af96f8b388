"""What is added to an index: which images of a dataset are new or have changed, and their features."""

import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from dinov2cli.console import Interrupted, counted, counting, logger
from dinov2cli.data.datasets import ImageDataset, check_dataset, make_dataset
from dinov2cli.data.datasets.recognise import is_dataset_file
from dinov2cli.errors import WeightsError
from dinov2cli.eval.extract import Extractor
from dinov2cli.eval.images import GivenImages
from dinov2cli.search.index import COMPACT_ABOVE, IMAGE, Index

COMMIT_ROWS, COMMIT_SECONDS = 8192, 30.0
"""Images, or time, after which features are on the disk and count: what a kill costs at most."""
FILES = "files"
"""The source of images that were named one by one."""


class Changed(NamedTuple):
    """What was done to an index: images added, replaced as their files had changed, passed over as they were there,
    unreadable; of the datasets' earlier images those that are gone; taken out; and how many there are now."""

    folder: str
    images: int
    added: int = 0
    replaced: int = 0
    there: int = 0
    unreadable: int = 0
    gone: int = 0
    removed: int = 0

    def __str__(self) -> str:
        words = {"added": "added", "replaced": "replaced, as their files have changed", "there": "there already",
                 "unreadable": "unreadable and left out", "gone": "no longer in the dataset but still in the index",
                 "removed": "removed"}  # fmt: skip
        done = [f"{number} {said}" for name, said in words.items() if (number := getattr(self, name))]
        hint = f"\nTo take out what is gone: dino2 search remove {self.folder} --missing" if self.gone else ""
        return f"{self.folder}: {', '.join(done) or 'nothing new'}; {counted(self.images, 'image')} now{hint}"


def add_all(index: Index, extract: Extractor, words: Sequence[str]) -> Changed:
    """Add what words name to an index that is locked."""
    counts: Counter[str] = Counter()
    for source, dataset in datasets_of(words):
        index = index.with_source(source)
        names, entries = entries_of(dataset, index.contents.sources.index(source))
        known = index.rows
        rows = np.array([known.get(name, -1) for name in names])
        there = rows >= 0
        changed = there.copy()
        changed[there] = _differ(index.images[rows[there]], entries[there])
        first = dict(zip(reversed(names), reversed(range(len(names))), strict=True))
        again = np.array([first[name] for name in names]) != np.arange(len(names))  # one that is named twice
        wanted = np.flatnonzero((~there | changed) & ~again)
        could_before = there.copy()
        could_before[there] = index.images["readable"][rows[there]]
        index, could_be_read = _add(index, extract, dataset, Wanted(wanted, names, entries, rows))
        replaced, left = (changed & could_before)[wanted], could_before[there & ~changed]
        counts["added"] += int((could_be_read & ~replaced).sum())
        counts["replaced"] += int((could_be_read & replaced).sum())
        counts["there"] += int(left.sum()) + int((again & (~there | changed)).sum())
        counts["unreadable"] += int((~could_be_read).sum() + (~left).sum())
        if source != FILES:
            of_it = np.flatnonzero((index.images["source"] == index.contents.sources.index(source)) & ~index.removed)
            counts["gone"] += len({index.path(row) for row in of_it.tolist()} - set(names))
    return Changed(str(index.folder), len(compacted(index)), **counts)


class Wanted(NamedTuple):
    """What is to be added of a dataset: positions int64, ascending; of all its images the names, the `IMAGE` records,
    and the rows that they have so far, -1 for none."""

    positions: np.ndarray
    names: list[str]
    entries: np.ndarray
    rows: np.ndarray


def _add(index: Index, extract: Extractor, dataset: ImageDataset, wanted: Wanted) -> tuple[Index, np.ndarray]:
    """The index with these images, and which of them could be read: bool [n].

    What is done is on the disk after `COMMIT_ROWS` images or `COMMIT_SECONDS`, and when this is interrupted.
    """
    readable = np.zeros(len(wanted.positions), bool)
    features = np.zeros((COMMIT_ROWS + extract.batch_size, index.contents.dim), np.float32)
    again = set(wanted.rows[wanted.positions].tolist())
    bad = [name for name, row in zip(wanted.names, wanted.rows.tolist(), strict=True)
           if row >= 0 and not index.images["readable"][row] and row not in again]  # fmt: skip
    done = waiting = 0
    committed_at = time.monotonic()

    def commit(index: Index) -> Index:
        which = slice(done, done + waiting)
        positions = wanted.positions[which]
        entries = wanted.entries[positions]
        entries["readable"] = readable[which]
        stored = features[:waiting].astype(index.contents.dtype)
        if not np.isfinite(stored).all():
            raise WeightsError(
                "The model gives features that are not finite: its weights are damaged or diverged"
                + (", or too large for --dtype float16." if np.isfinite(features[:waiting]).all() else ".")
            )
        before = wanted.rows[positions]
        paths = [wanted.names[i] for i in positions.tolist()]
        return index.with_images(stored, entries, paths, before[before >= 0].tolist())

    try:
        for tensors, batch in extract.stream(dataset, torch.from_numpy(wanted.positions), "features", bad):
            size = len(batch.indices) + len(batch.bad)
            at = np.searchsorted(wanted.positions, batch.indices.numpy())
            readable[at] = True
            features[waiting : waiting + size] = 0
            if tensors:
                features[at - done] = tensors["cls"].numpy()
            waiting += size
            if waiting >= COMMIT_ROWS or time.monotonic() - committed_at > COMMIT_SECONDS:
                index = commit(index)
                done, waiting, committed_at = done + waiting, 0, time.monotonic()
    except BaseException as error:  # interrupted, or too many unreadable images: what is done counts
        if waiting:
            commit(index)
        if isinstance(error, Interrupted):
            done = done + waiting
            logger.info("%d of %d images are in the index: the same command goes on from there", done, len(readable))
        raise
    return commit(index) if waiting else index, readable


def compacted(index: Index) -> Index:
    """The index, its removed rows dropped from the files where they are many."""
    if not index.removed.sum() > COMPACT_ABOVE * len(index.removed):
        return index
    with counting("dropping what is removed", int(np.count_nonzero(~index.removed))) as tell:
        return index.compacted(tell)


def datasets_of(words: Sequence[str]) -> Iterator[tuple[str, ImageDataset]]:
    """The datasets that words name, each with the string by which it can be made again anywhere; the image files among
    them are one, whose string is `FILES`.

    Raises:
        DataError: no such dataset.
    """
    files = [path for word in words if _is_image(path := os.path.expanduser(word))]
    if files:
        yield FILES, GivenImages(files)
    for word in words:
        path = os.path.expanduser(word)
        if path not in files:
            yield os.path.abspath(path) if os.path.exists(path) else word, make_dataset(word)


def check_words(words: Sequence[str]) -> None:
    """Raise what `datasets_of` would, as far as nothing has to be listed for it."""
    for word in words:
        if not _is_image(os.path.expanduser(word)):
            check_dataset(word)


def _is_image(path: str) -> bool:
    return os.path.isfile(path) and not is_dataset_file(path)


def entries_of(dataset: ImageDataset, source: int) -> tuple[list[str], np.ndarray]:
    """Of each image of a dataset its name, an absolute path where it is a file or lies in one, and its `IMAGE`."""
    names, entries = [], np.zeros(len(dataset), IMAGE)
    entries["source"], entries["position"], entries["bytes"] = source, np.arange(len(dataset)), -1
    for i in range(len(dataset)):
        path, file = dataset.path(i), dataset.container(i)
        try:
            status = os.stat(file)
        except OSError:  # an image that is made, or one that is gone by now
            names.append(path)
            continue
        entries["bytes"][i], entries["changed"][i] = status.st_size, status.st_mtime_ns
        names.append(os.path.abspath(file) + path.removeprefix(file) if path.startswith(file) else path)
    return names, entries


def _differ(stored: np.ndarray, now: np.ndarray) -> np.ndarray:
    """Which `IMAGE` records [n] are of files that have changed: bool [n]."""
    differ: np.ndarray = (stored["bytes"] != now["bytes"]) | (stored["changed"] != now["changed"])
    return differ
