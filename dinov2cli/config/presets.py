"""The presets: YAML files that state their difference from the defaults and open with a comment on their use."""

from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path

from dinov2cli.errors import ConfigError, did_you_mean

# Inside the package in an installed wheel, beside it in a source checkout.
_FOLDERS = (Path(__file__).parents[1] / "presets", Path(__file__).parents[2] / "presets")


@dataclass(frozen=True)
class Preset:
    """A preset file."""

    path: Path

    @property
    def name(self) -> str:
        """What `--preset` takes, such as `vitl16_short`."""
        return self.path.stem

    @cached_property
    def text(self) -> str:
        """The file as it is, comments included."""
        return self.path.read_text(encoding="utf-8")

    @property
    def kind(self) -> str:
        """`training`, or `weights` for the architectures of released weights."""
        return "weights" if self.name.endswith("_pretrain") else "training"

    @property
    def comment(self) -> list[str]:
        """Lines of the opening comment, without the `#`."""
        opening = takewhile(lambda line: line.startswith("#"), self.text.splitlines())
        return [line.removeprefix("#").removeprefix(" ").rstrip() for line in opening]

    @property
    def summary(self) -> str:
        """First line of the opening comment."""
        return self.comment[0] if self.comment else ""


def list_presets() -> list[Preset]:
    """All presets, those for training first, each kind in order of name.

    Raises:
        ConfigError: the installation holds no presets.
    """
    for folder in _FOLDERS:
        paths = sorted(folder.glob("*.yaml"))
        if paths:
            return sorted((Preset(path) for path in paths), key=lambda preset: (preset.kind, preset.name))
    raise ConfigError("no presets found: this installation of dinov2cli is incomplete", hint="Install it again.")


def find_preset(name: str) -> Preset:
    """The preset of that name; `train/vitl14`, `eval/vitl14_pretrain` and a `.yaml` ending are taken as well.

    Raises:
        ConfigError: there is none; the message lists those there are.
    """
    presets = {preset.name: preset for preset in list_presets()}
    wanted = name.removesuffix(".yaml").removeprefix("train/").removeprefix("eval/")
    if wanted in presets:
        return presets[wanted]
    guess = did_you_mean(wanted.lower(), presets).replace("; did", " Did")
    raise ConfigError(f"no preset named '{name}'.{guess}", hint=f"Presets: {', '.join(presets)}")
