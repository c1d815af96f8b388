"""Where a command runs: processes of this machine, or a Slurm job."""

from dinov2cli.requests.base import AtLeastOne, Group, option

GPUS_PER_NODE = 8


class Slurm(Group):
    """What to ask of Slurm; a command with any of these options is submitted instead of run here."""

    panel = "Slurm (any of these submits a job)"

    nodes: AtLeastOne | None = option(None, "Submit to Slurm, on N machines [1].", metavar="N")
    partition: str | None = option(None, "Partition [Slurm's].")
    account: str | None = option(None, "Account to charge.")
    qos: str | None = option(None, "Quality of service.")
    constraint: str | None = option(None, "Features that the machines must have.")
    exclude: str | None = option(None, "Machines not to use.")
    comment: str | None = option(None, "A comment for the queue.")
    timeout_min: AtLeastOne | None = option(
        None,
        "Time limit in minutes [1440]. Before it, the job saves and queues itself again, until it is done.",
        metavar="M",
    )
    cpus_per_task: AtLeastOne | None = option(None, "Cores on each machine [8 for each GPU].")
    mem: str | None = option(None, "Memory on each machine, as 500G.")
    parameters: tuple[str, ...] = option(
        (),
        "Any other parameter of sbatch, as reservation=R or exclusive=true; may be repeated.",
        flags="--slurm",
        metavar="KEY=VALUE",
        one_each=True,
    )
    setup: tuple[str, ...] = option(
        (),
        "A shell line to run in the job first, as 'module load cuda'; may be repeated.",
        metavar="LINE",
        one_each=True,
    )

    @property
    def is_asked(self) -> bool:
        """Whether any of the options is given."""
        return any(value not in (None, ()) for value in self.__dict__.values())
