"""Whole slides of microscopes: which are TIFFs, and which openslide reads."""

from typing import Any

from dinov2cli.data.formats.stored import UnreadableImage

SLIDES = (".svs", ".ndpi", ".scn", ".qptiff")
"""TIFFs by other names, which tifffile reads."""
OTHER_SLIDES = (".mrxs", ".czi", ".bif", ".svslide")
"""What is no TIFF, or whose tiles are to be put together."""


def opened_slide(path: str) -> Any:
    """An `openslide.OpenSlide`. Raises `UnreadableImage`: openslide is missing, or does not read it."""
    try:
        import openslide
    except ImportError:
        raise UnreadableImage(path, "a slide of this type needs openslide: pip install 'dinov2cli[slides]'") from None
    try:
        return openslide.OpenSlide(path)
    except openslide.OpenSlideError as error:
        raise UnreadableImage(path, f"not a slide that openslide reads ({error})") from error
