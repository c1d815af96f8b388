"""Where a command runs: processes of this machine, or a Slurm job."""

from typing import Annotated

from dinov2cli.requests.base import AtLeastOne, Group, Option

GPUS_PER_NODE = 8
_PANEL = "Slurm (any of these submits a job)"


class Slurm(Group):
    """What to ask of Slurm; a command with any of these options is submitted instead of run here."""

    nodes: Annotated[AtLeastOne | None, Option("Submit to Slurm, on N machines [1].", metavar="N", panel=_PANEL)] = None
    partition: Annotated[str | None, Option("Partition [Slurm's].", panel=_PANEL)] = None
    account: Annotated[str | None, Option("Account to charge.", panel=_PANEL)] = None
    qos: Annotated[str | None, Option("Quality of service.", panel=_PANEL)] = None
    constraint: Annotated[str | None, Option("Features that the machines must have.", panel=_PANEL)] = None
    exclude: Annotated[str | None, Option("Machines not to use.", panel=_PANEL)] = None
    comment: Annotated[str | None, Option("A comment for the queue.", panel=_PANEL)] = None
    timeout_min: Annotated[
        AtLeastOne | None,
        Option(
            "Time limit in minutes [1440]. Before it, the job saves and queues itself again, until it is done.",
            metavar="M",
            panel=_PANEL,
        ),
    ] = None
    cpus_per_task: Annotated[AtLeastOne | None, Option("Cores on each machine [8 for each GPU].", panel=_PANEL)] = None
    mem: Annotated[str | None, Option("Memory on each machine, as 500G.", panel=_PANEL)] = None
    parameters: Annotated[
        tuple[str, ...],
        Option(
            "Any other parameter of sbatch, as reservation=R or exclusive=true; may be repeated.",
            flags="--slurm",
            metavar="KEY=VALUE",
            panel=_PANEL,
            one_each=True,
        ),
    ] = ()
    setup: Annotated[
        tuple[str, ...],
        Option(
            "A shell line to run in the job first, as 'module load cuda'; may be repeated.",
            metavar="LINE",
            panel=_PANEL,
            one_each=True,
        ),
    ] = ()

    @property
    def is_asked(self) -> bool:
        """Whether any of the options is given."""
        return any(value not in (None, ()) for value in self.__dict__.values())


Gpus = Annotated[
    AtLeastOne | None, Option("Processes, each on a GPU of its own (or --device cpu) [1].", metavar="N", last=True)
]
"""The field `gpus` of commands that run in one process unless they are told otherwise."""
