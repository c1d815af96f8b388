"""What `dino2 prepare-imagenet` does, and says meanwhile: the metadata files through which ImageNet is read."""

from pathlib import Path

import numpy as np

from dinov2cli.console import err, few, out
from dinov2cli.data.datasets import UnreadableImage
from dinov2cli.data.datasets.imagenet import ImageNet, ImageNet22k, Split, data_root
from dinov2cli.data.decoding import decode_image, read_file
from dinov2cli.data.known import register
from dinov2cli.data.prepare.imagenet import (
    SplitListing,
    changed_since,
    entries_of,
    list_split,
    metadata_files,
    prepare_imagenet22k,
    write_metadata,
)
from dinov2cli.data.prepare.labels import (
    SOLUTION,
    Labels,
    kaggle_file,
    read_labels,
    read_val_labels,
    sort_val,
    write_labels,
)
from dinov2cli.errors import ConfigError, DataError, EnvironmentProblem
from dinov2cli.files import user_path
from dinov2cli.requests.tools import PrepareImagenetRequest
from dinov2cli.site import read_site

SAMPLE = 200
"""Images of a split that `--check` opens."""


def run(request: PrepareImagenetRequest) -> None:
    """Do what a request asks, saying what is written and found.

    Raises:
        DataError: images or labels that are not as they must be, or problems that `check` has found.
    """
    root = user_path(request.root)
    extra = user_path(request.extra) if request.extra else root
    if not root.is_dir():
        raise DataError(f"--root {root} is not a folder")
    has_folders = any((data_root(root) / split.folder).is_dir() for split in Split)
    has_tars = any(root.glob("n[0-9]*.tar"))  # the archives of ImageNet-1k have other names
    kinds = {"1k": has_folders or not has_tars or request.check, "22k": has_tars and not request.check}
    prepared = [request.variant] if request.variant else [kind for kind, is_there in kinds.items() if is_there]
    if "1k" in prepared:
        _prepare_1k(root, extra, request)
    if "22k" in prepared:
        _prepare_22k(root, extra, request)
    if not request.check:
        _register([{"1k": ImageNet, "22k": ImageNet22k}[kind].__name__ for kind in prepared], root, extra)


def _register(names: list[str], root: Path, extra: Path) -> None:
    try:
        for name in names:
            _say(register(name, root, extra))
        known = read_site().settings.datasets
    except (ConfigError, EnvironmentProblem) as error:  # what was prepared can be used without a name
        return _warn(f"{names[-1]} gets no name: {error}; write {names[-1]}:root={root}:extra={extra} instead")
    if ImageNet22k.__name__ in known:
        _say("next: dino2 train --preset vitl14 --nodes 12")
    elif ImageNet.__name__ in known:
        _say("next: dino2 train --preset vitl16_short --nodes 4, or any other preset with --data ImageNet")


def _prepare_1k(root: Path, extra: Path, request: PrepareImagenetRequest) -> None:
    data = data_root(root)
    if data != root:
        _say(f"Kaggle's download: the images are in {data}")
    if request.val_labels is not None:
        count = sort_val(data, request.val_labels, "link" if request.link else "move")
        _say(f"val: {count} images {'linked from' if request.link else 'moved to'} their class folders")
    splits = [Split[name] for name in request.split] or [s for s in Split if (data / s.folder).is_dir()]
    if not splits:
        raise DataError(f"{root} has no train/, val/ or test/ folder")
    new = [s for s in splits if request.force or not all(path.is_file() for path in metadata_files(extra, s))]
    solution = kaggle_file(SOLUTION, root, data)
    val_labels = read_val_labels(solution) if solution else None
    listings = [list_split(data, s, val_labels) for s in (splits if request.check or request.write_labels else new)]
    labels = _labels(root, data, listings, request)
    if request.check:
        return _check(data, listings, labels)
    # All is read and checked before the first file is written.
    entries = {listing.split: entries_of(listing, labels) for listing in listings if listing.split in new}
    if request.write_labels:
        write_labels(root / "labels.txt", labels)
        _say(f"wrote {root / 'labels.txt'}")
    for problem in labels.problems:
        _warn(problem)
    for split in [split for split in splits if split not in new]:
        count = len(np.load(metadata_files(extra, split)[0], mmap_mode="r"))
        _say(f"{split.name}: {count} images, already prepared in {extra}")
        if changed_since(data, extra, split):
            _warn(f"{data / split.folder} has changed since; --overwrite writes the files anew")
    for listing in [listing for listing in listings if listing.split in new]:
        split = listing.split
        write_metadata(extra, split, entries[split])
        files = ", ".join(path.name for path in metadata_files(extra, split))
        _say(f"{split.name}: {listing.images} images -> {files} in {extra}")
        if listing.layout != split.layouts[0]:
            class_id, (number, *_) = next(iter(listing.classes.items()))
            here, elsewhere = (split.image_path(class_id, number, layout) for layout in (listing.layout, None))
            _say(f"{split.name}: read where it is, as {here}; the reference implementation expects {elsewhere}")
        if listing.images != split.full_size:
            _warn(f"a subset: the full {split.name} has {split.full_size} images")
        if listing.unexpected:
            shown = ", ".join(listing.unexpected[:3])
            _warn(f"left out {len(listing.unexpected)} names that are not of the layout, such as {shown}")


def _labels(root: Path, data: Path, listings: list[SplitListing], request: PrepareImagenetRequest) -> Labels:
    """The classes that a request wants: read, or made of the ids that were found."""
    if request.write_labels:
        if (path := root / "labels.txt").exists():
            raise DataError(f"{path} exists already; it is not overwritten")
        if not (ids := sorted({i for it in listings for i in (*it.classes, *it.without_images)} - {""})):
            raise DataError(f"{root} has no classes in train/ or val/ to make labels.txt from")
        return Labels(dict(zip(ids, ids, strict=True)), [])
    return Labels({}, []) if all(it.split is Split.TEST for it in listings) else read_labels(root, data)


def _check(root: Path, listings: list[SplitListing], labels: Labels) -> None:
    """Compare splits with labels.txt and the full data set, open a sample of their images, and say what is found:
    what a subset lacks as notes, what a training would trip over as problems."""
    problems = list(labels.problems)
    for listing in listings:
        split, classes = listing.split, listing.classes
        files = [split.image_path(c, n, listing.layout) for c, numbers in classes.items() for n in numbers]
        empty = [file for file in files if not _size(root / file)]
        sample = sorted(np.random.default_rng(0).permutation(len(files))[:SAMPLE].tolist())
        counts = [len(numbers) for numbers in classes.values()] or [0]
        spread = f"{min(counts)} / {int(np.median(counts))} / {max(counts)} a class (least, median, most)"
        per_class = f", {spread}" if split is not Split.TEST else ""
        _say(f"{split.name}: {listing.images} images in {len(classes)} classes{per_class}; opened {len(sample)}")
        if listing.images != split.full_size:
            _say(f"  {listing.images} of the {split.full_size} images of the full {split.name}")
        names = dict.fromkeys(classes, "") if split is Split.TEST else labels.names
        if missing := [class_id for class_id in names if class_id not in classes]:
            _say(f"  {len(missing)} classes of labels.txt without images: {few(missing)}")
        if listing.images == 0:
            problems.append(f"{split.folder}/ holds no image")
        for what, found in (
            ("class folders that labels.txt does not name", sorted(classes.keys() - names.keys())),
            ("class folders without images", listing.without_images),
            ("names that are not of the layout", listing.unexpected),
            ("empty files", empty),
        ):
            if found:
                problems.append(f"{len(found)} {what}: {few(found)}")
        for i in sample:
            try:
                decode_image(read_file(str(root / files[i])), files[i])
            except UnreadableImage as error:
                problems.append(error.message)
    for problem in problems:
        _warn(problem)
    if problems:
        raise DataError(f"{len(problems)} problems found in {root}")
    _say("no problems found")


def _prepare_22k(root: Path, extra: Path, request: PrepareImagenetRequest) -> None:
    if not request.force and (extra / "entries.npy").is_file() and (extra / "class-ids.npy").is_file():
        _say(f"already prepared in {extra}; --overwrite writes the files anew")
        return
    images, classes = prepare_imagenet22k(root, extra)
    _say(f"{images} images in {classes} classes -> entries.npy, class-ids.npy in {extra}")


def _say(line: str) -> None:
    out.print(line, markup=False, highlight=False, soft_wrap=True)


def _warn(line: str) -> None:
    err.print(f"warning: {line}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def _size(path: Path) -> int:
    """Bytes of a file, 0 where there is none: asked once, as there are millions."""
    try:
        return path.stat().st_size
    except OSError:
        return 0
