"""Files that people have, made here, and the right value of each: depth, channels, orientation, alpha, size, damage.

Gray images are 16 x 12 with four vertical bands at 0, 1/4, 1/2 and 1 of their range, which must read 0, 64, 128, 255.
Colour images are four quarters.
"""

import io
import logging
import struct
import time
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from dinov2cli.config.images import RGB, Images
from dinov2cli.data import workers
from dinov2cli.data.decoding import LazyImage, Reading, UnreadableImage, decode_image, read_stored
from dinov2cli.data.formats.stored import interleaved, turned
from dinov2cli.visualize.rendering import shown

H, W = 12, 16
BANDS = np.repeat([0.0, 0.25, 0.5, 1.0], 4)
LEVELS = [0, 64, 128, 255]
RED, GREEN, BLUE, GRAY = (200, 30, 30), (30, 200, 30), (30, 30, 200), (128, 128, 128)
MEAN = (124, 116, 104)


@pytest.fixture(autouse=True)
def said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """Warnings of this test, as if none had been said before."""
    monkeypatch.setattr(workers, "_SAID", [0] * 16)
    monkeypatch.setattr(logging.getLogger("dinov2cli"), "propagate", True)
    warnings: list[str] = []
    monkeypatch.setattr(workers.logger, "warning", lambda text, *of: warnings.append(text % of))
    yield warnings


def bands(low: float, high: float, dtype: type) -> np.ndarray:
    row = low + (high - low) * BANDS
    return np.tile(row if np.issubdtype(dtype, np.floating) else np.floor(row + 0.5), (H, 1)).astype(dtype)


def quarters(scale: int = 1) -> np.ndarray:
    image = np.empty((H, W, 3), np.uint8)
    image[:6, :8], image[:6, 8:], image[6:, :8], image[6:, 8:] = RED, GREEN, BLUE, GRAY
    return image.repeat(scale, 0).repeat(scale, 1)


def tiff(array: np.ndarray, **how: object) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **{"photometric": "minisblack", **how})
    return file.getvalue()


def saved(image: Image.Image, kind: str, **how: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def packed_tiff(bits: int) -> bytes:
    """One uncompressed strip of gray samples of so many bits (TIFF 6.0, sections 2 to 8); tifffile writes none."""
    samples = np.unpackbits(bands(0, 2**bits - 1, np.uint16).astype(">u2").view(np.uint8).reshape(H, W, 2), axis=2)
    data = np.packbits(samples[..., 16 - bits :].reshape(H, -1), axis=1).tobytes()
    tags = {256: W, 257: H, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: H, 279: len(data)}
    data += b"\0" * (len(data) % 2)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def levels(data: bytes, name: str = "x", **images: object) -> list[int]:
    """Those of the four bands; R = G = B everywhere."""
    image = shown(decode_image(data, name, Reading(Images(**images))), RGB)
    assert image.dtype == np.uint8 and (image == image[..., :1]).all() and (image == image[:1]).all()
    return [int(image[0, x, 0]) for x in (2, 6, 10, 14)]


def corners(image: np.ndarray) -> list[tuple[int, ...]]:
    height, width = image.shape[:2]
    image = shown(image, RGB)
    return [tuple(map(int, image[y, x])) for y in (height // 4, 3 * height // 4) for x in (width // 4, 3 * width // 4)]


WIDE = bands(0, 65535, np.uint16)
GRAYS = {
    "pgm16": b"P5\n16 12\n65535\n" + WIDE.astype(">u2").tobytes(),
    "pgm12": b"P5\n# a comment\n16 12\n4095\n" + bands(0, 4095, np.uint16).astype(">u2").tobytes(),
    "pgm of 100": b"P5 16 12 100\n" + bands(0, 100, np.uint8).tobytes(),
    "plain pgm": b"P2 16 12 9999\n" + b" ".join(b"%d" % value for value in bands(0, 9999, np.uint16).ravel()),
    "pam": b"P7\nWIDTH 16\nHEIGHT 12\nDEPTH 1\nMAXVAL 1000\nTUPLTYPE GRAYSCALE\nENDHDR\n"
    + bands(0, 1000, np.uint16).astype(">u2").tobytes(),
    "pfm": b"Pf\n16 12\n-1.0\n" + bands(0, 1, np.float32).tobytes(),
    "png16": saved(Image.fromarray(WIDE), "PNG"),
    "png8": saved(Image.fromarray(bands(0, 255, np.uint8)), "PNG"),
    "bmp": saved(Image.fromarray(bands(0, 255, np.uint8)), "BMP"),
    "webp": saved(Image.fromarray(bands(0, 255, np.uint8)), "WEBP", lossless=True),
    "gif": saved(Image.fromarray(bands(0, 255, np.uint8)), "GIF"),
    "jpeg 2000": saved(Image.fromarray(bands(0, 255, np.uint8)), "JPEG2000"),
    "jpeg 2000 of 16 bits": saved(Image.fromarray(WIDE), "JPEG2000"),
    "tiff8": tiff(bands(0, 255, np.uint8)),
    "tiff16": tiff(WIDE),
    "tiff16, white is zero": tiff(65535 - WIDE, photometric="miniswhite"),
    "tiff16, big-endian, tiled, deflated": tiff(WIDE, byteorder=">", tile=(16, 16), compression="zlib", predictor=True),
    "bigtiff": tiff(WIDE, bigtiff=True),
    "tiff32": tiff(bands(0, 2**32 - 1, np.uint32)),
    "tiff64": tiff(bands(0, 2**63, np.uint64) // 4 * 8 - (bands(0, 1, np.uint64) > 0)),
    "half": tiff(bands(0, 1, np.float16)),
    "float": tiff(bands(0, 1, np.float32)),
    "double": tiff(bands(0, 1, np.float64)),
    **{f"tiff of {bits} bits": packed_tiff(bits) for bits in (4, 6, 10, 12, 14)},
    "npy8": npy(bands(0, 255, np.uint8)),
    "npy16": npy(np.asfortranarray(WIDE)),
    "npy16, big-endian": npy(WIDE.astype(">u2")),
    "npy float": npy(bands(0, 1, np.float64)[..., None]),
}  # fmt: skip


@pytest.mark.parametrize("name", GRAYS)
def test_gray_of_any_depth_is_what_its_format_says(name: str, said: list[str]) -> None:
    near = 9 if name == "tiff of 4 bits" else 2 if name == "tiff of 6 bits" else 1  # a quarter of 15 is 4
    assert levels(GRAYS[name]) == pytest.approx(LEVELS, abs=near)
    assert not said


def test_a_range_can_be_said() -> None:
    signed, counts = tiff(bands(-1000, 3000, np.int16)), tiff(bands(0, 4000, np.float32))
    assert levels(signed, value_range="[-1000, 3000]") == pytest.approx(LEVELS, abs=1)
    assert levels(signed, value_range="percentile [0, 100]") == pytest.approx(LEVELS, abs=1)
    assert levels(counts, value_range="[0, 4000]") == pytest.approx(LEVELS, abs=1)
    assert levels(counts, value_range="[1000, 2000]") == [0, 0, 255, 255]
    assert levels(tiff(4095 - bands(0, 4095, np.uint16), photometric="miniswhite"), value_range="[0, 4095]") == (
        pytest.approx(LEVELS, abs=1)
    )
    # The type's whole range, as TIFF's default is: 32768 of 65535 is the level of 0.
    assert levels(signed, value_range="dtype") == pytest.approx([124, 128, 131, 139], abs=1)
    assert levels(tiff(np.full((H, W), 7.0, np.float32)), value_range="percentile [1, 99]") == [0] * 4


@pytest.mark.parametrize(
    ("array", "what"),
    [
        (bands(-1000, 3000, np.int16), r"signed samples \(int16\) from -1000 to 3000"),
        (bands(-1000, 3000, np.int32), r"signed samples \(int32\) from -1000 to 3000"),
        (bands(0, 4000, np.float32), r"floating point samples \(float32\) from 0 to 4000"),
        (bands(-1, 1, np.float64), r"floating point samples \(float64\) from -1 to 1"),
    ],
)
def test_values_that_mean_nothing_known_are_asked_about(array: np.ndarray, what: str) -> None:
    for data in (tiff(array), npy(array)):
        with pytest.raises(UnreadableImage, match=rf"^name: {what}; say which values.*data\.value_range=\[LOW, HIGH\]"):
            decode_image(data, "name")


def test_fewer_bits_than_the_file_says_are_pointed_out_once(said: list[str]) -> None:
    data = tiff(bands(0, 4095, np.uint16))
    assert levels(data, "first.tif") == [0, 4, 8, 16] and levels(data, "second.tif") == [0, 4, 8, 16]
    (warning,) = said
    assert warning.startswith("first.tif: its largest value is 4095, ") and "data.value_range=[0, 4095]" in warning
    assert levels(data, value_range="[0, 4095]") == pytest.approx(LEVELS, abs=1)


def test_samples_that_are_no_number_are_pointed_out(said: list[str]) -> None:
    image = bands(0, 1, np.float32)
    image[:, :4], image[:, 12:] = np.nan, np.inf
    with pytest.raises(UnreadableImage, match="from nan"):
        decode_image(tiff(image), "name")
    assert levels(tiff(image), value_range="[0, 1]") == [0, 64, 128, 255]
    assert len(said) == 1 and "no finite number" in said[0]


TURNS = {
    1: [RED, GREEN, BLUE, GRAY], 2: [GREEN, RED, GRAY, BLUE], 3: [GRAY, BLUE, GREEN, RED], 4: [BLUE, GRAY, RED, GREEN],
    5: [RED, BLUE, GREEN, GRAY], 6: [BLUE, RED, GRAY, GREEN], 7: [GRAY, GREEN, BLUE, RED], 8: [GREEN, GRAY, RED, BLUE],
}  # fmt: skip


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "TIFF, LZW", "AVIF", "MPO"])
def test_images_are_upright_in_every_format(kind: str, turn: int) -> None:
    image = Image.fromarray(quarters(4))
    exif = Image.Exif()
    exif[0x0112] = turn
    how = {"JPEG": {"quality": 95, "subsampling": 0}, "MPO": {"quality": 95, "subsampling": 0},
           "AVIF": {"quality": 100, "subsampling": "4:4:4"}, "WEBP": {"lossless": True}}  # fmt: skip
    if kind == "TIFF":
        data = tiff(quarters(4), photometric="rgb", extratags=[(0x0112, "H", 1, turn, True)])
    elif kind == "TIFF, LZW":
        data = saved(image, "TIFF", compression="tiff_lzw", tiffinfo={0x0112: turn})
    else:
        data = saved(image, kind, exif=exif, **how.get(kind, {}))
    upright, stored = decode_image(data, "x"), decode_image(data, "x", Reading(Images(exif_orientation=False)))
    assert upright.shape[:2] == ((64, 48) if turn > 4 else (48, 64)) and stored.shape[:2] == (48, 64)
    assert np.abs(np.subtract(corners(upright), TURNS[turn])).max() <= 3
    assert np.abs(np.subtract(corners(stored), TURNS[1])).max() <= 3


def test_a_turn_is_undone_by_its_inverse() -> None:
    image = quarters()
    for turn, back in ((2, 2), (3, 3), (4, 4), (5, 5), (6, 8), (7, 7), (8, 6)):
        np.testing.assert_array_equal(turned(turned(image, turn), back), image)


def transparent(kind: str) -> bytes:
    opacity = np.full((H, W), 255, np.uint8)
    opacity[:, 8:] = 0
    rgba = np.dstack([quarters(), opacity])
    if kind == "palette":
        cut = Image.fromarray((opacity == 0).astype(np.uint8))
        cut.putpalette([*RED, *GREEN])
        return saved(cut, "GIF", transparency=1)
    if kind == "png16":
        wide = rgba.astype(np.uint16)[..., [2, 1, 0, 3]] * 257
        return cv2.imencode(".png", wide)[1].tobytes()
    if kind == "tiff":
        return tiff(rgba, photometric="rgb", extrasamples=["unassalpha"])
    if kind == "tiff, premultiplied":
        multiplied = np.dstack([quarters() * (opacity[..., None] > 0), opacity])
        return tiff(multiplied, photometric="rgb", extrasamples=["assocalpha"])
    if kind == "pam":
        head = b"P7\nWIDTH 16\nHEIGHT 12\nDEPTH 4\nMAXVAL 255\nTUPLTYPE RGB_ALPHA\nENDHDR\n"
        return head + rgba.tobytes()
    return saved(Image.fromarray(rgba), kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "palette", "png16", "tiff", "tiff, premultiplied", "pam"])
def test_what_is_transparent_shows_one_background(kind: str) -> None:
    left = [RED, RED] if kind == "palette" else [RED, BLUE]
    for background, behind in (("mean", MEAN), ("[255, 0, 9]", (255, 0, 9))):
        seen = corners(decode_image(transparent(kind), "x", Reading(Images(background=background))))
        assert seen == [left[0], behind, left[1], behind]
    hidden = corners(decode_image(transparent(kind), "x", Reading(Images(background="drop"))))
    assert hidden[0::2] == left and (kind == "tiff, premultiplied" or hidden[1] == GREEN)


def test_nothing_is_rounded_of_more_than_eight_bits() -> None:
    """Colours of 16 bits reach the network as they are; those of 8 stay bytes, and gray is called gray."""
    rng = np.random.default_rng(0)
    rgba = rng.integers(0, 65536, (H, W, 4), dtype=np.uint16)
    rgb, gray = rgba[..., :3], rgba[..., :1]
    files = {
        "png": (cv2.imencode(".png", np.ascontiguousarray(rgb[..., ::-1]))[1].tobytes(), rgb),
        "png, gray": (cv2.imencode(".png", gray)[1].tobytes(), gray),
        "tiff": (tiff(rgb, photometric="rgb"), rgb),
        "ppm": (b"P6 16 12 65535\n" + rgb.astype(">u2").tobytes(), rgb),
        "npy": (npy(rgb), rgb),
    }
    for name, (data, samples) in files.items():
        right = np.broadcast_to((samples / 65535).astype(np.float32), (H, W, 3))
        np.testing.assert_array_equal(decode_image(data, "x"), right, err_msg=name)
    mixed = decode_image(cv2.imencode(".png", rgba[..., [2, 1, 0, 3]])[1].tobytes(), "x")
    share = rgba[..., 3:] / 65535
    right = rgb / 65535 * share + np.array([0.485, 0.456, 0.406]) * (1 - share)
    assert np.abs(mixed - right).max() < 1e-6
    for kind in ("PNG", "JPEG", "WEBP", "BMP"):
        for mode, channels in (("L", 1), ("RGB", 3)):
            data = saved(Image.fromarray(quarters()).convert(mode), kind)
            assert decode_image(data, "x").dtype == np.uint8
            expected = 3 if kind == "WEBP" else channels  # which has no gray
            assert read_stored(data, "x").channels == LazyImage(data, "x").channels == expected, (kind, mode)


def flat(count: int, step: int, dtype: type) -> np.ndarray:
    return np.broadcast_to((np.arange(count) + 1) * step, (H, W, count)).astype(dtype)


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("count", [2, 4, 5, 13])
def test_channels_that_are_no_colours_are_refused_by_their_number(count: int, planar: bool) -> None:
    image, how = flat(count, 10, np.uint8), "separate" if planar else "contig"
    data = tiff(image.transpose(2, 0, 1) if planar else image, planarconfig=how)
    for encoded in (data, npy(image)):
        with pytest.raises(UnreadableImage, match=rf"^name: has {count} channels, "):
            decode_image(encoded, "name")
    np.testing.assert_array_equal(read_stored(data, "name").array, image)


def test_a_fourth_band_is_left_out_with_a_word(said: list[str]) -> None:
    data = tiff(flat(4, 12000, np.uint16), photometric="rgb", extrasamples=["unspecified"])
    assert corners(decode_image(data, "name"))[0] == (47, 93, 140)
    assert len(said) == 1 and said[0].startswith("name: of its 4 channels red, green and blue")


def test_further_pages_are_left_out_with_a_word(said: list[str]) -> None:
    pages = np.broadcast_to(np.array([60, 120, 180], np.uint8)[:, None, None], (3, H, W))
    assert levels(tiff(pages), "name") == [60] * 4
    assert said == ["name: only its first image is read; 2 more pages left out, here and of others"]


@pytest.mark.parametrize("kind", ["OME", "ImageJ"])
def test_planes_that_a_microscope_calls_channels_are_channels(kind: str, said: list[str]) -> None:
    planes = np.arange(2 * 5 * H * W, dtype=np.uint16).reshape(2, 5, H, W)
    how = {"ome": True, "metadata": {"axes": "ZCYX"}} if kind == "OME" else {"imagej": True}
    data = tiff(planes, **{**how, "metadata": {"axes": "ZCYX"}})
    stored = read_stored(data, "x.ome.tif")
    np.testing.assert_array_equal(stored.array, planes[0].transpose(1, 2, 0))
    assert stored.left_out == "5 more pages"


@pytest.mark.parametrize("kind", ["WEBP", "GIF", "PNG"])
def test_of_an_animation_the_first_frame_is_read_with_a_word(kind: str, said: list[str]) -> None:
    first, *others = [Image.new("RGB", (64, 48), color) for color in (RED, GREEN, BLUE)]
    how = {"lossless": True} if kind == "WEBP" else {}
    data = saved(first, kind, save_all=True, append_images=others, duration=100, **how)
    assert corners(decode_image(data, "name")) == [RED] * 4
    assert said == ["name: only its first image is read; 2 more frames left out, here and of others"]


def test_inks() -> None:
    cmyk = np.zeros((H, W, 4), np.uint8)
    cmyk[:, :8], cmyk[:, 8:] = (0, 255, 255, 0), (0, 0, 0, 255)  # red, black
    adobe = saved(Image.fromarray(cmyk, "CMYK"), "JPEG", quality=100, subsampling=0)
    marker = adobe.index(b"\xff\xee")
    plain = adobe[:marker] + adobe[marker + 2 + int.from_bytes(adobe[marker + 2 : marker + 4], "big") :]
    seen = corners(decode_image(adobe, "x"))
    assert np.abs(np.subtract(seen, [(255, 0, 0), (0, 0, 0)] * 2)).max() <= 4
    # Without Adobe's marker the samples are as they stand: no ink is 0, and these, inverted for Adobe, are other inks.
    seen = corners(decode_image(plain, "x"))
    assert np.abs(np.subtract(seen, [(0, 0, 0), (0, 0, 0)] * 2)).max() <= 4
    for dtype, white in ((np.uint8, 1), (np.uint16, 257)):
        data = tiff(cmyk.astype(dtype) * white, photometric="separated")
        assert corners(decode_image(data, "x")) == [(255, 0, 0), (0, 0, 0)] * 2


def test_palettes_of_a_tiff() -> None:
    indices = np.repeat(np.arange(4, dtype=np.uint8), 4)[None].repeat(H, 0)
    table = np.zeros((3, 256), np.uint16)
    table[:, :4] = np.array([RED, GREEN, BLUE, GRAY]).T * 257
    image = shown(decode_image(tiff(indices, photometric="palette", colormap=table), "x"), RGB)
    assert [tuple(image[0, x]) for x in (2, 6, 10, 14)] == [RED, GREEN, BLUE, GRAY]


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


HUGE = 31_623  # squared 10^9
CLAIMS = {
    "png": b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", HUGE, HUGE, 8, 2, 0, 0, 0))
    + png_chunk(b"IDAT", zlib.compress(bytes(1000))) + png_chunk(b"IEND", b""),
    "pgm": b"P5 %d %d 65535\n" % (HUGE, HUGE),
    "bmp": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 200, 0, 0, 54, 40, HUGE, HUGE, 1, 24, 0, 0, 0, 0, 0, 0),
    "jpeg": b"\xff\xd8\xff\xc0\x00\x11\x08" + struct.pack(">HH", HUGE, HUGE) + b"\x03" + bytes(9) + b"\xff\xd9",
    "npy": npy(np.zeros(0, np.uint8)).replace(b"(0,), }", b"(%d, %d), }" % (HUGE, HUGE))[:128],
    "gif": b"GIF89a" + (size := struct.pack("<HH", HUGE, HUGE)) + b"\0\0\0,\0\0\0\0" + size + b"\0\x02\0;",
    "tiff": b"II*\0\x08\0\0\0" + struct.pack("<H", 9) + b"".join(
        struct.pack("<HHII", tag, 4, 1, value) for tag, value in {
            256: HUGE, 257: HUGE, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: HUGE, 279: 100}.items()) + bytes(4),
}  # fmt: skip


@pytest.mark.parametrize("kind", CLAIMS)
def test_claims_of_a_thousand_million_pixels_are_refused_at_once(kind: str) -> None:
    assert len(CLAIMS[kind]) < 300
    tracemalloc.start()
    started = time.perf_counter()
    with pytest.raises(
        UnreadableImage, match=r"^name: 31623 x 31623 pixels need .* GB of memory.*data\.max_image_gb=3 "
    ):
        decode_image(CLAIMS[kind], "name")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert time.perf_counter() - started < 2 and most < 20e6


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_the_limit_is_memory_and_can_be_raised(kind: str) -> None:
    if kind == "png":
        data = saved(Image.new("1", (4096, 3072)), "PNG")
    else:
        data = tiff(np.zeros((3072, 4096), np.uint8), tile=(256, 256), compression="zlib")
    with pytest.raises(
        UnreadableImage, match=r"4096 x 3072 pixels need 0\.1 GB.*max_image_gb=0\.05 \(--max-image-gb\)"
    ):
        decode_image(data, "name", Reading(max_image_gb=0.05))
    assert decode_image(data, "name", Reading(max_image_gb=0.2)).shape == (3072, 4096, 3)


@pytest.mark.long
def test_200_megapixels_are_read() -> None:
    row = b"\0" + bytes(16384 // 8)
    header = struct.pack(">IIBBBBB", 16384, 12288, 1, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(row * 12288))
    image = decode_image(data + png_chunk(b"IEND", b""), "name")
    assert image.shape == (12288, 16384, 3) and not image.any()


DAMAGED = ["png16", "webp", "jpeg 2000", "tiff16", "tiff16, big-endian, tiled, deflated", "tiff of 12 bits", "npy16",
           "pgm16", "pam", "pfm"]  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_a_file_that_ends_early_is_named(name: str) -> None:
    data = GRAYS[name]
    for share in (0.1, 0.5):
        with pytest.raises(UnreadableImage, match=r"^name: "):
            decode_image(data[: int(len(data) * share)], "name")


def test_bytes_of_any_kind_end_in_a_message_or_an_image() -> None:
    rng = np.random.default_rng(0)
    for data in (*GRAYS.values(), transparent("PNG"), transparent("palette")):
        for _ in range(10):
            broken = bytearray(data)
            for place in rng.integers(len(data), size=3):
                broken[place] = rng.integers(256)
            try:
                assert decode_image(bytes(broken), "name", Reading(max_image_gb=0.1)).shape[2] == 3
            except UnreadableImage as error:
                assert str(error).startswith("name: ")


@pytest.mark.parametrize(
    ("name", "data", "remedy"),
    [
        ("a.heic", b"\0\0\0\x18ftypheic" + bytes(40), "pip install pillow-heif"),
        ("a.fits", b"SIMPLE  =                    T" + bytes(60), "astropy"),
        ("a.nii", bytes(400), "nibabel"),
        ("a.jpg", b"\n<!DOCTYPE html><html>", "a web page: the download led elsewhere"),
        ("a.jpg", b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        ("a.npz", b"PK\x03\x04" + bytes(20), "damaged array"),
        ("a.npy", npy(np.zeros(7)), r"\[7\] is no image; \[H, W\] or \[H, W, C\] is"),
        ("a.npy", npy(np.array([["a"]])), "not of numbers"),
        ("a.npy", npy(np.zeros((4, 4), complex)), "not of numbers"),
        ("a.tif", tiff(np.zeros((4, 4), np.complex64)), "complex64, are not read"),
    ],
)
def test_what_is_not_read_says_what_helps(name: str, data: bytes, remedy: str) -> None:
    with pytest.raises(UnreadableImage, match=f"^{name}: .*{remedy}"):
        decode_image(data, name)


def test_arrays_may_have_their_channels_first_or_last(tmp_path: Path) -> None:
    image = quarters(2)
    np.savez(tmp_path / "one.npz", image=image)
    np.savez_compressed(tmp_path / "two.npz", left=image, right=image)
    np.testing.assert_array_equal(decode_image(npy(image), "x"), image)
    np.testing.assert_array_equal(decode_image(npy(image.transpose(2, 0, 1)), "x"), image)
    np.testing.assert_array_equal(decode_image((tmp_path / "one.npz").read_bytes(), "one.npz"), image)
    with pytest.raises(UnreadableImage, match=r"^two.npz: holds 2 arrays \(left, right\)"):
        decode_image((tmp_path / "two.npz").read_bytes(), "two.npz")


TYPES = [np.uint8, np.uint16, np.uint32, np.uint64, np.int8, np.int16, np.int32, np.int64, np.float16, np.float32,
         np.float64, np.complex64, np.bool_]  # fmt: skip


@pytest.mark.parametrize("dtype", ["u1", ">u2", "<i4", "f2", "f4", ">f8"])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_planes_become_pixels(dtype: str, channels: int) -> None:
    planes = np.random.default_rng(0).integers(0, 99, (channels, 7, 9)).astype(dtype)
    planes.setflags(write=False)
    for given in (
        planes.transpose(1, 2, 0),
        planes.transpose(1, 2, 0)[::-1],
        np.ascontiguousarray(planes)[:, :, ::2].T,
    ):
        found = interleaved(given)
        assert found.dtype == given.dtype and np.array_equal(found, given)
        assert found.flags.c_contiguous and found.flags.writeable and not np.shares_memory(found, planes)


def test_what_tifffile_writes_comes_back_or_is_refused() -> None:
    rng = np.random.default_rng(18)
    came_back = 0
    for _ in range(200):
        dtype = np.dtype(TYPES[rng.integers(len(TYPES))])
        height, width, count = (int(n) for n in (*rng.integers(1, 40, 2), rng.choice([1, 2, 3, 4, 5, 13])))
        array = rng.bytes(height * width * count * dtype.itemsize)
        image = np.frombuffer(array, np.uint8 if dtype.kind == "b" else dtype).reshape(height, width, count)
        image = image > 127 if dtype.kind == "b" else image
        planar, white_is_zero = bool(rng.integers(2)), bool(rng.integers(2))
        rgb = count in (3, 4) and bool(rng.integers(2)) and dtype.kind != "b"
        how = {
            "photometric": "rgb" if rgb else "miniswhite" if white_is_zero else "minisblack",
            "planarconfig": None if count == 1 else "separate" if planar else "contig",
            "byteorder": "<>"[rng.integers(2)],
            "bigtiff": bool(rng.integers(2)),
            "extrasamples": ["unspecified"] if rgb and count == 4 else None,
            "tile": (16, 16) if rng.integers(2) else None,
            "compression": "zlib" if rng.integers(2) else None,
        }
        given = image[..., 0] if count == 1 else image.transpose(2, 0, 1) if planar else image
        data = tiff(given, **how)
        if dtype.kind == "c" or (dtype.kind == "b" and count > 1 and not planar):
            with pytest.raises(UnreadableImage, match=r"^name: .*(complex64|one bit)"):
                decode_image(data, "name")
            continue
        stored = read_stored(data, "name")
        assert stored.array.shape == image.shape and stored.array.dtype.isnative, how
        np.testing.assert_array_equal(stored.array.astype(dtype), image, err_msg=str(how))
        assert (stored.inverted, stored.rgb, stored.alpha) == (white_is_zero and not rgb, rgb, False), how
        is_shown = {"u": True, "b": True, "i": False, "f": False}[dtype.kind] and (count in (1, 3) or rgb)
        came_back += is_shown
        if is_shown:
            white = 1 if dtype.kind == "b" else np.iinfo(dtype).max
            right = image[..., :3].astype(np.float64) / white * 255
            right = 255 - right if stored.inverted else right
            found = decode_image(data, "name")
            assert (found.dtype == np.uint8) == (dtype.itemsize == 1), how
            assert np.abs(found * (1.0 if found.dtype == np.uint8 else 255.0) - right).max() <= 1e-4, how
        else:
            with pytest.raises(UnreadableImage, match=r"^name: (has \d+ channels|signed|floating|its)"):
                decode_image(data, "name")
    assert came_back > 15
