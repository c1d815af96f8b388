"""Where weights come from: a run folder, a file, a Hugging Face or timm folder, a URL or a released name."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dinov2cli import distributed
from dinov2cli.config.images import ImageOptions
from dinov2cli.config.library import library_of
from dinov2cli.config.vit import ARCHITECTURES, Architecture, ViTOptions
from dinov2cli.console import logger
from dinov2cli.errors import WeightsError
from dinov2cli.files import parse_json, parse_yaml, user_path
from dinov2cli.models.load.fetch import fetch, is_url
from dinov2cli.models.load.layouts import huggingface
from dinov2cli.models.load.layouts.layout import images_said
from dinov2cli.models.load.released import BACKBONES, RELEASED, Released
from dinov2cli.models.load.tensor_files import is_complete

_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "teacher_checkpoint.pth")
# Levels of the images of which DINOv3's models for satellites were made; their files do not say it, but their names.
_SATELLITE = {"mean": [0.430, 0.411, 0.296], "std": [0.213, 0.156, 0.143]}
_SHARD_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")

OWN_KEY = "dino2"
"""Of a config.json that is written for another library: what that does not know of its backbone."""


@dataclass(frozen=True)
class Source:
    """Weights that have been found on disk.

    Args:
        files: the files that hold them (several for a sharded Hugging Face folder).
        hints: what is known beside the weights; fields of `ViTConfig`, and `from`, the file that says so.
        run: the run folder they belong to, if any.
        iteration: the training iteration, if the place says it.
        released: the released model they are, if asked for by name.
    """

    files: tuple[Path, ...]
    hints: Mapping[str, Any] = field(default_factory=dict)
    run: Path | None = None
    iteration: int | None = None
    released: Released | None = None

    @property
    def name(self) -> str:
        """For messages."""
        return str(self.files[0] if len(self.files) == 1 else self.files[0].parent)


def locate(source: str | Path | Source) -> Source:
    """Find the weights that a name, path or URL means, downloading them if needed; what has been found stays so.

    Raises:
        WeightsError: nothing of the kind is there; the message says what was looked for.
    """
    if isinstance(source, Source):
        return source
    text = str(source)
    path = user_path(source)
    if is_url(text):
        return _in_file(fetch(text))
    if path.is_dir():
        return _in_folder(path)
    if path.exists():
        return _in_file(path)
    if text in RELEASED:
        released = RELEASED[text]
        if released.classifier:
            raise WeightsError(
                f"'{text}' has a linear classifier; as a backbone alone it is '{text.removesuffix('_lc')}'",
                hint="dinov2cli.models.classifier.load_classifier gives both.",
            )
        return Source((fetch(released.backbone_url, expect_bytes=released.backbone_bytes),), released=released)
    if re.match(r"dinov3_", text):
        raise WeightsError(
            f"'{text}' is not downloaded: DINOv3's licence is accepted by whoever fetches the weights",
            hint="Fetch the file, and give its path.",
        )
    if re.match(r"dinov1_|dino_", text):
        raise WeightsError(f"'{text}' is a model of another generation; dino2 has DINOv2: {', '.join(BACKBONES)}")
    known = ", ".join(BACKBONES)
    raise WeightsError(f"'{text}' is neither a file or folder nor a released name; released: {known}")


def check_there(source: str) -> None:
    """Raise what `locate` would for a name, a path or a `file://` address; nothing is downloaded.

    Raises:
        WeightsError: as `locate`.
    """
    name = source.removesuffix("_lc")
    is_released = name in RELEASED and not Path(name).exists()
    is_far = is_url(source) and not source.startswith("file://")
    if not is_released and not is_far:
        locate(source)


def locate_together(source: str | Path | Source) -> Source:
    """`locate` for all processes: the first one looks, the others are told. Collective.

    A training may write a newer teacher at any time; if each process looked, they could load different ones. Only a
    download that lies in a folder of another machine is fetched here, too.

    Raises:
        WeightsError: as `locate`, in every process.
    """
    with distributed.same_error_everywhere():
        found = locate(source) if distributed.is_main() else None
    found = distributed.broadcast_object(found)
    with distributed.same_error_everywhere():
        if found is None or not all(file.exists() for file in found.files):
            found = locate(source)
    return found


def newest_teacher(run: Path) -> Path | None:
    """The newest complete `eval/training_<iteration>/teacher_checkpoint.pth` of a run, by iteration number."""
    for folder in sorted(run.glob("eval/training_*"), key=_iteration, reverse=True):
        file = folder / "teacher_checkpoint.pth"
        if _iteration(folder) >= 0 and is_complete(file):
            return file
        if file.exists():
            logger.warning("%s is cut short: passed over for the one before", file)
    return None


def architecture_file(path: Path) -> Path:
    """Where an export of tensors alone says what they do not show; in the form of a run's config.yaml."""
    return path.with_name(path.name + ".dino2.yaml")


def _in_folder(folder: Path) -> Source:
    teacher = newest_teacher(folder)
    if teacher is not None:
        return _in_file(teacher)
    for index in _SHARD_INDEXES:
        if (folder / index).is_file():
            return _sharded(folder, folder / index)
    for name in _WEIGHT_FILES:
        if (folder / name).is_file():
            return _in_file(folder / name)
    teachers = "eval/training_*/teacher_checkpoint.pth"
    if (folder / "checkpoints").is_dir():
        raise WeightsError(
            f"{folder}: a run that has not written a teacher yet (no {teachers}); its training checkpoints are for "
            "resuming"
        )
    raise WeightsError(
        f"{folder}: no weights in this folder; looked for {teachers} (a run) and {', '.join(_WEIGHT_FILES)}"
    )


def _sharded(folder: Path, index: Path) -> Source:
    weight_map = _mapping(index).get("weight_map")
    named = list(weight_map.values()) if isinstance(weight_map, dict) else []
    names = {name for name in named if isinstance(name, str) and Path(name).name == name}
    if not names or len(names) < len(set(map(str, named))):
        raise WeightsError(f"{index}: not an index of shards; it has a weight_map from tensors to files of its folder")
    files = tuple(folder / name for name in sorted(names))
    if missing := [file.name for file in files if not file.is_file()]:
        raise WeightsError(f"{folder}: {index.name} names {missing[0]}, which is not there")
    return Source(files, _config_json_hints(folder / "config.json"))


def _in_file(path: Path) -> Source:
    run = path.parent.parent.parent if path.parent.parent.name == "eval" else None
    iteration = _iteration(path.parent) if run else None
    before = path.with_name(path.stem + ".dino2.yaml")  # as exports of tensors alone named it at first
    for candidate in (architecture_file(path), before, path.with_name("config.yaml"), run and run / "config.yaml"):
        if candidate and candidate.is_file():
            return Source((path,), config_yaml_hints(candidate), run, iteration)
    hints = _config_json_hints(path.with_name("config.json"))
    if "images" not in hints and re.fullmatch(r"dinov3_\w+_sat493m-[0-9a-f]{8}\.pth", path.name):
        hints |= {"from": f"the name {path.name}", "images": dict(_SATELLITE)}
    return Source((path,), hints, run, iteration)


def _iteration(folder: Path) -> int:
    found = re.fullmatch(r"training_(\d+)", folder.name)
    return int(found[1]) if found else -1


def config_yaml_hints(path: Path) -> dict[str, Any]:
    """What a run's `config.yaml` (ours or the reference's) says of the backbone.

    Only the keys that matter here are read, so that a config with keys of another version does not stand in the way.

    Raises:
        WeightsError: it is no readable YAML mapping.
    """
    try:
        groups = parse_yaml(path.read_text(encoding="utf-8")) or {}
        student, data = ({**(groups.get(group) or {})} for group in ("student", "data"))
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError, TypeError):
        raise WeightsError(f"{path}: not a readable config.yaml (it lies beside the weights)") from None
    said = str(student.get("arch", ""))
    arch = ARCHITECTURES.get(said.removesuffix("_memeff"))
    named = arch._asdict() if arch else {}
    keys = [key for key in (*Architecture._fields, *ViTOptions.model_fields) if student.get(key) is not None]
    images = {key: data[key] for key in ImageOptions.model_fields if data.get(key) is not None}
    crop = (groups.get("crops") or {}).get("global_crops_size")
    crop = max(crop, default=None) if isinstance(crop, list | tuple) else crop
    if library := library_of(said):
        numbers = {"in_chans": student.get("in_chans"), "patch_size": student.get("patch_size"), "img_size": crop}
        known = {key: value for key, value in numbers.items() if value is not None}
        whole = {"library": library, "name": said.partition(":")[2], "arguments": student.get("backbone_config") or {}}
        return {"from": str(path), **whole, **known, "images": images}
    size = {"crop_size": crop} if student.get("pos_embed_type") == "rope" and crop else {}
    return {"from": str(path), **named, **{key: student[key] for key in keys}, **size, "images": images}


def _config_json_hints(path: Path) -> dict[str, Any]:
    """What a Hugging Face or timm `config.json` says, if there is one."""
    if not path.is_file():
        return {}
    config = _mapping(path)
    if not isinstance(ours := config.get(OWN_KEY, {}), dict):
        raise WeightsError(f"{path}: {OWN_KEY}={ours}: what dino2 writes there is an object")
    if "library" in ours:
        return {"from": str(path), **ours}
    hints = huggingface.hints(config, str(path))
    processor = path.with_name("preprocessor_config.json")
    if processor.is_file() and "images" not in hints:
        said = _mapping(processor)
        hints |= images_said(said.get("image_mean"), said.get("image_std"))
    return hints


def _mapping(path: Path) -> dict[str, Any]:
    """A JSON object that lies beside weights."""
    return json_object(path.read_bytes(), f"{path}, which lies beside the weights:")


def json_object(text: str | bytes, what: str) -> dict[str, Any]:
    """A JSON object that goes with weights. Raises WeightsError, which begins with `what`, where it is none."""
    try:
        content = parse_json(text)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise WeightsError(f"{what} no readable JSON object")
    return content
