"""What a configuration lets expect before its first iteration: a run too short for its settings, or one that cannot
learn. Imports no torch."""

import math
from collections.abc import Iterator
from typing import NamedTuple

from dinov2cli.config import Config
from dinov2cli.train.schedules import Schedules

SHORT = 10_000
"""Iterations below which a run is too short to make up for what is slow at its beginning."""
STUDENT_TEMP = 0.1
"""That of `losses.cross_entropy`."""
MOST_OF_START = 0.2
"""Share of the teacher that may be the fresh weights at the end."""
HIGHEST_LR, USUAL_LR = 0.02, 0.002
"""The reference's runs reach 0.007 at most; networks of a few blocks learnt here with 0.0075."""
COLDEST = 0.005
"""Teacher temperature with which the demo learns, within the spread of seeds, as with its own, twice that."""
SPREAD = 2
"""Prototypes for each class token with which runs learn, as those of small_pictures do."""
OPEN = 0.1
"""LayerScale from which a block counts as open."""


class Advice(NamedTuple):
    """What was found, and what to change: keys with their values."""

    found: str
    change: str

    def __str__(self) -> str:
        return f"{self.found}. Change: {self.change}" if self.change else self.found


def forewarnings(config: Config, images_per_iteration: int) -> list[Advice]:
    """What to change before training begins; empty for settings that fit each other and the length of the run.

    Args:
        images_per_iteration: of all processes and accumulated batches together.
    """
    return list(_forewarnings(config, images_per_iteration))


def _forewarnings(config: Config, images_per_iteration: int) -> Iterator[Advice]:
    teacher, optim, total = config.teacher, config.optim, config.iterations()
    fresh = not config.student.pretrained_weights
    if many := too_many_prototypes(config, images_per_iteration):
        yield many
    if fresh and (left := share_of_start(config)) > MOST_OF_START:
        enough = max(0.0, math.floor(1000 * (1 - 6 / total)) / 1000)
        yield Advice(
            f"teacher.momentum_teacher={teacher.momentum_teacher:g} is slow for a run of {total} iterations: "
            f"{left:.0%} of the teacher's weights will be those that it began with",
            f"teacher.momentum_teacher={enough:g}",
        )
    if fresh and (closed := closed_layerscale(config, images_per_iteration)):
        yield closed
    world = max(1, images_per_iteration // config.effective_batch())
    if (peak := config.scaled_lr(world)) > HIGHEST_LR:
        lower = optim.base_lr * USUAL_LR / peak
        yield Advice(f"the learning rate rises to {peak:.2g}, far above what AdamW bears", f"optim.base_lr={lower:.2g}")
    if optim.warmup_epochs > 0.5 * optim.epochs:
        yield Advice(
            f"optim.warmup_epochs={optim.warmup_epochs} is most of the run, optim.epochs={optim.epochs}: the learning "
            "rate hardly reaches its peak",
            f"optim.warmup_epochs={optim.epochs // 10}",
        )
    warm, temperatures = teacher.warmup_teacher_temp_epochs, (teacher.warmup_teacher_temp, teacher.teacher_temp)
    if warm > optim.epochs and temperatures[0] != temperatures[1]:
        last = Schedules(config).functions["teacher_temp"](total - 1)
        yield Advice(
            f"teacher.warmup_teacher_temp_epochs={warm} is longer than the run, optim.epochs={optim.epochs}: the "
            f"temperature ends at {last:.3g} instead of teacher.teacher_temp={temperatures[1]:g}",
            f"teacher.warmup_teacher_temp_epochs={max(1, 3 * optim.epochs // 10)}",
        )
    if optim.freeze_last_layer_epochs >= optim.epochs:
        yield Advice(
            f"optim.freeze_last_layer_epochs={optim.freeze_last_layer_epochs} is all of the run, optim.epochs="
            f"{optim.epochs}: the prototypes never learn",
            f"optim.freeze_last_layer_epochs={optim.epochs // 10}",
        )
    if max(temperatures) >= STUDENT_TEMP:
        yield Advice(
            f"a teacher temperature of {max(temperatures):g} is not below the student's, {STUDENT_TEMP:g}: the "
            "targets are no sharper than what the student says, and tend to uniform ones",
            "teacher.warmup_teacher_temp=0.04 teacher.teacher_temp=0.07",
        )
    if min(temperatures) < COLDEST:
        yield cold(config)


def too_many_prototypes(config: Config, images_per_iteration: int) -> Advice | None:
    """Of a short run whose Sinkhorn-Knopp has too few class tokens to spread over the prototypes."""
    prototypes, tokens = config.dino.head_n_prototypes, class_tokens(config, images_per_iteration)
    if config.train.centering != "sinkhorn_knopp" or prototypes <= SPREAD * tokens or config.iterations() >= SHORT:
        return None
    if config.student.pretrained_weights or not config.dino.loss_weight:
        return None
    return Advice(
        f"dino.head_n_prototypes={prototypes} is more than twice the {tokens} class tokens of an iteration: "
        f"Sinkhorn-Knopp uses all prototypes evenly, so that a target is spread over {prototypes / tokens:.3g} of them "
        f"at least, and {config.iterations()} iterations teach little",
        f"dino.head_n_prototypes={max(2, 2 ** int(math.log2(tokens)))}, or a larger train.batch_size_per_gpu",
    )


def class_tokens(config: Config, images_per_iteration: int) -> int:
    """That are balanced over the prototypes at a time: two global crops of each image of all processes."""
    return config.crops.global_crops_number * images_per_iteration // config.train.gradient_accumulation


def share_of_start(config: Config) -> float:
    """Share of the teacher's weights, at the end, that is what it began with: the product of all momenta."""
    teacher = config.teacher
    mean = (teacher.momentum_teacher + teacher.final_momentum_teacher) / 2  # of half a cosine
    return math.exp(-config.iterations() * (1 - mean))


def closed_layerscale(config: Config, images_per_iteration: int) -> Advice | None:
    """Of a LayerScale that AdamW, which moves it by about the learning rate an iteration, has no time to open."""
    if config.student.library():
        return None
    scale, total = config.student.layerscale, config.iterations()
    schedule = Schedules(config, max(1, images_per_iteration // config.effective_batch())).functions["lr"]
    step = max(1, total // 1000)
    moved = step * sum(schedule(iteration) for iteration in range(0, total, step))
    if not scale or scale + moved >= OPEN:
        return None
    return Advice(
        f"student.layerscale={scale:g} opens too slowly: the learning rates of the run add up to {moved:.2g}, by which "
        "AdamW moves it, so that the blocks hardly act and the class token is the same for all images",
        "student.layerscale=1.0, or a longer run",
    )


def cold(config: Config) -> Advice:
    """Of a teacher temperature that leaves nothing but the largest score."""
    coldest = min(config.teacher.warmup_teacher_temp, config.teacher.teacher_temp)
    return Advice(
        f"a teacher temperature of {coldest:g} makes every target one prototype and nothing else, whichever is ahead "
        "by a hair",
        "teacher.warmup_teacher_temp=0.04 teacher.teacher_temp=0.04",
    )
