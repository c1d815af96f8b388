"""AdamW over the student's parameter groups, and gradient clipping for each submodule by itself."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dinov2cli.config import Config
from dinov2cli.train.parameter_groups import parameter_groups


def build_optimizer(student: nn.Module, config: Config) -> torch.optim.AdamW:
    """AdamW with its moments allocated at once, so that a checkpoint of step 0 has the same keys as a later one."""
    optimizer = torch.optim.AdamW(
        parameter_groups(student, config), betas=(config.optim.adamw_beta1, config.optim.adamw_beta2), fused=True
    )
    for parameter in filter(lambda each: each.requires_grad, student.parameters()):
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def optimizer_state(optimizer: torch.optim.Optimizer, student: nn.Module) -> dict[str, dict[str, Tensor]]:
    """The optimizer's tensors by parameter name: independent of the grouping and of the number of processes.

    The tensors are the optimizer's own, so that loading into them resumes it.
    """
    trained = ((name, parameter) for name, parameter in student.named_parameters() if parameter.requires_grad)
    return {name: dict(optimizer.state[parameter]) for name, parameter in trained}


def clip_gradients(student: nn.Module, max_norm: float) -> dict[str, Tensor]:
    """Scale down the gradients of each child module (backbone, heads) whose norm exceeds `max_norm`.

    Returns:
        the norm of each over all processes before clipping, a scalar tensor; `max_norm` 0 measures without clipping.
    """
    limit = max_norm or float("inf")
    norms = {
        name: nn.utils.clip_grad_norm_(module.parameters(), limit, foreach=True)
        for name, module in student.named_children()
    }
    return {name: norm.full_tensor() if isinstance(norm, DTensor) else norm for name, norm in norms.items()}
