"""Checkpoints that appear complete or not at all: training state to resume from, and teachers to evaluate.

A training checkpoint is a folder `checkpoints/iteration_00000120` (120 iterations done) in the format of
torch.distributed.checkpoint, so that it can be loaded on another number of processes, with a manifest of sizes and
checksums beside the data.
"""

import copy
import json
import shutil
import warnings
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from dinov2cli import distributed
from dinov2cli.checkpoint_reading import load_safely
from dinov2cli.console import logger
from dinov2cli.errors import OF_A_LOADER, CheckpointError
from dinov2cli.files import flush_to_disk, replacing, write_text

MANIFEST, CHECKSUM = "manifest.json", "crc32"
PREFIX = "iteration_"


class Checkpointer:
    """Writes, finds and loads the training checkpoints of a run.

    Writing happens in the background, on all processes together; training waits only for the copy of the state to main
    memory. Where a process group exists, every process must make the same calls in the same order.

    Args:
        folder: holds one folder for each checkpoint.
        keep: how many of the newest to keep.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep
        # A group of its own: the writer's messages must not mix with those of the training that goes on meanwhile.
        self._group = dist.new_group(backend="gloo") if distributed.is_initialized() else None
        self._writing: Future[None] | None = None
        self._copies = HostCopies()
        self._looked: dict[Path, str | None] = {}  # what is wrong with checkpoints that were there before

    def save(
        self, iteration: int, state: dict[str, Any], *, facts: Mapping[str, int] | None = None, wait: bool = True
    ) -> Path:
        """Write `state` (nested dicts of tensors and plain values) as the checkpoint after `iteration` iterations.

        Written aside, flushed to disk, then renamed: a run killed at any moment leaves only complete checkpoints under
        their names. Older ones beyond `keep` are deleted afterwards.

        Args:
            facts: small numbers that can be read before the checkpoint is loaded (see `newest`).
            wait: return once it is written; otherwise once it is copied, and `finish` tells how the writing went. A
                checkpoint that is still being written is waited for first.

        Raises:
            CheckpointError: the disk is full or not writable (of this checkpoint or the one before, still in writing);
                earlier checkpoints are intact.
        """
        self.finish()
        final = self.folder / f"{PREFIX}{iteration:08d}"
        self._looked.pop(final, None)
        manifest = {"iteration": iteration, **(facts or {})}
        if wait:
            self._write(final, state, manifest)
        else:
            writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
            self._writing = writer.submit(self._write, final, self._copies.of(state), manifest)
            writer.shutdown(wait=False)  # its thread ends with this checkpoint
        return final

    def finish(self) -> None:
        """Wait until the checkpoint that is being written, if any, is complete.

        Raises:
            CheckpointError: it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def failed(self) -> bool:
        """Whether this process knows that the checkpoint being written has failed; `finish` then raises."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def newest(self) -> tuple[int, dict[str, int]]:
        """Iteration and facts (see `save`) of the newest checkpoint that is whole, which is the one to be loaded.

        Raises:
            CheckpointError: none is.
        """
        for iteration, path in self.list():
            if self._problem(path) is None:
                manifest = _read_manifest(path)
                return iteration, {key: value for key, value in manifest.items() if isinstance(value, int)}
        raise self._none_whole()

    def _write(self, final: Path, state: dict[str, Any], manifest: dict[str, Any]) -> None:
        aside = self.folder / f".{final.name}.incomplete"
        problem = _problem_of(_make_room, aside, tensor_bytes(state)) if distributed.is_main() else None
        problem = distributed.broadcast_object(problem, self._group)
        if problem is None:
            problem = _problem_of(self._on_disk, dcp.save, state, aside)  # an error in a process is raised by all
            if problem is None and distributed.is_main():
                problem = _problem_of(self._complete, aside, final, manifest)
            problem = distributed.broadcast_object(problem, self._group)
        if problem is not None:
            if distributed.is_main():
                shutil.rmtree(aside, ignore_errors=True)
            if OF_A_LOADER in problem:
                raise RuntimeError(problem)
            raise CheckpointError(
                f"{final}: the checkpoint could not be written: {problem}",
                "Earlier checkpoints are intact. Make space (or make the folder writable) and run the same command "
                "again: training resumes from the newest of them.",
            )

    def _on_disk(self, act: Callable[..., object], state: dict[str, Any], folder: Path) -> None:
        """`dcp.save` or `load_safely` of every process's part, without torch's warning that there is no process group:
        a single process has none on purpose."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
            act(state, checkpoint_id=folder, process_group=self._group, no_dist=self._group is None)

    def _complete(self, aside: Path, final: Path, manifest: dict[str, Any]) -> None:
        _write_manifest(aside, manifest)
        if final.exists():
            shutil.rmtree(final)
        aside.rename(final)
        flush_to_disk(self.folder)
        self._delete_old()

    def load_latest(self, state: dict[str, Any]) -> int | None:
        """Load the newest checkpoint that is whole into the tensors of `state`, in place.

        A damaged one is passed over for the one before, with a warning that says so.

        Returns:
            its iteration, or None where there is no checkpoint.

        Raises:
            CheckpointError: there are checkpoints, and none can be loaded.
        """
        found = self.list()
        for iteration, path in found:
            if self._problem(path) is None:
                try:
                    self._on_disk(load_safely, state, path)
                except (Exception, dcp.CheckpointException) as error:
                    self._pass_over(path, _innermost(error))
                else:
                    return iteration
        if found:
            raise self._none_whole()
        return None

    def _problem(self, path: Path) -> str | None:
        """What is wrong with a checkpoint, or None; a damaged one is passed over. The first process looks, once."""
        if path not in self._looked:
            problem = distributed.broadcast_object(_damage(path) if distributed.is_main() else None)
            self._looked[path] = None
            if problem is not None:
                self._pass_over(path, problem)
        return self._looked[path]

    def _pass_over(self, path: Path, problem: str) -> None:
        self._looked[path] = problem
        if distributed.is_main():
            logger.warning("checkpoint passed over: %s: %s", path, problem)

    def _none_whole(self) -> CheckpointError:
        damaged = "; ".join(f"{path}: {problem}" for path, problem in self._looked.items() if problem is not None)
        return CheckpointError(
            f"no checkpoint of this run can be loaded: {damaged}",
            "Start over with --no-resume, or choose another --output-dir.",
        )

    def list(self) -> list[tuple[int, Path]]:
        """(iteration, folder) of the complete checkpoints, newest first."""
        found = [(int(p.name.removeprefix(PREFIX)), p) for p in self.folder.glob(f"{PREFIX}*") if p.is_dir()]
        return sorted(found, reverse=True)

    def _delete_old(self) -> None:
        for _, path in self.list()[self.keep :]:
            # Renamed first: a kill during the deletion must not leave half a checkpoint under a good name.
            doomed = path.with_name(f".{path.name}.incomplete")
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
        for leftover in self.folder.glob(f".{PREFIX}*.incomplete"):
            shutil.rmtree(leftover, ignore_errors=True)


def save_teacher(path: Path, teacher_state: Mapping[str, torch.Tensor]) -> None:
    """Write `{"teacher": {"backbone.*", "dino_head.*", ...}}`, the reference's teacher checkpoint, atomically.

    Raises:
        CheckpointError: the file cannot be written.
    """
    try:
        with replacing(path, flush=True) as aside, aside.open("wb") as file:
            torch.save({"teacher": {key: value.detach().cpu() for key, value in teacher_state.items()}}, file)
    except (OSError, RuntimeError) as error:
        if OF_A_LOADER in str(error):
            raise
        raise CheckpointError(f"{path}: the teacher checkpoint could not be written: {_innermost(error)}") from error


def tensor_bytes(value: object) -> int:
    """Bytes of all tensors in nested dicts, whole ones of sharded tensors."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(tensor_bytes(inner) for inner in value.values())
    return 0


class HostCopies:
    """Copies of a state in main memory, which are kept: writing over them is faster than asking for new memory."""

    def __init__(self) -> None:
        self._copies: dict[tuple[str, ...], torch.Tensor] = {}

    def of(self, value: Any, name: tuple[str, ...] = ()) -> Any:
        """The same nested dicts with every tensor copied, shards as shards. Overwrites what it gave before."""
        if isinstance(value, Mapping):
            return {key: self.of(inner, (*name, key)) for key, inner in value.items()}
        if isinstance(value, DTensor):
            mesh = value.device_mesh if value.device_mesh.device_type == "cpu" else _on_cpu(value.device_mesh)
            local = self._copy(value.to_local(), name)
            return DTensor.from_local(
                local, mesh, value.placements, run_check=False, shape=value.shape, stride=value.stride()
            )
        return self._copy(value, name) if isinstance(value, torch.Tensor) else copy.copy(value)

    def _copy(self, tensor: torch.Tensor, name: tuple[str, ...]) -> torch.Tensor:
        kept = self._copies.get(name)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            # Page-locked memory for what comes from a GPU: copies to it are several times as fast.
            kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._copies[name] = kept
        return kept.copy_(tensor.detach())


@lru_cache(maxsize=4)  # collective where it is not cached
def _on_cpu(mesh: DeviceMesh) -> DeviceMesh:
    return DeviceMesh("cpu", mesh.mesh, mesh_dim_names=mesh.mesh_dim_names)


def _problem_of(work: Callable[..., object], *arguments: object) -> str | None:
    """What went wrong, in words, or None. Torch's own error of checkpoints is no `Exception`."""
    try:
        work(*arguments)
    except (Exception, dcp.CheckpointException) as error:
        return _innermost(error)
    return None


def _make_room(aside: Path, needed: int) -> None:
    """An empty folder. Torch reports a disk that fills up in words nobody understands: so ask for the space first."""
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    free = shutil.disk_usage(aside).free
    if needed > free:
        raise OSError(f"No space left on device: it needs {needed / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free")


def _write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """Facts, sizes and checksums of all files; its presence says that the rest is complete."""
    files = {p.name: {"bytes": p.stat().st_size, "crc32": _crc32(p)} for p in sorted(folder.iterdir())}
    content = {**facts, "files": files}
    write_text(folder / MANIFEST, json.dumps({**content, CHECKSUM: _crc32_of(content)}, indent=1), flush=True)
    flush_to_disk(folder)


def _read_manifest(folder: Path) -> dict[str, Any]:
    """A checkpoint's manifest. Older ones have no checksum of their own. Errors as `_damage` catches."""
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    if (told := manifest.pop(CHECKSUM, None)) is not None and told != _crc32_of(manifest):
        raise ValueError("the manifest is damaged (checksum)")
    return manifest


def _crc32_of(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    try:
        manifest = _read_manifest(folder)
        for name, expected in manifest["files"].items():
            size = (folder / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes instead of {expected['bytes']}"
            if _crc32(folder / name) != expected["crc32"]:
                return f"{name} is damaged (checksum)"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"incomplete ({_innermost(error)})"
    return None


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _innermost(error: BaseException) -> str:
    """The message of the error that started it: torch wraps a full disk in errors of its own."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    if failures := getattr(error, "failures", None):  # torch.distributed.checkpoint.CheckpointException
        error = next(iter(failures.values()))[0]
    line = (str(error).strip().splitlines() or [""])[-1]
    full = "No space left on device, or " if "unexpected pos" in line else ""  # as torch calls a file that is short
    return f"{full}{type(error).__name__}: {line}"
