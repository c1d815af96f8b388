"""The images of a curation as features on disk: extracted here, or taken from a file or an index that has them.

Shapes: N images, D features.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from dinov2cli import distributed
from dinov2cli.console import counted, counting, logger
from dinov2cli.curate.stage import Stage
from dinov2cli.data.datasets import ImageDataset, make_dataset
from dinov2cli.data.datasets.image_list import printable
from dinov2cli.data.loaders import refuse_too_many_bad
from dinov2cli.errors import DataError, WeightsError
from dinov2cli.eval.extract import Extractor
from dinov2cli.eval.features import dataset_fingerprint
from dinov2cli.eval.images import GivenImages, check_words, dataset_of_words
from dinov2cli.eval.protocol import load_subject
from dinov2cli.files import fingerprint, writing
from dinov2cli.requests.curate import CurateRequest
from dinov2cli.search.index import Index, is_index

SAVE_SECONDS = 30.0
"""What a kill without a word costs at most."""
BLOCK = 1 << 14
"""Rows of a file of features that are read at once."""
READABLE, UNREADABLE = 1, 2
"""In `state.npy`; 0: not yet known."""
LOOKED_AT = 20


@dataclass(frozen=True)
class Collection:
    """Images and their features.

    Args:
        name: for messages.
        key: what the features depend on.
        features: float16 [N, D] of length 1, memory-mapped; zeros where an image could not be read.
        readable: bool [N].
        images: None where there are features alone.
        weights: SHA-256 of the model that made the features, where that is known.
    """

    name: str
    key: str
    features: np.ndarray
    readable: np.ndarray
    images: ImageDataset | None
    weights: str | None

    def __len__(self) -> int:
        return len(self.features)

    def path(self, row: int) -> str:
        """Of the image, as it can be printed."""
        return printable(self.images.path(row)) if self.images is not None else f"row {row}"


def extractor_of(request: CurateRequest) -> Extractor | None:
    """What makes features where images are given; None where there are features alone."""
    sets = [request.data, *((word,) for word in (*request.against, *request.like))]
    if request.model is None or all(map(holds_features, sets)):
        return None
    subject = load_subject(request.model, request.config_file)
    return subject.extractor(request, batch_size=request.batch_size, resize_ratio=request.resize_ratio)


class Stored:
    """Features that a file or an index holds."""

    def __init__(self, place: Path, images: str | None) -> None:
        self.place, self.paths = place, list[str]()
        self.weights: str | None = None
        self._blocks: Callable[[], Iterator[tuple[np.ndarray, np.ndarray]]]
        readers = {".npy": self._open_npy, ".parquet": self._open_parquet, ".safetensors": self._open_safetensors}
        open_ = self._open_index if is_index(place) else readers[place.suffix]
        try:
            open_()
        except (OSError, ValueError, TypeError, EOFError, SafetensorError) as error:
            raise DataError(f"{place}: not a file of features ({error})") from None
        self.images = self._images(images)

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Features float32 [n, D] and whether they are an image's, bool [n], block by block."""
        for block, readable in self._blocks():
            values = np.asarray(block, np.float32)
            yield values, readable & np.isfinite(values).all(1)

    def _open_npy(self) -> None:
        array = np.load(self.place, mmap_mode="r")
        self._as_array(array, np.ones(len(array), bool))

    def _as_array(self, array: np.ndarray, readable: np.ndarray) -> None:
        if array.ndim != 2 or array.dtype not in (np.float16, np.float32):
            raise DataError(f"{self.place}: {array.dtype} {list(array.shape)}; features are float16 or float32 [N, D].")
        self.shape = array.shape
        self._blocks = lambda: (
            (array[start : start + BLOCK], readable[start : start + BLOCK]) for start in range(0, len(array), BLOCK)
        )

    def _open_index(self) -> None:
        index = Index.open(self.place)
        self._as_array(index.features, index.alive)
        self.weights, self.paths = index.recipe.weights, [index.path(row) for row in range(len(index.alive))]

    def _open_safetensors(self) -> None:
        with safe_open(self.place, "pt") as file:  # whose tensors are mapped, not read
            names, metadata = set(file.keys()), file.metadata() or {}
            if "cls" not in names:
                raise DataError(f"{self.place} holds no features: it has no tensor 'cls', as dino2 embed writes it.")
            features = file.get_tensor("cls").numpy()
            readable = file.get_tensor("readable").numpy() if "readable" in names else np.ones(len(features), bool)
            if {"paths", "path_ends"} <= names:
                joined, ends = file.get_tensor("paths").numpy().tobytes(), file.get_tensor("path_ends").tolist()
                self.paths = [os.fsdecode(joined[a:b]) for a, b in zip([0, *ends], ends, strict=False)]
        self.weights = metadata.get("dino2.weights")
        self._as_array(features, readable)

    def _open_parquet(self) -> None:
        import pyarrow.parquet as pq

        file = pq.ParquetFile(self.place)
        schema = file.schema_arrow
        self.shape = (file.metadata.num_rows, schema.field("cls").type.list_size)
        self.weights = (schema.metadata or {}).get(b"dino2.weights", b"").decode() or None
        if "path" in schema.names:
            self.paths = file.read(["path"])["path"].to_pylist()
        columns = ["cls", *(["readable"] if "readable" in schema.names else [])]

        def blocks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for batch in file.iter_batches(BLOCK, columns=columns):
                rows = batch["cls"].flatten().to_numpy(zero_copy_only=False).reshape(len(batch), -1)
                there = batch["readable"].to_numpy(zero_copy_only=False) if columns[1:] else np.ones(len(batch), bool)
                yield rows, there

        self._blocks = blocks

    def _images(self, words: str | None) -> ImageDataset | None:
        if words is not None:
            images = make_dataset(words)
            if len(images) != self.shape[0]:
                raise DataError(f"--images {words}: {len(images)} images, and {self.place} has features of "
                                f"{self.shape[0]}; give those that they were made of, in their order.")  # fmt: skip
            for row in range(0, len(self.paths), max(1, len(self.paths) // 1000)):
                if printable(images.path(row)) != printable(self.paths[row]):
                    raise DataError(f"--images {words}: image {row} is {images.path(row)}, and in {self.place} it was "
                                    f"{self.paths[row]}: give the images that they were made of.")  # fmt: skip
            return images
        if self.paths and any(map(os.path.isfile, self.paths[:LOOKED_AT])):
            return GivenImages(self.paths)
        return None


def holds_features(words: Sequence[str]) -> bool:
    """Whether words name a file or an index of features, not images."""
    if len(words) != 1:
        return False
    place = Path(os.path.expanduser(words[0]))
    if place.suffix == ".parquet" and place.is_file():
        try:
            import pyarrow.parquet as pq

            return hasattr(pq.read_schema(place).field("cls").type, "list_size")
        except (ImportError, OSError, ValueError, KeyError):
            return False
    return is_index(place) or (place.suffix in (".npy", ".safetensors") and place.is_file())


def check_source(words: Sequence[str], option: str, *, has_model: bool, images: str | None = None) -> None:
    """Raise what is wrong with a set before anything is computed: no such images, or images without a model."""
    if holds_features(words):
        Stored(Path(os.path.expanduser(words[0])), images)
        return
    check_words(words)
    if not has_model:
        raise WeightsError(
            f"{option} {' '.join(words)}: images, and no model to make their features.",
            "Give --model CKPT, or features that dino2 embed has written.",
        )


def collect(words: Sequence[str], stage: Path, extract: Extractor | None, images: str | None = None) -> Collection:
    """The images, or features, that words name. Collective.

    Args:
        stage: folder for the features.
        extract: makes features of images.
        images: a dataset string for features whose file names none.

    Raises:
        DataError: no such images or features, or too many that cannot be read.
    """
    if holds_features(words):
        return _of_stored(Path(os.path.expanduser(words[0])), stage, images)
    dataset = dataset_of_words(words)
    assert extract is not None
    found = dataset_fingerprint(dataset) if distributed.is_main() else ""
    made = extract.recipe
    depends = {"weights": made.weights, "precision": made.precision, "transform": made.transform}
    work = Stage(stage, images=distributed.broadcast_object(found), **depends)
    features, state = _arrays(work, len(dataset), extract.dim)
    if not work.done:
        with distributed.same_error_everywhere():
            _extract(extract, dataset, features, state)
        distributed.barrier()
        work.finish(unreadable=int((state == UNREADABLE).sum()))
    elif distributed.is_main():
        logger.info("features of %s: from %s", dataset.describe(), stage)
    return Collection(" ".join(words), work.key, features, np.array(state == READABLE), dataset, made.weights)


def _of_stored(place: Path, stage: Path, images: str | None) -> Collection:
    stored = Stored(place, images)
    files = sorted(file for file in place.rglob("*") if file.is_file()) if place.is_dir() else [place]
    work = Stage(stage, file=fingerprint(*files), bytes=sum(file.stat().st_size for file in files))
    features, state = _arrays(work, *stored.shape)
    if not work.done:
        with distributed.same_error_everywhere():
            if distributed.is_main():
                _copy(stored, features, state)
        work.finish(unreadable=int((state == UNREADABLE).sum()))
    return Collection(str(place), work.key, features, np.array(state == READABLE), stored.images, stored.weights)


def _arrays(work: Stage, n: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """`features.npy` and `state.npy` of a stage, to be written if it is not done."""
    if distributed.is_main() and not (work / "state.npy").exists():
        with writing(work.folder):
            _empty(work / "features.npy", np.float16, (n, dim)).flush()
            _empty(work / "state.npy", np.uint8, (n,)).flush()
    distributed.barrier()
    mode: Any = "r" if work.done else "r+"
    return np.load(work / "features.npy", mmap_mode=mode), np.load(work / "state.npy", mmap_mode=mode)


def _empty(file: Path, dtype: type, shape: tuple[int, ...]) -> np.memmap:
    """Zeros on the disk. Their space is taken at once: where there is none, a mapped file would end the process."""
    array = np.lib.format.open_memmap(file, "w+", np.dtype(dtype), shape)
    if hasattr(os, "posix_fallocate") and array.nbytes:
        with file.open("r+b") as opened:
            os.posix_fallocate(opened.fileno(), 0, array.offset + array.nbytes)
    return array


def _put(features: np.ndarray, state: np.ndarray, rows: Any, values: np.ndarray) -> None:
    """Write features of images at their length 1, then that they are there."""
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    features[rows] = values / np.maximum(lengths, np.finfo(np.float32).tiny)
    state[rows] = READABLE


def _copy(stored: Stored, features: np.ndarray, state: np.ndarray) -> None:
    start = 0
    with counting("features", len(features)) as advance:
        for values, readable in stored.blocks():
            rows = start + np.flatnonzero(readable)
            _put(features, state, rows, values[readable])
            state[start : start + len(values)][~readable] = UNREADABLE
            start += len(values)
            advance(len(values))


def _extract(extract: Extractor, dataset: ImageDataset, features: np.ndarray, state: np.ndarray) -> None:
    """Features of the images that have none yet; those of this process."""
    pending = np.flatnonzero(state == 0)
    mine = np.array_split(pending, distributed.world_size())[distributed.rank()]
    if done := len(dataset) - len(pending):
        logger.info("features: %d of %s are from an interrupted run", done, counted(len(dataset), "image"))
    bad = [dataset.path(int(row)) for row in np.flatnonzero(state == UNREADABLE)]
    saved = time.monotonic()

    def save() -> None:
        features.flush()  # type: ignore[attr-defined]
        state.flush()  # type: ignore[attr-defined]

    try:
        for tensors, batch in extract.stream(dataset, torch.from_numpy(mine), "features", bad, done):
            if tensors:
                values = tensors["cls"].numpy()
                if not np.isfinite(values).all():
                    raise WeightsError("The model gives features that are not finite: its weights are damaged.")
                _put(features, state, batch.indices.numpy(), values)
            if time.monotonic() - saved > SAVE_SECONDS:
                save()
                saved = time.monotonic()
    finally:
        save()
    unread = mine[state[mine] == 0]
    state[unread] = UNREADABLE
    refuse_too_many_bad(len(unread) + len(bad), len(dataset), extract.max_bad_fraction, map(dataset.path, unread))
    save()
