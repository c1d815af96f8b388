"""`dino2 pca-image`: the principal components of patch features as colours, for photos."""

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


def pca_image(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="INPUT... OUTPUT", help="Images, folders of images or SamplePhotos (built in), then the output."
        ),
    ],
    model: ModelOption = None,
    resolution: ResolutionOption = 32,
    foreground: ForegroundOption = "auto",
    layout: Annotated[
        Layout | None,
        typer.Option("--layout", help="What a picture shows. Default: pca, and side-by-side on a sheet."),
    ] = None,
    upsampling: UpsamplingOption = Upsampling.BICUBIC,
    save_basis: SaveBasisOption = None,
    basis: BasisOption = None,
    batch_size: BatchSizeOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Show photos as the model sees them: principal components of their patch features as colours.

    All photos share one set of colours: what the model takes for the same thing has the same colour in each. OUTPUT
    is a `.png` file (several photos make a sheet, one row each), or, without a suffix, a folder that gets a PNG file
    for each photo.

    Example:

        dino2 pca-image dog.jpg other-dog.jpg dogs.png --model RUN
    """
    from dinov2cli.cli.picture_files import check_picture_output, expand_inputs, save_picture
    from dinov2cli.console import out
    from dinov2cli.data.decoding import read_image
    from dinov2cli.visualize.basis import ColorBasis, parse_foreground
    from dinov2cli.visualize.features import PatchFeatures
    from dinov2cli.visualize.pca_image import fit_image_basis, render_images
    from dinov2cli.visualize.pca_video import check_basis
    from dinov2cli.visualize.rendering import sheet

    wanted_foreground = parse_foreground(foreground)
    inputs, output = split_inputs_and_output(paths)
    photos = expand_inputs(inputs)
    check_picture_output(output)
    colors = ColorBasis.load(basis) if basis else None
    loaded, precision = load_picture_model(model, device)
    extractor = PatchFeatures(loaded, resolution, batch_size, precision)
    if colors:
        check_basis(colors, extractor)
    else:
        colors = fit_image_basis(
            extractor, lambda: (read_image(path) for _, path in photos), foreground=wanted_foreground
        )
    if save_basis:
        colors.save(save_basis)

    one_sheet = bool(output.suffix) and len(photos) > 1
    style = layout or (Layout.SIDE_BY_SIDE if one_sheet else Layout.PCA)
    drawn = render_images(
        extractor,
        colors,
        (read_image(path) for _, path in photos),
        layout=style.value,
        upsampling=upsampling.value,
    )
    if one_sheet:
        save_picture(output, sheet([[picture] for picture in drawn]))
    elif output.suffix:
        save_picture(output, next(drawn))
    else:
        for (name, _), picture in zip(photos, drawn, strict=True):
            save_picture(output / f"{name}.png", picture)
    out.print(f"{output}: {len(photos)} photos", markup=False, highlight=False, soft_wrap=True)
