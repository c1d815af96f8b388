"""The `dino2` executable: the table of commands; errors become one message and an exit code."""

import _thread
import atexit
import contextlib
import os
import signal
import sys
import threading
from typing import Annotated, Any, NoReturn

import typer

from dinov2cli import __version__
from dinov2cli.cli.command import add_command, perform, request_from
from dinov2cli.cli.refusals import GroupOfCommands
from dinov2cli.cli.tree import Command, command_tree
from dinov2cli.errors import Dino2Error
from dinov2cli.launch.environment import worker_rank
from dinov2cli.launch.notes import end_with_supervisor, reported
from dinov2cli.requests import bench, curate, datasets, eval, export, pictures, search, tools, train
from dinov2cli.requests.base import Request
from dinov2cli.requests.protocols import EVALUATIONS

# What can be asked, in the order of --help. Nothing here imports torch.
REQUESTS: tuple[type[Request], ...] = (
    tools.PrepareImagenetRequest,
    train.TrainRequest,
    tools.StatusRequest,
    eval.EmbedRequest,
    tools.ResultsRequest,
    export.ExportRequest,
    tools.InfoRequest,
    pictures.PcaVideoRequest,
    pictures.PcaImageRequest,
    pictures.AttentionRequest,
    pictures.DepthMapsRequest,
    pictures.SegmentRequest,
    curate.CurateRequest,
    tools.PlotRequest,
    tools.DoctorRequest,
    *EVALUATIONS.values(),
    search.SearchBuildRequest,
    search.SearchAddRequest,
    search.SearchRemoveRequest,
    search.SearchQueryRequest,
    search.SearchInfoRequest,
    datasets.ListDatasetsRequest,
    datasets.ShowDatasetRequest,
    datasets.AddDatasetRequest,
    datasets.ForgetDatasetRequest,
    datasets.DatasetStatsRequest,
    tools.ListPresetsRequest,
    tools.ShowPresetRequest,
    bench.BenchTrainRequest,
    bench.BenchExtractRequest,
    bench.BenchKnnRequest,
    bench.BenchLogregRequest,
    bench.BenchLinearRequest,
    bench.BenchAugmentRequest,
    bench.BenchGpuRequest,
)
# The words of each command; those of evaluations also without `eval`, where no other command has that name.
COMMANDS: dict[str, type[Request]] = {it.command: it for it in REQUESTS}
COMMANDS |= {name: it for name, it in EVALUATIONS.items() if name not in COMMANDS}
# The first of two words, with its help.
GROUPS = {
    "eval": "Evaluate frozen features: k-NN, logistic regression, linear probe, retrieval, segmentation, depth.\n\n"
    "Example:\n\n    dino2 eval knn runs/demo",
    "search": "Find alike images: keep an index of their features, and ask it.\n\n"
    "Example:\n\n    dino2 search query photos.index dog.jpg --sheet dogs.html",
    "datasets": "Give datasets a name, by which every command takes them; see what has one, and measure what is in it."
    "\n\n"
    "Example:\n\n    dino2 datasets list",
    "presets": "List the presets that come with dino2, or show what is in one.\n\nExample:\n\n    dino2 presets list",
    "bench": "Measure how fast the parts of dino2 run on this machine.\n\nExample:\n\n    dino2 bench augment",
}
HELP = "DINOv2 self-supervised visual features on your own images: pretrain, evaluate, export, see."


def make_app(group: Command) -> typer.Typer:
    """A group of commands, those of the groups in it included."""
    app = typer.Typer(
        name=group.path[-1],
        cls=GroupOfCommands,
        help=group.help,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for name, command in group.commands.items():
        if command.request:
            add_command(app, name, command.request)
        else:
            app.add_typer(make_app(command))
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"dino2 {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool,
        typer.Option("--version", "-V", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    pass


TREE = command_tree(COMMANDS, GROUPS, HELP)
app = make_app(TREE)
app.callback()(_root)


def main(argv: list[str] | None = None) -> None:
    """Run the command line. Exit codes: 0 done, 2 the user's input, 1 a failure of ours, 130 interrupted.

    As the process's own command (without `argv`) it ends the process, and does not return.
    """
    code: str | int | None = 0
    if argv is None:
        sys.unraisablehook = _again
    try:
        run_words(sys.argv[1:] if argv is None else argv)
    except SystemExit as stop:
        if argv is not None:
            raise
        code = stop.code
    if argv is None:  # not above: there the exception still holds what the command was using, loaders among it
        leave(code)


def _again(dropped: Any) -> None:
    """A Ctrl-C that Python drops, with a traceback, as it came in a finaliser, comes again a moment later."""
    if not isinstance(dropped.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(dropped)
        return
    timer = threading.Timer(0.02, _thread.interrupt_main)
    timer.daemon = True
    timer.start()


def leave(code: str | int | None) -> NoReturn:
    """End this process at once: to take down what PyTorch has set up takes Python one to three seconds.

    Threads that must not be cut off are waited for, and what is registered for the end is done.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # it ends already
    # Not by joining them here: an executor's idle threads, which an error's traceback may keep, end only when told to.
    threading._shutdown()  # type: ignore[attr-defined]
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # by which torch tells of loaders that end, as these now do
    if multiprocessing := sys.modules.get("multiprocessing"):
        for child in multiprocessing.active_children():
            if child.daemon:
                child.kill()  # loader processes leave SIGTERM to us, and multiprocessing would wait for them for ever
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a reader that has gone, a stream that is closed
            stream.flush()
    os._exit(code if isinstance(code, int) else 1 if code else 0)


def run_words(words: list[str]) -> None:
    """Do what the words say; SystemExit with the exit code.

    `--request JSON`, by which dino2 starts its processes, stands for the words that were typed.

    One of several processes says nothing of an error that all of them raise, unless it is the first; started by dino2
    itself, it leaves a note instead, and the command that was typed speaks for all.
    """
    end_with_supervisor()
    try:
        with reported():
            if words[:1] == ["--request"]:
                perform(request_from(words[1], REQUESTS))
            else:
                app(words, prog_name="dino2")
    except Dino2Error as error:
        if worker_rank() == 0:
            from dinov2cli.console import Manner, err

            if Manner.verbose:
                err.print_exception()
            err.print(f"error: {error.message}", style="bold red", markup=False, highlight=False, soft_wrap=True)
            if error.hint:
                err.print(error.hint, markup=False, highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
