"""`dino2 info`: what a checkpoint is."""

from pathlib import Path
from typing import Annotated, Any

import typer


def info(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CKPT",
            help="A run folder, teacher checkpoint, weights file, Hugging Face folder, URL or released name.",
        ),
    ],
    config_file: Annotated[
        Path | None,
        typer.Option("--config-file", metavar="YAML", help="The run's config.yaml, if it does not lie beside CKPT."),
    ] = None,
    digest: Annotated[bool, typer.Option("--sha256", help="Also compute the files' SHA-256.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what a checkpoint is: architecture, parameters, layout, training state, provenance.

    The weights are read and checked as for loading them; what is no DINOv2 backbone is refused, and named.

    Example:

        dino2 info runs/demo
    """  # fmt: skip
    from dinov2cli.console import print_json
    from dinov2cli.export.description import describe

    found = describe(checkpoint, config_file=config_file, digest=digest)
    if as_json:
        print_json(found)
    else:
        _print(found)


def _print(found: dict[str, Any]) -> None:
    from rich.table import Table

    from dinov2cli.console import out

    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(overflow="fold")
    rows = {
        "model": found["what"],
        "parameters": f"{found['parameters']:,}",
        "released as": found.get("released"),
        "file": ", ".join(found["files"]),
        "size": f"{found['bytes'] / 1e6:,.1f} MB, {found['layout']} layout, {found['tensors_read']} tensors",
        "left out": f"{len(found['left_out'])} tensors ({_groups(found['left_out'])})" if found["left_out"] else None,
        "position embeddings": _interpolation(found["architecture"]),
        "sha256": found.get("sha256"),
        **{f"training {key.replace('_', ' ')}": _short(value) for key, value in found["training"].items()},
        **{f"provenance {key}": value for key, value in found["provenance"].items()},
        "notes": "; ".join(found["notes"]) or None,
    }
    for name, value in rows.items():
        if value is not None:
            table.add_row(name, str(value))
    out.print(table, markup=False, highlight=False)


def _groups(names: list[str]) -> str:
    return ", ".join(sorted({name.split(".")[0] for name in names}))


def _interpolation(architecture: dict[str, Any]) -> str:
    how = f"offset {architecture['interpolate_offset']}, antialias {architecture['interpolate_antialias']}"
    return f"for {architecture['img_size']}x{architecture['img_size']} pixels; elsewhere resized with {how}"


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        shown = {key: round(item, 4) if isinstance(item, float) else item for key, item in value.items()}
        return ", ".join(f"{key} {item}" for key, item in list(shown.items())[:8])
    return value
