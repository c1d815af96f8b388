"""`--dry-run`: everything that training does, without training."""

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from dinov2cli import distributed
from dinov2cli.checkpoint import Checkpointer
from dinov2cli.train.agreement import next_batches
from dinov2cli.train.display import duration, print_plan
from dinov2cli.train.plan import memory_used, plan_rows

if TYPE_CHECKING:
    from dinov2cli.train.trainer import Trainer


def rehearse(trainer: "Trainer", steps: int = 3) -> None:
    """A few steps on real batches, timed, and a checkpoint there and back. Prints the plan and what was found.

    Nothing is kept: the steps are not saved, and the checkpoint is written to a folder that is removed.
    """
    loader, start = trainer.make_loader(), trainer.iteration
    if distributed.is_main():
        print_plan(plan_rows(trainer, loader), trainer.config.deviations())
    batches, seconds = iter(loader), []
    for _ in range(min(steps, trainer.total - start)):
        micro_batches, _ = next_batches(batches, trainer.accumulation, signals=(), checkpoint_failed=False)
        began = time.perf_counter()
        result = trainer.train_step([trainer.on_device(batch) for batch in micro_batches])
        trainer.record.check(trainer.record.take(result))
        seconds.append(time.perf_counter() - began)
        trainer.iteration += 1
    size = _checkpoint_there_and_back(trainer)
    step = min(seconds, default=0.0)
    if distributed.is_main():
        left = duration(step * (trainer.total - start))
        print_plan(
            [
                ("step", f"{step:.3g} s without waiting for data, so {left} in all"),
                ("memory", memory_used(trainer.device)),
                ("checkpoint", f"{size / 1e6:,.0f} MB each, {trainer.config.train.keep} kept; written and read back"),
            ],
            [],
        )


def _checkpoint_there_and_back(trainer: "Trainer") -> int:
    """Bytes of a checkpoint."""
    with tempfile.TemporaryDirectory(dir=trainer.folder.path, prefix=".dry-run-") as own:
        checkpointer = Checkpointer(Path(distributed.broadcast_object(own)), keep=1)
        path = checkpointer.save(trainer.iteration, trainer.state())
        checkpointer.load_latest(trainer.state())
        size = sum(file.stat().st_size for file in path.iterdir())
        distributed.barrier()
    return size
