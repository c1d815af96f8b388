"""A folder that transformers opens: `AutoModel.from_pretrained(folder)`.

The file names and keys are those of facebook/dinov2-*. transformers is needed to compare, not to write.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dinov2cli.errors import WeightsError, need
from dinov2cli.export.bundle import Bundle, Outputs, Runner, known_of_library, runner_of_library
from dinov2cli.models.classifier import head_input
from dinov2cli.models.libraries import quiet_transformers
from dinov2cli.models.load.layouts import huggingface, of_transformers
from dinov2cli.models.load.locate import OWN_KEY
from dinov2cli.models.load.tensor_files import write_tensors


def preprocessor_json(how: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' words for `EvalTransform.as_dict`.

    Its processors cut half a pixel further up or left where the reference rounds to even, which no setting changes.
    """
    crop, resized = how["center_crop"], how["resize_shorter_side"]
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": how["color"] == "RGB",
        "do_resize": True,
        "size": {"shortest_edge": resized},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": crop, "width": crop},
        "do_rescale": True,
        "rescale_factor": how["rescale_factor"],
        "do_normalize": True,
        "image_mean": how["mean"],
        "image_std": how["std"],
    }


def write(bundle: Bundle, folder: Path) -> None:
    """config.json, model.safetensors and preprocessor_config.json; of a backbone of transformers as that saves it.

    Raises:
        WeightsError: transformers' classes cannot hold this model or head.
    """
    if bundle.library is not None:
        with quiet_transformers():
            network: Any = bundle.library.model
            network.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        config[OWN_KEY] = known_of_library(bundle.library, bundle.preprocessing)
    else:
        config = _write_weights(bundle, folder)
    for name, content in (("config", config), ("preprocessor_config", preprocessor_json(bundle.preprocessing))):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


def _write_weights(bundle: Bundle, folder: Path) -> dict[str, Any]:
    """model.safetensors of a vision transformer; returns what is its config.json."""
    layout = of_transformers(bundle.vit)
    if reason := layout.why_not(bundle.vit):
        raise WeightsError(f"transformers cannot hold this model: {reason}")
    architecture, tensors = bundle.vit, layout.to_(bundle.state)
    classes: tuple[int, ...] = ()
    if bundle.head is not None:
        if architecture.is_rotary:
            raise WeightsError(
                "transformers has no classifier on DINOv3: the linear head cannot go along",
                hint="Export to onnx or torch-export to have both in one file.",
            )
        if head_input(bundle.head.in_features, architecture.embed_dim, architecture.depth) != (1, True):
            raise WeightsError(
                "transformers' classifier sees the class token and the mean patch token of the last block; this "
                f"linear head has {bundle.head.in_features} inputs instead of {2 * architecture.embed_dim}",
                hint="Export to onnx or torch-export, or use the head on one layer.",
            )
        classes = (bundle.head.out_features,)
        tensors = {f"{huggingface.model_type(bundle.vit)}.{name}": tensor for name, tensor in tensors.items()}
        tensors |= {f"classifier.{name}": tensor for name, tensor in bundle.head.state_dict().items()}
    folder.mkdir(parents=True)
    write_tensors(tensors, folder / "model.safetensors", {"format": "pt"})
    config: dict[str, Any] = layout.config_json(architecture, bundle.model.images, *classes)
    return config


def open_(bundle: Bundle, folder: Path) -> Runner:
    """The folder as transformers opens it; every key must have found its place.

    A backbone of transformers is opened by its class, such as `ResNetBackbone`: `AutoBackbone` itself opens no folders
    in some versions of transformers, but only what is on its hub.

    Raises:
        EnvironmentProblem: transformers is not installed.
        WeightsError: not all weights have found their place.
    """
    if bundle.library is not None:
        with quiet_transformers():
            return runner_of_library(bundle.library, _opened_by(type(bundle.library.model), folder))
    transformers: Any = need("transformers")
    transformers.utils.logging.disable_progress_bar()
    opener = transformers.AutoModel if bundle.head is None else transformers.AutoModelForImageClassification
    model = _opened_by(opener, folder)
    backbone = model if bundle.head is None else getattr(model, huggingface.model_type(bundle.vit))
    prefix = bundle.model.prefix_tokens

    def run(images: Tensor) -> Outputs:
        tokens = backbone(pixel_values=images).last_hidden_state
        outputs = {"cls": tokens[:, 0], "patches": tokens[:, prefix:]}
        return outputs if bundle.head is None else outputs | {"logits": model(pixel_values=images).logits}

    return run


def _opened_by(opener: Any, folder: Path) -> Any:
    """The model that a class of transformers makes of a folder."""
    model, info = opener.from_pretrained(folder, output_loading_info=True, local_files_only=True)
    if wrong := {kind: keys for kind, keys in info.items() if keys}:
        raise WeightsError(f"transformers does not find its weights in the export: {wrong}")
    return model.eval()


def how_to_open(bundle: Bundle, folder: Path) -> str | None:
    """The line of Python that opens a backbone of transformers; others are opened by `AutoModel`."""
    if bundle.library is None:
        return None
    return f"transformers.{type(bundle.library.model).__name__}.from_pretrained({str(folder)!r})"
