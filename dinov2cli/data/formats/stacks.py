"""Arrays in HDF5 and Zarr, by their path inside: `cells.h5::/images`, `cells.zarr::/0`, `cells.h5::/images[7]`.

What the axes mean: H and W, C of the channels, N of images, which may come several times (OME-Zarr's time and depth).
"""

import os
from contextlib import suppress
from typing import Any

import numpy as np

from dinov2cli.data.formats.arrays import MOST_CHANNELS
from dinov2cli.data.formats.stored import Stored, UnreadableImage, check_memory, stored_numbers
from dinov2cli.errors import DataError, EnvironmentProblem

EXTRA = "pip install 'dinov2cli[arrays]'"
_OME_AXES = {"t": "N", "z": "N", "c": "C", "y": "H", "x": "W"}


class Stack:
    """The images of one array. Not to be shared between processes.

    Args:
        file, path: where it lies; "" is the only array that can hold images, or an OME-Zarr's of full resolution.
        axes: what its axes are, a letter each; by default as OME-Zarr says, else of two HW, of three HWC, CHW where the
            first is at most 16 and the last is more, NHW where all are, and of four NHWC or NCHW likewise.

    Raises:
        DataError: no such file or array, or axes that cannot be told.
        EnvironmentProblem: h5py or zarr is not installed.
    """

    def __init__(self, file: str, path: str = "", axes: str | None = None) -> None:
        root = _opened(os.path.expanduser(file))
        where = path.strip("/")
        is_array = not hasattr(root, "keys")  # Zarr: a file that is one array
        node = root if is_array or not where else _node(root, where, file)
        if hasattr(node, "keys"):
            node, where, known = _only_array(node, where, file)
            axes = axes or known
        self.name = f"{file}::/{where}"
        self.array: Any = node
        self.axes = axes or _usual_axes(node.shape)
        if len(self.axes) != node.ndim or sorted(self.axes.replace("N", "").replace("C", "")) != ["H", "W"] or (
            self.axes.count("C") > 1
        ):  # fmt: skip
            said = f" are not {axes!r}" if axes else ""
            raise DataError(f"{self.name}: the axes of {_shown(node)}{said or ' cannot be told'}",
                            f"Say which is which: Arrays:file={file}:path=/{where}:axes=NHWC")  # fmt: skip
        if node.dtype.kind not in "buif":
            raise DataError(f"{self.name}: {_shown(node)} is no array of numbers")
        self.counts = tuple(size for size, axis in zip(node.shape, self.axes, strict=True) if axis == "N")

    def __len__(self) -> int:
        return int(np.prod(self.counts, dtype=np.int64))

    def stored(self, image: int, limit_gb: float) -> Stored:
        """The image with this number. Raises `UnreadableImage`."""
        path = self.name if not self.counts else f"{self.name}[{image}]"
        if not 0 <= image < len(self):
            raise UnreadableImage(path, f"there are {len(self)} images, the first is 0")
        sizes = {axis: size for axis, size in zip(self.axes, self.array.shape, strict=True) if axis != "N"}
        itemsize = self.array.dtype.itemsize
        check_memory(path, sizes["H"], sizes["W"], sizes.get("C", 1), limit_gb, itemsize=itemsize)
        at = iter(np.unravel_index(image, self.counts) if self.counts else ())
        try:
            chosen = np.asarray(self.array[tuple(int(next(at)) if axis == "N" else slice(None) for axis in self.axes)])
        except Exception as error:  # h5py, zarr and their codecs raise whatever damage makes them come upon
            text = " ".join(str(error).split()) or type(error).__name__
            needs = "; pip install hdf5plugin" if "plugin" in text or "filter" in text else ""
            raise UnreadableImage(path, f"cannot be read ({text}){needs}") from error
        axes = self.axes.replace("N", "")
        chosen = chosen if "C" in axes else chosen[..., None]
        axes = axes if "C" in axes else f"{axes}C"
        return stored_numbers(chosen.transpose([axes.index(axis) for axis in "HWC"]), "array")


def values_inside(file: str, path: str) -> np.ndarray:
    """A whole array as it is, such as that of the labels. Raises as `Stack` does."""
    node = _node(_opened(os.path.expanduser(file)), path.strip("/"), file)
    if hasattr(node, "keys"):
        raise DataError(f"{file}::/{path} holds {', '.join(node.keys())}; it is no array")
    return np.asarray(node[...])


def _opened(file: str) -> Any:
    is_hdf5 = not os.path.isdir(file)
    try:
        if is_hdf5:
            import h5py

            with suppress(ImportError):
                import hdf5plugin  # noqa: F401  # its import makes more compressions known
            return h5py.File(file, "r", locking="best-effort")
        import zarr

        return zarr.open(file, mode="r")
    except ImportError:
        kind, needed = ("HDF5", "h5py") if is_hdf5 else ("Zarr", "zarr")
        raise EnvironmentProblem(f"{file}: {kind} needs {needed}", EXTRA) from None
    except FileNotFoundError:
        raise DataError(f"{file} does not exist") from None
    except Exception as error:  # of a damaged file they raise whatever they come upon
        text = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{file}: not {'an HDF5 file' if is_hdf5 else 'of Zarr'}, or damaged ({text})") from error


def _node(root: Any, path: str, file: str) -> Any:
    try:
        return root[path]
    except (KeyError, IndexError, ValueError):
        held = ", ".join(f"/{name} {_shown(node)}" for name, node in _arrays(root)[:8])
        raise DataError(f"{file} holds no /{path}; it holds {held or 'no array'}") from None


def _only_array(group: Any, where: str, file: str) -> tuple[Any, str, str | None]:
    """The array of a group that holds images, its path, and its axes if the group says them."""
    above = f"{where}/" if where else ""
    said = dict(group.attrs)
    scales = said.get("multiscales") or (said.get("ome") or {}).get("multiscales")
    if scales:
        first = scales[0]["datasets"][0]["path"]
        axes = "".join(_OME_AXES.get(each["name"] if isinstance(each, dict) else each, "?")
                       for each in scales[0].get("axes", "tczyx"))  # fmt: skip
        return group[first], f"{above}{first}", axes
    found = _arrays(group)
    of_images = [(name, node) for name, node in found if node.ndim >= 2 and min(node.shape[-2:]) > 1]
    if len(of_images) != 1:
        held = ", ".join(f"/{above}{name} {_shown(node)}" for name, node in found[:8])
        first = of_images[0][0] if of_images else "images"
        raise DataError(f"{file}: which array holds the images cannot be told; it holds {held or 'no array'}",
                        f"Name it: {file}::/{above}{first}")  # fmt: skip
    return of_images[0][1], f"{above}{of_images[0][0]}", None


def _arrays(group: Any, above: str = "") -> list[tuple[str, Any]]:
    """All arrays below a group, by path."""
    found = []
    for name in sorted(group.keys()):
        node = group[name]
        found += _arrays(node, f"{above}{name}/") if hasattr(node, "keys") else [(f"{above}{name}", node)]
    return found


def _usual_axes(shape: tuple[int, ...]) -> str:
    if len(shape) == 2:
        return "HW"
    lead = "N" * (len(shape) == 4)
    if len(shape) not in (3, 4):
        return ""
    first, _, last = shape[-3:]
    if last <= MOST_CHANNELS:
        return f"{lead}HWC"
    return f"{lead}CHW" if first <= MOST_CHANNELS else "NHW" if len(shape) == 3 else ""


def _shown(node: Any) -> str:
    return f"{list(node.shape)} {node.dtype}"
