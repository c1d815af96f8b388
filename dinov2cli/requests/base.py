"""A request is what one command asks for: typed as words, sent to a job as JSON, and made in Python by its class.

A command is a request, a function that runs it, and a line in `cli/main.py`:

    class KnnRequest(Request, command="eval knn", run_by="dinov2cli.eval.knn:run"):  # `--help` does not import that
        '''Classify images by their nearest neighbours.   # the help text, with its examples

        Example:

            dino2 eval knn runs/demo
        '''

        checkpoint: str = argument("What to evaluate.", metavar="CKPT")
        nb_knn: tuple[AtLeastOne, ...] = option((10, 20), "Numbers of neighbours.", flags="--nb-knn --nb_knn")
        layout: Literal["pca", "overlay"] = option("pca", "What a picture shows.")
        share: float = option(0.5, "Share of the images.", ge=0, le=1)
        as_json: bool = option(False, "Print one JSON object instead of a table.", flags="--json")
        slurm: Slurm = Slurm()  # a Group: its fields are options of the command, in its place

    result = run(KnnRequest(checkpoint="runs/demo", nb_knn=(10, 20)))

Inherited fields come first, but for those that are `last`. Types are str, int, float, bool, Path, a Literal of words,
each of them or None, and tuples of them for options of several values. What fields contradict, a validator says with a
ValueError, whose text is the message that is printed. What `run` returns, `cli/command.py` shows; where the request has
a field `as_json`, as one JSON object if that is true.
"""

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypedDict, Unpack, cast

from pydantic import BaseModel, ConfigDict, Field, model_validator

AtLeastOne = Annotated[int, Field(ge=1)]
AboveZero = Annotated[float, Field(gt=0)]
Paths = Annotated[tuple[Path, ...], Field(min_length=1)]


class Typed(TypedDict, total=False):
    """How a field is typed, beside what its name and type say."""

    flags: str  # spellings, separated by spaces; by default the field's name. The first is the name in messages
    metavar: str  # what stands for the value in `--help`
    default_text: str | bool  # what `--help` says of the default instead of the value; False: nothing
    completes: Literal["presets", "overrides"]  # what the shell offers: presets, or changes of the configuration
    positional: bool  # given by its position
    one_each: bool  # of several values, each needs the name before it, as anything may follow
    names_argument: bool  # stands for the command's first argument
    last: bool  # listed after what a class adds to the options that it inherits


def option(default: Any, help: str, *, ge: float | None = None, le: float | None = None, **typed: Unpack[Typed]) -> Any:
    """A field of a request that is typed as an option, from `ge` to `le`; with `...` for a default it must be given."""
    return Field(default, description=help, ge=ge, le=le, json_schema_extra=cast(Any, typed))


def argument(help: str, *, default: Any = ..., **typed: Unpack[Typed]) -> Any:
    """A field of a request that is given by its position."""
    typed["positional"] = True
    return option(default, help, **typed)


class Group(BaseModel):
    """Options that several requests share through one field."""

    # --help validates nothing.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)
    panel: ClassVar[str | None] = None
    """The heading under which `--help` lists them, "Options" by default."""


class Request(Group):
    """What a command asks for; the class's docstring is the command's help."""

    command: ClassVar[str]
    """The words after `dino2`."""
    run_by: ClassVar[str]
    """`module:function`, which takes the request and returns the command's result."""
    launched_by: ClassVar[str | None] = None
    """`module:function` of a command that other processes may do: it takes the request, starts these where the request
    says so, and returns a `launch.local.Elsewhere`; or None where the request is to be run here."""
    checked_by: ClassVar[str | None] = None
    """`module:function` that takes the request and raises all that is wrong with it, before anything slow is done.
    What it returns, if anything, is the request with what it had left open."""
    logs: ClassVar[bool] = False
    """Whether the terminal shows what is being done, and not only warnings."""

    quiet: bool = option(False, "Show warnings, errors and results only.", flags="--quiet -q", last=True)
    verbose: bool = option(False, "Show all that is done, and where an error arose.", last=True)

    def __init_subclass__(cls, **said: str | bool) -> None:
        """Keywords of the class statement are the class variables above."""
        super().__init_subclass__()
        for name, value in said.items():
            assert name in Request.__class_vars__, f"{cls.__name__}: {name} is not said of a command"
            setattr(cls, name, value)


class DeviceRequest(Request):
    """What commands share that have a `device`: training's name for the CPU, too."""

    cpu: bool = option(False, "The same as --device cpu.", last=True)

    @model_validator(mode="before")
    @classmethod
    def _cpu_is_a_device(cls, values: dict[str, Any]) -> dict[str, Any]:
        if not values.get("cpu"):
            return values
        if (device := values.get("device")) not in (None, "auto", "cpu"):
            raise ValueError(f"--cpu and --device {device} exclude each other")
        return {**values, "device": "cpu"}


class CheckpointRequest(Request):
    """What commands share that have CKPT as an argument: the option by which others name it, too."""

    model: str | None = option(None, "Another way to give CKPT.", metavar="CKPT", names_argument=True, last=True)

    @model_validator(mode="before")
    @classmethod
    def _one_checkpoint_or_other(cls, values: dict[str, Any]) -> dict[str, Any]:
        given = [values[name] for name in ("checkpoint", "model") if values.get(name)]
        if len(given) != 1:
            missing = "CKPT is missing: name a run folder, a weights file or a released model"
            raise ValueError(f"CKPT and --model {given[1]} are both given" if given else missing)
        return {**values, "checkpoint": given[0], "model": None}


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
