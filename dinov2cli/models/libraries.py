"""transformers and timm: how each makes one of its backbones, runs it, and what its arguments and folders mean."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dinov2cli.config import Config
from dinov2cli.config.library import LIBRARIES, LibraryConfig
from dinov2cli.errors import ConfigError, Dino2Error, WeightsError, need
from dinov2cli.files import parse_json, user_path

NO_ARGUMENTS = ("model_type", "architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path",
                "id2label", "label2id", "problem_type", "out_features", "out_indices", "stage_names")  # fmt: skip
"""Of a transformers configuration: what is no argument of an architecture, or follows from the others."""
OUTPUT_NORMS = "hidden_states_norms."
"""Weights that `AutoBackbone` alone has: norms of the feature maps that it gives."""


class Settled(NamedTuple):
    """What `student.arch` and `student.backbone_config` mean, for good.

    Args:
        arch, arguments: these, whatever becomes of a folder and of the library's defaults.
        folder: with weights to start from, if one was named.
        drop_path_rate: stochastic depth, as the arguments say it; None: the architecture has none.
    """

    arch: str
    arguments: dict[str, Any]
    folder: Path | None
    drop_path_rate: float | None


def keys_of_library(config: Config) -> list[str]:
    """Overrides that say for good what an architecture of another library is, and from which folder it starts.

    Raises:
        EnvironmentProblem: the library is not installed.
        ConfigError: it has no such architecture, or not with these arguments.
    """
    student = config.student
    settled = settle(student.arch, student.backbone_config, student.in_chans)
    rate = student.drop_path_rate if "drop_path_rate" in student.model_fields_set else None
    own = student.backbone_config.get("drop_path_rate", rate)
    if (settled.drop_path_rate is None and rate) or rate not in (None, own):
        theirs = f"{own} in student.backbone_config" if rate != own else f"{settled.arch} has no stochastic depth"
        raise ConfigError(f"student.drop_path_rate={rate}: {theirs}; leave it out, or say 0.0")
    if settled.drop_path_rate is not None:
        settled.arguments["drop_path_rate"] = settled.drop_path_rate if own is None else own
    words = [
        f"student.arch={settled.arch}",
        f"student.backbone_config={json.dumps(settled.arguments)}",
        f"student.drop_path_rate={settled.arguments.get('drop_path_rate', 0.0)}",
    ]
    if settled.folder and not student.pretrained_weights:
        words.append(f"student.pretrained_weights={settled.folder}")
    return words


def settle(arch: str, arguments: Mapping[str, Any], in_chans: int) -> Settled:
    """All arguments of an architecture written out, those of a folder's `config.json` included.

    What transformers has an architecture of is never a folder: a run would else depend on where it is resumed.

    Raises:
        EnvironmentProblem: the library is not installed.
        ConfigError: it has no such architecture or argument.
    """
    library, _, name = arch.partition(":")
    folder, said = user_path(name), dict[str, Any]()
    if library == "hf" and folder.is_dir() and name not in need("transformers").CONFIG_MAPPING:
        name, said = _config_json(folder / "config.json", arch)
    config = LibraryConfig(library=library, name=name, arguments={**said, **arguments}, in_chans=in_chans)
    with torch.device("meta"):
        build(config)
    if library == "timm":
        return Settled(arch, dict(arguments), None, arguments.get("drop_path_rate"))
    with _refusing(config):
        whole, usual = _configuration(config).to_dict(), need("transformers").PretrainedConfig().to_dict()
    usual = {key: value for key, value in usual.items() if whole.get(key) == value}
    settled = {key: value for key, value in whole.items() if key not in (*NO_ARGUMENTS, *usual)}
    weights = said and any(any(folder.glob(files)) for files in ("*.safetensors", "pytorch_model*.bin"))
    return Settled(f"hf:{name}", settled, folder.absolute() if weights else None, whole.get("drop_path_rate"))


def _config_json(path: Path, arch: str) -> tuple[str, dict[str, Any]]:
    """The model type that a folder of transformers says, and its arguments; without what no version reads any more."""
    try:
        said = parse_json(path.read_bytes())
        name = said["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"student.arch={arch}: {path} is no config.json of transformers with a model_type") from None
    known = _known_arguments(LibraryConfig(name=str(name)))
    return str(name), {key: value for key, value in said.items() if key in known}


def build(config: LibraryConfig) -> tuple[nn.Module, int]:
    """The network with fresh weights, and the width of its features.

    Raises:
        EnvironmentProblem: the library is not installed.
        ConfigError: it has no such architecture or argument, or no feature map.
    """
    with _refusing(config):
        return _LIBRARIES[config.library].build(config)


def run(config: LibraryConfig, model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """[B, C, H, W] -> pooled features [B, D], and the feature map [B, D, h, w] of the last stage."""
    return _LIBRARIES[config.library].run(model, images)


@contextmanager
def _refusing(config: LibraryConfig) -> Iterator[None]:
    """Around what a library makes of its arguments: whatever it raises is for whoever has given them."""
    try:
        yield
    except Dino2Error:
        raise
    except Exception as error:  # libraries have many kinds of their own
        if type(torch.empty(0)) is not Tensor:  # of fake tensors, whose numbers a library may ask for
            raise
        library, reason = LIBRARIES[config.library], " ".join((str(error) or repr(error)).split())
        given = f"student.arch={config.arch} student.backbone_config={json.dumps(config.arguments)}"
        raise ConfigError(f"{given}: {library} makes no backbone of this: {reason}") from None


def _known_arguments(config: LibraryConfig) -> set[str]:
    transformers: Any = need("transformers")
    if config.name not in transformers.CONFIG_MAPPING:
        raise ConfigError(f"student.arch={config.arch}: no architecture of transformers is called so, and no folder")
    return {*transformers.AutoConfig.for_model(config.name).to_dict()} - {*NO_ARGUMENTS}


def _configuration(config: LibraryConfig) -> Any:
    """transformers' own, whose last stage is the output."""
    transformers: Any = need("transformers")
    known = _known_arguments(config)
    if not hasattr(transformers.CONFIG_MAPPING[config.name], "out_features"):
        raise ConfigError(f"student.arch={config.arch}: AutoBackbone of transformers does not take it")
    if odd := sorted(config.arguments.keys() - known):
        raise ConfigError(f"student.backbone_config.{odd[0]}: {config.arch} has no such argument")
    made = transformers.AutoConfig.for_model(config.name, **{**config.arguments, "num_channels": config.in_chans})
    # Usual values of some are tuples where their own networks ask for lists, as a config.json has them.
    for key, value in vars(made).items():
        if isinstance(value, tuple):
            setattr(made, key, list(value))
    made.out_features = made.stage_names[-1:]
    return made


def _build_hf(config: LibraryConfig) -> tuple[nn.Module, int]:
    with quiet_transformers() as transformers:
        model = transformers.AutoBackbone.from_config(_configuration(config))
    return model, int(model.channels[-1])


def _run_hf(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    found = model(pixel_values=images).feature_maps[-1]
    return found.mean((2, 3)), found


def weights_from_folder(config: LibraryConfig, folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Weights of a transformers folder under the names of `_build_hf`'s network, and what is to be said of them.

    transformers itself reads them: it knows under which names other versions and classes of it keep them.

    Raises:
        WeightsError: some are missing, or of other shapes.
    """
    with quiet_transformers() as transformers:
        try:
            with torch.device("meta"):
                kind = type(transformers.AutoBackbone.from_config(_configuration(config)))
            model, info = kind.from_pretrained(
                folder, config=_configuration(config), output_loading_info=True, local_files_only=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join((str(error) or repr(error)).split())
            raise WeightsError(f"{folder}: transformers does not load these weights: {reason}") from None
    missing = sorted(info["missing_keys"])
    if lost := [name for name in missing if not name.startswith(OUTPUT_NORMS)]:
        raise WeightsError(f"{folder}: of the weights of {config.arch}, {len(lost)} are missing, such as {lost[0]}")
    notes = [f"not in the files, begins anew: {', '.join(missing)}"] if missing else []
    if unused := sorted({name.split(".")[0] for name in info["unexpected_keys"]}):
        notes.append(f"left out: {', '.join(unused)}")
    return model.state_dict(), notes


@contextmanager
def quiet_transformers() -> Iterator[Any]:
    """transformers without warnings and bars of its own: what matters is said by whoever calls."""
    transformers: Any = need("transformers")
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield transformers
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _build_timm(config: LibraryConfig) -> tuple[nn.Module, int]:
    timm: Any = need("timm", "timm torchvision")
    model = timm.create_model(config.name, num_classes=0, in_chans=config.in_chans, **config.arguments)
    width = int(model.num_features)
    if (pooled := int(getattr(model, "head_hidden_size", width))) != width:
        raise ConfigError(
            f"student.arch={config.arch}: its pooled features are {pooled} wide and its feature map {width}; only "
            "networks with one width for both can be students"
        )
    if getattr(model, "pos_embed", None) is not None:
        raise ConfigError(f"student.arch={config.arch}: it has tokens and no feature map; choose one of dino2's own")
    return model, width


def _run_timm(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    found = model.forward_features(images)
    pooled = model.forward_head(found, pre_logits=True)
    return pooled, found.permute(0, 3, 1, 2) if str(getattr(model, "output_fmt", "")).endswith("NHWC") else found


class _Library(NamedTuple):
    build: Callable[[LibraryConfig], tuple[nn.Module, int]]
    run: Callable[[Any, Tensor], tuple[Tensor, Tensor]]


_LIBRARIES = {"hf": _Library(_build_hf, _run_hf), "timm": _Library(_build_timm, _run_timm)}
