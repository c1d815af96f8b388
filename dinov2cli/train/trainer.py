"""The training loop: one visible step, and around it resuming, checkpoints, metrics and interruption."""

import math
import tempfile
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dinov2cli import distributed
from dinov2cli.checkpoint import Checkpointer, save_teacher
from dinov2cli.config import Config
from dinov2cli.console import MetricLogger, interruption, logger
from dinov2cli.data.collate import MultiCropBatch
from dinov2cli.data.datasets import ImageDataset, make_dataset
from dinov2cli.data.loaders import TrainLoader, make_train_loader
from dinov2cli.data.randomness import Stream, keyed_rng
from dinov2cli.errors import ConfigError, DataError, TrainingFailure
from dinov2cli.models.attention import choose_attention_backend
from dinov2cli.models.vision_transformer import VisionTransformer
from dinov2cli.train.display import TrainingDisplay, duration, print_plan
from dinov2cli.train.monitors import collapse_verdict, teacher_health
from dinov2cli.train.optimizer import build_optimizer, clip_gradients, optimizer_state
from dinov2cli.train.parameter_groups import apply_schedules
from dinov2cli.train.plan import memory_used, plan_rows
from dinov2cli.train.precision import Precision
from dinov2cli.train.resuming import check_resumable
from dinov2cli.train.run_folder import RunFolder
from dinov2cli.train.schedules import ScheduledValues, Schedules
from dinov2cli.train.ssl_meta_arch import SSLLosses, SSLMetaArch
from dinov2cli.train.trackers import Tracker, make_trackers

OnlineKnn = Callable[[VisionTransformer], float]
"""Top-1 accuracy in percent of a teacher backbone; given from outside, as training knows nothing of evaluation."""


class StepResult(NamedTuple):
    """What one iteration gives: the scheduled values it used, its losses, and gradient norms before clipping."""

    values: ScheduledValues
    losses: SSLLosses
    grad_norms: dict[str, torch.Tensor]


class Trainer:
    """A training run in its folder, new or resumed.

    Args:
        config: the run, `config.train.output_dir` its folder.
        device: where to train.
        dataset: the images; by default what `train.dataset_path` names.
        resume: go on from the newest checkpoint in the folder, if there is one.
        init_backbone: loads pretrained weights into a fresh backbone (not called where a checkpoint is resumed).
        online_knn: scores the teacher every `evaluation.knn_period` iterations.
        on_teacher: called on every process with each teacher checkpoint that has been written (`evaluation.tasks`).

    Raises:
        ConfigError: the folder holds a run of another architecture, or the attention backend cannot run here.
        CheckpointError: none of the folder's checkpoints can be loaded.
        DataError: the dataset cannot be read.
    """

    def __init__(
        self,
        config: Config,
        device: torch.device,
        *,
        dataset: ImageDataset | None = None,
        resume: bool = True,
        init_backbone: Callable[[VisionTransformer], None] | None = None,
        online_knn: OnlineKnn | None = None,
        on_teacher: Callable[[Path], object] | None = None,
    ) -> None:
        self.config, self.device, self.online_knn = config, device, online_knn
        self.dataset = dataset if dataset is not None else make_dataset(config.train.dataset_path)
        self.on_teacher = on_teacher
        self.total = config.iterations()
        self.accumulation = config.train.gradient_accumulation
        self.world_size = distributed.world_size()
        self.folder = RunFolder(Path(config.train.output_dir))
        self.precision = Precision.resolve(config, device)
        self.schedules = Schedules(config, self.world_size)

        self.checkpointer = Checkpointer(self.folder.checkpoints, config.train.keep)
        resume = resume and bool(self.checkpointer.list())

        self.attention_backend, self.attention_reason = self.choose_attention()
        torch.manual_seed(config.train.seed)  # initial weights; nothing later draws from the global generator
        self.meta_arch = SSLMetaArch(config, self.attention_backend)
        if init_backbone is not None and not resume:
            init_backbone(self.meta_arch.student.backbone)
            self.meta_arch.teacher.load_state_dict(self.meta_arch.student.state_dict())
        self.meta_arch.to(device).train()
        self.optimizer = build_optimizer(self.meta_arch.student, config)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision.scale_gradients)
        self.iteration = 0
        self.nonfinite = 0  # consecutive iterations that were left out
        self.collapsed = False  # what the monitors said last, so that they warn once
        self.samples_seen, self.bad_images = 0, 0
        self.last_bad: deque[str] = deque(maxlen=20)
        if resume:
            self.load()

    def train(self) -> None:
        """Train to the end of the run. Ctrl-C saves and raises KeyboardInterrupt; the same command then resumes.

        Raises:
            TrainingFailure: losses stay non-finite.
            DataError: more images than `train.max_bad_fraction` are unreadable.
            CheckpointError: a checkpoint cannot be written.
        """
        if self.iteration >= self.total:
            logger.info("finished already: %d of %d iterations", self.iteration, self.total)
            return
        loader = self.make_loader()
        if distributed.is_main():
            print_plan(plan_rows(self, loader), self.config.deviations())
            self.config.save(self.folder.config)
        loggers = self.make_loggers()
        if self.iteration == 0:
            self.score_teacher()

        images = self.config.effective_batch(self.world_size)
        quiet = not distributed.is_main()
        with ExitStack() as stack:
            for each in loggers:
                stack.callback(each.close)
            display = stack.enter_context(TrainingDisplay(self.total, self.iteration, images, quiet=quiet))
            message = "stopping after this iteration (again to stop at once, without saving)"
            interrupted = stack.enter_context(interruption(message))
            batches, clock = iter(loader), time.perf_counter()
            while self.iteration < self.total:
                micro_batches = list(islice(batches, self.accumulation))
                data_time = time.perf_counter() - clock

                result = self.train_step([batch.to(self.device, non_blocking=True) for batch in micro_batches])

                losses = self.check(result, micro_batches)
                iter_time, clock = time.perf_counter() - clock, time.perf_counter()
                due = self.iteration % self.config.train.log_period == 0 or self.iteration + 1 == self.total
                if due and loggers:
                    line = self.metrics_line(result, losses, iter_time, data_time)
                    for each in loggers:
                        each.write(line)
                self.iteration += 1
                display.update(self.iteration, losses, data_time, log=due)
                self.save_what_is_due(stopping=bool(interrupted))
                if interrupted:
                    logger.info("interrupted: saved at iteration %d; the same command resumes", self.iteration)
                    raise KeyboardInterrupt

    def rehearse(self, steps: int = 3) -> None:
        """Do everything but train (`--dry-run`): a few steps on real batches, timed, and a checkpoint there and back.

        Nothing is kept: the steps are not saved, and the checkpoint is written to a folder that is removed.
        """
        loader, start = self.make_loader(), self.iteration
        print_plan(plan_rows(self, loader), self.config.deviations())
        batches, seconds = iter(loader), []
        for _ in range(min(steps, self.total - self.iteration)):
            micro_batches = list(islice(batches, self.accumulation))
            began = time.perf_counter()
            result = self.train_step([batch.to(self.device) for batch in micro_batches])
            self.check(result, micro_batches)
            seconds.append(time.perf_counter() - began)
            self.iteration += 1
        with tempfile.TemporaryDirectory(dir=self.folder.path, prefix=".dry-run-") as folder:
            checkpointer = Checkpointer(Path(folder), keep=1)
            size = sum(file.stat().st_size for file in checkpointer.save(self.iteration, self.state()).iterdir())
            checkpointer.load_latest(self.state())
        step = min(seconds, default=0.0)
        print_plan(
            [
                ("step", f"{step:.3g} s without waiting for data, so {duration(step * (self.total - start))} in all"),
                ("memory", memory_used(self.device)),
                ("checkpoint", f"{size / 1e6:,.0f} MB each, {self.config.train.keep} kept; written and read back"),
            ],
            [],
        )

    def make_loader(self) -> TrainLoader:
        """Batches of this process from the current iteration to the end of the run."""
        return make_train_loader(
            self.config,
            start=self.iteration * self.accumulation,
            stop=self.total * self.accumulation,
            rank=distributed.rank(),
            world_size=self.world_size,
            pin_memory=self.device.type == "cuda",
            dataset=self.dataset,
        )

    def train_step(self, batches: list[MultiCropBatch]) -> StepResult:
        """One iteration of DINOv2 on `train.gradient_accumulation` batches (DINOv2 paper, section 4)."""
        values = self.schedules.at(self.iteration)
        apply_schedules(self.optimizer.param_groups, values)

        losses_of = []
        for batch in batches:
            drop_generator = self.random_numbers_of(batch.iteration)
            with self.precision.autocast():
                losses = self.meta_arch(batch, values.teacher_temp, drop_generator)
            self.scaler.scale(losses.total / len(batches)).backward()
            losses_of.append(losses)
        losses = mean_losses(losses_of)

        self.scaler.unscale_(self.optimizer)
        grad_norms = clip_gradients(self.meta_arch.student, self.config.optim.clip_grad)
        if self.is_finite(losses, grad_norms):
            self.scaler.step(self.optimizer)
            self.meta_arch.update_teacher(values.momentum)
        self.scaler.update()
        self.optimizer.zero_grad()
        return StepResult(values, losses, grad_norms)

    def random_numbers_of(self, micro_step: int) -> torch.Generator:
        """Generator of the step's stochastic depth, a function of (seed, micro step, rank) alone."""
        numbers = keyed_rng(self.config.train.seed, Stream.STOCHASTIC_DEPTH, micro_step, distributed.rank())
        return torch.Generator().manual_seed(int(numbers.integers(2**63)))

    def is_finite(self, losses: SSLLosses, grad_norms: dict[str, torch.Tensor]) -> bool:
        """Whether the step may be applied: float16 overflows are left to the gradient scaler."""
        watched = [losses.total] if self.precision.scale_gradients else [losses.total, *grad_norms.values()]
        return bool(torch.stack([value.float() for value in watched]).isfinite().all())

    def check(self, result: StepResult, batches: list[MultiCropBatch]) -> dict[str, float]:
        """Losses as numbers; stops the run if they stay non-finite or too many images are unreadable."""
        losses = {
            "total_loss": result.losses.total.item(),
            "dino_local_crops_loss": result.losses.dino_local.item(),
            "dino_global_crops_loss": result.losses.dino_global.item(),
            "koleo_loss": result.losses.koleo.item(),
            "ibot_loss": result.losses.ibot.item(),
        }
        terms = {**losses, **{f"gradient of {name}": norm.item() for name, norm in result.grad_norms.items()}}
        wrong = [name for name, value in terms.items() if not math.isfinite(value) and name != "total_loss"]
        if math.isfinite(losses["total_loss"]) and (self.precision.scale_gradients or not wrong):
            self.nonfinite = 0
        else:
            self.nonfinite += 1
            logger.warning("iteration %d: %s not finite; the step was left out", self.iteration, ", ".join(wrong))
            if self.nonfinite >= self.config.train.max_nonfinite:
                times = f"for {self.nonfinite} iterations in a row"
                raise TrainingFailure(
                    f"iteration {self.iteration}: {', '.join(wrong)} not finite {times}",
                    f"The last good checkpoint is in {self.folder.checkpoints}. Lower optim.base_lr, lengthen "
                    "optim.warmup_epochs, or use compute_precision.precision=fp32, and run again to resume from it.",
                )
        self.count_bad_images(batches)
        return losses

    def count_bad_images(self, batches: list[MultiCropBatch]) -> None:
        """Log unreadable images, and stop the run above `train.max_bad_fraction`."""
        for path in (path for batch in batches for path in batch.bad):
            self.bad_images += 1
            logger.warning("unreadable image replaced: %s", path)
            self.last_bad.append(path)
        self.samples_seen += sum(len(batch.samples) for batch in batches)
        allowed = self.config.train.max_bad_fraction
        # Judged once enough have been seen for the share to mean something.
        if self.bad_images and self.bad_images > allowed * max(self.samples_seen, 256):
            raise DataError(
                f"{self.bad_images} of {self.samples_seen} images drawn are unreadable, more than "
                f"train.max_bad_fraction={allowed} allows; the last: " + "; ".join(self.last_bad),
                "Repair or remove them, or raise train.max_bad_fraction; the same command then resumes.",
            )

    def make_loggers(self) -> list[Tracker]:
        """Where metrics go: `training_metrics.json`, and the trackers that are switched on; none but on rank 0."""
        if not distributed.is_main():
            return []
        trackers = make_trackers(self.config, self.folder.path, resume_at=self.iteration)
        return [MetricLogger(self.folder.metrics, resume_at=self.iteration), *trackers]

    def metrics_line(
        self, result: StepResult, losses: dict[str, float], iter_time: float, data_time: float
    ) -> dict[str, float | int]:
        """One line of `training_metrics.json`: the reference's keys, then ours."""
        values, grad_norms = result.values, result.grad_norms
        targets = self.meta_arch.last_targets
        assert targets is not None
        health = teacher_health(targets)
        # Fresh networks give nearly equal features, so the numbers mean something only once learning has begun.
        begun = self.iteration > max(self.config.warmup_iterations(), self.total // 10)
        verdict = collapse_verdict(health, targets.cls.shape[0]) if begun else None
        if verdict and not self.collapsed:
            logger.warning("iteration %d: %s", self.iteration, verdict)
        self.collapsed = verdict is not None
        return {
            "iteration": self.iteration,
            "iter_time": iter_time,
            "data_time": data_time,
            "lr": values.lr,
            "wd": values.weight_decay,
            "mom": values.momentum,
            "last_layer_lr": values.last_layer_lr,
            "current_batch_size": self.config.effective_batch(self.world_size),
            **losses,
            "teacher_temp": values.teacher_temp,
            **{f"grad_norm_{name}": norm.item() for name, norm in grad_norms.items()},
            **health._asdict(),
            "bad_images": self.bad_images,
        }

    def save_what_is_due(self, *, stopping: bool) -> None:
        """Write the checkpoints and scores that belong after the iterations done so far."""

        def due(period: int) -> bool:
            return finished or (period > 0 and self.iteration % period == 0)

        finished = self.iteration == self.total
        if due(self.config.evaluation.eval_period_iterations):
            teacher = self.folder.teacher(self.iteration - 1)
            if distributed.is_main():
                save_teacher(teacher, self.meta_arch.teacher.state_dict())
            if self.on_teacher is not None:
                distributed.barrier()
                self.on_teacher(teacher)
        if self.config.evaluation.knn_period and due(self.config.evaluation.knn_period):
            self.score_teacher()
        # The training checkpoint comes last: a run killed before it does the above again on resuming. While losses are
        # non-finite, the last good one stays the newest.
        if (due(self.config.checkpoint_period()) or stopping) and self.nonfinite == 0:
            self.checkpointer.save(self.iteration, self.state())

    def score_teacher(self) -> None:
        """Online k-NN of the teacher, printed and appended to `knn_metrics.json`."""
        if self.online_knn is None:
            return
        top1 = self.online_knn(self.meta_arch.teacher.backbone)
        teacher = f"teacher after {self.iteration} iterations" if self.iteration else "untrained teacher"
        if distributed.is_main():
            logger.info("k-NN top-1 of the %s: %.1f %%", teacher, top1)
            log = MetricLogger(self.folder.knn_metrics, resume_at=self.iteration)
            log.write({"iteration": self.iteration, "knn_top1": top1})
            log.close()

    def choose_attention(self) -> tuple[str, str]:
        """Attention backend and reason."""
        asked = self.config.student.attention_backend
        try:
            return choose_attention_backend(asked, self.device, self.precision.dtype)
        except ValueError as error:
            raise ConfigError(f"student.attention_backend={asked}: {error}", "auto chooses one that runs.") from error

    def load(self) -> None:
        """Go on from the newest whole checkpoint."""
        if self.folder.config.exists():
            check_resumable(self.folder.config, self.config)
        state = self.state()
        iteration = self.checkpointer.load_latest(state)
        assert iteration is not None, "the caller has seen a checkpoint"
        self.iteration = iteration
        self.samples_seen, self.bad_images = (int(value) for value in state["counters"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        logger.info("resumed after %d iterations from %s", iteration, self.checkpointer.folder)

    def state(self) -> dict[str, Any]:
        """All that resuming needs; the tensors are the live ones, so that loading into them restores the run."""
        return {
            "model": self.meta_arch.state_dict(),
            "optimizer": optimizer_state(self.optimizer, self.meta_arch.student),
            "scaler": self.scaler.state_dict(),
            "counters": torch.tensor([self.samples_seen, self.bad_images]),
        }


def mean_losses(losses: list[SSLLosses]) -> SSLLosses:
    """Each term's mean over the accumulated batches, without gradients."""
    return SSLLosses(*(torch.stack([value.detach() for value in term]).mean() for term in zip(*losses, strict=True)))
