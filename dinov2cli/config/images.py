"""How image files become a network's input; the same in training, evaluation, pictures and exports."""

from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator, Field

from dinov2cli.config.group import Group, key
from dinov2cli.requests.images import Background, ValueRange

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

FromList = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
# Numbers may be written as such, and are kept as text, as names are.
Channels = Annotated[
    tuple[str, ...],
    BeforeValidator(lambda value: tuple(map(str, value)) if isinstance(value, list | tuple) else value),
]


class Statistics(NamedTuple):
    """Mean and standard deviation of each channel, of values from 0 to 1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


IMAGENET = Statistics(IMAGENET_MEAN, IMAGENET_STD)


class ImageOptions(Group):
    """The options that a run sets in its `data` group."""

    value_range: ValueRange = key(
        "auto",
        "(dino2) Which values are black and white. auto: as the file's format says, floating point from 0 to 1 as it "
        "is, else the image is refused; dtype: all values of its type; percentiles: of each image.",
    )
    exif_orientation: bool = key(
        True, "(dino2) Turn images upright as EXIF says, whatever their type; the reference does not."
    )
    background: Background = key(
        "mean",
        "(dino2) What transparent parts show. mean: that of the data, zeros to the network; drop: the colours hidden "
        "there, as in the reference.",
    )
    channels: Channels = key(
        (),
        "(dino2) Channels of the files that are used, in this order: numbers from 0, or the files' names for them; "
        "[]: all.",
    )
    mean: Annotated[tuple[float, ...], FromList] | None = key(
        None, "(dino2) Mean of each channel, of values from 0 to 1; null: ImageNet's. See dino2 datasets stats."
    )
    std: Annotated[tuple[Annotated[float, Field(gt=0)], ...], FromList] | None = key(
        None, "(dino2) Standard deviation of each channel, likewise."
    )


class Images(ImageOptions):
    """All that a network expects of its images: the options, and how many channels it has.

    It travels with the weights: a run's config.yaml has it, and so have exported files.
    """

    in_chans: int = key(3, "Image channels.", ge=1)

    @property
    def statistics(self) -> Statistics:
        """With which images are normalised: as given, else ImageNet's; for other than three channels, their average."""
        if self.mean is not None and self.std is not None:
            return Statistics(self.mean, self.std)
        if self.in_chans == len(IMAGENET_MEAN):
            return IMAGENET
        return Statistics(*((round(sum(levels) / 3, 3),) * self.in_chans for levels in IMAGENET))

    @property
    def are_rgb(self) -> bool:
        """Whether there are colours, so that saturation, hue and grayscale mean something."""
        return self.in_chans == 3 and not self.channels

    def beside_weights(self) -> dict[str, Any]:
        """What weights do not show and is not as usual, as plain values; `Images(**..., in_chans=...)` reads it."""
        return self.model_dump(mode="json", exclude_defaults=True, exclude={"in_chans"})


RGB = Images()
