"""What an exporter gets, and what it gives back for the comparison. Shape legend as in `graph`."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dinov2cli.config import ViTConfig
from dinov2cli.config.library import LibraryConfig
from dinov2cli.data.transforms import EvalTransform, usual_size
from dinov2cli.models.libraries import run
from dinov2cli.models.library_backbone import Backbone, LibraryBackbone
from dinov2cli.models.load.layouts.layout import State

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
    architecture: ViTConfig | LibraryConfig
    model: Backbone
    head: nn.Linear | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    image_size: tuple[int, int] | None = None
    opset: int = 18

    @property
    def vit(self) -> ViTConfig:
        """The architecture, for formats that hold vision transformers alone."""
        assert isinstance(self.architecture, ViTConfig)
        return self.architecture

    @property
    def library(self) -> LibraryBackbone | None:
        """The model, where it is a backbone of another library."""
        return self.model if isinstance(self.model, LibraryBackbone) else None

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How pictures become what the model takes, so that the features are those of `dino2 embed`."""
        height, width = self.image_size or (usual_size(self.architecture),) * 2
        how = EvalTransform.at(height, self.model.images).as_dict()
        # An oblong image has no counterpart in the evaluations: it is for the user to cut.
        return how if height == width else {**how, "resize_shorter_side": None, "center_crop": None}

    @property
    def metadata(self) -> dict[str, str]:
        """What a file of weights or a graph says of itself."""
        about = {"architecture": self.architecture.model_dump(), "preprocessing": self.preprocessing}
        return {f"dino2.{name}": json.dumps(value) for name, value in about.items()}


def random_images(architecture: ViTConfig | LibraryConfig, batch: int, height: int, width: int) -> Tensor:
    """Normalised noise [B, C, H, W], the same every time."""
    generator = torch.Generator().manual_seed(batch * 1_000_003 + height * 1009 + width)
    return torch.randn(batch, architecture.in_chans, height, width, generator=generator)


def runner_of_library(backbone: LibraryBackbone, network: Any) -> Runner:
    """What the network gives that its library has opened, the feature map resized as dino2 does."""

    def outputs(images: Tensor) -> Outputs:
        pooled, found = run(backbone.config, network, images)
        return {"cls": pooled, "patches": backbone.tokens_of(found, images)}

    return outputs


def known_of_library(backbone: LibraryBackbone, preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """What dino2 knows of a backbone of another library, for the `config.json` of that."""
    return {**backbone.config.model_dump(), "images": preprocessing.get("images", {})}
