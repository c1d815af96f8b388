"""Whether a run can go on with the configuration it is resumed with, and how on another number of processes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dinov2cli.config import Config, load_config
from dinov2cli.config.crops import Crops
from dinov2cli.config.gram import Gram
from dinov2cli.config.schema import Data, Dino, Evaluation, Ibot, Student
from dinov2cli.config.vit import RESIZING, ViTConfig
from dinov2cli.console import logger
from dinov2cli.data.datasets import ImageDataset
from dinov2cli.data.spelling import absolute
from dinov2cli.errors import ConfigError
from dinov2cli.files import digest
from dinov2cli.train.schedules import Schedules

# What the tensors of a checkpoint depend on.
SHAPING_KEYS = {
    "student.arch", "student.backbone_config", "student.ffn_ratio", "student.train",
    *(f"student.{key}" for key in Student.model_fields if key in ViTConfig.model_fields and key not in RESIZING),
    *(f"dino.{key}" for key in Dino.model_fields if key.startswith("head_")),
    *(f"ibot.{key}" for key in Ibot.model_fields if key.startswith("head_")),
    "ibot.separate_head", "crops.global_crops_size", "train.centering", "distillation.digest",
}  # fmt: skip
SCHEDULED_KEYS = {
    "optim.epochs", "train.OFFICIAL_EPOCH_LENGTH", "optim.base_lr", "optim.min_lr", "optim.warmup_epochs",
    "optim.scaling_rule", "optim.freeze_last_layer_epochs", "optim.weight_decay", "optim.weight_decay_end",
    "student.freeze_backbone_epochs", "teacher.momentum_teacher", "teacher.final_momentum_teacher",
    "teacher.warmup_teacher_temp", "teacher.teacher_temp", "teacher.warmup_teacher_temp_epochs",
    "gram.loss_weight", "gram.loss_weight_schedule", "dino.reweight_dino_local_loss", "dino.local_loss_weight_schedule",
}  # fmt: skip
# What may change between two sessions of a run without a word: where and how it runs, what is written and measured.
FREE_KEYS = {
    *(f"train.{key}" for key in ("output_dir", "num_workers", "keep", "checkpoint_period", "log_period", "sharding",
                                 "hang_timeout", "tensorboard", "wandb", "compile", "activation_checkpointing",
                                 "max_nonfinite", "max_bad_fraction", "stop_on_collapse")),
    "student.attention_backend", "student.block_chunks", "optim.lr", "data.normalize_on_device", "data.max_image_gb",
    "distillation.students",  # each has a configuration of its own
    *(f"evaluation.{key}" for key in Evaluation.model_fields),
}  # fmt: skip
# What `keep_effective_batch` changes; it says so itself.
BATCH_KEYS = {"train.batch_size_per_gpu", "train.gradient_accumulation"}
# All else changes what is learnt from here on, and is named.
NAMED_KEYS = {
    "compute_precision.precision", "compute_precision.grad_scaler", "dino.loss_weight", "dino.koleo_loss_weight",
    "ibot.loss_weight", "ibot.mask_sample_probability", "ibot.mask_ratio_min_max", "train.dataset_path", "train.seed",
    "distillation.teacher", "distillation.patches",
    *(f"gram.{key}" for key in Gram.model_fields if f"gram.{key}" not in SCHEDULED_KEYS),
    "student.drop_path_rate", "student.drop_path_uniform",
    *(f"student.pos_embed_rope_{name}_coords" for name in ("shift", "jitter", "rescale")),
    *(f"student.{key}" for key in RESIZING),
    *(f"student.pretrained_{key}" for key in ("weights", "channels", "patches")), "optim.clip_grad",
    "optim.patch_embed_lr_mult", "optim.layerwise_decay", "optim.adamw_beta1", "optim.adamw_beta2",
    *(f"crops.{key}" for key in Crops.model_fields if key != "global_crops_size"),
    *(f"data.{key}" for key in Data.model_fields if f"data.{key}" not in FREE_KEYS),
}  # fmt: skip
# In what students that learn together may differ: all else decides their batches, or the pass of their teacher.
OWN_GROUPS = ("student", "dino", "ibot", "teacher", "gram", "optim", "evaluation")
OWN_KEYS = {f"train.{key}" for key in ("output_dir", "centering", "checkpoint_period", "keep", "log_period", "wandb",
            "tensorboard", "max_nonfinite", "stop_on_collapse", "activation_checkpointing")}  # fmt: skip
COMMON_KEYS = {"student.patch_size", "student.in_chans", "student.attention_backend",
               "ibot.mask_sample_probability", "ibot.mask_ratio_min_max"}  # fmt: skip
DATASETS = ("train.dataset_path", "evaluation.knn_train_dataset", "evaluation.knn_val_dataset")


def on_resume(key: str) -> str:
    """Whether a key may change in a run that goes on, and what is said of it then, in few words."""
    if key in SHAPING_KEYS:
        return "no"
    if key in SCHEDULED_KEYS:
        return "yes, schedules shown"
    if key in BATCH_KEYS:
        return "yes, images kept"
    assert key in FREE_KEYS | NAMED_KEYS, f"{key}: what a change of it means on resuming is not said"
    return "yes" if key in FREE_KEYS else "yes, named"


def check_resumable(saved: Path, config: Config, iteration: int = 0, before: int = 1, world_size: int = 1) -> None:
    """Compare the run's own `config.yaml` with the configuration it is to be resumed with; say what changes.

    Args:
        iteration: that many iterations are done.
        before: processes that did them.
        world_size: processes of this session.

    Raises:
        ConfigError: keys that shape the networks differ, or the run is longer already; the message names them.
    """
    changed = changed_keys(saved, config)
    if "distillation.digest" in changed:
        raise ConfigError(
            f"{saved.parent} {_of_teachers(load_config(config_file=saved).distillation.teacher, config)}",
            "Go on with the same file, which may have moved, choose another --output-dir, or start over in this one "
            "with --no-resume.",
        )
    if shaping := [text for key, text in changed.items() if key in SHAPING_KEYS]:
        raise ConfigError(
            f"{saved.parent} holds a run of another shape: it differs in {', '.join(shaping)}",
            "Choose another --output-dir, or start over in this one with --no-resume.",
        )
    if iteration > config.iterations():
        needed = -(-iteration // config.train.OFFICIAL_EPOCH_LENGTH)
        raise ConfigError(
            f"optim.epochs={config.optim.epochs}: {saved.parent} has done {iteration} iterations, more than these "
            f"{config.iterations()}",
            f"At least optim.epochs={needed} goes on; --no-resume starts over, and moves that run's files aside.",
        )
    if iteration == config.iterations():  # nothing goes on
        return
    if named := [text for key, text in changed.items() if key not in SCHEDULED_KEYS]:
        logger.warning("the run goes on with changed keys: %s", ", ".join(named))
    if scheduled := [text for key, text in changed.items() if key in SCHEDULED_KEYS]:
        drawn = before_and_after(load_config(config_file=saved), config, iteration, before, world_size)
        logger.warning("the run goes on with other schedules: %s\n%s", ", ".join(scheduled), drawn)


def _of_teachers(before: str, config: Config) -> str:
    now = config.distillation.teacher
    if before == now:
        return f"learns from the teacher {before}, which is another file since"
    told = [f"the teacher {teacher}" if teacher else "no teacher" for teacher in (before, now)]
    return f"learns from {told[0]}, not from {told[1]}"


def before_and_after(old: Config, new: Config, iteration: int, before: int, world_size: int) -> str:
    """A table of the schedules that change, at five iterations from the next one to the end."""
    schedules = [Schedules(old, before), Schedules(new, world_size)]
    last = new.iterations() - 1
    points = sorted({iteration + round((last - iteration) * part / 4) for part in range(5)})
    values = [[each.at(point) for each in schedules] for point in points]
    names = [name for name in schedules[0].functions if any(f"{a[name]:.3g}" != f"{b[name]:.3g}" for a, b in values)]
    lines = [f"{'iteration':>12}" + "".join(f"  {name:>22}" for name in names)]
    for point, (a, b) in zip(points, values, strict=True):
        lines.append(f"{point:>12}" + "".join(f"  {f'{a[name]:.3g} -> {b[name]:.3g}':>22}" for name in names))
    return "\n".join(lines)


def changed_keys(saved: Path, config: Config) -> dict[str, str]:
    """The keys that differ from a run's own `config.yaml`, each with both values; without those that may change."""
    old, new = _flat(load_config(config_file=saved)), _flat(config)
    if old["distillation.digest"] == new["distillation.digest"] != "":  # the same teacher, wherever it lies
        old["distillation.teacher"] = new["distillation.teacher"]
    keys = [key for key in new if old[key] != new[key] and key not in FREE_KEYS | BATCH_KEYS]
    return {key: f"{key} ({old[key]} there, {new[key]} here)" for key in keys}


def check_same_batches(configs: Sequence[Config]) -> None:
    """Whether students can learn from the same batches and one pass of their teacher.

    Raises:
        ConfigError: keys in which they must not differ do; the message names both values, and whose they are.
    """
    first, *others = map(_flat, configs)
    common = [key for key in first if key not in OWN_KEYS and key.partition(".")[0] not in OWN_GROUPS]
    problems = []
    for other in others:
        differ = [key for key in (*common, *sorted(COMMON_KEYS)) if first[key] != other[key]]
        if bool(first["ibot.loss_weight"]) != bool(other["ibot.loss_weight"]):  # nothing is masked without one
            differ.append("ibot.loss_weight")
        names = [Path(each["train.output_dir"]).name for each in (first, other)]
        problems += [f"{key}={first[key]} of {names[0]}, {other[key]} of {names[1]}" for key in differ]
    if problems:
        raise ConfigError(
            "distillation.students: " + "; ".join(problems),
            "Students that learn together see the same batches, and one pass of one teacher: say this once for all, or "
            "train them one by one.",
        )


def data_facts(dataset: ImageDataset) -> dict[str, int]:
    """What a checkpoint remembers of the data: images, classes, and a digest of names, of 4096 images at the most.

    A name is a file's with its folder's: a data set that has moved is the same.
    """
    count = len(dataset)
    some = range(0, count, max(1, count // 4096))
    names = ["/".join(dataset.path(index).split("/")[-2:]) for index in some]
    text = "\0".join([*dataset.class_names, "", *names])
    return {"images": count, "classes": len(dataset.class_names), "names": int(digest(text)[:15], 16)}


def tell_of_other_data(facts: dict[str, int], now: dict[str, int]) -> None:
    """Warn where the data is not what the checkpoint has learnt from; older checkpoints do not say."""
    changes = [
        f"{facts[key]} -> {now[key]} {key}" for key in ("images", "classes") if facts.get(key, now[key]) != now[key]
    ]
    if not changes and facts.get("names", now["names"]) != now["names"]:
        changes = ["as many images, and other names"]
    if changes:
        logger.warning(
            "the data has changed since iteration %d: %s. The run goes on with what is there now, in another order",
            facts["iteration"], ", ".join(changes),
        )  # fmt: skip


def keep_effective_batch(config: Config, facts: dict[str, int], world_size: int) -> Config:
    """The configuration with which a run on `world_size` processes goes on as before on another number.

    The images of an iteration, and with them the learning rate, the schedules and the order of the samples, stay the
    run's own: fewer processes accumulate gradients, more take smaller batches each. Only whoever changes the batch of
    a process by hand gets what he asks for.

    Args:
        config: as given for this session.
        facts: of the checkpoint, see `batch_facts`; older checkpoints have none.
        world_size: processes of this session.
    """
    before, now = facts.get("effective_batch"), config.effective_batch(world_size)
    if before is None or before == now:
        return config
    if config.effective_batch() not in (facts["given_batch"], facts["used_batch"]):
        logger.warning("the run goes on with %d images an iteration instead of %d, as configured", now, before)
        return config
    batch, processes = config.train.batch_size_per_gpu, f"{facts['world_size']} -> {world_size} processes"
    if before % (batch * world_size) == 0:
        accumulation = before // (batch * world_size)
    elif before % world_size == 0 and before // world_size < batch:
        accumulation, batch = 1, before // world_size
    else:
        logger.warning(
            "%s: the run goes on with %d images an iteration instead of %d, which cannot be shared out; set "
            "train.batch_size_per_gpu and train.gradient_accumulation to choose", processes, now, before,
        )  # fmt: skip
        return config
    logger.info(
        "%s: to keep %d images an iteration, train.batch_size_per_gpu=%d and train.gradient_accumulation=%d",
        processes, before, batch, accumulation,
    )  # fmt: skip
    changes = {"batch_size_per_gpu": batch, "gradient_accumulation": accumulation}
    return config.model_copy(update={"train": config.train.model_copy(update=changes)})


def batch_facts(given: Config, used: Config, world_size: int) -> dict[str, int]:
    """What a checkpoint says of the batch: of all processes, and of one, as configured and as adapted."""
    return {
        "world_size": world_size,
        "effective_batch": used.effective_batch(world_size),
        "given_batch": given.effective_batch(),
        "used_batch": used.effective_batch(),
    }


def _flat(config: Config) -> dict[str, Any]:
    flat = {f"{group}.{key}": value for group, keys in config.model_dump().items() for key, value in keys.items()}
    return flat | {key: absolute(flat[key]) for key in DATASETS if flat[key]}
