"""A backbone of another library as that alone opens it: a folder for transformers, a file or folder for timm."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from dinov2cli.config.library import LIBRARIES, LibraryConfig
from dinov2cli.errors import WeightsError
from dinov2cli.export.bundle import Bundle, Outputs, Runner
from dinov2cli.export.huggingface import opened_by, preprocessor_json
from dinov2cli.export.weight_files import opened_by_timm, timm_words
from dinov2cli.models.libraries import quiet_transformers, run
from dinov2cli.models.library_backbone import LibraryBackbone
from dinov2cli.models.load.layouts import timm
from dinov2cli.models.load.library import MODEL
from dinov2cli.models.load.locate import OWN_KEY
from dinov2cli.models.load.tensor_files import write_tensors

FORMATS = ("safetensors", *LIBRARIES)
"""Formats that hold such a backbone: dino2's own, and its library's."""


def check_format(name: str, architecture: LibraryConfig, *, head: bool, image_size: str | None) -> None:
    """Raise WeightsError where a format does not hold such a backbone, or not with what is asked for beside it."""
    possible = [each for each in FORMATS if each in ("safetensors", architecture.library)]
    if name not in possible:
        raise WeightsError(f"format {name} does not hold {architecture.arch}; {' and '.join(possible)} do")
    if head and name != "safetensors":
        raise WeightsError(f"--linear-head does not go along with {architecture.arch} in format {name}")
    if image_size is not None:
        raise WeightsError(f"--image-size {image_size}: {architecture.arch} takes images of any size as it is")


def write_hf(bundle: Bundle, folder: Path) -> None:
    """What `save_pretrained` of transformers writes, its preprocessor, and what dino2 knows beside."""
    with quiet_transformers():
        _network(bundle).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, OWN_KEY: _known(bundle)}, indent=2) + "\n")
    preprocessor = json.dumps(preprocessor_json(bundle.preprocessing), indent=2)
    (folder / "preprocessor_config.json").write_text(preprocessor + "\n")


def open_hf(bundle: Bundle, folder: Path) -> Runner:
    """The folder by its class of transformers, such as `ResNetBackbone`; all weights must have found their place.

    `AutoBackbone` itself opens no folders in some versions of transformers, but only what is on its hub.
    """
    with quiet_transformers():
        return _runner(bundle, opened_by(type(_network(bundle)), folder))


def how_to_open(bundle: Bundle, output: Path) -> str:
    """The line of Python that opens what was written."""
    if _architecture(bundle).library == "hf":
        return f"transformers.{type(_network(bundle)).__name__}.from_pretrained({str(output)!r})"
    return timm_words(output, *_model_of(bundle))


def write_timm(bundle: Bundle, path: Path) -> None:
    """The weights under timm's names; in a folder with the config.json by which timm opens it."""
    architecture, metadata = _architecture(bundle), {"format": "pt"}
    if path.suffix:
        metadata |= bundle.metadata
    else:
        path.mkdir()
        config = {
            "architecture": architecture.name,
            "num_classes": 0,
            "model_args": {**architecture.arguments, "in_chans": architecture.in_chans},
            "pretrained_cfg": {"num_classes": 0, **timm.pretrained_cfg(architecture.in_chans, bundle.preprocessing)},
            OWN_KEY: _known(bundle),
        }
        (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        path = path / "model.safetensors"
    write_tensors({name.removeprefix(MODEL): tensor for name, tensor in bundle.state.items()}, path, metadata)


def open_timm(bundle: Bundle, path: Path) -> Runner:
    """The file or folder as timm opens it; raises as `opened_by_timm`."""
    return _runner(bundle, opened_by_timm(path, *_model_of(bundle)))


def _model_of(bundle: Bundle) -> tuple[str, dict[str, Any]]:
    architecture = _architecture(bundle)
    return architecture.name, {**architecture.arguments, "in_chans": architecture.in_chans, "num_classes": 0}


def _runner(bundle: Bundle, model: Any) -> Callable[[Tensor], Outputs]:
    """What the library's network gives, its feature map resized as dino2 does."""
    backbone = bundle.model
    assert isinstance(backbone, LibraryBackbone)

    def outputs(images: Tensor) -> Outputs:
        pooled, found = run(backbone.config, model, images)
        return {"cls": pooled, "patches": backbone.tokens_of(found, images)}

    return outputs


def _architecture(bundle: Bundle) -> LibraryConfig:
    assert isinstance(bundle.architecture, LibraryConfig)
    return bundle.architecture


def _network(bundle: Bundle) -> Any:
    assert isinstance(bundle.model, LibraryBackbone)
    return bundle.model.model


def _known(bundle: Bundle) -> dict[str, Any]:
    return {**_architecture(bundle).model_dump(), "images": bundle.preprocessing.get("images", {})}
