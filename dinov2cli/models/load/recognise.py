"""From whatever a weights file holds to canonical DINOv2 weights, or a refusal that says what it is instead."""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dinov2cli.errors import WeightsError
from dinov2cli.models.load.layouts import LAYOUTS, timm
from dinov2cli.models.load.layouts.layout import State
from dinov2cli.models.load.tensor_files import refuse_odd_tensors

# Where a checkpoint keeps the weights: the first that is there is taken. A teacher comes before its student.
_CONTAINERS = ("teacher", "model", "state_dict", "model_state_dict", "module", "backbone", "student")
# Wrappers of PyTorch that lengthen names.
_WRAPPERS = re.compile(r"_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|_orig_mod\.")
_PREFIXES = ("module.", "model.", "teacher.", "student.", "backbone.", "dinov2.", "dinov2_with_registers.")
_PATCH_EMBEDDINGS = {"patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight",
                     "embeddings.patch_embeddings.weight"}  # fmt: skip
# Parts of a checkpoint that are known and not part of the backbone.
_EXPECTED_LEFTOVERS = ("dino_head.", "ibot_head.", "dino_loss.", "ibot_patch_loss.", "classifier.", "head.")


@dataclass
class LoadReport:
    """What was read from where, and what became of every tensor."""

    source: str
    layout: str = ""
    read: int = 0
    renamed: int = 0
    left_out: tuple[str, ...] = ()
    filled: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """For people: one line a fact."""
        lines = [f"read {self.read} tensors from {self.source} ({self.layout} layout, {self.renamed} renamed)"]
        if self.left_out:
            groups = Counter(name.split(".")[0] for name in self.left_out)
            lines.append("left out: " + ", ".join(f"{group} ({count})" for group, count in groups.items()))
        if self.filled:
            lines.append("not in the file, set to zeros: " + ", ".join(self.filled))
        return lines + self.notes

    def __str__(self) -> str:
        return "; ".join(self.lines())


def recognise(content: Any, source: str) -> tuple[State, State, LoadReport]:
    """Canonical float32 weights of what `torch.load` or safetensors read, what lies beside them, the report of how.

    Raises:
        WeightsError: it is not a DINOv2 backbone, and what it is instead, where that is known.
    """
    report = LoadReport(source)
    tensors = _strip_prefixes(taken_apart(content, source, report), source)
    for is_such, what in NOT_DINOV2:
        if is_such(set(tensors)):
            raise WeightsError(f"{source}: {what}")
    backbone = {name: tensor for name, tensor in tensors.items() if not name.startswith(_EXPECTED_LEFTOVERS)}
    report.left_out += tuple(name for name in tensors if name not in backbone)
    layout = next((layout for layout in LAYOUTS if layout.matches(set(backbone))), None)
    if layout is None:
        raise WeightsError(f"{source}: {_what_is_missing(set(backbone))}")
    try:
        state = layout.from_(backbone)
    except WeightsError as error:
        raise WeightsError(f"{source}: {error.message}") from None
    report.layout, report.read = layout.name, len(backbone)
    report.renamed = len(set(backbone) - set(state))
    report.filled = ("mask_token",) if layout.name.startswith("timm") else ()
    beside = {name: tensor for name, tensor in tensors.items() if name not in backbone}
    return _as_float32(state, source, report), beside, report


def taken_apart(content: Any, source: str, report: LoadReport) -> dict[str, Tensor]:
    """The tensors of a checkpoint, of a whole training those of its teacher; what is left out goes into the report.

    Raises:
        WeightsError: it holds no tensors of a model.
    """
    tensors = {_WRAPPERS.sub("", name): tensor for name, tensor in _unwrap(content, source, report).items()}
    return _choose_teacher(tensors, report)


def _unwrap(content: Any, source: str, report: LoadReport) -> dict[str, Tensor]:
    """The dictionary of tensors inside a checkpoint's nested dictionaries."""
    while isinstance(content, Mapping) and not any(isinstance(value, Tensor) for value in content.values()):
        inner = next((key for key in _CONTAINERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            if any(key.startswith("optimizer") or key == "param_groups" for key in map(str, content)):
                raise WeightsError(f"{source}: an optimizer state without a model")
            keys = ", ".join(sorted(map(str, content))[:6]) or "nothing"
            raise WeightsError(f"{source}: no model weights in it (it holds {keys})")
        left = [str(key) for key in content if key != inner]
        if left:
            report.notes.append(f"took '{inner}', left {', '.join(left[:6])}")
        content = content[inner]
    if not isinstance(content, Mapping):
        raise WeightsError(f"{source}: a {type(content).__name__} instead of a dictionary of weights")
    if {"exp_avg", "exp_avg_sq"} & set(map(str, content)):
        raise WeightsError(f"{source}: an optimizer state without a model")
    others = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if others:
        report.notes.append(f"ignored what is no tensor: {', '.join(others[:6])}")
    return {str(key): value for key, value in content.items() if isinstance(value, Tensor)}


def _choose_teacher(tensors: dict[str, Tensor], report: LoadReport) -> dict[str, Tensor]:
    """From a whole training model (`student.*` and `teacher.*`) the teacher, which is what DINOv2 evaluates."""
    teacher = {name: tensor for name, tensor in tensors.items() if name.startswith("teacher.")}
    if not teacher or len(teacher) == len(tensors):
        return tensors
    report.left_out += tuple(name for name in tensors if name not in teacher)
    return teacher


def _strip_prefixes(tensors: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Take off `module.`, `teacher.`, `backbone.` and the like, one after the other, where the backbone lies under."""
    while not _PATCH_EMBEDDINGS & set(tensors):
        prefix = next((prefix for prefix in _PREFIXES if any(name.startswith(prefix) for name in tensors)), None)
        if prefix is None:
            break
        stripped = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        if len(stripped) != len(tensors):
            raise WeightsError(f"{source}: two tensors of the same name once the prefix '{prefix}' is taken off")
        tensors = stripped
    return tensors


def _as_float32(state: State, source: str, report: LoadReport) -> State:
    refuse_odd_tensors(state, source)
    others = {tensor.dtype for tensor in state.values()} - {torch.float32}
    for dtype in others:
        if not dtype.is_floating_point or dtype.itemsize < 2:
            raise WeightsError(f"{source}: weights of type {dtype}; float32, bfloat16 and float16 can be read")
    if others:
        report.notes.append("converted to float32 from " + ", ".join(sorted(map(str, others))))
    return {name: tensor.to(torch.float32) for name, tensor in state.items()}


def _any(pattern: str) -> Callable[[set[str]], bool]:
    return lambda names: any(re.search(pattern, name) for name in names)


NOT_DINOV2: tuple[tuple[Callable[[set[str]], bool], str], ...] = (
    (
        _any(r"(^|\.)_?flat_param(_\d+)?$"),
        "one rank's shard of an FSDP training checkpoint: flattened pieces of the weights, without their shapes. "
        "Use the run's eval/training_<iteration>/teacher_checkpoint.pth, which holds the whole teacher",
    ),
    (_any(r"^decoder_(embed|blocks|pos_embed)"), "a masked autoencoder (MAE); dino2 loads DINOv2 models"),
    (_any(r"^masked_embed$"), "an iBOT model; dino2 loads DINOv2 models"),
    (
        _any(r"^(visual\.|text_model\.|vision_model\.|transformer\.resblocks|logit_scale)"),
        "a CLIP-like model; dino2 loads DINOv2 models",
    ),
    (_any(r"^(layer[1-4]\.\d+\.conv1|stages\.\d+\.)"), "a convolutional network; dino2 loads DINOv2 models"),
    (_any(r"\blora_[AB]\b"), "LoRA adapters without the model they adapt; merge them first"),
    (_any(r"(^|\.)(quantized|absmax|quant_map|weight_scale)"), "quantised weights; export them unquantised"),
    (
        lambda names: names <= {"weight", "bias", "linear.weight", "linear.bias"} and len(names) > 0,
        "a linear head without a backbone; give it as the linear head of a backbone",
    ),
    (
        lambda names: bool(names) and all(re.match(r"(dino_head|ibot_head|mlp|last_layer)\.", name) for name in names),
        "a projection head without a backbone",
    ),
    (
        lambda names: "patch_embed.proj.weight" in names and "mask_token" not in names and not timm.is_dinov3(names)
        and not _any(r"\.ls1\.gamma$")(names) and "blocks.0.norm1.weight" in names,
        "a vision transformer without mask token and LayerScale (DINO, DeiT or a supervised one); "
        "dino2 loads DINOv2 models",
    ),
)  # fmt: skip


def _what_is_missing(names: set[str]) -> str:
    if "patch_embed.proj.weight" not in names and any(name.startswith("blocks.") for name in names):
        return "incomplete weights, 'patch_embed.proj.weight' is missing"
    some = ", ".join(sorted(names)[:4]) or "nothing"
    return f"not a DINOv2 backbone in any layout that dino2 knows (it holds {some})"
