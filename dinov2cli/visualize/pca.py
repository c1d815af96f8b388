"""Principal components of a stream: exact mean and covariance in one pass, memory D x D whatever the length.

Shape legend: N vectors, D dimensions, K components.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class PrincipalComponents:
    """A centred orthonormal basis, strongest component first.

    Args:
        mean: float64 [D].
        components: float64 [K, D], orthonormal rows.
        variance: float64 [K], variance of the data along each row (unbiased, as in scikit-learn).
    """

    mean: FloatArray
    components: FloatArray
    variance: FloatArray

    def project(self, vectors: NDArray[np.floating]) -> FloatArray:
        """Coordinates in the basis: [..., D] -> float64 [..., K]."""
        return vectors @ self.components.T - self.mean @ self.components.T


class StreamingCovariance:
    """Mean and covariance of all vectors seen so far, exactly (up to float64 rounding), batch by batch.

    Batches are merged by their means and centred second moments (Chan, Golub & LeVeque, 1979): subtracting large
    raw moments would lose digits where the mean is large against the spread, as in ViT features.
    """

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.mean = np.zeros(dim)
        self._scatter = np.zeros((dim, dim))

    def update(self, vectors: NDArray[np.floating]) -> None:
        """Take in vectors [N, D] of any float type."""
        if not len(vectors):
            return
        batch_mean = vectors.mean(0, dtype=np.float64)
        centred = vectors - batch_mean
        shift = batch_mean - self.mean
        total = self.count + len(vectors)
        self._scatter += centred.T @ centred
        self._scatter += np.outer(shift, shift) * (self.count * len(vectors) / total)
        self.mean += shift * (len(vectors) / total)
        self.count = total

    def covariance(self) -> FloatArray:
        """Unbiased covariance, float64 [D, D]; zeros before the second vector."""
        return self._scatter / max(self.count - 1, 1)

    def principal_components(self, k: int) -> PrincipalComponents:
        """The k strongest components, each signed so that its entry of largest magnitude is positive.

        That sign does not depend on the order of the data or on the linear algebra library, so colours made from the
        components do not flip between runs.

        Raises:
            ValueError: more components than dimensions.
        """
        dim = len(self.mean)
        if not 0 < k <= dim:
            raise ValueError(f"{k} components of {dim}-dimensional vectors")
        variance, vectors = np.linalg.eigh(self.covariance())
        components = vectors.T[::-1][:k]
        largest = components[np.arange(k), np.abs(components).argmax(1)]
        components = components * np.where(largest < 0, -1.0, 1.0)[:, None]
        return PrincipalComponents(self.mean.copy(), components, np.maximum(variance[::-1][:k], 0))


class StreamingHistogram:
    """Percentiles of a stream of numbers from a fixed number of bins; numbers outside [low, high] count at the ends."""

    def __init__(self, low: float, high: float, bins: int = 4096) -> None:
        self.low, self.high = low, max(high, low + 1e-12)
        self.counts = np.zeros(bins, dtype=np.int64)

    def update(self, values: NDArray[np.floating]) -> None:
        """Take in values of any shape."""
        bins = len(self.counts)
        places = (np.asarray(values, dtype=np.float64).ravel() - self.low) * (bins / (self.high - self.low))
        self.counts += np.bincount(np.clip(places, 0, bins - 1).astype(np.int64), minlength=bins)

    def percentile(self, percent: float) -> float:
        """The value below which `percent` (0 to 100) of the numbers lie, interpolated within its bin."""
        below = np.concatenate([[0], np.cumsum(self.counts)])
        edges = np.linspace(self.low, self.high, len(self.counts) + 1)
        return float(np.interp(percent / 100 * below[-1], below, edges))

    def otsu(self) -> tuple[float, float]:
        """The threshold that best splits the numbers in two, and the share of the variance that the split explains.

        Otsu (1979), "A threshold selection method from gray-level histograms". The share is 0 for constant numbers
        and 1 for two points.
        """
        weights = self.counts / max(self.counts.sum(), 1)
        centres = self.low + (np.arange(len(weights)) + 0.5) * (self.high - self.low) / len(weights)
        lower = np.cumsum(weights)
        lower_sum = np.cumsum(weights * centres)
        mean = lower_sum[-1]
        with np.errstate(divide="ignore", invalid="ignore"):
            between = (mean * lower - lower_sum) ** 2 / (lower * (1 - lower))
        between = np.where((lower > 1e-9) & (lower < 1 - 1e-9), between, 0.0)
        variance = float((weights * (centres - mean) ** 2).sum())
        if variance <= 0 or between.max() <= 0:
            return mean, 0.0
        # Between two separate groups every empty bin is as good as the next: take the middle of that gap.
        best = np.flatnonzero(between >= between.max() * (1 - 1e-12))
        threshold = (centres[best[0]] + centres[best[-1]]) / 2 + (self.high - self.low) / (2 * len(weights))
        return float(threshold), float(between.max() / variance)
