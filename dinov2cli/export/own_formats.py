"""Formats of which all is told here: our own layout as safetensors, the released one (`official`, a flat `.pth`); and
as a graph, with images of any size in and class and patch tokens out, ONNX and torch.export, which run it without us.

Shape legend: B images, h x w patches, N = h*w, M x M patches at the native size, R registers, D width, K classes.
"""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from dinov2cli import __version__
from dinov2cli.config.vit import Architecture, ViTOptions
from dinov2cli.errors import WeightsError, need
from dinov2cli.export.bundle import Bundle, Runner, random_images
from dinov2cli.models.classifier import LinearClassifier, head_input, pool_features, read_linear_head
from dinov2cli.models.library_backbone import Backbone
from dinov2cli.models.load import build_from, read_weights
from dinov2cli.models.load.locate import architecture_file
from dinov2cli.models.load.tensor_files import write_tensors
from dinov2cli.models.vision_transformer import VisionTransformer


def write_safetensors(bundle: Bundle, path: Path) -> None:
    """One file that says by itself how many heads the model has and how it resizes position embeddings."""
    provenance = json.dumps({"dino2": __version__, **bundle.provenance})
    write_tensors(bundle.state, path, {"format": "pt", **bundle.metadata, "dino2.provenance": provenance})
    if bundle.head is not None:
        write_tensors(bundle.head.state_dict(), head_path(bundle, path), {"format": "pt"})


def write_official(bundle: Bundle, path: Path) -> None:
    """The released layout. It holds tensors only; what they are stands beside it, in the keys of a run's config."""
    torch.save({name: tensor.clone() for name, tensor in bundle.state.items()}, path)
    if bundle.head is not None:
        torch.save({name: tensor.clone() for name, tensor in bundle.head.state_dict().items()}, head_path(bundle, path))
    architecture = bundle.vit
    student = architecture.model_dump(include={*Architecture._fields, *ViTOptions.model_fields})
    told = {"student": {"arch": architecture.name, **student}, "crops": {"global_crops_size": architecture.img_size}}
    if images := bundle.model.images.beside_weights():
        told["data"] = images
    architecture_file(path).write_text(yaml.safe_dump(told, sort_keys=False))


def open_ours(bundle: Bundle, path: Path) -> Runner:
    """Read a weights file back as anyone would, and insist on the very same bits."""
    weights = read_weights(path)
    if weights.architecture != bundle.architecture:
        raise WeightsError(f"{path.name} reads back as {weights.architecture.describe()}")
    if weights.images != bundle.model.images:
        raise WeightsError(f"{path.name} reads back with other images: {weights.images}")
    changed = [name for name, tensor in bundle.state.items() if not torch.equal(tensor, weights.state[name])]
    if changed:
        raise WeightsError(f"{path.name} reads back with other numbers in {', '.join(changed[:4])}")
    head = read_linear_head(head_path(bundle, path)) if bundle.head is not None else None
    return ExportGraph(build_from(weights), head).eval().named


def head_path(bundle: Bundle, path: Path) -> Path:
    """Where the linear head goes: beside the backbone, named as the released heads are."""
    assert bundle.head is not None
    blocks, _ = head_input(bundle.head.in_features, bundle.model.embed_dim, bundle.model.depth)
    return path.with_name(f"{path.stem}_linear{'4' if blocks == 4 else ''}_head{path.suffix}")


class ExportGraph(nn.Module):
    """What an exported file computes: `images` [B, C, H, W] -> `cls` [B, D], `patches` [B, N, D][, `logits` [B, K]].

    Args:
        backbone: an `ExportableVisionTransformer`, where a graph is made of it.
        head: a linear classifier on the backbone's features, if the file shall classify.
    """

    def __init__(self, backbone: Backbone, head: nn.Linear | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.classifier = LinearClassifier(backbone, head) if head is not None else None
        self.output_names = ["cls", "patches"] + (["logits"] if head is not None else [])

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        blocks = self.classifier.layers if self.classifier is not None else 1
        outputs = self.backbone.get_intermediate_layers(images, n=blocks, return_class_token=True)
        patches, cls = outputs[-1]
        if self.classifier is None:
            return cls, patches
        return cls, patches, self.classifier.linear_head(pool_features(outputs, self.classifier.avgpool))

    def named(self, images: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.output_names, self(images), strict=True))


class ExportableVisionTransformer(VisionTransformer):
    """Resizes position embeddings by two matrix products, whose matrices the graph makes from the image's size.

    PyTorch's bicubic resize, at sizes that are known only when the graph runs, has no faithful counterpart in ONNX
    (antialiasing, the offset). Written as matrices it is plain arithmetic, and one graph serves every size.
    """

    def interpolate_pos_encoding(self, x: Tensor, w: int, h: int) -> Tensor:
        h, w = w // self.patch_size, h // self.patch_size  # the reference's names: the first side is w
        assert self.pos_embed is not None, "rotary positions are no embeddings"
        side = round((self.pos_embed.shape[1] - 1) ** 0.5)
        native = (torch.scalar_tensor(h) == side) & (torch.scalar_tensor(w) == side)
        rows = self._resize_matrix(h, side, native)  # [h, M]
        columns = self._resize_matrix(w, side, native)  # [w, M]
        grid = self.pos_embed[0, 1:].reshape(side, side * self.embed_dim)  # [M, M*D]
        grid = (rows @ grid).reshape(h, side, self.embed_dim)
        grid = (columns @ grid).reshape(1, h * w, self.embed_dim)
        return torch.cat([self.pos_embed[:, :1], grid], dim=1)

    def _resize_matrix(self, target: int, side: int, native: Tensor) -> Tensor:
        """[target, side]: the weight of every native position in every target position."""
        scale = (torch.scalar_tensor(target) + self.config.interpolate_offset) / side
        scale = torch.where(native, torch.ones_like(scale), scale)  # the native size is not interpolated at all
        centre = (torch.arange(target, dtype=torch.float32) + 0.5) / scale - 0.5
        positions = torch.arange(side, dtype=torch.float32)
        if self.config.interpolate_antialias:
            return _antialiased(centre, positions, torch.clamp(1 / scale, min=1.0))
        return _clamped(centre, positions)


def _antialiased(centre: Tensor, positions: Tensor, stretch: Tensor) -> Tensor:
    """Cubic filter (a = -0.5), widened when shrinking, cut at the border and normalised: PyTorch's antialias=True."""
    weights = _cubic(((positions - centre[:, None]) / stretch).abs(), a=-0.5)
    return weights / weights.sum(dim=1, keepdim=True)


def _clamped(centre: Tensor, positions: Tensor) -> Tensor:
    """Cubic filter (a = -0.75) on four neighbours, the border repeated: PyTorch's antialias=False."""
    first = centre.floor()
    matrix = torch.zeros_like(positions) * centre[:, None]
    for tap in (-1, 0, 1, 2):
        neighbour = torch.clamp(first + tap, min=0, max=positions.shape[0] - 1)
        weight = _cubic((first + tap - centre).abs(), a=-0.75)
        matrix = matrix + torch.where(positions == neighbour[:, None], weight[:, None], torch.zeros_like(matrix))
    return matrix


def _cubic(x: Tensor, a: float) -> Tensor:
    """Keys' cubic convolution kernel at distances x >= 0."""
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


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
