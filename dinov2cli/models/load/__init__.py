"""Load DINOv2 weights from anywhere: `load_model`, and what training needs to start from them.

Recognition is strict. Every tensor of the backbone is either used or the load fails; what is not of the backbone
(projection heads, classifiers) is left out and reported.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from dinov2cli.config.images import IMAGENET, Images
from dinov2cli.config.library import LibraryConfig
from dinov2cli.config.vit import ARCHITECTURES, OF_DINOV3, RESIZING, Architecture, ViTConfig, ViTOptions
from dinov2cli.console import logger
from dinov2cli.errors import WeightsError
from dinov2cli.models.adapt import (
    SIZE_POLICIES,
    AnySizeVisionTransformer,
    adapt_patch_embedding,
    resize_patch_embedding,
)
from dinov2cli.models.library_backbone import Backbone, LibraryBackbone
from dinov2cli.models.load.infer import infer_architecture
from dinov2cli.models.load.layouts import timm
from dinov2cli.models.load.layouts.layout import State
from dinov2cli.models.load.library import (
    build_library,
    is_folder_of_transformers,
    library_config,
    library_state,
    load_folder_into,
    load_library_into,
)
from dinov2cli.models.load.locate import Source, config_yaml_hints, json_object, locate
from dinov2cli.models.load.recognise import LoadReport, recognise
from dinov2cli.models.load.released import BACKBONES, RELEASED
from dinov2cli.models.load.tensor_files import read_tensors, refuse_others
from dinov2cli.models.positions import resize_positions, rope_periods
from dinov2cli.models.vision_transformer import VisionTransformer, shapes_of

__all__ = ["RecognisedWeights", "Source", "load_backbone_into", "load_model", "locate", "read_weights"]


@dataclass(frozen=True)
class RecognisedWeights:
    """Canonical weights and what is known of them.

    Args:
        state: flat float32 state dict (`blocks.0.attn.qkv.weight`, ...).
        architecture: inferred from it and from what lies beside it; of a backbone of another library, as that says.
        images: what it expects of its images, likewise.
        report: what was read, renamed, left out.
        source: the files, and the run they belong to.
        metadata: of a safetensors file.
        beside: what else the checkpoint holds for this backbone, as it is named there: heads.
    """

    state: State
    architecture: ViTConfig | LibraryConfig
    images: Images
    report: LoadReport
    source: Source
    metadata: dict[str, str]
    beside: State


def load_model(
    name_or_path: str | Path | Source,
    pretrained: bool = True,
    *,
    config_file: str | Path | None = None,
    num_heads: int | None = None,
    interpolate_antialias: bool | None = None,
    interpolate_offset: float | None = None,
    in_chans: int | None = None,
    size_policy: str = "error",
    **overrides: Any,
) -> Backbone:
    """A DINOv2 backbone with its weights, or a DINOv3 one, on the CPU, in eval mode.

    Of a run that has distilled into an architecture of another library, a `LibraryBackbone`.

    Args:
        name_or_path: a released name (`dinov2_vitb14_reg`), an http(s) or file URL, a run folder (its newest complete
            teacher), a teacher checkpoint, a `.pth` or `.safetensors` file, a Hugging Face or timm folder; or weights
            that `locate` has found.
        pretrained: False gives a released name's architecture with random weights.
        config_file: a run's config.yaml, where none lies beside the weights.
        num_heads: attention heads, where neither the width nor a config tells.
        interpolate_antialias: how position embeddings are resized, which no weights show: by default as the config
            says, else as the released models do it (with registers antialiased and exact, without them neither, with
            an offset of 0.1).
        interpolate_offset: likewise.
        in_chans: image channels other than the weights' three. One channel sums the patch filters, so that a grey
            image gives the features of its colour version; C channels repeat them cyclically, times 3/C.
        size_policy: what to do with images whose sides are no multiples of the patch size: `error`, `pad` (zeros to
            the right and below, on the normalised image) or `crop` (the centre).
        overrides: further arguments of `VisionTransformer`, such as `attention_backend`.

    Raises:
        WeightsError: the weights are missing, incomplete, of another model, or do not fit the config.
    """
    if size_policy not in SIZE_POLICIES:
        raise WeightsError(f"size_policy={size_policy!r} is unknown; known: {', '.join(SIZE_POLICIES)}")
    given: dict[str, Any] = {
        "num_heads": num_heads,
        "interpolate_antialias": interpolate_antialias,
        "interpolate_offset": interpolate_offset,
    }
    given = {key: value for key, value in given.items() if value is not None}
    if not pretrained:
        if (released := RELEASED.get(str(name_or_path))) is None:
            raise WeightsError(f"'{name_or_path}' is no released name; released: {', '.join(BACKBONES)}")
        return _build(released.architecture, size_policy, **given, in_chans=in_chans or 3, **overrides).eval()
    weights = read_weights(name_or_path, config_file=config_file, **given)
    for line in weights.report.lines():
        logger.info("%s", line)
    asked = {**given, **overrides, **({} if size_policy == "error" else {"size_policy": size_policy})}
    if asked and isinstance(weights.architecture, LibraryConfig):
        raise WeightsError(f"{', '.join(asked)}: {weights.architecture.arch} is no vision transformer, whose these are")
    return build_from(weights, in_chans=in_chans, size_policy=size_policy, **overrides).eval()


def build_from(
    weights: RecognisedWeights, *, in_chans: int | None = None, size_policy: str = "error", **overrides: Any
) -> Backbone:
    """A model of the weights' architecture that holds them; arguments as in `load_model`."""
    if isinstance(weights.architecture, LibraryConfig):
        return build_library(weights.architecture, weights.state, weights.images, in_chans)
    architecture, images, state = weights.architecture, weights.images, dict(weights.state)
    if in_chans is not None and in_chans != architecture.in_chans:
        state["patch_embed.proj.weight"] = adapt_patch_embedding(state["patch_embed.proj.weight"], in_chans)
        architecture, images = architecture.changed(in_chans=in_chans), Images(in_chans=in_chans)
    with torch.device("meta"):  # the random initialisation would be thrown away: 1.1 billion draws for the giant
        model = _build(architecture, size_policy, **overrides)
    assert state.keys() >= dict(model.named_buffers()).keys(), "buffers would stay uninitialised"
    state = _at_grid(state, model.config.grid, architecture)
    model.to_empty(device="cpu").load_state_dict(state, strict=True)
    model.images = images
    return model


def at_size(weights: RecognisedWeights, side: int) -> RecognisedWeights:
    """The weights with position embeddings for square images of `side` pixels, resized as the model would do it."""
    assert isinstance(weights.architecture, ViTConfig)
    architecture = weights.architecture.changed(img_size=side)
    return replace(
        weights, state=_at_grid(weights.state, architecture.grid, weights.architecture), architecture=architecture
    )


def _at_grid(state: State, grid: int, architecture: ViTConfig) -> State:
    """The state with learned position embeddings, if it has such, resized as `architecture` says."""
    if architecture.is_rotary:
        return state
    return {**state, "pos_embed": resize_positions(state["pos_embed"], (grid, grid), architecture)}


def _build(architecture: ViTConfig, size_policy: str, **overrides: Any) -> VisionTransformer:
    try:
        if size_policy == "error":
            return VisionTransformer(architecture, **overrides)
        return AnySizeVisionTransformer(size_policy, architecture, **overrides)
    except (TypeError, ValueError) as error:
        raise WeightsError(f"these arguments do not make a model: {error}") from None


def read_weights(
    name_or_path: str | Path | Source, *, config_file: str | Path | None = None, **given: Any
) -> RecognisedWeights:
    """Find, read, convert and check weights without building a model. Arguments and errors as in `load_model`."""
    source = locate(name_or_path)
    content: Any = None
    metadata: dict[str, str] = {}
    for file in source.files:
        part, metadata = read_tensors(file)
        content = part if content is None else {**content, **part}
    hints = dict(source.hints)
    if said := said_in(metadata, "dino2.architecture", source.name):
        hints |= {"from": f"the metadata of {source.name}", **said}
    if "images" in (how := said_in(metadata, "dino2.preprocessing", source.name)):
        hints["images"] = how["images"]
    if config_file is not None:
        hints |= config_yaml_hints(Path(config_file))
    if source.released:
        hints |= {"from": f"the name {source.released.name}", **source.released.architecture.model_dump()}
    if (of_library := library_config(hints, source.name)) is not None:
        state, beside, report = library_state(content, of_library, source)
        images = _images(hints, of_library.in_chans, source.name, report)
        return RecognisedWeights(state, of_library, images, report, source, metadata, beside)
    if "refused" in hints:
        raise WeightsError(hints["refused"])
    state, beside, report = recognise(content, source.name)
    if report.layout == "timm" and "dino2.lost" in metadata:
        state = timm.restore(state, metadata)
        report.filled = ()
    architecture = infer_architecture(state, {**hints, **given}, source.name)
    if report.layout in ("transformers DINOv3", "timm DINOv3"):  # which make them anew
        state["rope_embed.periods"] = rope_periods(architecture)
    refuse_others(state, shapes_of(architecture), architecture.describe(), source.name)
    images = _images(hints, architecture.in_chans, source.name, report)
    return RecognisedWeights(state, architecture, images, report, source, metadata, beside)


def _images(hints: Mapping[str, Any], in_chans: int, source: str, report: LoadReport) -> Images:
    """What the model expects of its images, as it is said beside the weights; a note where that is not enough."""
    try:
        images = Images(**{**hints.get("images", {}), "in_chans": in_chans})
    except (ValidationError, TypeError) as error:
        problems = error.errors() if isinstance(error, ValidationError) else [{"loc": ("images",)}]
        wrong = ", ".join(f"{'.'.join(map(str, problem['loc']))}" for problem in problems)
        raise WeightsError(f"{source}: what is said beside the weights of their images cannot be: {wrong}") from None
    if images.mean is None and images.in_chans != len(IMAGENET.mean):
        mean, std = (levels[0] for levels in images.statistics)
        report.notes.append(
            f"mean and standard deviation of its {images.in_chans} channels are said nowhere: ImageNet's averages, "
            f"{mean} and {std}, stand for them; data.mean and data.std of a --config-file would count"
        )
    return images


def said_in(metadata: Mapping[str, str], key: str, source: str) -> dict[str, Any]:
    """A JSON object that a safetensors file's metadata may have under `key`; empty where they have none.

    Raises:
        WeightsError: it is something else.
    """
    return json_object(metadata.get(key, "{}"), f"{source}: the metadata under {key!r} are damaged:")


@torch.no_grad()
def load_backbone_into(
    model: Backbone, source: str | Path | Source, channels: str = "same", patches: str = "same"
) -> LoadReport:
    """Start `model` from weights made elsewhere, in place.

    Position embeddings for another image size are resized to the model's native grid as the source would resize them,
    so that at that size the model gives the source's features. Everything else must agree, unless asked for otherwise.

    Args:
        channels: `same`, or how patch filters are made for another number of channels; see `adapt_patch_embedding`.
        patches: `same`, or `resize`: the patch filters, to another patch size.

    Raises:
        WeightsError: another width, depth, patch size, number of registers or feed-forward layer; the message says
            which, and the config keys of a model that would fit. The model is then unchanged.
    """
    source = locate(source)
    if isinstance(model, LibraryBackbone) and is_folder_of_transformers(source) and "library" not in source.hints:
        return load_folder_into(model, source)
    weights = read_weights(source)
    theirs, ours = weights.architecture, model.config
    if isinstance(theirs, LibraryConfig) or isinstance(ours, LibraryConfig):
        return load_library_into(model, theirs, weights.state, weights.report)
    adapted = ["in_chans"] * (channels != "same") + ["patch_size"] * (patches != "same")
    differs = [
        name
        for name in ViTConfig.model_fields
        if name not in ("img_size", "pos_embed_rope_dtype", *RESIZING, *adapted)
        and _shown(theirs, name) != _shown(ours, name)
    ]
    if differs:
        words = [
            f"{ViTConfig.model_fields[name].title} {_shown(theirs, name)} instead of {_shown(ours, name)}"
            for name in differs
        ]
        wanted = " ".join(
            f"student.{key}={spell(value)}"
            for key, value in student_settings(theirs).items()
            if key not in OF_DINOV3 or {value, getattr(ours, key)} != {ViTOptions.model_fields[key].default}
        )
        ways = {"in_chans": "student.pretrained_channels=mean (or repeat, zero-new)",
                "patch_size": "student.pretrained_patches=resize"}  # fmt: skip
        adapting = "".join(f"; {way} makes filters of theirs" for name, way in ways.items() if name in differs)
        raise WeightsError(
            f"{weights.source.name} cannot start this model: it has {', '.join(words)}",
            hint=f"A model that it can start has {wanted}{adapting}",
        )
    state, filters = dict(weights.state), "patch_embed.proj.weight"
    if ours.in_chans != theirs.in_chans:
        state[filters] = adapt_patch_embedding(state[filters], ours.in_chans, channels)
        weights.report.notes.append(f"patch filters of {theirs.in_chans} channels made {ours.in_chans} ({channels})")
    if ours.patch_size != theirs.patch_size:
        state[filters] = resize_patch_embedding(state[filters], ours.patch_size)
        weights.report.notes.append(f"patch filters resized from {theirs.patch_size} to {ours.patch_size} pixels")
    if ours.grid != theirs.grid and not theirs.is_rotary:
        state = _at_grid(state, ours.grid, theirs)
        weights.report.notes.append(
            f"position embeddings resized from {theirs.grid}x{theirs.grid} patches ({theirs.img_size} pixels) to "
            f"{ours.grid}x{ours.grid} ({ours.img_size} pixels)"
        )
    model.load_state_dict(state, strict=True)
    return weights.report


def _shown(config: ViTConfig, name: str) -> str:
    """An option as weights show it: of LayerScale, whether it is there."""
    value = getattr(config, name)
    return spell(value is not None if name == "layerscale" else value)


def student_settings(config: ViTConfig | LibraryConfig) -> dict[str, Any]:
    """The keys of a config's `student` group that make such a model."""
    if isinstance(config, LibraryConfig):
        keys = {"patch_size": config.patch_size, "in_chans": config.in_chans}
        return {"arch": config.arch, "backbone_config": config.arguments, **keys}
    settings = {key: getattr(config, key) for key in ViTOptions.model_fields}
    if config.layerscale is not None:
        del settings["layerscale"]  # what it was at first is no property of weights
    if config.changed(mlp_ratio=4.0).hidden_dim != config.hidden_dim:
        settings["ffn_ratio"] = config.ffn_ratio
    if config.name in ARCHITECTURES:
        return {"arch": config.name, **settings}
    return {**{key: getattr(config, key) for key in Architecture._fields}, **settings}


def spell(value: Any) -> str:
    """A value as it stands in a config or after `a.b=`."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
