"""What the evaluations with labels for every pixel may be asked for."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from dinov2cli.requests.base import AboveZero, AtLeastOne, option
from dinov2cli.requests.eval import EvalRequest

Rates = Annotated[tuple[AboveZero, ...], Field(min_length=1)]


class DenseRequest(EvalRequest):
    """What both share."""

    train_dataset: str | None = option(
        None,
        "A folder or a dataset string with labels for every pixel, to learn from; without --val-dataset, its other "
        "part is measured. By default what the run's config names.",
        metavar="DATASET",
        flags="--train-dataset --data",
    )
    val_dataset: str | None = option(None, "The same, to measure on.", metavar="DATASET")
    layers: int = option(1, "Blocks that the head reads: 1, the last, or 4.")
    head: str | None = option(None, "Measure a trained head instead of training: a file or a released name.")
    learning_rates: Rates = option((1e-3,), "Rates, each with a head of its own; the best is reported.")
    batch_size: AtLeastOne = option(16, "Images in a step, of all processes together.")
    checkpoint_period: AtLeastOne = option(1000, "Iterations between checkpoints.")
    frozen_crops: bool = option(
        False, "Fast approximation: train on the features of one fixed crop of each image, kept in half precision."
    )
    baselines: bool = option(False, "Train the same head on raw colours and on a random network of the same shape.")
    no_resume: bool = option(False, "Start anew even if there is a checkpoint.")

    @field_validator("layers")
    @classmethod
    def _are_one_or_four(cls, layers: int) -> int:
        if layers not in (1, 4):
            raise ValueError(f"--layers {layers} is unknown; known: 1, 4.")
        return layers


class SegmentationRequest(DenseRequest, command="eval segmentation"):
    """Train a linear head that gives every patch a class, and measure its mean IoU.

    BatchNorm and a 1x1 convolution on the patch tokens. The data are a folder: ADE20k, Pascal VOC, Cityscapes, or
    images/ beside masks/, index masks as PNG or .npy, each with train/ and val/ in it.

    Example:

        dino2 eval segmentation runs/demo --data shapes --image-size 96 --iterations 500

        dino2 eval segmentation dinov2_vits14 --data ADEChallengeData2016 --layers 4 --inference slide ms
    """

    labels: ClassVar[Literal["classes", "masks", "depth"]] = "masks"

    image_size: AtLeastOne | None = option(
        None, "Short side of the images in pixels; by default 512, with --layers 4 640.", last=True
    )
    crop_size: AtLeastOne | None = option(None, "Side of the crops to train on and of windows [--image-size].")
    stride: AtLeastOne | None = option(None, "Pixels between windows [2/3 of the crop, with --layers 4 half].")
    inference: tuple[Literal["whole", "slide", "ms"], ...] = option(
        ("slide",),
        "How images are measured: whole, by windows that overlap (slide), or by these at five scales and mirrored "
        "(ms); the first chooses the best head.",
    )
    iterations: AtLeastOne = option(40_000, "Steps of training.")


class DepthRequest(DenseRequest, command="eval depth"):
    """Train a linear head that gives every patch a depth, and measure its errors.

    A 1x1 convolution on patch and class tokens to 256 bins of depth. The data are a folder: NYU Depth V2, KITTI, or
    images/ beside depth/, 16-bit PNG or metres as float TIFF or .npy, each with train/ and val/ in it.

    Example:

        dino2 eval depth runs/demo --data rooms --iterations 500
    """

    labels: ClassVar[Literal["classes", "masks", "depth"]] = "depth"

    image_size: AtLeastOne | None = option(
        None, "Short side in pixels to resize images to; by default they are not resized.", last=True
    )
    crop_size: tuple[AtLeastOne, ...] = option(
        (),
        "Height and width of the crops [NYU 416 544, KITTI 352 704, else the first image's, up to NYU's].",
    )
    depth_scale: AboveZero | None = option(
        None, "What whole numbers are divided by to be metres [NYU 1000, KITTI 256, else 1000]."
    )
    min_depth: float = option(0.001, "Least depth in metres.", ge=1e-6)
    max_depth: AboveZero | None = option(
        None, "Largest depth in metres [NYU 10, KITTI 80, else the largest in the train labels]."
    )
    learning_rates: Rates = option((1e-4,), "Rates, each with a head of its own; the best is reported.")
    iterations: AtLeastOne = option(38_400, "Steps of training.")

    @field_validator("crop_size")
    @classmethod
    def _is_height_and_width(cls, sides: tuple[int, ...]) -> tuple[int, ...]:
        if len(sides) not in (0, 2):
            raise ValueError(f"--crop-size {' '.join(map(str, sides))}: give height and width.")
        return sides
