"""Requests as commands: a class becomes a Typer command, the words typed become a request, and it is done."""

import inspect
import json
from collections.abc import Iterable, Iterator, Mapping
from enum import StrEnum
from functools import partial
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, cast, get_args, get_origin

import typer
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from dinov2cli.cli.completion.words import complete_override, complete_preset
from dinov2cli.cli.output import show
from dinov2cli.cli.variadic import VariadicCommand
from dinov2cli.errors import ConfigError
from dinov2cli.launch.environment import is_worker, worker_rank
from dinov2cli.requests.base import Group, Request, Typed, function_named, run

COMPLETERS = {"presets": complete_preset, "overrides": complete_override}
METAVARS = {"presets": "NAME", "overrides": "[a.b=value ...]"}


class Parameter(NamedTuple):
    """A field of a request as it is typed.

    Attributes:
        path: where the value goes: the field's name, after that of its group if it is in one.
        plain: the type of one value, without None.
        many: whether there may be several.
        bounds: smallest and largest value, None where there is none.
        panel: heading under which `--help` lists it.
    """

    path: tuple[str, ...]
    field: FieldInfo
    typed: Typed
    plain: Any
    many: bool
    bounds: tuple[float | None, float | None]
    panel: str | None

    @property
    def name(self) -> str:
        return self.path[-1]

    @property
    def flags(self) -> tuple[str, ...]:
        """Spellings of an option, as click wants them; those of a switch that is on by default have `--no-`."""
        spelled = self.typed.get("flags", "").split() or [f"--{self.name.replace('_', '-')}"]
        if self.plain is bool and self.field.default is True:
            spelled = [f"{flag}/--no-{flag.removeprefix('--')}" for flag in spelled]
        return tuple(spelled)

    @property
    def metavar(self) -> str | None:
        return self.typed.get("metavar") or METAVARS.get(self.typed.get("completes", ""))

    @property
    def as_typed(self) -> str:
        """What messages call it."""
        return (self.metavar or self.name.upper()) if self.is_argument else self.flags[0].split("/")[0]

    @property
    def is_argument(self) -> bool:
        return self.typed.get("positional", False)


def parameters(request: type[Group]) -> list[Parameter]:
    """The options and arguments of a request in their order; those of groups in the group's place."""
    return sorted(_fields(request), key=lambda each: each.typed.get("last", False))


def _fields(request: type[Group], above: tuple[str, ...] = ()) -> Iterator[Parameter]:
    for name, field in request.model_fields.items():
        plain, limits = _bare(field.annotation)
        if isinstance(plain, type) and issubclass(plain, Group):
            yield from _fields(plain, (*above, name))
            continue
        assert isinstance(field.json_schema_extra, dict), f"{request.__name__}.{name}: no option, argument or Group"
        many = get_origin(plain) is tuple
        if many:
            plain, limits = _bare(get_args(plain)[0])
        limits += field.metadata
        least = next((extra.ge for extra in limits if hasattr(extra, "ge")), None)
        most = next((extra.le for extra in limits if hasattr(extra, "le")), None)
        yield Parameter(
            (*above, name), field, cast(Typed, field.json_schema_extra), plain, many, (least, most), request.panel
        )


def add_command(app: typer.Typer, name: str, request: type[Request]) -> None:
    """Make a request a command of `app`; the function of the command is the request's doing."""
    found = parameters(request)

    class Command(VariadicCommand):
        one_each = frozenset(each.name for each in found if each.typed.get("one_each"))
        waits = any(each.is_argument and "completes" not in each.typed for each in found)
        instead = frozenset(flag for each in found if each.typed.get("names_argument") for flag in each.flags)

    def command(context: typer.Context, **values: Any) -> None:
        source = context.get_parameter_source
        typed = {name: value for name, value in values.items() if getattr(source(name), "name", "") == "COMMANDLINE"}
        perform(request_of(request, typed))

    signature = [inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    signature += [_typer_parameter(each) for each in found]
    command.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in signature}
    app.command(name, cls=Command, help=request.__doc__)(command)


def request_of(request: type[Request], typed: Mapping[str, Any]) -> Request:
    """The request that the words typed make.

    Args:
        typed: parameter -> value, of those that were typed.

    Raises:
        ConfigError: values that do not go together, or are none that an option takes.
    """
    nested: dict[str, Any] = {}
    for each in parameters(request):
        if each.name in typed:
            inner = nested
            for group in each.path[:-1]:
                inner = inner.setdefault(group, {})
            inner[each.name] = typed[each.name]
    return checked(request, nested)


def checked(request: type[Request], values: Any) -> Request:
    """The request of these values.

    Raises:
        ConfigError: what is wrong with them, one line for each option, by the option's name as it is typed.
    """
    try:
        return request.model_validate(values)
    except ValidationError as error:
        names = {each.path: each.as_typed for each in parameters(request)}
        lines = [_explain(problem, names) for problem in error.errors(include_url=False)]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from error


def _explain(problem: ErrorDetails, names: Mapping[tuple[str, ...], str]) -> str:
    if problem["type"] == "value_error":  # a validator's own words
        return str(problem["ctx"]["error"])
    path = tuple(part for part in problem["loc"] if isinstance(part, str))
    name = next((names[path[:end]] for end in range(len(path), 0, -1) if path[:end] in names), ".".join(path))
    if problem["type"] == "missing":
        return f"{name} is missing"
    message = problem["msg"][:1].lower() + problem["msg"][1:]
    return f"{name} {problem['input']}: {message.replace('input should be', 'must be')}"


def perform(request: Request) -> None:
    """Do what a request asks, here or in other processes, and print its result."""
    from dinov2cli.console import set_up_logging

    set_up_logging(quiet=not request.logs or worker_rank() > 0)
    elsewhere = None
    if request.launched_by and not is_worker():
        elsewhere = function_named(request.launched_by)(request)
    show(run(request) if elsewhere is None else elsewhere.result, as_json=getattr(request, "as_json", False))


def request_from(text: str, known: Iterable[type[Request]]) -> Request:
    """The request that `requests.base.words_of` has written."""
    content = json.loads(text)
    request = next(each for each in known if each.command == content["command"])
    return checked(request, content["request"])


def _typer_parameter(each: Parameter) -> inspect.Parameter:
    typed, default = each.typed, each.field.get_default()
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
    info = (typer.Argument if each.is_argument else partial(typer.Option, *each.flags))(
        help=each.field.description,
        metavar=each.metavar,
        min=each.bounds[0],
        max=each.bounds[1],
        rich_help_panel=each.panel,
        show_default=typed.get("default_text", True),
        autocompletion=COMPLETERS.get(typed.get("completes", "")),
    )
    return inspect.Parameter(
        each.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[annotation, info]
    )


def _bare(annotation: Any) -> tuple[Any, list[Any]]:
    """A type without None and annotations, and what these say of its bounds."""
    if get_origin(annotation) in (Union, UnionType):
        return _bare(next(part for part in get_args(annotation) if part is not NoneType))
    if get_origin(annotation) is Annotated:
        plain, *extras = get_args(annotation)
        return plain, [bound for extra in extras for bound in getattr(extra, "metadata", [extra])]
    return annotation, []
