"""`dino2 plot`: curves of runs."""

from pathlib import Path
from typing import Annotated

import typer


def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders; their curves are overlaid.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="A .png or a self-contained .html. Default: plot.png in the first run."),
    ] = None,
    smooth: Annotated[
        int, typer.Option("--smooth", min=1, help="Logged points in the moving mean drawn over the raw curve.")
    ] = 1,
) -> None:
    """Plot losses, schedules, monitors and evaluation scores of one or several runs.

    Reads what training and evaluation wrote into the run folders; a run may still be going on. Needs matplotlib:
    `pip install 'dinov2cli[plots]'`.

    Example:

        dino2 plot runs/baseline runs/larger-lr --output compare.html --smooth 20
    """
    from dinov2cli.console import out
    from dinov2cli.visualize.run_plot import plot_runs, read_run

    target = output or (runs[0] if runs[0].is_dir() else runs[0].parent) / "plot.png"
    plot_runs([read_run(path) for path in runs], target, smooth=smooth)
    out.print(str(target), markup=False, highlight=False, soft_wrap=True)
