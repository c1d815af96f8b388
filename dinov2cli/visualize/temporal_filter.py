"""Colours that stand still where the picture does: a recursive noise filter that lets go of whatever moves.

Sensor noise shimmers in the features even under a fixed basis. Where a patch's pixels stay within the noise of its
own running mean, its values are averaged over time; where they leave it, the new values are taken as they are.

Shape legend: H x W pixels, h x w patches, C values of a patch.
"""

import cv2
import numpy as np
from numpy.typing import NDArray

LONGEST_MEMORY = 32
"""Frames that a still patch is averaged over."""
CELLS = 4
"""Cells along each side of a patch: means over a cell suppress noise, and several show motion within the patch."""
NOISE_PERCENTILE = 5.0
"""The quietest of the patches that change at all show nothing but noise, even when the camera moves."""
STILL, MOVING = 4.0, 8.0
"""Squared change against the running mean, over the noise's: below the first averaged, above the second not at all.
The mean square of 48 cell values (4 x 4, RGB) that hold only noise stays below 3 times the estimate."""
CAMERA_MOTION = 0.25
"""Share of moving patches above which nothing is averaged: the camera moves, or the scene has been cut."""
LEAST_NOISE = 0.02
"""Squared grey levels; rounding to 8 bits alone causes about as much."""


class TemporalFilter:
    """State of one video; call it with every frame in order.

    Args:
        grid: patches (h, w) that are told still or moving; by default one for each value.
    """

    def __init__(self, grid: tuple[int, int] | None = None) -> None:
        self._grid = grid
        self._noise = np.inf
        self._last: NDArray[np.float32] | None = None
        self._cells: NDArray[np.float32] = np.zeros(0, np.float32)
        self._values: NDArray[np.floating] = np.zeros(0)
        self._averaged: NDArray[np.floating] = np.zeros(0)

    def __call__(self, picture: NDArray[np.uint8], values: NDArray[np.floating]) -> NDArray[np.floating]:
        """Filtered values.

        Args:
            picture: the frame, RGB [H, W, 3].
            values: [h, w, C], linear in the features of that frame (colours and opacity before clipping), or finer
                than the grid.
        """
        height, width = self._grid or values.shape[:2]
        size = (width * CELLS, height * CELLS)
        cells = cv2.resize(picture, size, interpolation=cv2.INTER_AREA).astype(np.float32)
        if self._last is None:
            self._last, self._cells, self._values = cells, cells, values
            self._averaged = np.ones((height, width))
            return values
        self._learn_noise(_patch_mean_square(cells - self._last))
        self._last = cells

        change = _patch_mean_square(cells - self._cells) / self._noise
        motion = np.clip((change - STILL) / (MOVING - STILL), 0, 1)
        if (motion >= 1).mean() > CAMERA_MOTION:
            motion[:] = 1
        gain = np.maximum(motion, 1 / np.minimum(self._averaged + 1, LONGEST_MEMORY))
        self._averaged = 1 / gain
        fine = cv2.resize(gain, values.shape[1::-1], interpolation=cv2.INTER_NEAREST)
        self._values = self._values + fine[..., None] * (values - self._values)
        cell_gain = gain.repeat(CELLS, 0).repeat(CELLS, 1)[..., None].astype(np.float32)
        self._cells = self._cells + cell_gain * (cells - self._cells)
        return self._values

    def _learn_noise(self, change: NDArray[np.floating]) -> None:
        """The least noise seen between two frames: motion only ever adds to it."""
        changed = change[change > LEAST_NOISE]
        seen = float(np.percentile(changed, NOISE_PERCENTILE)) if changed.size else LEAST_NOISE
        self._noise = min(self._noise, seen)


def _patch_mean_square(difference: NDArray[np.float32]) -> NDArray[np.floating]:
    height, width = difference.shape[0] // CELLS, difference.shape[1] // CELLS
    squares = np.square(difference).reshape(height, CELLS, width, CELLS, -1)
    means: NDArray[np.floating] = squares.mean((1, 3, 4), dtype=np.float64)
    return means
