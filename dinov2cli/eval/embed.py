"""Features of a dataset in a file, for use elsewhere.

A table: a row is an image, in the order of the dataset, or, in safetensors, an entry of each tensor.
"""

import csv
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dinov2cli import __version__, distributed
from dinov2cli.console import counted, stoppable
from dinov2cli.data.datasets import ImageDataset
from dinov2cli.data.datasets.tiles import TiledDataset
from dinov2cli.device import choose_device
from dinov2cli.errors import DataError, EnvironmentProblem, check_all
from dinov2cli.eval.extract import Extractor
from dinov2cli.eval.features import Features
from dinov2cli.eval.images import check_words, dataset_of_words
from dinov2cli.eval.protocol import load_subject
from dinov2cli.files import check_folder, replacing, writing
from dinov2cli.models.load.locate import check_there
from dinov2cli.models.load.tensor_files import write_tensors
from dinov2cli.requests.eval import EmbedRequest


class FeatureTable(NamedTuple):
    """What is written: `tensors` as in `Features`, of all images, NaN where one could not be read (`readable` is
    bool [N]); labels int64 [N], -1 for none; paths; metadata."""

    tensors: dict[str, Tensor]
    labels: Tensor
    readable: Tensor
    paths: list[str]
    metadata: dict[str, str]


class Embedded(NamedTuple):
    """What a file of features holds; `dim` is that of a class token, `unreadable` images have NaN."""

    output: str
    images: int
    dim: int
    dataset: str
    unreadable: int = 0

    def __str__(self) -> str:
        marked = f"; {self.unreadable} could not be read: NaN, not readable" if self.unreadable else ""
        return f"{self.output}: {counted(self.images, 'image')}, {self.dim} dimensions{marked}"


def run(request: EmbedRequest) -> Embedded:
    """Write the features of a dataset to a file.

    Raises:
        Dino2Error: a wrong output, weights or data; a full disk.
    """
    look(request)
    with distributed.process_group():
        images = dataset_of_words(request.data)
        subject = load_subject(request.checkpoint, request.config_file)
        whole_tiles = request.tiles is not None and "resize_ratio" not in request.model_fields_set
        ratio = 1.0 if whole_tiles else request.resize_ratio
        extract = subject.extractor(request, detailed=True, batch_size=request.batch_size, resize_ratio=ratio)
        if request.tiles is not None:
            images = TiledDataset(images, request.tiles, request.overlap, extract.reading)
        features = embed(extract, images, request.output)
    n, dim = len(images), features.cls.shape[1]
    return Embedded(str(request.output), n, dim, images.describe(), n - features.size)


def look(request: EmbedRequest) -> None:
    """Check what takes no time; nothing is listed, downloaded or written.

    Raises:
        Dino2Error: all that is wrong, in the order in which to mend it.
    """
    check_all(
        lambda: check_words(request.data),
        lambda: check_there(request.checkpoint),
        lambda: check_output(request.output, overwrite=request.overwrite),
        lambda: choose_device(request.device),
    )


def check_output(path: Path, *, overwrite: bool = True) -> None:
    """Refuse, before anything is computed, an output that cannot be written, or that would be lost.

    Raises:
        DataError: another suffix, the folder does not exist, or there is such a file and it is not to be overwritten.
        EnvironmentProblem: a Parquet file without the package that writes it, a folder that is not to be written to.
    """
    if path.suffix not in WRITERS:
        raise DataError(f"{path}: features are written as a {' or '.join(WRITERS)} file; give such a name.")
    if path.exists() and not overwrite:
        raise DataError(f"{path} is there already.", hint="Give another name, or --overwrite to replace it.")
    check_folder(path.resolve().parent, "--output")
    if not path.resolve().parent.is_dir():
        raise DataError(f"{path}: the folder {path.resolve().parent} does not exist.")
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError:
            raise EnvironmentProblem(
                f"{path}: Parquet files need pyarrow.", hint="pip install 'dinov2cli[parquet]', or write .safetensors"
            ) from None


def embed(extract: Extractor, dataset: ImageDataset, output: Path) -> Features:
    """Write the features of all images of `dataset`, in its order; returns those of this process.

    safetensors and Parquet hold `cls` and `mean_patch` float32 [N, D], `last_cls` float32 [N, n, D] (the last blocks,
    earliest first), `labels` int64 [N] (-1: none), `readable` (bool [N]; where false, features are NaN) and `paths`;
    their metadata name weights, dataset, transform, precision and classes. In safetensors, paths are their bytes one
    after the other, and `path_ends` int64 [N] tells where each ends; Parquet has columns `label` and `path`, and lists
    of fixed sizes. CSV has a row of path, label, readable and the class token for each image, `.npy` the class tokens
    alone, float32 [N, D]. Of a `TiledDataset` a row is a tile, and all but `.npy` hold `tiles`, int64 [N, 4]: top,
    left, height and width in pixels.
    """
    check_output(output)
    part = extract(dataset, "features")
    tensors = {name: distributed.all_gather_rows(tensor) for name, tensor in part.tensors.items()}
    positions = part.positions()
    if distributed.is_main():
        readable = torch.zeros(len(dataset), dtype=torch.bool)
        readable[positions] = True
        for name, rows in tensors.items() if len(positions) < len(dataset) else ():
            tensors[name] = rows.new_full((len(dataset), *rows.shape[1:]), torch.nan)
            tensors[name][positions] = rows
        if isinstance(dataset, TiledDataset):
            tensors["tiles"] = torch.as_tensor(dataset.boxes)
        labels = torch.as_tensor(dataset.targets())
        metadata = {
            "dino2.version": __version__,
            "dino2.weights": extract.weights_hash,
            "dino2.dataset": printable(dataset.describe()),
            "dino2.transform": f"resize {extract.resize}, crop {extract.image_size}",
            "dino2.precision": str(extract.precision.dtype),
            "dino2.reading": str(extract.reading),
            "dino2.classes": "\n".join(map(printable, dataset.class_names)),
        }
        table = FeatureTable(tensors, labels, readable, [dataset.path(i) for i in range(len(dataset))], metadata)
        with stoppable("stopping once the features are written"), writing(output), replacing(output) as aside:
            WRITERS[output.suffix](table, aside)
    distributed.barrier()
    return part


def printable(name: str) -> str:
    r"""A file's name as text: bytes that are not UTF-8 as `\xNN`."""
    return os.fsencode(name).decode(errors="backslashreplace")


def _write_safetensors(table: FeatureTable, file: Path) -> None:
    encoded = [os.fsencode(path) for path in table.paths]
    ends = torch.tensor([len(path) for path in encoded]).cumsum(0)
    joined = torch.frombuffer(bytearray(b"".join(encoded)), dtype=torch.uint8)
    columns = {**table.tensors, "labels": table.labels, "readable": table.readable, "paths": joined, "path_ends": ends}
    write_tensors(columns, file, table.metadata)


def _write_parquet(table: FeatureTable, file: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        "path": pa.array(map(printable, table.paths), pa.string()),
        "label": pa.array(table.labels.numpy()),
        "readable": pa.array(table.readable.numpy()),
        **{name: _lists(tensor.numpy()) for name, tensor in table.tensors.items()},
    }
    rows = pa.table(columns).replace_schema_metadata(table.metadata)
    pq.write_table(rows, file, use_dictionary=["path"], row_group_size=1 << 14)


def _lists(rows: np.ndarray) -> Any:
    """float32 [N, ...] as a column of lists of fixed sizes, nested as the dimensions are."""
    import pyarrow as pa

    column = pa.array(rows.reshape(-1))
    for size in reversed(rows.shape[1:]):
        column = pa.FixedSizeListArray.from_arrays(column, size)
    return column


def _write_csv(table: FeatureTable, file: Path) -> None:
    with file.open("w", newline="", encoding="utf-8") as text:
        writer = csv.writer(text)
        tiles = table.tensors.get("tiles", torch.empty(len(table.paths), 0))
        places = ["top", "left", "height", "width"][: tiles.shape[1]]
        dims = range(table.tensors["cls"].shape[1])
        writer.writerow(["path", "label", "readable", *places, *(f"cls_{i}" for i in dims)])
        columns = table.labels.tolist(), table.readable.tolist(), tiles.tolist()
        for path, label, is_readable, tile, values in zip(table.paths, *columns, table.tensors["cls"], strict=True):
            numbers = map(np.format_float_scientific, values.numpy())  # the fewest digits that give the value back
            writer.writerow([printable(path), label, int(is_readable), *tile, *numbers])


def _write_npy(table: FeatureTable, file: Path) -> None:
    with file.open("wb") as binary:
        np.save(binary, table.tensors["cls"].numpy())


WRITERS = {".safetensors": _write_safetensors, ".parquet": _write_parquet, ".csv": _write_csv, ".npy": _write_npy}
"""Formats by suffix."""
