"""What a term of the objective is: it reads named sets of tokens, of the student and of a network that it follows.

Token sets, with B images, n crops of each of which the first two are global ones, N patches of a global crop, M masked
patches of all global crops, D embedding dimension, K prototypes; crops in crop-major order: all images' first crops,
then their second ones:

    cls            [n*B, D]   normed class tokens
    patches        [2B, N, D] normed patch tokens of the global crops
    masked         [M, D]     those that are masked for the student
    cls_scores     [n*B, K]   prototype scores of `cls`
    masked_scores  [M, K]     prototype scores of `masked`
    teacher_cls_scores, teacher_masked_scores    [2B, K], [M, K] likewise, of a frozen teacher's tokens by the heads
                              that are trained for it with the student

A follower sees the global crops alone (n = 2), and sees them unmasked.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn

GLOBAL_VIEWS = 2
"""Global crops of an image: the terms are defined for two."""

Tokens = Mapping[str, Tensor]
"""The sets that were asked for, by name."""


class Batch(Protocol):
    """What a term may ask of the batch: `data.collate.MultiCropBatch` has it."""

    @property
    def global_crops(self) -> Tensor:
        """Float32 [2B, 3, H, W]."""

    @property
    def masks(self) -> Tensor:
        """Bool [2B, N]."""

    @property
    def mask_indices(self) -> Tensor:
        """Int64 [M], where `masks` is true, counted over 2B*N."""

    @property
    def masks_weight(self) -> Tensor:
        """Float32 [M], 1 / (masked patches of that patch's image)."""


class LossTerm(nn.Module):
    """A term. What it must remember from step to step lives in child modules, whose buffers are saved with the run."""

    reads: frozenset[str] = frozenset()
    """The student's token sets that it needs."""
    reads_of_follower: frozenset[str] = frozenset()
    watched = False
    """Its targets are distributions over prototypes [2B, K], and it reads the follower's `cls`: for the monitors, which
    also look at `masked` where that is read."""
    watches_student = False
    """The features that the monitors look at are the student's `cls`, as the follower's do not change."""

    def targets(self, tokens: Tokens, values: Mapping[str, float]) -> Any:
        """What the student has to predict, from the follower's tokens, before the student's pass and without gradients.

        Args:
            tokens: what `reads_of_follower` names.
            values: of the schedules in this iteration, by name.
        """

    def forward(self, tokens: Tokens, targets: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The term as a float32 scalar, and what is logged of it: names that begin with the term's, scalars.

        Args:
            tokens: the student's, what `reads` names.
            targets: what `targets` gave.
            batch: of these tokens.
        """
        raise NotImplementedError
