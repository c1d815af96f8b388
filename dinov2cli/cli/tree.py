"""The command line as plain data: its commands, and the options and arguments of each, read from the requests."""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, cast, get_args, get_origin

from pydantic import Field
from pydantic.fields import FieldInfo

from dinov2cli.cli.completion.words import complete_override, complete_preset
from dinov2cli.requests.base import Group, Request, Typed, option

COMPLETERS = {"presets": complete_preset, "overrides": complete_override}
METAVARS = {"presets": "NAME", "overrides": "[a.b=value ...]"}


class Parameter(NamedTuple):
    """A field of a request as it is typed.

    Attributes:
        path: where the value goes: the field's name, after that of its group if it is in one.
        plain: the type of one value, without None.
        many: whether there may be several.
        bounds: smallest (`ge`, or `gt` for what is above it) and largest (`le`) value, where there is one.
        panel: heading under which `--help` lists it.
    """

    path: tuple[str, ...]
    field: FieldInfo
    plain: Any
    many: bool
    bounds: dict[str, float]
    panel: str | None

    @property
    def name(self) -> str:
        return self.path[-1]

    @property
    def help(self) -> str:
        return self.field.description or ""

    @property
    def typed(self) -> Typed:
        return cast(Typed, self.field.json_schema_extra)

    @property
    def is_argument(self) -> bool:
        return self.typed.get("positional", False)

    @property
    def takes_value(self) -> bool:
        return self.plain is not bool

    def takes(self, value: str) -> bool:
        """Whether a value, as it is typed, is of the type and within the bounds."""
        from pydantic import TypeAdapter, ValidationError

        limits: dict[str, Any] = {**self.bounds, **({"allow_inf_nan": False} if self.plain is float else {})}
        kind: Any = Annotated[self.plain, Field(**limits)] if limits else self.plain
        try:
            TypeAdapter(kind).validate_python(value)
        except ValidationError:
            return False
        return True

    @property
    def flags(self) -> tuple[str, ...]:
        """Spellings of an option; a switch that is on by default also has `--no-`. Empty for an argument."""
        if self.is_argument:
            return ()
        spelled = self.typed.get("flags", f"--{self.name.replace('_', '-')}").split()
        return (*spelled, f"--no-{spelled[0].removeprefix('--')}") if self.field.default is True else tuple(spelled)

    @property
    def metavar(self) -> str | None:
        return self.typed.get("metavar") or METAVARS.get(self.typed.get("completes", ""))

    @property
    def as_typed(self) -> str:
        """What messages call it."""
        return (self.metavar or self.name.upper()).removesuffix("...") if self.is_argument else self.flags[0]

    @property
    def words(self) -> list[tuple[str, str]]:
        """The values there are, each with its description, where they can be listed."""
        if "completes" in self.typed:
            return COMPLETERS[self.typed["completes"]]("")
        return [(str(word), "") for word in get_args(self.plain)] if get_origin(self.plain) is Literal else []

    @property
    def kind(self) -> str:
        """What a shell may offer: `words`; among these "presets" and "overrides"; "folders", "files" or "anything"."""
        if self.words:
            return self.typed.get("completes", "words")
        if self.name.endswith(("_dir", "folder")):
            return "folders"
        return "files" if self.plain in (str, Path) else "anything"


def parameters(request: type[Group]) -> list[Parameter]:
    """The options and arguments of a request in their order; those of groups in the group's place."""
    return sorted(_fields(request), key=lambda each: each.typed.get("last", False))


def _fields(request: type[Group], above: tuple[str, ...] = ()) -> Iterator[Parameter]:
    for name, field_ in request.model_fields.items():
        plain, limits = _bare(field_.annotation)
        if isinstance(plain, type) and issubclass(plain, Group):
            yield from _fields(plain, (*above, name))
            continue
        assert isinstance(field_.json_schema_extra, dict), f"{request.__name__}.{name}: no option, argument or Group"
        many = get_origin(plain) is tuple
        if many:
            plain, limits = _bare(get_args(plain)[0])
        limits += field_.metadata
        bounds = {side: getattr(limit, side) for limit in limits for side in ("gt", "ge", "le") if hasattr(limit, side)}
        yield Parameter((*above, name), field_, plain, many, bounds, request.panel)


def _bare(annotation: Any) -> tuple[Any, list[Any]]:
    """A type without None and annotations, and what these say of its bounds."""
    if get_origin(annotation) in (Union, UnionType):
        return _bare(next(part for part in get_args(annotation) if part is not NoneType))
    if get_origin(annotation) is Annotated:
        plain, *extras = get_args(annotation)
        return plain, [bound for extra in extras for bound in getattr(extra, "metadata", [extra])]
    return annotation, []


class _Everywhere(Group):
    """What Typer adds to every command."""

    help: bool = option(False, "Show this message and exit.", flags="--help -h", last=True)


class _AtTheTop(_Everywhere):
    version: bool = option(False, "Print the version and exit.", flags="--version -V")
    install_completion: bool = option(False, "Install completion for the current shell.")
    show_completion: bool = option(
        False, "Show completion for the current shell, to copy it or customize the installation."
    )


@dataclass(frozen=True)
class Command:
    """A command with its `request`, or a group of `commands`; `path` is its words: `("dino2", "presets", "show")`."""

    path: tuple[str, ...]
    help: str
    parameters: list[Parameter] = field(default_factory=lambda: parameters(_Everywhere))
    commands: dict[str, "Command"] = field(default_factory=dict)
    request: type[Request] | None = None

    @property
    def words(self) -> str:
        return " ".join(self.path)

    @property
    def options(self) -> list[Parameter]:
        return [parameter for parameter in self.parameters if not parameter.is_argument]

    @property
    def arguments(self) -> list[Parameter]:
        return [parameter for parameter in self.parameters if parameter.is_argument]

    @property
    def summary(self) -> str:
        """First line of the help text."""
        return self.help.partition("\n")[0]

    def walk(self) -> "Iterator[Command]":
        """This command and all below it."""
        yield self
        for each in self.commands.values():
            yield from each.walk()


def command_tree(
    requests: Mapping[str, type[Request]], groups: Mapping[str, str], help_text: str = "", name: str = "dino2"
) -> Command:
    """The command line of a table.

    Args:
        requests: words of each command, and what it asks for.
        groups: first of two words, and its help.
    """
    root = Command((name,), help_text, parameters(_AtTheTop))
    below = {group: Command((name, group), text) for group, text in groups.items()}
    for words, request in requests.items():
        *group, leaf = words.split()
        above = below[group[0]] if group else root
        found = [*parameters(request), *parameters(_Everywhere)]
        above.commands[leaf] = Command((*above.path, leaf), inspect.getdoc(request) or "", found, request=request)
    root.commands.update(below)
    return root
