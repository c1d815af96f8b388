"""`dino2 depth` and `dino2 segment`: what a head makes of pictures, photo by photo or frame by frame.

First pass: maps of all photos, or of frames sampled evenly over a video, tell what the colours must show. Second pass:
every picture is drawn. Neither holds more than a batch, but for the pictures of a sheet.
"""

from collections.abc import Callable
from contextlib import ExitStack, closing
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np

from dinov2cli.console import counted, progress
from dinov2cli.data.datasets.listing import image_extensions
from dinov2cli.data.decoding import Reading, read_image
from dinov2cli.data.spelling import inside
from dinov2cli.errors import DataError, WeightsError
from dinov2cli.files import write_bytes, writing
from dinov2cli.models.dense_heads import DenseModel
from dinov2cli.models.load.dense import check_head, read_head, warn_of_another
from dinov2cli.requests.pictures import DEFAULT_DEPTH_HEAD, DepthMapsRequest, MapsRequest, SegmentRequest
from dinov2cli.visualize.drawing import ClassDrawing, DepthDrawing, Drawing, draw, encoded, with_legend
from dinov2cli.visualize.features import DenseMaps, FeatureMap, FeatureSpool, Picture
from dinov2cli.visualize.pictures import (
    Written,
    check_picture_output,
    check_takes_video,
    draw_video,
    expand_inputs,
    load_picture_model,
    save_picture,
)
from dinov2cli.visualize.rendering import places_shown, sheet, shown
from dinov2cli.visualize.temporal_filter import TemporalFilter
from dinov2cli.visualize.video.reader import check_source, open_source, sampling_step
from dinov2cli.visualize.video.writer import VIDEO_FORMATS, FolderWriter, check_output

FRAMES_LOOKED_AT = 64
"""Of a video, evenly over its length, before it is drawn."""
USUAL_PATCHES = 32
"""Along the short side, where neither the head nor an option says more."""


def run_depth(request: DepthMapsRequest) -> Written:
    """Draw what `dino2 depth` asks for; errors as of `run_segment`."""
    return _run(request, lambda dense: DepthDrawing(dense.head, request.near, request.far, request.colormap))


def run_segment(request: SegmentRequest) -> Written:
    """Draw what `dino2 segment` asks for.

    Raises:
        DataError: inputs or an output that cannot be used.
        EnvironmentProblem: a device that is not there, an output that cannot be written.
        WeightsError: a head or a model that cannot be had, or that do not fit each other.
    """
    return _run(request, lambda dense: ClassDrawing(dense.head, request.opacity))


def _run(request: DepthMapsRequest | SegmentRequest, drawing_of: Callable[[DenseModel], Drawing]) -> Written:
    check_head(request.head, "--head")
    as_video = _is_video(request)
    if as_video:
        check_source(request.inputs[0], request.fps)
        check_output(request.output)
    else:
        expand_inputs(request.inputs, request.output)
        check_picture_output(request.output)
    dense, precision, reading = _load(request)
    side = request.resolution and request.resolution * dense.backbone.patch_size
    side = side or dense.head.config.short_side or USUAL_PATCHES * dense.backbone.patch_size
    slides = isinstance(request, SegmentRequest) and request.inference == "slide"
    window = (dense.head.config.window or dense.head.config.short_side or side) if slides else None
    extractor = DenseMaps(dense, side, request.batch_size, precision, window)
    drawing = drawing_of(dense)
    return (_draw_video if as_video else _draw_photos)(request, extractor, drawing, reading)


def _is_video(request: MapsRequest) -> bool:
    """Whether a video is drawn; else photos.

    Raises:
        DataError: inputs, output and options that do not go together.
    """
    inputs, output = request.inputs, request.output
    to_video = output.suffix.lower() in (*VIDEO_FORMATS, ".gif")
    known = image_extensions()
    moving = [path for path in inputs if path.is_file() and path.suffix.lower() not in known and not inside(str(path))]
    if not to_video and not moving:
        if request.fps is not None:
            raise DataError(f"--fps is for a video, and {output} is none; name it .mp4, .mov, .mkv or .gif")
        return False
    if len(inputs) > 1:
        raise DataError(f"{(moving or inputs)[0]}: a video is drawn by itself; give one input")
    if output.suffix and not to_video:
        raise DataError(
            f"{output}: {moving[0]} is no image, and of a video comes a video; give .mp4, .mov, .mkv, .gif, or no "
            "suffix (a folder)"
        )
    if request.show_channels is not None:
        raise DataError(f"--show-channels {request.show_channels}: a video has red, green and blue")
    return True


def _load(request: DepthMapsRequest | SegmentRequest) -> tuple[DenseModel, str, Reading]:
    """The model with its head on the device, its run's precision, and how images are read."""
    try:
        head = read_head(request.head)
    except WeightsError as error:
        if request.head != DEFAULT_DEPTH_HEAD:
            raise
        raise WeightsError(
            f"the default head {DEFAULT_DEPTH_HEAD} cannot be had: {error.message}",
            "Give a head of your own with --head, as dino2 eval depth writes it.",
        ) from error
    task, other = ("depth", "segment") if isinstance(request, DepthMapsRequest) else ("segmentation", "depth")
    if head.config.task != task:
        raise WeightsError(f"--head {request.head}: is a head for {head.config.task}: dino2 {other} draws it")
    if request.model is None and not head.config.backbone:
        raise WeightsError(
            f"--head {request.head}: does not say which model it was trained on", "Give that with --model."
        )
    model, precision, reading = load_picture_model(request, head.config.backbone)
    warn_of_another(head.config, model)
    return DenseModel(model, head.to(next(model.parameters()).device)).eval(), precision, reading


def _draw_photos(request: MapsRequest, extractor: DenseMaps, drawing: Drawing, reading: Reading) -> Written:
    output, images = request.output, extractor.model.images
    photos = expand_inputs(request.inputs, output)
    places_shown(images, request.show_channels)
    one_sheet = bool(output.suffix) and len(photos) > 1
    layout = request.layout or ("side-by-side" if one_sheet else drawing.usual_layout)
    values_at = {name: _values_file(request, name, one_sheet, drawing) for name, _ in photos}
    _check_values(request, drawing, [path.resolve() for _, path in photos], list(values_at.values()))
    rows: list[Picture] = []
    with closing(FeatureSpool()) as spool, progress() as display:
        task = display.add_task(f"computing {drawing.name}", total=len(photos))
        for _, low in extractor.maps((None, read_image(path, reading)) for _, path in photos):
            drawing.observe(low)
            spool.append(low)
            display.advance(task)
        drawing.settle()
        for (name, path), low in zip(photos, spool(), strict=True):
            photo = shown(read_image(path, reading), images, request.show_channels)
            values = drawing.values(low, (photo.shape[0], photo.shape[1]))
            picture = draw(drawing, photo, values, layout)
            if one_sheet:
                rows.append(picture)
            else:
                picture = with_legend(drawing, picture, values) if request.legend else picture
                save_picture(output if output.suffix else output / f"{name}.png", picture)
            if request.save_values:
                with writing(values_at[name]):
                    write_bytes(values_at[name], encoded(drawing, values, request.save_values))
    if rows:
        whole = sheet([[row] for row in rows])
        save_picture(output, with_legend(drawing, whole) if request.legend else whole)
    return _written(request, drawing, counted(len(photos), "photo"), list(values_at.values()))


def _draw_video(request: MapsRequest, extractor: DenseMaps, drawing: Drawing, reading: Reading) -> Written:
    check_takes_video(extractor.model.images)
    source, output = open_source(request.inputs[0], request.fps, reading), request.output
    folder = output.with_name(f"{output.stem}.{drawing.name}")
    _check_values(request, drawing, [source.path.resolve()], [folder])
    count = source.count()
    step = sampling_step(count, FRAMES_LOOKED_AT)
    kind, layout = request.save_values, request.layout or drawing.usual_layout
    with ExitStack() as stack:
        display = stack.enter_context(progress())
        task = display.add_task(f"looking for {drawing.name}", total=-(-count // step))
        for _, low in extractor.maps(((None, frame.image) for frame in source.frames(step)), source.pixel_aspect):
            drawing.observe(low)
            display.advance(task)
        drawing.settle()
        still = TemporalFilter(extractor.grid(source.size, source.pixel_aspect)) if request.steady else None
        beside = stack.enter_context(FolderWriter(folder, f".{kind}", write_bytes)) if kind else None

        def drawn(frame: Picture, drawn_on: Picture, low: FeatureMap) -> Picture:
            low = still(frame, low).astype(np.float32) if still else low
            values = drawing.values(low, (drawn_on.shape[0], drawn_on.shape[1]))
            if beside and kind:
                beside.write(encoded(drawing, values, kind), Fraction(0), Fraction(0))
            picture = draw(drawing, drawn_on, values, layout)
            return with_legend(drawing, picture) if request.legend else picture

        task = display.add_task(f"rendering {output.name}", total=count)
        advance = partial(display.advance, task)
        frames = draw_video(extractor, source, output, drawn, audio=request.audio, advance=advance)
    return _written(request, drawing, counted(frames, "frame"), [folder])


def _values_file(request: MapsRequest, name: str, one_sheet: bool, drawing: Drawing) -> Path:
    """Where the values of a photo are written."""
    output, ending = request.output, f".{drawing.name}.{request.save_values}"
    if not output.suffix:
        return output / (name + ending)
    return output.with_name(f"{output.stem}-{name}{ending}" if one_sheet else output.stem + ending)


def _check_values(request: MapsRequest, drawing: Drawing, inputs: list[Path], places: list[Path]) -> None:
    """Raise DataError before any work where values would be written over an input, or cannot be in such a file."""
    if request.save_values is None:
        return
    drawing.check_values(request.save_values)
    if over := [place for place in places if place.resolve() in inputs]:
        raise DataError(f"{over[0]}: is an input, and --save-values would write it; name the output otherwise")


def _written(request: MapsRequest, drawing: Drawing, what: str, places: list[Path]) -> Written:
    files = [(request.output, f"{what}, {drawing.note()}")]
    if request.save_values:
        scale = drawing.about_values(request.save_values)
        files += [(place, scale) for place in places[:1]]
        files += [(places[-1], f"the last of {len(places)}, {scale}")] if len(places) > 1 else []
    return Written(tuple(files))
