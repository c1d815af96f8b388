"""Files of dense heads: the released ones by name, those of others, and our own, which say what weights do not show."""

import json
import re
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor

from dinov2cli.config.class_names import ADE20K, VOC
from dinov2cli.console import logger
from dinov2cli.errors import WeightsError
from dinov2cli.files import replacing, user_path, writing
from dinov2cli.models.dense_heads import (
    DenseHead,
    DenseModel,
    DepthHead,
    DPTHead,
    HeadConfig,
    SegmentationHead,
    fingerprint_of,
)
from dinov2cli.models.library_backbone import Backbone
from dinov2cli.models.load import load_model, said_in
from dinov2cli.models.load.fetch import fetch, is_url
from dinov2cli.models.load.released import RELEASED, RELEASED_URL
from dinov2cli.models.load.tensor_files import read_tensors, refuse_odd_tensors, refuse_others, write_tensors
from dinov2cli.models.vision_transformer import VisionTransformer, shapes_of

SAID = "dino2.head"
"""The key of a file's metadata under which our own say their `HeadConfig`."""
PREFIX = "decode_head."

_DATASETS = {
    "nyu": HeadConfig(task="depth", max_depth=10, dataset="NYU Depth v2", short_side=480),
    "kitti": HeadConfig(task="depth", max_depth=80, dataset="KITTI", short_side=352),
    "ade20k": HeadConfig(task="segmentation", dataset="ADE20K", short_side=512, classes=ADE20K),
    "voc2012": HeadConfig(task="segmentation", dataset="Pascal VOC 2012", short_side=512, classes=VOC),
}
_OTHER_NAMES = (  # DINOv3's, of the same segmentation head
    (re.compile(r"^batchnorm_layer\."), "bn."),
    (re.compile(r"^conv\.(weight|bias)$"), r"conv_seg.\1"),
)


class ReleasedHead(NamedTuple):
    """A released head, by the name of its file.

    Args:
        backbone: released name of the model it was trained on; there are none for models with registers.
        dataset: `nyu`, `kitti`, `ade20k` or `voc2012`.
        kind: `linear`, on the last block; `linear4` or `ms`, on four; `dpt`.
    """

    backbone: str
    dataset: str
    kind: str

    @property
    def name(self) -> str:
        return f"{self.backbone}_{self.dataset}_{self.kind}"

    @property
    def url(self) -> str:
        return f"{RELEASED_URL}/{self.backbone}/{self.name}_head.pth"

    @property
    def config(self) -> HeadConfig:
        return _DATASETS[self.dataset].model_copy(update={"backbone": self.backbone})

    def without_weights(self) -> DenseHead:
        """Such a head, at random."""
        width = RELEASED[self.backbone].architecture.embed_dim
        if self.config.task == "segmentation":
            inputs = width * (1 if self.kind == "linear" else 4)
            return SegmentationHead(inputs, len(self.config.classes), self.config)
        if self.kind == "dpt":
            return DPTHead(8 * width, config=self.config)
        return DepthHead(2 * width * (1 if self.kind == "linear" else 4), config=self.config)


def _released_heads() -> dict[str, ReleasedHead]:
    """By the names of their files, and those that torch.hub's names mean by themselves."""
    heads: dict[str, ReleasedHead] = {}
    kinds = *product(("nyu", "kitti"), ("linear", "linear4", "dpt")), *product(("ade20k", "voc2012"), ("linear", "ms"))
    for backbone in (f"dinov2_vit{letter}14" for letter in "sblg"):
        heads |= {(head := ReleasedHead(backbone, *kind)).name: head for kind in kinds}
        heads[f"{backbone}_ld"] = ReleasedHead(backbone, "nyu", "linear4")
        heads[f"{backbone}_dd"] = ReleasedHead(backbone, "nyu", "dpt")
    return heads


RELEASED_HEADS = _released_heads()
"""Every released head by name, such as `dinov2_vits14_voc2012_ms`; `dinov2_vits14_ld` and `_dd` are of NYU."""


def load_dense(
    head: str | Path | DenseHead,
    model: str | Path | Backbone | None = None,
    *,
    pretrained: bool = True,
    **arguments: Any,
) -> DenseModel:
    """A backbone with a head for segmentation or depth, on the CPU, in eval mode.

    Args:
        head: a released name (`dinov2_vits14_nyu_dpt`), a file or a URL, or a head that there is.
        model: a backbone, or what `load_model` takes; by default the one that the head was trained on.
        pretrained: False gives random weights, of a released head.
        arguments: to `load_model`.

    Raises:
        WeightsError: there is no such head or model, or they do not fit.
    """
    if not pretrained:
        if str(head) not in RELEASED_HEADS:
            raise WeightsError(f"{head}: is no released head; with pretrained=False there is none of another name")
        head = RELEASED_HEADS[str(head)].without_weights()
    found = head if isinstance(head, DenseHead) else read_head(head)
    if model is None and not found.config.backbone:
        raise WeightsError(f"{head}: does not say on which backbone it was trained; give the model as well")
    if not isinstance(model, Backbone):
        model = load_model(model or found.config.backbone, pretrained, **arguments)
    if pretrained:
        warn_of_another(found.config, model)
    return DenseModel(model, found).eval()


def warn_of_another(config: HeadConfig, model: Backbone) -> None:
    """Say so where a head was trained on other weights than these, as far as it tells."""
    released = RELEASED.get(config.backbone)
    if config.fingerprint:
        same = config.fingerprint == fingerprint_of(model)
    else:
        same = released is None or (
            isinstance(model, VisionTransformer) and shapes_of(released.architecture) == shapes_of(model.config)
        )
    if not same:
        logger.warning("the head was trained on %s, and this is another model: its maps mean little", config.backbone)


def check_head(source: str | Path, option: str) -> None:
    """Raise WeightsError where there is no file that `read_head` could read; nothing is downloaded."""
    if str(source) not in RELEASED_HEADS and not is_url(str(source)) and not user_path(source).is_file():
        raise WeightsError(
            f"{option} {source}: is no file, and no released head has that name",
            "Released are dinov2_vit{s,b,l,g}14_{nyu,kitti}_{linear,linear4,dpt} and ..._{ade20k,voc2012}_{linear,ms}.",
        )


def read_head(source: str | Path) -> DenseHead:
    """A head from a file of its own, a URL of one, or by its released name; in eval mode, without gradients.

    The file is a `.pth` with the tensors under `state_dict`, or by themselves, or a `.safetensors`; their names may
    begin with `decode_head.`. Beside them a `.pth` may hold what is left of its training. What weights do not show is
    what our own files say of it, else what is known of a released head by the file's name, else as they were made.

    Raises:
        WeightsError: no such file, something else in it, or a tensor that is missing, odd or not used.
    """
    released = RELEASED_HEADS.get(str(source))
    if released or is_url(str(source)):
        file = fetch(released.url if released else str(source))
    else:
        check_head(source, "head")
        file = user_path(source)
    released = released or RELEASED_HEADS.get(file.stem.removesuffix("_head"))
    content, metadata = read_tensors(file)
    content = content if isinstance(content, dict) else {}
    held = content.get("state_dict", content)
    held = {str(name): value for name, value in held.items() if name != "meta"} if isinstance(held, dict) else {}
    state = {_own_name(name): value for name, value in held.items()}
    if not {"conv_seg.weight", "conv_depth.weight", "conv_depth.head.0.weight"} & state.keys():
        raise WeightsError(
            f"{file}: no head for segmentation or depth; it would hold {PREFIX}conv_seg or {PREFIX}conv_depth, and "
            f"holds {', '.join(sorted(held)[:4]) or 'no tensors by name'}"
        )
    if odd := [name for name, value in held.items() if not isinstance(value, Tensor)]:
        raise WeightsError(f"{file}: '{odd[0]}' is no tensor")
    if twice := [name for name in held if _own_name(name) != name and _own_name(name) in held]:
        raise WeightsError(f"{file}: it has '{twice[0]}' and '{_own_name(twice[0])}', which are the same")
    refuse_odd_tensors(state, str(file))
    said = _said(content.get("meta"), metadata, str(file))
    head = _without_weights(state, str(file))
    head.config = _config(said, released, head, str(file))
    shapes = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
    state |= {name: torch.tensor(0) for name in shapes if name.endswith("num_batches_tracked") and name not in state}
    refuse_others(state, shapes, f"a {head.config.task} head", str(file))
    head.to_empty(device="cpu").load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return head.eval().requires_grad_(False)


def save_head(head: DenseHead, path: Path, model: Backbone | None = None) -> None:
    """Write a head, and what its weights do not show, as a file that `read_head` reads: `.pth` or `.safetensors`.

    Args:
        model: the one that it was trained on, by whose weights it is known again.

    Raises:
        WeightsError: another suffix.
        EnvironmentProblem: it cannot be written.
    """
    state = {PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}
    known = {"fingerprint": fingerprint_of(model)} if model is not None else {}
    if (place := user_path(head.config.backbone)).exists() and head.config.backbone:
        known["backbone"] = str(place.resolve())  # to be found from other folders, too
    config = head.config.model_copy(update=known).model_dump(mode="json", exclude_defaults=True)
    if path.suffix not in (".pth", ".safetensors"):
        raise WeightsError(f"{path}: heads are written as .pth or .safetensors")
    with writing(path), replacing(path, flush=True) as aside:
        if path.suffix == ".safetensors":
            write_tensors(state, aside, {SAID: json.dumps(config)})
        else:
            torch.save({"state_dict": state, "meta": {SAID: config, "CLASSES": config.get("classes", [])}}, aside)


def _own_name(name: str) -> str:
    name = name.removeprefix("module.").removeprefix(PREFIX)
    for pattern, own in _OTHER_NAMES:
        name = pattern.sub(own, name)
    return name


def _said(meta: Any, metadata: Mapping[str, str], file: str) -> dict[str, Any]:
    """What a file says of its head: our own words, or the classes of one that mmsegmentation wrote."""
    meta = meta if isinstance(meta, dict) else {}
    said = said_in(metadata, SAID, file) if SAID in metadata else meta.get(SAID)
    if said is None:
        return {key: meta[name] for key, name in (("classes", "CLASSES"), ("palette", "PALETTE")) if meta.get(name)}
    if not isinstance(said, dict):
        raise WeightsError(f"{file}: what it says of itself under {SAID!r} is damaged")
    return said


def _config(said: dict[str, Any], released: ReleasedHead | None, head: DenseHead, file: str) -> HeadConfig:
    known = released.config.model_dump() if released and released.config.task == head.config.task else {}
    said = {str(key): value for key, value in said.items()}
    try:
        config = HeadConfig(**{"task": head.config.task, **known, **said})
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, each['loc']))} {each['msg']}".strip() for each in error.errors()]
        raise WeightsError(f"{file}: what it says of itself cannot be: {'; '.join(wrong)}") from None
    classes = head.conv_seg.out_channels if isinstance(head, SegmentationHead) else 0
    if config.task != head.config.task:
        raise WeightsError(f"{file}: says that it is for {config.task}, and holds a head for {head.config.task}")
    for what in ("classes", "palette"):
        if classes and len(getattr(config, what)) not in (0, classes):
            raise WeightsError(f"{file}: names {len(getattr(config, what))} {what}, and its head has {classes} classes")
    return config


def _without_weights(state: Mapping[str, Tensor], file: str) -> DenseHead:
    """The head that has such tensors, as far as one of them shows it."""
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    with torch.device("meta"):
        if (shape := shapes.get("conv_seg.weight")) and len(shape) == 4:
            return SegmentationHead(shape[1], shape[0])
        if (shape := shapes.get("conv_depth.weight")) and len(shape) == 4:
            return DepthHead(shape[1], shape[0])
        first, fused = shapes.get("reassemble_blocks.readout_projects.0.0.weight"), shapes.get("project.conv.weight")
        if first and fused and len(first) == 2 and first[0] >= 8 and first[0] % 8 == 0 and fused[0] > 1:
            return DPTHead(8 * first[0], fused[0])
    raise WeightsError(f"{file}: no head that is known has the shapes of {', '.join(sorted(shapes)[:4])}")
