"""Images as people have them in Python, and their features: `dinov2cli.load_model` and `dinov2cli.embed`."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dinov2cli.config.images import RGB, Images
from dinov2cli.data.datasets import ImageDataset, check_dataset, make_dataset
from dinov2cli.data.datasets.recognise import is_dataset_file
from dinov2cli.data.decoding import USUAL, Reading, pixels_of
from dinov2cli.data.formats.pillow import of_picture
from dinov2cli.data.formats.stored import Stored, UnreadableImage, span_of_type
from dinov2cli.data.transforms import EvalTransform, usual_size
from dinov2cli.device import choose_device
from dinov2cli.errors import ConfigError, DataError, WeightsError
from dinov2cli.eval.extract import Extractor
from dinov2cli.models import load
from dinov2cli.models.library_backbone import Backbone

HIGHEST_NORMALISED = 20.0
"""Normalised images lie between -2.2 and 2.7; above this they were not."""


def load_model(name_or_path: Any, pretrained: bool = True, *, device: Any = "cpu", **options: Any) -> Backbone:
    """A DINOv2 backbone with its weights, in eval mode, and with its preprocessing:

        model = dinov2cli.load_model("dinov2_vits14", device="cuda")
        features = model(model.transform(picture)[None].to("cuda"))  # [1, D]

    Args:
        name_or_path: as in `dinov2cli.models.load.load_model`: a released name, a run folder, a file, a URL.
        pretrained: False gives a released name's architecture with random weights.
        options: `config_file`, `in_chans`, `size_policy` and others of that function's.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or a device.

    Returns:
        the model; its `transform` makes of a picture (a path, a PIL image, an array or a uint8 tensor) a normalised
        float32 [3, S, S], resized and cropped as in `dino2 embed`, S being `dinov2cli.data.transforms.usual_size`.

    Raises:
        WeightsError: no such weights, or they do not fit.
        EnvironmentProblem: no such device.

    On a CPU the model refuses images that are not normalised (DataError); a GPU would have to be waited for.
    """
    where = choose_device(device)  # before anything is downloaded
    model = load.load_model(name_or_path, pretrained, **options).to(where)
    model.transform = PictureTransform(model)  # type: ignore[assignment]  # no module, no tensor
    model.register_forward_pre_hook(_refuse_levels)
    return model


def embed(
    images: Any,
    model: Backbone | str | Path,
    *,
    batch_size: int = 64,
    device: Any = None,
    image_size: int | None = None,
    num_workers: int = 0,
) -> Tensor:
    """The class tokens of one or many images: float32 [D] of one, [N, D] of several, on the CPU.

        features = dinov2cli.embed(["dog.jpg", "cat.jpg"], "dinov2_vits14")  # [2, 384]

    They are those of `dino2 embed`: resized, centre crop, normalised. A picture in memory becomes what a file of it
    would: turned as EXIF says, transparent parts over the mean, 16 bits as 16 bits.

    Args:
        images: one image or a sequence of them: paths, PIL images, arrays [H, W] or [H, W, 3] of uint8 or of floats
            from 0 to 1, uint8 tensors [3, H, W] (C for 3 where the model takes others). Also an array [N, H, W, 3], a
            uint8 tensor [N, 3, H, W], a folder or a dataset string (all its images), or a dataset. A float tensor
            [3, S, S] or [N, 3, S, S] is taken as it is: normalised, as `model.transform` gives it.
        model: from `load_model`, or what that takes.
        device: as in `load_model`; by default where the model is, or for a name a GPU if there is one.
        image_size: side in pixels; by default the model's, at most 224.
        num_workers: processes that read and decode images.

    Raises:
        DataError: not images, or one that cannot be read.
        WeightsError: as in `load_model`.
        EnvironmentProblem: likewise.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}: must be a whole number, at least 1")
    if isinstance(model, str | Path):
        model = load_model(model, device=device or "auto")
    if not isinstance(model, nn.Module):
        raise WeightsError(f"{model!r} is no model: give what load_model returns, a released name, a run or a file")
    where = next(model.parameters()).device if device is None else choose_device(device)
    if isinstance(images, Tensor) and images.is_floating_point():
        return _of_normalised(images, Extractor(model, device=where), batch_size)
    dataset, one = _dataset_of(images)
    how: dict[str, Any] = {"batch_size": batch_size, "num_workers": num_workers, "max_bad_fraction": 0.0}
    features = Extractor(model, device=where, image_size=image_size, **how)(dataset).cls
    return features[0] if one else features


class PictureTransform:
    """The preprocessing of evaluations of a model, for pictures as `embed` takes them."""

    def __init__(self, model: Backbone) -> None:
        images = getattr(model, "images", RGB)
        self.evaluation, self.reading = EvalTransform.at(usual_size(model.config), images), Reading(images)

    def __call__(self, picture: Any) -> Tensor:
        """Normalised float32 [C, S, S]. Raises DataError where it is no picture."""
        return self.evaluation(GivenImages([picture]).image(0, self.reading))


class GivenImages(ImageDataset):
    """Images that were handed over: paths, PIL images, arrays, tensors."""

    def __init__(self, images: Sequence[Any]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int, reading: Reading = USUAL) -> np.ndarray:
        each = self.images[index]
        if isinstance(each, str | Path):
            return super().image(index, reading)
        name = self.path(index)
        return pixels_of(stored_in(each, name, reading.images), name, reading)

    def path(self, index: int) -> str:
        each = self.images[index]
        return str(each) if isinstance(each, str | Path) else f"image {index}"

    def describe(self) -> str:
        return f"{len(self)} given images" if len(self) > 1 else self.path(0)


def stored_in(picture: Any, name: str, images: Images) -> Stored:
    """What a PIL image, an array or a uint8 tensor holds, as a file of it would store it.

    Raises:
        DataError: something else, or values that are neither uint8 nor floats from 0 to 1, where `images.value_range`
            does not say which are black and white.
        UnreadableImage: a PIL image that cannot be read.
    """
    if hasattr(picture, "convert"):
        try:
            return of_picture(picture, name)
        except (OSError, ValueError, SyntaxError) as error:  # PIL reads a file's pixels when they are asked for
            raise UnreadableImage(name, f"damaged image ({error})") from error
    if isinstance(picture, Tensor):
        if picture.is_floating_point():
            raise DataError(
                f"{name}: a float tensor is taken for one that is normalised; as a picture give uint8 [3, H, W]."
            )
        picture = picture.cpu().movedim(-3, -1).numpy() if picture.dim() > 2 else picture.cpu().numpy()
    array = np.array(picture, order="C")  # a copy: torch takes no array that is read-only
    if array.dtype.kind in "OSUV" or array.ndim == 0:
        raise DataError(
            f"{name}: {type(picture).__name__} is no picture; give a path, a PIL image, an array or a tensor."
        )
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or 0 in array.shape or (images.are_rgb and array.shape[2] not in (1, 3)):
        given, n = [*array.shape], images.in_chans
        raise DataError(f"{name}: {given} is no picture's shape; give [H, W, {n}] (tensors [{n}, H, W]) or [H, W].")
    is_said = images.value_range != "auto"
    if array.dtype.kind == "f":
        if not is_said and not (array.min() >= 0 and array.max() <= 1):
            raise DataError(
                f"{name}: floats from {array.min():.4g} to {array.max():.4g}, and pictures of floats are from 0 to 1.",
                hint="Give uint8 for levels from 0 to 255, or divide by 255.",
            )
    elif array.dtype != np.uint8 and not (is_said and array.dtype.kind in "ui"):
        raise DataError(f"{name}: {array.dtype} values; give uint8 from 0 to 255, or floats from 0 to 1.")
    span = span_of_type(array.dtype) if array.dtype == np.uint8 else None
    return Stored(array, "array", span, rgb=array.shape[2] == 3)


def dataset_of_words(words: Sequence[str]) -> ImageDataset:
    """What `--data` names: image files, or else one folder, archive, table or dataset string.

    Raises:
        DataError: several words that are not all image files, or no such dataset.
    """
    files = _image_files(words)
    return GivenImages(files) if files else make_dataset(words[0])


def check_words(words: Sequence[str]) -> None:
    """Raise what `dataset_of_words` would, as far as nothing has to be listed for it."""
    if not _image_files(words):
        check_dataset(words[0])


def _image_files(words: Sequence[str]) -> list[str]:
    """All of the words, or none where the only one is something else. Raises DataError where one of several is."""
    paths = [os.path.expanduser(word) for word in words]
    others = [path for path in paths if not os.path.isfile(path) or is_dataset_file(path)]
    if others and len(words) > 1:
        what = "image" if os.path.isfile(others[0]) else "file"
        raise DataError(f"--data: {others[0]} is no {what}; give image files, or one folder or dataset string.")
    return [] if others else paths


def _dataset_of(images: Any) -> tuple[ImageDataset, bool]:
    """A dataset, and whether it is one image."""
    if isinstance(images, ImageDataset):
        return images, False
    if isinstance(images, str | Path):
        dataset = dataset_of_words([str(images)])
        return dataset, isinstance(dataset, GivenImages)
    if isinstance(images, np.ndarray | Tensor):
        one = images.ndim < 4
        return GivenImages([images] if one else list(images)), one
    if isinstance(images, Iterable) and not isinstance(images, bytes) and not hasattr(images, "convert"):
        listed = list(images)
        if not listed:
            raise DataError("no images: the sequence is empty")
        return GivenImages(listed), False
    return GivenImages([images]), True


def _of_normalised(images: Tensor, extract: Extractor, batch_size: int) -> Tensor:
    if images.dim() not in (3, 4) or images.shape[-3] != extract.model.config.in_chans:  # type: ignore[union-attr]
        raise DataError(
            f"a float tensor of {list(images.shape)} is no batch of images; give [N, 3, H, W], or [3, H, W] of one."
        )
    _refuse_levels(extract.model, (images,))
    batch = (images if images.dim() == 4 else images[None]).float()
    with torch.no_grad():
        features = torch.cat([extract.features_of(part)["cls"].cpu() for part in batch.split(batch_size)])
    return features if images.dim() == 4 else features[0]


def _refuse_levels(model: Any, arguments: tuple[Any, ...]) -> None:
    """Raise DataError for images that are plainly not normalised, such as levels from 0 to 255."""
    images = arguments[0] if arguments else None
    if not isinstance(images, Tensor) or images.device.type != "cpu" or not images.numel():
        return
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return
    if (highest := float(images.detach().abs().max())) > HIGHEST_NORMALISED:
        raise DataError(
            f"{images.dtype} images with values up to {highest:.4g} are not normalised.".removeprefix("torch."),
            hint="Give pictures to dinov2cli.embed, or what model.transform makes of them.",
        )
