"""Reading weights from disk without running anything that the file brings along, and writing safetensors."""

import json
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dinov2cli.console import logger
from dinov2cli.errors import WeightsError

# Files that start like this are known, and are no weights; said so that the right file is fetched.
_FIRST_BYTES = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself: run `git lfs pull`"),
    (b"<!DOCTYPE", "an HTML page, not weights: the download led to a web page"),
    (b"<html", "an HTML page, not weights: the download led to a web page"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x1f\x8b", "a gzip archive: unpack it first"),
    (b"\x89HDF", "an HDF5 (Keras) file"),
    (b"GGUF", "a GGUF file"),
)


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """A `.safetensors` file with the permissions of any other new file: the library alone would keep it private.

    Raises:
        OSError, SafetensorError: it cannot be written.
    """
    path.touch()
    permissions = path.stat().st_mode
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    path.chmod(permissions)


def read_tensors(path: Path) -> tuple[Any, dict[str, str]]:
    """The content of a `.safetensors` or PyTorch file and its metadata (empty for PyTorch files).

    Only tensors and plain containers are unpickled (`weights_only`), so a hostile file cannot run code.

    Raises:
        WeightsError: the file is missing, empty, cut short, something else, or asks to run code.
    """
    refuse_other_files(path)
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        except (SafetensorError, json.JSONDecodeError) as error:
            raise WeightsError(f"{path}: not a complete safetensors file ({error}); fetch it again") from None
    if path.suffix in (".onnx", ".pt2"):
        raise WeightsError(f"{path}: an exported graph cannot be read back as weights; give the weights it came from")
    return _read_pickle(path), {}


def refuse_other_files(path: Path) -> None:
    """Refuse what its first bytes show to be no weights: web pages, images, pointers, empty files.

    Raises:
        WeightsError: saying what the file is.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise WeightsError(f"{path}: the file is empty")
    for start, what in _FIRST_BYTES:
        if head.lstrip().lower().startswith(start.lower()):
            raise WeightsError(f"{path}: {what}")


def refuse_cut_files(path: Path) -> None:
    """Refuse a file whose structure shows that its end is missing, without reading its tensors.

    Raises:
        WeightsError: a safetensors file shorter than its header says, or a zip archive without its directory.
    """
    with path.open("rb") as file:
        head = file.read(8)
    if path.suffix == ".safetensors" or path.name.endswith(".safetensors.part"):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, json.JSONDecodeError) as error:
            raise WeightsError(f"{path}: not a complete safetensors file ({error})") from None
    elif head.startswith(b"PK\x03\x04") and not zipfile.is_zipfile(path):
        raise WeightsError(f"{path}: cut short; the directory at the end of the archive is missing")


def refuse_odd_tensors(tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuse tensors that are not plain arrays, or that claim more numbers than the file holds for them.

    Raises:
        WeightsError: naming the first.
    """
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            kind = "quantized" if tensor.is_quantized else "without data" if tensor.is_meta else str(tensor.layout)
            raise WeightsError(f"{source}: '{name}' is no plain tensor ({kind})")
        if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            raise WeightsError(f"{source}: '{name}' of shape {tuple(tensor.shape)} is larger than its data")


def refuse_others(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], what: str, source: str) -> None:
    """Refuse tensors that do not have exactly these names and shapes, with finite numbers.

    Args:
        what: the model that has them, in words.

    Raises:
        WeightsError: naming those that are missing, too many or of another shape.
    """
    wrong = {"missing": shapes.keys() - tensors.keys(), "unknown": tensors.keys() - shapes.keys()}
    if parts := [f"{kind}: {_some(sorted(names))}" for kind, names in wrong.items() if names]:
        raise WeightsError(f"{source}: not the weights of {what}; {'; '.join(parts)}")
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise WeightsError(f"{source}: '{name}' has shape {tuple(tensors[name].shape)}, expected {shape}")
    if broken := [name for name, tensor in tensors.items() if tensor.is_complex() or not tensor.isfinite().all()]:
        raise WeightsError(f"{source}: weights that are not finite numbers (NaN or infinity): {_some(broken)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def is_complete(path: Path) -> bool:
    """Whether a file written by `torch.save` has its end: a cut zip archive has lost its directory."""
    return path.is_file() and zipfile.is_zipfile(path)


def _read_pickle(path: Path) -> Any:
    archive = zipfile.is_zipfile(path)
    if archive:
        try:
            with zipfile.ZipFile(path) as opened:
                names = opened.namelist()
        except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error):  # what a damaged directory says
            raise WeightsError(f"{path}: the directory of the archive is damaged; fetch it again") from None
        if any(name.endswith("constants.pkl") for name in names):
            raise WeightsError(f"{path}: a TorchScript model; dino2 reads state dicts")
        if not any(name.endswith("data.pkl") for name in names):
            raise WeightsError(f"{path}: a zip archive that torch.save did not write")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except pickle.UnpicklingError as error:
        wanted = _unsafe_names(path)
        if wanted:
            raise WeightsError(
                f"{path}: holds more than tensors (it asks for {', '.join(wanted)}), which could run code; refused"
                + _about_rank_files(path, wanted),
                hint="Ask its author for a file of tensors only (a state dict, or safetensors).",
            ) from None
        if "legacy" in str(error).lower() or "magic" in str(error).lower() or not archive:
            raise WeightsError(f"{path}: not a PyTorch file, or cut short; fetch it again") from None
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise WeightsError(f"{path}: cannot be read as tensors ({reason})") from None
    except Exception as error:  # the unpickler raises whatever a damaged file makes it come upon
        logger.debug("torch.load of %s: %s", path, error)
        raise WeightsError(f"{path}: not a PyTorch file, or cut short; fetch it again") from None


def _unsafe_names(path: Path) -> list[str]:
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # no zip archive: the old format has no index; or a damaged one
        return []


def _about_rank_files(path: Path, wanted: list[str]) -> str:
    if ".rank_" in path.name or any("ShardedTensor" in name or "_shard" in name for name in wanted):
        return (
            ". It looks like one rank's file of an FSDP training checkpoint, which holds pieces of the weights without "
            "their shapes: use the run's eval/training_<iteration>/teacher_checkpoint.pth"
        )
    return ""
