"""A look at a set: what its files are, counted, and what is mixed in it."""

from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from dinov2cli.config.images import Images
from dinov2cli.data import look
from dinov2cli.data.datasets import make_dataset
from dinov2cli.data.decoding import USUAL, Reading
from dinov2cli.data.look import look_at


def write(folder: Path) -> None:
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(folder / "a.jpg")
    Image.new("RGB", (80, 60)).save(folder / "b.jpg", exif=exif)
    Image.new("L", (20, 10)).save(folder / "c.jpg")
    Image.new("RGBA", (40, 30)).save(folder / "d.png")


def test_kinds_are_counted_and_what_is_mixed_is_named(tmp_path: Path) -> None:
    write(tmp_path / "set")
    seen = look_at(make_dataset(str(tmp_path / "set")), USUAL)
    assert str(seen) == (
        "all: JPEG 3, PNG 1; 8 bits; RGB 3, gray 1; 20 x 10 to 80 x 60, median 40 x 30; 1 turned by EXIF; "
        "1 with transparency"
    )
    (mixture,) = seen.mixtures()
    assert mixture.startswith("the images differ in their channels: 3 of RGB (such as ") and "c.jpg" in mixture
    tifffile.imwrite(tmp_path / "set" / "e.tif", np.zeros((2, 30, 40), np.uint16), photometric="minisblack")
    (tmp_path / "set" / "f.png").write_bytes(b"nothing")
    seen = look_at(make_dataset(str(tmp_path / "set")), USUAL)
    assert "8 bits 4, 16 bits 1; " in str(seen) and str(seen).endswith("1 with more images; 1 unreadable")
    assert any("4 of 8 bits" in text and "e.tif" in text for text in seen.mixtures())


def test_planes_count_as_channels_where_these_are_asked_for(tmp_path: Path) -> None:
    for number in range(3):
        tifffile.imwrite(tmp_path / f"{number}.tif", np.zeros((5, 16, 12), np.uint16), photometric="minisblack")
    seen = look_at(make_dataset(str(tmp_path)), Reading(Images(in_chans=5)))
    assert str(seen) == "all: TIFF; 16 bits; 5 channels; 12 x 16" and not list(seen.mixtures())


def test_of_a_large_set_a_part_is_looked_at(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    write(tmp_path / "set")
    monkeypatch.setattr(look, "MOST", 2)
    seen = look_at(make_dataset(str(tmp_path / "set")), USUAL)
    assert str(seen).startswith("2 looked at: JPEG; 8 bits; ")
    monkeypatch.setattr(look, "SECONDS", 0.0)
    assert str(look_at(make_dataset(str(tmp_path / "set")), USUAL)) == "1 looked at: JPEG; 8 bits; RGB; 40 x 30"
