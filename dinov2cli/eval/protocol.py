"""What all evaluations share: the model, the data and the features that a request means, and the report.

A protocol is a module of this package with `run(request, subject=None) -> Evaluation`, which loads the model unless it
is given and writes the report where the request says; a request whose command ends with the module's name; and a
line in `requests.protocols`.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2cli import distributed
from dinov2cli.config import Config, load_config
from dinov2cli.config.vit import RESIZING
from dinov2cli.console import few, logger
from dinov2cli.data.datasets import ImageDataset, make_dataset
from dinov2cli.data.decoding import Reading
from dinov2cli.errors import ConfigError, DataError, Dino2Error
from dinov2cli.eval.extract import Extractor
from dinov2cli.eval.features import FeatureCache
from dinov2cli.eval.first_look import Plan, datasets_for, plan
from dinov2cli.eval.leaks import Overlap, overlap
from dinov2cli.eval.reports import Evaluation, Row, add_result, write_reference_lines
from dinov2cli.models.library_backbone import Backbone
from dinov2cli.models.load import load_model
from dinov2cli.models.load.locate import locate_together
from dinov2cli.requests.eval import EvalRequest, FeaturesRequest


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


def perform(request: EvalRequest) -> Evaluation | Plan:
    """Do what an evaluation's request asks, alone or as one of several processes."""
    return plan(request) if request.dry_run else evaluate(request)


def evaluate(request: EvalRequest, subject: Subject | None = None) -> Evaluation:
    """Run the protocol that a request is for, alone or as one of several processes."""
    run: Callable[[EvalRequest, Subject | None], Evaluation]
    run = import_module(f"dinov2cli.eval.{request.protocol()}").run
    with distributed.process_group():
        return run(request, subject)


@dataclass(frozen=True)
class Trial:
    """A request with the model that it names, and the strings of its train and val dataset."""

    request: EvalRequest
    subject: Subject
    train_dataset: str
    val_dataset: str

    @staticmethod
    def of(request: EvalRequest, subject: Subject | None = None) -> "Trial":
        """Load the model, unless it is given, and find the datasets; without training, train may be left out.

        Raises:
            WeightsError, ConfigError: there is no such model, or a dataset is neither given nor known to its config.
        """
        subject = subject or load_subject(request.checkpoint, request.config_file, request.overrides)
        train = request.train_dataset or (None if request.trains else "none")
        return Trial(request, subject, *datasets_for(subject.config, train, request.val_dataset, request.labels))

    def extractor(self, batch_size: int, **options: Any) -> Extractor:
        """An extractor of the model's features as the request wants them."""
        return self.subject.extractor(self.request, batch_size=batch_size, **options)

    def overlap(self, train: ImageDataset, val: ImageDataset) -> Overlap:
        """`leaks.overlap` of the two datasets, looked for once however many protocols the subject goes through."""
        known, pair = self.subject.leaks, (self.train_dataset, self.val_dataset)
        if pair not in known:
            known[pair] = overlap(train, val)
        return known[pair]

    @property
    def folder(self) -> Path | None:
        """Where the files of this evaluation go: where asked for, else beside a run's teacher, else nowhere."""
        beside = self.subject.weights.parent / self.request.protocol() if self.subject.run else None
        return self.request.output_dir or beside

    def report(
        self,
        extract: Extractor,
        settings: Mapping[str, Any],
        rows: Sequence[Row],
        lines: Sequence[dict[str, Any]],
        *,
        notes: tuple[str, ...] = (),
        extra: dict[str, Any] | None = None,
        leak: Overlap | None = None,
        **further_settings: Any,
    ) -> Evaluation:
        """The result; one process writes its files.

        Args:
            settings: what was chosen in the protocol; `further_settings` are added.
            lines: what the reference implementation writes of it.
            leak: how much of val is in train, where anything was trained.
        """
        subject, task = self.subject, self.request.protocol()
        where = str(subject.weights.relative_to(subject.run)) if subject.run else subject.name
        evaluation = Evaluation(
            task=task,
            checkpoint=where,
            iteration=subject.iteration,
            weights_hash=extract.weights_hash,
            train_dataset=self.train_dataset,
            val_dataset=self.val_dataset,
            settings={**settings, **extract.used(), **further_settings},
            rows=tuple(rows),
            notes=(*notes, *([str(leak)] if leak and leak.found else []), *extract.notes),
            extra={**(extra or {}), **({"val_in_train": leak.as_dict()} if leak else {})},
        )
        if distributed.is_main():
            if self.folder is not None:
                write_reference_lines(self.folder / f"results_eval_{task}.json", lines)
            if (gathered := subject.run or self.request.output_dir) is not None:
                logger.info("results added to %s", add_result(gathered, evaluation))
            else:
                logger.info("%s is in no run: nothing is written; --output-dir DIR keeps the results", where)
        distributed.barrier()
        return evaluation


def labelled(dataset: str, name: str, protocol: str) -> ImageDataset:
    """The images of a dataset, each of which has a class.

    Args:
        name, protocol: for the message, as "train" and "k-NN".

    Raises:
        DataError: some have none, or there is no such dataset.
    """
    images = make_dataset(dataset)
    names = {*images.class_names}
    times = Counter(map(str.casefold, names))
    if alike := sorted(each for each in names if times[each.casefold()] > 1):
        logger.warning("%s: classes whose names differ in case alone, such as %s, count as different ones", dataset,
                       " and ".join(alike[:2]))  # fmt: skip
    check_labels(torch.as_tensor(images.targets()), f"{name} dataset ({images.describe()})", protocol)
    return images


def evaluate_teacher(
    checkpoint: Path, config: Config, tasks: Sequence[str], *, device: str | None = None
) -> list[Evaluation]:
    """What `evaluation.tasks` asks for, on a teacher that a training has just written.

    A task that cannot be done (its data are gone, say) is reported and left out: training goes on.
    """
    subject = replace(load_subject(str(checkpoint)), config=config)
    done = []
    for task in tasks:
        try:
            done.append(evaluate(config.evaluation.request(task, str(checkpoint), device), subject))
        except Dino2Error as error:
            logger.error("evaluation.tasks: %s of %s failed: %s", task, checkpoint, error)
            continue
        for row in done[-1].rows:
            logger.info("%s after %s iterations, %s", task, subject.iteration, row.in_words())
    return done


def check_labels(targets: Tensor, dataset: str, protocol: str) -> None:
    """Raise DataError where an image has no class (its target is below 0); `dataset` and `protocol` as to be named."""
    if missing := int((targets < 0).sum()):
        raise DataError(
            f"The {dataset} has {missing} of {len(targets)} images without a class; {protocol} needs a class for each.",
            hint="Put the images into one subfolder per class.",
        )


def align_classes(train: ImageDataset, other: ImageDataset, other_name: str = "val") -> Tensor | None:
    """The train set's class index of each class of `other`: int64 [C_other], or None where the numbering is the same.

    Folder datasets number the classes that they hold; a val folder that lacks one would shift all that follow.

    Raises:
        DataError: `other` has classes that the train set has not, by name or, without names, by number.
    """
    known, names = tuple(train.class_names), tuple(other.class_names)
    if not known or not names or known == names:
        return None
    if missing := sorted(set(names) - set(known)):
        raise DataError(
            f"The {other_name} dataset has {len(missing)} of {len(names)} classes that the train dataset has not: "
            f"{few(missing, 8)}.",
            hint=f"train: {train.describe()} ({len(known)} classes). {other_name}: {other.describe()}. "
            "Both need the same class names (for folders: the same subfolders).",
        )
    if len(set(known)) < len(known) or len(set(names)) < len(names):
        return None  # ambiguous names (ImageNet has two cranes): the numbering is all there is
    logger.info("%s has %d of the %d classes of train; numbered by name", other_name, len(names), len(known))
    return torch.tensor([known.index(name) for name in names])
