"""`dino2 datasets`: requests about datasets that have a name, and what is in them."""

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from dinov2cli.requests.base import Request, argument, option
from dinov2cli.requests.images import ImagesRequest


class ListDatasetsRequest(Request, command="datasets list", run_by="dinov2cli.data.known:list_them"):
    """List the datasets that have a name, with where they lie.

    Example:

        dino2 datasets list
    """

    as_json: bool = option(False, "Print one JSON object instead of a table.", flags="--json")


class ShowDatasetRequest(Request, command="datasets show", run_by="dinov2cli.data.known:show"):
    """Show what is in a known dataset: folder, images, classes.

    Example:

        dino2 datasets show ImageNet
    """

    name: str = argument("A name that `dino2 datasets list` prints.")
    as_json: bool = option(False, "Print one JSON object.", flags="--json")


class AddDatasetRequest(Request, command="datasets add", run_by="dinov2cli.data.known:add"):
    """Give a dataset a name, by which every command then takes it. Nothing is copied.

    Example:

        dino2 datasets add album ~/photos

        dino2 datasets add ImageNet /data/imagenet --extra /data/imagenet-extra
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.-]*$")] = argument("Letters, digits, '_', '-' and '.'.")
    dataset: str = argument("A folder of images or a dataset string; for ImageNet and ImageNet22k its root.")
    extra: Path | None = option(None, "Folder of ImageNet's metadata files.", default_text="the root")
    force: bool = option(False, "Replace what has the name now.", flags="--overwrite --force")


class ForgetDatasetRequest(Request, command="datasets remove", run_by="dinov2cli.data.known:remove"):
    """Take a dataset's name away. The images stay where they are.

    Example:

        dino2 datasets remove photos
    """

    name: str = argument("A name that `dino2 datasets list` prints.")


class DatasetStatsRequest(ImagesRequest, command="datasets stats", run_by="dinov2cli.data.statistics:run", logs=True):
    """Measure mean and standard deviation of each channel of a dataset, for a training on it.

    Images that are no colour photos (microscopy, satellites, X-ray) have other statistics than ImageNet's, by which
    images are normalised otherwise. What is measured is printed as changes for `dino2 train`, and with `--write` goes
    into a configuration file. An interrupted measurement goes on where it was when the command is given again.

    Example:

        dino2 datasets stats ~/cells --write cells.yaml

        dino2 datasets stats ~/cells --percentiles 0.5 99.5 --write cells.yaml

        dino2 datasets stats ~/cells --channels 0 2 4 --value-range '[0, 4095]' --write nuclei.yaml --preset vits14
    """

    dataset: str = argument("A folder of images or a dataset string.", metavar="DATASET")
    channels: tuple[str, ...] = option(
        (), "Channels to use, in this order: numbers from 0, or the files' names.", default_text="all",
        metavar="CHANNEL",
    )  # fmt: skip
    percentiles: tuple[Annotated[float, Field(ge=0, le=100)], ...] = option(
        (), "Measure first which values these percentiles of the whole set are; they become data.value_range: black "
        "and white.", metavar="P Q", default_text="off",
    )  # fmt: skip
    max_images: int = option(10_000, "Images to look at, drawn at random; 0: all.", ge=0)
    write: Path | None = option(
        None, "Write student.in_chans and the data keys into this configuration, a new one or one that is there.",
        metavar="YAML",
    )  # fmt: skip
    preset: str | None = option(None, "Begin the new configuration with this preset.", completes="presets")
    num_workers: int | None = option(None, "Processes that read images.", default_text="from the cores", ge=0)
    max_bad_fraction: float = option(0.01, "Share of unreadable images above which to stop.", ge=0, le=1)
    as_json: bool = option(False, "Print one JSON object.", flags="--json")

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if self.preset is not None and self.write is None:
            raise ValueError("--preset goes with --write")
        if self.percentiles and (len(self.percentiles) != 2 or self.percentiles[0] >= self.percentiles[1]):
            raise ValueError("--percentiles: must be two, the lower first, such as 1 99")
        if self.percentiles and self.value_range is not None:
            raise ValueError("--percentiles measures what --value-range says; give one of them")
        return self
