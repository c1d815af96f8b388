"""dino2: DINOv2 self-supervised visual features on your own images.

Here are `train`, `Fit`, `load_model`, `embed`, `run`, and what can be asked of `run`: `TrainRequest`, `KnnRequest`,
..., one for each command.
"""

from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dinov2cli.eval.images import embed as embed
    from dinov2cli.eval.images import load_model as load_model
    from dinov2cli.fit import Fit as Fit
    from dinov2cli.fit import train as train
    from dinov2cli.requests.base import run as run
    from dinov2cli.requests.bench import *  # noqa: F403
    from dinov2cli.requests.curate import *  # noqa: F403
    from dinov2cli.requests.datasets import *  # noqa: F403
    from dinov2cli.requests.dense import *  # noqa: F403
    from dinov2cli.requests.eval import *  # noqa: F403
    from dinov2cli.requests.export import *  # noqa: F403
    from dinov2cli.requests.pictures import *  # noqa: F403
    from dinov2cli.requests.retrieval import *  # noqa: F403
    from dinov2cli.requests.search import *  # noqa: F403
    from dinov2cli.requests.tools import *  # noqa: F403
    from dinov2cli.requests.train import *  # noqa: F403

__version__ = "0.1.0"


_PLACES = {"load_model": "eval.images", "embed": "eval.images", "run": "requests.base", "Fit": "fit"}


def _requests() -> list[ModuleType]:
    folder = import_module("dinov2cli.requests")
    return [import_module(f"dinov2cli.requests.{each.name}") for each in iter_modules(folder.__path__)]


def __getattr__(name: str) -> Any:
    # Lazy, so that `import dinov2cli` and the command line's --help stay free of torch.
    if name == "train":  # a folder, too, which is to be there under this name whoever is first
        return import_module("dinov2cli.train")
    if name in _PLACES:
        return getattr(import_module(f"dinov2cli.{_PLACES[name]}"), name)
    for module in _requests() if name.endswith("Request") else ():
        if hasattr(module, name):
            return getattr(module, name)
    raise AttributeError(f"module 'dinov2cli' has no attribute {name!r}")


def __dir__() -> list[str]:
    requests = {name for module in _requests() for name, value in vars(module).items() if hasattr(value, "command")}
    return sorted({"__version__", "train", *_PLACES, *requests})
