"""The metadata files of ImageNet-1k, `entries-<SPLIT>.npy`, `class-ids-<SPLIT>.npy` and `class-names-<SPLIT>.npy`, and
of ImageNet-22k, `entries.npy` and `class-ids.npy`, from the tars' block listings."""

import os
import re
import tarfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dinov2cli.console import few, in_threads
from dinov2cli.data.datasets.imagenet import BLOCK, FLAT_VAL, NO_CLASS, Split
from dinov2cli.data.datasets.listing import is_folder
from dinov2cli.data.prepare.labels import SOLUTION, Labels
from dinov2cli.errors import DataError
from dinov2cli.files import write_array, write_text, writing

SCAN_THREADS = 16


class SplitListing(NamedTuple):
    """What a split's folder holds.

    layout: of the split's layouts the one that most names are of. classes: the images' numbers, by class id (that of
    the test images is empty) and file name. without_images: class folders. unexpected: paths relative to the root.
    """

    split: Split
    layout: str
    classes: dict[str, list[int]]
    without_images: list[str]
    unexpected: list[str]

    @property
    def images(self) -> int:
        return sum(map(len, self.classes.values()))


def list_split(root: Path, split: Split, val_labels: Mapping[int, str] | None = None) -> SplitListing:
    """Find a split's images. Files whose name is not of the layout are left out and listed as unexpected.

    Args:
        val_labels: class id by number, for validation images whose class is in neither their folder nor their name.

    Raises:
        DataError: the split's folder is missing, has no image, or has validation images without a class.
    """
    folder = root / split.folder
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist; the layout is <root>/train/<class id>/<class id>_<n>.JPEG, "
                        "<root>/val/<class id>/ILSVRC2012_val_<8 digits>.JPEG, "
                        "<root>/test/ILSVRC2012_test_<8 digits>.JPEG")  # fmt: skip
    names = _names_in(folder)
    folders = [] if split is Split.TEST else [name for name in names if name.endswith("/")]

    def files_in(name: str) -> list[str]:
        return [name + file for file in _names_in(folder / name)]

    inside = in_threads(files_in, folders, f"Listing {split.folder}", SCAN_THREADS)
    read = frozenset(folders)
    loose = [name for name in names if name not in read]
    paths = [*loose, *(path for listed in inside for path in listed)]
    listing = max((_sort_out(split, layout, paths) for layout in split.layouts), key=lambda found: found.images)
    if listing.layout == FLAT_VAL and listing.images:
        listing = listing._replace(classes=_by_labels(folder, listing.classes[""], val_labels))
    elif split is Split.VAL:  # files that stay where they were, with a link from the class folder
        linked = {f"val/{FLAT_VAL.format(number=n)}" for numbers in listing.classes.values() for n in numbers}
        listing = listing._replace(unexpected=[path for path in listing.unexpected if path not in linked])
    return listing._replace(without_images=[n[:-1] for n in folders if n[:-1] not in listing.classes])


def entries_of(listing: SplitListing, labels: Labels) -> np.ndarray:
    """Structured [actual_index <u4, class_index <u4, class_id U, class_name U], in the order of class and file name.

    Raises:
        DataError: no images, or a class folder that labels.txt does not name.
    """
    split = listing.split
    if listing.images == 0:
        seen = f"; it holds names such as {listing.unexpected[0]}" if listing.unexpected else ""
        raise DataError(f"{split.folder}/ holds no image of ImageNet's layout{seen}")
    named = [*listing.classes, *listing.without_images]
    if unknown := [class_id for class_id in named if class_id and class_id not in labels.names]:
        raise DataError(
            f"labels.txt does not name {len(unknown)} of the class folders of {split.folder}/: {few(unknown)}"
        )
    index_of = labels.class_index()
    columns = {
        "actual_index": "<u4",
        "class_index": "<u4",
        "class_id": f"U{max(map(len, listing.classes))}",
        "class_name": f"U{max(len(labels.names.get(class_id, '')) for class_id in listing.classes)}",
    }
    entries = np.empty(listing.images, dtype=np.dtype(list(columns.items())))
    start = 0
    for class_id, numbers in listing.classes.items():
        part = entries[start : start + len(numbers)]
        part["actual_index"] = numbers
        part["class_index"] = index_of[class_id] if class_id else NO_CLASS
        part["class_id"] = class_id
        part["class_name"] = labels.names.get(class_id, "")
        start += len(part)
    return entries


def metadata_files(extra: Path, split: Split) -> list[Path]:
    """The files of a split: its entries and, but for TEST, its class ids and names."""
    kinds = ["entries"] if split is Split.TEST else ["entries", "class-ids", "class-names"]
    return [extra / f"{kind}-{split.name}.npy" for kind in kinds]


def write_metadata(extra: Path, split: Split, entries: np.ndarray) -> None:
    """Write a split's files; the entries last, so that whoever finds them finds all.

    Ids and names are by class index, unicode, and empty for classes without an image.
    """
    indices, first = np.unique(entries["class_index"], return_index=True)
    for kind, column in (("class-ids", "class_id"), ("class-names", "class_name")) if split is not Split.TEST else ():
        table = np.zeros(int(indices.max()) + 1, dtype=entries[column].dtype)
        table[indices] = entries[column][first]
        write_array(extra / f"{kind}-{split.name}.npy", table)
    write_array(extra / f"entries-{split.name}.npy", entries)


def changed_since(root: Path, extra: Path, split: Split) -> bool:
    """Whether a folder of the split was changed after its metadata was written."""
    written = min(path.stat().st_mtime for path in metadata_files(extra, split))
    folder = root / split.folder
    with os.scandir(folder) as entries:
        times = [entry.stat().st_mtime for entry in entries if is_folder(entry)] if split is not Split.TEST else []
    return max([folder.stat().st_mtime, *times]) > written


def _sort_out(split: Split, layout: str, paths: list[str]) -> SplitListing:
    """Which paths, relative to the split's folder, are of a layout, and which are not."""
    number = r"(?P<number>0|[1-9]\d*)" if split is Split.TRAIN else r"(?P<number>\d{8})"
    text = re.sub(r"\\\{number[^}]*\}", lambda _: number, re.escape(layout))
    text = text.replace(r"\{class_id\}", "(?P<class_id>[^/]+)", 1).replace(r"\{class_id\}", "(?P=class_id)")
    pattern, classes, unexpected = re.compile(text), defaultdict[str, list[int]](list), []
    for path in paths:
        if found := pattern.fullmatch(path):
            classes[found.groupdict().get("class_id", "")].append(int(found["number"]))
        else:
            unexpected.append(f"{split.folder}/{path}")
    return SplitListing(split, layout, dict(sorted(classes.items())), [], unexpected)


def _by_labels(val: Path, numbers: list[int], labels: Mapping[int, str] | None) -> dict[str, list[int]]:
    if labels is None:
        raise DataError(f"{val}: the images lie in no class folders, and their names do not tell the class",
                        "--val-labels FILE sorts them; --split TRAIN prepares the others without them.")  # fmt: skip
    if unknown := [number for number in numbers if number not in labels]:
        first = FLAT_VAL.format(number=unknown[0])
        raise DataError(f"{SOLUTION} has no label for {len(unknown)} images of {val}, the first {first}")
    classes: dict[str, list[int]] = {}
    for number in sorted(numbers):
        classes.setdefault(labels[number], []).append(number)
    return dict(sorted(classes.items()))


def _names_in(folder: Path) -> list[str]:
    """What is in a folder and not hidden, sorted; folders end with a slash."""
    with os.scandir(folder) as entries:
        names = [entry.name + "/" * is_folder(entry) for entry in entries if not entry.name.startswith(".")]
    return sorted(names)


TAR_THREADS = 8
LARGEST_TAR = 2**32 - 1
END_OF_TAR = "** Block of NULs **"
NOT_IMAGES = {"n06470073_47249.JPEG"}
"""Left out, as in the reference implementation: with it, the index of every later image would be another."""
_LINE = re.compile(r"block (\d+): (.*)")


class Member(NamedTuple):
    """A file in a tar. Offsets in bytes: of its header block, and of the next member."""

    start_offset: int
    end_offset: int
    filename: str


def prepare_imagenet22k(root: Path, extra: Path) -> tuple[int, int]:
    """Write `<extra>/entries.npy` and `<extra>/class-ids.npy`; (images, classes).

    Missing block listings `<root>/blocks/<wnid>.log` are made from the tars first.

    Raises:
        DataError: no tars, one beyond 4 GiB, or a listing that does not fit its tar.
    """
    if not root.is_dir():
        raise DataError(f"{root} is not a folder")
    class_ids = sorted(path.stem for path in root.glob("*.tar"))
    if not class_ids:
        raise DataError(f"{root} holds no <wnid>.tar files")
    for class_id in class_ids:
        size = (root / f"{class_id}.tar").stat().st_size
        if size > LARGEST_TAR:
            raise DataError(
                f"{root / class_id}.tar has {size} bytes: the entries format stores offsets in 32 bits, 4 GiB at most",
                "Split the tar in two, or use the images as a folder or as shards.",
            )
    members = in_threads(lambda class_id: members_of(root, class_id), class_ids, "Reading tars", TAR_THREADS)
    write_array(extra / "class-ids.npy", np.array(class_ids))
    entries = _entries_of_tars(class_ids, members)
    write_array(extra / "entries.npy", entries)
    return len(entries), len(class_ids)


def members_of(root: Path, class_id: str) -> list[Member]:
    """The files of a class's tar by its block listing, which is written first if there is none."""
    log = root / "blocks" / f"{class_id}.log"
    if not log.is_file():
        with writing(log):
            write_text(log, block_listing(root / f"{class_id}.tar"), flush=True)
    blocks: list[tuple[int, str]] = []
    for number, line in enumerate(log.read_text().splitlines(), start=1):
        found = _LINE.fullmatch(line)
        if not found:
            raise DataError(f"{log}, line {number}: expected 'block N: file name', found {line!r}")
        blocks.append((int(found[1]), found[2]))
    if not blocks or blocks[-1][1] != END_OF_TAR:
        raise DataError(f"{log}: does not end with '{END_OF_TAR}'; delete it to have it written from the tar")
    edges = [block for block, _ in blocks]
    size = (root / f"{class_id}.tar").stat().st_size
    if edges != sorted(edges) or edges[-1] * BLOCK > size:
        raise DataError(f"{log}: does not fit {class_id}.tar; delete it to have it written from the tar")
    members = [Member(start * BLOCK, end * BLOCK, name) for (start, name), end in zip(blocks, edges[1:], strict=False)]
    return [member for member in members if member.filename not in NOT_IMAGES]


def block_listing(tar_path: Path) -> str:
    """Lines `block N: name` for a tar's files and a last one for its end, as `tar --list --block-number` prints."""
    lines = []
    try:
        with tarfile.open(tar_path, "r:") as tar:
            for member in tar:
                if member.isfile():
                    lines.append(f"block {member.offset_data // BLOCK - 1}: {member.name}\n")
            end = tar.offset // BLOCK
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{tar_path}: not an uncompressed tar file ({error})") from error
    return "".join(lines) + f"block {end}: {END_OF_TAR}\n"


def _entries_of_tars(class_ids: list[str], members: list[list[Member]]) -> np.ndarray:
    id_length = max(len(class_id) for class_id in class_ids)
    name_length = max((len(m.filename) for of_class in members for m in of_class), default=1)
    columns = {"class_index": "<u4", "class_id": f"U{id_length}", "start_offset": "<u4", "end_offset": "<u4"}
    dtype = np.dtype([*columns.items(), ("filename", f"U{name_length}")])
    entries = np.empty(sum(len(of_class) for of_class in members), dtype=dtype)
    start = 0
    for class_index, (class_id, of_class) in enumerate(zip(class_ids, members, strict=True)):
        part = entries[start : start + len(of_class)]
        part["class_index"] = class_index
        part["class_id"] = class_id
        for field in Member._fields:
            part[field] = [getattr(member, field) for member in of_class]
        start += len(part)
    return entries
