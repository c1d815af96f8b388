"""Keeps what was found on disk (listings of folders, indices of shards) in the user's cache, as memory-mapped arrays.

A finding is valid while every folder or file that it was made from has the modification time it had then.
"""

import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

import numpy as np

from dinov2cli.console import logger

_SETTLED_NS = 2_000_000_000  # a folder changed within 2 s of its reading may change again within its clock's tick


def load(root: Path, kind: list[str]) -> tuple[dict[str, np.ndarray], tuple[str, ...]] | None:
    """The arrays and class names saved for (root, kind), or None if there are none or something changed since."""
    index = _index_path(root, kind)
    try:
        saved = json.loads(index.read_text())
        for name, modified in saved["modified"].items():
            if os.stat(os.path.join(root, name)).st_mtime_ns != modified:
                return None
        arrays = {
            name: np.load(index.with_name(f"{index.stem}-{saved['nonce']}.{name}.npy"), mmap_mode="r")
            for name in saved["arrays"]
        }
    except (OSError, ValueError, KeyError, TypeError):
        return None  # absent or damaged: it will be made anew
    return arrays, tuple(saved["class_names"])


def save(
    root: Path,
    kind: list[str],
    arrays: dict[str, np.ndarray],
    class_names: tuple[str, ...],
    modified: dict[str, int],
    started_ns: int,
) -> None:
    """Save a finding about `root` that was begun at `started_ns`. A cache that cannot be written is done without.

    Args:
        modified: what the finding was made from, as paths relative to `root`, with their times in nanoseconds.
    """
    if any(time > started_ns - _SETTLED_NS for time in modified.values()):
        return
    index = _index_path(root, kind)
    nonce = secrets.token_hex(4)
    content: dict[str, Any] = {
        "root": str(root), "nonce": nonce, "arrays": sorted(arrays), "class_names": class_names, "modified": modified,
    }  # fmt: skip
    try:
        index.parent.mkdir(parents=True, exist_ok=True)
        earlier = list(index.parent.glob(f"{index.stem}-*.npy"))
        for name, values in arrays.items():
            np.save(index.with_name(f"{index.stem}-{nonce}.{name}.npy"), values)
        aside = index.with_name(f"{index.stem}-{nonce}.tmp")
        aside.write_text(json.dumps(content))
        os.replace(aside, index)
        for path in earlier:
            path.unlink(missing_ok=True)
    except OSError as error:
        logger.info("the listing of %s is not kept in %s (%s)", root, index.parent, error)


def _index_path(root: Path, kind: list[str]) -> Path:
    key = hashlib.sha256("\0".join([os.path.abspath(root), *kind]).encode(errors="surrogateescape")).hexdigest()[:20]
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "dino2" / "listings" / f"{key}.json"
