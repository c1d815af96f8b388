"""`dino2 presets`: which configurations come with dino2, and what is in them."""

from typing import Annotated

import typer

from dinov2cli.cli.completion import complete_preset
from dinov2cli.config import annotated_yaml, find_preset, list_presets, load_config
from dinov2cli.console import out, print_json

presets = typer.Typer(
    name="presets",
    help="List the presets that come with dino2, or show what is in one.\n\nExample:\n\n    dino2 presets list",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


@presets.command("list")
def list_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """List the presets, with what each is for.

    Example:

        dino2 presets list
    """
    found = list_presets()
    if as_json:
        print_json({"presets": [{"name": p.name, "kind": p.kind, "summary": p.summary, "path": p.path} for p in found]})
        return
    from rich import box
    from rich.table import Table

    table = Table("preset", "for", "what it is", box=box.SIMPLE_HEAD, pad_edge=False)
    for preset in found:
        table.add_row(preset.name, preset.kind, preset.summary)
    out.print(table, markup=False)


@presets.command("show")
def show_command(
    name: Annotated[
        str,
        typer.Argument(help="Name of a preset, as `dino2 presets list` prints it.", autocompletion=complete_preset),
    ],
    full: Annotated[
        bool,
        typer.Option("--full", help="Print every key, with its meaning and what it takes, not only the differences."),
    ] = False,
) -> None:
    """Print a preset as YAML: its difference from the defaults, or everything.

    Example:

        dino2 presets show demo > mine.yaml

        dino2 train --config-file mine.yaml --output-dir RUN
    """
    preset = find_preset(name)
    text = preset.text
    if full:
        opening = "".join(f"# {line}".rstrip() + "\n" for line in preset.comment)
        text = opening + annotated_yaml(load_config(preset=preset.name))
    if not out.is_terminal:
        print(text, end="")
        return
    from rich.syntax import Syntax

    # As text with soft wrapping: a long command in a comment stays one line when it is copied.
    coloured = Syntax("", "yaml", theme="ansi_dark", background_color="default").highlight(text)
    out.print(coloured, soft_wrap=True, end="")
