"""A folder that transformers opens: `AutoModel.from_pretrained(folder)`.

The file names and keys are those of facebook/dinov2-*. transformers is needed to compare, not to write.
"""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from dinov2cli.errors import WeightsError
from dinov2cli.export.bundle import Bundle, Outputs, Runner, need
from dinov2cli.models.classifier import head_input
from dinov2cli.models.conversion import to_hf, why_not_hf
from dinov2cli.models.tensor_files import write_tensors

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def write_hf(bundle: Bundle, folder: Path) -> None:
    """config.json, model.safetensors and preprocessor_config.json.

    Raises:
        WeightsError: transformers' classes cannot hold this model or head.
    """
    if reason := why_not_hf(bundle.architecture):
        raise WeightsError(f"transformers cannot hold this model: {reason}")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(_config(bundle), indent=2) + "\n")
    (folder / "preprocessor_config.json").write_text(json.dumps(_preprocessing(), indent=2) + "\n")
    tensors = to_hf(bundle.state)
    if bundle.head is not None:
        tensors = {f"{_kind(bundle)}.{name}": tensor for name, tensor in tensors.items()}
        tensors |= {f"classifier.{name}": tensor for name, tensor in bundle.head.state_dict().items()}
    write_tensors(tensors, folder / "model.safetensors", {"format": "pt"})


def open_hf(bundle: Bundle, folder: Path) -> Runner:
    """The folder as transformers opens it; every key must have found its place.

    Raises:
        EnvironmentProblem: transformers is not installed.
    """
    transformers: Any = need("transformers")
    transformers.utils.logging.disable_progress_bar()
    opener = transformers.AutoModel if bundle.head is None else transformers.AutoModelForImageClassification
    model, info = opener.from_pretrained(folder, output_loading_info=True, local_files_only=True)
    wrong = {kind: keys for kind, keys in info.items() if keys}
    if wrong:
        raise WeightsError(f"transformers does not find its weights in the export: {wrong}")
    model.eval()
    backbone = model if bundle.head is None else getattr(model, _kind(bundle))
    prefix = bundle.model.prefix_tokens

    def run(images: Tensor) -> Outputs:
        tokens = backbone(pixel_values=images).last_hidden_state
        outputs = {"cls": tokens[:, 0], "patches": tokens[:, prefix:]}
        return outputs if bundle.head is None else outputs | {"logits": model(pixel_values=images).logits}

    return run


def hf_differs_away_from_native(bundle: Bundle) -> str | None:
    """Why transformers gives other features than ours at other image sizes; None if it does not."""
    architecture = bundle.architecture
    antialias = architecture.num_register_tokens > 0  # fixed in its two classes
    if architecture.interpolate_offset == 0 and architecture.interpolate_antialias == antialias:
        return None
    return (
        f"transformers resizes position embeddings with offset 0 and antialias={antialias}, this model with offset "
        f"{architecture.interpolate_offset} and antialias={architecture.interpolate_antialias}"
    )


def _kind(bundle: Bundle) -> str:
    return "dinov2_with_registers" if bundle.architecture.num_register_tokens else "dinov2"


def _config(bundle: Bundle) -> dict[str, Any]:
    architecture = bundle.architecture
    class_name = "Dinov2WithRegisters" if architecture.num_register_tokens else "Dinov2"
    ratio = architecture.hidden_dim // architecture.embed_dim if architecture.ffn_layer == "mlp" else 4
    config: dict[str, Any] = {
        "architectures": [class_name + ("Model" if bundle.head is None else "ForImageClassification")],
        "model_type": _kind(bundle),
        "hidden_size": architecture.embed_dim,
        "num_hidden_layers": architecture.depth,
        "num_attention_heads": architecture.num_heads,
        "mlp_ratio": ratio,
        "use_swiglu_ffn": architecture.ffn_layer != "mlp",
        "image_size": architecture.img_size,
        "patch_size": architecture.patch_size,
        "num_channels": architecture.in_chans,
        "qkv_bias": architecture.qkv_bias,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "layerscale_value": 1.0,
        "drop_path_rate": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "hidden_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "dtype": "float32",
        # transformers has no words for these; they bring the model back here as it was.
        "dino2": {
            "interpolate_antialias": architecture.interpolate_antialias,
            "interpolate_offset": architecture.interpolate_offset,
        },
    }
    if architecture.num_register_tokens:
        config["num_register_tokens"] = architecture.num_register_tokens
    if bundle.head is not None:
        if head_input(bundle.head.in_features, architecture.embed_dim, architecture.depth) != (1, True):
            raise WeightsError(
                "transformers' classifier sees the class token and the mean patch token of the last block; this "
                f"linear head has {bundle.head.in_features} inputs instead of {2 * architecture.embed_dim}",
                hint="Export to onnx or torch-export, or use the head on one layer.",
            )
        classes = bundle.head.out_features
        config["id2label"] = {str(i): f"LABEL_{i}" for i in range(classes)}
        config["label2id"] = {f"LABEL_{i}": i for i in range(classes)}
    return config


def _preprocessing() -> dict[str, Any]:
    """The evaluation transform of the DINOv2 paper: short side 256 bicubic, centre crop 224, ImageNet statistics."""
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": 256},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
    }
