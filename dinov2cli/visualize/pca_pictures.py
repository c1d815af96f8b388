"""`dino2 pca-image` and `dino2 pca-video`: patch features in the colours of one fixed basis, in constant memory.

First pass: features of all photos, or of frames sampled evenly over all videos, fit the basis. Second pass: every
picture is rendered.
"""

from collections.abc import Iterable, Iterator
from contextlib import closing
from fractions import Fraction
from functools import partial
from pathlib import Path

from dinov2cli.console import Advance, counted, progress
from dinov2cli.data.decoding import Reading, read_image
from dinov2cli.errors import DataError
from dinov2cli.requests.pictures import PcaImageRequest, PcaVideoRequest
from dinov2cli.visualize.basis import ColorBasis, check_basis, fit_color_basis, parse_foreground
from dinov2cli.visualize.features import FeatureMap, FeatureSpool, PatchFeatures, Picture
from dinov2cli.visualize.pictures import (
    Written,
    check_picture_output,
    check_takes_video,
    draw_video,
    expand_inputs,
    load_picture_model,
    save_picture,
)
from dinov2cli.visualize.rendering import places_shown, render, sheet, shown
from dinov2cli.visualize.temporal_filter import TemporalFilter
from dinov2cli.visualize.video.reader import FrameSource, check_source, open_source, sampling_step
from dinov2cli.visualize.video.writer import check_output


def run_image(request: PcaImageRequest) -> Written:
    """Draw what `dino2 pca-image` asks for.

    Raises:
        DataError: inputs, colours or an output that cannot be used.
        EnvironmentProblem: a device that is not there, an output that cannot be written.
        WeightsError: weights that cannot be had.
    """
    foreground, output = parse_foreground(request.foreground), request.output
    photos = expand_inputs(request.inputs, output)
    check_picture_output(output)
    extractor, basis, reading = _extractor_and_basis(request)
    places_shown(extractor.model.images, request.show_channels)
    if basis is None:
        images = (read_image(path, reading) for _, path in photos)
        basis = fit_basis(extractor, [(images, Fraction(1))], foreground)
    if request.save_basis:
        basis.save(request.save_basis)
    one_sheet = bool(output.suffix) and len(photos) > 1
    layout = request.layout or ("side-by-side" if one_sheet else "pca")
    images = (read_image(path, reading) for _, path in photos)
    drawn = render_images(
        extractor, basis, images, layout=layout, upsampling=request.upsampling, channels=request.show_channels
    )
    if one_sheet:
        save_picture(output, sheet([[picture] for picture in drawn]))
    elif output.suffix:
        save_picture(output, next(drawn))
    else:
        for (name, _), picture in zip(photos, drawn, strict=True):
            save_picture(output / f"{name}.png", picture)
    return Written(((output, counted(len(photos), "photo")),))


def run_video(request: PcaVideoRequest) -> Written:
    """Render what `dino2 pca-video` asks for; errors as of `run_image`."""
    foreground, outputs = parse_foreground(request.foreground), _outputs(request)
    one = len(request.inputs) == 1
    for path in request.inputs:
        check_source(path, request.fps if one else None)
    for path in outputs:
        check_output(path)
    extractor, basis, reading = _extractor_and_basis(request)
    check_takes_video(extractor.model.images)
    sources = [open_source(path, request.fps, reading) for path in request.inputs]
    counts = [source.count() for source in sources]
    with progress() as display:
        if basis is None:
            step = sampling_step(sum(counts), request.fit_frames)
            task = display.add_task("fitting colours", total=sum(-(-n // step) for n in counts))
            sampled = (((frame.image for frame in each.frames(step)), each.pixel_aspect) for each in sources)
            basis = fit_basis(extractor, sampled, foreground, advance=partial(display.advance, task))
        if request.save_basis:
            basis.save(request.save_basis)
        style = request.model_dump(include={"layout", "upsampling", "audio", "steady"})
        written = []
        for source, path, count in zip(sources, outputs, counts, strict=True):
            task = display.add_task(f"rendering {path.name}", total=count)
            frames = render_video(extractor, basis, source, path, **style, advance=partial(display.advance, task))
            written.append((path, counted(frames, "frame")))
    return Written(tuple(written))


def _extractor_and_basis(
    request: PcaImageRequest | PcaVideoRequest,
) -> tuple[PatchFeatures, ColorBasis | None, Reading]:
    """What computes the features, the colours of --basis, and how images are read."""
    basis = ColorBasis.load(request.basis) if request.basis else None
    model, precision, reading = load_picture_model(request)
    if basis:
        check_basis(basis, model.embed_dim)
    return PatchFeatures(model, request.resolution, request.batch_size, precision), basis, reading


def _outputs(request: PcaVideoRequest) -> list[Path]:
    inputs, output = request.inputs, request.output
    if len(inputs) == 1:
        return [output]
    if output.suffix:
        raise DataError(f"{output}: with several inputs the output is a folder, named without a suffix")
    suffix = "" if request.format == "png" else f".{request.format}"
    outputs = [output / f"{path.resolve().stem}{suffix}" for path in inputs]
    for path in outputs:
        if outputs.count(path) > 1:
            raise DataError(f"{path}: two inputs would write it; rename one of them")
    return outputs


def fit_basis(
    extractor: PatchFeatures,
    series: Iterable[tuple[Iterable[Picture], Fraction]],
    foreground: str | float = "auto",
    *,
    advance: Advance = lambda _: None,
) -> ColorBasis:
    """One basis for all pictures, which are read one after the other.

    Args:
        series: of pictures, each with the width over the height of its pixels.
        foreground: as in `fit_color_basis`.
        advance: called as pictures are done.

    Raises:
        DataError: no picture; a foreground without a patch.
    """
    with closing(FeatureSpool()) as spool:
        for pictures, pixel_aspect in series:
            for _, features in extractor.maps(((None, picture) for picture in pictures), pixel_aspect):
                spool.append(features)
                advance(1)
        return fit_color_basis(spool, foreground)


def render_images(
    extractor: PatchFeatures,
    basis: ColorBasis,
    photos: Iterable[Picture],
    *,
    layout: str,
    upsampling: str,
    channels: str | None = None,
) -> Iterator[Picture]:
    """PCA pictures in the order of the photos, one after the other; `channels` as in `places_shown`."""
    images = extractor.model.images
    for picture, features in extractor.maps((shown(photo, images, channels), photo) for photo in photos):
        yield render(picture, features, basis, layout=layout, upsampling=upsampling)


def render_video(
    extractor: PatchFeatures,
    basis: ColorBasis,
    source: FrameSource,
    output: Path,
    *,
    layout: str = "pca",
    upsampling: str = "bicubic",
    audio: bool = True,
    steady: bool = True,
    advance: Advance = lambda _: None,
) -> int:
    """Render every frame of a source and return how many there were. The output appears complete or not at all.

    Args:
        layout, upsampling: as in `rendering.render`.
        audio: keep the sound of a video.
        steady: average sensor noise where the picture stands still, see `TemporalFilter`.

    Raises:
        DataError: a basis for features of another dimension; an unknown output type.
        EnvironmentProblem: an output that cannot be written.
    """
    check_basis(basis, extractor.model.embed_dim)
    still = TemporalFilter() if steady else None

    def draw(frame: Picture, drawn_on: Picture, features: FeatureMap) -> Picture:
        smoothing = partial(still, frame) if still else None
        return render(drawn_on, features, basis, layout=layout, upsampling=upsampling, smoothing=smoothing)

    return draw_video(extractor, source, output, draw, audio=audio, advance=advance)
