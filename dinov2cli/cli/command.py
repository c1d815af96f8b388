"""Requests as commands: a class becomes a Typer command, the words typed become a request, and it is done."""

import inspect
import json
import re
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from enum import StrEnum
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, cast, get_args, get_origin

import typer
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from typer.core import TyperCommand

from dinov2cli.cli.refusals import expected, refuse
from dinov2cli.cli.tree import COMPLETERS, Parameter, parameters
from dinov2cli.errors import ConfigError, Dino2Error
from dinov2cli.launch.environment import is_worker, worker_rank
from dinov2cli.requests.base import Request, function_named, run

# `a.b=value`: a change of the configuration, never an option's value. A dataset string has a ':' before its '='.
_OVERRIDE = re.compile(r"^[A-Za-z_]\w*(\.\w+)+=")


def add_command(app: typer.Typer, name: str, request: type[Request]) -> None:
    """Make a request a command of `app`; the function of the command is the request's doing."""
    found = parameters(request)

    class Command(VariadicCommand):
        parameters = found

    def command(context: typer.Context, **values: Any) -> None:
        nested: dict[str, Any] = {}
        for each in found:
            if getattr(context.get_parameter_source(each.name), "name", "") == "COMMANDLINE":
                inner = nested
                for group in each.path[:-1]:
                    inner = inner.setdefault(group, {})
                inner[each.name] = values[each.name]
        perform(checked(request, nested))

    signature = [inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    signature += [_typer_parameter(each) for each in found]
    command.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in signature}
    app.command(name, cls=Command, help=request.__doc__)(command)


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


def checked(request: type[Request], values: Any) -> Request:
    """The request of these values.

    Raises:
        ConfigError: what is wrong with them, one line for each option, by the option's name as it is typed.
    """
    try:
        return request.model_validate(values)
    except ValidationError as error:
        by_path = {each.path: each for each in parameters(request)}
        lines = [_explain(problem, by_path) for problem in error.errors(include_url=False)]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from error


def _explain(problem: ErrorDetails, by_path: Mapping[tuple[str, ...], Parameter]) -> str:
    path = tuple(part for part in problem["loc"] if isinstance(part, str))
    found = next((by_path[path[:end]] for end in range(len(path), 0, -1) if path[:end] in by_path), None)
    name = found.as_typed if found else ".".join(path)
    if problem["type"] == "value_error":  # a validator's own words, which may begin with the value
        words = str(problem["ctx"]["error"])
        return f"{name} {words}" if words.startswith(f"{problem['input']!r}: ") else words
    if problem["type"] == "missing":
        return f"{name} is missing"
    if found is None:
        return f"{name} {problem['input']}: {problem['msg'][:1].lower()}{problem['msg'][1:]}"
    if problem["type"] == "string_pattern_mismatch":
        return f"{name} {problem['input']}: must be of {found.help[:1].lower()}{found.help[1:].removesuffix('.')}"
    return f"{name} {problem['input']}: must be {expected(found)}"


def perform(request: Request) -> None:
    """Do what a request asks, here or in other processes, and print its result."""
    from dinov2cli.console import Manner, set_up_logging, signals_as_exceptions

    Manner.quiet, Manner.verbose = request.quiet, request.verbose and not request.quiet
    set_up_logging(quiet=not (request.logs or Manner.verbose) or worker_rank() > 0)
    # SIGTERM, too, leaves nothing half-written; of several processes their launcher sees to that.
    with nullcontext() if is_worker() else signals_as_exceptions():
        if request.checked_by and not is_worker():
            request = function_named(request.checked_by)(request) or request
        elsewhere = function_named(request.launched_by)(request) if request.launched_by and not is_worker() else None
        show(run(request) if elsewhere is None else elsewhere.result, as_json=getattr(request, "as_json", False))


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


def request_from(text: str, known: Iterable[type[Request]]) -> Request:
    """The request that `requests.base.words_of` has written."""
    content = json.loads(text)
    request = next(each for each in known if each.command == content["command"])
    return checked(request, content["request"])


def _typer_parameter(each: Parameter) -> inspect.Parameter:
    default: Any = each.field.get_default()
    plain: Any = each.plain
    if each.many and get_origin(plain) is Literal:  # Typer takes lists of an Enum, not of a Literal
        plain = cast(Any, StrEnum)(each.name, {word: word for word in get_args(plain)})
    annotation: Any = list[plain] if each.many else plain
    if each.field.is_required():
        default = inspect.Parameter.empty
    elif each.many:
        default = list(default) or None
    if default is None:
        annotation = annotation | None
    # What switches something off, the last flag, Typer wants after a slash.
    flags = (*each.flags[:-2], "/".join(each.flags[-2:])) if default is True else each.flags
    info = (typer.Argument if each.is_argument else partial(typer.Option, *flags))(
        help=each.help,
        metavar=each.metavar or (each.as_typed if each.is_argument else None),
        min=each.bounds.get("ge"),
        max=each.bounds.get("le"),
        readable=False,  # what cannot be read is said as everything else is
        rich_help_panel=each.panel,
        show_default=each.typed.get("default_text", True),
        autocompletion=COMPLETERS.get(each.typed.get("completes", "")),
    )
    return inspect.Parameter(
        each.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[annotation, info]
    )
