"""From preset or file and overrides to a validated `Config`."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from yaml.constructor import ConstructorError

from dinov2cli.config.config import Config
from dinov2cli.config.library import OF_VIT, library_of
from dinov2cli.config.messages import explain
from dinov2cli.config.presets import find_preset, list_presets
from dinov2cli.config.reference import translate
from dinov2cli.config.tree import FIELDS, takes_text
from dinov2cli.console import logger
from dinov2cli.errors import ConfigError
from dinov2cli.files import parse_yaml

Layer = dict[str, Any]


def load_config(
    preset: str | None = None,
    config_file: str | Path | None = None,
    overrides: Iterable[str] = (),
    site: Iterable[tuple[Layer, str]] = (),
) -> Config:
    """The defaults, changed by a preset or a file, changed by overrides; checked as a whole.

    Args:
        preset: a name that `list_presets` knows.
        config_file: a YAML file with any of the keys; a `config.yaml` written by dino2 or by the DINOv2 reference
            loads as it is, and so does a run folder that holds one.
        overrides: `group.key=value` each. Values are YAML, except that keys of text take what follows the `=` as it is.
        site: what holds at this site (`site.Site.keys`), with the name of the file that says it: it changes defaults
            and presets, and gives way to the config file, whose keys reproduce a run.

    Raises:
        ConfigError: with one line for each problem, naming the key, the value, its source and what would be right.
    """
    layers = read_layers(preset, config_file, overrides, site)
    tree: Layer = {}
    for layer, _ in layers:
        tree = merge(_without_other_model(tree, layer), layer)
    _refuse_unresolved(tree)
    try:
        # A group that is written without keys ("optim:") is empty, not null.
        return Config.model_validate({group: {} if keys is None else keys for group, keys in tree.items()})
    except ValidationError as error:
        raise explain(error, layers) from None


def read_layers(
    preset: str | None, config_file: str | Path | None, overrides: Iterable[str], site: Iterable[tuple[Layer, str]]
) -> list[tuple[Layer, str]]:
    """What `load_config` lays over the defaults, the later over the earlier, each with its source; none if typed.

    Raises:
        ConfigError: a file cannot be read, or an override is none.
    """
    if preset is not None and config_file is not None:
        raise ConfigError("--preset and --config-file are both given; choose one and change single keys with a.b=value")
    said = list(site)
    if preset is not None:
        found = find_preset(preset)
        said.insert(0, (read_yaml(found.path), f"preset {found.name}"))
    elif config_file is not None:
        path = _locate(Path(config_file))
        said.append((read_yaml(path), str(path)))
    said.append((parse_overrides(overrides), ""))
    return [(translate(layer, source or "overrides"), source) for layer, source in said]


def read_yaml(path: Path) -> Layer:
    """A YAML file as nested dictionaries.

    Raises:
        ConfigError: the file cannot be read, is not YAML (file and line are named), or holds no groups of keys.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"{path}: cannot read this config file: {reason}") from error
    try:
        content = parse_yaml(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"{path}: must hold groups of keys, such as 'optim:' with 'base_lr: 0.001' indented below it")
    return content


def parse_overrides(overrides: Iterable[str]) -> Layer:
    """`["a.b=1", "a.c=x"]` as `{"a": {"b": 1, "c": "x"}}`; of two values for a key the later counts.

    Raises:
        ConfigError: an override is not of the form `group.key=value`, or its value is not YAML.
    """
    layer: Layer = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not re.fullmatch(r"\w[\w-]*(\.\w[\w-]*)*", key):
            raise ConfigError(f"override '{override}': must have the form group.key=value, such as optim.base_lr=0.001")
        value = _override_value(key, text)
        for name in reversed(key.split(".")):
            value = {name: value}
        layer = merge(layer, value)
    return layer


def merge(lower: Layer, upper: Layer) -> Layer:
    """`upper` laid over `lower`, group by group; neither is changed."""
    merged = dict(lower)
    for key, value in upper.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _without_other_model(lower: Layer, upper: Layer) -> Layer:
    """`lower` without what it says of its model alone, where `upper` names an architecture of another kind."""
    arch, before = (_arch_of(layer) for layer in (upper, lower))
    if arch is None or not isinstance(lower.get("student"), dict):
        return lower
    gone = {*(OF_VIT if library_of(arch) else ()), *(("backbone_config",) if arch != before else ())}
    return {**lower, "student": {key: value for key, value in lower["student"].items() if key not in gone}}


def _arch_of(layer: Layer) -> str | None:
    student = layer.get("student")
    arch = student.get("arch") if isinstance(student, dict) else None
    return arch if isinstance(arch, str) else None


def _override_value(key: str, text: str) -> Any:
    text = text.strip()
    field = FIELDS.get(key)
    if field is not None and takes_text(field):
        quoted = len(text) >= 2 and text[0] == text[-1] and text[0] in "'\""
        return text[1:-1] if quoted else text
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or "not YAML"
        raise ConfigError(f"{key}={text}: the value cannot be read: {problem}") from None


def _refuse_unresolved(tree: Layer, prefix: str = "") -> None:
    for key, value in tree.items():
        if isinstance(value, dict):
            _refuse_unresolved(value, f"{prefix}{key}.")
        elif isinstance(value, str) and (value == "???" or re.search(r"\$\{.+\}", value)):
            raise ConfigError(f"{prefix}{key}={value}: OmegaConf placeholders are not resolved; write the value itself")


def _locate(path: Path) -> Path:
    if path.is_dir() and (path / "config.yaml").is_file():
        return path / "config.yaml"
    if path.exists():
        return path
    names = {preset.name: preset for preset in list_presets()}
    stem = path.name.removesuffix(".yaml")
    if stem in names and {"configs", "train", "eval", "presets"} & set(path.parts[:-1]):
        # Commands from the reference's documentation name files of its source tree: dinov2/configs/train/vitl14.yaml.
        logger.info("%s: no such file; using the preset %s", path, stem)
        return names[stem].path
    hint = f"There is a preset of that name: --preset {stem}" if stem in names else None
    raise ConfigError(f"{path}: no such config file", hint=hint)


class _Loader(yaml.SafeLoader):
    """YAML as OmegaConf reads it: `1e-5` is a number, dates are text, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise ConstructorError(None, None, f"the key '{key.value}' is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"), list("-+0123456789.")
)
