"""A request is what one command asks for: typed as words, sent to a job as JSON, and made in Python by its class.

A command is a request, a function that runs it, and a line in `cli/main.py`:

    class Knn(Request, command="eval knn", run_by="dinov2cli.eval.knn:run"):  # `--help` does not import that module
        '''Classify images by their nearest neighbours.   # the help text, with its examples

        Example:

            dino2 eval knn runs/demo
        '''

        checkpoint: Annotated[str, Argument("What to evaluate.", metavar="CKPT")]
        nb_knn: Annotated[tuple[AtLeastOne, ...], Option("Numbers of neighbours.", flags="--nb-knn --nb_knn")] = ()
        layout: Annotated[Literal["pca", "overlay"], Option("What a picture shows.")] = "pca"
        as_json: AsJson = False
        slurm: Slurm = Slurm()  # a Group: its fields are options of the command, in its place

    result = run(Knn(checkpoint="runs/demo", nb_knn=(10, 20)))

Fields without a default are required. Inherited ones come first, but for those that are `last`. Types are str, int,
float, bool, Path, a Literal of words, each of them or None, and tuples of them for options of several values. Bounds
are pydantic's. What fields contradict, a validator says with a ValueError, whose text is the message that is printed.
What `run` returns, `cli/output.py` shows.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import BaseModel, ConfigDict, Field


@dataclass(frozen=True)
class Option:
    """How a field of a request is typed.

    Attributes:
        help: its text in `--help`.
        flags: spellings, separated by spaces; by default the field's name. The first is the name in messages.
        metavar: what stands for the value in `--help`.
        panel: heading under which `--help` lists it, "Options" by default.
        default_text: what `--help` says of the default instead of the value; False: nothing.
        completes: what the shell offers: presets, or keys of the configuration.
        one_each: of several values, each needs the name before it, as anything may follow.
        names_argument: stands for the command's first argument.
        last: is listed after what a class adds to the options that it inherits.
    """

    help: str
    flags: str = ""
    metavar: str | None = None
    panel: str | None = None
    default_text: str | bool = True
    completes: Literal["presets", "overrides"] | None = None
    one_each: bool = False
    names_argument: bool = False
    last: bool = False


class Argument(Option):
    """How a field that is given by its position is typed."""


class Group(BaseModel):
    """Options that several requests share through one field."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Request(Group):
    """What a command asks for; the class's docstring is the command's help."""

    command: ClassVar[str]
    """The words after `dino2`."""
    run_by: ClassVar[str]
    """`module:function`, which takes the request and returns the command's result."""
    launched_by: ClassVar[str | None] = None
    """`module:function` of a command that other processes may do: it takes the request, starts these where the request
    says so, and returns a `launch.local.Elsewhere`; or None where the request is to be run here."""
    logs: ClassVar[bool] = False
    """Whether the terminal shows what is being done, and not only warnings."""

    def __init_subclass__(cls, **said: str | bool) -> None:
        """Keywords of the class statement are the class variables above."""
        super().__init_subclass__()
        for name, value in said.items():
            assert name in Request.__class_vars__, f"{cls.__name__}: {name} is not said of a command"
            setattr(cls, name, value)


AsJson = Annotated[bool, Option("Print one JSON object instead of a table.", flags="--json", last=True)]
"""The field `as_json` of requests whose result can be printed for programs; `run` does not look at it."""
AtLeastOne = Annotated[int, Field(ge=1)]
ConfigBeside = Annotated[Path | None, Option("The run's config.yaml, if it does not lie beside CKPT.", metavar="YAML")]


def run(request: Request) -> Any:
    """Do what the request asks, in this process.

    Returns:
        What the command prints: see the function that `request.run_by` names. None in all but the first of several
        processes.
    """
    return function_named(request.run_by)(request)


def function_named(name: str) -> Callable[..., Any]:
    """The function `module:function`."""
    module, _, function = name.partition(":")
    return cast(Callable[..., Any], getattr(import_module(module), function))


def words_of(request: Request) -> list[str]:
    """The command line, after `dino2`, of a process that does the request: `--request JSON`."""
    content = {"command": request.command, "request": request.model_dump(mode="json", exclude_unset=True)}
    return ["--request", json.dumps(content)]
