"""Keys of the crops: sizes, of which a run may mix several, scales, and colours."""

from typing import Annotated, ClassVar, NamedTuple

from pydantic import BeforeValidator, Field

from dinov2cli.config.group import Group, key
from dinov2cli.config.images import FromList
from dinov2cli.requests.images import Words

Fraction = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, le=1)]
AreaRange = Annotated[tuple[Share, Share], FromList]
ThreeFractions = Annotated[tuple[Fraction, Fraction, Fraction], FromList]
Side = Annotated[int, Field(ge=1)]
SIDES = Words("a whole number, at least 1, or a list of such numbers", int)
Sides = Annotated[Side | Annotated[tuple[Side, ...], FromList, Field(min_length=1)], SIDES]
RATIOS = Words("a number, or a list of numbers, from 0 to 1", float)
Ratios = Annotated[
    tuple[Fraction, ...],
    RATIOS,
    FromList,
    BeforeValidator(lambda value: value if isinstance(value, list | tuple) else (value,)),
]


class Resolution(NamedTuple):
    """Sides of an iteration's crops in pixels, and how often it is drawn."""

    global_size: int
    local_size: int
    gram_teacher_size: int | None
    share: float


class Crops(Group):
    """Multi-crop augmentation. Sizes in pixels, scales as shares of the image's area."""

    global_crops_number: ClassVar[int] = 2
    """Global crops per image; the losses are defined for two."""

    global_crops_scale: AreaRange = key((0.32, 1.0), "Area range of the two global crops.")
    local_crops_number: int = key(8, "Local crops per image.", ge=0)
    local_crops_scale: AreaRange = key((0.05, 0.32), "Area range of the local crops.")
    global_crops_size: Sides = key(
        224,
        "Side of the global crops; a multiple of patch_size. A list, of as many sides as there are of the others: an "
        "iteration has one of them, drawn by global_local_crop_pairs_ratios.",
    )
    local_crops_size: Sides = key(96, "Side of the local crops, likewise.")
    gram_teacher_crops_size: Sides | None = key(
        None,
        "Side of the global crops as the Gram teacher sees them, of which the student's are resized; likewise. null: "
        "it sees the student's.",
    )
    global_local_crop_pairs_ratios: Ratios = key(
        (1.0,), "Where sides are lists, how often each place of them is drawn: as many numbers, which add up to 1."
    )
    gram_teacher_no_distortions: bool = key(
        False, "The Gram teacher's crops have no changes of colour, blur and solarization; false: the student's."
    )
    blur_prob: ThreeFractions = key(
        (0.0, 0.9, 0.5),
        "(dino2) Blur probability of global crop 1, global crop 2 and the local crops. The published code "
        "runs the default; what it spells out is [1.0, 0.1, 0.5].",
    )
    color_jitter_prob: Fraction = key(
        0.8, "(dino2) Probability of a jitter of brightness, contrast, saturation and hue."
    )
    grayscale_prob: Fraction = key(0.2, "(dino2) Probability that a crop loses its colour.")
    solarize_prob: Fraction = key(0.2, "(dino2) Probability that global crop 2 is solarized.")
    channel_dropout_prob: Fraction = key(
        0.0, "(dino2) Probability with which a crop goes without a channel, never without all: its mean is put there."
    )

    def resolutions(self) -> list[Resolution]:
        """All that an iteration may have, in the order of the lists."""
        lists = [sides for sides in self.sides().values() if isinstance(sides, tuple)]
        each = [
            sides if isinstance(sides, tuple) else (sides,) * (len(lists[0]) if lists else 1)
            for sides in (self.global_crops_size, self.local_crops_size, self.gram_teacher_crops_size)
        ]
        return [Resolution(*sides) for sides in zip(*each, self.global_local_crop_pairs_ratios, strict=True)]

    def largest(self) -> Resolution:
        """That of the largest global crops."""
        return max(self.resolutions(), key=lambda each: each.global_size)

    def sides(self) -> dict[str, int | tuple[int, ...] | None]:
        """What the keys of sides say, by their names."""
        return {name: getattr(self, name) for name in type(self).model_fields if name.endswith("_crops_size")}
