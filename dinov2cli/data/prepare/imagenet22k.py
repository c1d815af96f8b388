"""The metadata files of ImageNet-22k: `entries.npy` and `class-ids.npy`, from the tars' block listings."""

import re
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dinov2cli.console import progress
from dinov2cli.data.datasets.imagenet22k import BLOCK
from dinov2cli.errors import DataError
from dinov2cli.files import write_array, write_text, writing

SCAN_THREADS = 8
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
    with progress() as bar, ThreadPoolExecutor(SCAN_THREADS) as pool:
        found = pool.map(lambda class_id: members_of(root, class_id), class_ids)
        members = list(bar.track(found, total=len(class_ids), description="Reading tars"))
    write_array(extra / "class-ids.npy", np.array(class_ids))
    entries = _entries(class_ids, members)
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


def _entries(class_ids: list[str], members: list[list[Member]]) -> np.ndarray:
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
