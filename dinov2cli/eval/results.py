"""`dino2 results`: what was measured of a run, on what and how; of several runs side by side."""

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Group
from rich.table import Column, Table
from rich.text import Text

from dinov2cli.console import plain_table
from dinov2cli.errors import DataError
from dinov2cli.eval.reports import (
    RESULTS_FILE,
    Evaluation,
    heading,
    read_results,
    results_blocks,
    score_in_words,
    settings_in_words,
)
from dinov2cli.files import parse_yaml
from dinov2cli.requests.tools import ResultsRequest
from dinov2cli.train.verdicts import Collapse, baselines_of, collapse_of, json_lines

WHILE_TRAINING = "k-NN while training"


@dataclass(frozen=True)
class RunResults:
    """All scores of a run.

    Args:
        online: (iteration, top-1 in percent) of the k-NN while training, on `online_data`: train and val.
        collapse: what the monitors found against it.
        baselines: top-1 in percent of the same k-NN, by the name of features that nobody has learned.
    """

    run: Path
    evaluations: list[Evaluation]
    online: list[tuple[int, float]]
    online_data: tuple[str, str]
    collapse: Collapse | None
    baselines: dict[str, float]

    @staticmethod
    def of(run: Path, task: str | None = None) -> "RunResults":
        """Read a run folder or a `results.json`; DataError where neither it nor the training wrote any score."""
        folder = run if run.is_dir() else run.parent
        online = [(int(line["iteration"]), float(line["knn_top1"])) for line in json_lines(folder / "knn_metrics.json")]
        there = (run / RESULTS_FILE if run.is_dir() else run).exists()
        evaluations = read_results(run) if there or not online else []
        evaluations = [each for each in evaluations if task in (None, each.task)]
        if task not in (None, "knn"):
            online = []
        baselines = baselines_of(folder).top1 if online else {}
        return RunResults(run, evaluations, online, _online_data(folder), collapse_of(folder), baselines)

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "evaluations": [each.as_dict() for each in self.evaluations],
            "knn_while_training": [{"iteration": iteration, "top1": top1} for iteration, top1 in self.online],
            "knn_baselines": self.baselines,
            "collapse": self.collapse and self.collapse._asdict(),
        }

    def __rich__(self) -> Group:
        parts: list[Any] = [Text(str(self.run), "bold underline", overflow="fold")]
        if self.collapse:
            parts.append(Text(f"collapsed {self.collapse}", "red"))
        if self.online:
            parts += ["", heading(WHILE_TRAINING, *self.online_data)]
            parts.append(
                Text("  top-1 % after iterations: " + "  ".join(f"{i}: {top1:.1f}" for i, top1 in self.online))
            )
            if self.baselines:
                beside = ", ".join(f"{name} {top1:.1f}" for name, top1 in self.baselines.items())
                parts.append(Text(f"  without training: {beside}"))
        return Group(*parts, *([""] if self.evaluations else []), results_blocks(self.evaluations))


@dataclass(frozen=True)
class Comparison:
    """The scores of several runs, their newest of each kind side by side."""

    runs: list[RunResults]

    def as_dict(self) -> dict[str, Any]:
        return {"runs": [{"run": str(each.run), **each.as_dict()} for each in self.runs]}

    def __rich__(self) -> Group:
        newest: dict[tuple[str, str, str], dict[int, Evaluation]] = {}
        for number, run in enumerate(self.runs):
            for each in run.evaluations:  # in the order of their iterations
                newest.setdefault((each.task, each.train_dataset, each.val_dataset), {})[number] = each
        parts: list[Any] = [Text(f"{number + 1}  {run.run}", overflow="fold") for number, run in enumerate(self.runs)]
        parts += [Text(f"{i + 1} collapsed {run.collapse}", "red") for i, run in enumerate(self.runs) if run.collapse]
        for (task, train, val), found in newest.items():
            parts += ["", heading(task, train, val), *self._different_settings(found)]
            parts.append(self._table({number: _cells(each) for number, each in found.items()}))
        online = {i: {"last": f"{run.online[-1][1]:.2f}", "best": f"{max(s for _, s in run.online):.2f}"}
                  for i, run in enumerate(self.runs) if run.online}  # fmt: skip
        if online:
            data = dict.fromkeys(self.runs[number].online_data for number in online)
            parts += ["", *(heading(WHILE_TRAINING, *each) for each in data), self._table(online)]
        return Group(*parts)

    def _different_settings(self, found: dict[int, Evaluation]) -> list[Text]:
        keys = dict.fromkeys(key for each in found.values() for key in each.settings)
        different = [key for key in keys if len({json.dumps(e.settings.get(key)) for e in found.values()}) > 1]
        said = {i: settings_in_words({key: each.settings.get(key) for key in different}) for i, each in found.items()}
        return [Text(f"  of run {i + 1}: {words}", "yellow") for i, words in said.items() if words]

    def _table(self, cells: dict[int, dict[str, str]]) -> Table:
        columns = [Column(f"run {i + 1}", justify="right", no_wrap=True) for i in range(len(self.runs))]
        table = plain_table(Column("top-1 %", overflow="fold"), *columns)
        for name in dict.fromkeys(name for found in cells.values() for name in found):
            table.add_row(name, *(cells.get(i, {}).get(name, "") for i in range(len(self.runs))))
        return table


def run(request: ResultsRequest) -> RunResults | Comparison | str:
    """What `dino2 results` asks for: of one run, of several, or as CSV; DataError as from `RunResults.of`."""
    runs = [RunResults.of(each, request.task) for each in request.runs]
    if request.as_csv:
        return as_csv(runs)
    return runs[0] if len(runs) == 1 else Comparison(runs)


def as_csv(runs: list[RunResults]) -> str:
    """A line for each score."""
    text = io.StringIO()
    names = "run task iteration checkpoint train_dataset val_dataset classifier measure value low high top5 images"
    writer = csv.DictWriter(text, [*names.split(), "settings", "date"], lineterminator="\n")
    writer.writeheader()
    for each in runs:
        train, val = each.online_data
        for iteration, top1 in each.online:
            line = {
                "run": each.run,
                "task": WHILE_TRAINING,
                "iteration": iteration,
                "measure": "top-1 %",
                "value": top1,
            }
            writer.writerow({**line, "train_dataset": train, "val_dataset": val})
        for it in each.evaluations:
            for row in it.rows:
                low, high = row.interval or (None, None)
                line = {"run": each.run, "task": it.task, "iteration": it.iteration, "checkpoint": it.checkpoint}
                line |= {"train_dataset": it.train_dataset, "val_dataset": it.val_dataset, "classifier": row.name}
                line |= {"low": low, "high": high, "top5": row.top5, "images": row.images, "date": it.date}
                for measure, value in row.measured.items():
                    writer.writerow({**line, "measure": measure, "value": value, "settings": json.dumps(it.settings)})
    return text.getvalue()


def _cells(evaluation: Evaluation) -> dict[str, str]:
    """By what is measured, the score; the best C or head, which differ from run to run, are one measure."""
    cells = {}
    for number, row in enumerate(evaluation.rows):
        name = "" if number == 0 and evaluation.task in ("logreg", "linear") else row.name
        interval = " ({:.1f} to {:.1f})".format(*row.interval) if row.interval else ""
        for measure, value in row.measured.items():
            label = name if measure == "top-1 %" else f"{name} {measure}"
            cells[label or evaluation.task] = f"{score_in_words(measure, value)}{interval}"
    return cells


def _online_data(run: Path) -> tuple[str, str]:
    """Train and val of the k-NN while training, by the run's configuration."""
    try:
        evaluation = (parse_yaml((run / "config.yaml").read_text()) or {}).get("evaluation") or {}
    except FileNotFoundError:
        return "", ""
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise DataError(f"{run / 'config.yaml'} cannot be read ({error})") from None
    return evaluation.get("knn_train_dataset") or "", evaluation.get("knn_val_dataset") or ""
