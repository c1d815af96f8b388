"""What a run is going to do, in rows for the person who starts it, and `--dry-run`: all of it, without training."""

import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from dinov2cli import distributed
from dinov2cli.checkpoint import Checkpointer
from dinov2cli.config import Config
from dinov2cli.data.collate import MultiCropBatch
from dinov2cli.data.loaders import Loader
from dinov2cli.device import Precision
from dinov2cli.train.agreement import next_batches
from dinov2cli.train.allocator import keep_freed_memory
from dinov2cli.train.cost import MemoryEstimate, describe, room_for_gaps
from dinov2cli.train.display import duration, print_plan
from dinov2cli.train.objective import SSLMetaArch
from dinov2cli.train.record import Record, StepResult
from dinov2cli.train.run_folder import RunFolder
from dinov2cli.train.sharding import Sharding
from dinov2cli.train.step import TrainingStep


class Run(Protocol):
    """The facts of a run that a plan tells, and what a rehearsal does with it: `train.trainer.Trainer` is one."""

    config: Config
    folder: RunFolder
    record: Record
    device: torch.device
    precision: Precision
    world_size: int
    accumulation: int
    total: int
    iteration: int
    attention_backend: str
    attention_reason: str
    compiled: bool
    compile_reason: str
    sharding: Sharding
    sharding_reason: str
    objective: SSLMetaArch
    step: TrainingStep
    expected_memory: MemoryEstimate

    def make_loader(self) -> Loader[MultiCropBatch]:
        """Batches of this process."""

    def on_device(self, batch: MultiCropBatch) -> MultiCropBatch:
        """The batch where the networks are."""

    def train_step(self, batches: list[MultiCropBatch]) -> StepResult:
        """One iteration."""

    def state(self) -> dict[str, Any]:
        """What is saved."""


def plan_rows(run: Run, loader: Loader[MultiCropBatch]) -> list[tuple[str, str]]:
    """(what, value) of the data, the model, the schedule and the machine."""
    config, student = run.config, run.objective.student
    crops, arch = config.crops, config.arch()
    world = run.world_size
    batch = config.effective_batch(world)
    factors = f"{config.train.batch_size_per_gpu} per process x {world} process{'es' if world > 1 else ''}"
    if run.accumulation > 1:
        factors += f" x {run.accumulation} accumulated"
    epochs = run.total * batch / max(len(loader.dataset), 1)
    workers = f"{loader.num_workers} loader worker{'s' if loader.num_workers != 1 else ''}"
    resumed = f", resumed after {run.iteration} iterations" if run.iteration else ""
    head_sizes = " + ".join(count_parameters(head) for head in student.heads())
    hint = ""
    if run.device.type == "cpu" and not room_for_gaps(run.expected_memory):
        hint = "; little room, a smaller train.batch_size_per_gpu would be faster an image"
    rows = [
        ("run", f"{run.folder.path}{resumed}"),
        ("data", f"{loader.dataset.describe()}; {workers}"),
        (
            "crops",
            f"2 of {crops.global_crops_size} and {crops.local_crops_number} of {crops.local_crops_size} pixels, "
            f"patches of {config.student.patch_size}",
        ),
        (
            "student",
            f"ViT {arch.embed_dim} wide, {arch.depth} deep, {arch.num_heads} heads, {config.student.ffn_layer}: "
            f"{count_parameters(student.backbone)} parameters; heads {head_sizes}",
        ),
        ("length", f"{run.total:,} iterations, {epochs:,.1f} passes over the data"),
        ("batch", f"{batch} images ({factors})"),
        (
            "learning rate",
            f"{run.step.schedules.peak_lr:.3g} at its peak (base_lr {config.optim.base_lr:g} at 1024 images)",
        ),
        ("device", f"{run.device}, {run.precision.name} ({run.precision.reason})"),
        ("processes", f"{world}; sharding {run.sharding.mode} ({run.sharding_reason})"),
        ("attention", f"{run.attention_backend} ({run.attention_reason})"),
        ("compiled", f"{'yes' if run.compiled else 'no'} ({run.compile_reason})"),
        ("expected memory", describe(run.expected_memory) + hint),
    ]
    return rows


def count_parameters(module: nn.Module) -> str:
    """Number of parameters, such as `21.6 M` or `24 k`."""
    number = sum(parameter.numel() for parameter in module.parameters())
    return f"{number / 1e6:.1f} M" if number >= 1e6 else f"{number / 1e3:.0f} k"


def memory_used(device: torch.device) -> str:
    """Most memory that this process has held: on the GPU if it trains there, else resident in main memory."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return f"{torch.cuda.max_memory_reserved(device) / 1e9:.1f} GB of the device's {total / 1e9:.1f} GB"
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.1f} GB of main memory"


def rehearse(run: Run, steps: int = 3) -> None:
    """A few steps on real batches, timed, and a checkpoint there and back. Prints the plan and what was found.

    Nothing is kept: the steps are not saved, and the checkpoint is written to a folder that is removed.
    """
    if run.device.type == "cpu":
        keep_freed_memory(room=room_for_gaps(run.expected_memory))
    loader, start = run.make_loader(), run.iteration
    if distributed.is_main():
        print_plan(plan_rows(run, loader), run.config.deviations())
    batches, seconds = iter(loader), []
    for _ in range(min(steps, run.total - start)):
        micro_batches, _ = next_batches(batches, run.accumulation, signals=(), checkpoint_failed=False)
        began = time.perf_counter()
        result = run.train_step([run.on_device(batch) for batch in micro_batches])
        run.record.check(run.record.take(result))
        seconds.append(time.perf_counter() - began)
        run.iteration += 1
    size = _checkpoint_there_and_back(run)
    step = min(seconds, default=0.0)
    if distributed.is_main():
        left = duration(step * (run.total - start))
        print_plan(
            [
                ("step", f"{step:.3g} s without waiting for data, so {left} in all"),
                ("memory", memory_used(run.device)),
                ("checkpoint", f"{size / 1e6:,.0f} MB each, {run.config.train.keep} kept; written and read back"),
            ],
            [],
        )


def _checkpoint_there_and_back(run: Run) -> int:
    """Bytes of a checkpoint."""
    with tempfile.TemporaryDirectory(dir=run.folder.path, prefix=".dry-run-") as own:
        checkpointer = Checkpointer(Path(distributed.broadcast_object(own)), keep=1)
        path = checkpointer.save(run.iteration, run.state())
        checkpointer.load_latest(run.state())
        size = sum(file.stat().st_size for file in path.iterdir())
        distributed.barrier()
    return size
