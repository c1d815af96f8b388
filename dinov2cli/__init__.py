"""dino2: DINOv2 self-supervised visual features on your own images."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dinov2cli.models.weights import load_model

__version__ = "0.1.0"
__all__ = ["__version__", "load_model"]


def __getattr__(name: str) -> Any:
    # Lazy, so that `import dinov2cli` and the command line's --help stay free of torch.
    if name == "load_model":
        from dinov2cli.models.weights import load_model

        return load_model
    raise AttributeError(f"module 'dinov2cli' has no attribute {name!r}")
