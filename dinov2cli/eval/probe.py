"""Heads that are trained on frozen features: the loop, which can be interrupted, and what it resumes from."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dinov2cli import distributed
from dinov2cli.console import Interrupted, interruption, logger, progress
from dinov2cli.errors import CheckpointError
from dinov2cli.files import replacing


class Trainer(Protocol):
    """Heads with their optimizer."""

    @property
    def heads(self) -> nn.Module: ...

    @property
    def optimizer(self) -> torch.optim.Optimizer: ...

    def step(self, iteration: int, features: Any, targets: Any) -> Tensor:
        """One step on this process's part of a batch; returns the loss."""
        ...


@dataclass(frozen=True)
class ProbeCheckpoint:
    """Where a probe is kept to be resumed.

    Args:
        path: the file.
        identity: all that it depends on; a file of another one is refused.
    """

    path: Path
    identity: dict[str, Any]

    def save(self, trainer: Trainer, iteration: int) -> None:
        state = {"heads": trainer.heads.state_dict(), "optimizer": trainer.optimizer.state_dict()}
        write_from_one_process(self.path, {"identity": self.identity, "iteration": iteration, **state})

    def resume(self, trainer: Trainer) -> int:
        """Load the file, if there is one; the iteration to go on with.

        Raises:
            CheckpointError: it is damaged, or belongs to another probe.
        """
        if not self.path.exists():
            return 0
        try:
            device = next(trainer.heads.parameters()).device
            state = torch.load(self.path, map_location=device, weights_only=True)
            identity = state["identity"]
        except (OSError, RuntimeError, ValueError, KeyError, EOFError) as error:
            hint = "Delete it, or give --no-resume."
            raise CheckpointError(f"{self.path} cannot be read ({error}).", hint=hint) from None
        for key, value in self.identity.items():
            if identity.get(key) != value:
                raise CheckpointError(
                    f"{self.path} belongs to a probe with {key}={identity.get(key)}; this one has {key}={value}.",
                    hint="Give --no-resume to start anew, or another --output-dir.",
                )
        trainer.heads.load_state_dict(state["heads"])
        trainer.optimizer.load_state_dict(state["optimizer"])
        logger.info("linear heads: resumed at iteration %d", state["iteration"])
        return int(state["iteration"])


def train_heads(
    trainer: Trainer,
    batches: Iterable[tuple[Any, Any]],
    iterations: range,
    checkpoint: ProbeCheckpoint | None,
    period: int,
    look: Callable[[int, Tensor], None] | None = None,
) -> None:
    """A step for each of `iterations`, saved each `period` of them, at the end and when it is interrupted.

    Args:
        batches: features and targets, on the device where the heads are, from the first of the iterations on.
        look: called after a step with the number of steps done and its loss.

    Raises:
        Interrupted: after the step in which a signal came.
    """
    message = "stopping after this step; the same command resumes" if checkpoint else "stopping"
    with progress() as bar, interruption(message) as signals:
        task = bar.add_task("linear heads", total=iterations.stop, completed=iterations.start)
        for iteration, (features, targets) in zip(iterations, batches, strict=True):
            loss = trainer.step(iteration, features, targets)
            bar.advance(task)
            done = iteration + 1
            if checkpoint and (signals or done % period == 0 or done == iterations.stop):
                checkpoint.save(trainer, done)
            if signals:
                raise Interrupted(signals[0])
            if look is not None:
                look(done, loss)


def write_from_one_process(path: Path, content: dict[str, Any]) -> None:
    """Write a file whole or not at all."""
    if distributed.is_main():
        with replacing(path) as aside, aside.open("wb") as file:
            torch.save(content, file)
