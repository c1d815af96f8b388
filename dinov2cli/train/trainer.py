"""The training loop: around the step of `train.step` resuming, checkpoints and interruption."""

import gc
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from dinov2cli import distributed
from dinov2cli.checkpoint import Checkpointer, save_teacher
from dinov2cli.config import Config
from dinov2cli.console import Interrupted, MetricLogger, counted, interruption, logger
from dinov2cli.data.collate import MultiCropBatch
from dinov2cli.data.datasets import ImageDataset, make_dataset
from dinov2cli.data.loaders import Loader, make_train_loader
from dinov2cli.data.workers import loader_errors
from dinov2cli.device import Precision
from dinov2cli.errors import TrainingFailure
from dinov2cli.models.library_backbone import Backbone
from dinov2cli.train.agreement import next_batches
from dinov2cli.train.allocator import keep_freed_memory
from dinov2cli.train.choices import choose_attention, choose_compile
from dinov2cli.train.cost import describe, estimate, room_for_gaps
from dinov2cli.train.display import plan_rows, print_plan, teacher_rows
from dinov2cli.train.gram_teacher import GramTeacher
from dinov2cli.train.networks import FROZEN_TEACHER, SSLNetwork
from dinov2cli.train.objective import SSLMetaArch
from dinov2cli.train.optimizer import optimizer_state
from dinov2cli.train.record import Reading, Record, StepResult
from dinov2cli.train.resuming import batch_facts, check_resumable, data_facts, keep_effective_batch, tell_of_other_data
from dinov2cli.train.run_folder import RunFolder
from dinov2cli.train.sharding import Sharding, choose_sharding
from dinov2cli.train.step import TrainingStep
from dinov2cli.train.watch import Watch


@contextmanager
def stream_of(loader: Loader[MultiCropBatch]) -> Iterator[tuple[Iterator[MultiCropBatch], list[int]]]:
    """The batches, and the signals that this process gets meanwhile, for a training to heed between its steps."""
    message = "stopping after this iteration (again to stop at once, without saving)"
    # The death of a loader is told wherever the training stands; loader processes end with it.
    with loader_errors(), closing(iter(loader)) as batches, interruption(message, requeue=True) as signals:
        yield batches, signals


OnlineKnn = Callable[[Backbone], float]
"""Top-1 accuracy in percent of a teacher backbone; given from outside, as training knows nothing of evaluation."""


class Trainer:
    """A training run in its folder, new or resumed. With a process group, every process has a trainer of its own.

    Args:
        config: the run, `config.train.output_dir` its folder.
        device: where to train.
        dataset: the images; by default what `train.dataset_path` names.
        resume: go on from the newest checkpoint in the folder, if there is one. It may come from another number of
            processes, and from another `train.sharding`.
        init_backbone: loads pretrained weights into a fresh backbone (not called where a checkpoint is resumed).
        online_knn: scores the teacher every `evaluation.knn_period` iterations.
        on_teacher: called on every process with each teacher checkpoint that has been written (`evaluation.tasks`).
        beside: the run of another student, whose frozen teacher this one shares (`train.students`).

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
        init_backbone: Callable[[Backbone], None] | None = None,
        online_knn: OnlineKnn | None = None,
        on_teacher: Callable[[Path], object] | None = None,
        beside: "Trainer | None" = None,
    ) -> None:
        self.device, self.online_knn, self.on_teacher = device, online_knn, on_teacher
        self.world_size = distributed.world_size()
        self.folder = RunFolder(Path(config.train.output_dir))
        self.checkpointer = Checkpointer(self.folder.checkpoints, config.train.keep)
        self.given_config = config
        resume = distributed.broadcast_object(resume and bool(self.checkpointer.list()))
        done, facts = self.checkpointer.newest() if resume else (0, {})
        with distributed.same_error_everywhere():
            if resume:
                config = keep_effective_batch(config, facts, self.world_size)
                if self.folder.config.exists():
                    before = facts.get("world_size", self.world_size)
                    check_resumable(self.folder.config, config, done, before, self.world_size)
            self.dataset = dataset if dataset is not None else make_dataset(config.train.dataset_path)
            self.data_facts = data_facts(self.dataset)
            if resume and done < config.iterations():
                tell_of_other_data(facts, self.data_facts)
            arithmetic = config.compute_precision
            self.precision = Precision.resolve(arithmetic.precision, device, grad_scaler=arithmetic.grad_scaler)
            attention, why_attention = choose_attention(config, device, self.precision)
            self.compiled, why_compiled = choose_compile(config, device)
            mode, why_sharded = choose_sharding(config, self.precision, self.world_size)
            there: dict[str, SSLNetwork] = {}
            if beside is not None:
                mode, why_sharded = beside.sharding.mode, "as the students beside it"
                there[FROZEN_TEACHER.name] = beside.objective.networks.followers[FROZEN_TEACHER.name]
            torch.manual_seed(config.train.seed)  # initial weights; nothing later draws from the global generator
            self.objective: SSLMetaArch = SSLMetaArch(config, attention, there)
            if init_backbone is not None and not resume:
                init_backbone(self.objective.student.backbone)
                self.objective.networks.begin()
        self.gram_teacher = GramTeacher(config, self.objective.networks, is_saved="gram_teacher" in facts)
        self.gram_teacher.read()
        self.config, self.total, self.accumulation = config, config.iterations(), config.train.gradient_accumulation
        expected = estimate(config, world_size=self.world_size, sharding=mode, precision=self.precision.name)
        tight = device.type == "cpu" and not room_for_gaps(expected)
        hint = "; little room, a smaller train.batch_size_per_gpu would be faster an image" if tight else ""
        if device.type == "cpu":
            keep_freed_memory(room=not tight)
        self.choices = {
            **teacher_rows(config),
            "device": f"{device}, {self.precision.name} ({self.precision.reason})",
            "processes": f"{self.world_size}; sharding {mode} ({why_sharded})",
            "attention": f"{attention} ({why_attention})",
            "compiled": f"{'yes' if self.compiled else 'no'} ({why_compiled})",
            "expected memory": describe(expected) + hint,
        }
        self.objective.to(device).train()
        if self.compiled:
            self.objective.compile_parts()
        self.sharding: Sharding = Sharding(self.objective, mode, self.precision)
        self.step = TrainingStep(config, self.objective, self.sharding, self.precision)
        self.record = Record(config, self.folder, watched_gradients=not self.precision.scale_gradients)
        self.iteration = 0
        if resume:
            self.load()

    def train(self) -> None:
        """Train to the end of the run. A signal to any process saves and ends all; the same command then resumes.

        Raises:
            Interrupted: after Ctrl-C, SIGTERM or SIGUSR2.
            TrainingFailure: losses stay non-finite.
            DataError: the data cannot be read, or more images than `train.max_bad_fraction` allows.
            CheckpointError: a checkpoint cannot be written.
        """
        if self.iteration >= self.total:
            logger.info("finished already: %d of %d iterations", self.iteration, self.total)
            return
        loader = self.make_loader()
        with ExitStack() as stack:
            self.begin(loader, stack)
            stack.enter_context(self.record.display)
            for _ in self.steps(*stack.enter_context(stream_of(loader))):
                pass

    def begin(self, loader: Loader[MultiCropBatch], stack: ExitStack) -> None:
        """What comes before the iterations of a session, and ends with `stack`: signs of life, plan, files."""
        limit = self.config.train.hang_timeout
        watch = Watch(self.folder, total=self.total, iteration=self.iteration, hang_timeout=limit)
        self.watch = stack.enter_context(watch)
        with distributed.same_error_everywhere():
            self.print_plan(loader)
            if distributed.is_main():
                self.config.save(self.folder.config)
            self.record.open(self.iteration, stack)
        stack.callback(gc.unfreeze)
        stack.callback(self.checkpointer.finish)
        if self.iteration == 0:
            self.score_teacher()

    def print_plan(self, loader: Loader[MultiCropBatch]) -> None:
        if distributed.is_main():
            rows = plan_rows(self.config, loader, self.objective.student, self.iteration, self.choices)
            print_plan(rows, self.config.deviations())

    def steps(self, batches: Iterator[MultiCropBatch], signals: list[int]) -> Iterator[None]:
        """All iterations that are left, each when it is asked for; `signals` holds those that this process has got."""
        # On a GPU, the numbers of an iteration are read while the next one runs.
        lag = 1 if self.device.type == "cuda" else 0
        unread: deque[Reading] = deque()
        clock = time.perf_counter()
        first = self.iteration
        while self.iteration < self.total:
            asked = time.perf_counter()
            micro_batches, standing = next_batches(
                batches, self.accumulation, signals, self.checkpointer.failed(), self.record.gives_up()
            )
            data_time = time.perf_counter() - asked
            if standing.checkpoint_failed:
                self.checkpointer.finish()
            if standing.signal:
                self.save_and_stop(standing.signal, unread)
            if standing.collapsed:
                self.give_up(unread)
            self.record.count(micro_batches, standing.bad_images)

            result = self.train_step([self.on_device(batch) for batch in micro_batches])
            unread.append(self.record.take(result))

            if self.iteration == first:
                gc.freeze()  # what is there now stays: collections need not look at it again
            self.iteration += 1
            due = self.what_is_due()
            iter_time, clock = time.perf_counter() - clock, time.perf_counter()
            self.watch.beat(self.iteration, iter_time, data_time)
            while len(unread) > (0 if due else lag):
                self.record.read(unread.popleft(), iter_time, data_time)
            for save in due:
                save()
            yield

    def on_device(self, batch: MultiCropBatch) -> MultiCropBatch:
        """The batch where the networks are; from page-locked memory, nobody waits for the copy."""
        return batch.to(self.device, non_blocking=True, compiled=self.compiled)

    def make_loader(self, end: int | None = None) -> Loader[MultiCropBatch]:
        """Batches of this process from the current iteration to the end, by default that of the run."""
        return make_train_loader(
            self.config,
            start=self.iteration * self.accumulation,
            stop=(end or self.total) * self.accumulation,
            first_sample=self.record.samples_seen,
            rank=distributed.rank(),
            world_size=self.world_size,
            pin_memory=self.device.type == "cuda",
            dataset=self.dataset,
        )

    def train_step(self, batches: list[MultiCropBatch]) -> StepResult:
        return self.step(self.iteration, batches)

    def what_is_due(self) -> list[Callable[[], None]]:
        """What belongs after the iterations done so far.

        The training checkpoint comes last: a run killed before it does the rest again on resuming.
        """
        evaluation, finished = self.config.evaluation, self.iteration == self.total
        periods: dict[Callable[[], None], int] = {
            self.save_teacher: evaluation.eval_period_iterations,
            self.score_teacher: evaluation.knn_period,
            self.save_checkpoint: self.config.checkpoint_period(),
        }
        return [do for do, period in periods.items() if finished or (period and self.iteration % period == 0)]

    def save_and_stop(self, signal: int, unread: deque[Reading]) -> None:
        """Save, then raise `Interrupted` in every process."""
        for result in unread:
            self.record.read(result, 0.0, 0.0)
        self.save_checkpoint(wait=True)
        saved = "not saved, as losses are not finite," if self.record.nonfinite else "saved"
        logger.info("interrupted: %s at iteration %d; the same command resumes", saved, self.iteration)
        raise Interrupted(signal)

    def give_up(self, unread: deque[Reading]) -> None:
        """Save, then raise `TrainingFailure` in every process."""
        for result in unread:
            self.record.read(result, 0.0, 0.0)
        self.save_checkpoint(wait=True)
        raise TrainingFailure(
            f"iteration {self.iteration}: the run has collapsed, as the monitors have said above "
            f"{self.config.train.stop_on_collapse} times in a row (train.stop_on_collapse)",
            f"{self.folder.path} is saved. Start anew with other settings, or go on with train.stop_on_collapse=0.",
        )

    def save_checkpoint(self, *, wait: bool = False) -> None:
        """Write what resuming needs, in the background unless `wait` or at the end.

        While losses are non-finite, the last good one stays the newest.
        """
        if self.record.nonfinite:
            return
        facts = {**batch_facts(self.given_config, self.config, self.world_size), **self.data_facts}
        facts |= self.gram_teacher.facts()
        wait = wait or self.iteration == self.total
        with self.watch.doing("saving"):
            self.checkpointer.save(self.iteration, self.state(), facts=facts, wait=wait)

    def save_teacher(self) -> None:
        """Write the teacher for evaluation, and hand it to those who asked for it."""
        path = self.folder.teacher(self.iteration - 1)
        with self.watch.doing("saving"):
            state = self.sharding.teacher_state()
            with distributed.same_error_everywhere():
                if distributed.is_main():
                    save_teacher(path, state)
        if self.on_teacher is not None:
            with self.watch.doing("evaluating"):
                self.on_teacher(path)

    def score_teacher(self) -> None:
        """Online k-NN of the teacher, printed and appended to `knn_metrics.json`."""
        if self.online_knn is None:
            return
        with self.watch.doing("evaluating"):
            top1 = self.online_knn(self.sharding.teacher_backbone())
        teacher = f"teacher after {counted(self.iteration, 'iteration')}" if self.iteration else "untrained teacher"
        if distributed.is_main():
            logger.info("k-NN top-1 of the %s: %.1f %%", teacher, top1)
            log = MetricLogger(self.folder.knn_metrics, resume_at=self.iteration)
            log.write({"iteration": self.iteration, "knn_top1": top1})
            log.close()

    def load(self) -> None:
        """Go on from the newest whole checkpoint."""
        state = self.state()
        state["model"] = self.gram_teacher.what_is_saved(state["model"])
        iteration = self.checkpointer.load_latest(state)
        assert iteration is not None, "the caller has seen a checkpoint"
        self.iteration = iteration
        self.gram_teacher.join(iteration)
        self.record.samples_seen, self.record.bad_images = (int(value) for value in state["counters"])
        if self.step.scaler.is_enabled():
            self.step.scaler.load_state_dict(state["scaler"])
        logger.info("resumed after %d iterations from %s", iteration, self.checkpointer.folder)

    def state(self) -> dict[str, Any]:
        """All that resuming needs; the tensors are the live ones, so that loading into them restores the run."""
        return {
            "model": self.objective.saved_state(),
            "optimizer": optimizer_state(self.step.optimizer, self.objective.student),
            "scaler": self.step.scaler.state_dict(),
            "counters": torch.tensor([self.record.samples_seen, self.record.bad_images]),
        }
