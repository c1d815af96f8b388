"""The teacher of a distillation: what its weights are, and whether the run fits them (DINOv2 paper, section 5).

Reading weights costs little until their numbers are used: files are mapped into memory.
"""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from dinov2cli.config import Config, load_config
from dinov2cli.config.images import Images
from dinov2cli.config.vit import ViTConfig
from dinov2cli.console import logger
from dinov2cli.errors import ConfigError, WeightsError, weights_of
from dinov2cli.files import fingerprint, user_path
from dinov2cli.models.library_backbone import size_of
from dinov2cli.models.load import RecognisedWeights, read_weights, spell
from dinov2cli.models.load.heads import Head, HeadSizes, heads_of
from dinov2cli.models.load.locate import Source, check_there, locate
from dinov2cli.train.run_folder import RunFolder

TYPED = "distillation.teacher (--teacher)"


class FrozenTeacher(NamedTuple):
    """What is known of it without its numbers.

    Args:
        heads: the sizes of its own, by name; empty where it has none, and fresh ones are trained for it.
    """

    vit: ViTConfig
    images: Images
    heads: dict[str, HeadSizes]


def read_teacher(config: Config) -> tuple[RecognisedWeights, dict[str, Head]]:
    """The weights that `distillation.teacher` names, and their heads.

    Raises:
        WeightsError: they are missing or cannot be read; the message begins with the key.
    """
    with weights_of(TYPED):
        weights = read_weights(config.distillation.teacher)
        return weights, heads_of(weights.beside, weights.source.name)


def frozen_teacher(config: Config) -> FrozenTeacher | None:
    """The run's; None where it distils nothing. Errors as in `read_teacher`."""
    return _known(config.distillation.teacher, config.distillation.digest) if config.distillation.teacher else None


@lru_cache(maxsize=8)
def _known(teacher: str, digest: str) -> FrozenTeacher:
    weights, heads = read_teacher(load_config(overrides=[f"distillation.teacher={teacher}"]))
    if not isinstance(weights.architecture, ViTConfig):
        raise WeightsError(f"{TYPED}: {teacher} is {weights.architecture.arch}; a teacher is a vision transformer")
    return FrozenTeacher(weights.architecture, weights.images, {name: head.sizes for name, head in heads.items()})


def has_fresh_heads(config: Config) -> bool:
    """Whether heads are trained on the frozen teacher's features, as it has none."""
    teacher = frozen_teacher(config)
    return teacher is not None and not teacher.heads


def check_fits(config: Config) -> None:
    """Whether student and data fit the teacher.

    Raises:
        ConfigError: with a line for each key that does not, and what would.
        WeightsError: as in `read_teacher`.
    """
    teacher = frozen_teacher(config)
    if teacher is None:
        return
    if problems := list(_misfits(config, teacher)):
        raise ConfigError("\n".join(f"{key}: the teacher has {theirs}" for key, theirs in problems))
    sizes = [size_of(each) for each in (config.backbone(), teacher.vit)]
    if sizes[0] > sizes[1]:
        logger.warning(
            "the student is larger than its teacher (%.1f M and %.1f M parameters): distillation is meant for the "
            "other way round", *(size / 1e6 for size in sizes),
        )  # fmt: skip


def _misfits(config: Config, teacher: FrozenTeacher) -> Iterator[tuple[str, str]]:
    student, data, vit = config.student, config.data, teacher.vit
    if student.patch_size != vit.patch_size:
        yield (
            f"student.patch_size={student.patch_size}",
            f"patches of {vit.patch_size} pixels, and those of both are compared one by one; set "
            f"student.patch_size={vit.patch_size}, and crop sizes that are multiples of it",
        )
    if student.in_chans != vit.in_chans:
        yield f"student.in_chans={student.in_chans}", f"{vit.in_chans} image channels; set student.in_chans to that"
    elif config.images().statistics != teacher.images.statistics:
        mean, std = (list(levels) for levels in teacher.images.statistics)
        yield (
            f"data.mean={list(data.mean or ())} data.std={list(data.std or ())}",
            f"learnt from images normalised with {mean} and {std}; leave both out, and they are taken",
        )
    for key, wanted in _keys_of_heads(teacher).items():
        group, _, name = key.partition(".")
        if (given := getattr(getattr(config, group), name)) != wanted:
            yield (
                f"{key}={spell(given)}",
                f"{spell(wanted)}, and its scores are what the student learns; {key}={spell(wanted)}",
            )


def _keys_of_heads(teacher: FrozenTeacher) -> dict[str, int | bool]:
    """The keys that the teacher's own heads decide: how many prototypes, and whether patches have a head of theirs."""
    if not teacher.heads:
        return {}
    keys: dict[str, int | bool] = {"dino.head_n_prototypes": teacher.heads["dino_head"].out_dim}
    keys["ibot.separate_head"] = separate = "ibot_head" in teacher.heads
    return keys | ({"ibot.head_n_prototypes": teacher.heads["ibot_head"].out_dim} if separate else {})


def keys_that_follow_teacher(config: Config, *, resume: bool) -> tuple[list[str], list[str]]:
    """Overrides that make the run fit the teacher, below those that are typed; and that name its files for good, above.

    A run that goes on keeps the file that it began with, where the same place, such as a run's folder, is named again.

    Raises:
        WeightsError: the teacher is not there, or cannot be read.
    """
    typed, folder = config.distillation.teacher, RunFolder(Path(config.train.output_dir))
    if resume and folder.has_checkpoints() and folder.config.is_file():
        before = load_config(config_file=folder.config).distillation.teacher
        if before and user_path(typed).absolute() in Path(before).parents:
            typed = before
    with weights_of(TYPED):
        source = locate(typed)
    update = {"teacher": place_of(typed, source), "digest": fingerprint(*source.files)}
    teacher = frozen_teacher(config.model_copy(update={"distillation": config.distillation.model_copy(update=update)}))
    assert teacher is not None
    decided = [f"{key}={spell(value)}" for key, value in _keys_of_heads(teacher).items()]
    if teacher.vit.in_chans == config.student.in_chans and teacher.images.mean is not None:
        decided += [f"data.mean={list(teacher.images.mean)}", f"data.std={list(teacher.images.std or ())}"]
    return decided, [f"distillation.{key}={value}" for key, value in update.items()]


def check_teacher_there(teacher: str) -> None:
    """Whether there is such a file, folder or released name; nothing is downloaded.

    Raises:
        WeightsError: there is none.
    """
    with weights_of(TYPED):
        check_there(teacher)


def place_of(typed: str, source: Source) -> str:
    """An absolute path; a released name or an address as it was typed."""
    if not user_path(typed).exists():
        return typed
    return str((source.files[0] if len(source.files) == 1 else source.files[0].parent).absolute())


def describe(config: Config) -> str:
    """For the plan: what the teacher is, and where its scores come from."""
    teacher = frozen_teacher(config)
    assert teacher is not None
    size = f"{config.distillation.teacher}: {teacher.vit.describe()}, {size_of(teacher.vit) / 1e6:.1f} M, frozen"
    if teacher.heads:
        numbers = " + ".join(f"{head.out_dim:,}" for head in teacher.heads.values())
        return f"{size}; its own heads, of {numbers} prototypes"
    return (
        f"{size}; it has no heads: fresh ones ({_fresh(config)} prototypes) are trained on its features meanwhile, "
        "by the same losses between its own two views, and their moving average is what the student learns"
    )


def _fresh(config: Config) -> str:
    numbers = [config.dino.head_n_prototypes, *([config.ibot.head_n_prototypes] if config.ibot.separate_head else [])]
    return " + ".join(f"{number:,}" for number in numbers)
