"""Datasets with a distance for every pixel, by the layouts in which they are given out."""

from pathlib import Path
from typing import NamedTuple

from dinov2cli.console import counted, logger
from dinov2cli.data.datasets.dense import DepthDataset, Pair, pairs_by_stem
from dinov2cli.data.datasets.segmentation import folder_of
from dinov2cli.errors import DataError
from dinov2cli.files import user_path


class DepthProtocol(NamedTuple):
    """What a benchmark trains and measures with.

    cut: "nyu", "kitti" or "": the part of an image that is used. crop: height and width in training. range: metres.
    brightness: factors of the colours' augmentation. counted: "eigen", "garg" or "": the part that is measured.
    """

    cut: str
    crop: tuple[int, int]
    range: tuple[float, float]
    brightness: tuple[float, float]
    counted: str


NYU = DepthProtocol("nyu", (416, 544), (0.001, 10.0), (0.75, 1.25), "eigen")
KITTI = DepthProtocol("kitti", (352, 704), (0.001, 80.0), (0.9, 1.1), "garg")


class NYUd(DepthDataset):
    """NYU Depth V2 as it is given out for training: folders of rooms, nyu_train.txt and nyu_test.txt, PNG / 1000.

    A line names an image, its depth and the focal length, relative to the root.
    """

    protocol = NYU

    def __init__(self, root: str, split: str = "TRAIN") -> None:
        place = user_path(root)
        file = place / folder_of(place, split, {"TRAIN": "nyu_train.txt", "VAL": "nyu_test.txt"})
        super().__init__(_listed(file, place, place), f"NYU Depth V2 {split.upper()} in {place}", scale=1000.0)


class Kitti(DepthDataset):
    """KITTI's depth with the split of Eigen et al.: input/, gt_depth/, kitti_eigen_train.txt and _test.txt, PNG / 256.

    A line names an image in input/, its depth in gt_depth/ (or None: it is left out) and the focal length.
    """

    protocol = KITTI

    def __init__(self, root: str, split: str = "TRAIN") -> None:
        place = user_path(root)
        file = place / folder_of(place, split, {"TRAIN": "kitti_eigen_train.txt", "VAL": "kitti_eigen_test.txt"})
        images, depths = (place / name if (place / name).is_dir() else place for name in ("input", "gt_depth"))
        super().__init__(_listed(file, images, depths), f"KITTI {split.upper()} in {place}", scale=256.0)


class Depths(DepthDataset):
    """Any folder of images beside a folder of depth: 16-bit PNG or TIFF divided by `scale`, or metres as float TIFF or
    .npy; 0, negative and not finite where it is not known."""

    def __init__(self, images: str, depths: str, scale: str = "1000") -> None:
        what = f"{user_path(images)} with depth in {user_path(depths)}"
        super().__init__(pairs_by_stem(images, depths), what, scale=number_of(scale, "Depths: scale"))


def number_of(text: str, what: str) -> float:
    """A number above 0; DataError for another text."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise DataError(f"{what}={text} is no number above 0")
    return value


def _listed(file: Path, images: Path, depths: Path) -> list[Pair]:
    if not file.is_file():
        raise DataError(f"there is no {file}, which names the images and their depth")
    pairs, without = [], 0
    for number, line in enumerate(file.read_text().splitlines(), 1):
        words = line.split()
        if not words:
            continue
        if len(words) < 2:
            raise DataError(f"{file}, line {number}: an image and its depth are expected, it is {line!r}")
        if words[1] == "None":
            without += 1
            continue
        pairs.append(Pair(str(images / words[0].lstrip("/")), str(depths / words[1].lstrip("/"))))
    if without:
        logger.info("%s: %s without depth left out", file, counted(without, "image"))
    return pairs
