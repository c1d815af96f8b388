"""The keys of the configuration as one flat table, and what each of them takes, in words."""

from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from dinov2cli.config.config import Config
from dinov2cli.config.group import Group
from dinov2cli.requests.images import Words

GROUPS: dict[str, type[Group]] = {name: type(group) for name, group in Config()}
FIELDS: dict[str, FieldInfo] = {
    f"{group}.{key}": field for group, model in GROUPS.items() for key, field in model.model_fields.items()
}
"""Every key, dotted, in the order of the file: `"optim.base_lr"` and so on."""


def annotated_yaml(config: Config) -> str:
    """`config` as YAML that loads back to it, with every key's meaning and what it takes in a comment above it."""
    lines = []
    for group, keys in config.model_dump(mode="json").items():
        lines.append(f"{group}:  # {(GROUPS[group].__doc__ or '').splitlines()[0]}")
        for key, value in keys.items():
            field = FIELDS[f"{group}.{key}"]
            shown = yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()
            lines += [f"  # {field.description} Takes {expectation(field)}.", f"  {key}: {shown}"]
    return "\n".join(lines) + "\n"


def takes_text(field: FieldInfo) -> bool:
    """Whether the key's values are text (free, or one of a few words)."""
    words = get_args(field.annotation) if get_origin(field.annotation) is Literal else (None,)
    return field.annotation is str or all(isinstance(word, str) for word in words)


def choices(field: FieldInfo) -> tuple[str, ...]:
    """The words a key takes, or may take among others; empty for any other kind of key."""
    if get_origin(field.annotation) is Literal:
        return tuple(map(_spelled, get_args(field.annotation)))
    return next((item.known for item in field.metadata if isinstance(item, Words)), ())


def expectation(field: FieldInfo) -> str:
    """What the key takes, in words: `a whole number, at least 1`."""
    return _in_words(field.annotation, field.metadata)


def _in_words(annotation: Any, metadata: list[Any]) -> str:
    if get_origin(annotation) is not None and hasattr(annotation, "__metadata__"):  # Annotated[...]
        return _in_words(get_args(annotation)[0], [*_flat(annotation.__metadata__), *metadata])
    if words := next((item for item in metadata if isinstance(item, Words)), None):
        return words.expected
    if get_origin(annotation) is Literal:
        return f"one of {', '.join(map(_spelled, get_args(annotation)))}"
    if get_origin(annotation) in (Union, UnionType):
        inner = [part for part in get_args(annotation) if part is not NoneType]
        return f"{_in_words(inner[0], metadata)}, or null"
    if get_origin(annotation) is tuple:
        parts = get_args(annotation)
        if parts[-1] is Ellipsis:
            return f"a list, each {_in_words(parts[0], [])}"
        return f"a list of {len(parts)} numbers, each{_bounds(_flat(parts[0].__metadata__)).removeprefix(',')}"
    if get_origin(annotation) is dict:
        return "names with their values, {NAME: VALUE}"
    kind = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[annotation]
    return kind + _bounds(metadata)


def _spelled(value: Any) -> str:
    """As it stands in a configuration file."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _flat(metadata: Any) -> list[Any]:
    return [bound for item in metadata for bound in (item.metadata if isinstance(item, FieldInfo) else [item])]


def _bounds(metadata: list[Any]) -> str:
    limits = {
        name: getattr(item, name) for item in metadata for name in ("ge", "gt", "le", "lt") if hasattr(item, name)
    }
    if "ge" in limits and "le" in limits:
        return f", from {limits['ge']} to {limits['le']}"
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    texts = [f"{words[name]} {limits[name]}" for name in words if name in limits]
    return f", {' and '.join(texts)}" if texts else ""
