"""`dino2 search query`: the images of an index that are most alike to others."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dinov2cli.console import counting, logger
from dinov2cli.data.datasets import ImageDataset, UnreadableImage, make_dataset
from dinov2cli.data.decoding import read_image
from dinov2cli.device import choose_device
from dinov2cli.errors import DataError, Dino2Error, check_all
from dinov2cli.eval.embed import printable
from dinov2cli.files import user_path
from dinov2cli.requests.search import SearchQueryRequest
from dinov2cli.search.adding import FILES, check_words, datasets_of, entries_of
from dinov2cli.search.collect import extractor_for
from dinov2cli.search.index import Index, is_index
from dinov2cli.search.neighbours import Approximation, Found, check_faiss, neighbours
from dinov2cli.search.sheet import MOST, Line, Shown, check_sheet, write_sheet

Look = Callable[[], np.ndarray | None]
"""Gives an image's pixels, uint8 [H, W, 3], or None where it cannot be read any more."""


@dataclass(frozen=True)
class Queries:
    """Names, features [Q, D] and pictures of what is looked for; the names of what could not be read."""

    names: list[str]
    features: np.ndarray
    looks: list[Look]
    unreadable: list[str]


@dataclass(frozen=True)
class Ranking:
    """For each query the images that were found, best first."""

    index: Index
    queries: Queries
    found: Found

    def results(self, query: int) -> list[tuple[int, float]]:
        """(row, cosine) of what was found for a query."""
        pairs = zip(self.found.rows[query].tolist(), self.found.scores[query].tolist(), strict=True)
        return [(row, score) for row, score in pairs if row >= 0]

    def as_dict(self) -> dict[str, Any]:
        found = [
            {
                "query": printable(name),
                "results": [
                    {"path": printable(self.index.path(row)), "score": round(score, 6)}
                    for row, score in self.results(i)
                ],
            }
            for i, name in enumerate(self.queries.names)
        ]
        unreadable = list(map(printable, self.queries.unreadable))
        return {"index": str(self.index.folder), "queries": found, "unreadable": unreadable}

    def __str__(self) -> str:
        lines = []
        for i, name in enumerate(self.queries.names):
            lines.append(printable(name))
            for rank, (row, score) in enumerate(self.results(i), start=1):
                lines.append(f"{rank:5d}  {score:.4f}  {printable(self.index.path(row))}")
        return "\n".join(lines)


def run(request: SearchQueryRequest) -> Ranking:
    """Search an index, and draw what was found where a sheet is asked for.

    Raises:
        Dino2Error: no such index or queries, other weights, a sheet that cannot be written, faiss is not installed.
    """
    other = user_path(request.query[0])
    by_index = len(request.query) == 1 and is_index(other)
    check_all(
        lambda: check_words(() if by_index else request.query),
        lambda: choose_device(request.device),
        lambda: check_sheet(request.sheet),
        lambda: check_faiss(request.faiss),
    )
    index = Index.open(request.index)
    if not len(index):
        raise DataError(f"{request.index} has no images.", f"Add some: dino2 search add {request.index} --data FOLDER")
    queries = _of_index(Index.open(other), index) if by_index else _of_images(request, index)
    ranking = Ranking(index, queries, search(index, queries, request))
    if request.sheet is not None:
        _draw(ranking, request.sheet)
    return ranking


def search(index: Index, queries: Queries, request: SearchQueryRequest) -> Found:
    """What is most alike in an index, as the request says."""
    exclude = None
    if request.not_itself:
        exclude = np.array([index.rows.get(name, -1) for name in queries.names], np.int64)
    how: dict[str, Any] = {"alive": index.alive, "exclude": exclude}
    if request.faiss is None:
        with counting("comparing", len(queries.features) * len(index.features)) as tell:
            return neighbours(index.features, queries.features, request.top, **how, progress=tell)
    with counting(f"faiss {request.faiss}", len(index.features)) as tell:
        file = index.folder / index.contents.data / f"faiss-{request.faiss}.index"
        approximation = Approximation(index.features, request.faiss, file, tell)
    how |= {"nprobe": request.nprobe, "ef_search": request.ef_search}
    with counting("searching", len(queries.features)) as tell:
        top = min(request.top, max(1, len(index) - request.not_itself))
        return approximation.search(queries.features, top, **how, progress=tell)


def _of_index(other: Index, index: Index) -> Queries:
    index.recipe.check(other.recipe, str(other.folder), index.folder)
    rows, pictures = np.flatnonzero(other.alive), Pictures(other)
    looks: list[Look] = [lambda row=row: pictures.of(row) for row in rows.tolist()]  # type: ignore[misc]
    features = other.features if len(rows) == len(other.features) else other.features[rows]
    return Queries([other.path(row) for row in rows.tolist()], features, looks, [])


def _of_images(request: SearchQueryRequest, index: Index) -> Queries:
    extract = extractor_for(index, request)
    names: list[str] = []
    looks: list[Look] = []
    unreadable: list[str] = []
    features = []
    for source, dataset in datasets_of(request.query):
        of_files = source == FILES
        if of_files:
            extract.max_bad_fraction = 1.0  # each was named, and is named again where it cannot be read
        known, _ = entries_of(dataset, 0)
        found = extract(dataset, "queries")
        features.append(found.cls.numpy())
        for i in found.indices.tolist():
            names.append(known[i])
            looks.append(lambda dataset=dataset, i=i: _pixels(lambda: dataset.image(i)))  # type: ignore[misc]
        read = set(found.indices.tolist())
        unreadable += [name for i, name in enumerate(known) if i not in read]
    return Queries(names, np.concatenate(features), looks, unreadable)


class Pictures:
    """The images of an index, for people to look at."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self._datasets: dict[str, ImageDataset | None] = {}

    def of(self, row: int) -> np.ndarray | None:
        """uint8 [H, W, 3], or None where the image is gone, damaged, or has other channels than a colour picture."""
        path = self.index.path(row)
        if Path(path).is_file():
            return _pixels(lambda: read_image(Path(path)))
        source, position = self.index.source(row), int(self.index.images["position"][row])
        if source not in self._datasets:
            try:
                self._datasets[source] = None if source == FILES else make_dataset(source)
            except Dino2Error:
                self._datasets[source] = None
        dataset = self._datasets[source]
        if dataset is None or position >= len(dataset) or not path.endswith(Path(dataset.path(position)).name):
            return None
        return _pixels(lambda: dataset.image(position))


def _pixels(read: Callable[[], np.ndarray]) -> np.ndarray | None:
    try:
        pixels = read()
    except UnreadableImage:
        return None
    if pixels.dtype != np.uint8:
        pixels = (pixels * 255 + 0.5).astype(np.uint8)
    return pixels if pixels.ndim == 3 and pixels.shape[2] == 3 else None


def _draw(ranking: Ranking, file: Path) -> None:
    names, pictures = ranking.queries.names, Pictures(ranking.index)
    most = MOST[file.suffix.lower()]
    if len(names) > most:
        logger.warning("%s shows the first %d of %d queries", file, most, len(names))

    def lines() -> Iterator[Line]:
        for i in range(min(most, len(names))):
            found = [Shown(ranking.index.path(row), pictures.of(row), score) for row, score in ranking.results(i)]
            yield Line(Shown(names[i], ranking.queries.looks[i]()), found)

    write_sheet(file, lines(), f"{ranking.index.folder}: {len(ranking.index)} images")
    logger.info("%s: drawn", file)
