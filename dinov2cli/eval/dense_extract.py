"""What dense heads read of every patch: a frozen backbone's tokens, and what they are compared with."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dinov2cli.config.images import RGB
from dinov2cli.eval.baselines import random_network
from dinov2cli.eval.extract import Extractor
from dinov2cli.eval.features import Recipe
from dinov2cli.models.dense_heads import pad_to_patches
from dinov2cli.models.library_backbone import Backbone

RAW_COLOURS, RANDOM_NETWORK = "raw colours", "random network"


@dataclass(frozen=True)
class DenseSettings:
    """What may be chosen in training.

    Args:
        layers: blocks that the heads read.
        batch_size: images in a step, of all processes.
        frozen_crops: train on the features of a fixed crop of each image: an approximation.
        seed: of the heads' start and of the order and crops of the images.
    """

    layers: int
    iterations: int
    batch_size: int
    learning_rates: tuple[float, ...]
    frozen_crops: bool = False
    seed: int = 0


class DenseExtractor(Extractor):
    """Runs a frozen backbone for what heads read of every patch.

    Args:
        blocks: indices of the blocks.
        norm: whether the final norm is applied.
        options: those of `Extractor`.
    """

    def __init__(
        self, model: nn.Module, *, blocks: Sequence[int], norm: bool, image_size: int | None = None, **options: Any
    ) -> None:
        super().__init__(model, **options)
        self.blocks, self.norm = tuple(blocks), norm
        self.keeps_halves, self.words = False, ""

    def used(self) -> dict[str, Any]:
        return {"precision": str(self.precision.dtype)}

    def kept(self, transform: Callable[[np.ndarray], Tensor], sizes: tuple[int, int], words: str) -> "DenseExtractor":
        """One that extracts datasets in half precision.

        Args:
            transform: of an image, without chance.
            sizes: height and width of what it gives.
            words: all that it does.
        """
        other = self.with_model(self.model)
        other.notes = self.notes
        other.keeps_halves, other.transform, other.words = True, transform, words
        other.image_size = max(sizes)
        return other

    @property
    def recipe(self) -> Recipe:
        names = tuple(f"{part}{i}" for i in range(len(self.blocks)) for part in ("patches", "cls"))
        words = f"{self.words}, {self.reading}, blocks {self.blocks}, norm {self.norm}, half precision"
        return Recipe(self.weights_hash, str(self.precision.dtype), words, True, names)

    def _forward(self, images: Tensor) -> dict[str, Tensor]:
        model: Any = self.model
        images = pad_to_patches(images, model.patch_size)
        layers = model.get_intermediate_layers(
            images, n=self.blocks, reshape=True, return_class_token=True, norm=self.norm
        )
        dtype = torch.float16 if self.keeps_halves else torch.float32
        found: dict[str, Tensor] = {}
        for i, (patches, cls) in enumerate(layers):
            found |= {f"patches{i}": patches.to(dtype), f"cls{i}": cls.to(dtype)}
        return found


class RawColours(nn.Module):
    """In place of a backbone: of every patch the colours of its pixels, and as class token their mean over patches."""

    def __init__(self, model: Backbone) -> None:
        super().__init__()
        self.config, self.patch_size, self.images = model.config, model.patch_size, getattr(model, "images", RGB)
        self.embed_dim, self.depth = model.config.in_chans * model.patch_size**2, 1

    def extra_repr(self) -> str:
        return f"patches of {self.patch_size}, {self.config.in_chans} channels"  # by which features are kept

    def get_intermediate_layers(self, x: Tensor, **_: Any) -> tuple[tuple[Tensor, Tensor], ...]:
        """[B, C, H, W] -> patches [B, C * P * P, h, w] and mean [B, C * P * P]."""
        patches = nn.functional.pixel_unshuffle(x.float(), self.patch_size)
        return ((patches, patches.mean((2, 3))),)


def extractors_beside(extract: DenseExtractor) -> Iterator[tuple[str, DenseExtractor]]:
    """What the same heads are trained on to compare: the colours alone, and a network that has learned nothing."""
    model: Any = extract.model
    colours = extract.with_model(RawColours(model))
    colours.blocks = (0,)
    yield RAW_COLOURS, colours
    network: Any = random_network(model.config)
    network.images = extract.images
    yield RANDOM_NETWORK, extract.with_model(network)
