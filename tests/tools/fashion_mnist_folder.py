"""Write Fashion-MNIST as PNG files, a subfolder per class: DEST/train/<class>/*.png and DEST/test/<class>/*.png.

The data are those of Debian's package dataset-fashion-mnist (apt-get install dataset-fashion-mnist), or the same four
.gz files in another folder.

usage: python tests/tools/fashion_mnist_folder.py DEST [FOLDER_OF_GZ_FILES]
"""

import gzip
import sys
from pathlib import Path

import cv2
import numpy as np

CLASSES = ("tshirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
DEBIAN = "/usr/share/datasets/fashion-mnist"


def read_idx(path: Path, header: int) -> np.ndarray:
    """Bytes of an IDX file after its header."""
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)


def main(destination: str, source: str = DEBIAN) -> None:
    for name, split in (("train", "train"), ("t10k", "test")):
        labels = read_idx(Path(source) / f"{name}-labels-idx1-ubyte.gz", 8)
        images = read_idx(Path(source) / f"{name}-images-idx3-ubyte.gz", 16).reshape(len(labels), 28, 28)
        for label in CLASSES:
            (Path(destination) / split / label).mkdir(parents=True, exist_ok=True)
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            cv2.imwrite(str(Path(destination) / split / CLASSES[label] / f"{number:05d}.png"), image)
        print(f"{split}: {len(labels)} images")


if __name__ == "__main__":
    main(*sys.argv[1:])
