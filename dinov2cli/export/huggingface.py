"""A folder that transformers opens: `AutoModel.from_pretrained(folder)`.

The file names and keys are those of facebook/dinov2-*. transformers is needed to compare, not to write.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dinov2cli.errors import WeightsError, need
from dinov2cli.export.bundle import Bundle, Outputs, Runner
from dinov2cli.models.classifier import head_input
from dinov2cli.models.load.layouts import huggingface, of_transformers
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
    """config.json, model.safetensors and preprocessor_config.json.

    Raises:
        WeightsError: transformers' classes cannot hold this model or head.
    """
    layout = of_transformers(bundle.vit)
    if reason := layout.why_not(bundle.vit):
        raise WeightsError(f"transformers cannot hold this model: {reason}")
    architecture = bundle.vit
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
    folder.mkdir(parents=True)
    for name, content in (
        ("config.json", layout.config_json(architecture, bundle.model.images, *classes)),
        ("preprocessor_config.json", preprocessor_json(bundle.preprocessing)),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    tensors = layout.to_(bundle.state)
    if bundle.head is not None:
        tensors = {f"{huggingface.model_type(bundle.vit)}.{name}": tensor for name, tensor in tensors.items()}
        tensors |= {f"classifier.{name}": tensor for name, tensor in bundle.head.state_dict().items()}
    write_tensors(tensors, folder / "model.safetensors", {"format": "pt"})


def opened_by(opener: Any, folder: Path) -> Any:
    """The model that a class of transformers makes of a folder.

    Raises:
        WeightsError: not all weights have found their place.
    """
    model, info = opener.from_pretrained(folder, output_loading_info=True, local_files_only=True)
    if wrong := {kind: keys for kind, keys in info.items() if keys}:
        raise WeightsError(f"transformers does not find its weights in the export: {wrong}")
    return model.eval()


def open_(bundle: Bundle, folder: Path) -> Runner:
    """The folder as transformers opens it; every key must have found its place.

    Raises:
        EnvironmentProblem: transformers is not installed.
    """
    transformers: Any = need("transformers")
    transformers.utils.logging.disable_progress_bar()
    opener = transformers.AutoModel if bundle.head is None else transformers.AutoModelForImageClassification
    model = opened_by(opener, folder)
    backbone = model if bundle.head is None else getattr(model, huggingface.model_type(bundle.vit))
    prefix = bundle.model.prefix_tokens

    def run(images: Tensor) -> Outputs:
        tokens = backbone(pixel_values=images).last_hidden_state
        outputs = {"cls": tokens[:, 0], "patches": tokens[:, prefix:]}
        return outputs if bundle.head is None else outputs | {"logits": model(pixel_values=images).logits}

    return run
