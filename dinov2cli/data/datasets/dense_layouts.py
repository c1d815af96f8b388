"""Datasets with a class or a distance for every pixel, by the layouts in which they are given out."""

import os
from pathlib import Path
from typing import NamedTuple

from dinov2cli.config.class_names import ADE20K, VOC
from dinov2cli.console import counted, logger
from dinov2cli.data.datasets.dense import DepthDataset, Pair, SegmentationDataset, pairs_by_stem
from dinov2cli.data.datasets.listing import list_images
from dinov2cli.errors import DataError
from dinov2cli.files import user_path

CITYSCAPES_CLASSES = {
    "road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17, "traffic light": 19,
    "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23, "person": 24, "rider": 25, "car": 26, "truck": 27,
    "bus": 28, "train": 31, "motorcycle": 32, "bicycle": 33,
}  # fmt: skip
"""The 19 that are evaluated, with their numbers in `*_labelIds.png`."""


def folder_of(root: Path, split: str, folders: dict[str, str]) -> str:
    """The folder's name for a split; DataError for one that there is not."""
    if split.upper() not in folders:
        raise DataError(f"{root}: there is no split {split!r}; there are {' and '.join(folders)}")
    return folders[split.upper()]


class ADE20k(SegmentationDataset):
    """The 150 classes of the scene parsing benchmark: images/ and annotations/, in them training/ and validation/.

    The number 0, what is none of the classes, is ignored; the others are a class, counted from 1.
    """

    def __init__(self, root: str, split: str = "TRAIN") -> None:
        place = user_path(root)
        folder = folder_of(place, split, {"TRAIN": "training", "VAL": "validation"})
        super().__init__(
            pairs_by_stem(place / "images" / folder, place / "annotations" / folder),
            f"ADE20k {split.upper()} in {place}",
            classes=[-1, *range(len(ADE20K))],
            n_classes=len(ADE20K),
            names=ADE20K,
        )


class PascalVOC(SegmentationDataset):
    """The 21 classes of Pascal VOC 2012: JPEGImages/, SegmentationClass/, ImageSets/Segmentation/.

    Args:
        split: TRAIN, VAL, or TRAINAUG, the 10,582 images with the further masks of SegmentationClassAug/.
    """

    def __init__(self, root: str, split: str = "TRAIN") -> None:
        place = user_path(root)
        name = folder_of(place, split, {"TRAIN": "train", "VAL": "val", "TRAINAUG": "trainaug"})
        listed = place / "ImageSets" / "Segmentation" / f"{name}.txt"
        if not listed.is_file():
            raise DataError(f"there is no {listed}, which names the images of {split.upper()}")
        masks = "SegmentationClassAug" if name == "trainaug" else "SegmentationClass"
        super().__init__(
            [
                Pair(str(place / "JPEGImages" / f"{stem}.jpg"), str(place / masks / f"{stem}.png"))
                for stem in listed.read_text().split()
            ],
            f"Pascal VOC {split.upper()} in {place}",
            n_classes=len(VOC),
            names=VOC,
        )
        for index in (0, len(self) - 1):
            if not os.path.isfile(self.label_path(index)):
                raise DataError(f"{listed} names {self.label_path(index)}, which is not there")


class Cityscapes(SegmentationDataset):
    """The 19 classes of Cityscapes: leftImg8bit/ and gtFine/, in them train/ and val/, in these cities."""

    def __init__(self, root: str, split: str = "TRAIN") -> None:
        place = user_path(root)
        name = folder_of(place, split, {"TRAIN": "train", "VAL": "val"})
        folder = place / "leftImg8bit" / name
        pairs = []
        for path in list_images(folder).paths if folder.is_dir() else ():
            mask = place / "gtFine" / name / f"{path.rpartition('_leftImg8bit')[0]}_gtFine_labelIds.png"
            if not mask.is_file():
                raise DataError(f"{folder / path} has no {mask}")
            pairs.append(Pair(str(folder / path), str(mask)))
        ids = [-1] * (max(CITYSCAPES_CLASSES.values()) + 1)
        for number, label in enumerate(CITYSCAPES_CLASSES.values()):
            ids[label] = number
        super().__init__(pairs, f"Cityscapes {split.upper()} in {folder}", classes=ids, names=[*CITYSCAPES_CLASSES])


class Masks(SegmentationDataset):
    """Any folder of images beside a folder of masks: PNG, grey or with a palette, or .npy, each pixel a class number.

    Args:
        classes: how many there are; by default one more than the largest number, for which all masks are read.
        names: a text file with the name of a class in each line.
    """

    def __init__(self, images: str, masks: str, classes: str = "", names: str = "") -> None:
        if classes and not (classes.isdigit() and 0 < int(classes) <= 255):
            raise DataError(f"Masks: classes={classes} is no number of classes; 1 to 255 are")
        found: list[str] = []
        if names:
            file = user_path(names)
            if not file.is_file():
                raise DataError(f"Masks: names={file} is no file")
            found = [line.strip() for line in file.read_text(errors="replace").splitlines() if line.strip()]
            if classes and len(found) != int(classes):
                raise DataError(f"{file} names {len(found)} classes, and classes={classes} are said")
        what = f"{user_path(images)} with masks in {user_path(masks)}"
        super().__init__(pairs_by_stem(images, masks), what, n_classes=int(classes or 0) or None, names=found)


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
