"""The command line as plain data: commands, options, and what may follow each. For completion scripts and tests."""

import inspect
import typing
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import typer

# What may stand in place of a value when it is not one of a few words.
FILES, FOLDERS, ANYTHING = "files", "folders", "anything"


@dataclass(frozen=True)
class Parameter:
    """An option or a positional argument.

    Attributes:
        flags: spellings of an option, such as `("--json",)`; empty for a positional argument.
        help: its help text.
        takes_value: whether a value follows; always true for a positional argument.
        words: the values there are, as (word, description), when they can be listed.
        kind: what to offer without words: FILES, FOLDERS or ANYTHING (nothing to offer).
        many: whether it may be given any number of times.
    """

    flags: tuple[str, ...]
    help: str
    takes_value: bool
    words: tuple[tuple[str, str], ...] = ()
    kind: str = ANYTHING
    many: bool = False


HELP = Parameter(("--help", "-h"), "Show this message and exit.", takes_value=False)


@dataclass(frozen=True)
class Command:
    """A command or a group of commands, `path` being its words: `("dino2", "presets", "show")`."""

    path: tuple[str, ...]
    help: str
    parameters: tuple[Parameter, ...] = ()
    commands: dict[str, "Command"] = field(default_factory=dict)

    @property
    def options(self) -> list[Parameter]:
        return [parameter for parameter in self.parameters if parameter.flags]

    @property
    def arguments(self) -> list[Parameter]:
        return [parameter for parameter in self.parameters if not parameter.flags]

    @property
    def summary(self) -> str:
        """First line of the help text."""
        return self.help.strip().splitlines()[0] if self.help.strip() else ""

    def walk(self) -> "typing.Iterator[Command]":
        """This command and all below it."""
        yield self
        for command in self.commands.values():
            yield from command.walk()


def command_tree(app: typer.Typer, name: str = "dino2") -> Command:
    """Everything that `app` shows in its help; hidden commands and options are left out."""
    return _describe(typer.main.get_command(app), (name,))


def _describe(command: Any, path: tuple[str, ...]) -> Command:
    hints = _hints(command.callback)
    parameters = [_parameter(p, hints.get(p.name)) for p in command.params if not getattr(p, "hidden", False)]
    below = {
        name: _describe(sub, (*path, name))
        for name, sub in getattr(command, "commands", {}).items()
        if not sub.hidden
    }  # fmt: skip
    return Command(path, command.help or "", (*parameters, HELP), below)


def _hints(function: Any) -> dict[str, Any]:
    if function is None:
        return {}
    return typing.get_type_hints(inspect.unwrap(function), include_extras=True)


def _parameter(parameter: Any, hint: Any) -> Parameter:
    plain, many, completer = _unwrap(hint)
    is_option = parameter.param_type_name == "option"
    return Parameter(
        flags=(*parameter.opts, *parameter.secondary_opts) if is_option else (),
        help=" ".join((parameter.help or "").split()),
        takes_value=not (is_option and parameter.is_flag),
        words=_words(plain, completer),
        kind=_kind(plain, parameter.name or ""),
        many=many,
    )


def _unwrap(hint: Any) -> tuple[Any, bool, Any]:
    """The plain type of a parameter, whether it is a list of them, and its completion function if it has one."""
    completer = None
    if get_origin(hint) is typing.Annotated:
        hint, *extras = get_args(hint)
        completer = next((extra.autocompletion for extra in extras if getattr(extra, "autocompletion", None)), None)
    if get_origin(hint) in (Union, UnionType):
        hint = next(part for part in get_args(hint) if part is not NoneType)
    many = get_origin(hint) is list
    return (get_args(hint)[0] if many else hint), many, completer


def _words(plain: Any, completer: Any) -> tuple[tuple[str, str], ...]:
    if completer is not None:
        return tuple(word if isinstance(word, tuple) else (word, "") for word in completer(""))
    if get_origin(plain) is Literal:
        return tuple((str(word), "") for word in get_args(plain))
    if isinstance(plain, type) and issubclass(plain, Enum):
        return tuple((str(member.value), "") for member in plain)
    return ()


def _kind(plain: Any, name: str) -> str:
    if name.endswith(("_dir", "folder")):
        return FOLDERS
    return FILES if plain in (str, Path) else ANYTHING
