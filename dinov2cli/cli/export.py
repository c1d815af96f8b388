"""`dino2 export`: a model for other ecosystems, compared there before it counts."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dinov2cli.errors import WeightsError

if TYPE_CHECKING:
    from dinov2cli.export.exporter import ExportResult


class Format(StrEnum):
    """What to write."""

    SAFETENSORS = "safetensors"
    OFFICIAL = "official"
    HF = "hf"
    TIMM = "timm"
    ONNX = "onnx"
    TORCH_EXPORT = "torch-export"


def export(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CKPT",
            help="A run folder, teacher checkpoint, weights file, Hugging Face folder, URL "
            "or released name; a name ending in _lc brings its linear head.",
        ),
    ],
    output_format: Annotated[
        Format,
        typer.Option(
            "--format",
            help="safetensors: our weights; official: a flat .pth as released; hf: a folder for "
            "transformers; timm: a .safetensors for timm; onnx; torch-export: a .pt2.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", metavar="PATH", help="The file to write (hf: the folder).")],
    linear_head: Annotated[
        Path | None,
        typer.Option("--linear-head", metavar="FILE", help="A linear classifier (weight and bias) to go along."),
    ] = None,
    layers: Annotated[int, typer.Option("--layers", help="Released head of a _lc name: on 1 or 4 layers.")] = 4,
    image_size: Annotated[
        str | None,
        typer.Option(
            "--image-size",
            metavar="H[xW]",
            help="onnx, torch-export: one image size only. By default any "
            "size that is a multiple of the patch size, two patches or more.",
        ),
    ] = None,
    opset: Annotated[int, typer.Option("--opset", min=18, max=23, help="onnx: operator set.")] = 18,
    config_file: Annotated[
        Path | None,
        typer.Option("--config-file", metavar="YAML", help="The run's config.yaml, if it does not lie beside CKPT."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write a model in another format, and check that it gives the same features there.

    The export is opened by its own ecosystem (transformers, timm, onnxruntime, torch.export), run on random images at
    two sizes, and compared. If the features differ, nothing is left behind.

    Example:

        dino2 export runs/demo --format hf --output demo-hf

        dino2 export dinov2_vits14_reg --format onnx --output vits14_reg.onnx
    """  # fmt: skip
    from dinov2cli.console import print_json
    from dinov2cli.export.exporter import export_model

    result = export_model(
        checkpoint,
        output_format.value,
        output,
        linear_head=linear_head,
        layers=layers,
        image_size=_parse_size(image_size),
        opset=opset,
        config_file=config_file,
        overwrite=overwrite,
    )
    if as_json:
        print_json(result.as_dict())
    else:
        _print(result)


def _parse_size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    sides = text.lower().split("x")
    if not all(side.isdecimal() for side in sides) or len(sides) > 2:
        raise WeightsError(f"--image-size {text}: give a side in pixels such as 224, or HxW such as 224x448")
    return int(sides[0]), int(sides[-1])


def _print(result: "ExportResult") -> None:
    from dinov2cli.console import out
    from dinov2cli.export.exporter import FORMATS

    def line(text: str) -> None:
        out.print(text, markup=False, highlight=False, soft_wrap=True)

    line(result.architecture)
    for note in result.notes:
        line(note)
    opened_with = FORMATS[result.format].opened_with
    for comparison in result.comparisons:
        batch, _, height, width = comparison.shape
        line(
            f"{opened_with}, {batch} x {height}x{width}: largest difference {comparison.difference:.2e} "
            f"(features up to {comparison.scale:.1f})"
        )
    for file, size in result.files.items():
        line(f"wrote {file} ({size / 1e6:,.1f} MB)")
