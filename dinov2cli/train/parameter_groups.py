"""Which parameters share a learning-rate factor and a weight decay (layerwise decay; BEiT and DINOv2 papers)."""

from collections import defaultdict
from typing import Any

from torch import nn

from dinov2cli.config import Config


def parameter_groups(student: nn.Module, config: Config) -> list[dict[str, Any]]:
    """AdamW parameter groups of a network with a child `backbone` and heads beside it, without what stays as it is.

    Each group holds the parameters that are treated alike, and says how: `lr_schedule` names the schedule of its
    learning rate (prototypes and backbone have their own, as they may be frozen at first), `lr_multiplier` and
    `wd_multiplier` (0 or 1) are its factors.
    """
    backbone: Any = student.get_submodule("backbone")
    alike: dict[tuple[str, float, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in student.named_parameters():
        if not parameter.requires_grad:
            continue
        module, _, name_within = name.partition(".")
        schedule, lr_multiplier = "last_layer_lr" if "last_layer" in name else "lr", 1.0
        if module == "backbone":
            schedule = "backbone_lr"
            lr_multiplier = config.optim.layerwise_decay ** (backbone.depth + 1 - backbone.layer_of(name_within))
            if name_within.startswith("patch_embed."):
                lr_multiplier *= config.optim.patch_embed_lr_mult
        undecayed = name.endswith(("bias", "bias_table")) or "norm" in name or "gamma" in name or parameter.ndim < 2
        alike[schedule, lr_multiplier, 0.0 if undecayed else 1.0].append(parameter)
    return [
        {"params": parameters, "lr_schedule": schedule, "lr_multiplier": lr_multiplier, "wd_multiplier": wd_multiplier}
        for (schedule, lr_multiplier, wd_multiplier), parameters in alike.items()
    ]


def apply_schedules(groups: list[dict[str, Any]], values: dict[str, float]) -> None:
    """Set each group's learning rate and weight decay for the coming step."""
    for group in groups:
        group["lr"] = values[group["lr_schedule"]] * group["lr_multiplier"]
        group["weight_decay"] = values["weight_decay"] * group["wd_multiplier"]
