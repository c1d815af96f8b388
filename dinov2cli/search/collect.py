"""Indexes that grow and shrink: `dino2 search build`, `add`, `remove`, `info`."""

import fnmatch
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dinov2cli.console import counted, logger, progress, stoppable
from dinov2cli.data.datasets import ImageDataset, check_dataset, make_dataset
from dinov2cli.data.datasets.recognise import is_dataset_file
from dinov2cli.device import choose_device
from dinov2cli.errors import DataError, EnvironmentProblem, WeightsError, check_all
from dinov2cli.eval.embed import printable
from dinov2cli.eval.extract import Extractor
from dinov2cli.eval.images import GivenImages
from dinov2cli.eval.subject import load_subject
from dinov2cli.files import check_folder
from dinov2cli.models.load.locate import check_there
from dinov2cli.requests.search import (
    SearchAddRequest,
    SearchBuildRequest,
    SearchInfoRequest,
    SearchQueryRequest,
    SearchRemoveRequest,
)
from dinov2cli.search.index import COMPACT_ABOVE, IMAGE, Index, Recipe, create, is_index, locked

COMMIT_ROWS, COMMIT_SECONDS = 8192, 30.0
"""Images, or time, after which features are on the disk and count: what a kill costs at most."""
FILES = "files"
"""The source of images that were named one by one."""
OPTIONS = ("image_size", "resize_ratio", "value_range", "background", "no_exif_orientation", "max_image_gb")
"""Of a request to build: what decides how images become features."""


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


class Info(NamedTuple):
    """What an index holds; `bytes` on the disk, `removed` rows are still there, `sources` with their images."""

    folder: str
    images: int
    removed: int
    unreadable: int
    dim: int
    dtype: str
    bytes: int
    model: str
    weights: str
    transform: str
    precision: str
    sources: dict[str, int]
    version: str

    def __str__(self) -> str:
        values = {**self._asdict(), "bytes": f"{self.bytes / 2**20:.1f} MiB"}
        values["sources"] = "\n             ".join(f"{name}: {n}" for name, n in self.sources.items()) or "none"
        return "\n".join(f"{name:<12} {value}" for name, value in values.items())


def build(request: SearchBuildRequest) -> Changed:
    """Make an index, or go on with one of the same model and preparation.

    Raises:
        Dino2Error: weights or data that cannot be read; another index is there; it is being changed.
    """
    folder = request.index
    check_all(
        lambda: check_words(request.data),
        lambda: check_there(request.model),
        lambda: check_place(folder),
        lambda: choose_device(request.device),
    )
    extract, recipe = extractor_of(request)
    with locked(folder):
        if is_index(folder):
            index = Index.open(folder)
            index.recipe.check(recipe, request.model, folder)
        else:
            index = create(folder, recipe, int(extract.model.config.embed_dim), request.dtype)  # type: ignore
        return add_all(index, extract, request.data)


def add(request: SearchAddRequest) -> Changed:
    """Add images to an index.

    Raises:
        Dino2Error: as in `build`; the weights have changed.
    """
    check_all(lambda: check_words(request.data), lambda: choose_device(request.device))
    index = Index.open(request.index)
    extract = extractor_for(index, request)
    with locked(request.index):
        return add_all(Index.open(request.index), extract, request.data)


def remove(request: SearchRemoveRequest) -> Changed:
    """Take images out of an index.

    Raises:
        DataError: no such index, or nothing in it that is named so; then nothing is removed.
    """
    with locked(request.index):
        index = Index.open(request.index)
        chosen = np.zeros(len(index.removed), bool)
        rows = index.rows
        for word in request.which:
            found = named(word, index, rows)
            if not found:
                known = ", ".join(index.contents.sources[:5])
                raise DataError(f"{request.index} has no image {word}", f"It was made of: {known}" if known else None)
            chosen[found] = True
        if request.missing:
            chosen[missing(index, rows)] = True
        removed = int(chosen.sum())
        if removed:
            index = compacted(index.without(np.flatnonzero(chosen).tolist()))
    return Changed(str(request.index), len(index), removed=removed)


def info(request: SearchInfoRequest) -> Info:
    """What an index holds. Raises DataError where there is none."""
    index = Index.open(request.index)
    contents, recipe = index.contents, index.recipe
    counts = np.bincount(index.images["source"][index.alive], minlength=len(contents.sources)).tolist()
    return Info(
        folder=str(request.index),
        images=len(index),
        removed=int(index.removed.sum()),
        unreadable=int((~index.removed & ~index.images["readable"]).sum()),
        dim=contents.dim,
        dtype=contents.dtype,
        bytes=sum(file.stat().st_size for file in index.folder.rglob("*") if file.is_file()),
        model=recipe.model,
        weights=recipe.weights,
        transform=recipe.transform,
        precision=recipe.precision,
        sources=dict(zip(map(printable, contents.sources), counts, strict=True)),
        version=contents.version,
    )


def check_place(folder: Path) -> None:
    """Raise, before anything is read, where no index can be made: a file, or a folder that holds other things."""
    check_folder(folder, "INDEX")
    if folder.is_dir() and not is_index(folder):
        others = [each for each in os.listdir(folder) if each != "index.lock" and not each.startswith((".", "data-"))]
        if others:
            raise EnvironmentProblem(f"{folder} is a folder of other things, such as {others[0]}; name a new one.")


def extractor_of(request: SearchBuildRequest) -> tuple[Extractor, Recipe]:
    """What makes features as a request says, and its record; the weights file itself is remembered, not the run, whose
    newest changes."""
    subject = load_subject(request.model, request.config_file)
    extract = subject.extractor(request, batch_size=request.batch_size, resize_ratio=request.resize_ratio)
    known = str(subject.weights.absolute() if subject.run else request.model)
    if os.path.exists(os.path.expanduser(known)):
        known = os.path.abspath(os.path.expanduser(known))
    given = {name: getattr(request, name) for name in OPTIONS if getattr(request, name) is not None}
    made, config = extract.recipe, request.config_file
    return extract, Recipe(
        known, str(config.absolute()) if config else None, made.weights, made.transform, made.precision, given
    )


def extractor_for(index: Index, request: SearchAddRequest | SearchQueryRequest) -> Extractor:
    """What makes features that can be compared with those of an index.

    Raises:
        WeightsError: its weights are gone.
        DataError: they have changed.
    """
    recipe = index.recipe
    file = recipe.config_file and Path(recipe.config_file)
    how: dict[str, Any] = {"index": index.folder, "data": (), **recipe.options}
    how |= {name: getattr(request, name) for name in ("batch_size", "num_workers", "device")}
    how["max_bad_fraction"] = getattr(request, "max_bad_fraction", None)
    model = request.model or recipe.model
    try:
        extract, made = extractor_of(SearchBuildRequest(model=model, config_file=file or None, **how))
    except WeightsError as error:
        if request.model:
            raise
        raise WeightsError(
            f"the weights of the index {index.folder} cannot be had: {error.message}", "Say where they are: --model."
        ) from None
    recipe.check(made, model, index.folder)
    if made.precision != recipe.precision:
        logger.warning("%s was computed in %s, here it is %s", index.folder, recipe.precision, made.precision)
    return extract


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
    finally:  # also of what is interrupted, or has too many unreadable images
        if waiting:
            index = commit(index)
    return index, readable


def compacted(index: Index) -> Index:
    """The index, its removed rows dropped from the files where they are many."""
    if not index.removed.sum() > COMPACT_ABOVE * len(index.removed):
        return index
    with progress() as bar, stoppable() as stop_if_asked:
        task = bar.add_task("dropping what is removed", total=None)

        def tell(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            stop_if_asked()

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


def named(word: str, index: Index, rows: dict[str, int]) -> list[int]:
    """The rows of an image, of all below a folder, of all that match a pattern, or of a dataset."""
    path = os.path.abspath(os.path.expanduser(word))
    if path in rows or word in rows:
        return [rows[path if path in rows else word]]
    sources = [number for number, source in enumerate(index.contents.sources) if source in (path, word)]
    found = [row for row in rows.values() if index.images["source"][row] in sources]
    below = os.path.join(path, "")
    found += [row for name, row in rows.items() if name.startswith((below, f"{path}:"))]
    if not found and re.search(r"[*?\[]", word):
        matches = re.compile(fnmatch.translate(word if word.startswith("*") else path)).match
        found = [row for name, row in rows.items() if matches(name)]
    return found


def missing(index: Index, rows: dict[str, int]) -> list[int]:
    """The rows of images whose file is no longer there."""
    # An image that is made has no file, and so no size.
    return [row for name, row in rows.items() if index.images["bytes"][row] >= 0 and not os.path.exists(_file(name))]


def _file(name: str) -> str:
    """The file that holds an image: of `shard.tar:name` or `arrays.h5::path[3]` what stands before."""
    if os.path.exists(name):
        return name
    before = name
    while ":" in before and not os.path.exists(before):
        before = before.rpartition(":")[0]
    return before if os.path.exists(before) else name


def _differ(stored: np.ndarray, now: np.ndarray) -> np.ndarray:
    """Which `IMAGE` records [n] are of files that have changed: bool [n]."""
    differ: np.ndarray = (stored["bytes"] != now["bytes"]) | (stored["changed"] != now["changed"])
    return differ
