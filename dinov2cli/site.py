"""What is known of this site, in a small YAML file: datasets by name, and defaults of Slurm, run folders and the cache.

Read are the user's file and, laid over it key by key, `dino2.yaml` in the working folder; what is typed wins over both:

    datasets:
      ImageNet: {root: /data/imagenet, extra: /data/imagenet-extra}    # written by `dino2 prepare-imagenet`
      photos: /data/photos                                             # `dino2 datasets add photos /data/photos`
    slurm: {partition: gpu, account: vision, timeout_min: 1440, setup: [module load cuda], gpus: 4}
    runs: /scratch/me/runs
    cache: $SCRATCH/dino2
    overrides: {train.num_workers: 12, train.wandb: true}            # keys of the configuration, over a preset's

Relative paths are relative to the file; `~` and `$VARIABLES` are filled in.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError, ValidationInfo

from dinov2cli.config.editing import with_entry
from dinov2cli.config.loading import read_yaml
from dinov2cli.errors import ConfigError, did_you_mean
from dinov2cli.files import lock, user_path, write_text, writing
from dinov2cli.requests.base import Group
from dinov2cli.requests.launch import Slurm

NAME = "dino2.yaml"
GROUPS = ("datasets", "slurm", "overrides")
HEADER = "# What dino2 knows of this site: datasets by name, and defaults (slurm, runs, cache, overrides).\n"


def _from_the_file(text: str, info: ValidationInfo) -> str:
    path = user_path(os.path.expandvars(text))
    return str((info.context or Path()) / path)


def _if_path(text: str, info: ValidationInfo) -> str:
    return text if set(":+*") & set(text) else _from_the_file(text, info)


def _of_single_keys(keys: dict[str, Any]) -> dict[str, Any]:
    for key, value in keys.items():
        if key.count(".") != 1 or isinstance(value, dict):
            raise ValueError(f"write single keys, such as train.num_workers: 8, instead of {key}")
        if key == "train.output_dir":
            raise ValueError("train.output_dir would be the one folder of all runs; `runs:` says where theirs are made")
    return keys


PathText = Annotated[str, AfterValidator(_from_the_file)]
DatasetText = Annotated[str, AfterValidator(_if_path)]


class Place(Group):
    """Where a prepared ImageNet lies: its images, and the metadata files if these lie elsewhere."""

    root: PathText
    extra: PathText | None = None


class SlurmDefaults(Slurm):
    """Options of Slurm that are not typed, without the number of machines."""

    nodes: None = None
    gpus: Annotated[int, Field(ge=0)] | None = None
    """Of each machine, where --gpus does not say it; 0: the machines have none, and train on the CPU."""
    fewer_nodes: bool = False
    """Take as many machines as the partition has where --nodes asks for more."""


class Settings(Group):
    """The content of the file."""

    datasets: dict[str, DatasetText | Place] = Field(default_factory=dict)
    slurm: SlurmDefaults = SlurmDefaults()
    runs: PathText | None = None
    cache: PathText | None = None
    overrides: Annotated[dict[str, Any], AfterValidator(_of_single_keys)] = Field(default_factory=dict)


@dataclass(frozen=True)
class Site:
    """What the files say together.

    Attributes:
        sources: the file that says it, for each dotted key: `slurm.partition`, `datasets.ImageNet`, `runs`.
    """

    settings: Settings
    sources: dict[str, Path]

    def keys(self) -> list[tuple[dict[str, Any], str]]:
        """The keys of the configuration that are said, and where, as `load_config` takes them."""
        said = self.settings.overrides.items()
        pairs = [(key.split("."), value, self.sources[f"overrides.{key}"]) for key, value in said]
        return [({group: {key: value}}, shown(file)) for (group, key), value, file in pairs]

    def rows(self) -> list[tuple[str, str, Path]]:
        """(key, value, file) of all that is said."""
        content = self.settings.model_dump(mode="json", exclude_unset=True)
        return [(key, _in_words(_at(content, key)), file) for key, file in self.sources.items()]


def user_file() -> Path:
    """`$DINO2_CONFIG`, by default `dino2/dino2.yaml` in `$XDG_CONFIG_HOME` (`~/.config`)."""
    if chosen := os.environ.get("DINO2_CONFIG"):
        return user_path(chosen)
    return user_path(os.environ.get("XDG_CONFIG_HOME") or "~/.config") / "dino2" / NAME


def shown(path: Path | str) -> str:
    """A path for people: `~` for the home folder."""
    home = os.path.expanduser("~")
    return f"~{str(path).removeprefix(home)}" if str(path).startswith(f"{home}/") else str(path)


def read_site() -> Site:
    """What the files say, that of the working folder last, as it wins; without files, nothing.

    Raises:
        ConfigError: a file cannot be read, or says what there is not; file and key are named.
    """
    content: dict[str, Any] = {}
    sources: dict[str, Path] = {}
    for path in dict.fromkeys((user_file().absolute(), Path(NAME).absolute())):
        if not path.is_file():
            continue
        said = _read(path)
        for group, value in said.model_dump(exclude_unset=True).items():
            of_many = isinstance(value, dict)
            content[group] = {**content.get(group, {}), **value} if of_many else value
            sources |= dict.fromkeys([f"{group}.{key}" for key in value] if of_many else [group], path)
    return Site(Settings.model_validate(content), sources)


def remember_dataset(name: str, value: str | dict[str, str] | None) -> Path:
    """Give a dataset a name in the user's file, or take it away, whose other lines and comments stay; the file.

    Args:
        value: a folder or dataset string, or the `root` and `extra` of an ImageNet; None: the name is to go.

    Raises:
        ConfigError: the file is wrong, or too unusual to be edited; EnvironmentProblem: it cannot be written.
    """
    path = user_file().absolute()
    with writing(path), lock(path):
        text = path.read_text(encoding="utf-8") if path.exists() else HEADER
        if path.exists():
            _read(path)  # a file that is wrong is not made worse
        try:
            edited = with_entry(text, "datasets", name, value)
        except ValueError:
            problem, hint = f"{path}: this file is too unusual to be edited", f"Write below datasets: {name}: {value}"
            raise ConfigError(problem, hint) from None
        write_text(path, edited)
    return path


def cache_folder(kind: str) -> Path:
    """Where `weights`, `features` or `listings` are kept: in `$DINO2_CACHE`, else `cache` of the site's file, else
    `~/.cache/dino2`."""
    if chosen := os.environ.get("DINO2_CACHE"):
        return user_path(chosen) / kind
    if configured := read_site().settings.cache:
        return Path(configured) / kind
    return user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "dino2" / kind


def _read(path: Path) -> Settings:
    content = read_yaml(path)
    filled = {key: {} if value is None and key in GROUPS else value for key, value in content.items()}
    try:
        return Settings.model_validate(filled, context=path.parent)
    except ValidationError as error:
        lines = [f"{path}: {_problem(each)}" for each in error.errors(include_url=False)]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def _problem(problem: Any) -> str:
    path = [str(part) for part in problem["loc"]]
    key = ".".join(path[:2])
    if path[0] == "datasets" and path[1:]:
        return f"{key}: must be a folder, a dataset string, or the root: and extra: of an ImageNet"
    if path == ["slurm", "nodes"]:
        return f"{key}: the number of machines is said with each command, as --nodes N"
    if path == ["overrides"] and problem["type"] == "value_error":
        return f"overrides: {problem['ctx']['error']}"
    if problem["type"] == "extra_forbidden":
        names = [name for name in (SlurmDefaults if path[1:] else Settings).model_fields if name != "nodes"]
        return f"{key}: no such key" + did_you_mean(path[-1], names, f"; there is {', '.join(names)}")
    message = problem["msg"].replace("Input should be", "must be")
    return f"{key}={problem['input']}: {message[:1].lower()}{message[1:]}"


def _at(content: Any, key: str) -> Any:
    for part in key.split(".", 1):
        content = content[part]
    return content


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {text}" for key, text in value.items() if text is not None)
    return "; ".join(map(str, value)) if isinstance(value, list) else str(value)
