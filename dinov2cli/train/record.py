"""What an iteration gave, and what becomes of it: checked, logged to files, shown."""

import math
from collections import deque
from contextlib import ExitStack
from types import TracebackType
from typing import NamedTuple

import torch

from dinov2cli import distributed
from dinov2cli.config import Config
from dinov2cli.console import MetricLogger, logger
from dinov2cli.data.collate import MultiCropBatch
from dinov2cli.errors import DataError, TrainingFailure
from dinov2cli.train.display import TrainingDisplay
from dinov2cli.train.monitors import TeacherView, collapse_verdict, teacher_health
from dinov2cli.train.objective import Losses
from dinov2cli.train.run_folder import RunFolder
from dinov2cli.train.trackers import Tracker, make_trackers


class StepResult(NamedTuple):
    """What one iteration gives. Its tensors are on the device, and reading them waits for it.

    Args:
        iteration: counted from 0.
        values: the scheduled values it used.
        losses: means over the accumulated batches and all processes.
        grad_norms: of each submodule, before clipping.
        view: the teacher's, of this process's last batch; None where no term is watched.
    """

    iteration: int
    values: dict[str, float]
    losses: Losses
    grad_norms: dict[str, torch.Tensor]
    view: TeacherView | None


class Record:
    """Counts, metrics files and display of a run; a context manager around its loop.

    Every process has one. Only the first writes files and shows anything.

    Args:
        config: of the run.
        folder: of the run.
        watched_gradients: gradients that are not finite are an error, too; not so with a gradient scaler, which
            provokes them.
    """

    def __init__(self, config: Config, folder: RunFolder, *, watched_gradients: bool) -> None:
        self.config, self.folder, self.watched_gradients = config, folder, watched_gradients
        self.total = config.iterations()
        self.world_size = distributed.world_size()
        self.images_per_iteration = config.effective_batch(self.world_size)
        self.samples_seen, self.bad_images = 0, 0  # of all processes
        self.last_bad: deque[str] = deque(maxlen=20)
        self.nonfinite = 0  # consecutive iterations that were left out
        self.collapsed = False  # what the monitors said last, so that they warn once
        self.loggers: list[Tracker] = []
        self._stack = ExitStack()

    def open(self, iteration: int) -> "Record":
        """Go on with the files and the display after `iteration` iterations."""
        quiet = not distributed.is_main()
        if not quiet:
            trackers = make_trackers(self.config, self.folder.path, resume_at=iteration)
            self.loggers = [MetricLogger(self.folder.metrics, resume_at=iteration), *trackers]
        for each in self.loggers:
            self._stack.callback(each.close)
        self.display = TrainingDisplay(self.total, iteration, self.images_per_iteration, quiet=quiet)
        return self

    def __enter__(self) -> "Record":
        self._stack.enter_context(self.display)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def read(self, result: StepResult, iter_time: float, data_time: float) -> None:
        """Check, log and show an iteration's numbers. Waits for the device to have them."""
        losses, grad_norms = self.check(result)
        due = result.iteration % self.config.train.log_period == 0 or result.iteration + 1 == self.total
        if due and self.loggers:
            line = self.metrics_line(result, losses, grad_norms, iter_time, data_time)
            for each in self.loggers:
                each.write(line)
        self.display.update(result.iteration + 1, losses, data_time, log=due)

    def check(self, result: StepResult) -> tuple[dict[str, float], dict[str, float]]:
        """Losses and gradient norms as numbers. If they stay non-finite, every process stops: they are means over all.

        Raises:
            TrainingFailure: `train.max_nonfinite` iterations in a row were not finite.
        """
        losses, grad_norms = read_numbers(result)
        terms = {**losses, **{f"gradient of {name}": norm for name, norm in grad_norms.items()}}
        wrong = [name for name, value in terms.items() if not math.isfinite(value) and name != "total_loss"]
        if math.isfinite(losses["total_loss"]) and (not self.watched_gradients or not wrong):
            self.nonfinite = 0
            return losses, grad_norms
        self.nonfinite += 1
        logger.warning("iteration %d: %s not finite; the step was left out", result.iteration, ", ".join(wrong))
        if self.nonfinite >= self.config.train.max_nonfinite:
            times = f"for {self.nonfinite} iterations in a row"
            raise TrainingFailure(
                f"iteration {result.iteration}: {', '.join(wrong)} not finite {times}",
                f"The last good checkpoint is in {self.folder.checkpoints}. Lower optim.base_lr, lengthen "
                "optim.warmup_epochs, or use compute_precision.precision=fp32, and run again to resume from it.",
            )
        return losses, grad_norms

    def count(self, batches: list[MultiCropBatch], bad_images: int) -> None:
        """Count the coming iteration's images and log the unreadable ones; stop above `train.max_bad_fraction`.

        Args:
            batches: of this process.
            bad_images: in the batches of all processes.

        Raises:
            DataError: too many; every process raises it.
        """
        for path in (path for batch in batches for path in batch.bad):
            logger.warning("unreadable image replaced: %s", path)
            self.last_bad.append(path)
        self.bad_images += bad_images
        self.samples_seen += self.images_per_iteration
        allowed = self.config.train.max_bad_fraction
        # Judged once enough have been seen for the share to mean something.
        if self.bad_images and self.bad_images > allowed * max(self.samples_seen, 256):
            last = [path for paths in distributed.all_gather_objects(list(self.last_bad)) for path in paths]
            raise DataError(
                f"{self.bad_images} of {self.samples_seen} images drawn are unreadable, more than "
                f"train.max_bad_fraction={allowed} allows; the last: " + "; ".join(last[:20]),
                "Repair or remove them, or raise train.max_bad_fraction; the same command then resumes.",
            )

    def metrics_line(
        self,
        result: StepResult,
        losses: dict[str, float],
        grad_norms: dict[str, float],
        iter_time: float,
        data_time: float,
    ) -> dict[str, float | int]:
        """One line of `training_metrics.json`: the reference's keys, then ours."""
        values = result.values
        return {
            "iteration": result.iteration,
            "iter_time": iter_time,
            "data_time": data_time,
            "lr": values["lr"],
            "wd": values["weight_decay"],
            "mom": values["momentum"],
            "last_layer_lr": values["last_layer_lr"],
            "current_batch_size": self.images_per_iteration,
            **losses,
            "teacher_temp": values["teacher_temp"],
            **{f"grad_norm_{name}": norm for name, norm in grad_norms.items()},
            **self.health(result),
            "bad_images": self.bad_images,
        }

    def health(self, result: StepResult) -> dict[str, float]:
        """What the monitors say of the teacher; warns once of a collapse."""
        if result.view is None:
            return {}
        health = teacher_health(result.view)
        # Fresh networks give nearly equal features, so the numbers mean something only once learning has begun.
        begun = result.iteration > max(self.config.warmup_iterations(), self.total // 10)
        verdict = collapse_verdict(health, result.view.cls.shape[0]) if begun else None
        if verdict and not self.collapsed:
            logger.warning("iteration %d: %s", result.iteration, verdict)
        self.collapsed = verdict is not None
        return health._asdict()


def read_numbers(result: StepResult) -> tuple[dict[str, float], dict[str, float]]:
    """Losses with the reference's names, and gradient norms, as numbers: one transfer from the device."""
    named = {"total_loss": result.losses.total, **result.losses.logged}
    numbers = torch.stack([value.float() for value in (*named.values(), *result.grad_norms.values())]).tolist()
    return dict(zip(named, numbers, strict=False)), dict(zip(result.grad_norms, numbers[len(named) :], strict=True))
