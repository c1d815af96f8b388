"""Image files that the picture commands read and write."""

from pathlib import Path
from typing import TYPE_CHECKING

from dinov2cli.errors import DataError, EnvironmentProblem

if TYPE_CHECKING:
    from dinov2cli.visualize.features import Picture


def expand_inputs(inputs: list[Path]) -> list[tuple[str, Path]]:
    """(name, file) of every image, those of folders in natural order; names are stems, made unique by a number.

    The word `SamplePhotos` stands for two of the photos that scikit-image ships.

    Raises:
        DataError: a path that is not there, a folder without images.
        EnvironmentProblem: SamplePhotos without scikit-image.
    """
    from dinov2cli.data.datasets.sample_photos import photo_files
    from dinov2cli.visualize.video.reader import list_images

    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            files += list_images(path)
        elif path.is_file():
            files.append(path)
        elif str(path) == "SamplePhotos":
            files += photo_files("chelsea.png", "coffee.png")
        else:
            raise DataError(f"{path}: no such file or folder")
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
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise EnvironmentProblem(f"{output}: cannot be written ({error.strerror or error})") from error
    if output.suffix and output.is_dir():
        raise EnvironmentProblem(f"{output}: is a folder; give a file name")


def save_picture(path: Path, picture: "Picture") -> None:
    """Write a PNG file; EnvironmentProblem where that fails."""
    from dinov2cli.files import writing
    from dinov2cli.visualize.video.writer import write_png

    with writing(path):
        write_png(path, picture)
