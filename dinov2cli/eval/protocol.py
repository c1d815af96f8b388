"""What all evaluations share: the model, the data and the features that a request means, and the report.

A protocol is a module of this package with `run(request, subject=None) -> Evaluation`, which loads the model unless it
is given and writes the report where the request says; a request whose command ends with the module's name; and a
line in `requests.protocols`.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from dinov2cli import distributed
from dinov2cli.config import Config
from dinov2cli.console import logger
from dinov2cli.data.datasets import ImageDataset, make_dataset
from dinov2cli.errors import Dino2Error
from dinov2cli.eval.classes import check_labels
from dinov2cli.eval.extract import Extractor
from dinov2cli.eval.first_look import Plan, datasets_for, plan
from dinov2cli.eval.leaks import Overlap, overlap
from dinov2cli.eval.reports import Evaluation, Row, add_result, write_reference_lines
from dinov2cli.eval.subject import Subject, load_subject
from dinov2cli.requests.eval import EvalRequest


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
        settings: Any,
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
            settings: a dataclass of what was chosen in the protocol; `further_settings` are added.
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
            settings={**asdict(settings), **extract.used(), **further_settings},
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
