"""How image files become pixels, in words: options of the commands, and `data` keys of the same names."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

from dinov2cli.requests.base import Request, option


@dataclass(frozen=True)
class Words:
    """A text that must mean something; in the metadata of its type, for messages and help.

    Args:
        expected: what it may be.
        meaning: of the text; raises ValueError for one that means nothing.
        known: words among them, to be offered.
    """

    expected: str
    meaning: Callable[[str], Any]
    known: tuple[str, ...] = ()

    def checked(self, text: str) -> str:
        """The text itself. Raises ValueError with what would be right."""
        try:
            self.meaning(text)
        except ValueError:
            raise ValueError(f"{text!r}: must be {self.expected}") from None
        return text


def value_range(text: str) -> tuple[str, float, float]:
    """("auto", 0, 0), ("dtype", 0, 0), ("values", black, white) or ("percentile", p, q)."""
    if text in ("auto", "dtype"):
        return text, 0, 0
    percentile = text.startswith("percentile ")
    low, high = _numbers(text.removeprefix("percentile "), 2)
    if low >= high or (percentile and not 0 <= low < high <= 100):
        raise ValueError(text)
    return "percentile" if percentile else "values", low, high


def background(text: str) -> tuple[str, tuple[float, ...]]:
    """("mean", ()), ("drop", ()) or ("color", (red, green, blue)), levels 0 to 255."""
    if text in ("mean", "drop"):
        return text, ()
    levels = _numbers(text, 3)
    if not all(0 <= level <= 255 for level in levels):
        raise ValueError(text)
    return "color", levels


def _numbers(text: str, count: int) -> tuple[float, ...]:
    numbers = json.loads(text)
    if (
        not isinstance(numbers, list)
        or len(numbers) != count
        or not all(type(each) in (int, float) and math.isfinite(each) for each in numbers)
    ):
        raise ValueError(text)
    return tuple(map(float, numbers))


RANGE = Words("auto, dtype, [LOW, HIGH] or percentile [P, Q]", value_range)
BACKGROUND = Words("mean, drop, or [RED, GREEN, BLUE] from 0 to 255", background)

_AsText = BeforeValidator(lambda value: json.dumps(list(value)) if isinstance(value, (list, tuple)) else value)
ValueRange = Annotated[str, RANGE, _AsText, AfterValidator(RANGE.checked)]
Background = Annotated[str, BACKGROUND, _AsText, AfterValidator(BACKGROUND.checked)]


class ImagesRequest(Request):
    """What commands share that read images. By default what the run's configuration says of them."""

    value_range: ValueRange | None = option(
        None,
        "Which values are black and white, by default data.value_range of the run, or auto: as the file's format says. "
        "dtype: all values of its type.",
        metavar="auto|dtype|'[LOW, HIGH]'|'percentile [P, Q]'",
        last=True,
    )
    background: Background | None = option(
        None,
        "What transparent parts show, by default data.background of the run, or mean: zeros to the network. drop: "
        "colours hidden there.",
        metavar="mean|drop|'[R, G, B]'",
        last=True,
    )
    no_exif_orientation: bool = option(False, "Do not turn images as EXIF says.", last=True)
    max_image_gb: float | None = option(
        None, "Largest memory for one image, by default data.max_image_gb of the run, or 3.", ge=0.001, last=True
    )
