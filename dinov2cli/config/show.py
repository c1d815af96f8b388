"""What `dino2 presets list` and `dino2 presets show` print."""

from typing import Any

from dinov2cli.config.loading import load_config
from dinov2cli.config.presets import Preset, find_preset, list_presets
from dinov2cli.config.tree import annotated_yaml
from dinov2cli.console import out, plain_table
from dinov2cli.requests.tools import ListPresetsRequest, ShowPresetRequest


class PresetList(list[Preset]):
    """Presets, for people as a table."""

    def as_dict(self) -> dict[str, Any]:
        keys = ("name", "kind", "summary", "path")
        return {"presets": [{key: getattr(preset, key) for key in keys} for preset in self]}

    def __rich__(self) -> Any:
        table = plain_table("preset", "for", "what it is")
        for preset in self:
            table.add_row(preset.name, preset.kind, preset.summary)
        return table


class Yaml(str):
    """YAML text, coloured on a terminal."""

    def __rich__(self) -> Any:
        if not out.is_terminal:
            return self
        from rich.syntax import Syntax

        return Syntax("", "yaml", theme="ansi_dark", background_color="default").highlight(self)


def list_them(request: ListPresetsRequest) -> PresetList:
    """Do what `dino2 presets list` asks."""
    return PresetList(list_presets())


def show(request: ShowPresetRequest) -> Yaml:
    """The preset as it is written, or with `full` every key of it; ConfigError if there is none of that name."""
    preset = find_preset(request.name)
    if not request.full:
        return Yaml(preset.text)
    opening = "".join(f"# {line}".rstrip() + "\n" for line in preset.comment)
    return Yaml(opening + annotated_yaml(load_config(preset=preset.name)))
