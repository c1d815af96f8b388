"""What a command prints: its result for people, or with `--json` one JSON object for programs."""

from typing import Any

from dinov2cli.errors import Dino2Error
from dinov2cli.launch.environment import worker_rank


def show(result: Any, *, as_json: bool = False) -> None:
    """Print the result of a command on standard output.

    Args:
        result: None for nothing to print. Else something that rich renders (it has `__rich__`) or that `str` makes
            text, and for `as_json` a mapping, a named tuple, or something with `as_dict()`.
        as_json: print one JSON object.

    Raises:
        Dino2Error: the result's `problem`, where it has one: what was found is printed first.
    """
    if result is None or worker_rank() > 0:  # the processes have parted by now, so that each would be the main one
        return
    from dinov2cli.console import out, print_json

    if as_json:
        mapping = getattr(result, "_asdict", getattr(result, "as_dict", lambda: result))
        print_json(mapping())
    else:
        shown = result if hasattr(result, "__rich__") else str(result)
        is_text = isinstance(shown, str)  # whose lines are not broken, so that paths and commands can be copied
        end = "" if is_text and shown.endswith("\n") else "\n"
        out.print(shown, markup=False, highlight=False, soft_wrap=is_text, end=end)
    problem = getattr(result, "problem", None)
    if isinstance(problem, Dino2Error):
        raise problem
