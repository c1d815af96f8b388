"""Export a model: write aside, open in its own ecosystem, compare on random images, and only then move into place."""

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from dinov2cli.config.library import LibraryConfig
from dinov2cli.console import progress
from dinov2cli.data.transforms import usual_size
from dinov2cli.errors import Dino2Error, EnvironmentProblem, WeightsError, check_all
from dinov2cli.export import huggingface, own_formats, timm
from dinov2cli.export.bundle import Bundle, Runner, random_images
from dinov2cli.files import check_folder, sha256
from dinov2cli.models.classifier import check_head, head_input, read_linear_head
from dinov2cli.models.load import RecognisedWeights, at_size, build_from, layouts, read_weights
from dinov2cli.models.load.locate import architecture_file, check_there
from dinov2cli.models.load.released import RELEASED
from dinov2cli.requests.export import ExportRequest


class Format(NamedTuple):
    """How a format is written and opened.

    Args:
        write: makes the file or folder.
        open: opens it as its own ecosystem does; raises EnvironmentProblem where that is not installed.
        tolerance: largest difference allowed, relative to the largest feature if that is above 1.
        suffixes: what the output's name may end in, "" for a folder.
        opened_with: for people.
        resizes_otherwise: why features of a vision transformer may differ at other sizes, if the ecosystem resizes in
            its own way.
        how_to_open: a line of Python, where it is not plain.
    """

    write: Callable[[Bundle, Path], None]
    open: Callable[[Bundle, Path], Runner]
    tolerance: float
    suffixes: tuple[str, ...]
    opened_with: str
    resizes_otherwise: Callable[[Any], str | None] = lambda config: None
    how_to_open: Callable[[Bundle, Path], str | None] = lambda bundle, path: None


FORMATS: dict[str, Format] = {
    "safetensors": Format(own_formats.write_safetensors, own_formats.open_ours, 0.0, (".safetensors",), "dino2"),
    "official": Format(own_formats.write_official, own_formats.open_ours, 0.0, (".pth", ".pt"), "dino2"),
    "hf": Format(
        huggingface.write,
        huggingface.open_,
        1e-4,
        ("",),
        "transformers",
        layouts.huggingface.resizes_otherwise,
        huggingface.how_to_open,
    ),
    "timm": Format(
        timm.write, timm.open_, 1e-4, (".safetensors", ""), "timm", layouts.timm.resizes_otherwise, timm.how_to_open
    ),
    "onnx": Format(own_formats.write_onnx, own_formats.open_onnx, 1e-4, (".onnx",), "onnxruntime"),
    "torch-export": Format(
        own_formats.write_torch_export, own_formats.open_torch_export, 1e-4, (".pt2",), "torch.export"
    ),
}
IN_A_FOLDER = ("config.json", "model", "preprocessor_config.json")
"""How the names begin of what is in a folder that was exported."""
GRAPHS = ("onnx", "torch-export")
"""Formats whose files compute by themselves, at one image size where that is asked for."""


@dataclass(frozen=True)
class Comparison:
    """Largest difference between an export and our model on one batch of random images.

    Args:
        shape: [B, C, H, W] of the images.
        difference: largest absolute difference of any output.
        scale: largest absolute value of our outputs.
        binding: whether the tolerance applies.
    """

    shape: tuple[int, ...]
    difference: float
    scale: float
    binding: bool = True


@dataclass
class ExportResult:
    """What was written, and how well it agrees."""

    format: str
    output: str
    architecture: str
    files: dict[str, int] = field(default_factory=dict)
    comparisons: list[Comparison] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines, opened_with = [self.architecture, *self.notes], FORMATS[self.format].opened_with
        for comparison in self.comparisons:
            batch, _, height, width = comparison.shape
            lines.append(
                f"{opened_with}, {batch} x {height}x{width}: largest difference {comparison.difference:.2e} "
                f"(features up to {comparison.scale:.1f})"
            )
        return "\n".join([*lines, *(f"wrote {file} ({size / 1e6:,.1f} MB)" for file, size in self.files.items())])


def run(request: ExportRequest) -> ExportResult:
    """Write the model in another format, once it has been opened there and found to give the same features.

    Raises:
        Dino2Error: bad input, a model that the format cannot hold, or outputs that differ. Nothing is left then.
    """
    chosen, output = FORMATS[request.format], request.output
    check_all(
        lambda: check_there(request.checkpoint),
        lambda: check_head(request.linear_head, "--linear-head") if request.linear_head else None,
        lambda: _check_output(request, chosen.suffixes),
    )
    released = RELEASED.get(request.checkpoint)
    name = request.checkpoint.removesuffix("_lc") if released else request.checkpoint
    weights = read_weights(name, config_file=request.config_file)
    head = read_linear_head(request.linear_head) if request.linear_head else None
    if head is None and released and released.classifier:
        head = read_linear_head(released.name, request.layers)
    if isinstance(weights.architecture, LibraryConfig):
        _check_library_format(request, weights.architecture, has_head=head is not None)
    bundle = _bundle(weights, head, request)
    result = ExportResult(request.format, str(output), weights.architecture.describe(), notes=weights.report.lines())
    output.parent.mkdir(parents=True, exist_ok=True)
    # Written beside the output, so that moving it there is a rename.
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as aside, progress() as bar:
        staged = Path(aside) / output.name
        step = bar.add_task(f"writing {request.format}", total=2)
        chosen.write(bundle, staged)
        bar.update(step, description="comparing with the model", advance=1)
        result.comparisons = _compare(bundle, chosen, staged, result)
        bar.advance(step)
        result.files = _move_into_place(Path(aside), output, request.overwrite)
    if how := chosen.how_to_open(bundle, output):
        result.notes.append(f"open with {how}")
    return result


def compare(bundle: Bundle, run: Runner, shape: tuple[int, int, int], *, binding: bool = True) -> Comparison:
    """The largest difference between `run` and our model on random images of `shape` (batch, height, width)."""
    images = random_images(bundle.architecture, *shape)
    with torch.no_grad():
        ours, theirs = own_formats.ExportGraph(bundle.model, bundle.head).eval().named(images), run(images)
    shapes = [{name: tensor.shape for name, tensor in outputs.items()} for outputs in (ours, theirs)]
    assert shapes[0] == shapes[1], shapes
    difference = max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
    scale = max(float(ours[name].abs().max()) for name in ours)
    return Comparison(tuple(images.shape), difference, scale, binding)


def _compare(bundle: Bundle, chosen: Format, staged: Path, result: ExportResult) -> list[Comparison]:
    try:
        run = chosen.open(bundle, staged)
    except EnvironmentProblem as problem:
        result.notes.append(f"NOT compared: {problem.message}")
        return []
    comparisons = []
    differs = None if bundle.library else chosen.resizes_otherwise(bundle.architecture)
    for i, shape in enumerate(_shapes(bundle)):
        binding = i == 0 or differs is None
        comparison = compare(bundle, run, shape, binding=binding)
        comparisons.append(comparison)
        limit = chosen.tolerance * max(1.0, comparison.scale)
        if not comparison.difference <= limit and binding:  # a NaN is no agreement either
            raise ExportError(
                f"{chosen.opened_with} gives other features than dino2: they differ by {comparison.difference:.2e} on "
                f"images {list(comparison.shape)}, {limit:.2e} is allowed; nothing was written"
            )
    if differs:
        side, native = usual_size(bundle.architecture), bundle.architecture.img_size
        remedy = f"; --image-size {side}, the size at which dino2 evaluates, leaves no difference there"
        result.notes.append(
            f"away from {native} pixels the features differ: {differs}{'' if side == native else remedy}"
        )
    return comparisons


class ExportError(Dino2Error):
    """An export that does not give the model's features."""

    exit_code = 1


def _shapes(bundle: Bundle) -> tuple[tuple[int, int, int], ...]:
    """(batch, height, width) to compare at: the native size first, then another size and batch."""
    if bundle.image_size is not None:
        return (1, *bundle.image_size), (3, *bundle.image_size)
    patch, grid = bundle.architecture.patch_size, bundle.architecture.grid
    native = bundle.architecture.img_size
    return (1, native, native), (2, patch * max(2, grid // 2), patch * (grid // 3 + 3))


def _bundle(weights: RecognisedWeights, head: nn.Linear | None, request: ExportRequest) -> Bundle:
    architecture, image_size = weights.architecture, request.size()
    if image_size is not None:
        size = f"image size {image_size[0]}x{image_size[1]}"
        if any(side < 1 or side % architecture.patch_size for side in image_size):
            raise WeightsError(f"{size}: both must be multiples of patch size {architecture.patch_size}")
        if request.format not in GRAPHS:
            if image_size[0] != image_size[1]:
                raise WeightsError(f"{size}: format {request.format} has position embeddings for square images only")
            weights = at_size(weights, image_size[0])
            architecture, image_size = weights.architecture, None
    provenance = {
        "source": weights.source.name.rsplit("/", 1)[-1],
        "source_sha256": sha256(*weights.source.files),
        "iteration": weights.source.iteration,
    }
    model = build_from(weights).eval().requires_grad_(False)
    if head is not None:
        head_input(head.in_features, model.embed_dim, model.depth)
    return Bundle(weights.state, architecture, model, head, provenance, image_size, request.opset)


def _check_library_format(request: ExportRequest, architecture: LibraryConfig, *, has_head: bool) -> None:
    """Raise WeightsError where the format does not hold a backbone of another library, or not with what goes along."""
    name, arch, possible = request.format, architecture.arch, ("safetensors", architecture.library)
    if name not in possible:
        raise WeightsError(f"format {name} does not hold {arch}; {' and '.join(possible)} do")
    if has_head and name != "safetensors":
        raise WeightsError(f"--linear-head does not go along with {arch} in format {name}")
    if request.image_size is not None:
        raise WeightsError(f"--image-size {request.image_size}: {arch} takes images of any size as it is")


def _check_output(request: ExportRequest, suffixes: tuple[str, ...]) -> None:
    output, name = request.output, request.format
    check_folder(output.absolute().parent, "--output")
    if output.exists() and not request.overwrite:
        raise WeightsError(f"{output} exists; --overwrite replaces it")
    names = sorted(path.name for path in output.iterdir()) if output.is_dir() else []
    if other := next((name for name in names if not name.startswith(IN_A_FOLDER)), None):
        raise WeightsError(
            f"{output} holds what no export has written ({other}), and is not replaced; name a new folder"
        )
    if "" not in suffixes and output.is_dir():
        raise WeightsError(f"{output} is a folder; format {name} writes a file")
    if suffixes == ("",):  # a folder may have dots in its name
        if output.is_file():
            raise WeightsError(f"{output} is a file; format {name} writes a folder")
    elif output.suffix not in suffixes:
        ends = " or ".join(filter(None, suffixes))
        folder = " (or, for a folder, in no suffix)" if "" in suffixes else ""
        raise WeightsError(f"{output}: format {name} writes a file that ends in {ends}{folder}")


def _move_into_place(aside: Path, output: Path, overwrite: bool) -> dict[str, int]:
    """Move all that was written beside `output`, which comes last: once it is there, all is. Paths and bytes."""
    parts = sorted(aside.iterdir(), key=lambda part: part.name == output.name)
    targets = [output.parent / part.name for part in parts]
    for target in targets:
        if target.exists() and not overwrite:
            raise WeightsError(f"{target} exists; --overwrite replaces it")
    if architecture_file(output) not in targets:
        architecture_file(output).unlink(missing_ok=True)  # of an earlier model under this name
    for part, target in zip(parts, targets, strict=True):
        if part.is_dir() and target.exists():
            shutil.rmtree(target)
        os.replace(part, target)
    return {str(target): _size(target) for target in targets}


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*")) if path.is_dir() else path.stat().st_size
