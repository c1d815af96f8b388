"""What an exporter gets, and what it gives back for the comparison. Shape legend as in `graph`."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from dinov2cli.config import ViTConfig
from dinov2cli.data.transforms import EvalTransform, usual_size
from dinov2cli.errors import EnvironmentProblem
from dinov2cli.models.load.layouts.layout import State
from dinov2cli.models.vision_transformer import VisionTransformer

Outputs = dict[str, Tensor]
Runner = Callable[[Tensor], Outputs]
"""Images [B, C, H, W] to `cls` [B, D], `patches` [B, N, D] and, with a head, `logits` [B, K]."""


@dataclass(frozen=True)
class Bundle:
    """A model to export.

    Args:
        state: canonical weights.
        architecture: of the backbone.
        model: the backbone with these weights, in eval mode.
        head: a linear classifier, if one goes along.
        provenance: where the weights come from, for formats that have room for it.
        image_size: (height, width) of a graph for one size only; None for any size.
        opset: of ONNX.
    """

    state: State
    architecture: ViTConfig
    model: VisionTransformer
    head: nn.Linear | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    image_size: tuple[int, int] | None = None
    opset: int = 18

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How pictures become what the model takes, so that the features are those of `dino2 embed`."""
        height, width = self.image_size or (usual_size(self.architecture),) * 2
        how = EvalTransform.at(height, self.model.images).as_dict()
        # An oblong image has no counterpart in the evaluations: it is for the user to cut.
        return how if height == width else {**how, "resize_shorter_side": None, "center_crop": None}


def need(package: str, extra: str = "export") -> ModuleType:
    """Import an optional package.

    Raises:
        EnvironmentProblem: it is not installed, and what to install.
    """
    try:
        return importlib.import_module(package)
    except (ImportError, RuntimeError, OSError) as error:  # the last two: a binary part that does not load
        raise EnvironmentProblem(
            f"{package} does not import ({error}); it comes with: pip install 'dinov2cli[{extra}]'"
        ) from None


def random_images(architecture: ViTConfig, batch: int, height: int, width: int) -> Tensor:
    """Normalised noise [B, C, H, W], the same every time."""
    generator = torch.Generator().manual_seed(batch * 1_000_003 + height * 1009 + width)
    return torch.randn(batch, architecture.in_chans, height, width, generator=generator)
