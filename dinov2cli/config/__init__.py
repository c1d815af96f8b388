"""Configuration: a frozen, validated tree with the key names of the DINOv2 reference. Imports no torch."""

from dinov2cli.config.config import Config
from dinov2cli.config.loading import load_config
from dinov2cli.config.presets import Preset, find_preset, list_presets
from dinov2cli.config.vit import ARCHITECTURES, ViTConfig

__all__ = ["ARCHITECTURES", "Config", "Preset", "ViTConfig", "find_preset", "list_presets", "load_config"]
