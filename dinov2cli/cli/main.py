"""The `dino2` executable: gathers the commands and turns errors into one message and an exit code."""

import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from dinov2cli import __version__
from dinov2cli.cli.attention import attention
from dinov2cli.cli.bench import bench
from dinov2cli.cli.doctor import doctor
from dinov2cli.cli.embed import embed
from dinov2cli.cli.eval import evaluation
from dinov2cli.cli.export import export
from dinov2cli.cli.info import info
from dinov2cli.cli.pca_image import pca_image
from dinov2cli.cli.pca_video import pca_video
from dinov2cli.cli.plot import plot
from dinov2cli.cli.prepare_imagenet import prepare_imagenet
from dinov2cli.cli.presets import presets
from dinov2cli.cli.results import results
from dinov2cli.cli.status import status
from dinov2cli.cli.train import train
from dinov2cli.errors import Dino2Error
from dinov2cli.launch.environment import worker_rank
from dinov2cli.launch.notes import end_with_supervisor, reported

app = typer.Typer(
    name="dino2",
    help="DINOv2 self-supervised visual features on your own images: pretrain, evaluate, export, see.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Commands of the top level, in the order of --help: name -> function. Their modules import no torch.
COMMANDS: dict[str, Callable[..., Any]] = {
    "prepare-imagenet": prepare_imagenet,
    "train": train,
    "status": status,
    "embed": embed,
    "results": results,
    "export": export,
    "info": info,
    "pca-video": pca_video,
    "pca-image": pca_image,
    "attention": attention,
    "plot": plot,
    "doctor": doctor,
}
# Groups of commands: name -> Typer app.
GROUPS: dict[str, typer.Typer] = {
    "eval": evaluation,
    "presets": presets,
    "bench": bench,
}

for _name, _function in COMMANDS.items():
    app.command(_name)(_function)
for _name, _group in GROUPS.items():
    app.add_typer(_group, name=_name)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"dino2 {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main(argv: list[str] | None = None) -> None:
    """Run the command line. Exit codes: 0 done, 2 the user's input, 1 a failure of ours, 130 interrupted.

    One of several processes says nothing of an error that all of them raise, unless it is the first; started by dino2
    itself, it leaves a note instead, and the command that was typed speaks for all.
    """
    end_with_supervisor()
    try:
        with reported():
            app(argv)
    except Dino2Error as error:
        if worker_rank() > 0:
            sys.exit(error.exit_code)
        from dinov2cli.console import err

        err.print(f"error: {error.message}", style="bold red", markup=False, highlight=False, soft_wrap=True)
        if error.hint:
            err.print(error.hint, markup=False, highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
