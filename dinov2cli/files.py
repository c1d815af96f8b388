"""Files that appear whole or not at all, and not in the place of others'; checksums and locks."""

import hashlib
import io
import json
import math
import os
import shutil
import struct
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinov2cli.errors import EnvironmentProblem

if TYPE_CHECKING:
    import numpy as np


@contextmanager
def replacing(path: Path, *, flush: bool = False) -> Iterator[Path]:
    """A name beside `path` to write a file or a folder under, which takes the place of `path` at the end.

    Where the block raises, what it wrote is removed and `path` is as it was. Folders above are made.

    Args:
        flush: have a file reach the disk before it is moved: it outlasts a loss of power.

    Raises:
        OSError: the place cannot be written.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield aside
        if flush:
            flush_to_disk(aside)
        if aside.is_dir():  # a rename replaces an empty folder only
            shutil.rmtree(path, ignore_errors=True)
        os.replace(aside, path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename in (aside, str(aside)):
            error.filename = str(path)  # the name that people know
        with suppress(OSError):  # a disk that is away, or read-only
            if aside.is_dir():
                shutil.rmtree(aside, ignore_errors=True)
            else:
                aside.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, content: bytes, *, flush: bool = False) -> None:
    """Write a file, whole or not at all. Arguments and errors as in `replacing`."""
    with replacing(path, flush=flush) as aside:
        aside.write_bytes(content)


def write_text(path: Path, text: str, *, flush: bool = False) -> None:
    """Write UTF-8 with newlines as they are, whole or not at all. Arguments and errors as in `replacing`."""
    write_bytes(path, text.encode(), flush=flush)


def write_array(path: Path, array: "np.ndarray") -> None:
    """Write a `.npy` file that outlasts a loss of power, whole or not at all.

    Raises:
        EnvironmentProblem: the place cannot be written.
    """
    import numpy as np

    with writing(path), replacing(path, flush=True) as aside, aside.open("wb") as file:
        np.save(file, array)


def append_rows(path: Path, rows: "np.ndarray", at: int) -> None:
    """Write rows from row `at` of a `.npy` file on, whose rows are of the same shape and dtype.

    They are on the disk when this returns. The header follows the rows: whenever this is cut short, the file is what it
    was up to row `at`.

    Raises:
        OSError: the file cannot be written.
    """
    import numpy as np

    described = np.lib.format.header_data_from_array_1_0(rows)

    def header(count: int) -> bytes:
        written = io.BytesIO()
        np.lib.format.write_array_header_1_0(written, {**described, "shape": (count, *rows.shape[1:])})
        return written.getvalue()  # of one length: numpy leaves space for a larger count

    with path.open("r+b") as file:
        file.seek(len(header(0)) + at * (rows.nbytes // max(1, len(rows))))
        file.write(np.ascontiguousarray(rows).tobytes())
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        file.write(header(at + len(rows)))
    flush_to_disk(path)


def flush_to_disk(path: Path) -> None:
    """Return when the content of a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError inside into an EnvironmentProblem that says that `path` cannot be written, and why."""
    try:
        yield
    except OSError as error:
        raise EnvironmentProblem(
            f"{path}: cannot be written ({error.strerror or error})",
            "Make space (or make the folder writable) and run the same command again.",
        ) from error


MARK = "dino2"
_SAYS = b"tEXtSoftware\0" + MARK.encode()
_CHUNK = struct.pack(">I", len(_SAYS) - 4) + _SAYS + struct.pack(">I", zlib.crc32(_SAYS))
_AFTER_HEADER = 33
"""Bytes to where a PNG file's signature and first chunk end."""
GIF_COMMENT = b"\x21\xfe\x05" + MARK.encode() + b"\0;"
"""How a GIF of ours ends."""
OUR_ARRAYS = (".depth.npy", ".classes.npy")
"""How names end of arrays that are written beside pictures."""


def marked(png: bytes) -> bytes:
    """The bytes of a PNG file that says that dino2 wrote it."""
    return png[:_AFTER_HEADER] + _CHUNK + png[_AFTER_HEADER:]


def is_drawn_here(path: Path) -> bool:
    """Whether a file is a PNG picture that is `marked`, or by its name one of our arrays."""
    if path.name.endswith(OUR_ARRAYS):
        return True
    if path.suffix.lower() != ".png" or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(_AFTER_HEADER + len(_CHUNK))[_AFTER_HEADER:] == _CHUNK


def keep_others(path: Path) -> None:
    """Raise, before anything is drawn, where that would replace a picture, a video or a page that dino2 has not
    written: whoever names no output has named the last of the inputs.

    Raises:
        EnvironmentProblem: such a file is there.
    """
    if path.is_file() and path.stat().st_size and not _is_ours(path):
        raise EnvironmentProblem(
            f"{path}: is there, and dino2 has not drawn it, so that it is not replaced",
            "Name another output; of several paths it is the last.",
        )


def _is_ours(path: Path) -> bool:
    suffix = path.suffix.lower()
    if suffix in (".png", ".html", ".gif"):
        with path.open("rb") as file:
            head = file.read(4096)
            file.seek(-min(len(head), len(GIF_COMMENT)), os.SEEK_END)
            tail = file.read()
        if suffix == ".png":
            return is_drawn_here(path) or b"Matplotlib" in head
        return tail == GIF_COMMENT if suffix == ".gif" else MARK.encode() in head
    import av

    try:
        with av.open(str(path)) as container:
            return MARK in container.metadata.values()
    except (av.error.FFmpegError, OSError):
        return False


def check_folder(path: Path, option: str) -> None:
    """Say, without writing, why a folder that an option names cannot be made or written to.

    Raises:
        EnvironmentProblem: it cannot.
    """
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not there.is_dir():
        raise EnvironmentProblem(f"{option} {path}: {there} is a file, not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise EnvironmentProblem(f"{option} {path}: {there} is not yours to write to")


def user_path(text: str | Path) -> Path:
    """A path as it was typed or configured, with `~` for a home folder; as it is where nobody has that name.

    `Path.expanduser` raises RuntimeError then.
    """
    return Path(os.path.expanduser(text))


def lock(path: Path) -> AbstractContextManager[object]:
    """A lock that processes take by the name of a file, which they make beside it."""
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path.with_name(path.name + ".lock"))


@contextmanager
def locked_now(path: Path, taken: EnvironmentProblem) -> Iterator[None]:
    """Hold the lock of `path`; raise `taken` where another process holds it.

    A folder that is made for the lock, and gets nothing else, is taken away again.
    """
    from filelock import Timeout

    is_new = not path.parent.exists()
    with writing(path.parent):
        held: Any = lock(path)
        try:
            held.acquire(timeout=0)
        except Timeout:
            raise taken from None
    try:
        yield
    finally:
        held.release()
        if is_new and os.listdir(path.parent) == [name := f"{path.name}.lock"]:
            with suppress(OSError):
                (path.parent / name).unlink()
                path.parent.rmdir()


def digest(text: str) -> str:
    """SHA-256 of a text, in hexadecimal: what cached things are named after."""
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def sha256(*files: Path) -> str:
    """SHA-256 of the contents of files, one after the other, in hexadecimal."""
    found = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: found)
    return found.hexdigest()


def fingerprint(*files: Path) -> str:
    """What tells large files from others at once: a hash of their sizes and of 64 parts of each, in hexadecimal."""
    found, part = hashlib.sha256(), 1 << 16
    for path in files:
        size = path.stat().st_size
        found.update(str(size).encode())
        with path.open("rb") as file:
            for at in range(0, size, max(part, size // 64)):
                file.seek(at)
                found.update(file.read(part))
    return found.hexdigest()[:32]


MOST_YAML_VALUES = 100_000


def last_json_lines(path: Path, count: int) -> list[dict[str, Any]]:
    """The last lines of a file of JSON, less those that are not whole; only its end is read."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 2000 * count))
        lines = file.read().decode(errors="replace").splitlines()[-count:]
    found = []
    for line in lines:
        with suppress(ValueError):  # the first may be cut, and the last is being written
            found.append(json.loads(line))
    return found


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text that others have written.

    Raises:
        ValueError: it is none, not UTF-8, or nested beyond all use.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def parse_yaml(text: str, loader: Any = None) -> Any:
    """The value of a YAML text that others have written, by a safe loader.

    Raises:
        yaml.YAMLError: it is none, nested beyond all use, or a few lines whose aliases stand for millions of values.
    """
    import yaml

    reader = (loader or yaml.SafeLoader)(text)
    try:
        node = reader.get_single_node()
        if node is not None and _values_in(node, {}) > MOST_YAML_VALUES:
            raise yaml.YAMLError(f"its aliases make more than {MOST_YAML_VALUES:,} values of it")
        return None if node is None else reader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    except (ValueError, TypeError, AttributeError, OverflowError) as error:  # a date or number that is none, odd keys
        raise yaml.YAMLError(str(error)) from None
    finally:
        reader.dispose()


def _values_in(node: Any, known: dict[int, float]) -> float:
    """How many values a YAML node stands for, its aliases written out; infinite where it holds itself."""
    if not isinstance(node.value, list):
        return 1
    if id(node) not in known:
        known[id(node)] = math.inf
        parts = [part for entry in node.value for part in (entry if isinstance(entry, tuple) else (entry,))]
        known[id(node)] = 1 + sum(_values_in(part, known) for part in parts)
    return known[id(node)]
