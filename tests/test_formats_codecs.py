"""Files of compressions that need a further library: read by value where it is there, else its name is said."""

import io
import struct
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import tifffile
from PIL import Image

from dinov2cli.config.images import Images
from dinov2cli.data.decoding import Reading, UnreadableImage, decode_image

y, x = np.mgrid[:40, :56]
SMOOTH = np.stack([x * 4, y * 6, 255 - (x + y) * 2], axis=-1).astype(np.uint8)
DEEP = SMOOTH.astype(np.uint16) * 257
FLOATS = (SMOOTH / 255).astype(np.float32)
OF_TIFF = {
    "lzw": (DEEP, {"compression": "lzw"}),
    "zstd": (DEEP, {"compression": "zstd"}),
    "five channels": (np.repeat(DEEP[..., :1], 5, 2), {"compression": "zstd", "planarconfig": "contig"}),
    "predictor of floats": (FLOATS, {"compression": "zlib", "predictor": True}),
    "lerc": (FLOATS, {"compression": "lerc"}),
    "jpeg xl": (SMOOTH, {"compression": "jpegxl"}),
    "webp": (SMOOTH, {"compression": "webp"}),
    "jpeg 2000": (DEEP, {"compression": "jpeg2000"}),
}


@pytest.mark.parametrize("kind", OF_TIFF)
def test_compressions_of_a_tiff(kind: str) -> None:
    pytest.importorskip("imagecodecs", reason="imagecodecs is not installed: pip install 'dinov2cli[tiff]'")
    array, how = OF_TIFF[kind]
    file = io.BytesIO()
    tifffile.imwrite(file, array, **{"photometric": "minisblack" if array.shape[2] == 5 else "rgb", **how})
    found = decode_image(file.getvalue(), "x.tif", Reading(Images(in_chans=array.shape[2])))
    right = array if array.dtype == np.uint8 else FLOATS if kind != "five channels" else FLOATS[..., :1].repeat(5, 2)
    assert found.dtype == right.dtype and np.abs(found.astype(float) - right).max() < 1e-6


@pytest.mark.parametrize(("number", "name"), [(50002, "JPEGXL"), (50001, "WEBP"), (34712, "JPEG2000"), (34887, "LERC")])
def test_a_compression_without_its_library_names_the_extra(
    number: int, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    if find_spec("imagecodecs"):
        pytest.skip("imagecodecs is installed")
    file = io.BytesIO()
    tifffile.imwrite(file, SMOOTH, photometric="rgb", compression="zlib")
    data = file.getvalue()
    tag = struct.pack("<HHIH", 259, 3, 1, 8)
    assert data.count(tag) == 1
    with pytest.raises(
        UnreadableImage, match=rf"compression {name}, needs imagecodecs: pip install 'dinov2cli\[tiff\]'"
    ):
        decode_image(data.replace(tag, struct.pack("<HHIH", 259, 3, 1, number)), "x.tif")
    assert not capfd.readouterr().err


def test_heic() -> None:
    heif = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed: pip install pillow-heif")
    heif.register_heif_opener()
    file = io.BytesIO()
    Image.fromarray(SMOOTH).save(file, "HEIF", quality=95)
    del Image.OPEN["HEIF"]  # as before anything has asked for it
    found = decode_image(file.getvalue(), "x.heic")
    assert found.shape == SMOOTH.shape and np.abs(found.astype(int) - SMOOTH).mean() < 5


def test_heic_without_its_library_names_it() -> None:
    if "HEIF" in Image.OPEN:
        pytest.skip("pillow-heif is installed")
    with pytest.raises(UnreadableImage, match="pip install pillow-heif"):
        decode_image(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200), "x.heic")


@pytest.mark.parametrize("kind", ["rle", "jpeg 2000", "jpeg-ls", "lossless jpeg"])
def test_compressed_dicom(kind: str) -> None:
    pydicom = pytest.importorskip("pydicom")
    from pydicom import uid
    from pydicom.encaps import encapsulate
    from test_formats_dicom import dicom

    samples = DEEP[..., 0] >> 4
    file = pydicom.dcmread(io.BytesIO(dicom(samples, 12)))
    if kind == "rle":
        file.compress(uid.RLELossless, encoding_plugin="pydicom")
    else:
        codecs = pytest.importorskip("imagecodecs", reason="to write it: pip install 'dinov2cli[tiff]'")
        pytest.importorskip("libjpeg", reason="pylibjpeg-libjpeg is not installed: pip install 'pylibjpeg[all]'")
        syntax, encoded = {
            "jpeg 2000": (
                uid.JPEG2000Lossless,
                lambda: codecs.jpeg2k_encode(samples, level=0, reversible=True, codecformat="j2k", bitspersample=12),
            ),
            "jpeg-ls": (uid.JPEGLSLossless, lambda: codecs.jpegls_encode(samples)),
            "lossless jpeg": (uid.JPEGLosslessSV1, lambda: codecs.ljpeg_encode(samples, bitspersample=12)),
        }[kind]
        file.PixelData, file.file_meta.TransferSyntaxUID = encapsulate([encoded()]), syntax
        file["PixelData"].VR, file["PixelData"].is_undefined_length = "OB", True
    out = io.BytesIO()
    file.save_as(out)
    found = decode_image(out.getvalue(), "x.dcm")
    np.testing.assert_allclose(found[..., 0], samples / 4095, atol=1e-6)


def test_compressed_dicom_without_its_library_names_it() -> None:
    pydicom = pytest.importorskip("pydicom")
    from pydicom.encaps import encapsulate
    from pydicom.uid import JPEGLSLossless
    from test_formats_dicom import dicom

    try:
        import libjpeg  # noqa: F401
    except ImportError:
        file = pydicom.dcmread(io.BytesIO(dicom(DEEP[..., 0] >> 4, 12)))
        file.PixelData, file.file_meta.TransferSyntaxUID = encapsulate([b"\xff\xd8" + bytes(40)]), JPEGLSLossless
        file["PixelData"].VR, file["PixelData"].is_undefined_length = "OB", True
        out = io.BytesIO()
        file.save_as(out)
        with pytest.raises(UnreadableImage, match=r"compressed as JPEG-LS .* pip install 'pylibjpeg\[all\]'"):
            decode_image(out.getvalue(), "x.dcm")
    else:
        pytest.skip("pylibjpeg-libjpeg is installed")


@pytest.mark.long
def test_what_is_said_without_the_libraries() -> None:
    """Where they are installed: in a process that does not find them."""
    hide = "import sys; sys.modules.update(dict.fromkeys(('imagecodecs', 'libjpeg', 'pillow_heif', 'pylibjpeg')))"
    words = ["-p", "no:cacheprovider", __file__, "-k", "without_its_library"]
    run = f"{hide}; import pytest; sys.exit(pytest.main({words}))"
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True)
    assert done.returncode == 0 and "6 passed" in done.stdout and "SKIPPED" not in done.stdout, done.stdout
