"""Train on the images of a .zip file, read where they lie.

python examples/own_dataset.py PHOTOS.zip RUN [a.b=value ...]
"""

import sys
import zipfile
from pathlib import Path

import numpy as np

from dinov2cli import TrainRequest, run
from dinov2cli.data.datasets import UNLABELLED, ImageDataset
from dinov2cli.data.datasets.strings import KINDS, DatasetKind


class ZipDataset(ImageDataset):
    """The files of a .zip, unlabelled. What `__init__` takes, the dataset string may say."""

    def __init__(self, file: str) -> None:
        self.file = file
        with zipfile.ZipFile(file) as archive:
            self.names = np.array([name for name in archive.namelist() if not name.endswith("/")])

    def __len__(self) -> int:
        return len(self.names)

    def encoded(self, index: int) -> bytes:
        with zipfile.ZipFile(self.file) as archive:  # opened anew: loader processes must not share a position
            return archive.read(self.path(index).partition("!")[2])

    def path(self, index: int) -> str:
        return f"{self.file}!{self.names[index]}"

    def targets(self) -> np.ndarray:
        return np.full(len(self), UNLABELLED)

    def describe(self) -> str:
        return f"{self.file}: {len(self)} images"


def main(archive: str, run_folder: str, *overrides: str) -> None:
    KINDS["Zip"] = DatasetKind(ZipDataset, "Zip:file=photos.zip")
    run(TrainRequest(preset="demo", data=f"Zip:file={archive}", output_dir=Path(run_folder), overrides=overrides))


if __name__ == "__main__":
    main(*sys.argv[1:])
