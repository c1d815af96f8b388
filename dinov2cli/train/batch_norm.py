"""What BatchNorm remembers of its batches: running averages, which no optimizer moves. Vision transformers have none.

In training, each process normalises by the statistics of its own crops, those of one size at a time.
"""

import torch
from torch import Tensor, nn

from dinov2cli import distributed
from dinov2cli.models.library_backbone import LibraryBackbone


def running_averages(backbone: nn.Module) -> list[Tensor]:
    """Of a backbone, the live tensors in a fixed order; those of another library's alone change in training."""
    if not isinstance(backbone, LibraryBackbone):
        return []
    return [buffer for buffer in backbone.buffers() if buffer.is_floating_point()]


@torch.no_grad()
def agree_on_averages(backbone: nn.Module, before: list[Tensor], left_out: Tensor) -> None:
    """Give them, after a step, the mean of all processes, which have seen different images. Collective.

    Args:
        before: clones of them from before the step, which they become again if that is left out.
        left_out: a scalar, not 0 if it is.
    """
    if not (own := running_averages(backbone)):
        return
    agreed = distributed.all_reduce_mean(torch.cat([each.flatten() for each in own]))
    agreed = torch.where(left_out != 0, torch.cat([each.flatten() for each in before]), agreed)
    for each, values in zip(own, agreed.split([each.numel() for each in own]), strict=True):
        each.copy_(values.view_as(each))
