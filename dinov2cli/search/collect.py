"""Indexes that grow and shrink: `dino2 search build`, `add`, `remove`, `info`."""

import fnmatch
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from dinov2cli.console import logger
from dinov2cli.device import choose_device
from dinov2cli.errors import DataError, EnvironmentProblem, WeightsError, check_all
from dinov2cli.eval.embed import printable
from dinov2cli.eval.extract import Extractor
from dinov2cli.eval.protocol import load_subject
from dinov2cli.files import check_folder
from dinov2cli.models.load.locate import check_there
from dinov2cli.requests.search import (
    SearchAddRequest,
    SearchBuildRequest,
    SearchInfoRequest,
    SearchQueryRequest,
    SearchRemoveRequest,
)
from dinov2cli.search.adding import Changed, add_all, check_words, compacted
from dinov2cli.search.index import Index, Recipe, create, is_index, locked

OPTIONS = ("image_size", "resize_ratio", "value_range", "background", "no_exif_orientation", "max_image_gb")
"""Of a request to build: what decides how images become features."""


class Info(dict[str, Any]):
    """What an index holds; `bytes` on the disk, `removed` rows are still there, `sources` with their images."""

    def __str__(self) -> str:
        sources = "\n             ".join(f"{name}: {n}" for name, n in self["sources"].items()) or "none"
        values = {**self, "bytes": f"{self['bytes'] / 2**20:.1f} MiB", "sources": sources}
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
            index = create(folder, recipe, extract.dim, request.dtype)
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
