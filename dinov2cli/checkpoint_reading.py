"""Reading the files of a checkpoint without executing what is in them.

PyTorch's reader of distributed checkpoints unpickles its index and every value that is no tensor, and a pickle may call
anything. Here both are looked at first, by readers that know data alone.
"""

import dataclasses
import enum
import io
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem

RECORDS = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
"""Modules whose dataclasses and enumerations an index is made of."""
OTHERS = {("torch", "Size"), ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath"),
          ("pathlib", "WindowsPath"), ("pathlib", "PurePosixPath"), ("collections", "OrderedDict")}  # fmt: skip


def load_safely(state: dict[str, Any], checkpoint_id: Path, **more: Any) -> None:
    """`dcp.load`, into the tensors of `state`; pickle.UnpicklingError where it holds more than data."""
    dcp.load(state, storage_reader=_SafeReader(checkpoint_id), planner=_SafePlanner(), **more)


class _DataAlone(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in RECORDS or (module, name) in OTHERS or module == "torch":
            found = super().find_class(module, name)
            is_record = isinstance(found, type) and (dataclasses.is_dataclass(found) or issubclass(found, enum.Enum))
            if (module, name) in OTHERS or isinstance(found, torch.dtype) or (module in RECORDS and is_record):
                return found
        raise pickle.UnpicklingError(f"{module}.{name} could run code; refused")


class _SafeReader(dcp.FileSystemReader):
    """PyTorch's reader of a checkpoint folder, for an index that holds data alone."""

    def read_metadata(self, *arguments: Any, **more: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            _DataAlone(file).load()
        return super().read_metadata(*arguments, **more)


class _SafePlanner(dcp.DefaultLoadPlanner):
    """PyTorch's planner, for values that its safe unpickler takes."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)
