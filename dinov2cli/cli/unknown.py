"""Commands and options that there are not: refused with what was probably meant."""

import difflib
from collections.abc import Iterable
from typing import Any

from typer.core import TyperGroup

from dinov2cli.errors import ConfigError

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
        return super().parse_args(ctx, args)


def refuse_unknown(words: Iterable[str], known: set[str], valued: set[str], command: str, *, has_keys: bool) -> None:
    """Refuse the first option that the command does not have.

    Args:
        words: what is typed behind the command.
        known: the command's flags; `valued` are those that take a value.
        has_keys: whether the command takes keys of the configuration, for which options are taken elsewhere.

    Raises:
        ConfigError: names it, and the option or key that was probably meant.
    """
    rest = iter(words)
    for word in rest:
        if word == "--":
            return
        flag, equals, value = word.partition("=")
        if flag in known:
            if flag in valued and not equals:
                next(rest, "")
        elif is_flag(word):
            meant = nearest(flag, known, ALIKE)
            if not meant and has_keys:
                following = next(rest, "-")
                meant = key_named(flag, value or ("VALUE" if is_flag(following) else following))
            meant = meant or nearest(flag, known)
            guess = f"; did you mean {meant}?" if meant else ""
            raise ConfigError(f"{flag}: no such option{guess}", f"{command} --help shows those there are.")


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
