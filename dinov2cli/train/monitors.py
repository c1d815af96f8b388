"""Numbers that tell a collapsed run from a healthy one, from the teacher's view of one batch.

Shape legend: B images, S teacher crops (2B), M patches, D embedding dimension, K prototypes.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2cli.train.verdicts import HIGHEST, LOWEST

LOCALITY_OF = 2048


class TeacherView(NamedTuple):
    """What the teacher makes of a batch's global crops.

    Args:
        cls: class tokens [S, D], of all images' first crops, then of their second ones.
        targets: the class tokens' target distributions [S, K].
        patches: tokens of some patches [M, D], those that the student does not see; None where nothing is masked.
        crop_of_patch: int64 [M], the crop of each.
        place_of_patch: int64 [M, 2], its row and column in the crop.
    """

    cls: Tensor
    targets: Tensor
    patches: Tensor | None = None
    crop_of_patch: Tensor | None = None
    place_of_patch: Tensor | None = None


class TeacherHealth(NamedTuple):
    """Logged every `train.log_period`.

    Args:
        teacher_entropy: mean entropy of a crop's target distribution over its maximum log K: 1 uniform, 0 one-hot.
        prototypes_in_use: how many prototypes the batch spreads over: exp of the entropy of the mean target.
        feature_std: standard deviation over the batch of the L2-normalised class tokens, times sqrt(D): about 1 for
            features spread over the sphere, 0 for identical ones.
        effective_rank: exp of the entropy of the normalised singular values of the class tokens (RankMe).
        crops_matched: share of the images whose first crop is more like their own second one than like any other: 1 / B
            by chance, and near that where features tell nothing of an image.
        patch_similarity: mean cosine similarity between patches of a crop: 1 for patches that are all alike; None where
            none are masked.
        patch_locality: how much more similar than others the adjacent patches of a crop are, in standard deviations of
            all similarities in it. It rises as patches learn to show what is where, and falls where they lose it.
    """

    teacher_entropy: float
    prototypes_in_use: float
    feature_std: float
    effective_rank: float
    crops_matched: float
    patch_similarity: float | None = None
    patch_locality: float | None = None


@torch.no_grad()
def teacher_numbers(view: TeacherView) -> dict[str, Tensor]:
    """What a batch's health is computed from, on its device; nobody waits for it.

    Returns:
        the class tokens, `cls` [S, D], as singular values would wait; the other fields of `TeacherHealth`, scalars.
    """
    cls_SD, probs_SK = view.cls.float(), view.targets.float()
    unit_SD = F.normalize(cls_SD, dim=-1)
    first_BD, second_BD = unit_SD.chunk(2)
    best_B = (first_BD @ second_BD.T).argmax(1)
    numbers = {
        "cls": cls_SD,
        "teacher_entropy": entropy(probs_SK).mean().double() / math.log(probs_SK.shape[1]),
        "prototypes_in_use": entropy(probs_SK.mean(0)).exp(),
        "feature_std": unit_SD.std(0).mean().double() * math.sqrt(cls_SD.shape[1]),
        "crops_matched": (best_B == torch.arange(len(best_B), device=best_B.device)).double().mean(),
    }
    if view.patches is not None and view.crop_of_patch is not None and len(view.patches):
        numbers["patch_similarity"] = patch_similarity(view.patches, view.crop_of_patch, len(cls_SD))
        assert view.place_of_patch is not None, "given with the crops"
        numbers["patch_locality"] = patch_locality(view.patches, view.crop_of_patch, view.place_of_patch, len(cls_SD))
    return numbers


def teacher_health(numbers: Mapping[str, Tensor]) -> TeacherHealth:
    """Health of the teacher on a batch, from its `teacher_numbers` in main memory."""
    singular = torch.linalg.svdvals(numbers["cls"])
    return TeacherHealth(
        teacher_entropy=numbers["teacher_entropy"].item(),
        prototypes_in_use=numbers["prototypes_in_use"].item(),
        feature_std=numbers["feature_std"].item(),
        effective_rank=entropy(singular / singular.sum().clamp(min=1e-12)).exp().item(),
        crops_matched=numbers["crops_matched"].item(),
        **{name: numbers[name].item() for name in ("patch_similarity", "patch_locality") if name in numbers},
    )


def patch_similarity(patches_MD: Tensor, crop_M: Tensor, crops: int) -> Tensor:
    """Mean cosine similarity over all pairs of different patches of the same crop, float64 scalar."""
    unit_MD = F.normalize(patches_MD.float(), dim=-1)
    sums_SD = torch.zeros(crops, unit_MD.shape[1], device=unit_MD.device).index_add_(0, crop_M, unit_MD)
    n_S = torch.zeros(crops, device=crop_M.device).index_add_(0, crop_M, torch.ones_like(crop_M, dtype=torch.float32))
    pairs = (n_S * (n_S - 1)).sum().clamp(min=1)
    return (sums_SD.double().square().sum() - n_S.sum()) / pairs


def patch_locality(patches_MD: Tensor, crop_M: Tensor, place_M2: Tensor, crops: int) -> Tensor:
    """Mean similarity of adjacent patches, less that of their crop, over the standard deviation around that; scalar.

    Of the first `LOCALITY_OF` patches, as every pair of them is looked at.

    Args:
        place_M2: row and column of each patch.
    """
    few = slice(LOCALITY_OF)
    unit_MD, crop_M, place_M2 = F.normalize(patches_MD[few].float(), dim=-1), crop_M[few], place_M2[few]
    same_MM = (crop_M[:, None] == crop_M).float().fill_diagonal_(0)
    adjacent_MM = same_MM * ((place_M2[:, None] - place_M2).abs().sum(-1) == 1)
    similarity_MM = unit_MD @ unit_MD.T
    sums_S, pairs_S = (
        torch.zeros(crops, device=crop_M.device).index_add_(0, crop_M, of_pairs.sum(1))
        for of_pairs in (similarity_MM * same_MM, same_MM)
    )
    above_mean_MM = similarity_MM - (sums_S / pairs_S.clamp(min=1))[crop_M][:, None]
    of_adjacent = (above_mean_MM * adjacent_MM).sum() / adjacent_MM.sum().clamp(min=1)
    spread = ((above_mean_MM.square() * same_MM).sum() / same_MM.sum().clamp(min=1)).sqrt()
    return of_adjacent / spread.clamp(min=1e-6)


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
