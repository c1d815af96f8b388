"""Numbers that tell a collapsed run from a healthy one, from the teacher's view of one batch.

Shape legend: S teacher crops (2B), D embedding dimension, K prototypes.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2cli.train.verdicts import HIGHEST, LOWEST


class TeacherView(NamedTuple):
    """Class tokens [S, D] of the teacher's crops, and their target distributions [S, K]."""

    cls: Tensor
    targets: Tensor


class TeacherHealth(NamedTuple):
    """Logged every `train.log_period`.

    Args:
        teacher_entropy: mean entropy of a crop's target distribution over its maximum log K: 1 uniform, 0 one-hot.
        prototypes_in_use: how many prototypes the batch spreads over: exp of the entropy of the mean target.
        feature_std: standard deviation over the batch of the L2-normalised class tokens, times sqrt(D): about 1 for
            features spread over the sphere, 0 for identical ones.
        effective_rank: exp of the entropy of the normalised singular values of the class tokens (RankMe).
    """

    teacher_entropy: float
    prototypes_in_use: float
    feature_std: float
    effective_rank: float


@torch.no_grad()
def teacher_numbers(view: TeacherView) -> dict[str, Tensor]:
    """What a batch's health is computed from, on its device; nobody waits for it.

    Returns:
        the class tokens, `cls` [S, D], as singular values would wait; the other fields of `TeacherHealth`, scalars.
    """
    cls_SD, probs_SK = view.cls.float(), view.targets.float()
    unit_SD = F.normalize(cls_SD, dim=-1)
    return {
        "cls": cls_SD,
        "teacher_entropy": entropy(probs_SK).mean().double() / math.log(probs_SK.shape[1]),
        "prototypes_in_use": entropy(probs_SK.mean(0)).exp(),
        "feature_std": unit_SD.std(0).mean().double() * math.sqrt(cls_SD.shape[1]),
    }


def teacher_health(numbers: Mapping[str, Tensor]) -> TeacherHealth:
    """Health of the teacher on a batch, from its `teacher_numbers` in main memory."""
    singular = torch.linalg.svdvals(numbers["cls"])
    return TeacherHealth(
        teacher_entropy=numbers["teacher_entropy"].item(),
        prototypes_in_use=numbers["prototypes_in_use"].item(),
        feature_std=numbers["feature_std"].item(),
        effective_rank=entropy(singular / singular.sum().clamp(min=1e-12)).exp().item(),
    )


def collapse_verdict(health: TeacherHealth, samples: int) -> str | None:
    """A plain sentence if the numbers of a batch of S `samples` say collapse, else None."""
    if samples < 8:  # low numbers mean little then
        return None
    if health.feature_std < LOWEST["feature_std"]:
        return (
            f"all images get nearly the same feature (feature_std {health.feature_std:.2g}): the run has collapsed. "
            "Lower optim.base_lr, raise optim.warmup_epochs, or raise dino.koleo_loss_weight"
        )
    if health.effective_rank < LOWEST["effective_rank"]:
        return (
            f"features vary along one direction only (effective_rank {health.effective_rank:.2f}): the run is "
            "collapsing. Lower optim.base_lr or raise dino.koleo_loss_weight"
        )
    if health.prototypes_in_use < LOWEST["prototypes_in_use"]:
        return (
            f"the teacher maps all images to one prototype (prototypes_in_use {health.prototypes_in_use:.2f}): the run "
            "has collapsed. Lower teacher.teacher_temp less far, or use train.centering=sinkhorn_knopp"
        )
    if health.teacher_entropy > HIGHEST["teacher_entropy"]:
        return (
            f"the teacher's targets are uniform (teacher_entropy {health.teacher_entropy:.5f} of 1): nothing is "
            "learned. Lower teacher.warmup_teacher_temp and teacher.teacher_temp"
        )
    return None


def entropy(probabilities: Tensor) -> Tensor:
    """-sum p log p over the last dimension, in nats."""
    return -torch.xlogy(probabilities, probabilities).sum(-1)
