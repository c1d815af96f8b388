"""Words that no request can be made of: refused, all at once, with what was probably meant or what is taken."""

import difflib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from typer.core import TyperGroup

from dinov2cli.cli.tree import Parameter
from dinov2cli.errors import ConfigError, Problems

ALIKE, CLOSE = 0.8, 0.6  # shares of letters in common: surely a slip, and worth a guess


class GroupOfCommands(TyperGroup):
    """A group that refuses what is none of its commands as the rest of dino2 does."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that the first word names.

        Raises:
            ConfigError: there is none of that name; the nearest is named.
        """
        if args[0] not in self.commands and not args[0].startswith("-"):
            own = {name: name for name in self.commands}
            below = {leaf: f"{name} {leaf}" for name, group in self.commands.items()
                     for leaf in getattr(group, "commands", ())}  # fmt: skip
            names = below | own | {"help": "--help", "version": "--version"}
            close = difflib.get_close_matches(args[0], names, n=1, cutoff=CLOSE)
            guess = f"did you mean {names[close[0]]}?" if close else f"there is {', '.join(self.commands)}"
            raise ConfigError(f"{args[0]}: no such command; {guess}", f"{ctx.command_path} --help shows them.")
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Options before the command, those that there are.

        Raises:
            ConfigError: another option is typed there.
        """
        known = [flag for each in self.get_params(ctx) for flag in (*each.opts, *each.secondary_opts)]
        if args and is_flag(args[0]) and (flag := args[0].partition("=")[0]) not in known:
            alike = nearest(flag, known)
            guess = (
                f"did you mean {alike}?"
                if alike
                else f"those of a command stand behind it: {ctx.command_path} COMMAND {flag}"
            )
            raise ConfigError(f"{flag}: no such option; {guess}", f"{ctx.command_path} --help shows them.")
        if args and is_flag(args[0]) and "=" in args[0]:
            raise ConfigError(f"{args[0]}: {flag} takes no value")
        return super().parse_args(ctx, args)


def refuse(words: Sequence[str], parameters: Sequence[Parameter], command: str, helps: set[str]) -> None:
    """Refuse what cannot be made a request of, all of it at once.

    Args:
        words: what is typed behind the command, with an option's name before each of its values.
        parameters: what the command takes; `helps` are the flags that show its help.

    Raises:
        ConfigError: options that there are not, given twice, without a value or with a wrong one; words too many;
            what must be given and is not.
    """
    of_flag = {flag: each for each in parameters for flag in each.flags}
    valued = {flag for flag, each in of_flag.items() if each.takes_value}
    typed = list(_pairs(words, valued, of_flag.keys() | helps))
    wrong = Problems()
    for error in (*_wrong_words(typed, of_flag, parameters, command, helps), *_wrong_values(typed, of_flag)):
        with wrong.noted():
            raise error
    wrong.tell()


def _wrong_words(
    typed: Sequence[tuple[str, str | None]],
    of_flag: Mapping[str, Parameter],
    parameters: Sequence[Parameter],
    command: str,
    helps: set[str],
) -> Iterator[ConfigError]:
    """Options that there are not; where all are, what is missing and what is too much."""
    known = of_flag.keys() | helps
    unknown = [place for place, (flag, _) in enumerate(typed) if flag and flag not in known]
    takes_overrides = any(each.typed.get("completes") == "overrides" for each in parameters)
    for place in unknown:
        flag, value = typed[place]
        following = value or next((word for name, word in typed[place + 1 : place + 2] if not name), None)
        key = key_named(flag, following or "VALUE") if takes_overrides else None
        meant = nearest(flag, known, ALIKE) or key or nearest(flag, known)
        guess = f"; did you mean {meant}?" if meant else ""
        yield ConfigError(f"{flag}: no such option{guess}", f"{command} --help shows those there are.")
    if unknown:  # and a word may be the value of an option that is misspelt
        return
    hint = f"{command} --help shows what it takes."
    flags, words = {flag for flag, _ in typed}, [word or "" for flag, word in typed if not flag]
    arguments = [each for each in parameters if each.is_argument]
    options = [each for each in parameters if not each.is_argument and not flags & set(each.flags)]
    missing = [each.as_typed for each in (*arguments[len(words) :], *options) if each.field.is_required()]
    if missing and not helps & flags:
        yield ConfigError(f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing", hint)
    if len(words) > len(arguments) and not any(each.many for each in arguments):
        named = " and ".join(each.as_typed for each in arguments) or "options"
        yield ConfigError(f"{' '.join(words[len(arguments) :])}: {command} takes {named} alone", hint)


def _wrong_values(typed: Sequence[tuple[str, str | None]], of_flag: Mapping[str, Parameter]) -> Iterator[ConfigError]:
    """Values that are not taken, or missing, or said twice: the last one would win in silence."""
    first: dict[tuple[str, ...], str] = {}
    for flag, value in typed:
        if (parameter := of_flag.get(flag)) is None:
            continue
        if not parameter.takes_value:
            if value is not None:
                yield ConfigError(f"{flag}={value}: {flag} takes no value")
        elif not value:  # an empty word, too: a variable of the shell that is not set
            yield ConfigError(f"{flag}: its value is missing; it takes {expected(parameter)}")
        elif not parameter.takes(value):
            yield ConfigError(f"{flag} {value}: must be {expected(parameter)}{_guess(value, parameter)}")
        elif not parameter.many and parameter.path in first:
            twice = f"{parameter.as_typed} is given twice: {first[parameter.path]} and {value}"
            yield ConfigError(twice, "Leave one of them out.")
        else:
            first[parameter.path] = value


def _pairs(words: Sequence[str], valued: set[str], known: set[str]) -> Iterator[tuple[str, str | None]]:
    """(flag, value or None) of each option that is typed, ("", word) of each other word."""
    rest = deque(words)
    while rest:
        word = rest.popleft()
        flag, equals, value = word.partition("=")
        if word == "--":
            yield from (("", each) for each in rest)
            return
        if not is_flag(word):
            yield "", word
        elif equals:
            yield flag, value
        else:
            yield flag, rest.popleft() if flag in valued and rest and rest[0] not in known else None


def expected(parameter: Parameter) -> str:
    """What an option takes, in words: `a whole number, at least 1`."""
    if get_origin(parameter.plain) is not Literal and parameter.plain not in (int, float):
        return parameter.metavar or ("a path" if parameter.plain is Path else "a word")
    from dinov2cli.config.tree import expectation

    return expectation(parameter.field).removesuffix(", or null").removeprefix("a list, each ")


def _guess(value: str, parameter: Parameter) -> str:
    words = get_args(parameter.plain) if get_origin(parameter.plain) is Literal else ()
    close = difflib.get_close_matches(value.lower(), {word.lower(): word for word in words}, n=1, cutoff=CLOSE)
    return next((f"; did you mean {word}?" for word in words if [word.lower()] == close), "")


def is_flag(word: str) -> bool:
    """Whether a word is an option's name: `--x` or `-x`, no dash alone and no negative number."""
    return word.startswith("-") and word.strip("-")[:1].isalpha()


def nearest(flag: str, known: Iterable[str], cutoff: float = CLOSE) -> str | None:
    """The flag most like this one, where one is: what it is the beginning of, before what it resembles."""
    name = _bare(flag)
    names = {_bare(each): each for each in sorted(known, key=lambda each: "_" not in each)}
    if not name.startswith("no-"):  # which means the contrary
        names = {bare: each for bare, each in names.items() if not bare.startswith("no-")}
    begun = sorted((bare for bare in names if bare.startswith(name)), key=len)
    close = (begun if len(name) > 1 else []) or difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
    return names[close[0]] if close else None


def key_named(flag: str, value: str) -> str | None:
    """The key of the configuration, as it is typed, that an option of this name would be: `--lr` is optim.base_lr."""
    from dinov2cli.config.messages import suggest

    key = suggest(_bare(flag).replace("-", "_"))
    return f"{key}={value}" if key else None


def _bare(flag: str) -> str:
    return flag.lstrip("-").replace("_", "-")
