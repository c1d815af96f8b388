"""Gram anchoring: similarities between patches stay as an earlier teacher has them (DINOv3 paper, section 4).

Shape legend: S crops, P patches of a crop, D embedding dimension, G patches of a Gram teacher's crop, R rows compared.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2cli.device import without_autocast
from dinov2cli.losses.term import Batch, LossTerm, Tokens


class GramLoss(nn.Module):
    """Mean squared difference of two matrices of similarities between patches.

    Args:
        normalized: similarities are cosines; else products of features as they are.
        remove_neg: negative ones count as 0, on both sides.
        remove_only_teacher_neg: those of the teacher alone.
    """

    def __init__(
        self, *, normalized: bool = True, remove_neg: bool = False, remove_only_teacher_neg: bool = False
    ) -> None:
        super().__init__()
        self.normalized, self.remove_neg = normalized, remove_neg
        self.remove_teacher_neg = remove_neg or remove_only_teacher_neg

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Features [R, D] of each, or [S, P, D] with a matrix for every crop, to a float32 scalar; 0 without rows."""
        with without_autocast(student.device.type):
            of_student = self.similarities(student.float())
            with torch.no_grad():
                of_teacher = self.similarities(teacher.float())
                of_teacher = of_teacher.clamp(min=0) if self.remove_teacher_neg else of_teacher
            of_student = of_student.clamp(min=0) if self.remove_neg else of_student
            return (of_student - of_teacher).square().sum() / max(1, of_student.numel())

    def similarities(self, features: Tensor) -> Tensor:
        """[..., R, D] -> [..., R, R]."""
        features = F.normalize(features, dim=-1) if self.normalized else features
        return features @ features.mT


class GramTerm(LossTerm):
    """The student's patches of the global crops, as it sees them masked, against the Gram teacher's.

    Args:
        loss: of features.
        img_level: a matrix for each crop; else one of all patches of this process's batch.
        tokens_used: `all`, or those of one matrix that the masks choose, `masked`, or leave, `unmasked`.
        resize_method: `bicubic` or `bilinear`, from the grid of larger Gram teacher crops to the student's.
        antialias: of this.
    """

    reads = reads_of_follower = frozenset({"patches"})

    def __init__(
        self,
        loss: GramLoss,
        *,
        img_level: bool = False,
        tokens_used: str = "all",
        resize_method: str = "bicubic",
        antialias: bool = False,
    ) -> None:
        super().__init__()
        self.loss, self.img_level, self.tokens_used = loss, img_level, tokens_used
        self.resize_method, self.antialias = resize_method, antialias

    def targets(self, tokens: Tokens, values: Mapping[str, float]) -> Tensor:
        """The Gram teacher's features [S, G, D]."""
        return tokens["patches"]

    def forward(self, tokens: Tokens, targets: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """[S, P, D] and [S, G, D] to a scalar."""
        student, teacher = tokens["patches"], self.on_grid(targets, tokens["patches"].shape[1])
        if not self.img_level:
            student, teacher = (self.chosen(features.flatten(0, 1), batch) for features in (student, teacher))
        value = self.loss(student, teacher)
        return value, {"gram_loss": value}

    @torch.no_grad()
    def on_grid(self, features_SGD: Tensor, patches: int) -> Tensor:
        """Features of square crops, resized to so many patches: float32 [S, P, D]."""
        there, wanted = (math.isqrt(number) for number in (features_SGD.shape[1], patches))
        if there == wanted:
            return features_SGD
        planes = features_SGD.float().transpose(1, 2).unflatten(2, (there, there))
        planes = F.interpolate(planes, size=(wanted, wanted), mode=self.resize_method, antialias=self.antialias)
        return planes.flatten(2).transpose(1, 2)

    def chosen(self, features: Tensor, batch: Batch) -> Tensor:
        """Those of [S*P, D] that are compared."""
        if self.tokens_used == "masked":
            return features.index_select(0, batch.mask_indices)
        if self.tokens_used == "unmasked":
            # Sorted, as how many there are is known, and the device need not be asked.
            order = batch.masks.flatten().to(torch.uint8).argsort(stable=True)
            return features.index_select(0, order[: len(order) - len(batch.mask_indices)])
        return features
