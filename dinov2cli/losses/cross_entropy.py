"""Cross-entropy between the student's scores and the teacher's targets: on images (DINO) and on patches (iBOT).

Shape legend: B images, S student crops, M masked patches, K prototypes.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dinov2cli.losses.term import GLOBAL_VIEWS, Batch, LossTerm, Tokens


def soft_cross_entropy(scores: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """-sum_k targets * log_softmax(scores / temperature), in float32: [..., B, K], [B, K] -> [..., B].

    Targets are shared along the scores' leading dimensions, and are constants. They need not sum to 1: with several
    teacher crops for a student crop, their sum gives the sum of the terms. Rows are worked on a few at a time, forward
    and backward, so that beside the scores and their gradient no array of their size exists, in whatever dtype they
    are. Under torch.compile the compiler sees to that: it is given the formula.
    """
    if torch.compiler.is_compiling():
        scaled = scores.to(torch.promote_types(scores.dtype, torch.float32)) * (1 / temperature)
        return targets.sum(-1) * torch.logsumexp(scaled, -1) - (scaled * targets).sum(-1)
    result: Tensor = _SoftCrossEntropy.apply(scores, targets, temperature)  # type: ignore[no-untyped-call]
    return result


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, targets: Tensor, temperature: float) -> Tensor:
        exact = torch.promote_types(scores.dtype, torch.float32)
        crops = math.prod(scores.shape[: scores.dim() - targets.dim()])
        rows = scores.reshape(crops, *targets.shape)  # [S, B, K]
        logsumexp = torch.empty(rows.shape[:-1], dtype=exact, device=scores.device)
        product = torch.empty_like(logsumexp)
        mass = targets.sum(-1).to(exact)
        inverse = mass.new_full((1,), 1 / temperature)  # an array, so that half-precision scores are promoted
        for at in _chunks(rows):
            scaled = rows[at] * inverse
            torch.logsumexp(scaled, dim=-1, out=logsumexp[at])
            product[at] = (scaled * targets[at[1]]).sum(-1)  # a dot product would follow autocast
        ctx.save_for_backward(rows, targets, logsumexp, mass, inverse)
        ctx.temperature, ctx.shape = temperature, scores.shape
        return (mass * logsumexp - product).reshape(scores.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        rows, targets, logsumexp, mass, inverse = ctx.saved_tensors
        factor = (gradient.reshape(logsumexp.shape) / ctx.temperature)[..., None]
        factor_of_softmax = factor * mass[:, None]
        of_scores = torch.empty_like(rows)
        for at in _chunks(rows):  # (sum of targets) * softmax - targets, in place unless the scores are half precision
            place = of_scores[at]
            part = place if place.dtype == logsumexp.dtype else torch.empty_like(place, dtype=logsumexp.dtype)
            torch.mul(rows[at], inverse, out=part)
            part.sub_(logsumexp[at][:, None]).exp_().mul_(factor_of_softmax[at])
            torch.addcmul(part, targets[at[1]].to(part.dtype), factor[at], value=-1, out=place)
        return of_scores.reshape(ctx.shape), None, None


def _chunks(rows: Tensor) -> Iterator[tuple[int, slice]]:
    """Consecutive parts of [S, B, K] of few enough rows to stay in a processor's cache, or to fill a GPU."""
    s, b, k = rows.shape
    at_once = max(1, (2**20 if rows.device.type == "cpu" else 2**26) // max(k, 1))
    for crop in range(s):
        for start in range(0, b, at_once):
            yield crop, slice(start, min(start + at_once, b))


class DINOLoss(nn.Module):
    """Cross-entropy between the class tokens' distributions of student and teacher crops (DINO paper, equation 3)."""

    def __init__(self, student_temp: float = 0.1) -> None:
        super().__init__()
        self.student_temp = student_temp

    def forward(self, student_scores: Tensor, teacher_targets: Tensor) -> Tensor:
        """Sum over all pairs (student crop, teacher crop) of the mean over images.

        Args:
            student_scores: [S, B, K].
            teacher_targets: probabilities [crops, B, K].

        Returns:
            float32 scalar.
        """
        return soft_cross_entropy(student_scores, teacher_targets.sum(0), self.student_temp).mean(-1).sum()


class iBOTPatchLoss(nn.Module):  # noqa: N801  (the method's own spelling)
    """Cross-entropy on masked patches (iBOT paper, equation 2): each image weighs the same, however much is masked."""

    def __init__(self, student_temp: float = 0.1) -> None:
        super().__init__()
        self.student_temp = student_temp

    def forward(self, student_scores: Tensor, teacher_targets: Tensor, masks_weight: Tensor, n_images: int) -> Tensor:
        """Sum over masked patches of `masks_weight` times cross-entropy, over the number of images.

        Args:
            student_scores: [M, K], of the masked patches alone.
            teacher_targets: probabilities [M, K], of the same patches as the teacher sees them.
            masks_weight: [M], 1 over the masked patches of the patch's image.
            n_images: images in the batch, masked or not.

        Returns:
            float32 scalar; 0 where nothing is masked.
        """
        terms = soft_cross_entropy(student_scores, teacher_targets, self.student_temp)
        return (terms * masks_weight).sum() / n_images


class CenteredTerm(LossTerm):
    """Cross-entropy with the follower's centered scores of the same tokens.

    Args:
        centering: from scores and a temperature to distributions that do not collapse.
    """

    scores: str
    """The token set that it reads of both."""

    def __init__(self, centering: nn.Module) -> None:
        super().__init__()
        self.centering = centering

    def targets(self, tokens: Tokens, values: Mapping[str, float]) -> Tensor:
        """Distributions [2B, K] or [M, K]."""
        targets: Tensor = self.centering(tokens[self.scores], values["teacher_temp"])
        return targets


class DINOTerm(CenteredTerm):
    """Every student crop against the teacher's view of every *other* crop of its image: one term with two sums.

    Args:
        local_weight: of the local crops' sum, by iteration; None: 1. What is logged of them is without it.
    """

    scores = "cls_scores"
    reads = frozenset({scores})
    reads_of_follower = frozenset({"cls", scores})
    watched = True

    def __init__(self, centering: nn.Module, local_weight: Callable[[int], float] | None = None) -> None:
        super().__init__(centering)
        self.loss = DINOLoss()
        self.local_weight, self._local_weight = local_weight, 1.0

    def targets(self, tokens: Tokens, values: Mapping[str, float]) -> Tensor:
        """As of any; the weight of the local crops in this iteration is kept until `forward`."""
        if self.local_weight is not None:
            self._local_weight = self.local_weight(int(values["iteration"]))
        return super().targets(tokens, values)

    def forward(self, tokens: Tokens, targets: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """[n*B, K] and [2B, K] to a scalar."""
        scores, n_global = tokens["cls_scores"], targets.shape[0]
        views = targets.unflatten(0, (GLOBAL_VIEWS, -1))
        global_scores, local_scores = scores.split([n_global, scores.shape[0] - n_global])
        n_local = local_scores.shape[0] // views.shape[1]
        n_terms = GLOBAL_VIEWS * (GLOBAL_VIEWS - 1) + max(GLOBAL_VIEWS * n_local, 1)

        of_global = self.loss(global_scores[None], views.flip(0).flatten(0, 1)[None]) * GLOBAL_VIEWS / n_terms
        of_local = torch.zeros_like(of_global)
        if n_local:
            of_local = self.loss(local_scores.unflatten(0, (n_local, -1)), views) / n_terms
        weighted = of_local if self.local_weight is None else self._local_weight * of_local
        return of_global + weighted, {"dino_local_crops_loss": of_local, "dino_global_crops_loss": of_global}


class iBOTTerm(CenteredTerm):  # noqa: N801
    """The masked patches of the global crops against what the teacher, who sees them, makes of them."""

    scores = "masked_scores"
    reads = frozenset({scores})
    reads_of_follower = frozenset({"masked", scores})

    def __init__(self, centering: nn.Module) -> None:
        super().__init__(centering)
        self.patch_loss = iBOTPatchLoss()

    def forward(self, tokens: Tokens, targets: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Twice [M, K] to a scalar."""
        value = self.patch_loss(tokens["masked_scores"], targets, batch.masks_weight, batch.global_crops.shape[0])
        return value, {"ibot_loss": value / GLOBAL_VIEWS}  # for each global crop, as the reference logs it
