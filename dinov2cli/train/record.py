"""What an iteration gave, and what becomes of it: checked, logged to files, shown."""

import math
from collections import deque
from contextlib import ExitStack
from typing import NamedTuple

import torch

from dinov2cli import distributed
from dinov2cli.config import Config
from dinov2cli.console import MetricLogger, logger
from dinov2cli.data.collate import MultiCropBatch
from dinov2cli.data.loaders import refuse_too_many_bad
from dinov2cli.device import Arriving
from dinov2cli.errors import TrainingFailure
from dinov2cli.train.display import TrainingDisplay
from dinov2cli.train.monitors import TeacherView, collapse_verdict, teacher_health, teacher_numbers
from dinov2cli.train.objective import Losses
from dinov2cli.train.run_folder import RunFolder
from dinov2cli.train.trackers import Tracker, make_trackers
from dinov2cli.train.verdicts import fall_of, json_lines, keys_of_anchoring, localities_of


class StepResult(NamedTuple):
    """What one iteration, counted from 0, gives, on the device.

    Args:
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


class Reading(NamedTuple):
    """An iteration's numbers on their way to main memory: the copy is queued before the next iteration is.

    Args:
        names: of the `losses`, the reference's, and of the `grad_norms`, submodules.
        tensors: `losses` and `grad_norms`, in this order, and what the monitors need where they are asked.
    """

    iteration: int
    values: dict[str, float]
    names: dict[str, list[str]]
    tensors: Arriving

    def numbers(self) -> tuple[dict[str, float], dict[str, float]]:
        """Losses and gradient norms by name; waits until they are there."""
        there = self.tensors.read()
        losses, norms = (dict(zip(names, there[of].tolist(), strict=True)) for of, names in self.names.items())
        return losses, norms


class Record:
    """Counts, metrics files and display of a run.

    Every process has one. Only the first writes files and shows anything.

    Args:
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
        self.collapsed = 0  # looks in a row at which the monitors said so
        self.warned_at = 0  # iteration of the last warning of it
        self.localities: list[tuple[int, float]] = []  # of patches, by iteration, once learning has begun
        self.warned_of_patches_at: int | None = None
        self.loggers: list[Tracker] = []
        self.verdicts: MetricLogger | None = None

    def open(self, iteration: int, stack: ExitStack) -> None:
        """Go on with the files and the display after `iteration` iterations; the files close with `stack`."""
        if distributed.is_main():
            trackers = make_trackers(self.config, self.folder.path, resume_at=iteration)
            self.loggers = [MetricLogger(self.folder.metrics, resume_at=iteration), *trackers]
            self.verdicts = MetricLogger(self.folder.verdicts, resume_at=iteration)
            self.localities = localities_of(json_lines(self.folder.metrics, "patch_locality"), self.begins())
            stack.callback(self.verdicts.close)
        for each in self.loggers:
            stack.callback(each.close)
        quiet = not distributed.is_main()
        self.display = TrainingDisplay(self.total, iteration, self.images_per_iteration, quiet=quiet)

    def take(self, result: StepResult) -> Reading:
        """Begin to copy an iteration's numbers to main memory."""
        named = {"losses": {"total_loss": result.losses.total, **result.losses.logged}, "grad_norms": result.grad_norms}
        tensors = {of: torch.stack([value.float() for value in numbers.values()]) for of, numbers in named.items()}
        if result.view is not None and self.loggers and self.is_logged(result.iteration):
            tensors |= teacher_numbers(result.view)
        names = {of: list(numbers) for of, numbers in named.items()}
        return Reading(result.iteration, result.values, names, Arriving(tensors))

    def is_logged(self, iteration: int) -> bool:
        """Whether an iteration gets a line in the metrics."""
        return iteration % self.config.train.log_period == 0 or iteration + 1 == self.total

    def read(self, reading: Reading, iter_time: float, data_time: float) -> None:
        """Check, log and show an iteration's numbers. Waits until the device has them."""
        losses, grad_norms = self.check(reading)
        due, values = self.is_logged(reading.iteration), reading.values
        if due and self.loggers:
            line = {  # the reference's keys, then ours
                "iteration": reading.iteration,
                "iter_time": iter_time,
                "data_time": data_time,
                "lr": values["lr"],
                "wd": values["weight_decay"],
                "mom": values["momentum"],
                "last_layer_lr": values["last_layer_lr"],
                "current_batch_size": self.images_per_iteration,
                **losses,
                "teacher_temp": values["teacher_temp"],
                **({"gram_loss_weight": values["gram_loss_weight"]} if self.config.gram.use_loss else {}),
                **{f"grad_norm_{name}": norm for name, norm in grad_norms.items()},
                **self.health(reading),
                "bad_images": self.bad_images,
            }
            for each in self.loggers:
                each.write(line)
        self.display.update(reading.iteration + 1, losses, data_time, log=due)

    def check(self, reading: Reading) -> tuple[dict[str, float], dict[str, float]]:
        """Losses and gradient norms as numbers. If they stay non-finite, every process stops: they are means over all.

        Raises:
            TrainingFailure: `train.max_nonfinite` iterations in a row were not finite.
        """
        losses, grad_norms = reading.numbers()
        terms = {**losses, **{f"gradient of {name}": norm for name, norm in grad_norms.items()}}
        wrong = ", ".join(name for name, value in terms.items() if not math.isfinite(value) and name != "total_loss")
        if math.isfinite(losses["total_loss"]) and (not self.watched_gradients or not wrong):
            self.nonfinite = 0
            return losses, grad_norms
        self.nonfinite += 1
        logger.warning("iteration %d: %s not finite; the step was left out", reading.iteration, wrong)
        if self.nonfinite >= self.config.train.max_nonfinite:
            raise TrainingFailure(
                f"iteration {reading.iteration}: {wrong} not finite for {self.nonfinite} iterations in a row",
                f"The last good checkpoint is in {self.folder.checkpoints}. Lower optim.base_lr, lengthen "
                "optim.warmup_epochs, or use compute_precision.precision=fp32, and run again to resume from it.",
            )
        return losses, grad_norms

    def gives_up(self) -> bool:
        """Whether this process, which looks, has seen a collapse for as long as `train.stop_on_collapse` bears it."""
        return 0 < self.config.train.stop_on_collapse <= self.collapsed

    def count(self, batches: list[MultiCropBatch], bad_images: int) -> None:
        """Count the coming iteration's images and log the unreadable ones; stop above `train.max_bad_fraction`.

        Args:
            batches: of this process.
            bad_images: in the batches of all processes.

        Raises:
            DataError: too many; every process raises it.
        """
        for batch in batches:
            for path in batch.bad:
                logger.warning("unreadable image replaced: %s", path)
                self.last_bad.append(path)
        self.bad_images += bad_images
        self.samples_seen += self.images_per_iteration
        allowed = self.config.train.max_bad_fraction
        # Judged once enough have been seen for the share to mean something.
        if self.bad_images > allowed * max(self.samples_seen, 256):
            last = [path for paths in distributed.all_gather_objects(list(self.last_bad)) for path in paths]
            refuse_too_many_bad(self.bad_images, self.samples_seen, allowed, last, drawn=True)

    def health(self, reading: Reading) -> dict[str, float]:
        """What the monitors say of the teacher; of a collapse they warn again in every tenth of the run."""
        numbers = reading.tensors.read()
        if "cls" not in numbers or not numbers["cls"].isfinite().all():  # of which `check` speaks
            return {}
        health = teacher_health(numbers)
        # Fresh networks give nearly equal features, so the numbers mean something only once learning has begun.
        begun = reading.iteration > self.begins()
        verdict = collapse_verdict(health, numbers["cls"].shape[0]) if begun else None
        if verdict and (not self.collapsed or reading.iteration >= self.warned_at + self.total / 10):
            logger.warning("iteration %d: %s", reading.iteration, verdict)
            self.warned_at = reading.iteration
        if verdict and self.verdicts is not None:
            self.verdicts.write({"iteration": reading.iteration, "verdict": verdict})
        self.collapsed = self.collapsed + 1 if verdict else 0
        if begun and health.patch_locality is not None:
            self.localities.append((reading.iteration, health.patch_locality))
            self.look_at_patches(reading.iteration)
        return health._asdict()

    def begins(self) -> int:
        """Iteration after which the monitors mean something."""
        return max(self.config.iterations(self.config.optim.warmup_epochs), self.total // 10)

    def look_at_patches(self, iteration: int) -> None:
        """Warn of patches that degrade, again in every tenth of the run."""
        if len(self.localities) % max(1, len(self.localities) // 100):
            return  # all of them are looked at, which is not for every time
        last, fall = self.warned_of_patches_at, fall_of(self.localities)
        if fall and (last is None or iteration >= last + self.total / 10):
            keys = keys_of_anchoring(self.folder.path, fall, self.config)
            logger.warning("iteration %d: %s. Change: %s", iteration, fall, keys)
            self.warned_of_patches_at = iteration
