"""`dino2 pca-video`: the principal components of patch features as colours, for whole videos."""

from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from dinov2cli.cli.picture_options import (
    BasisOption,
    BatchSizeOption,
    DeviceOption,
    ForegroundOption,
    Layout,
    ModelOption,
    ResolutionOption,
    SaveBasisOption,
    Upsampling,
    UpsamplingOption,
    load_picture_model,
    split_inputs_and_output,
)
from dinov2cli.errors import DataError


class Format(StrEnum):
    """What each of several outputs is."""

    MP4 = "mp4"
    GIF = "gif"
    PNG = "png"


def pca_video(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="INPUT... OUTPUT", help="Videos or folders of images, then the output."),
    ],
    model: ModelOption = None,
    resolution: ResolutionOption = 32,
    foreground: ForegroundOption = "auto",
    layout: Annotated[Layout, typer.Option("--layout", help="What a frame shows.")] = Layout.PCA,
    upsampling: UpsamplingOption = Upsampling.BICUBIC,
    output_format: Annotated[
        Format, typer.Option("--format", help="With several inputs: what to write for each into the folder OUTPUT.")
    ] = Format.MP4,
    save_basis: SaveBasisOption = None,
    basis: BasisOption = None,
    fit_frames: Annotated[
        int, typer.Option("--fit-frames", min=1, help="Frames, evenly over all inputs, that the colours are fitted to.")
    ] = 64,
    fps: Annotated[
        float | None, typer.Option("--fps", min=0.01, help="Frames a second of a folder of images (default 10).")
    ] = None,
    audio: Annotated[bool, typer.Option("--audio/--no-audio", help="Keep the sound (mp4, mov, mkv).")] = True,
    steady: Annotated[
        bool, typer.Option("--steady/--no-steady", help="Average out sensor noise where the picture stands still.")
    ] = True,
    batch_size: BatchSizeOption = None,
    device: DeviceOption = "auto",
) -> None:
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
    from dinov2cli.console import out, progress
    from dinov2cli.visualize.basis import ColorBasis, parse_foreground
    from dinov2cli.visualize.features import PatchFeatures
    from dinov2cli.visualize.pca_video import VideoStyle, check_basis, fit_video_basis, render_video
    from dinov2cli.visualize.video.reader import open_source, sampling_step
    from dinov2cli.visualize.video.writer import check_output

    wanted_foreground = parse_foreground(foreground)
    inputs, output = split_inputs_and_output(paths)
    outputs = _outputs(inputs, output, output_format)
    sources = [open_source(path, fps if path.is_dir() or len(inputs) == 1 else None) for path in inputs]
    for path in outputs:
        check_output(path)
    colors = ColorBasis.load(basis) if basis else None
    loaded, precision = load_picture_model(model, device)
    extractor = PatchFeatures(loaded, resolution, batch_size, precision)
    if colors:
        check_basis(colors, extractor)

    counts = [source.count() for source in sources]
    with progress() as display:
        if colors is None:
            sampled = sum(-(-count // sampling_step(sum(counts), fit_frames)) for count in counts)
            task = display.add_task("fitting colours", total=sampled)
            colors = fit_video_basis(
                extractor,
                sources,
                foreground=wanted_foreground,
                fit_frames=fit_frames,
                advance=partial(display.advance, task),
            )
        if save_basis:
            colors.save(save_basis)
        style = VideoStyle(layout=layout.value, upsampling=upsampling.value, audio=audio, steady=steady)
        written = []
        for source, path, count in zip(sources, outputs, counts, strict=True):
            task = display.add_task(f"rendering {path.name}", total=count)
            written.append(render_video(extractor, colors, source, path, style, advance=partial(display.advance, task)))
    for path, frames in zip(outputs, written, strict=True):
        out.print(f"{path}: {frames} frames", markup=False, highlight=False, soft_wrap=True)


def _outputs(inputs: list[Path], output: Path, output_format: Format) -> list[Path]:
    if len(inputs) == 1:
        return [output]
    if output.suffix:
        raise DataError(f"{output}: with several inputs the output is a folder, named without a suffix")
    suffix = "" if output_format is Format.PNG else f".{output_format.value}"
    outputs = [output / f"{path.resolve().stem}{suffix}" for path in inputs]
    for path in outputs:
        if outputs.count(path) > 1:
            raise DataError(f"{path}: two inputs would write it; rename one of them")
    return outputs
