"""Requests for pictures of what a model sees."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from dinov2cli.requests.base import Argument, AtLeastOne, Option, Request

DEFAULT_MODEL = "dinov2_vits14_reg"
Layout = Literal["pca", "side-by-side", "overlay"]
"""Names of `visualize.rendering.LAYOUTS`."""
Paths = Annotated[tuple[Path, ...], Field(min_length=1)]


Foreground = Annotated[
    str,
    Option(
        "Which patches get colour: split by the first component (auto), all (none), or those above a threshold from 0 "
        "to 1.",
        metavar="auto|none|THRESHOLD",
    ),
]
Upsampling = Annotated[Literal["nearest", "bicubic"], Option("From patches to pixels.")]
SaveBasis = Annotated[Path | None, Option("Keep the colours for other pictures.", metavar="FILE.npz")]
Basis = Annotated[Path | None, Option("Use colours kept by --save-basis.", metavar="FILE.npz")]
BatchSize = Annotated[AtLeastOne | None, Option("Pictures at a time. Default: what the memory holds.")]


class Pictures(Request):
    """What the commands that draw share: inputs, then the output."""

    paths: Annotated[Paths, Argument("Inputs, then the output.")]
    model: Annotated[
        str | None,
        Option(
            "Run folder, weights file, Hugging Face folder, URL or released name. "
            f"Default: {DEFAULT_MODEL}, downloaded once.",
            metavar="CKPT",
        ),
    ] = None
    resolution: Annotated[int, Field(ge=1, le=512), Option("Patches along the short side of the picture.")] = 32
    device: Annotated[str, Option("auto, cpu, cuda or cuda:N.", last=True)] = "auto"

    @property
    def inputs(self) -> tuple[Path, ...]:
        return self.paths[:-1]

    @property
    def output(self) -> Path:
        return self.paths[-1]

    @model_validator(mode="after")
    def _output_is_another(self) -> "Pictures":
        if len(self.paths) < 2:
            raise ValueError(f"{self.output}: this is the input; name the output after it")
        if self.output.resolve() in {path.resolve() for path in self.inputs}:
            raise ValueError(f"{self.output}: is an input too; the last path is the output and must be another one")
        return self


class PcaImage(Pictures, command="pca-image", run_by="dinov2cli.visualize.pca_image:run"):
    """Show photos as the model sees them: principal components of their patch features as colours.

    All photos share one set of colours: what the model takes for the same thing has the same colour in each. OUTPUT
    is a `.png` file (several photos make a sheet, one row each), or, without a suffix, a folder that gets a PNG file
    for each photo.

    Example:

        dino2 pca-image dog.jpg other-dog.jpg dogs.png --model RUN
    """

    paths: Annotated[
        Paths,
        Argument("Images, folders of images or SamplePhotos (built in), then the output.", metavar="INPUT... OUTPUT"),
    ]
    foreground: Foreground = "auto"
    layout: Annotated[Layout | None, Option("What a picture shows. Default: pca, and side-by-side on a sheet.")] = None
    upsampling: Upsampling = "bicubic"
    save_basis: SaveBasis = None
    basis: Basis = None
    batch_size: BatchSize = None


class PcaVideo(Pictures, command="pca-video", run_by="dinov2cli.visualize.pca_video:run"):
    """Show a video as the model sees it: principal components of its patch features as colours.

    INPUT is anything FFmpeg reads, or a folder of images. OUTPUT is a video (`.mp4`, `.mov`, `.mkv`; H.264), a
    `.gif`, or, without a suffix, a folder of PNG files. Several inputs share one set of colours, and OUTPUT is then
    a folder that gets one file for each.

    Colours are fitted once, to frames sampled over the whole length, so the same thing keeps its colour throughout;
    memory does not grow with the length. Frame times, orientation and sound are kept. OUTPUT appears when it is
    complete; Ctrl-C leaves none.

    Example:

        dino2 pca-video walk.mp4 walk-pca.mp4 --layout side-by-side
    """

    paths: Annotated[Paths, Argument("Videos or folders of images, then the output.", metavar="INPUT... OUTPUT")]
    foreground: Foreground = "auto"
    layout: Annotated[Layout, Option("What a frame shows.")] = "pca"
    upsampling: Upsampling = "bicubic"
    format: Annotated[
        Literal["mp4", "gif", "png"], Option("With several inputs: what to write for each into the folder OUTPUT.")
    ] = "mp4"
    save_basis: SaveBasis = None
    basis: Basis = None
    fit_frames: Annotated[AtLeastOne, Option("Frames, evenly over all inputs, that the colours are fitted to.")] = 64
    fps: Annotated[float | None, Field(ge=0.01), Option("Frames a second of a folder of images (default 10).")] = None
    audio: Annotated[bool, Option("Keep the sound (mp4, mov, mkv).")] = True
    steady: Annotated[bool, Option("Average out sensor noise where the picture stands still.")] = True
    batch_size: BatchSize = None


class Attention(Pictures, command="attention", run_by="dinov2cli.visualize.attention_maps:run"):
    """Show where the class token and each register look, as the mean over the heads and head by head.

    OUTPUT is a `.png` file, a sheet with one row for the class token and one for each register of each image:
    photo, mean, head 1, head 2, ... Without a suffix it is a folder that gets every map as a file of its own
    (`photo-cls-mean.png`, `photo-register1-head3.png`, ...).

    Example:

        dino2 attention dog.jpg dog-attention.png --model RUN
    """

    paths: Annotated[Paths, Argument("Images or folders of images, then the output.", metavar="INPUT... OUTPUT")]
    block: Annotated[int, Option("Index of the block; -1 is the last.")] = -1
    overlay: Annotated[bool, Option("Draw the maps over the photo.")] = False
