"""`--dry-run`: all that a run is going to do, without training."""

import resource
import sys
import tempfile
import time
from pathlib import Path

import torch

from dinov2cli import distributed
from dinov2cli.checkpoint import Checkpointer
from dinov2cli.train.agreement import next_batches
from dinov2cli.train.display import duration, print_plan
from dinov2cli.train.trainer import Trainer


def memory_used(device: torch.device) -> str:
    """Most memory that this process has held: on the GPU if it trains there, else resident in main memory."""
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
        return f"{torch.cuda.max_memory_reserved(device) / 1e9:.1f} GB of the device's {there / 1e9:.1f} GB"
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.1f} GB of main memory"


def rehearse(run: Trainer, steps: int = 3) -> None:
    """A few steps on real batches, timed, and a checkpoint there and back. Prints the plan and what was found.

    Nothing is kept: the steps are not saved, and the checkpoint is written to a folder that is removed.
    """
    loader, start = run.make_loader(), run.iteration
    run.print_plan(loader)
    batches, seconds = iter(loader), []
    for _ in range(min(steps, run.total - start)):
        micro_batches, _ = next_batches(batches, run.accumulation, signals=(), checkpoint_failed=False, collapsed=False)
        began = time.perf_counter()
        result = run.train_step([run.on_device(batch) for batch in micro_batches])
        run.record.check(run.record.take(result))
        seconds.append(time.perf_counter() - began)
        run.iteration += 1
    size = _checkpoint_there_and_back(run)
    step = min(seconds, default=0.0)
    if distributed.is_main():
        left = duration(step * (run.total - start))
        rows = [
            ("step", f"{step:.3g} s without waiting for data, so {left} in all"),
            ("memory", memory_used(run.device)),
            ("checkpoint", f"{size / 1e6:,.0f} MB each, {run.config.train.keep} kept; written and read back"),
        ]
        print_plan(rows, [])


def _checkpoint_there_and_back(run: Trainer) -> int:
    """Bytes of a checkpoint."""
    with tempfile.TemporaryDirectory(dir=run.folder.path, prefix=".dry-run-") as own:
        checkpointer = Checkpointer(Path(distributed.broadcast_object(own)), keep=1)
        path = checkpointer.save(run.iteration, run.state())
        checkpointer.load_latest(run.state())
        size = sum(file.stat().st_size for file in path.iterdir())
        distributed.barrier()
    return size
