"""Options that submit a command to Slurm instead of running it here; any one of them does."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperArgument, TyperOption

from dinov2cli.launch.environment import is_worker

if TYPE_CHECKING:
    from dinov2cli.launch.slurm import Wanted

SLURM = "Slurm (any of these submits a job)"

Nodes = Annotated[
    int | None,
    typer.Option("--nodes", min=1, metavar="N", rich_help_panel=SLURM, help="Submit to Slurm, on N machines [1]."),
]
Partition = Annotated[str | None, typer.Option("--partition", rich_help_panel=SLURM, help="Partition [Slurm's].")]
Account = Annotated[str | None, typer.Option("--account", rich_help_panel=SLURM, help="Account to charge.")]
Qos = Annotated[str | None, typer.Option("--qos", rich_help_panel=SLURM, help="Quality of service.")]
Constraint = Annotated[
    str | None, typer.Option("--constraint", rich_help_panel=SLURM, help="Features that the machines must have.")
]
Exclude = Annotated[str | None, typer.Option("--exclude", rich_help_panel=SLURM, help="Machines not to use.")]
Comment = Annotated[str | None, typer.Option("--comment", rich_help_panel=SLURM, help="A comment for the queue.")]
TimeoutMin = Annotated[
    int | None,
    typer.Option(
        "--timeout-min", min=1, metavar="M", rich_help_panel=SLURM,
        help="Time limit in minutes [1440]. Before it, the job saves and queues itself again, until it is done.",
    ),
]  # fmt: skip
CpusPerTask = Annotated[
    int | None,
    typer.Option("--cpus-per-task", min=1, rich_help_panel=SLURM, help="Cores on each machine [8 for each GPU]."),
]
Mem = Annotated[str | None, typer.Option("--mem", rich_help_panel=SLURM, help="Memory on each machine, as 500G.")]
Slurm = Annotated[
    list[str] | None,
    typer.Option(
        "--slurm", metavar="KEY=VALUE", rich_help_panel=SLURM,
        help="Any other parameter of sbatch, as reservation=R or exclusive=true; may be repeated.",
    ),
]  # fmt: skip
Setup = Annotated[
    list[str] | None,
    typer.Option(
        "--setup", metavar="LINE", rich_help_panel=SLURM,
        help="A shell line to run in the job first, as 'module load cuda'; may be repeated.",
    ),
]  # fmt: skip

GpusEach = Annotated[
    int | None,
    typer.Option("--gpus", min=1, metavar="N", help="Processes, each on a GPU of its own (or --device cpu) [1]."),
]

# The parameters above by their names in a command's function: what only launches, and is no business of the processes.
LAUNCH = frozenset({
    "nodes", "partition", "account", "qos", "constraint", "exclude", "comment", "timeout_min", "cpus_per_task", "mem",
    "slurm", "setup",
})  # fmt: skip


def given_slurm_options(context: typer.Context, *, gpus: int, cpu: bool) -> "Wanted | None":
    """What the command line asks of Slurm, or None where it does not mention it."""
    given = {name: context.params[name] for name in LAUNCH if context.params.get(name) not in (None, [], ())}
    if not given:
        return None
    from dinov2cli.launch.slurm import Wanted
    from dinov2cli.requests.launch import Slurm

    return Wanted(Slurm(parameters=given.pop("slurm", ()), **given), gpus, cpu)


def launched_evaluation(
    context: typer.Context, checkpoint: str, *, gpus: int | None, device: str | None, output_dir: Path | None
) -> bool:
    """Start an evaluation in other processes, as a job or here, if its command line says so; whether it did.

    Args:
        context: of the command.
        checkpoint: what is evaluated, whose run gets the job's folder.
        gpus: processes on each machine; 1 if not said.
        device: `--device`; "cpu" asks for no GPU.
        output_dir: gets the job's folder where given.
    """
    if is_worker():
        return False
    words = words_of(context, without={*LAUNCH, "gpus"})
    if (options := given_slurm_options(context, gpus=gpus or 1, cpu=device == "cpu")) is not None:
        from dinov2cli.launch import slurm

        folder = output_dir or run_of(Path(checkpoint)) or Path()
        name = f"dino2-{context.info_name}"
        print(slurm.submit(words, options, folder=folder.absolute() / "slurm", name=name))
        return True
    if gpus is None or gpus == 1:
        return False
    from dinov2cli.launch.local import launch_local, processes_here

    launch_local(words, processes_here(gpus, cpu=device == "cpu"), None)
    return True


def run_of(checkpoint: Path) -> Path | None:
    """The run folder that a checkpoint's path is in."""
    places = [checkpoint, *checkpoint.absolute().parents]
    return next((place for place in places if (place / "config.yaml").exists()), None)


def words_of(context: typer.Context, without: Iterable[str]) -> list[str]:
    """The command line as it was typed, from the subcommand on, less the parameters named."""
    words = command_words(context)
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name in without or source is None or source.name != "COMMANDLINE":
            continue
        value = context.params[parameter.name or ""]
        values = value if isinstance(value, list | tuple) else [value]
        if isinstance(parameter, TyperArgument):
            words += [str(each) for each in values]
        elif isinstance(parameter, TyperOption) and parameter.is_flag:
            words += [(parameter.opts if value else parameter.secondary_opts)[0]]
        else:
            words += [word for each in values for word in (parameter.opts[0], str(each))]
    return words


def command_words(context: Any) -> list[str]:
    """`["eval", "knn"]` for `dino2 eval knn`, whatever the executable is called."""
    return [*command_words(context.parent), context.info_name] if context.parent is not None else []
