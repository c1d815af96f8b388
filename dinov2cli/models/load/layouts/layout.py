"""What a layout is: names and shapes of DINOv2 weights in an ecosystem, to and from ours (the released, flat ones).

Only renaming, concatenation and slicing happen: numbers never change, with one exception (timm's registers).
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dinov2cli.config.images import IMAGENET
from dinov2cli.config.vit import ViTConfig
from dinov2cli.errors import WeightsError

State = dict[str, Tensor]
StateView = Mapping[str, Tensor]


class Layout(NamedTuple):
    """A way of naming the weights: `matches` looks at the keys only, `from_` renames them to ours."""

    name: str
    matches: Callable[[set[str]], bool]
    from_: Callable[[StateView], State]


def renamed(name: str, replacements: Iterable[tuple[str, str]]) -> str:
    """With each first part replaced by the second, in order."""
    for old, new in replacements:
        name = name.replace(old, new)
    return name


def join_rows(state: State, parts: Sequence[str], joined: str) -> None:
    """Put `joined` in the place of `parts`, which are its rows. Raises WeightsError where one is missing."""
    for name in [name for name in state if f".{parts[0]}." in name]:
        names = [name.replace(f".{parts[0]}.", f".{part}.") for part in parts]
        if missing := [part for part in names if part not in state]:
            raise WeightsError(f"incomplete weights, '{missing[0]}' is missing beside '{names[0]}'")
        state[name.replace(f".{parts[0]}.", f".{joined}.")] = torch.cat([state.pop(part) for part in names])


def images_said(mean: Any, std: Any) -> dict[str, Any]:
    """The hint that images are normalised otherwise than ImageNet's, if these lists say so."""
    if isinstance(mean, list) and isinstance(std, list) and (tuple(mean), tuple(std)) != IMAGENET:
        return {"images": {"mean": mean, "std": std}}
    return {}


def first_unknown(config: ViTConfig, known: Collection[str]) -> str | None:
    """Words for an option of the model that a layout knows nothing of, where it is not as usual; None if there is none.

    So a layout refuses models with an option that was added after it was written.
    """
    for name, field in ViTConfig.model_fields.items():
        if name not in known and getattr(config, name) != field.default:
            return f"it knows no {field.title or name}, which is {getattr(config, name)} here"
    return None
