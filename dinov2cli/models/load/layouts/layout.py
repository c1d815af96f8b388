"""What a layout is: names and shapes of DINOv2 weights in an ecosystem, to and from ours (the released, flat ones).

Only renaming, concatenation and slicing happen: numbers never change, with one exception (timm's registers).
"""

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from torch import Tensor

from dinov2cli.config.vit import ViTConfig

State = dict[str, Tensor]
StateView = Mapping[str, Tensor]


class Layout(NamedTuple):
    """A way of naming the weights: `matches` looks at the keys only, `from_` renames them to ours."""

    name: str
    matches: Callable[[set[str]], bool]
    from_: Callable[[StateView], State]


def first_unknown(config: ViTConfig, known: Collection[str]) -> str | None:
    """Words for an option of the model that a layout knows nothing of, where it is not as usual; None if there is none.

    So a layout refuses models with an option that was added after it was written.
    """
    for name, field in ViTConfig.model_fields.items():
        if name not in known and getattr(config, name) != field.default:
            return f"it knows no {field.title or name}, which is {getattr(config, name)} here"
    return None
