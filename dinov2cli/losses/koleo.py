"""The regulariser that spreads features over the sphere (Sablayrolles et al., "Spreading vectors")."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2cli.device import without_autocast
from dinov2cli.losses.term import GLOBAL_VIEWS, Batch, LossTerm, Tokens


class KoLeoLoss(nn.Module):
    """Minus the mean log distance to the nearest neighbour within the batch of this process."""

    def __init__(self, eps: float = 1e-8) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, features: Tensor) -> Tensor:
        """[B, D] -> float32 scalar. With a single image there is no neighbour, and the loss is 0."""
        if features.shape[0] < 2:
            return features.float().sum() * 0
        with without_autocast(features.device.type):
            x = F.normalize(features.float(), dim=-1, eps=self.eps)
            with torch.no_grad():
                similarity = x @ x.T
                nearest = similarity.fill_diagonal_(-1).argmax(dim=1)
            distance = F.pairwise_distance(x, x[nearest], eps=self.eps)
            return -torch.log(distance + self.eps).mean()


class KoLeoTerm(LossTerm):
    """Spreads the student's class tokens of each global crop by itself; it follows nobody."""

    reads = frozenset({"cls"})

    def __init__(self) -> None:
        super().__init__()
        self.loss = KoLeoLoss()

    def forward(self, tokens: Tokens, targets: None, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        views = tokens["cls"][: batch.global_crops.shape[0]].chunk(GLOBAL_VIEWS)
        value = torch.stack([self.loss(view) for view in views]).sum()
        return value, {"koleo_loss": value / GLOBAL_VIEWS}  # for each global crop, as the reference logs it
