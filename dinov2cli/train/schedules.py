"""Learning rate, weight decay, teacher momentum and temperature as pure functions of the iteration."""

import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from dinov2cli.config import Config


class ScheduledValues(NamedTuple):
    """What the optimizer and the teacher use in one iteration."""

    lr: float
    last_layer_lr: float
    backbone_lr: float
    weight_decay: float
    momentum: float
    teacher_temp: float


class Schedules:
    """All schedules of a run.

    Args:
        config: gives lengths and end points.
        world_size: processes, which enter the learning rate through the effective batch.
    """

    def __init__(self, config: "Config", world_size: int = 1) -> None:
        self.config = config
        self.peak_lr = config.scaled_lr(world_size)

    def at(self, iteration: int) -> ScheduledValues:
        """Values of the iteration, counted from 0."""
        config, total = self.config, self.config.iterations()
        lr = cosine(iteration, total, self.peak_lr, config.optim.min_lr, warmup=config.warmup_iterations())
        return ScheduledValues(
            lr=lr,
            last_layer_lr=0.0 if iteration < config.freeze_last_layer_iterations() else lr,
            backbone_lr=0.0 if iteration < config.freeze_backbone_iterations() else lr,
            weight_decay=cosine(iteration, total, config.optim.weight_decay, config.optim.weight_decay_end),
            momentum=cosine(iteration, total, config.teacher.momentum_teacher, config.teacher.final_momentum_teacher),
            teacher_temp=linear(
                iteration,
                config.teacher_temp_warmup_iterations(),
                config.teacher.warmup_teacher_temp,
                config.teacher.teacher_temp,
            ),
        )


def cosine(iteration: int, total: int, start: float, end: float, warmup: int = 0) -> float:
    """Linear from 0 to `start` in `warmup` iterations (both included), then half a cosine from `start` to `end`."""
    if iteration < warmup:
        return linear(iteration, warmup, 0.0, start)
    if iteration >= total:
        return end
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * (iteration - warmup) / (total - warmup)))


def linear(iteration: int, length: int, start: float, end: float) -> float:
    """Linear from `start` to `end` in `length` iterations (both ends included), then constant."""
    if iteration >= length - 1:
        return end if iteration >= length or length > 1 else start
    return start + (end - start) * iteration / (length - 1)
