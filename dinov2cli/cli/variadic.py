"""Options that take several values after one name (`--nb-knn 10 20`), as the reference implementation's do."""

import re
from typing import Any, ClassVar

from typer.core import TyperCommand

from dinov2cli.cli.refusals import refuse
from dinov2cli.cli.tree import Parameter

# `a.b=value`: a change of the configuration, never an option's value. A dataset string has a ':' before its '='.
_OVERRIDE = re.compile(r"^[A-Za-z_]\w*(\.\w+)+=")


class VariadicCommand(TyperCommand):
    """A command whose list options also take all values at once: `--nb-knn 10 20` is `--nb-knn 10 --nb-knn 20`."""

    parameters: ClassVar[list[Parameter]]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the option's name before each value, refuse what is wrong (`refuse`), then parse as usual."""
        options = [each for each in self.parameters if each.takes_value and not each.is_argument]
        valued = {flag for each in options for flag in each.flags}
        lists = {flag for each in options if each.many and not each.typed.get("one_each") for flag in each.flags}
        instead = {flag for each in options if each.typed.get("names_argument") for flag in each.flags}
        # Words after an option may be meant for an argument (CKPT), unless it is given by an option.
        waits = any(each.is_argument and "completes" not in each.typed for each in self.parameters)
        waits = waits and not any(word.split("=")[0] in instead for word in args)
        words = repeat_names(args, lists, valued, waits=waits)
        if not ctx.resilient_parsing:  # a shell that completes them
            refuse(words, self.parameters, ctx.command_path, set(ctx.help_option_names))
        return super().parse_args(ctx, words)


def repeat_names(words: list[str], lists: set[str], valued: set[str], *, waits: bool = False) -> list[str]:
    """`words` with the name of a list option before each of its values.

    Values end at the next option, at an `a.b=value`, or after numbers at the first word that is none. While the
    command waits for its argument, an option takes one word, or numbers: the next word is the argument.

    Args:
        lists: flags that take several values.
        valued: flags that take a value, these among them.
        waits: whether the argument is among the words.
    """
    spread: list[str] = []
    option = ""  # the list option whose values may go on
    numbers = False
    before = ""  # the option whose value the next word is
    for index, word in enumerate(words):
        if before:
            option, before = before if before in lists else "", ""
            numbers = _is_number(word)  # the first value tells what the others are
        elif option and (_is_number(word) if numbers else not waits and _is_word(word)):
            spread.append(option)
        elif word == "--":
            return spread + words[index:]
        else:
            option, before = "", word if word in valued else ""
            waits = waits and not _is_word(word)
        spread.append(word)
    return spread


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _is_word(word: str) -> bool:
    return not word.startswith("-") and not _OVERRIDE.match(word)
