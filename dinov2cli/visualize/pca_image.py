"""`dino2 pca-image`: patch features of photos in colours that all of them share."""

from collections.abc import Iterable, Iterator
from contextlib import closing

from dinov2cli.console import counted
from dinov2cli.data.decoding import read_image
from dinov2cli.requests.pictures import PcaImageRequest
from dinov2cli.visualize.basis import ColorBasis, fit_color_basis, parse_foreground
from dinov2cli.visualize.features import FeatureSpool, PatchFeatures, Picture
from dinov2cli.visualize.pictures import Written, check_picture_output, expand_inputs, extractor_and_basis, save_picture
from dinov2cli.visualize.rendering import places_shown, render, sheet, shown


def run(request: PcaImageRequest) -> Written:
    """Draw what `dino2 pca-image` asks for.

    Raises:
        DataError: photos, colours or an output that cannot be used.
        EnvironmentProblem: a device that is not there, an output that cannot be written.
        WeightsError: weights that cannot be had.
    """
    foreground, output = parse_foreground(request.foreground), request.output
    photos = expand_inputs(request.inputs, output)
    check_picture_output(output)
    extractor, basis, reading = extractor_and_basis(request)
    places_shown(extractor.model.images, request.show_channels)
    if basis is None:
        basis = fit_image_basis(extractor, (read_image(path, reading) for _, path in photos), foreground)
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


def fit_image_basis(
    extractor: PatchFeatures, photos: Iterable[Picture], foreground: str | float = "auto"
) -> ColorBasis:
    """A basis for all photos, read one after the other."""
    with closing(FeatureSpool()) as spool:
        for _, features in extractor.maps((None, photo) for photo in photos):
            spool.append(features)
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
