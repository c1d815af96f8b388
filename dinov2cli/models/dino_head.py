"""The projection head that maps features to prototype scores (DINO paper, section 3; DINOv2 paper, section 4)."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DINOHead(nn.Module):
    """MLP, L2 normalisation, then a weight-normalised linear layer onto the prototypes. [N, in_dim] -> [N, out_dim].

    Args:
        in_dim: width of the features.
        out_dim: number of prototypes.
        nlayers: linear layers of the MLP; 1 maps straight to the bottleneck.
        hidden_dim: width of the MLP's hidden layers.
        bottleneck_dim: width of the normalised features that meet the prototypes.
    """

    def __init__(
        self, in_dim: int, out_dim: int, nlayers: int = 3, hidden_dim: int = 2048, bottleneck_dim: int = 256
    ) -> None:
        super().__init__()
        widths = [in_dim, *[hidden_dim] * (nlayers - 1), bottleneck_dim]
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            layers += [nn.Linear(width_in, width_out), nn.GELU()]
        self.mlp = nn.Sequential(*layers[:-1])
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim)
        self.init_weights()

    def init_weights(self) -> None:
        """Linear layers as a truncated normal of standard deviation 0.02, biases 0; prototypes of length 1."""
        for module in self.mlp.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.last_layer.init_weights()

    def forward(self, x: Tensor) -> Tensor:
        x = self.mlp(x)
        # 1e-12 is not representable in float16
        x = F.normalize(x, dim=-1, eps=1e-6 if x.dtype == torch.float16 else 1e-12)
        scores: Tensor = self.last_layer(x)
        return scores


class WeightNormLinear(nn.Module):
    """Linear layer without bias whose rows are `weight_g * weight_v / |weight_v|`. [N, in] -> [N, out].

    The parameters carry the names under which released heads store them.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_features, 1))
        self.weight_v = nn.Parameter(torch.empty(out_features, in_features))

    def init_weights(self) -> None:
        """Directions as a linear layer's default (uniform), lengths 1."""
        bound = self.weight_v.shape[1] ** -0.5
        nn.init.uniform_(self.weight_v, -bound, bound)
        nn.init.ones_(self.weight_g)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, torch._weight_norm(self.weight_v, self.weight_g))
