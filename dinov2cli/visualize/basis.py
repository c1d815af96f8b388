"""From patch features to colours: a foreground and three components of it, fitted once for all pictures.

The recipe of the DINOv2 paper's PCA figures (section 7.5): the first component of all patches separates the main
objects from the background by a threshold; a second PCA over the foreground gives three components, shown as RGB.

Shape legend: F pictures, h x w patches of a picture, D feature dimension.
"""

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinov2cli.console import logger
from dinov2cli.errors import DataError
from dinov2cli.files import replacing, writing
from dinov2cli.visualize.pca import FloatArray, PrincipalComponents, StreamingCovariance, StreamingHistogram

Features = NDArray[np.float32]
FeatureStream = Callable[[], Iterable[Features]]
"""A function that starts the stream of feature maps [h, w, D] anew: fitting reads it several times."""

AUTO_LEAST_SHARE = 0.02
AUTO_LEAST_SEPARATION = 0.8
"""Share of the variance that a split into two groups explains: 0.64 of a normal distribution, 0.75 of an even one. With
less there are no two groups, and a cut would go through the midst of things, as in features of a small network."""
AUTO_MOST_AT_BORDER = 0.9
"""Share of the border that is foreground, divided by that of all patches. With more the split is not one of objects and
background: it may be one of dark and bright photos."""
SOFT_EDGE = 0.04
"""Width of the foreground's soft edge, as a share of the first component's range. A hard edge flickers in video where
sensor noise moves a patch back and forth over the threshold."""
RANGE_PERCENTILES = (1.0, 99.0)
FORMAT = "dino2-color-basis-1"
COMPONENTS = ("mean", "components", "variance")  # fields of PrincipalComponents, in order


@dataclass(frozen=True)
class Foreground:
    """Which patches belong to the main objects, by the first component of all patches.

    Args:
        separation: that one component, positive towards the foreground.
        score_range: its values that scores 0 and 1 stand for.
        threshold: foreground above this score; None: everything is foreground.
    """

    separation: PrincipalComponents
    score_range: tuple[float, float]
    threshold: float | None

    def score(self, features: NDArray[np.floating]) -> FloatArray:
        """First component over its robust range: [..., D] -> float64 [...], mostly within 0 to 1."""
        low, high = self.score_range
        return (self.separation.project(features)[..., 0] - low) / max(high - low, 1e-12)

    def select(self, features: NDArray[np.floating]) -> NDArray[np.floating]:
        """The foreground's features: [..., D] -> [N, D]."""
        vectors = features.reshape(-1, features.shape[-1])
        return vectors if self.threshold is None else vectors[self.score(vectors) > self.threshold]

    def opacity(self, features: NDArray[np.floating]) -> FloatArray:
        """Above 1 foreground, below 0 background, between them the soft edge: [..., D] -> float64 [...]."""
        if self.threshold is None:
            return np.ones(features.shape[:-1])
        return (self.score(features) - self.threshold) / SOFT_EDGE + 0.5


@dataclass(frozen=True)
class ColorBasis:
    """A fixed map from a patch feature to a colour and an opacity.

    Args:
        foreground: where there is colour.
        colors: three components of the foreground's features.
        low, high: float64 [3], coordinates shown as 0 and 1.
    """

    foreground: Foreground
    colors: PrincipalComponents
    low: FloatArray
    high: FloatArray

    def rgb(self, features: NDArray[np.floating]) -> FloatArray:
        """Unclipped colours, ready to be resized: [..., D] -> float64 [..., 3], mostly within 0 to 1."""
        spread = self.high - self.low
        centred = self.colors.project(features) - (self.low + self.high) / 2
        # A component without spread (a picture of one colour) is shown as mid-grey, not as amplified rounding noise.
        return 0.5 + centred / np.where(spread > 1e-9, spread, np.inf)

    def save(self, path: Path) -> None:
        """Write an `.npz` that `ColorBasis.load` reads.

        Raises:
            EnvironmentProblem: the file cannot be written.
        """
        threshold = np.nan if self.foreground.threshold is None else self.foreground.threshold
        facts: dict[str, Any] = {"format": FORMAT, "threshold": threshold, "score_range": self.foreground.score_range}
        parts = {"separation": self.foreground.separation, "colors": self.colors}
        bases = {f"{name}_{field}": getattr(part, field) for name, part in parts.items() for field in COMPONENTS}
        with writing(path), replacing(path) as aside, aside.open("wb") as file:
            np.savez(file, low=self.low, high=self.high, **facts, **bases)

    @classmethod
    def load(cls, path: Path) -> "ColorBasis":
        """Read what `save` wrote.

        Raises:
            DataError: no such file, or not a basis.
        """
        try:
            with np.load(path, allow_pickle=False) as data:
                if str(data["format"]) != FORMAT:
                    raise ValueError(f"format {data['format']}")
                threshold = float(data["threshold"])
                low, high = (float(value) for value in data["score_range"])
                separation, colors = (
                    PrincipalComponents(*(data[f"{name}_{field}"] for field in COMPONENTS))
                    for name in ("separation", "colors")
                )
                foreground = Foreground(separation, (low, high), None if np.isnan(threshold) else threshold)
                return cls(foreground, colors, data["low"], data["high"])
        except FileNotFoundError as error:
            raise DataError(f"{path}: no such file; a basis is written by `--save-basis`") from error
        except Exception as error:  # numpy and zipfile raise whatever a damaged file makes them come upon
            raise DataError(f"{path}: not a basis that `--save-basis` wrote ({error})") from error


def parse_foreground(text: str) -> str | float:
    """`auto`, `none` or a threshold between 0 and 1.

    Raises:
        DataError: anything else.
    """
    if text in ("auto", "none"):
        return text
    with suppress(ValueError):
        if 0 <= (threshold := float(text)) <= 1:
            return threshold
    raise DataError(f"--foreground {text}: give auto, none or a number from 0 to 1 (such as 0.5)")


def fit_color_basis(stream: FeatureStream, foreground: str | float = "auto") -> ColorBasis:
    """Fit foreground and colours to a stream of feature maps in constant memory. Reads the stream four times.

    Args:
        stream: starts the stream of float32 [h, w, D] maps; each start must give the same maps.
        foreground: `auto` (Otsu's threshold, or none where the split explains little, or where the border shows as
            much of both sides), `none`, or a number from 0 to 1 over the robust range of the first component.

    Raises:
        DataError: an empty stream; a threshold above which no patch lies.
    """
    moments: StreamingCovariance | None = None
    for features in stream():
        if moments is None:
            moments = StreamingCovariance(features.shape[-1])
        moments.update(features.reshape(-1, features.shape[-1]))
    if moments is None:
        raise DataError("no picture to fit colours to")
    kept = _find_foreground(stream, moments.principal_components(1), foreground)

    chosen = StreamingCovariance(len(moments.mean))
    for features in stream():
        chosen.update(kept.select(features))
    if not chosen.count:
        raise DataError(f"--foreground {foreground}: no patch lies above it; give a lower threshold")
    colors = chosen.principal_components(3)
    histograms = [_histogram_for(variance) for variance in colors.variance]
    for features in stream():
        for histogram, values in zip(histograms, colors.project(kept.select(features)).T, strict=True):
            histogram.update(values)
    low, high = (np.array([h.percentile(percent) for h in histograms]) for percent in RANGE_PERCENTILES)
    return ColorBasis(kept, colors, low, high)


def _find_foreground(stream: FeatureStream, separation: PrincipalComponents, wanted: str | float) -> Foreground:
    """Sign of the first component, its robust range, and the threshold as a share of that range."""
    histogram, at_border = _histogram_for(separation.variance[0]), _histogram_for(separation.variance[0])
    for features in stream():
        values = separation.project(features)[..., 0]
        histogram.update(values)
        at_border.update(np.concatenate([values[0], values[-1], values[1:-1, 0], values[1:-1, -1]]))
    cut, explained = histogram.otsu()
    # Objects sit in the middle, background reaches the border: the foreground is the side that the border shows less.
    share, share_at_border = _share_above(histogram, cut), _share_above(at_border, cut)
    if share_at_border > share:
        share, share_at_border = 1 - share, 1 - share_at_border
        separation = PrincipalComponents(separation.mean, -separation.components, separation.variance)
        histogram.counts = histogram.counts[::-1].copy()
        cut = -cut
    low, high = (histogram.percentile(percent) for percent in RANGE_PERCENTILES)
    everything = Foreground(separation, (low, high), None)
    if wanted == "none" or separation.variance[0] < 1e-18:  # pictures of one colour have nothing to separate
        return everything
    if wanted == "auto":
        is_split = explained >= AUTO_LEAST_SEPARATION and AUTO_LEAST_SHARE < share < 1 - AUTO_LEAST_SHARE
        if not is_split or share_at_border > AUTO_MOST_AT_BORDER * share:
            logger.info("foreground: the first component does not split objects from background; all patches are shown")
            return everything
        logger.info("foreground: %.0f %% of the patches", 100 * share)
        return Foreground(separation, (low, high), (cut - low) / (high - low))
    return Foreground(separation, (low, high), float(wanted))


def _histogram_for(variance: float) -> StreamingHistogram:
    """For coordinates of mean 0 and the given variance."""
    # By Chebyshev's inequality at most 1 % of any distribution lies beyond ten standard deviations.
    reach = 10 * max(float(variance), 1e-24) ** 0.5
    return StreamingHistogram(-reach, reach, bins=8192)


def _share_above(histogram: StreamingHistogram, value: float) -> float:
    edges = np.linspace(histogram.low, histogram.high, len(histogram.counts) + 1)
    below = np.interp(value, edges, np.concatenate([[0], np.cumsum(histogram.counts)]))
    return float(1 - below / max(histogram.counts.sum(), 1))


def check_basis(basis: ColorBasis, dim: int) -> None:
    """Raise DataError where a basis is for features of another dimension than the model's."""
    its = len(basis.colors.mean)
    if its != dim:
        raise DataError(
            f"--basis: it was fitted to {its}-dimensional features, and the model's have {dim}; "
            "fit it with the same model"
        )
