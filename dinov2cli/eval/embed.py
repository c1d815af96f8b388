"""Features of a dataset in a file, for use elsewhere."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from dinov2cli import __version__, distributed
from dinov2cli.errors import DataError
from dinov2cli.eval.features import Extractor, Features

if TYPE_CHECKING:
    from dinov2cli.data.datasets import ImageDataset


def check_output(path: Path) -> None:
    """Refuse, before anything is computed, an output that cannot be written.

    Raises:
        DataError: another suffix, or the folder does not exist.
    """
    if path.suffix != ".safetensors":
        raise DataError(f"{path}: features are written as a .safetensors file; give such a name.")
    if not path.resolve().parent.is_dir():
        raise DataError(f"{path}: the folder {path.resolve().parent} does not exist.")


def embed(extract: Extractor, dataset: "ImageDataset", output: Path) -> Features:
    """Write the features of all images of `dataset`, in its order.

    The file holds `cls` and `mean_patch` float32 [N, D], `last_cls` float32 [N, n, D] (the last blocks,
    earliest first), `labels` int64 [N] (-1: none) and, as UTF-8 bytes, `paths` with `path_ends` int64 [N] (path i ends
    there); its metadata names weights, dataset, transform and classes.
    """
    check_output(output)
    part = extract(dataset, "features")
    tensors = {name: distributed.all_gather_rows(tensor) for name, tensor in part.tensors.items()}
    targets = distributed.all_gather_rows(part.targets)
    if distributed.is_main():
        metadata = {
            "dino2.version": __version__,
            "dino2.weights": extract.weights_hash,
            "dino2.dataset": dataset.describe(),
            "dino2.transform": f"resize {extract.resize}, crop {extract.image_size}",
            "dino2.classes": "\n".join(dataset.class_names),
        }
        paths = [dataset.path(i) for i in range(len(dataset))]
        aside = output.with_name(f".{output.name}.tmp")
        _write(aside, tensors, targets, paths, metadata)
        os.replace(aside, output)
    distributed.barrier()
    return part


def _write(
    file: Path, tensors: dict[str, torch.Tensor], targets: torch.Tensor, paths: list[str], metadata: dict[str, str]
) -> None:
    encoded = [path.encode() for path in paths]
    ends = torch.tensor([len(path) for path in encoded]).cumsum(0)
    joined = torch.frombuffer(bytearray(b"".join(encoded)), dtype=torch.uint8)
    columns = {**tensors, "labels": targets, "paths": joined, "path_ends": ends}
    save_file({name: tensor.contiguous() for name, tensor in columns.items()}, file, metadata)
