"""Cross-entropy between the student's scores and the teacher's targets: on images (DINO) and on patches (iBOT).

Shape legend: B images, S student crops, M masked patches, K prototypes.
"""

import torch
from torch import Tensor, nn


def soft_cross_entropy(scores: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """-sum_k targets * log_softmax(scores / temperature), in float32: [..., K], [..., K] -> [...].

    Targets need not sum to 1: with several teacher crops for a student crop, their sum gives the sum of the terms.
    Written with logsumexp, so that no array of log-probabilities is kept.
    """
    scaled = scores.float() / temperature
    return targets.sum(-1) * torch.logsumexp(scaled, dim=-1) - (targets * scaled).sum(-1)


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
