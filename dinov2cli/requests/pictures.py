"""Requests for pictures of what a model sees."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import model_validator

from dinov2cli.requests.base import AtLeastOne, DeviceRequest, Paths, argument, option
from dinov2cli.requests.images import ImagesRequest

DEFAULT_MODEL = "dinov2_vits14_reg"
DEFAULT_DEPTH_HEAD = "dinov2_vits14_dd"
INPUTS = "INPUT... OUTPUT"
Layout = Literal["pca", "side-by-side", "overlay"]
"""Names of `visualize.rendering.LAYOUTS`."""
SHOW_CHANNELS: Any = option(
    None,
    "Of a model of other channels: those that are drawn as red, green and blue, by number or name, each stretched "
    "from its darkest to its brightest. Default: the first ones.",
    metavar="R,G,B",
)


class PicturesRequest(ImagesRequest, DeviceRequest):
    """What the commands that draw share: inputs, then the output."""

    paths: Paths = argument("Images or folders of images, then the output.", metavar=INPUTS)
    model: str | None = option(
        None,
        "Run folder, weights file, Hugging Face folder, URL or released name. "
        f"Default: {DEFAULT_MODEL}, downloaded once.",
        metavar="CKPT",
    )
    resolution: int = option(32, "Patches along the short side of the picture.", ge=1, le=512)

    @property
    def inputs(self) -> tuple[Path, ...]:
        return self.paths[:-1]

    @property
    def output(self) -> Path:
        return self.paths[-1]

    @model_validator(mode="after")
    def _output_is_another(self) -> Self:
        if len(self.paths) < 2:
            raise ValueError(f"{self.output}: this is the input; name the output after it")
        if (basis := getattr(self, "save_basis", None)) is not None and basis.suffix.lower() != ".npz":
            raise ValueError(f"--save-basis {basis}: the colours are kept in a .npz file; give such a name")
        if self.output.resolve() in {path.resolve() for path in self.inputs}:
            raise ValueError(f"{self.output}: is an input too; the last path is the output and must be another one")
        return self


class PcaRequest(PicturesRequest):
    """What `pca-image` and `pca-video` share."""

    foreground: str = option(
        "auto",
        "Which patches get colour: split by the first component (auto), all (none), or those above a threshold from 0 "
        "to 1.",
        metavar="auto|none|THRESHOLD",
    )
    layout: Layout | None = option(None, "What a picture shows. Default: pca, and side-by-side on a sheet.")
    upsampling: Literal["nearest", "bicubic"] = option("bicubic", "From patches to pixels.")
    batch_size: AtLeastOne | None = option(None, "Pictures at a time. Default: what the memory holds.", last=True)
    device: str = option("auto", "auto, cpu, cuda or cuda:N.", last=True)


class PcaImageRequest(PcaRequest, command="pca-image", run_by="dinov2cli.visualize.pca_pictures:run_image"):
    """Show photos as the model sees them: principal components of their patch features as colours.

    All photos share one set of colours: what the model takes for the same thing has the same colour in each. OUTPUT
    is a `.png` file (several photos make a sheet, one row each), or, without a suffix, a folder that gets a PNG file
    for each photo.

    Example:

        dino2 pca-image dog.jpg other-dog.jpg dogs.png --model RUN

        dino2 pca-image cells/*.tif cells.png --model RUN --layout side-by-side --show-channels 0,3,1
    """

    paths: Paths = argument("Images, folders of images or SamplePhotos (built in), then the output.", metavar=INPUTS)
    show_channels: str | None = SHOW_CHANNELS
    save_basis: Path | None = option(None, "Keep the colours for other pictures.", metavar="FILE.npz")
    basis: Path | None = option(None, "Use colours kept by --save-basis.", metavar="FILE.npz")


class PcaVideoRequest(PcaRequest, command="pca-video", run_by="dinov2cli.visualize.pca_pictures:run_video"):
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

    paths: Paths = argument("Videos or folders of images, then the output.", metavar=INPUTS)
    layout: Layout = option("pca", "What a frame shows.")
    format: Literal["mp4", "gif", "png"] = option(
        "mp4", "With several inputs: what to write for each into the folder OUTPUT."
    )
    save_basis: Path | None = option(None, "Keep the colours for other pictures.", metavar="FILE.npz")
    basis: Path | None = option(None, "Use colours kept by --save-basis.", metavar="FILE.npz")
    fit_frames: AtLeastOne = option(64, "Frames, evenly over all inputs, that the colours are fitted to.")
    fps: float | None = option(None, "Frames a second of a folder of images (default 10).", ge=0.01)
    audio: bool = option(True, "Keep the sound (mp4, mov, mkv).")
    steady: bool = option(True, "Average out sensor noise where the picture stands still.")


class MapsRequest(PicturesRequest):
    """What `depth` and `segment` share."""

    paths: Paths = argument("Images, folders of images, or a video; then the output.", metavar=INPUTS)
    model: str | None = option(
        None,
        "Run folder, weights file, Hugging Face folder, URL or released name. Default: what the head was trained on.",
        metavar="CKPT",
    )
    resolution: int | None = option(  # type: ignore[assignment]
        None, "Patches along the short side of the picture. Default: as the head was tested, or 32.", ge=1, le=512
    )
    layout: Literal["colors", "side-by-side", "overlay"] | None = option(
        None, "What a picture shows. Default: colors of one, overlay of classes, and side-by-side on a sheet."
    )
    legend: bool = option(True, "Say below the picture what the colours mean.")
    save_values: Literal["png", "npy"] | None = option(
        None, "Also write the values themselves, beside the picture or, of a video, into a folder of frames."
    )
    show_channels: str | None = SHOW_CHANNELS
    fps: float | None = option(
        None, "Frames a second of a folder of images that becomes a video (default 10).", ge=0.01
    )
    audio: bool = option(True, "Keep the sound of a video (mp4, mov, mkv).")
    steady: bool = option(True, "Of a video, average out sensor noise where the picture stands still.")
    batch_size: AtLeastOne | None = option(None, "Pictures at a time. Default: what the memory holds.", last=True)
    device: str = option("auto", "auto, cpu, cuda or cuda:N.", last=True)


class DepthMapsRequest(MapsRequest, command="depth", run_by="dinov2cli.visualize.maps:run_depth"):
    """Measure how far things are: the depth of each pixel in metres, bright near by and dark far away.

    INPUT is images, folders of images or one video (anything FFmpeg reads). OUTPUT is a `.png` file (several images
    make a sheet, one row each), a video (`.mp4`, `.mov`, `.mkv`, `.gif`; a folder of images becomes one, too), or,
    without a suffix, a folder that gets a PNG file for each image or frame. All of them share one scale of colours.

    Released heads know rooms up to 10 m (`..._nyu_...`) or streets up to 80 m (`..._kitti_...`); `linear` reads the
    last block of the model, `linear4` and `dpt` four.

    Example:

        dino2 depth room.jpg room-depth.png

        dino2 depth drive.mp4 drive-depth.mp4 --head dinov2_vits14_kitti_dpt --layout side-by-side

        dino2 depth room.jpg room-depth.png --model RUN --head HEAD.pth --save-values npy
    """

    head: str = option(
        DEFAULT_DEPTH_HEAD,
        "File or URL of a head that `dino2 eval depth` or others have trained, or the name of a released one, which is "
        "downloaded once.",
    )
    near: float | None = option(
        None, "Metres that are brightest. Default: those of the nearest percent of all pixels.", ge=0
    )
    far: float | None = option(
        None, "Metres that are darkest. Default: those of the farthest percent of all pixels.", ge=0
    )
    colormap: Literal["inferno", "magma", "plasma", "viridis", "cividis"] = option(
        "inferno", "Scale of colours, by matplotlib's name."
    )

    @model_validator(mode="after")
    def _near_is_nearer(self) -> Self:
        if self.near is not None and self.far is not None and self.near >= self.far:
            raise ValueError(f"--near {self.near:g} must be less than --far {self.far:g}")
        return self


class SegmentRequest(MapsRequest, command="segment", run_by="dinov2cli.visualize.maps:run_segment"):
    """Show what is where: the class of each pixel, in colours over the picture.

    INPUT is images, folders of images or one video (anything FFmpeg reads). OUTPUT is a `.png` file (several images
    make a sheet, one row each), a video (`.mp4`, `.mov`, `.mkv`, `.gif`; a folder of images becomes one, too), or,
    without a suffix, a folder that gets a PNG file for each image or frame.

    Example:

        dino2 segment street.jpg street-classes.png --head dinov2_vits14_voc2012_ms

        dino2 segment walk.mp4 walk-classes.mp4 --model RUN --head HEAD.pth
    """

    head: str = option(
        ...,
        "File or URL of a head that `dino2 eval segmentation` or others have trained, or the name of a released one, "
        "which is downloaded once: dinov2_vit{s,b,l,g}14_{ade20k,voc2012}_{linear,ms}.",
    )
    opacity: float = option(0.6, "Of the colours in an overlay.", ge=0, le=1)
    inference: Literal["whole", "slide"] = option(
        "whole",
        "How the network sees a picture: whole, or by windows that overlap, as large as the crops that the head was "
        "trained on (slide): for pictures that are long, or of more patches by --resolution.",
    )


class AttentionRequest(PicturesRequest, command="attention", run_by="dinov2cli.visualize.attention_maps:run"):
    """Show where the class token and each register look, as the mean over the heads and head by head.

    OUTPUT is a `.png` file, a sheet with one row for the class token and one for each register of each image:
    photo, mean, head 1, head 2, ... Without a suffix it is a folder that gets every map as a file of its own
    (`photo-cls-mean.png`, `photo-register1-head3.png`, ...).

    Example:

        dino2 attention dog.jpg dog-attention.png --model RUN
    """

    block: int = option(-1, "Index of the block; -1 is the last.")
    show_channels: str | None = SHOW_CHANNELS
    overlay: bool = option(False, "Draw the maps over the photo.")
    device: str = option("auto", "auto, cpu, cuda or cuda:N.")
