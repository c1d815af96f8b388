"""Datasets with a class for every pixel, by the layouts in which they are given out."""

import os
from pathlib import Path

from dinov2cli.config.class_names import ADE20K, VOC
from dinov2cli.data.datasets.dense import Pair, SegmentationDataset, pairs_by_stem
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
