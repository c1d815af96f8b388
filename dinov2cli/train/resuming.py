"""Whether a run can go on with the configuration it is resumed with."""

from pathlib import Path
from typing import Any

from dinov2cli.config import Config, load_config
from dinov2cli.console import logger
from dinov2cli.errors import ConfigError

# What the tensors of a checkpoint depend on.
SHAPING_KEYS = {
    *(f"student.{key}" for key in ("arch", "embed_dim", "depth", "num_heads", "patch_size", "ffn_layer", "layerscale",
                                   "num_register_tokens", "qkv_bias", "proj_bias", "ffn_bias")),
    *(f"{head}.head_{key}" for head in ("dino", "ibot") for key in ("n_prototypes", "bottleneck_dim", "nlayers",
                                                                   "hidden_dim")),
    "ibot.separate_head", "crops.global_crops_size", "train.centering",
}  # fmt: skip
# What may change between two sessions of a run without a word.
FREE_KEYS = {"train.output_dir", "train.num_workers", "train.keep", "train.checkpoint_period", "train.log_period"}


def check_resumable(saved: Path, config: Config) -> None:
    """Compare the run's own `config.yaml` with the configuration it is to be resumed with.

    Raises:
        ConfigError: keys that shape the networks differ; the message names them.
    """
    old, new = _flat(load_config(config_file=saved)), _flat(config)
    changed = {key: f"{key} ({old[key]} there, {new[key]} here)" for key in new if old[key] != new[key]}
    shaping = [text for key, text in changed.items() if key in SHAPING_KEYS]
    if shaping:
        raise ConfigError(
            f"{saved.parent} holds a run of another shape: it differs in {', '.join(shaping)}",
            "Choose another --output-dir, or start over in this one with --no-resume.",
        )
    telling = [text for key, text in changed.items() if key not in FREE_KEYS]
    if telling:
        logger.warning("the run goes on with changed keys: %s", ", ".join(telling))


def _flat(config: Config) -> dict[str, Any]:
    return {f"{group}.{key}": value for group, keys in config.model_dump().items() for key, value in keys.items()}
