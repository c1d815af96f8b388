"""DICOM: values, windows and photometric interpretations as PS3.3 C.7.6.3 and C.11 have them, files made by pydicom."""

import io
from typing import Any

import numpy as np
import pytest

from dinov2cli.config.images import RGB, Images
from dinov2cli.data.decoding import Reading, UnreadableImage, decode_image, read_stored
from dinov2cli.visualize.rendering import shown

pydicom = pytest.importorskip("pydicom")

BANDS = np.tile(np.repeat([0.0, 0.25, 0.5, 1.0], 4), (12, 1))
LEVELS = [0, 64, 128, 255]


def dicom(array: np.ndarray, bits: int, photometric: str = "MONOCHROME2", **elements: Any) -> bytes:
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    file = FileDataset(None, {}, file_meta=meta, preamble=bytes(128))
    color = array.ndim >= 3 and array.shape[-1] == 3
    shape = array.shape[:-1] if color else array.shape
    file.Rows, file.Columns = shape[-2:]
    file.SamplesPerPixel, file.PhotometricInterpretation = (3 if color else 1), photometric
    if color:
        file.PlanarConfiguration = 0
    if len(shape) == 3:
        file.NumberOfFrames = shape[0]
    file.BitsAllocated, file.BitsStored, file.HighBit = array.dtype.itemsize * 8, bits, bits - 1
    file.PixelRepresentation = int(array.dtype.kind == "i")
    for name, value in elements.items():
        setattr(file, name, value)
    file.PixelData = array.tobytes()
    out = io.BytesIO()
    file.save_as(out, enforce_file_format=True)
    return out.getvalue()


def bands(low: float, high: float, dtype: type) -> np.ndarray:
    return np.floor(low + (high - low) * BANDS + 0.5).astype(dtype)


def levels(data: bytes, **images: Any) -> list[int]:
    image = shown(decode_image(data, "x.dcm", Reading(Images(**images))), RGB)
    assert image.shape == (12, 16, 3) and (image == image[:1, :, :1]).all()
    return [int(image[0, x, 0]) for x in (2, 6, 10, 14)]


@pytest.mark.parametrize(
    ("data", "right"),
    [
        pytest.param(dicom(bands(0, 4095, np.uint16), 12), LEVELS, id="twelve bits stored in sixteen"),
        pytest.param(dicom(bands(0, 255, np.uint8), 8), LEVELS, id="eight bits"),
        pytest.param(dicom(bands(4095, 0, np.uint16), 12, "MONOCHROME1"), LEVELS, id="low values are bright"),
        pytest.param(dicom(bands(-2048, 2047, np.int16), 12), LEVELS, id="signed"),
        pytest.param(
            dicom(bands(0, 4095, np.uint16), 12, RescaleSlope=2, RescaleIntercept=-1024), LEVELS, id="rescaled"
        ),
        pytest.param(
            dicom(bands(4095, 0, np.uint16), 12, RescaleSlope=-1, RescaleIntercept=4095), LEVELS, id="falling slope"
        ),
        pytest.param(dicom(bands(0, 4095, np.uint16), 12)[128 + 4 :], LEVELS, id="without its preamble"),
        pytest.param(dicom(bands(0, 4095, np.uint16), 12, WindowCenter=None, WindowWidth=None), LEVELS, id="no window"),
        # CT of the abdomen: 40 +- 200 HU; what lies outside is black or white.
        pytest.param(
            dicom(bands(-1000, 3000, np.int16), 16, WindowCenter=40, WindowWidth=400), [0, 102, 255, 255], id="window"
        ),
        pytest.param(
            dicom(bands(0, 4000, np.uint16), 16, RescaleSlope=1, RescaleIntercept=-1000, WindowCenter=[1000, 40],
                  WindowWidth=[4000, 400], VOILUTFunction="LINEAR_EXACT"),
            LEVELS, id="the first of two windows, of rescaled values",
        ),
        pytest.param(
            dicom(bands(0, 4000, np.uint16), 16, "MONOCHROME1", WindowCenter=2000, WindowWidth=4000,
                  VOILUTFunction="LINEAR_EXACT"),
            [255, 191, 128, 0], id="window of low values that are bright",
        ),
        pytest.param(
            dicom(bands(0, 4000, np.uint16), 16, WindowCenter=2000, WindowWidth=1000, VOILUTFunction="SIGMOID"),
            [round(255 / (1 + np.exp(-4 * (x - 2000) / 1000))) for x in (0, 1000, 2000, 4000)], id="sigmoid",
        ),
    ],
)  # fmt: skip
def test_gray_is_as_it_is_to_be_seen(data: bytes, right: list[int]) -> None:
    assert levels(data) == pytest.approx(right, abs=1)


@pytest.mark.parametrize("of_frames", [False, True])
def test_of_many_frames_the_window_of_the_first_or_of_all(of_frames: bool) -> None:
    """Enhanced CT and MR keep rescaling and window in functional groups (PS3.3, C.7.6.16)."""

    def group(**elements: Any) -> Any:
        dataset = pydicom.Dataset()
        for name, value in elements.items():
            setattr(dataset, name, value)
        return pydicom.Sequence([dataset])

    groups = pydicom.Dataset()
    groups.PixelValueTransformationSequence = group(RescaleSlope=2, RescaleIntercept=-1024, RescaleType="HU")
    groups.FrameVOILUTSequence = group(WindowCenter=976, WindowWidth=4000, VOILUTFunction="LINEAR_EXACT")
    kept = {"SharedFunctionalGroupsSequence": pydicom.Sequence([pydicom.Dataset() if of_frames else groups])}
    if of_frames:
        kept["PerFrameFunctionalGroupsSequence"] = pydicom.Sequence([groups, pydicom.Dataset()])
    frames = np.stack([bands(0, 2000, np.uint16), bands(2000, 0, np.uint16)])
    assert levels(dicom(frames, 16, **kept)) == pytest.approx(LEVELS, abs=1)


def test_pixels_of_floating_point() -> None:
    header = pydicom.dcmread(io.BytesIO(dicom(bands(0, 255, np.uint8), 8)))
    for name in ("PixelData", "BitsStored", "HighBit", "PixelRepresentation"):
        delattr(header, name)
    header.BitsAllocated, header.FloatPixelData = 32, BANDS.astype("<f4").tobytes()
    out = io.BytesIO()
    header.save_as(out)
    assert levels(out.getvalue()) == pytest.approx(LEVELS, abs=1)


def test_a_range_that_is_said_is_one_of_rescaled_values() -> None:
    data = dicom(bands(24, 4024, np.uint16), 16, RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=0, WindowWidth=9)
    assert levels(data, value_range="[-1000, 3000]") == pytest.approx(LEVELS, abs=1)


def test_colours_frames_and_palettes() -> None:
    colors = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    np.testing.assert_array_equal(decode_image(dicom(colors, 8, "RGB"), "x"), colors)
    frames = np.stack([bands(0, 255, np.uint8), bands(255, 0, np.uint8)])
    stored = read_stored(dicom(frames, 8), "x")
    assert stored.left_out == "1 more frame" and levels(dicom(frames, 8)) == pytest.approx(LEVELS, abs=1)
    table = {f"{color}PaletteColorLookupTableData": (np.arange(256) * 257 ^ mask).astype("<u2").tobytes()
             for color, mask in (("Red", 0), ("Green", 0xFFFF), ("Blue", 0))}  # fmt: skip
    sizes = {f"{color}PaletteColorLookupTableDescriptor": [256, 0, 16] for color in ("Red", "Green", "Blue")}
    image = shown(decode_image(dicom(bands(0, 255, np.uint8), 8, "PALETTE COLOR", **sizes, **table), "x"), RGB)
    assert [tuple(image[0, x]) for x in (2, 14)] == [(0, 255, 0), (255, 0, 255)]


def test_what_is_no_image_or_cut_is_named() -> None:
    data = dicom(bands(0, 4095, np.uint16), 12)
    for wrong in (data[:-100], data[:300], data[:140]):
        with pytest.raises(UnreadableImage, match=r"^x\.dcm: (damaged DICOM|a DICOM file without pixels)"):
            decode_image(wrong, "x.dcm")
    header = pydicom.dcmread(io.BytesIO(data))
    header.Rows = header.Columns = 60000
    claims = io.BytesIO()
    header.save_as(claims)
    with pytest.raises(UnreadableImage, match=r"^x\.dcm: 60000 x 60000 pixels need"):
        decode_image(claims.getvalue(), "x.dcm")


def test_without_pydicom_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(UnreadableImage, match=r"pip install 'dinov2cli\[dicom\]'"):
        decode_image(bytes(128) + b"DICM" + bytes(40), "x.dcm")
