"""Checks of what a run reads and writes: images, run folder, checkpoints, disk space, memory.

Every process writes and reads for itself, because what one node sees another may not.
"""

import contextlib
import os
import random
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

import torch

from dinov2cli import distributed
from dinov2cli.checkpoint import Checkpointer
from dinov2cli.config import Config
from dinov2cli.data.datasets import ImageDataset, UnreadableImage, make_dataset
from dinov2cli.data.decoding import Reading
from dinov2cli.data.look import look_at
from dinov2cli.doctor.finding import Check, Finding, Situation, Status, failure, ok, warning
from dinov2cli.doctor.machine import shared_memory
from dinov2cli.errors import Dino2Error, EnvironmentProblem
from dinov2cli.files import flush_to_disk
from dinov2cli.train.memory import Need
from dinov2cli.train.objective import SSLMetaArch
from dinov2cli.train.run_folder import RunFolder

T = TypeVar("T")

FILE_SECONDS = 45
"""How long reading a few images or files may take before their disk is taken for hanging."""
SEEN_SECONDS = 10
"""How long a file of one node may take to appear on another: network file systems cache what they have listed."""
MARK = ".dino2-preflight"


def dataset(situation: Situation) -> Finding:
    """A few random images of the training set, decoded by every process; as many images for all."""
    images, here = _try_images(situation)
    counts = distributed.all_gather_objects(len(images) if images is not None else -1)
    if images is None or (here is not None and here.status is Status.FAILURE):
        return here or failure("no images", "")
    if others := sorted({count for count in counts if count not in (-1, len(images))}):
        return failure(
            f"process {distributed.rank()} finds {len(images)} images where others find {', '.join(map(str, others))}",
            "All nodes must see the same files: put them on a shared file system, or copy them anew.",
        )
    return here or ok(images.describe(), images=len(images))


def _try_images(situation: Situation) -> tuple[ImageDataset | None, Finding | None]:
    """The training set, and what there is to say about it beyond its description. Not collective."""
    asked = situation.config.train.dataset_path
    try:
        images = situation.dataset or make_dataset(asked)  # listing millions of files takes the time it takes
        wanted = min(32 if situation.thorough else 4, len(images))
        sample = random.Random().sample(range(len(images)), wanted)
        began = time.perf_counter()
        bad = within(
            FILE_SECONDS,
            f"{asked}: reading {wanted} images",
            lambda: _unreadable(images, sample, Reading.of(situation.config.images(), situation.config)),
        )
        milliseconds = 1000 * (time.perf_counter() - began) / wanted
    except Dino2Error as error:
        return None, failure(error.message, error.hint or "")
    limit = situation.config.train.max_bad_fraction
    if bad:
        text = f"{len(bad)} of {wanted} random images cannot be read, such as {bad[0]}"
        remedy = f"Mend or remove them; a run stops when more than {limit:.0%} are bad (train.max_bad_fraction)."
        return images, (failure if len(bad) > max(wanted * limit, wanted / 2) else warning)(text, remedy)
    if situation.thorough:
        look = look_at(images, Reading.of(situation.config.images(), situation.config))
        text = f"{images.describe()}; {look}; {wanted} random ones decoded in {milliseconds:.3g} ms each"
        if mixtures := list(look.mixtures()):
            return images, warning(
                f"{text}; {'; '.join(mixtures)}",
                "Where they do not show the same range of values, set data.value_range, or train on one kind of them.",
            )
        return images, ok(text, images=len(images), decode_ms=milliseconds)
    return images, None


def _unreadable(images: ImageDataset, sample: list[int], reading: Reading) -> list[str]:
    bad = []
    for index in sample:
        try:
            images.image(index, reading)
        except UnreadableImage as error:
            bad.append(str(error))
    return bad


def output_folder(situation: Situation) -> Finding:
    """Whether every process can write to the run folder, and whether it is the same folder for all of them."""
    token = distributed.broadcast_object(uuid.uuid4().hex)
    folder, rank = situation.folder, distributed.rank()
    mine, first = (folder / f"{MARK}-{token}-{number}" for number in (rank, 0))
    # Process 0 goes first, so that no other creates a folder of its own where the file system is not shared.
    made: list[Path] = []  # a run has made its folder; `dino2 doctor` leaves nothing behind
    problem = distributed.broadcast_object(_write(mine, token, made) if rank == 0 else "")
    seen = bool(problem) or rank == 0 or _appears(first, token)
    if not problem and rank > 0 and seen:
        problem = _write(mine, token, made)
    distributed.barrier()  # others may look for the files of process 0 until here
    if not problem and seen:
        mine.unlink(missing_ok=True)
    distributed.barrier()
    _remove_empty(made)
    if problem:
        return failure(
            f"{folder} cannot be written to: {problem}",
            "Make space (or make the folder writable on all nodes) and run the same command again, or choose another "
            "--output-dir.",
        )
    if not seen:
        return failure(
            f"{folder} is not the folder that process 0 writes to: its files do not appear there",
            "Choose an --output-dir on a file system that all nodes share.",
        )
    shared = f"; the same for all {distributed.world_size()} processes" if distributed.world_size() > 1 else ""
    return ok(f"{folder} is writable{shared}")


def _write(path: Path, text: str, made: list[Path]) -> str:
    """Write a small file and create its folder (what was created is added to `made`); the reason why not, or ''."""
    missing = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]

    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        flush_to_disk(path)

    try:
        within(FILE_SECONDS, str(path.parent), write)
    except OSError as error:
        return error.strerror or str(error)
    except EnvironmentProblem as error:
        return error.message
    finally:
        made += [folder for folder in missing if folder.exists()]
    return ""


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):  # another process has been quicker, or somebody uses it already
            folder.rmdir()


def _appears(path: Path, text: str) -> bool:
    end = time.monotonic() + SEEN_SECONDS
    while time.monotonic() < end:
        with contextlib.suppress(OSError):  # not there yet, or never
            if path.read_text() == text:
                return True
        time.sleep(0.1)
    return False


def disk_space(situation: Situation) -> Finding:
    """Room for the checkpoints that the run keeps and the one being written."""
    size, keep = checkpoint_bytes(situation.config), situation.config.train.keep
    held = sum(file.stat().st_size for file in RunFolder(situation.folder).checkpoints.rglob("*") if file.is_file())
    needed = max(0, (keep + 1) * size - held)
    there = next(path for path in (situation.folder, *situation.folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    text = f"{free / 1e9:,.3g} GB free; {keep} checkpoints and one being written take {(keep + 1) * size / 1e9:,.3g} GB"
    facts = {"free_bytes": free, "checkpoint_bytes": size}
    if free < needed:
        return failure(
            f"{there}: {text}",
            f"Free {(needed - free) / 1e9:,.3g} GB, lower train.keep, or choose another --output-dir.",
            **facts,
        )
    return ok(text, **facts)


def checkpoint_bytes(config: Config) -> int:
    """Size of a training checkpoint: student, teacher and centers, and Adam's two moments, in float32."""
    with torch.device("meta"):  # shapes only
        networks = SSLMetaArch(config, "sdpa")
    student = sum(parameter.numel() for parameter in networks.student.parameters())
    tensors: int = sum(tensor.numel() for tensor in networks.saved_state().values())
    return 4 * (tensors + 2 * student)


def memory(situation: Situation) -> Finding:
    """What a process is expected to need at its peak, against what its device has."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    need = Need.of(situation.config, situation.device, distributed.world_size(), here)
    facts = {"needed_gb": need.expected.total, "memory_gb": need.there, "sharding": need.run["sharding"]}
    if not need.is_tight:
        return ok(str(need), **facts)
    # A run that is resumed on more processes takes smaller batches than its configuration says.
    refused = need.is_too_much and not RunFolder(situation.folder).has_checkpoints()
    return (failure if refused else warning)(str(need), need.remedy(), **facts)


def checkpoint(situation: Situation) -> Finding:
    """A small checkpoint, written by all processes to the run folder and read back."""
    token = distributed.broadcast_object(uuid.uuid4().hex)
    place = situation.folder / f"{MARK}-{token}"
    made = [folder for folder in place.parents if not folder.exists()]
    written = torch.randn(250_000, generator=torch.Generator().manual_seed(0))
    read = torch.zeros_like(written)
    checkpointer = Checkpointer(place, keep=1)
    began = time.perf_counter()
    try:
        checkpointer.save(1, {"tensor": written})
        iteration = checkpointer.load_latest({"tensor": read})
        seconds = time.perf_counter() - began
    finally:
        distributed.barrier()
        if distributed.is_main():
            shutil.rmtree(place, ignore_errors=True)
            _remove_empty(made)
    if iteration != 1 or not torch.equal(read, written):
        return failure(
            f"a checkpoint in {situation.folder} reads back otherwise than it was written",
            "The file system is faulty or caches too much; choose another --output-dir.",
        )
    return ok(f"1 MB written and read back in {seconds:.2g} s", seconds=seconds)


def within(seconds: float, what: str, work: Callable[[], T]) -> T:
    """What `work` returns or raises, if it ends in time: a network file system that is down lets its readers wait.

    Raises:
        EnvironmentProblem: it does not end.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except Exception as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return outcome.result(seconds)
    except TimeoutError:
        if outcome.done():  # the work's own
            raise
        raise EnvironmentProblem(
            f"{what}: no answer within {seconds:g} s", "The disk or network file system hangs: see dmesg and mount."
        ) from None


DATA = {"dataset": Check(dataset), "shared memory": Check(shared_memory)}
MODEL = {"memory": Check(memory, after=("precision",))}
OUTPUT = {
    "output folder": Check(output_folder),
    "disk space": Check(disk_space, after=("output folder",)),
    "checkpoint": Check(checkpoint, after=("output folder", "disk space")),
}
