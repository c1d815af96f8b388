"""Weights of a backbone of another library: of a run, of a file of dino2's, or of a folder that the library reads."""

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from dinov2cli.config.images import Images
from dinov2cli.config.library import LibraryConfig
from dinov2cli.config.vit import ViTConfig
from dinov2cli.errors import WeightsError
from dinov2cli.models.libraries import weights_from_folder
from dinov2cli.models.library_backbone import Backbone, LibraryBackbone
from dinov2cli.models.load.layouts.layout import State
from dinov2cli.models.load.locate import Source
from dinov2cli.models.load.recognise import LoadReport, taken_apart
from dinov2cli.models.load.tensor_files import refuse_odd_tensors, refuse_others

BACKBONE, MODEL = "backbone.", "model."


def library_config(hints: Mapping[str, Any], source: str) -> LibraryConfig | None:
    """What is said beside weights, if that is a backbone of another library.

    Raises:
        WeightsError: it is, and cannot be.
    """
    if "library" not in hints:
        return None
    try:
        return LibraryConfig(**{key: hints[key] for key in LibraryConfig.model_fields if key in hints})
    except ValidationError as error:
        wrong = ", ".join(".".join(map(str, problem["loc"])) for problem in error.errors())
        raise WeightsError(f"{source}: {hints['from']} describes no backbone of another library: {wrong}") from None


def library_state(content: Any, config: LibraryConfig, source: Source) -> tuple[State, State, LoadReport]:
    """The weights under the names of `LibraryBackbone`, what lies beside them, and the report of how.

    Raises:
        WeightsError: they are not those of `config`.
    """
    report = LoadReport(source.name, layout=config.library)
    tensors = taken_apart(content, source.name, report)
    beside: State = {}
    if any(name.startswith(BACKBONE) for name in tensors):  # of a run
        beside = {name: tensor for name, tensor in tensors.items() if not name.startswith(BACKBONE)}
        tensors = {name.removeprefix(BACKBONE): tensors[name] for name in tensors.keys() - beside.keys()}
    elif config.library == "hf" and is_folder_of_transformers(source):
        own, report.notes = weights_from_folder(config, source.files[0].parent)
        tensors = {MODEL + name: tensor for name, tensor in own.items()}
    elif not all(name.startswith(MODEL) for name in tensors):
        tensors = {MODEL + name: tensor for name, tensor in tensors.items()}
    check_state(tensors, config, source.name)
    report.read, report.left_out = len(tensors), tuple(beside)
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    return state, beside, report


def build_library(
    config: LibraryConfig, state: Mapping[str, Tensor], images: Images, in_chans: int | None
) -> LibraryBackbone:
    """The backbone with these weights; WeightsError for another number of channels."""
    if in_chans not in (None, config.in_chans):
        raise WeightsError(f"in_chans={in_chans}: the weights of this {config.arch} have {config.in_chans} channels")
    with torch.random.fork_rng(devices=[]):  # its fresh weights are thrown away
        model = LibraryBackbone(config)
    model.load_state_dict(state, strict=True)
    model.images = images
    return model


def load_folder_into(model: LibraryBackbone, source: Source) -> LoadReport:
    """Start it, in place, from a folder that transformers reads; errors as of `weights_from_folder`."""
    state, notes = weights_from_folder(model.config, source.files[0].parent)
    model.model.load_state_dict(state, strict=True)
    return LoadReport(source.name, "transformers", read=len(state), notes=notes)


def load_library_into(
    model: Backbone, theirs: ViTConfig | LibraryConfig, state: Mapping[str, Tensor], report: LoadReport
) -> LoadReport:
    """Start it, in place, from weights of `theirs`; WeightsError where these are of another kind of network."""
    if not isinstance(model, LibraryBackbone) or not isinstance(theirs, LibraryConfig):
        raise WeightsError(f"{report.source} cannot start this model: its weights are of {theirs.describe()}")
    check_state(state, model.config, report.source)
    model.load_state_dict(state, strict=True)
    return report


def is_folder_of_transformers(source: Source) -> bool:
    """Whether the weights lie beside a config.json, under the names of transformers."""
    first = source.files[0]
    return first.name.startswith(("model", "pytorch_model")) and first.with_name("config.json").is_file()


def check_state(state: Mapping[str, Tensor], config: LibraryConfig, source: str) -> None:
    """Whether these are all weights of such a backbone, and no others.

    Raises:
        WeightsError: naming some that are not.
    """
    refuse_odd_tensors(state, source)
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in LibraryBackbone(config).state_dict().items()}
    refuse_others(state, shapes, f"such a {config.arch}", source)
