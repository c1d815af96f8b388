"""Looks for what is wrong with an ImageNet-1k tree before a training finds it."""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dinov2cli.console import few
from dinov2cli.data.datasets import UnreadableImage
from dinov2cli.data.datasets.imagenet import Split
from dinov2cli.data.decoding import decode_image, read_file
from dinov2cli.data.prepare.imagenet import SplitListing
from dinov2cli.data.prepare.labels import Labels

SAMPLE = 200
"""Images of a split that are opened."""


class SplitReport(NamedTuple):
    """counts: smallest, median and largest number of images a class."""

    split: str
    images: int
    classes: int
    counts: tuple[int, int, int]
    opened: int
    notes: list[str]
    problems: list[str]


def check_split(root: Path, listing: SplitListing, labels: Labels) -> SplitReport:
    """Compare a split with labels.txt and the full data set, and open a sample of its images.

    Notes say what a subset lacks; problems are what a training would trip over.
    """
    split = listing.split
    counts = [len(numbers) for numbers in listing.classes.values()] or [0]
    notes, problems = [], []
    if listing.images != split.full_size:
        notes.append(f"{listing.images} of the {split.full_size} images of the full {split.name}")
    if listing.images == 0:
        problems.append(f"{split.folder}/ holds no image")
    names = dict.fromkeys(listing.classes, "") if split is Split.TEST else labels.names
    if missing := [class_id for class_id in names if class_id not in listing.classes]:
        notes.append(f"{len(missing)} classes of labels.txt without images: {few(missing)}")
    layout = listing.layout
    paths = [root / split.image_path(c, n, layout) for c, numbers in listing.classes.items() for n in numbers]
    for what, found in (
        ("class folders that labels.txt does not name", sorted(listing.classes.keys() - names.keys())),
        ("class folders without images", listing.without_images),
        ("names that are not of the layout", listing.unexpected),
        ("empty files", [str(path.relative_to(root)) for path in paths if _size(path) == 0]),
    ):
        if found:
            problems.append(f"{len(found)} {what}: {few(found)}")
    sample = np.random.default_rng(0).permutation(len(paths))[:SAMPLE]
    for i in sorted(sample.tolist()):
        try:
            decode_image(read_file(str(paths[i])), str(paths[i].relative_to(root)))
        except UnreadableImage as error:
            problems.append(error.message)
    limits = (min(counts), int(np.median(counts)), max(counts))
    return SplitReport(split.name, listing.images, len(listing.classes), limits, len(sample), notes, problems)


def _size(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0
