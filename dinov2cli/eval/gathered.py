"""Features while they are extracted: what an interrupted extraction had done is kept, and the next one goes on."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dinov2cli import distributed
from dinov2cli.console import logger
from dinov2cli.eval.features import Features
from dinov2cli.files import replacing, write_text
from dinov2cli.models.load.tensor_files import write_tensors

SAVE_SECONDS = 60.0
"""What a kill without a word costs at most."""


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
        columns = {name: torch.cat([rows[name] for rows in self._rows]) for name in self._rows[0]}
        targets, indices = columns.pop("targets"), columns.pop("indices")
        size = int(distributed.all_reduce_sum(torch.tensor(len(indices))))
        return Features(columns, targets, indices, size)

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
