"""From the teacher's prototype scores to target distributions that do not collapse.

Shape legend: B samples of this process, K prototypes.
"""

import torch
from torch import Tensor, nn

from dinov2cli import distributed
from dinov2cli.device import without_autocast


class SoftmaxCentering(nn.Module):
    """Softmax of scores less their running mean (DINO paper, section 3.1).

    The center is a buffer, so that it is saved and restored with the model. Its update from one step's scores takes
    effect at the next step.

    Args:
        out_dim: K.
        momentum: of the running mean.
    """

    center: Tensor

    def __init__(self, out_dim: int, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(1, out_dim))

    @torch.no_grad()
    def forward(self, scores_BK: Tensor, temperature: float) -> Tensor:
        """Target probabilities, float32 [B, K]; then moves the center by the scores of all processes."""
        targets_BK = torch.softmax((scores_BK - self.center).div_(temperature), dim=-1)  # the center is float32
        # Weighted by each process's number of samples, so that the split over processes does not matter.
        total = distributed.all_reduce_sum(scores_BK.sum(0, keepdim=True, dtype=torch.float32))
        count = distributed.all_reduce_sum(torch.full((1, 1), float(scores_BK.shape[0]), device=scores_BK.device))
        moved = torch.lerp(total / count.clamp(min=1), self.center, self.momentum)
        # No samples say nothing; and one batch with non-finite scores must not spoil the center for good (the trainer
        # reports such a batch).
        usable = (count > 0) & moved.isfinite().all()
        self.center.copy_(torch.where(usable, moved, self.center))
        return targets_BK


class SinkhornKnoppCentering(nn.Module):
    """Sinkhorn-Knopp normalisation (SwAV paper; DINOv2 paper, section 4): no state."""

    @torch.no_grad()
    def forward(self, scores_BK: Tensor, temperature: float) -> Tensor:
        """Target probabilities, float32 [B, K]."""
        return sinkhorn_knopp(scores_BK, temperature)


@torch.no_grad()
def sinkhorn_knopp(scores_BK: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Assign samples to prototypes so that, over the samples of all processes, every prototype is used equally.

    exp(scores / temperature) is scaled to row sums (prototypes) of 1/K and column sums (samples) of 1/B in turn. The
    matrix itself is never rewritten: only its scaling factors are, by matrix-vector products.

    Args:
        scores_BK: teacher scores [B, K]; B may differ between processes, and be 0.
        temperature: of the exponential.
        iterations: of the alternating normalisation.

    Returns:
        float32 [B, K]; each row sums to 1.
    """
    log_BK = scores_BK.to(torch.float32, copy=True).div_(temperature)  # the one copy, which becomes the result
    # Shifting a prototype's or a sample's scores only changes its scaling factor; with every prototype's and then every
    # sample's largest entry at 1, nothing that matters can overflow or vanish, at any temperature.
    log_BK -= distributed.all_reduce_max(_largest(log_BK, dim=0))
    sample_shift_B = _largest(log_BK, dim=1)
    assign_BK = log_BK.sub_(sample_shift_B[:, None]).exp_()
    sample_scale_B = sample_shift_B.exp()
    with without_autocast(scores_BK.device.type):  # matrix-vector products, too, in float32
        for _ in range(iterations):
            # The constants 1/K and 1/B cancel, as in the end each sample's row sums to 1.
            prototype_scale_K = 1 / distributed.all_reduce_sum(sample_scale_B @ assign_BK)
            sample_scale_B = 1 / (assign_BK @ prototype_scale_K)
    return assign_BK.mul_(prototype_scale_K).mul_(sample_scale_B[:, None])


def _largest(values: Tensor, dim: int) -> Tensor:
    if values.numel():
        return values.amax(dim)
    return values.new_full((values.shape[1 - dim],), -torch.inf)  # a process without samples
