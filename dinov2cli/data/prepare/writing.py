"""Files that appear whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dinov2cli.errors import EnvironmentProblem


def write_array(path: Path, array: np.ndarray) -> None:
    """Write a `.npy` file atomically."""
    _write(path, lambda file: np.save(file, array))


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically, with newlines as they are."""
    _write(path, lambda file: file.write(text.encode()))


def _write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        raise EnvironmentProblem(f"{path} cannot be written ({error.strerror})") from error
    finally:
        aside.unlink(missing_ok=True)
