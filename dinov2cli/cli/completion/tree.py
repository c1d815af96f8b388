"""The command line as plain data: commands, options, and what may follow each. For completion scripts and tests."""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args, get_origin

from dinov2cli.cli import command
from dinov2cli.requests.base import Request

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
ROOT = (
    Parameter(("--version",), "Print the version and exit.", takes_value=False),
    Parameter(("--install-completion",), "Install completion for the current shell.", takes_value=False),
    Parameter(
        ("--show-completion",),
        "Show completion for the current shell, to copy it or customize the installation.",
        takes_value=False,
    ),
)


@dataclass(frozen=True)
class Command:
    """A command or a group of commands, `path` being its words: `("dino2", "presets", "show")`."""

    path: tuple[str, ...]
    help: str
    parameters: tuple[Parameter, ...] = (HELP,)
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
    root = Command((name,), help_text, (*ROOT, HELP))
    below = {group: Command((name, group), text) for group, text in groups.items()}
    for words, request in requests.items():
        *group, leaf = words.split()
        above = below[group[0]] if group else root
        found = tuple(_parameter(each) for each in command.parameters(request))
        above.commands[leaf] = Command((*above.path, leaf), inspect.getdoc(request) or "", (*found, HELP))
    root.commands.update(below)
    return root


def _parameter(each: command.Parameter) -> Parameter:
    return Parameter(
        flags=() if each.is_argument else tuple(spelling for flag in each.flags for spelling in flag.split("/")),
        help=" ".join((each.field.description or "").split()),
        takes_value=each.plain is not bool,
        words=_words(each),
        kind=FOLDERS if each.name.endswith(("_dir", "folder")) else FILES if each.plain in (str, Path) else ANYTHING,
        many=each.many,
    )


def _words(each: command.Parameter) -> tuple[tuple[str, str], ...]:
    if "completes" in each.typed:
        return tuple(command.COMPLETERS[each.typed["completes"]](""))
    return tuple((str(word), "") for word in get_args(each.plain)) if get_origin(each.plain) is Literal else ()
