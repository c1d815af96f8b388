"""Options that the picture commands (pca-video, pca-image, attention) share."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dinov2cli.errors import DataError, WeightsError

if TYPE_CHECKING:
    from dinov2cli.models.vision_transformer import VisionTransformer

DEFAULT_MODEL = "dinov2_vits14_reg"


class Layout(StrEnum):
    """Names of `visualize.rendering.LAYOUTS`, known here without importing it."""

    PCA = "pca"
    SIDE_BY_SIDE = "side-by-side"
    OVERLAY = "overlay"


class Upsampling(StrEnum):
    """Names of `visualize.rendering.UPSAMPLING`."""

    NEAREST = "nearest"
    BICUBIC = "bicubic"


ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="CKPT",
        help="Run folder, weights file, Hugging Face folder, URL or released name. "
        f"Default: {DEFAULT_MODEL}, downloaded once.",
    ),
]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
ResolutionOption = Annotated[
    int, typer.Option("--resolution", min=1, max=512, help="Patches along the short side of the picture.")
]
ForegroundOption = Annotated[
    str,
    typer.Option(
        "--foreground",
        metavar="auto|none|THRESHOLD",
        help="Which patches get colour: split by the first component (auto), all (none), "
        "or those above a threshold from 0 to 1.",
    ),
]
UpsamplingOption = Annotated[Upsampling, typer.Option("--upsampling", help="From patches to pixels.")]
SaveBasisOption = Annotated[
    Path | None, typer.Option("--save-basis", metavar="FILE.npz", help="Keep the colours for other pictures.")
]
BasisOption = Annotated[
    Path | None, typer.Option("--basis", metavar="FILE.npz", help="Use colours kept by --save-basis.")
]
BatchSizeOption = Annotated[
    int | None, typer.Option("--batch-size", min=1, help="Pictures at a time. Default: what the memory holds.")
]


def split_inputs_and_output(paths: list[Path]) -> tuple[list[Path], Path]:
    """The last path is the output.

    Raises:
        DataError: a single path, or an output that is an input too.
    """
    if len(paths) < 2:
        raise DataError(f"{paths[0]}: this is the input; name the output after it")
    inputs, output = paths[:-1], paths[-1]
    if output.resolve() in {path.resolve() for path in inputs}:
        raise DataError(f"{output}: is an input too; the last path is the output and must be another one")
    return inputs, output


def load_picture_model(name: str | None, device: str) -> tuple["VisionTransformer", str]:
    """The model of --model in evaluation mode on --device, and the precision of the run that it comes from.

    Raises:
        EnvironmentProblem: a device that is not there.
        WeightsError: weights that cannot be had.
    """
    from dinov2cli.config import load_config
    from dinov2cli.device import choose_device
    from dinov2cli.models.sources import locate
    from dinov2cli.models.weights import load_model

    where = choose_device(device)
    try:
        model = load_model(name or DEFAULT_MODEL).to(where).eval()
    except WeightsError as error:
        if name is not None:
            raise
        raise WeightsError(
            f"the default model {DEFAULT_MODEL} cannot be had: {error.message}",
            "Give a model of your own with --model (a run folder, a weights file or a Hugging Face folder).",
        ) from error
    run = locate(name).run if name else None
    if run is None or not (run / "config.yaml").is_file():
        return model, "auto"
    return model, load_config(config_file=run / "config.yaml").compute_precision.precision
