"""The backbone as a graph that runs without this package: ONNX, and torch.export's `.pt2`."""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2cli import __version__
from dinov2cli.errors import need
from dinov2cli.export.bundle import Bundle, Runner, random_images
from dinov2cli.export.graph import ExportableVisionTransformer, ExportGraph

_MAX_BATCH, _MAX_PATCHES = 4096, 1024
# A protobuf holds 2 GiB at most; larger weights go into a file beside the graph.
_EXTERNAL_DATA_ABOVE = 1_800_000_000


def write_torch_export(bundle: Bundle, path: Path) -> None:
    """A `.pt2` archive: `torch.export.load(path).module()(images)`; `preprocessing.json` is among its extra files."""
    with _quiet():
        extra = {"preprocessing.json": json.dumps(bundle.preprocessing)}
        torch.export.save(_program(bundle), path, extra_files=extra)


def open_torch_export(bundle: Bundle, path: Path) -> Runner:
    """The archive as torch.export opens it."""
    with _quiet():
        module = torch.export.load(path).module()
    names = ExportGraph(bundle.model, bundle.head).output_names
    return lambda images: dict(zip(names, module(images), strict=True))


def write_onnx(bundle: Bundle, path: Path) -> None:
    """An ONNX graph: input `images` (float32, normalised), outputs `cls`, `patches` and, with a head, `logits`.

    Raises:
        EnvironmentProblem: onnx or onnxscript is not installed.
    """
    need("onnx")
    need("onnxscript")
    names = ExportGraph(bundle.model, bundle.head).output_names
    with _quiet():
        program: Any = torch.onnx.export(
            _program(bundle), dynamo=True, input_names=["images"], output_names=names, opset_version=bundle.opset,
            verbose=False,
        )  # fmt: skip
    program.model.metadata_props.update({"dino2": __version__, **bundle.metadata})
    program.save(path, external_data=4 * sum(tensor.numel() for tensor in bundle.state.values()) > _EXTERNAL_DATA_ABOVE)


def open_onnx(bundle: Bundle, path: Path) -> Runner:
    """The graph as onnxruntime runs it on the CPU.

    Raises:
        EnvironmentProblem: onnxruntime is not installed.
    """
    runtime: Any = need("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(images: Tensor) -> dict[str, Tensor]:
        outputs = session.run(None, {"images": images.numpy()})
        return {name: torch.from_numpy(array) for name, array in zip(names, outputs, strict=True)}

    return run


def _program(bundle: Bundle) -> torch.export.ExportedProgram:
    """The traced graph. Batch is dynamic, height and width too unless one size is asked for."""
    backbone = ExportableVisionTransformer(bundle.vit)
    backbone.load_state_dict(bundle.state)
    graph = ExportGraph(backbone, bundle.head).eval().requires_grad_(False)
    patch = bundle.vit.patch_size
    batch = torch.export.Dim("batch", min=1, max=_MAX_BATCH)
    sides: dict[int, Any] = {}
    height, width = bundle.image_size or (5 * patch, 7 * patch)
    if bundle.image_size is None:
        # A side of one patch would be traced as a constant: two at least.
        rows = torch.export.Dim("rows", min=2, max=_MAX_PATCHES)
        columns = torch.export.Dim("columns", min=2, max=_MAX_PATCHES)
        sides = {2: patch * rows, 3: patch * columns}
    example = random_images(bundle.vit, 2, height, width)
    return torch.export.export(graph, (example,), dynamic_shapes={"images": {0: batch, **sides}}, strict=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's remarks about itself (torchvision is absent, deprecations) off the terminal."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)
