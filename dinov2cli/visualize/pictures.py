"""What the picture commands share: images and models to read, pictures to write."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from dinov2cli.config import load_config
from dinov2cli.config.images import Images
from dinov2cli.console import Advance, interruption, logger
from dinov2cli.data.datasets.sample_photos import photo_files
from dinov2cli.data.decoding import Reading
from dinov2cli.data.spelling import inside
from dinov2cli.device import choose_device
from dinov2cli.errors import DataError, EnvironmentProblem, WeightsError
from dinov2cli.files import keep_others, writing
from dinov2cli.models.library_backbone import Backbone
from dinov2cli.models.load import load_model, locate
from dinov2cli.requests.pictures import (
    DEFAULT_MODEL,
    AttentionRequest,
    MapsRequest,
    PcaImageRequest,
    PcaVideoRequest,
)
from dinov2cli.visualize.features import FeatureMap, PatchFeatures, Picture, resize
from dinov2cli.visualize.video.reader import FrameSource
from dinov2cli.visualize.video.stills import list_images
from dinov2cli.visualize.video.writer import VideoWriter, open_writer, write_png


class Written(NamedTuple):
    """What a picture command has written: each path with what is in it, which may be nothing to say."""

    files: tuple[tuple[Path, str], ...]

    def __str__(self) -> str:
        return "\n".join(f"{path}: {what}" if what else str(path) for path, what in self.files)


def expand_inputs(inputs: Sequence[Path], output: Path) -> list[tuple[str, Path]]:
    """(name, file) of every image, those of folders in natural order; names are stems, made unique by a number.

    The output is not among them, where an earlier command has written it into one of the folders. The word
    `SamplePhotos` stands for two of the photos that scikit-image ships.

    Raises:
        DataError: a path that is not there, a folder without images.
        EnvironmentProblem: SamplePhotos without scikit-image.
    """
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            files += [file for file in list_images(path) if file.resolve() != output.resolve()]
        elif path.is_file() or inside(str(path)):
            files.append(path)
        elif str(path) == "SamplePhotos":
            files += photo_files("astronaut.png", "coffee.png")
        else:
            raise DataError(f"{path}: no such file or folder")
    if not files:
        raise DataError(f"{', '.join(map(str, inputs))}: no image but the output itself")
    named: dict[str, Path] = {}
    for file in files:
        name, number = file.stem, 2
        while name in named:
            name, number = f"{file.stem}-{number}", number + 1
        named[name] = file
    return list(named.items())


def check_picture_output(output: Path) -> None:
    """Raise before any work where `output` is neither a .png file nor a folder, or cannot be written."""
    if output.suffix and output.suffix.lower() != ".png":
        raise DataError(f"{output}: unknown output type {output.suffix!r}; give .png, or no suffix (a folder)")
    folder = output.parent if output.suffix else output
    trial = folder / ".dino2.partial"
    with writing(output):
        folder.mkdir(parents=True, exist_ok=True)
        trial.touch()
        trial.unlink()
    if output.suffix and output.is_dir():
        raise EnvironmentProblem(f"{output}: is a folder; give a file name")
    keep_others(output)


def save_picture(path: Path, picture: Picture) -> None:
    """Write a PNG file; EnvironmentProblem where that fails, or another's file is there."""
    keep_others(path)
    with writing(path):
        write_png(path, picture)


def check_takes_video(images: Images) -> None:
    """Raise DataError for a model of other channels than those of a video."""
    if not images.are_rgb:
        raise DataError(
            f"a video has red, green and blue, and this model takes {len(images.channels) or images.in_chans} channels "
            f"({', '.join(images.channels) or 'no colours'}): it cannot be shown one",
            "Images with its channels can be drawn: see dino2 pca-image, attention, depth, segment.",
        )


def draw_video(
    extractor: PatchFeatures,
    source: FrameSource,
    output: Path,
    draw: Callable[[Picture, Picture, FeatureMap], Picture],
    *,
    audio: bool = True,
    advance: Advance = lambda _: None,
) -> int:
    """Draw every frame of a source and return how many there were. The output appears complete or not at all.

    Args:
        draw: of a frame, the same with square pixels where the output has no others, and its map, what is written.
        audio: keep the sound of a video.
        advance: called as frames are finished.

    Raises:
        DataError: an unknown output type.
        EnvironmentProblem: an output that cannot be written.
    """
    with ExitStack() as stack:
        interrupted = stack.enter_context(interruption("stopping; no output is kept"))
        writer = stack.enter_context(
            open_writer(output, time_base=source.time_base, rate=source.rate, pixel_aspect=source.pixel_aspect)
        )
        if audio and isinstance(writer, VideoWriter) and source.path.is_file():
            writer.add_audio(source.path, source.start)
        height, width = source.size
        if writer.square_pixels:
            width = round(width * source.pixel_aspect)
        pictures = ((frame, frame.image) for frame in source.frames())
        for frame, features in extractor.maps(pictures, source.pixel_aspect):
            if interrupted:
                raise KeyboardInterrupt
            image = draw(frame.image, resize(frame.image, (height, width)), features)
            writer.write(image, frame.time, frame.duration)
            advance(1)
    logger.info("%s: %d frames", output, writer.frames_written)
    return writer.frames_written


def load_picture_model(
    request: PcaImageRequest | PcaVideoRequest | AttentionRequest | MapsRequest, default: str = DEFAULT_MODEL
) -> tuple[Backbone, str, Reading]:
    """The model of --model, or else the default, in evaluation mode on --device, the precision of the run that it comes
    from, and how images are read: as in that run where no option says otherwise.

    Raises:
        EnvironmentProblem: a device that is not there.
        WeightsError: weights that cannot be had.
    """
    where, name = choose_device(request.device), request.model
    try:
        source = locate(name or default)
        model = load_model(source).to(where).eval()
    except WeightsError as error:
        if name is not None:
            raise
        raise WeightsError(
            f"the default model {default} cannot be had: {error.message}",
            "Give a model of your own with --model (a run folder, a weights file or a Hugging Face folder).",
        ) from error
    file = source.run / "config.yaml" if source.run else None
    config = load_config(config_file=file) if file is not None and file.is_file() else None
    return model, config.compute_precision.precision if config else "auto", Reading.of(model.images, config, request)
