"""Arrays of numpy's: `.npy`, and `.npz` with one array."""

import io
import zipfile

import numpy as np

from dinov2cli.data.formats.stored import Stored, UnreadableImage, check_memory, stored_numbers

MOST_CHANNELS = 16
"""A first axis of at most so many, shorter than the others, is that of the channels where the last cannot be."""


def read_array(data: bytes | memoryview, path: str, limit_gb: float) -> Stored | None:
    """[H, W], [H, W, C] or [C, H, W] of numbers; of three axes the last is that of the channels, unless the first is
    at most 16 and the last is more. None where the file is no array.

    Raises:
        UnreadableImage: damaged, several arrays, other axes, or no numbers.
    """
    if bytes(data[:6]) != b"\x93NUMPY" and not (bytes(data[:4]) == b"PK\x03\x04" and path.lower().endswith(".npz")):
        return None
    try:
        if bytes(data[:2]) == b"PK":
            data = _only_member(data, path, limit_gb)
        file = io.BytesIO(data)
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read_header(file)
        start = file.tell()
    except UnreadableImage:
        raise
    except Exception as error:  # numpy and zipfile raise whatever damage makes them come upon
        raise UnreadableImage(path, f"damaged array ({error})") from error
    if dtype.kind not in "buif":
        raise UnreadableImage(path, f"an array of {dtype}, not of numbers")
    if len(shape) not in (2, 3) or 0 in shape:
        raise UnreadableImage(path, f"an array {list(shape)} is no image; [H, W] or [H, W, C] is")
    first = len(shape) == 3 and shape[0] <= MOST_CHANNELS < shape[2] and shape[0] < shape[1]
    height, width, channels = (shape[1], shape[2], shape[0]) if first else (*shape, 1)[:3]
    check_memory(path, height, width, channels, limit_gb, itemsize=dtype.itemsize)
    if len(data) - start < height * width * channels * dtype.itemsize:
        raise UnreadableImage(path, f"damaged array (ends early: {list(shape)} of {dtype} need more bytes)")
    flat = np.frombuffer(data, dtype, height * width * channels, start)
    array = flat.reshape(shape[::-1]).T if fortran else flat.reshape(shape)
    array = array[..., None] if array.ndim == 2 else array.transpose(1, 2, 0) if first else array
    return stored_numbers(array, "npy")


def _only_member(data: bytes | memoryview, path: str, limit_gb: float) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        if len(members) != 1:
            held = ", ".join(member.filename.removesuffix(".npy") for member in members[:5])
            raise UnreadableImage(path, f"holds {len(members)} arrays ({held}), not one; save each image by itself")
        check_memory(path, 1, members[0].file_size, 1, limit_gb)  # a small archive may claim any size
        return archive.read(members[0])
