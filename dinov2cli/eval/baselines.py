"""What images tell without anything learned: the features that a training has to beat.

They come as the class tokens of a model would, so that data, preprocessing, cache and interruption are an evaluation's
own. Shapes: B images of C channels and S x S pixels, D features, N images of a dataset.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2cli.config.images import Images
from dinov2cli.config.library import LibraryConfig
from dinov2cli.config.vit import ViTConfig
from dinov2cli.console import logger
from dinov2cli.data.datasets import ImageDataset
from dinov2cli.data.datasets.joined import RowsDataset
from dinov2cli.eval.extract import Extractor
from dinov2cli.eval.features import Features
from dinov2cli.models.library_backbone import Backbone, LibraryBackbone
from dinov2cli.models.vision_transformer import VisionTransformer

LARGEST = 2 << 30
"""Bytes of the features of a dataset, of all processes together; of larger ones some images are drawn."""
SEED = 0
"""Of the random network, and of that draw."""
PIXELS = 32
"""Side of the raw pixels, averaged over areas; smaller images stay as they are."""
HOG_SIDE, HOG_CELL, ORIENTATIONS = 64, 8, 9
LUMA = (0.299, 0.587, 0.114)
THIS_MODEL = "this model"


class Compared(NamedTuple):
    """Features of the images of train and of val that nobody, or the model, has learned."""

    name: str
    train: Features
    val: Features


class Unlearned(nn.Module):
    """Features of normalised images that take no training, all of them side by side as one class token.

    Args:
        config: of the model beside which they stand, and whose shape the random network has.
        images: how its images are normalised.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: ViTConfig | LibraryConfig, images: Images) -> None:
        super().__init__()
        self.config, self.patch_size, self.images = config, config.patch_size, images
        for name, levels in zip(("mean", "std"), images.statistics, strict=True):
            self.register_buffer(name, torch.tensor(levels)[:, None, None])
        self.network = random_network(config)
        self.eval()

    def class_tokens(self, images: Tensor) -> Tensor:
        """[B, C, S, S] -> float32 [B, D]."""
        return torch.cat([part.float() for part in self.parts(images).values()], dim=1)

    def parts(self, images: Tensor) -> dict[str, Tensor]:
        """By name, [B, D] each, of [B, C, S, S]."""
        levels = (images.float() * self.std + self.mean).clamp(0, 1)
        grey = levels.mean(1)
        if self.images.are_rgb:
            grey = (levels * levels.new_tensor(LUMA)[:, None, None]).sum(1)
        found = {
            "raw pixels": F.adaptive_avg_pool2d(levels, min(PIXELS, images.shape[-1])).flatten(1),
            "colour histogram": colour_histogram(levels),
            "grey histogram": histogram((256 * grey).long().clamp(max=255).flatten(1) // 8, 32),
            "HOG": hog(_resized(grey, HOG_SIDE)),
            "random network": self.network.class_tokens(images),
        }
        return {name: found[name] for name in names(self.config.in_chans)}


def random_network(config: ViTConfig | LibraryConfig) -> Backbone:
    """Fresh weights of a fixed seed, and LayerScale 1, with which every block counts; in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        if isinstance(config, LibraryConfig):
            return LibraryBackbone(config).eval()
        return VisionTransformer(config.changed(layerscale=None)).eval()


def names(in_chans: int) -> tuple[str, ...]:
    """What there is of images with so many channels; of one, the histogram of colours is that of greys."""
    colours = ("colour histogram",) if in_chans > 1 else ()
    return "raw pixels", *colours, "grey histogram", "HOG", "random network"


def compared(
    extract: Extractor,
    train: ImageDataset,
    val: ImageDataset | None,
    mapping: Tensor | None,
    own: tuple[Features, Features] | None = None,
    largest: int = LARGEST,
) -> Iterator[Compared]:
    """The features that take no training, one kind after the other, and last the model's own of the same images.

    Args:
        extract: of the model; these features are extracted as its own are, by one pass over the images.
        val: None where it is the same images as train.
        mapping: the classes of val in train's numbering, which the model's own features have already.
        own: the model's own features of train and of val; None to do without.
        largest: bytes of a dataset's features; where they would take more, images are drawn at random.
    """
    network = Unlearned(extract.model.config, extract.images)  # type: ignore[arg-type]
    side, beside = extract.image_size, extract.with_model(network)
    with torch.no_grad():
        blank = torch.zeros(1, network.config.in_chans, side, side, device=beside.device)
        widths = {name: part.shape[1] for name, part in network.parts(blank).items()}
    n = max(1, largest // (4 * sum(widths.values())))
    found, mine = [], list(own or ())[: 1 if val is None else 2]
    for place, dataset in enumerate([train] if val is None else [train, val]):
        name = ("train", "val")[place]
        if n >= len(dataset):
            found.append(beside(dataset, f"baselines of {name}"))
            continue
        sampled = Sampled(dataset, n)
        logger.info("baselines: %d of %d %s images, drawn at random", n, len(dataset), name)
        found.append(beside(sampled, f"baselines of {name}"))
        if own is not None:
            mine[place] = _only(own[place], torch.from_numpy(sampled.rows))
    found[1:] = [features.with_classes(mapping) for features in found[1:]]
    for name, *parts in zip(widths, *(each.cls.split(list(widths.values()), dim=1) for each in found), strict=True):
        each = [replace(features, tensors={"cls": part}) for features, part in zip(found, parts, strict=True)]
        yield Compared(name, each[0], each[-1])
    if own is not None:
        yield Compared(THIS_MODEL, mine[0], mine[-1])


def drawn_in_words(found: dict[str, Any], train_images: int, val_images: int) -> str:
    """That fewer images stand behind the baselines than there are, if so."""
    drawn = [
        f"{found[f'{name}_images']} of {there} {name} images"
        for name, there in (("train", train_images), ("val", val_images))
        if found[f"{name}_images"] < there
    ]
    return f"baselines, and this model beside them, of {' and '.join(drawn)}, drawn at random" if drawn else ""


class Sampled(RowsDataset):
    """`n` of a dataset's images, drawn at random with a fixed seed, in its order."""

    def __init__(self, dataset: ImageDataset, n: int) -> None:
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(SEED))
        super().__init__(dataset, order[:n].sort().values.numpy())

    def describe(self) -> str:
        return f"{len(self)} of {self.base.describe()}"


def histogram(bins: Tensor, size: int) -> Tensor:
    """Square roots of the counts of each bin: int64 [B, n] of 0 .. `size` - 1 -> float32 [B, size].

    With roots, cosine similarity is the Bhattacharyya coefficient: it weighs rare and frequent levels more evenly.
    """
    rows = torch.arange(len(bins), device=bins.device)[:, None] * size
    return (bins + rows).flatten().bincount(minlength=len(bins) * size).reshape(len(bins), size).float().sqrt()


def colour_histogram(levels: Tensor) -> Tensor:
    """Of values from 0 to 1, [B, C, S, S]: 8 levels of each channel, jointly; of over three channels 32 of each."""
    channels = levels.shape[1]
    of_bytes = (256 * levels).long().clamp(max=255).flatten(2)
    if channels > 3:
        return torch.cat([histogram(channel // 8, 32) for channel in of_bytes.unbind(1)], dim=1)
    joint = sum((channel // 32) * 8**place for place, channel in enumerate(of_bytes.unbind(1)))
    return histogram(torch.as_tensor(joint), 8**channels)


def hog(grey: Tensor) -> Tensor:
    """Histograms of oriented gradients (Dalal and Triggs, 2005) of [B, S, S]: 9 orientations, cells of 8 x 8 pixels,
    blocks of 2 x 2 cells normalised by L2-Hys, as in scikit-image: [B, D]."""
    across, down = torch.zeros_like(grey), torch.zeros_like(grey)
    across[:, :, 1:-1] = grey[:, :, 2:] - grey[:, :, :-2]
    down[:, 1:-1] = grey[:, 2:] - grey[:, :-2]
    angle = torch.rad2deg(torch.atan2(down, across)) % 180
    which = (angle / (180 / ORIENTATIONS)).long().clamp(max=ORIENTATIONS - 1)
    votes = F.one_hot(which, ORIENTATIONS).movedim(-1, 1) * torch.hypot(across, down)[:, None]
    cells = F.avg_pool2d(votes, HOG_CELL).movedim(1, -1)
    blocks = cells.unfold(1, 2, 1).unfold(2, 2, 1).permute(0, 1, 2, 4, 5, 3).flatten(3)  # [B, rows, columns, 2 * 2 * 9]
    clipped = _unit(blocks).clamp(max=0.2)
    return _unit(clipped).flatten(1)


def _unit(blocks: Tensor) -> Tensor:
    return blocks / (blocks.square().sum(-1, keepdim=True) + 1e-10).sqrt()


def _resized(grey: Tensor, side: int) -> Tensor:
    if grey.shape[-1] > side:
        return F.adaptive_avg_pool2d(grey, side)
    return F.interpolate(grey[:, None], (side, side), mode="bilinear", align_corners=False)[:, 0]


def _only(features: Features, positions: Tensor) -> Features:
    """Of the images at these positions of the dataset, as far as they could be read."""
    here = torch.isin(features.indices, positions)
    tensors = {name: tensor[here] for name, tensor in features.tensors.items()}
    size = int(torch.isin(features.positions(), positions).sum())
    return Features(tensors, features.targets[here], features.indices[here], size)
