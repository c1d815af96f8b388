"""dino2: DINOv2 self-supervised visual features on your own images."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dinov2cli.models.load import load_model
    from dinov2cli.requests.base import run
    from dinov2cli.requests.eval import EmbedRequest, KnnRequest, LinearRequest, LogregRequest

__version__ = "0.1.0"
__all__ = ["EmbedRequest", "KnnRequest", "LinearRequest", "LogregRequest", "__version__", "load_model", "run"]

# Lazy, so that `import dinov2cli` and the command line's --help stay free of torch.
_PLACES = {
    "dinov2cli.models.load": ("load_model",),
    "dinov2cli.requests.base": ("run",),
    "dinov2cli.requests.eval": ("EmbedRequest", "KnnRequest", "LinearRequest", "LogregRequest"),
}


def __getattr__(name: str) -> Any:
    for module, names in _PLACES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'dinov2cli' has no attribute {name!r}")
