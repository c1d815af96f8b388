"""Which parameters share a learning-rate factor and a weight decay (layerwise decay; BEiT and DINOv2 papers)."""

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from torch import nn

from dinov2cli.train.schedules import ScheduledValues

if TYPE_CHECKING:
    from dinov2cli.config import Config

FIRST_LAYER = ("patch_embed.", "cls_token", "pos_embed", "register_tokens", "mask_token")


def parameter_groups(student: nn.Module, config: "Config") -> list[dict[str, Any]]:
    """AdamW parameter groups of a network with children `backbone`, `dino_head` and perhaps `ibot_head`.

    Each group holds the parameters that are treated alike, and says how: `lr_multiplier`, `wd_multiplier` (0 or 1),
    `is_last_layer` (prototypes, which are frozen at first) and `is_backbone`.
    """
    depth = config.arch().depth
    alike: dict[tuple[float, float, bool, bool], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in student.named_parameters():
        module, _, name_within = name.partition(".")
        is_backbone = module == "backbone"
        layers_above = depth + 1 - layer_of(name_within, depth) if is_backbone else 0
        lr_multiplier = config.optim.layerwise_decay**layers_above
        if is_backbone and name_within.startswith("patch_embed."):
            lr_multiplier *= config.optim.patch_embed_lr_mult
        undecayed = name.endswith(".bias") or "norm" in name or "gamma" in name
        key = (lr_multiplier, 0.0 if undecayed else 1.0, "last_layer" in name, is_backbone)
        alike[key].append(parameter)
    return [
        {
            "params": parameters,
            "lr_multiplier": lr_multiplier,
            "wd_multiplier": wd_multiplier,
            "is_last_layer": is_last_layer,
            "is_backbone": is_backbone,
        }
        for (lr_multiplier, wd_multiplier, is_last_layer, is_backbone), parameters in alike.items()
    ]


def layer_of(name: str, depth: int) -> int:
    """Layer of a backbone parameter: 0 for embeddings and tokens, i+1 for block i, depth+1 for what follows."""
    if name.startswith(FIRST_LAYER):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return depth + 1


def apply_schedules(groups: list[dict[str, Any]], values: ScheduledValues) -> None:
    """Set each group's learning rate and weight decay for the coming step."""
    for group in groups:
        lr = values.backbone_lr if group["is_backbone"] else values.lr
        if group["is_last_layer"]:
            lr = values.last_layer_lr
        group["lr"] = lr * group["lr_multiplier"]
        group["weight_decay"] = values.weight_decay * group["wd_multiplier"]
