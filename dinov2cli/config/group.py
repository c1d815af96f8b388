"""What every group of keys is: frozen and checked at the door."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Group(BaseModel):
    """A group of keys: immutable, no unknown keys, no silent conversion (`"64"` or `true` is not a number)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def key(default: Any, meaning: str, **bounds: Any) -> Any:
    """A key of a group: its default, its meaning in a sentence, and what else pydantic's `Field` takes."""
    return Field(default, description=meaning, **bounds)


def put_first(group: type[Group], *names: str) -> None:
    """Let these keys come first in files and tables, then all others as declared.

    pydantic puts inherited fields before a class's own; files keep the order that their readers know.
    """
    fields = group.model_fields
    ordered = {name: fields[name] for name in (*names, *(name for name in fields if name not in names))}
    fields.clear()
    fields.update(ordered)
    group.model_rebuild(force=True)
