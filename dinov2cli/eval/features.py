"""Features of the images of a dataset, what the evaluations learn from; and those that are kept on disk, so that an
interrupted extraction goes on, and k-NN and logistic regression on the same data extract once.

An entry is a folder named after weights, dataset and transform. Its `entry.json` tells everything that the features
depend on, and the size and checksum of each part; it is written last, so an interrupted write leaves no entry.

Shapes: N images (of this process), D features, n blocks.
"""

import hashlib
import json
import os
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dinov2cli import __version__, distributed
from dinov2cli.console import logger, stoppable
from dinov2cli.data.datasets import ImageDataset
from dinov2cli.files import digest, replacing, sha256, write_text
from dinov2cli.models.load.tensor_files import write_tensors
from dinov2cli.site import cache_folder

TENSORS = {False: ("cls",), True: ("cls", "mean_patch", "last_cls")}
"""Names of those that an `Extractor` gives, by whether they are detailed."""
SAVE_SECONDS = 60.0
"""What a kill without a word costs at most."""
_CHANGED = {
    "version": "it was written by another version of dino2",
    "dataset": "the images or labels have changed since",
    "precision": "it was computed in another precision",
}


@dataclass(frozen=True)
class Features:
    """Features of the images of this process; the processes' parts are consecutive, in rank order."""

    tensors: dict[str, Tensor]
    """`cls` float32 [N, D]; where asked for, `mean_patch` [N, D] (of the last block, normalised tokens) and `last_cls`
    [N, n, D] (class tokens of the last n blocks, earliest first, normalised)."""
    targets: Tensor
    """int64 [N], -1 where an image has no class."""
    indices: Tensor
    """int64 [N], ascending positions in the dataset; what is missing could not be read."""
    size: int
    """Images of all processes together."""

    @property
    def cls(self) -> Tensor:
        """The normalised class token of the last block: float32 [N, D]."""
        return self.tensors["cls"]

    def positions(self) -> Tensor:
        """Positions in the dataset of the images of all processes, int64 [size]. Collective."""
        return distributed.all_gather_rows(self.indices)

    def with_classes(self, mapping: Tensor | None) -> "Features":
        """The same features with class `mapping[c]` in place of class c, -1 left as it is; None leaves all."""
        if mapping is None:
            return self
        return replace(self, targets=torch.where(self.targets < 0, self.targets, mapping[self.targets.clamp(min=0)]))


@dataclass(frozen=True)
class Recipe:
    """What features depend on, beside the images: the key of a cached entry."""

    weights: str
    """SHA-256 of the model."""
    precision: str
    """dtype of the matrix products."""
    transform: str
    """Sizes in pixels, in words."""
    names: tuple[str, ...]
    """Of the tensors."""

    def in_words(self) -> str:
        """How images become these tensors."""
        return f"{self.transform}: {', '.join(self.names)}"


def part_of_this_process(size: int) -> Tensor:
    """The consecutive positions of `size` images that fall to this process, int64."""
    return torch.arange(size).tensor_split(distributed.world_size())[distributed.rank()]


class FeatureCache:
    """Features by weights, dataset, transform, precision and library version.

    Args:
        folder: where entries live; None for `features` of the cache folder.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or cache_folder("features")
        self._fingerprints: WeakKeyDictionary[ImageDataset, str] = WeakKeyDictionary()

    def load(self, recipe: Recipe, dataset: ImageDataset) -> Features | None:
        """This process's part of an entry, or None where there is none that still holds; then the log says why.

        Class tokens alone are also taken from an entry that holds more.
        """
        whole = [replace(recipe, names=TENSORS[True])] if recipe.names == TENSORS[False] else []
        told = ""
        for kept in (recipe, *whole):
            entry, identity = self._entry(kept, dataset), self._identity(kept, dataset)
            reason = _why_not(entry, identity) if distributed.is_main() else None
            reason = distributed.broadcast_object(reason)
            if reason is None:
                logger.info("features of %s: from the cache (%s)", dataset.describe(), entry)
                return _read(entry, len(dataset), recipe.names)
            if reason and reason != told:
                logger.warning("cached features of %s not used: %s", dataset.describe(), reason)
            told = reason or told
        return None

    @stoppable("stopping once the features are in the cache")
    def save(self, recipe: Recipe, dataset: ImageDataset, features: Features) -> None:
        """Keep `features`; a disk that is full or read-only costs the cache, not the evaluation."""
        entry, identity = self._entry(recipe, dataset), self._identity(recipe, dataset)
        part = entry / f"part-{distributed.rank():05d}-of-{distributed.world_size():05d}.safetensors"
        tensors = {**features.tensors, "targets": features.targets, "indices": features.indices}
        try:
            if distributed.is_main():
                shutil.rmtree(entry, ignore_errors=True)
                entry.mkdir(parents=True)
            distributed.barrier()
            write_tensors(tensors, part)
            problem, facts = "", [part.name, part.stat().st_size, sha256(part)]
        except (OSError, SafetensorError) as error:
            problem, facts = str(error), []
        shutil.rmtree(_place_of_unfinished(entry), ignore_errors=True)
        problems = [text for text in distributed.all_gather_objects(problem) if text]
        parts = distributed.all_gather_objects(facts)
        if problems and distributed.is_main():
            logger.warning("features not cached in %s: %s", self.folder, problems[0])
        elif distributed.is_main():
            write_text(entry / "entry.json", json.dumps({**identity, "parts": parts}, indent=1))

    def unfinished(self, recipe: Recipe, dataset: ImageDataset) -> "Gathered":
        """What this process had extracted when it was interrupted, to go on from; empty where there is nothing."""
        return Gathered(_place_of_unfinished(self._entry(recipe, dataset)), self._identity(recipe, dataset))

    def _entry(self, recipe: Recipe, dataset: ImageDataset) -> Path:
        name = json.dumps([recipe.weights, dataset.describe(), recipe.in_words()])
        return self.folder / digest(name)[:24]

    def _identity(self, recipe: Recipe, dataset: ImageDataset) -> dict[str, Any]:
        """What an entry has to say to hold. Collective.

        The dataset is looked at once, and before its images are read: they may change meanwhile.
        """
        if dataset not in self._fingerprints:
            found = dataset_fingerprint(dataset) if distributed.is_main() else ""
            self._fingerprints[dataset] = distributed.broadcast_object(found)
        return {
            "version": __version__,
            "weights": recipe.weights,
            "dataset": self._fingerprints[dataset],
            "precision": recipe.precision,
            "transform": recipe.in_words(),
            "of": dataset.describe(),
        }


def _place_of_unfinished(entry: Path) -> Path:
    return entry.with_name(f"{entry.name}.{distributed.rank()}-of-{distributed.world_size()}.unfinished")


def dataset_fingerprint(dataset: ImageDataset) -> str:
    """SHA-256 over labels, paths, and sizes and times of change of the files that hold the images."""
    what = f"{dataset.describe()} {len(dataset)} {tuple(dataset.class_names)}"
    found = hashlib.sha256(os.fsencode(what))
    found.update(torch.as_tensor(dataset.targets()).contiguous().numpy().data)
    for i in range(len(dataset)):
        path = dataset.path(i)
        found.update(os.fsencode(path))
        try:
            status = os.stat(dataset.container(i))
        except OSError:
            continue  # an image that is made: its label and name are all there is
        found.update(f" {status.st_size} {status.st_mtime_ns}".encode())
    return found.hexdigest()


def _why_not(entry: Path, identity: dict[str, Any]) -> str | None:
    """None if the entry holds, '' if there is none, else what is wrong with it."""
    try:
        stored = json.loads((entry / "entry.json").read_text())
        parts = stored["parts"]
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"it is damaged ({error})"
    for key, reason in _CHANGED.items():
        if stored.get(key) != identity[key]:
            return reason
    for name, size, checksum in parts:
        part = entry / name
        if not part.is_file() or part.stat().st_size != size or sha256(part) != checksum:
            return f"it is damaged ({part})"
    return None


def _read(entry: Path, size: int, names: tuple[str, ...]) -> Features:
    """The rows of this process, whatever the number of processes that wrote them."""
    mine = part_of_this_process(size)
    rows: dict[str, list[Tensor]] = {name: [] for name in (*names, "targets", "indices")}
    for part in sorted(entry.glob("part-*.safetensors")):
        with safe_open(part, "pt") as file:
            indices = file.get_tensor("indices")
            low, high = (int(torch.searchsorted(indices, edge)) for edge in (mine[0], mine[-1] + 1))
            if low < high:
                for name, parts in rows.items():
                    parts.append(file.get_slice(name)[low:high])
    return _joined(rows)


def _joined(rows: dict[str, list[Tensor]]) -> Features:
    """Features, `targets` and `indices` that lie in parts, of the images of this process. Collective."""
    tensors = {name: torch.cat(parts) for name, parts in rows.items()}
    targets, indices = tensors.pop("targets"), tensors.pop("indices")
    return Features(tensors, targets, indices, int(distributed.all_reduce_sum(torch.tensor(len(indices)))))


class Gathered:
    """The features of this process's images so far, in their order.

    Args:
        folder: where they are kept until all are there; None to keep nothing. What it holds already is taken over, if
            it is of the same `identity`.
        identity: all that the features depend on.

    Attributes:
        done: images of this process that are done, those included that could not be read.
        bad: what was said of these.
    """

    def __init__(self, folder: Path | None = None, identity: dict[str, Any] | None = None) -> None:
        self.folder = folder
        self.done = 0
        self.bad: list[str] = []
        self._rows: list[dict[str, Tensor]] = []
        self._identity = json.loads(json.dumps(identity))
        self._on_disk = 0  # of these rows
        self._saved_at = time.monotonic()
        if folder is not None:
            self._recall(folder)

    def append(self, tensors: dict[str, Tensor], targets: Tensor, indices: Tensor, bad: list[str]) -> None:
        """Add a batch: of its readable images the features [B, ...], classes and positions; what was said of others."""
        if len(indices):
            self._rows.append({**tensors, "targets": targets, "indices": indices})
        self.bad += bad
        self.done += len(indices) + len(bad)
        if time.monotonic() - self._saved_at > SAVE_SECONDS:
            self.save()

    def features(self) -> Features:
        """All of them. Collective."""
        return _joined({name: [rows[name] for rows in self._rows] for name in self._rows[0]})

    def save(self) -> None:
        """Write what is new. A disk that is full or read-only costs no more than the keeping."""
        new, self._saved_at = self._rows[self._on_disk :], time.monotonic()
        if self.folder is None or not new:
            return
        part = self.folder / f"{len(list(self.folder.glob('*.safetensors'))):06d}.safetensors"
        said = {"done": str(self.done), "bad": json.dumps(self.bad)}
        try:
            if not part.parent.is_dir():
                write_text(self.folder / "identity.json", json.dumps(self._identity))
            with replacing(part, flush=True) as aside:
                write_tensors({name: torch.cat([rows[name] for rows in new]) for name in new[0]}, aside, said)
        except (OSError, SafetensorError) as error:
            logger.warning("%s: what is done is not kept for an interruption: %s", self.folder, error)
            self.folder = None
        else:
            self._on_disk = len(self._rows)

    def remove(self) -> None:
        """Delete what is kept."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _recall(self, folder: Path) -> None:
        try:
            if json.loads((folder / "identity.json").read_text()) != self._identity:
                raise ValueError("of other images or another model")
            for part in sorted(folder.glob("*.safetensors")):
                with safe_open(part, "pt") as file:
                    self._rows.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (no dict)
                    self.done, self.bad = int(file.metadata()["done"]), json.loads(file.metadata()["bad"])
            self._on_disk = len(self._rows)
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, SafetensorError):
            shutil.rmtree(folder, ignore_errors=True)
            self.done, self.bad, self._rows = 0, [], []
