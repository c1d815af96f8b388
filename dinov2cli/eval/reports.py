"""Results of evaluations: files that programs read and tables that people read.

`results_eval_<task>.json` holds the reference implementation's lines and keys. `results.json` gathers all evaluations
of all checkpoints of a run; it is one well-formed JSON object.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock
from rich.console import Group
from rich.table import Column, Table
from rich.text import Text

from dinov2cli import __version__
from dinov2cli.console import logger, plain_table
from dinov2cli.errors import DataError
from dinov2cli.eval.metrics import Accuracy, wilson_interval
from dinov2cli.files import parse_json, write_text

RESULTS_FILE = "results.json"


@dataclass(frozen=True)
class Row:
    """One accuracy of an evaluation, in percent; the interval holds the true top-1 with 95 % confidence.

    What measures something else gives `scores` by name instead, the unit last: `{"mIoU %": 44.3}`.
    """

    name: str
    top1: float | None = None
    top5: float | None = None
    images: int = 0
    interval: tuple[float, float] | None = None
    per_class: dict[str, float] | None = None
    scores: dict[str, float] | None = None

    @property
    def measured(self) -> dict[str, float]:
        """By name, the top-1 accuracy or the scores."""
        return self.scores or ({} if self.top1 is None else {"top-1 %": self.top1})

    def in_words(self) -> str:
        """Its name and the measure that comes first, such as `full, k=10: top-1 71.50 %`."""
        measure, value = next(iter(self.measured.items()))
        name, _, unit = measure.partition(" ")
        return f"{self.name}: {name} {score_in_words(measure, value)} {unit}".rstrip()

    def cells(self) -> dict[str, str]:
        """What a table shows of it, by column."""
        shown = {measure: score_in_words(measure, value) for measure, value in self.measured.items()}
        if self.interval is not None:
            shown["95 % interval"] = "{:.2f} to {:.2f}".format(*self.interval)
        if self.top5 is not None:
            shown["top-5 %"] = f"{self.top5:.2f}"
        return shown | {"images": str(self.images)}

    @staticmethod
    def of(name: str, accuracy: Accuracy, class_names: tuple[str, ...] = ()) -> "Row":
        """A row for `accuracy`; per-class numbers, if it has them, are named by `class_names`."""
        per_class = None
        if accuracy.per_class is not None:
            named = enumerate(accuracy.per_class)
            per_class = {class_names[i] if i < len(class_names) else str(i): v for i, v in named if v == v}
        interval = wilson_interval(accuracy.top1, accuracy.images)
        return Row(name, accuracy.top1, accuracy.top5, accuracy.images, interval, per_class)


def score_in_words(measure: str, value: float) -> str:
    """With as many digits as tell two models apart: of percents two, of metres and shares three."""
    return f"{value:.2f}" if measure.endswith("%") else f"{value:.3f}"


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of one checkpoint.

    Args:
        task: a name in `requests.protocols`.
        checkpoint: the weights, relative to the run folder where they lie in one.
        iteration: the training iteration, if known.
        weights_hash: SHA-256 of the model.
        settings: what was chosen in the protocol.
        notes: what a reader must know, such as approximations.
        extra: further numbers, such as the best C.
    """

    task: str
    checkpoint: str
    iteration: int | None
    weights_hash: str
    train_dataset: str
    val_dataset: str
    settings: dict[str, Any]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    version: str = __version__

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in `results.json`."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        for row in values["rows"]:
            if row["scores"] is None:
                del row["scores"]
        return values

    def __rich__(self) -> Group:
        return results_blocks([self])

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "Evaluation":
        """The inverse of `as_dict`."""
        rows = tuple(Row(**{**row, "interval": row["interval"] and tuple(row["interval"])}) for row in values["rows"])
        return Evaluation(**{**values, "rows": rows, "notes": tuple(values["notes"])})

    def replaces(self, other: "Evaluation") -> bool:
        """Whether this is the same measurement as `other`, made again."""
        mine, its = self.as_dict(), other.as_dict()
        return all(mine[it] == its[it] for it in ("task", "checkpoint", "train_dataset", "val_dataset", "settings"))


def write_reference_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Write `results_eval_<task>.json`: one JSON object a line, as the reference implementation does."""
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def add_result(folder: Path, evaluation: Evaluation) -> Path:
    """Add to `folder`'s `results.json`, in the place of the same measurement made before; returns the file.

    Several processes may add at the same time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / RESULTS_FILE
    with FileLock(path.with_name(f".{RESULTS_FILE}.lock")):
        others = [other for other in _read_or_set_aside(path) if not evaluation.replaces(other)]
        gathered = sorted([*others, evaluation], key=lambda e: (e.iteration is None, e.iteration or 0, e.task))
        write_text(path, json.dumps({"format": 1, "evaluations": [e.as_dict() for e in gathered]}, indent=1))
    return path


def read_results(folder: Path) -> list[Evaluation]:
    """All evaluations in `folder`'s `results.json`.

    Raises:
        DataError: there is none, or it is not one of ours.
    """
    path = folder / RESULTS_FILE if folder.is_dir() else folder
    try:
        content = parse_json(path.read_bytes())
        return [Evaluation.from_dict(values) for values in content["evaluations"]]
    except FileNotFoundError:
        raise DataError(
            f"{path}: no evaluation has been written there.",
            hint=f"Evaluate a run first, for example: dino2 eval knn {folder}",
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} cannot be read as evaluation results: {error}") from None


def _read_or_set_aside(path: Path) -> list[Evaluation]:
    """What stands in `path`; a file that cannot be read must not cost the evaluation that has just been made."""
    if not path.exists():
        return []
    try:
        return read_results(path)
    except DataError as error:
        aside = path.with_name(path.name + ".unreadable")
        os.replace(path, aside)
        logger.warning("%s; kept as %s", error.message, aside)
        return []


def results_blocks(evaluations: Iterable[Evaluation]) -> Group:
    """Scores with their confidence intervals, under what was evaluated, on what and how; nothing is cut off."""
    blocks: dict[tuple[str, ...], list[Evaluation]] = {}
    for each in evaluations:
        key = each.task, each.train_dataset, each.val_dataset, settings_in_words(each.settings)
        blocks.setdefault(key, []).append(each)
    parts: list[Any] = []
    for (task, train, val, settings), of_block in blocks.items():
        parts += [*([""] if parts else []), heading(task, train, val), Text(f"  {settings}", "dim"), _table(of_block)]
        parts += [_beside(each) for each in of_block if each.extra.get("baselines")]
        parts += [Text(f"  {note}") for note in dict.fromkeys(note for each in of_block for note in each.notes)]
    return Group(*parts)


def _beside(evaluation: Evaluation) -> Group:
    """The baselines of an evaluation, and the model's own scores beside them."""
    found: dict[str, dict[str, float]] = evaluation.extra["baselines"]["top1"]
    names = dict.fromkeys(name for scores in found.values() for name in scores)
    columns = [Column(name, justify="right", min_width=max(6, *map(len, name.split()))) for name in names]
    table = plain_table(Column("top-1 %", no_wrap=True), *columns)
    for row, scores in found.items():
        table.add_row(row, *(f"{scores[name]:.2f}" if name in scores else "" for name in names))
    where = evaluation.checkpoint if evaluation.iteration is None else f"iteration {evaluation.iteration}"
    return Group(Text(f"  {where} beside what takes no training", overflow="fold"), table)


def heading(task: str, train: str, val: str) -> Text:
    """What was done on which data."""
    text = Text(overflow="fold")
    text.append(task, "bold")
    for name, dataset in (("train", train), ("val", val)):
        if dataset not in ("", "none"):
            text.append(f"\n  {name:<5} {dataset}")
    return text


def settings_in_words(settings: dict[str, Any]) -> str:
    """Those that say something in a line: no long lists, nothing that is off."""
    said = {key: value for key, value in settings.items() if value not in (None, False, "", [])}
    short = {key: value for key, value in said.items() if not (isinstance(value, list | tuple) and len(value) > 4)}
    return ", ".join(f"{key} {_spelled(value)}" for key, value in short.items() if key != "ks")


def _spelled(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "/".join(map(_spelled, value))
    return "" if value is True else str(value).removeprefix("torch.")


def _table(evaluations: list[Evaluation]) -> Table:
    used = dict.fromkeys(name for evaluation in evaluations for row in evaluation.rows for name in row.cells())
    accuracy = ("top-1 %", "95 % interval", "top-5 %")
    shown = [name for name in accuracy if name in used or (name != "top-5 %" and not used)]
    columns = [*shown, *(name for name in used if name not in (*accuracy, "images")), "images"]
    table = plain_table(
        Column("checkpoint", overflow="fold"),
        Column("classifier", overflow="fold"),
        *(Column(name, justify="right", no_wrap=True) for name in columns),
    )
    for evaluation in evaluations:
        where = evaluation.checkpoint if evaluation.iteration is None else f"iteration {evaluation.iteration}"
        for row in evaluation.rows:
            cells = row.cells()
            table.add_row(where, row.name, *(cells.get(name, "") for name in columns))
    return table
