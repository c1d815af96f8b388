"""What a word names that is to have labels for every pixel: a folder whose layout is known, or a dataset string."""

import os
from pathlib import Path
from typing import Literal

from dinov2cli.data.datasets.dense import DenseDataset
from dinov2cli.data.datasets.listing import is_folder
from dinov2cli.data.datasets.strings import KINDS, make_dataset
from dinov2cli.data.spelling import EXAMPLES, complete, options_of, quoted
from dinov2cli.errors import DataError

Labels = Literal["masks", "depth"]
Part = Literal["TRAIN", "VAL"]
KINDS_OF: dict[Labels, tuple[str, ...]] = {
    "masks": ("ADE20k", "VOC", "Cityscapes", "Masks"),
    "depth": ("NYUd", "KITTI", "Depths"),
}
IMAGE_FOLDERS = ("images", "image", "imgs", "img", "rgb", "JPEGImages", "input")
LABEL_FOLDERS: dict[Labels, tuple[str, ...]] = {
    "masks": ("masks", "mask", "annotations", "labels", "label", "segmentation", "SegmentationClass"),
    "depth": ("depth", "depths", "depth_maps", "gt_depth"),
}
PARTS: dict[Part, tuple[str, ...]] = {
    "TRAIN": ("train", "training"),
    "VAL": ("val", "valid", "validation", "test", "testing"),
}
NAMES_FILE = "classes.txt"


def dense_string(text: str, part: Part, labels: Labels, *, of_train: bool = False) -> str:
    """The dataset string of what is named, complete: with its layout, its place and the part of it that is wanted.

    Args:
        of_train: it was given for training, and this asks for what is beside that part.

    Raises:
        DataError: no such folder, one whose layout is not known, a dataset with other labels, or without that part.
    """
    text = complete(text)
    if os.path.isdir(folder := os.path.expanduser(text)):
        return recognised(Path(folder), part, labels)
    name, _, rest = text.partition(":")
    examples = ", ".join(EXAMPLES[kind] for kind in KINDS_OF[labels])
    if not any(name in kinds for kinds in KINDS_OF.values()):
        raise DataError(f"{text!r} is neither a folder nor a dataset with {labels}", f"Known: a folder, {examples}")
    if name not in KINDS_OF[labels]:
        raise DataError(f"{name} has no {labels}", f"Known: a folder, {examples}")
    if "split" not in KINDS[name].parameters():
        if of_train:
            raise DataError(f"{text} has no part for {part}", "Give another folder with --val-dataset.")
        return text
    options = options_of(name, rest, KINDS[name].parameters(), EXAMPLES[name])
    options["split"] = part if of_train or not options.get("split") else options["split"]
    return ":".join((name, *(f"{key}={quoted(value)}" for key, value in options.items())))


def recognised(root: Path, part: Part, labels: Labels) -> str:
    """The dataset string of one part of what lies in a folder. Raises DataError with what would be recognised."""
    place = root
    for inner in ("ADEChallengeData2016", "VOCdevkit", "VOC2012"):  # as archives unpack
        if labels == "masks" and (place / inner).is_dir():
            place = place / inner
    there = {entry.name for entry in os.scandir(place) if is_folder(entry) or entry.name.endswith(".txt")}
    marks = {
        "masks": {
            "ADE20k": {"images", "annotations"},
            "VOC": {"JPEGImages", "SegmentationClass", "ImageSets"},
            "Cityscapes": {"leftImg8bit", "gtFine"},
        },
        "depth": {"NYUd": {"nyu_train.txt", "nyu_test.txt"}, "KITTI": {"kitti_eigen_train.txt"}},
    }[labels]
    for name, needed in marks.items():
        if needed <= there and (name != "ADE20k" or _looks_like_ade(place)):
            return f"{name}:root={quoted(str(place))}:split={part}"
    images, found = _beside(place, part, labels)
    key, kind = ("masks", "Masks") if labels == "masks" else ("depths", "Depths")
    names = next((file for file in (place / NAMES_FILE, images.parent / NAMES_FILE) if file.is_file()), None)
    said = f":names={quoted(str(names))}" if names and labels == "masks" else ""
    return f"{kind}:images={quoted(str(images))}:{key}={quoted(str(found))}{said}"


def _looks_like_ade(place: Path) -> bool:
    return (place / "objectInfo150.txt").is_file() or place.name == "ADEChallengeData2016" or (
        (place / "annotations" / "training").is_dir()
        and any(entry.name.startswith("ADE_") for entry in os.scandir(place / "annotations" / "training"))
    )  # fmt: skip


def _beside(root: Path, part: Part, labels: Labels) -> tuple[Path, Path]:
    """Folders of images and of their labels: images/train and masks/train, train/images and train/masks, or, without
    parts, images and masks, which are for training."""
    folders = {entry.name for entry in os.scandir(root) if is_folder(entry)}
    halves = [name for name in PARTS[part] if name in folders]
    for place in (*(root / half for half in halves), root):
        pair = [next((place / n for n in known if (place / n).is_dir()), None)
                for known in (IMAGE_FOLDERS, LABEL_FOLDERS[labels])]  # fmt: skip
        images, found = pair
        if images is None or found is None:
            continue
        if place != root:
            return images, found
        inner = [next((each / n for n in PARTS[part] if (each / n).is_dir()), None) for each in (images, found)]
        if inner[0] is not None and inner[1] is not None:
            return inner[0], inner[1]
        has_parts = any((images / name).is_dir() for names in PARTS.values() for name in names)
        if part == "TRAIN" and not has_parts:
            return images, found
        raise DataError(
            f"{root} has images and {labels}, and no part of them for {part}",
            f"Give one with --val-dataset, or make {images.name}/{PARTS[part][0]} and {found.name}/{PARTS[part][0]}.",
        )
    label = LABEL_FOLDERS[labels][0]
    examples = ", ".join(EXAMPLES[kind] for kind in KINDS_OF[labels])
    raise DataError(
        f"{root} has no images with {labels} of any layout that is known; it holds "
        f"{', '.join(sorted(folders)[:5]) or 'no folder'}",
        f"Known: images/ beside {label}/, each with train/ and val/ in it, names alike but for the suffix; {examples}",
    )


def dense_dataset(dataset: str, labels: Labels) -> DenseDataset:
    """The dataset of a complete string. Raises DataError where it cannot be read, or has other labels."""
    made = make_dataset(dataset)
    if not isinstance(made, DenseDataset) or made.labels != labels:
        raise DataError(f"{dataset} has no {labels}")
    return made
