"""PNG, TIFF and JPEG 2000 that few libraries write, made by hand: each level as its format says, none rounded."""

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from dinov2cli.config.images import RGB
from dinov2cli.data.decoding import UnreadableImage, decode_image, read_stored
from dinov2cli.data.formats.fast import exif_orientation
from dinov2cli.visualize.rendering import shown

H, W = 12, 16
BANDS = np.tile(np.repeat([0.0, 0.25, 0.5, 1.0], 4), (H, 1))
LEVELS = [0, 64, 128, 255]
MEAN = (124, 116, 104)
DEEP = np.random.default_rng(0).integers(0, 65536, (H, W, 3), dtype=np.uint16)
TURNED = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x03\0\0\0\0\0\0"
"""EXIF: half a turn."""


def bands(white: int) -> np.ndarray:
    return np.floor(white * BANDS + 0.5).astype(np.uint16)


def packed(samples: np.ndarray, bits: int, *, reverse: bool = False) -> list[bytes]:
    """Rows of samples of so many bits, most significant first; `reverse`: each byte from its last bit on."""
    single = np.unpackbits(samples.astype(">u2").view(np.uint8).reshape(H, -1, 2), axis=2)[..., 16 - bits :]
    return [np.packbits(row, bitorder="little" if reverse else "big").tobytes() for row in single.reshape(H, -1)]


def png(bits: int, color: int, rows: list[bytes], **chunks: bytes) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    further = b"".join(chunk(kind.encode(), data) for kind, data in chunks.items())
    lines = zlib.compress(b"".join(b"\0" + row for row in rows))
    head = struct.pack(">IIBBBBB", W, H, bits, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + further + chunk(b"IDAT", lines) + chunk(b"IEND", b"")


def tiff(order: str, bits: int, rows: list[bytes], **more: int) -> bytes:
    """One strip of gray. `more`: photometric, fill_order, turn."""
    data = b"".join(rows)
    tags = {256: W, 257: H, 258: bits, 259: 1, 262: more.get("photometric", 1), 266: more.get("fill_order", 1),
            273: 0, 274: more.get("turn", 1), 277: 1, 278: H, 279: len(data)}  # fmt: skip
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    out = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HIH", 42, 8, len(tags))
    for tag, value in tags.items():
        out += struct.pack(f"{order}HHII", tag, 4, 1, value)
    return out + struct.pack(f"{order}I", 0) + data


def colors(data: bytes) -> list[tuple[int, ...]]:
    image = shown(decode_image(data, "x"), RGB)
    return [tuple(map(int, image[0, x])) for x in (2, 6, 10, 14)]


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_transparent_level_of_gray(bits: int) -> None:
    """The level is one of the file's own bits, not of the eight that readers make of them."""
    white = 2**bits - 1
    for hidden in {0, white // 3, white}:
        samples = np.minimum(bands(white), white)
        samples[:, 4:8] = white // 3
        found = colors(png(bits, 0, packed(samples, bits), tRNS=struct.pack(">H", hidden)))
        for level, color in zip(samples[0, 2::4].tolist(), found, strict=True):
            assert color == MEAN if level == hidden else color == pytest.approx((level * 255 / white,) * 3, abs=0.51)


@pytest.mark.parametrize("kind", ["iCCP", "sBIT", "bKGD", "gAMA", "eXIf", "tRNS", "tIME"])
def test_colours_of_sixteen_bits_whatever_stands_beside_them(kind: str) -> None:
    """An editor's profile or a background would hand the file to Pillow, which drops the low bytes."""
    body = {"iCCP": b"x\0\0" + zlib.compress(b"no profile" * 20), "sBIT": b"\x10" * 3, "bKGD": bytes(6),
            "gAMA": struct.pack(">I", 100_000), "eXIf": TURNED, "tIME": bytes(7),
            "tRNS": DEEP[0, 0].astype(">u2").tobytes()}  # fmt: skip
    image = decode_image(png(16, 2, [row.astype(">u2").tobytes() for row in DEEP], **{kind: body[kind]}), "x")
    right = (DEEP / 65535).astype(np.float32)
    if kind == "tRNS":
        assert image[0, 0] == pytest.approx([0.485, 0.456, 0.406])
        image[0, 0] = right[0, 0]
    np.testing.assert_array_equal(image, right[::-1, ::-1] if kind == "eXIf" else right)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("bits", [1, 4, 8, 12])
def test_bits_of_a_tiff_in_any_order(bits: int, order: str) -> None:
    white = 2**bits - 1
    samples = bands(white)
    right = [(round(255 * level / white),) * 3 for level in samples[0, 2::4].tolist()]
    for fill_order in (1, 2):
        rows = packed(samples, bits, reverse=fill_order == 2)
        assert colors(tiff(order, bits, rows, fill_order=fill_order)) == right
        assert colors(tiff(order, bits, rows, fill_order=fill_order, turn=3)) == right[::-1]
        inverted = [(255 - level,) * 3 for level, *_ in right]
        seen = colors(tiff(order, bits, rows, fill_order=fill_order, photometric=0))
        assert np.abs(np.subtract(seen, inverted)).max() <= 1


@pytest.mark.parametrize("bits", [10, 12, 16])
def test_colours_of_a_jpeg_2000(bits: int) -> None:
    samples = (DEEP >> (16 - bits)).repeat(8, 0).repeat(8, 1)
    if bits == 16:
        lossless = [cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000]
        data = cv2.imencode(".jp2", np.ascontiguousarray(samples[..., ::-1]), lossless)[1].tobytes()
    else:
        imagecodecs = pytest.importorskip("imagecodecs", reason="to write them: pip install 'dinov2cli[tiff]'")
        data = imagecodecs.jpeg2k_encode(samples, level=0, bitspersample=bits, reversible=True)
    np.testing.assert_array_equal(decode_image(data, "x"), (samples / (2**bits - 1)).astype(np.float32))
    with pytest.raises(UnreadableImage):
        decode_image(data[: len(data) // 2], "x")


@pytest.mark.parametrize("times", [1, 256, 257])
def test_palettes_of_eight_bits_stay_bytes(times: int) -> None:
    table = np.zeros((3, 256), np.uint16)
    table[:, :4] = np.array([[0, 64, 128, 255], [9, 8, 7, 6], [200, 100, 50, 25]]) * times
    file = io.BytesIO()
    tifffile.imwrite(file, bands(3).astype(np.uint8), photometric="palette", colormap=table)
    stored = read_stored(file.getvalue(), "x")
    assert stored.array.dtype == np.uint8 and stored.span == (0, 255)
    np.testing.assert_array_equal(stored.array[0, ::4], table.T[bands(3)[0, ::4]] // times)


def test_pages_of_different_sizes_and_an_animation_are_their_first_image() -> None:
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as tif:
        for times in (1, 2, 3):
            tif.write(np.full((H * times, W * times), 60 * times, np.uint8), photometric="minisblack")
    stored = read_stored(file.getvalue(), "x")
    assert stored.array.shape == (H, W, 1) and (stored.array == 60).all() and stored.left_out == "2 more pages"
    moving = io.BytesIO()
    frames = [Image.fromarray(np.full((H, W, 3), level, np.uint8)) for level in (9, 99)]
    frames[0].save(moving, "PNG", save_all=True, append_images=frames[1:])
    stored = read_stored(moving.getvalue(), "x")
    assert (stored.array == 9).all() and stored.left_out == "1 more frame"


@pytest.mark.parametrize(("name", "kind"), [("exif", "zTXt"), ("APP1", "tEXt"), ("exif", "iTXt")])
def test_exif_as_imagemagick_writes_it_into_a_png(name: str, kind: str) -> None:
    block = b"Exif\0\0" + TURNED
    text = f"\n{name}\n{len(block):8}\n{block[:20].hex()}\n{block[20:].hex()}\n".encode()
    head = f"Raw profile type {name}\0".encode()
    body = {"zTXt": head + b"\0" + zlib.compress(text), "tEXt": head + text, "iTXt": head + bytes(4) + text}[kind]
    rows = [row.tobytes() for row in (DEEP >> 8).astype(np.uint8)]
    plain = decode_image(png(8, 2, rows), "x")
    np.testing.assert_array_equal(decode_image(png(8, 2, rows, **{kind: body}), "x"), plain[::-1, ::-1])


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("code", "sign"), [(1, "B3x"), (3, "H2x"), (4, "I")])
def test_the_orientation_as_a_number_of_any_size(order: str, code: int, sign: str) -> None:
    mark = b"II" if order == "<" else b"MM"
    entry = struct.pack(f"{order}HHI{sign}", 0x112, code, 1, 6)
    assert exif_orientation(mark + struct.pack(f"{order}HIH", 42, 8, 1) + entry + bytes(4)) == 6
