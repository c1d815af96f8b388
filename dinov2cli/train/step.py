"""One iteration of DINOv2, start to end (DINOv2 paper, section 4)."""

from collections.abc import Callable

import torch
from torch import Tensor

from dinov2cli import distributed
from dinov2cli.config import Config
from dinov2cli.data.collate import MultiCropBatch
from dinov2cli.data.randomness import Stream, keyed_rng
from dinov2cli.device import Precision
from dinov2cli.train.allocator import without_collections
from dinov2cli.train.batch_norm import agree_on_averages, running_averages
from dinov2cli.train.objective import Losses, SSLMetaArch
from dinov2cli.train.optimizer import build_optimizer, clip_gradients
from dinov2cli.train.parameter_groups import apply_schedules
from dinov2cli.train.record import StepResult
from dinov2cli.train.schedules import Schedules
from dinov2cli.train.sharding import Sharding


class TrainingStep:
    """The step and what it needs beside the networks, which are on their device: schedules, AdamW, gradient scaler."""

    def __init__(self, config: Config, objective: SSLMetaArch, sharding: Sharding, precision: Precision) -> None:
        self.config, self.objective, self.sharding, self.precision = config, objective, sharding, precision
        self.networks = objective.networks
        self.schedules = Schedules(config, distributed.world_size())
        self.optimizer = build_optimizer(self.networks.student, config)
        self.scaler = torch.amp.GradScaler(precision.device.type, enabled=precision.scale_gradients)

    @without_collections()
    def __call__(
        self, iteration: int, batches: list[MultiCropBatch], mark: Callable[[str], object] = lambda part: None
    ) -> StepResult:
        """Learn from `train.gradient_accumulation` batches.

        A step whose losses or gradients are not finite leaves the student as it is; the device decides that by itself.

        Args:
            iteration: counted from 0.
            batches: on the networks' device.
            mark: called with the name of each part that has been done, for those who measure time.
        """
        values = self.schedules.at(iteration)
        apply_schedules(self.optimizer.param_groups, values)

        backbone = self.networks.student.backbone
        averages = [each.clone() for each in running_averages(backbone)]
        losses_of = []
        for batch in batches:
            drop_generator = random_numbers_of(self.config, batch.iteration)
            with self.sharding.averaging_gradients(now=batch is batches[-1]):
                with self.precision.autocast():
                    losses = self.objective(batch, values, drop_generator)
                mark("heads and losses")
                self.scaler.scale(losses.total / len(batches)).backward()
                mark("backward")
            losses_of.append(losses)
        losses = mean_losses(losses_of)

        self.scaler.unscale_(self.optimizer)
        grad_norms = clip_gradients(self.networks.student, self.config.optim.clip_grad)
        left_out = self.is_not_finite(losses, grad_norms)
        setattr(self.optimizer, "found_inf", left_out)  # noqa: B010  (AdamW reads it)
        self.scaler.step(self.optimizer)
        mark("optimizer")
        agree_on_averages(backbone, averages, left_out)
        self.networks.follow(values)
        mark("EMA")
        self.scaler.update()
        self.optimizer.zero_grad()
        return StepResult(iteration, values, losses, grad_norms, self.objective.last_view)

    def is_not_finite(self, losses: Losses, grad_norms: dict[str, Tensor]) -> Tensor:
        """1.0 if the step must be left out: float16 overflows are left to the gradient scaler."""
        watched = [losses.total] if self.precision.scale_gradients else [losses.total, *grad_norms.values()]
        return 1 - torch.stack([value.float() for value in watched]).isfinite().all().float()


def random_numbers_of(config: Config, micro_step: int) -> torch.Generator:
    """Generator of stochastic depth, a function of (seed, micro step, rank) alone."""
    numbers = keyed_rng(config.train.seed, Stream.STOCHASTIC_DEPTH, micro_step, distributed.rank())
    return torch.Generator().manual_seed(int(numbers.integers(2**63)))


def mean_losses(losses: list[Losses]) -> Losses:
    """Each number's mean over the accumulated batches and over the processes, without gradients."""
    numbers = [torch.stack([each.total, *each.logged.values()]).detach() for each in losses]
    total, *logged = distributed.all_reduce_mean(torch.stack(numbers).mean(0))
    return Losses(total, dict(zip(losses[0].logged, logged, strict=True)))
