"""Learning rate, weight decay, teacher momentum and temperature as pure functions of the iteration."""

import math
from collections.abc import Callable

from dinov2cli.config import Config
from dinov2cli.config.gram import WeightSchedule

Schedule = Callable[[int], float]
"""A value for the iteration, counted from 0."""


class Schedules:
    """All schedules of a run by name, in `functions`. `world_size` enters the learning rate by the effective batch."""

    def __init__(self, config: Config, world_size: int = 1) -> None:
        self.peak_lr = config.scaled_lr(world_size)
        optim, teacher, total = config.optim, config.teacher, config.iterations()
        warmup = config.iterations(optim.warmup_epochs)
        temp_warmup = config.iterations(teacher.warmup_teacher_temp_epochs)  # may exceed the run

        def lr(iteration: int) -> float:
            return cosine(iteration, total, self.peak_lr, optim.min_lr, warmup=warmup)

        self.functions: dict[str, Schedule] = {
            "lr": lr,
            "last_layer_lr": frozen_until(config.iterations(optim.freeze_last_layer_epochs), lr),
            "backbone_lr": frozen_until(config.iterations(config.student.freeze_backbone_epochs), lr),
            "weight_decay": lambda i: cosine(i, total, optim.weight_decay, optim.weight_decay_end),
            "momentum": lambda i: cosine(i, total, teacher.momentum_teacher, teacher.final_momentum_teacher),
            "teacher_temp": lambda i: linear(i, temp_warmup, teacher.warmup_teacher_temp, teacher.teacher_temp),
            "dino_local_loss_weight": local_loss_weight(config) or (lambda i: 1.0),
            "gram_loss_weight": gram_loss_weight(config),
        }

    def at(self, iteration: int) -> dict[str, float]:
        """What the step of this iteration goes by: the value of every schedule, and `iteration` itself."""
        return {"iteration": iteration, **{name: value(iteration) for name, value in self.functions.items()}}


def local_loss_weight(config: Config) -> Schedule | None:
    """Of the local crops' part of DINO's loss; None where it is 1."""
    schedule = config.dino.local_loss_weight_schedule
    return None if schedule is None else weight_schedule(schedule, config)


def gram_loss_weight(config: Config) -> Schedule:
    """Of the Gram loss; 0 before there is a Gram teacher."""
    gram = config.gram
    if not gram.use_loss:
        return lambda iteration: 0.0
    schedule = gram.loss_weight_schedule
    weight = (lambda iteration: gram.loss_weight) if schedule is None else weight_schedule(schedule, config)
    return frozen_until(0 if gram.ckpt else gram.it_load_ema_teacher, weight)


def weight_schedule(schedule: WeightSchedule, config: Config) -> Schedule:
    """Linear from `start` to `peak`, which is the first value after it; a half cosine with both its ends; `end`."""
    warmup = config.iterations(schedule.warmup_epochs)
    rest = config.iterations() - warmup
    length = rest if schedule.cosine_epochs is None else config.iterations(schedule.cosine_epochs)

    def weight(iteration: int) -> float:
        if iteration < warmup:
            return schedule.start + (schedule.peak - schedule.start) * iteration / warmup
        if iteration - warmup >= length:
            return schedule.end
        turned = math.cos(math.pi * (iteration - warmup) / max(1, length - 1))
        return schedule.end + 0.5 * (schedule.peak - schedule.end) * (1 + turned)

    return weight


def frozen_until(start: int, schedule: Schedule) -> Schedule:
    """0 before the iteration `start`, then `schedule`."""
    return lambda iteration: 0.0 if iteration < start else schedule(iteration)


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
