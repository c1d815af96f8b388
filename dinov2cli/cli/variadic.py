"""Options that take several values after one name (`--nb-knn 10 20`), as the reference implementation's do."""

import re
from typing import Any

from typer.core import TyperCommand

# `a.b=value`: a change of the configuration, never an option's value. A dataset string has a ':' before its '='.
_OVERRIDE = re.compile(r"^[A-Za-z_]\w*(\.\w+)+=")


# Options that are repeated with each value, as what follows them may be anything.
ONE_EACH = {"slurm", "setup"}


class VariadicCommand(TyperCommand):
    """A command whose list options also take all their values at once.

    `--nb-knn 10 20` is read as `--nb-knn 10 --nb-knn 20`. Values end at the next option, at an `a.b=value`, or after
    numbers at the first word that is none.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the option's name before each value, then parse as usual."""
        many = [param for param in self.params if getattr(param, "multiple", False) and param.name not in ONE_EACH]
        lists = {name for param in many for name in param.opts}
        return super().parse_args(ctx, repeat_names(args, lists))


def repeat_names(words: list[str], lists: set[str]) -> list[str]:
    """`words` with the name of a list option before each of its values."""
    spread: list[str] = []
    option = None
    numbers = False
    for before, word in zip(["", *words], words, strict=False):
        if option is not None and before == option:
            numbers = _is_number(word)  # the first value tells what the others are
            spread.append(word)
        elif option is not None and (_is_number(word) if numbers else _is_word(word)):
            spread += [option, word]
        else:
            option = word if word in lists else None
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
