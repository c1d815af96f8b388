"""What a training is made of.

The package shares its name with the call `dinov2cli.train(...)` (`dinov2cli.fit.train`), and is that call, too.
"""

import inspect
import sys
from types import ModuleType
from typing import Any

from dinov2cli.requests.base import function_named


class _Train(ModuleType):
    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """`dinov2cli.fit.train`, which see."""
        return function_named("dinov2cli.fit:train")(*arguments, **named)

    @property
    def __signature__(self) -> inspect.Signature:  # for help() and notebooks
        return inspect.signature(function_named("dinov2cli.fit:train"))


sys.modules[__name__].__class__ = _Train
