"""Patch features of pictures of any size, and what heads make of them, batch by batch, in memory that does not depend
on how many there are.

Shape legend: H x W pixels, h x w patches or places of a head's map, D feature dimension, K classes or 1.
"""

import tempfile
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any, TypeVar

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinov2cli.console import logger
from dinov2cli.data.augmentations import normalize_pixels
from dinov2cli.device import Precision, free_memory
from dinov2cli.errors import EnvironmentProblem
from dinov2cli.models.dense_heads import DenseModel, pad_to_patches
from dinov2cli.models.library_backbone import Backbone
from dinov2cli.models.sliding import sliding

Picture = NDArray[np.uint8]
"""RGB [H, W, 3]."""
FeatureMap = NDArray[np.float32]
"""[h, w, D]."""

Item = TypeVar("Item")

LARGEST_BATCH = {"cpu": 8, "cuda": 64}
CPU_TOKENS_PER_BATCH = 4096
"""More tokens at once only cost memory on a CPU: its cores are busy by then."""


class PatchFeatures:
    """Normalised patch tokens of pictures, each resized to whole patches.

    Args:
        model: in evaluation mode, on the device to be used.
        resolution: patches along the short side of a picture.
        batch_size: pictures of equal size at a time; None: from the device's free memory.
        precision: that of matrix products, as `compute_precision.precision` says it.
    """

    def __init__(
        self, model: Backbone, resolution: int, batch_size: int | None = None, precision: str = "auto"
    ) -> None:
        self.model = model
        self.resolution = resolution
        self._batch_size = batch_size
        self._by_grid: dict[tuple[int, int], int] = {}
        self.device = next(model.parameters()).device
        self.precision = Precision.resolve(precision, self.device, frozen=True)

    def grid(self, size: tuple[int, int], pixel_aspect: Fraction = Fraction(1)) -> tuple[int, int]:
        """Patches (h, w) of a picture of `size` (H, W) pixels, as near to its shape as whole patches allow."""
        height, width = float(size[0]), float(size[1] * pixel_aspect)
        scale = self.resolution / min(height, width)
        return max(round(height * scale), 1), max(round(width * scale), 1)

    def fitted(self, size: tuple[int, int], pixel_aspect: Fraction = Fraction(1)) -> tuple[int, int]:
        """Pixels (H, W) at which the network sees such a picture: those of the grid."""
        height, width = self.grid(size, pixel_aspect)
        return height * self.model.patch_size, width * self.model.patch_size

    def compute(self, images: Tensor) -> Tensor:
        """Normalised images [B, C, H, W] -> features [B, h, w, D]."""
        with self.precision.autocast():
            tokens: Tensor = self.model.forward_features(images)["x_norm_patchtokens"]
        features: Tensor = tokens.unflatten(1, self.model.grid_of(images))
        return features

    def maps(
        self, items: Iterable[tuple[Item, Picture]], pixel_aspect: Fraction = Fraction(1)
    ) -> Iterator[tuple[Item, FeatureMap]]:
        """Feature maps float32 [h, w, D] in order, each with the item that came with its picture."""
        batch: list[tuple[Item, Picture]] = []
        for item, picture in items:
            size = picture.shape[0], picture.shape[1]
            grid = self.grid(size, pixel_aspect)
            fitted = resize(picture, self.fitted(size, pixel_aspect))
            unlike = bool(batch) and (batch[0][1].shape, batch[0][1].dtype) != (fitted.shape, fitted.dtype)
            if batch and (unlike or len(batch) >= self.batch_size(grid)):
                yield from self._run(batch)
                batch = []
            batch.append((item, fitted))
        if batch:
            yield from self._run(batch)

    def batch_size(self, grid: tuple[int, int]) -> int:
        """Pictures at a time: as given, else from the memory that was free when this grid first came up."""
        if self._batch_size is not None:
            return self._batch_size
        if grid not in self._by_grid:
            self._by_grid[grid] = self._fitting(grid)
        return self._by_grid[grid]

    def _fitting(self, grid: tuple[int, int]) -> int:
        tokens = grid[0] * grid[1] + self.model.prefix_tokens
        # Live at once in a block: the residual stream, qkv, attention output, the 4-fold hidden layer and its gate.
        bytes_per_picture = tokens * self.model.embed_dim * 4 * 20
        free = free_memory(self.device)
        if self.device.type == "cuda":
            return min(max(free // (2 * bytes_per_picture), 1), LARGEST_BATCH["cuda"])
        most = min(CPU_TOKENS_PER_BATCH // tokens, LARGEST_BATCH["cpu"])
        return min(max(free // (4 * bytes_per_picture), 1), max(most, 1))

    def _run(self, batch: list[tuple[Item, Picture]]) -> Iterator[tuple[Item, FeatureMap]]:
        items, pictures = zip(*batch, strict=True)
        yield from zip(items, self._features(np.stack(pictures)), strict=True)

    def _features(self, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        """[B, H, W, C] -> [B, h, w, D]. Where the device's memory does not do, in halves from then on."""
        try:
            images = normalize_pixels(torch.from_numpy(pictures).to(self.device), self.model.images.statistics)
            with torch.inference_mode():
                features: FeatureMap = self.compute(images).float().cpu().numpy()
            return features
        except torch.OutOfMemoryError as error:
            if len(pictures) == 1:
                height, width = (side // self.model.patch_size for side in pictures.shape[1:3])
                raise EnvironmentProblem(
                    f"one picture of {height}x{width} patches does not fit into the memory of {self.device}; "
                    "give a smaller --resolution"
                ) from error
        half = len(pictures) // 2
        self._batch_size = half
        torch.cuda.empty_cache()
        logger.warning("out of memory: %d pictures at a time from here on", half)
        return np.concatenate([self._features(pictures[:half]), self._features(pictures[half:])])


class FeatureSpool:
    """Feature maps kept in an unnamed temporary file, read back in order as often as needed.

    Fitting colours reads them four times; running the model once and spooling keeps both time and memory small.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="dino2-")  # noqa: SIM115  # closed by close()
        self._shapes: list[tuple[int, ...]] = []

    def append(self, features: FeatureMap) -> None:
        """Keep one map.

        Raises:
            EnvironmentProblem: the temporary folder is full.
        """
        try:
            self._file.write(np.ascontiguousarray(features, dtype=np.float32).data)
        except OSError as error:
            raise EnvironmentProblem(
                f"{tempfile.gettempdir()}: no room for features ({error.strerror or error})",
                "Give a smaller --fit-frames or --resolution, or set TMPDIR to a folder with more space.",
            ) from error
        self._shapes.append(features.shape)

    def __call__(self) -> Iterator[FeatureMap]:
        """All maps from the first one on."""
        self._file.seek(0)
        for shape in self._shapes:
            yield np.frombuffer(self._file.read(4 * int(np.prod(shape))), dtype=np.float32).reshape(shape)

    def close(self) -> None:
        self._file.close()


def resize(picture: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    """Resize [H, W, C] to `size` (H, W): averaging where it shrinks, bicubic where it grows."""
    if picture.shape[:2] == size:
        return picture
    shrinks = size[0] * size[1] < picture.shape[0] * picture.shape[1]
    resized = cv2.resize(picture, size[::-1], interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
    return resized.reshape(*size, *picture.shape[2:])


ROWS_AT_ONCE = 32
"""Of a large picture's logits: all of them, of 150 classes, would take a gigabyte."""


class DenseMaps(PatchFeatures):
    """A head's maps of pictures: logits [h, w, K], or depths in metres [h, w, 1] that are not yet clamped.

    Args:
        dense: in evaluation mode, on the device to be used.
        short_side: pixels at which the network sees a picture's short side; the long one is not rounded to patches.
        window: side in pixels of the windows by which it sees them, which overlap; None: it sees them whole.
        batch_size, precision: as in `PatchFeatures`; the head itself is computed in float32.
    """

    def __init__(
        self,
        dense: DenseModel,
        short_side: int,
        batch_size: int | None = None,
        precision: str = "auto",
        window: int | None = None,
    ) -> None:
        super().__init__(dense.backbone, -(-short_side // dense.backbone.patch_size), batch_size, precision)
        self.dense, self.short_side, self.window = dense, short_side, window

    def fitted(self, size: tuple[int, int], pixel_aspect: Fraction = Fraction(1)) -> tuple[int, int]:
        height, width = float(size[0]), float(size[1] * pixel_aspect)
        scale = self.short_side / min(height, width)
        return max(round(height * scale), 1), max(round(width * scale), 1)

    def compute(self, images: Tensor) -> Tensor:
        if self.window is None:
            return self._maps(images).permute(0, 2, 3, 1)
        side = self.dense.backbone.patch_size
        patches = max(1, round(self.window / side))
        stride = max(1, patches * 2 // 3 if len(self.dense.layers) == 1 else patches // 2)
        found = sliding(self._maps, pad_to_patches(images, side), patches * side, stride * side, cell=side)
        return found.permute(0, 2, 3, 1)

    def _maps(self, images: Tensor) -> Tensor:
        with self.precision.autocast():
            features = self.dense.features(images)
        maps: Tensor = self.dense.head([(patches.float(), cls.float()) for patches, cls in features])
        return maps


def depths_of(depths: FeatureMap, span: tuple[float, float], size: tuple[int, int]) -> NDArray[np.float32]:
    """Depths [h, w, 1] within a span, as [H, W] of `size`; as `DenseHead.predict` stretches them."""
    clamped = np.clip(depths[..., 0], *span)
    return cv2.resize(clamped, size[::-1], interpolation=cv2.INTER_LINEAR).astype(np.float32)


def classes_of(logits: FeatureMap, size: tuple[int, int]) -> NDArray[Any]:
    """The likeliest class of each pixel: [h, w, K] -> uint8 [H, W] of `size`, or uint16 for more than 256 classes.

    It is that of logits stretched bilinearly, of which a few rows are there at a time.
    """
    (height, width), (h, _, count) = size, logits.shape
    maps = torch.from_numpy(np.array(logits)).permute(2, 0, 1)[None]
    wide = torch.nn.functional.interpolate(maps, size=(h, width), mode="bilinear", align_corners=False)[0]
    places = ((torch.arange(height) + 0.5) * (h / height) - 0.5).clamp(0, h - 1)
    above = places.long()
    below, share = (above + 1).clamp(max=h - 1), (places - above)[None, :, None]
    found = []
    for some in torch.arange(height).split(ROWS_AT_ONCE):
        rows = wide[:, above[some]].lerp(wide[:, below[some]], share[:, some])
        found.append(rows.argmax(dim=0))
    return torch.cat(found).numpy().astype(np.uint8 if count <= 256 else np.uint16)
