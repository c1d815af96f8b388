"""Depths and classes of pictures of any size, batch by batch, and stretched to the pictures' pixels.

Shape legend: H x W pixels, h x w of a head's map, K classes or 1.
"""

from fractions import Fraction
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinov2cli.models.dense_heads import DenseModel, pad_to_patches
from dinov2cli.models.sliding import sliding
from dinov2cli.visualize.features import FeatureMap, PatchFeatures

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
