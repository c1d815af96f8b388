"""DINO's and iBOT's terms against a frozen teacher: the student sees all patches, and fresh heads may learn beside it.

A teacher of a training has heads of its own, whose scores are the targets. Released backbones have none. For them,
heads are trained on the frozen features by the very losses that follow, between the teacher's own two views; the moving
average of these heads gives the targets, of the student and of the heads themselves. With Sinkhorn-Knopp that is online
clustering with swapped predictions (Caron et al., "SwAV"; for patches, as in Darcet et al., "CAPI").
"""

from collections.abc import Callable

from torch import Tensor, nn

from dinov2cli.losses.cross_entropy import DINOTerm, iBOTTerm
from dinov2cli.losses.term import GLOBAL_VIEWS, Batch, Tokens


class DistilledDINOTerm(DINOTerm):
    """Every student crop against the frozen teacher's view of every other crop of its image.

    Args:
        centering: of the teacher's scores.
        local_weight: as of `DINOTerm`.
        fresh_heads: also train the heads that make these, on the teacher's class tokens.
    """

    watches_student = True

    def __init__(
        self, centering: nn.Module, local_weight: Callable[[int], float] | None = None, *, fresh_heads: bool
    ) -> None:
        super().__init__(centering, local_weight)
        self.reads = DINOTerm.reads | {"cls"} | ({"teacher_cls_scores"} if fresh_heads else set())
        self.reads_of_follower = frozenset({"cls", *(() if fresh_heads else ("cls_scores",))})

    def forward(self, tokens: Tokens, targets: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """As `DINOTerm`; fresh heads see one view and predict what the other gets."""
        value, logged = super().forward(tokens, targets, batch)
        if (scores := tokens.get("teacher_cls_scores")) is None:
            return value, logged
        swapped = targets.unflatten(0, (GLOBAL_VIEWS, -1)).flip(0).flatten(0, 1)
        of_heads = self.loss(scores[None], swapped[None])
        return value + of_heads, {**logged, "dino_teacher_head_loss": of_heads}


class DistilledIBOTTerm(iBOTTerm):
    """The student's patches against what the frozen teacher makes of the same patches; both see them.

    Args: as `DistilledDINOTerm`, of patches.
    """

    def __init__(self, centering: nn.Module, *, fresh_heads: bool) -> None:
        super().__init__(centering)
        self.reads = iBOTTerm.reads | ({"teacher_masked_scores"} if fresh_heads else set())
        self.reads_of_follower = frozenset({"masked" if fresh_heads else "masked_scores"})

    def forward(self, tokens: Tokens, targets: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """As `iBOTTerm`; fresh heads predict the balanced assignment of the same patch."""
        value, logged = super().forward(tokens, targets, batch)
        if (scores := tokens.get("teacher_masked_scores")) is None:
            return value, logged
        of_heads = self.patch_loss(scores, targets, batch.masks_weight, batch.global_crops.shape[0])
        return value + of_heads, {**logged, "ibot_teacher_head_loss": of_heads / GLOBAL_VIEWS}
