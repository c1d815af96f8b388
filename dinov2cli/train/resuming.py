"""Whether a run can go on with the configuration it is resumed with, and how on another number of processes."""

from pathlib import Path
from typing import Any

from dinov2cli.config import Config, load_config
from dinov2cli.config.schema import Dino, Ibot, Student
from dinov2cli.config.vit import RESIZING, ViTConfig
from dinov2cli.console import logger
from dinov2cli.errors import ConfigError

# What the tensors of a checkpoint depend on.
SHAPING_KEYS = {
    "student.arch",
    *(f"student.{key}" for key in Student.model_fields if key in ViTConfig.model_fields and key not in RESIZING),
    *(f"dino.{key}" for key in Dino.model_fields if key.startswith("head_")),
    *(f"ibot.{key}" for key in Ibot.model_fields if key.startswith("head_")),
    "ibot.separate_head", "crops.global_crops_size", "train.centering",
}  # fmt: skip
# What may change between two sessions of a run without a word.
FREE = ("output_dir", "num_workers", "keep", "checkpoint_period", "log_period", "sharding", "hang_timeout")
FREE_KEYS = {f"train.{key}" for key in FREE}
# What `keep_effective_batch` changes; it says so itself.
BATCH_KEYS = {"train.batch_size_per_gpu", "train.gradient_accumulation"}


def check_resumable(saved: Path, config: Config) -> None:
    """Compare the run's own `config.yaml` with the configuration it is to be resumed with.

    Raises:
        ConfigError: keys that shape the networks differ; the message names them.
    """
    changed = changed_keys(saved, config)
    shaping = [text for key, text in changed.items() if key in SHAPING_KEYS]
    if shaping:
        raise ConfigError(
            f"{saved.parent} holds a run of another shape: it differs in {', '.join(shaping)}",
            "Choose another --output-dir, or start over in this one with --no-resume.",
        )
    if changed:
        logger.warning("the run goes on with changed keys: %s", ", ".join(changed.values()))


def changed_keys(saved: Path, config: Config) -> dict[str, str]:
    """The keys that differ from a run's own `config.yaml`, each with both values; without those that may change."""
    old, new = _flat(load_config(config_file=saved)), _flat(config)
    keys = [key for key in new if old[key] != new[key] and key not in FREE_KEYS | BATCH_KEYS]
    return {key: f"{key} ({old[key]} there, {new[key]} here)" for key in keys}


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
    return {f"{group}.{key}": value for group, keys in config.model_dump().items() for key, value in keys.items()}
