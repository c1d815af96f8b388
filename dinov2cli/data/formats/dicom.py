"""DICOM through pydicom: the first frame, with the values and the window that the file describes (PS3.3, C.11)."""

import io
from typing import Any

import numpy as np

from dinov2cli.data.formats.stored import Stored, UnreadableImage, check_memory, further


def read_dicom(data: bytes | memoryview, path: str, limit_gb: float) -> Stored | None:
    """Values after the modality's rescaling; black and white are the window's, or else those of BitsStored. None where
    the file is no DICOM.

    Raises:
        UnreadableImage: damaged, without pixels, or pydicom or a decoder of its compression is missing.
    """
    if bytes(data[128:132]) != b"DICM" and bytes(data[:6]) != b"\x02\0\0\0UL":  # the latter without its preamble
        return None
    try:
        import pydicom
        from pydicom.pixels.utils import pixel_array
    except ImportError:
        raise UnreadableImage(path, "a DICOM file needs pydicom: pip install 'dinov2cli[dicom]'") from None
    try:
        header = pydicom.dcmread(io.BytesIO(data), force=True)
        frames = int(header.get("NumberOfFrames") or 1)
        if "PixelData" not in header and "FloatPixelData" not in header and "DoubleFloatPixelData" not in header:
            raise UnreadableImage(path, "a DICOM file without pixels")
        channels = int(header.SamplesPerPixel)
        itemsize = max(1, header.BitsAllocated // 8) if channels > 1 else 4  # of what is rescaled
        beside = 2 * channels * header.BitsAllocated / 8
        check_memory(path, header.Rows, header.Columns, channels, limit_gb, itemsize=itemsize, beside=beside)
        array = pixel_array(header, index=0)
        array = array[..., None] if channels == 1 else array
        return _stored(array, header, further(frames - 1, "frame"))
    except UnreadableImage:
        raise
    except Exception as error:  # pydicom raises whatever its parsing of a damaged file runs into
        reason = " ".join(str(error).split()) or type(error).__name__
        if "pylibjpeg" in reason or "plugin" in reason or "missing dependencies" in reason:
            raise UnreadableImage(
                path, f"its pixels are compressed as {header.file_meta.TransferSyntaxUID.name}; "
                "pip install 'pylibjpeg[all]' or convert it to Explicit VR Little Endian"
            ) from None  # fmt: skip
        raise UnreadableImage(path, f"damaged DICOM ({reason})") from error


def _stored(array: np.ndarray, header: Any, left_out: str) -> Stored:
    from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi_lut

    kind = header.PhotometricInterpretation
    if kind == "PALETTE COLOR":
        array = apply_color_lut(array[..., 0], header)
        bits = int(header.RedPaletteColorLookupTableDescriptor[2])
        return Stored(array[..., :3], "DICOM", (0, 2**bits - 1), rgb=True, left_out=left_out)
    bits = int(header.get("BitsStored") or header.BitsAllocated)
    if array.shape[2] == 3:
        return Stored(array, "DICOM", (0, 2**bits - 1), rgb=True, left_out=left_out)
    signed = int(header.get("PixelRepresentation") or 0)
    ends = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    if "ModalityLUTSequence" in header:
        array = apply_modality_lut(array, header)
        span: tuple[float, float] | None = (0, 2 ** int(header.ModalityLUTSequence[0].LUTDescriptor[2]) - 1)
    else:
        rescaling = _of_first_frame(header, "PixelValueTransformationSequence")
        slope = float(rescaling.get("RescaleSlope") or 1)
        intercept = float(rescaling.get("RescaleIntercept") or 0)
        if (slope, intercept) != (1, 0):
            array = array.astype(np.float32) * np.float32(slope) + np.float32(intercept)
        low, high = sorted(end * slope + intercept for end in ends)  # the slope may fall
        span = (low, high) if "PixelData" in header else None
    shown = _of_first_frame(header, "FrameVOILUTSequence")
    has_window = shown.get("WindowCenter") is not None and shown.get("WindowWidth") is not None
    if "VOILUTSequence" in header and not has_window:
        array = apply_voi_lut(array[..., 0], header)[..., None]
        span = (0, 2 ** int(header.VOILUTSequence[0].LUTDescriptor[2]) - 1)
    elif has_window:
        array, span = _windowed(array, shown)
    return Stored(array, "DICOM", span, inverted=kind == "MONOCHROME1", left_out=left_out)


def _of_first_frame(header: Any, sequence: str) -> Any:
    """Where such elements stand: of a multi-frame object in the groups of its first frame, or of all (C.7.6.16)."""
    for groups in ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"):
        if (found := header.get(groups)) and (inner := found[0].get(sequence)):
            return inner[0]
    return header


def _windowed(array: np.ndarray, header: Any) -> tuple[np.ndarray, tuple[float, float]]:
    """The first window: the values at its ends, or for a sigmoid, which has no ends, its values 0 to 1."""
    both = header["WindowCenter"], header["WindowWidth"]
    center, width = (float(each.value if each.VM == 1 else each.value[0]) for each in both)
    function = str(header.get("VOILUTFunction") or "LINEAR").upper()
    if function == "SIGMOID":
        return 1 / (1 + np.exp(-4 * (array.astype(np.float32) - center) / width)), (0, 1)
    if function == "LINEAR_EXACT":
        return array, (center - width / 2, center + width / 2)
    low = center - 0.5 - (width - 1) / 2
    return array, (low, low + max(width - 1, 1e-3))  # PS3.3 C.11.2.1.2.1; a width of 1 is a threshold
