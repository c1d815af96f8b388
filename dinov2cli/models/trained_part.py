"""Train a part of a backbone only: its last blocks, or low-rank adapters (LoRA, Hu et al. 2021, section 4.1).

Adapters keep the names of what they adapt: `qkv.weight` stays, `qkv.lora_A` and `qkv.lora_B` come beside it. So plain
weights load into an adapted backbone, and `plain_parameters` gives them back with the adapters added in.

Shape legend: R rank.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dinov2cli.config.vit import TrainedPart
from dinov2cli.models.vision_transformer import VisionTransformer


class LowRankLinear(nn.Linear):
    """A linear layer whose own weights stay, beside two thin matrices that learn: Wx + b + B(Ax).

    B begins as zeros, so that at first the layer gives what it gave. Its change of W has rank R at most.
    """

    bias_mask: Tensor | None

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        nn.Module.__init__(self)  # the weights are the layer's
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.register_buffer("bias_mask", getattr(layer, "bias_mask", None))
        self.lora_A = nn.Parameter(self.weight.new_empty(rank, self.in_features))
        self.lora_B = nn.Parameter(self.weight.new_zeros(self.out_features, rank))
        if not self.weight.is_meta:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias if self.bias_mask is None else self.bias * self.bias_mask.to(self.bias.dtype)
        return F.linear(x, self.weight, bias) + F.linear(F.linear(x, self.lora_A), self.lora_B)

    @torch.no_grad()
    def merged(self) -> Tensor:
        """W + BA: this process's rows where the layer is spread over processes (collective then)."""
        of_a = self.lora_A.full_tensor() if isinstance(self.lora_A, DTensor) else self.lora_A
        return local(self.weight) + local(self.lora_B) @ of_a

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *arguments: object) -> None:
        """Weights without adapters leave those that are there."""
        for name in ("lora_A", "lora_B"):
            state_dict.setdefault(prefix + name, getattr(self, name).detach())
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def train_only(backbone: VisionTransformer, part: TrainedPart) -> None:
    """Keep gradients off all else, in place: `all`; the last blocks and norm; or adapters in all blocks' layers."""
    if part.kind == "all":
        return
    backbone.requires_grad_(False)
    if part.kind == "lora":
        for block in backbone.blocks:
            linear = [(name, module) for name, module in block.named_modules() if isinstance(module, nn.Linear)]
            for name, module in linear:
                parent, _, own = name.rpartition(".")
                setattr(block.get_submodule(parent), own, LowRankLinear(module, part.number))
        return
    for module in (*backbone.blocks[-part.number :], backbone.norm, backbone.cls_norm, backbone.local_cls_norm):
        if module is not None:
            module.requires_grad_(True)


def plain_parameters(network: nn.Module) -> dict[str, Tensor]:
    """By their plain names, what this process holds of a network's parameters, adapters merged into what they adapt.

    Collective where parameters are spread over processes and there are adapters.
    """
    found = {
        name: local(parameter)
        for name, parameter in network.named_parameters()
        if not name.endswith((".lora_A", ".lora_B"))
    }
    adapted = (pair for pair in network.named_modules() if isinstance(pair[1], LowRankLinear))
    return found | {f"{name}.weight": layer.merged() for name, layer in adapted if isinstance(layer, LowRankLinear)}


def local(tensor: Tensor) -> Tensor:
    """What this process holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
