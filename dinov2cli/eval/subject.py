"""What is evaluated: a model, where its weights came from, and the data that its configuration names."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dinov2cli.config import Config, load_config
from dinov2cli.config.vit import RESIZING
from dinov2cli.data.decoding import Reading
from dinov2cli.errors import ConfigError
from dinov2cli.eval.cache import FeatureCache
from dinov2cli.eval.extract import Extractor
from dinov2cli.eval.leaks import Overlap
from dinov2cli.models.library_backbone import Backbone
from dinov2cli.models.load import load_model
from dinov2cli.models.load.locate import locate_together
from dinov2cli.requests.eval import FeaturesRequest


@dataclass(frozen=True)
class Subject:
    """A frozen model to evaluate.

    Args:
        model: in eval mode, on the CPU.
        name: as it was asked for.
        weights: the file, or the first of several.
        run: the run folder that the weights belong to, if any.
        iteration: the training iteration, if known.
        config: the run's, or the one given; None for weights without one.
        leaks: what `overlap` has found, by the strings of train and val.
    """

    model: Backbone
    name: str
    weights: Path
    run: Path | None = None
    iteration: int | None = None
    config: Config | None = None
    leaks: dict[tuple[str, str], Overlap] = field(default_factory=dict)

    def extractor(self, request: FeaturesRequest, **options: Any) -> Extractor:
        """An extractor of the model's features as a request wants them, in the configured precision."""
        return Extractor(self.model, **self.extraction(request), **options)

    def extraction(self, request: FeaturesRequest) -> dict[str, Any]:
        """Arguments of an extractor, as a request wants it; one that has no option `no_cache` keeps no features."""
        options: dict[str, Any] = {}
        if self.config is not None:
            options["precision"] = self.config.compute_precision.precision
            options["max_bad_fraction"] = self.config.train.max_bad_fraction
        if request.max_bad_fraction is not None:
            options["max_bad_fraction"] = request.max_bad_fraction
        options["reading"] = Reading.of(self.model.images, self.config, request)
        options |= {key: getattr(request, key) for key in ("image_size", "num_workers", "device")}
        return {"cache": None if getattr(request, "no_cache", True) else FeatureCache(), **options}


def load_subject(checkpoint: str, config_file: Path | None = None, overrides: Sequence[str] = ()) -> Subject:
    """Load whatever `checkpoint` names (see `load_model`) with the configuration that belongs to it. Collective.

    Args:
        config_file: a configuration to use instead of the run's own; its `student` part must describe the weights.
        overrides: `a.b=value` changes of that configuration.

    Raises:
        WeightsError: nothing to load there.
        ConfigError: the configuration cannot be read, or there is none to override.
    """
    source = locate_together(checkpoint.removesuffix("_lc"))
    beside = source.run / "config.yaml" if source.run and (source.run / "config.yaml").is_file() else None
    config_file = config_file or beside
    if config_file is None and overrides:
        raise ConfigError(
            f"{overrides[0]}: there is no configuration to override; {checkpoint} comes without a config.yaml.",
            hint="Give one with --config-file.",
        )
    config = load_config(config_file=config_file, overrides=overrides) if config_file else None
    changed = {item.partition("=")[0] for item in overrides}
    not_shown = [key for key in ("num_heads", *RESIZING) if f"student.{key}" in changed]  # by the weights
    student = {key: getattr(config.student, key) for key in not_shown} if config else {}
    model = load_model(source, config_file=config_file, **student)
    if config and config.student.in_chans == model.config.in_chans:
        model.images = config.images()
    return Subject(model, checkpoint, source.files[0], source.run, source.iteration, config)
