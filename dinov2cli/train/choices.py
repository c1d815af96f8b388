"""What a run leaves to the machine: which attention, and whether the step is compiled."""

import torch

from dinov2cli.config import Config
from dinov2cli.config.library import LibraryConfig
from dinov2cli.device import Precision, why_not_compile
from dinov2cli.errors import ConfigError
from dinov2cli.models.attention import AttentionUse, choose_attention_backend
from dinov2cli.train.frozen_teacher import frozen_teacher


def choose_attention(config: Config, device: torch.device, precision: Precision) -> tuple[str, str]:
    """Attention backend and reason.

    Raises:
        ConfigError: the configured one does not run here.
    """
    asked, vit, crops = config.student.attention_backend, config.backbone(), config.crops
    if isinstance(vit, LibraryConfig):
        teacher = frozen_teacher(config)
        assert teacher is not None, "such a student has a teacher"
        vit = teacher.vit  # whose attention alone is dino2's
    resolutions = crops.resolutions()
    sizes = [each.global_size for each in resolutions]
    sizes += [each.local_size for each in resolutions if crops.local_crops_number]
    lengths = tuple(vit.prefix_tokens + (size // vit.patch_size) ** 2 for size in sizes)
    use = AttentionUse(device, precision.dtype, vit.num_heads, vit.embed_dim // vit.num_heads, lengths)
    try:
        return choose_attention_backend(asked, use)
    except ValueError as error:
        raise ConfigError(f"student.attention_backend={asked}: {error}", "auto chooses one that runs.") from error


def choose_compile(config: Config, device: torch.device) -> tuple[bool, str]:
    """Whether the step goes through torch.compile, and the reason."""
    if config.train.compile != "auto":
        return config.train.compile, "as configured"
    problem = why_not_compile(device)
    return problem is None, problem or "fewer and larger kernels on a GPU"
