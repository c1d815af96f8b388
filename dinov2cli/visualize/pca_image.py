"""`dino2 pca-image`: patch features of photos in colours that all of them share."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from typing import NamedTuple

from dinov2cli.data.decoding import read_image
from dinov2cli.models.vision_transformer import VisionTransformer
from dinov2cli.requests.pictures import PcaImageRequest
from dinov2cli.visualize.basis import ColorBasis, check_basis, fit_color_basis, parse_foreground
from dinov2cli.visualize.features import FeatureSpool, PatchFeatures, Picture
from dinov2cli.visualize.pictures import Written, check_picture_output, expand_inputs, load_picture_model, save_picture
from dinov2cli.visualize.rendering import render, sheet


def run(request: PcaImageRequest) -> Written:
    """Draw what `dino2 pca-image` asks for.

    Raises:
        DataError: photos, colours or an output that cannot be used.
        EnvironmentProblem: a device that is not there, an output that cannot be written.
        WeightsError: weights that cannot be had.
    """
    foreground, output = parse_foreground(request.foreground), request.output
    photos = expand_inputs(request.inputs)
    check_picture_output(output)
    basis = ColorBasis.load(request.basis) if request.basis else None
    model, precision = load_picture_model(request.model, request.device)
    extractor = PatchFeatures(model, request.resolution, request.batch_size, precision)
    if basis:
        check_basis(basis, extractor.model.embed_dim)
    else:
        basis = fit_image_basis(extractor, lambda: (read_image(path) for _, path in photos), foreground=foreground)
    if request.save_basis:
        basis.save(request.save_basis)
    one_sheet = bool(output.suffix) and len(photos) > 1
    layout = request.layout or ("side-by-side" if one_sheet else "pca")
    images = (read_image(path) for _, path in photos)
    drawn = render_images(extractor, basis, images, layout=layout, upsampling=request.upsampling)
    if one_sheet:
        save_picture(output, sheet([[picture] for picture in drawn]))
    elif output.suffix:
        save_picture(output, next(drawn))
    else:
        for (name, _), picture in zip(photos, drawn, strict=True):
            save_picture(output / f"{name}.png", picture)
    return Written(((output, f"{len(photos)} photos"),))


class PCAPictures(NamedTuple):
    """What `pca_images` gives."""

    pictures: list[Picture]
    """uint8 [H, W, 3] each, the size of its photo (twice as wide side by side)."""
    basis: ColorBasis


def pca_images(
    model: VisionTransformer,
    photos: Iterable[Picture],
    *,
    resolution: int = 32,
    foreground: str | float = "auto",
    layout: str = "pca",
    upsampling: str = "bicubic",
    basis: ColorBasis | None = None,
) -> PCAPictures:
    """PCA pictures of photos in memory, by one basis fitted to all of them (or a given one).

    Args:
        model: in evaluation mode.
        photos: RGB uint8 [H, W, 3] of any sizes.
        resolution: patches along the short side.
        foreground: as in `fit_color_basis`.
        layout, upsampling: as in `rendering.render`.

    Raises:
        DataError: no photo; a foreground without a patch.
    """
    photos = list(photos)
    extractor = PatchFeatures(model, resolution)
    if basis is None:
        basis = fit_image_basis(extractor, lambda: photos, foreground=foreground)
    return PCAPictures(list(render_images(extractor, basis, photos, layout=layout, upsampling=upsampling)), basis)


def fit_image_basis(
    extractor: PatchFeatures, photos: Callable[[], Iterable[Picture]], *, foreground: str | float = "auto"
) -> ColorBasis:
    """A basis for all photos, read one after the other; `photos` starts them."""
    with closing(FeatureSpool()) as spool:
        for _, features in extractor.maps((None, photo) for photo in photos()):
            spool.append(features)
        return fit_color_basis(spool, foreground)


def render_images(
    extractor: PatchFeatures, basis: ColorBasis, photos: Iterable[Picture], *, layout: str, upsampling: str
) -> Iterator[Picture]:
    """PCA pictures in the order of the photos, one after the other."""
    for photo, features in extractor.maps((photo, photo) for photo in photos):
        yield render(photo, features, basis, layout=layout, upsampling=upsampling)
