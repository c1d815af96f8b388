"""`dino2 plot`: the curves of one or several runs, from their `training_metrics.json` and evaluation results.

matplotlib is imported where it is used: it belongs to the optional `plots` packages.
"""

import html
import io
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dinov2cli.errors import DataError, EnvironmentProblem
from dinov2cli.files import keep_others, marked, parse_json, write_bytes, writing
from dinov2cli.requests.tools import PlotRequest
from dinov2cli.train.judgement import Judgement, judge
from dinov2cli.train.verdicts import HIGHEST, LOWEST, Collapse, collapse_of, json_lines

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Iterations and values, both float64 [n]; values that were not finite are nan."""

SCHEDULES = ("lr", "last_layer_lr", "wd", "mom", "teacher_temp")
SPEED = ("iter_time", "data_time")
GROUPS = ("Scores", "Losses", "Schedules", "Monitors", "Speed")
COLUMNS = 5


@dataclass(frozen=True)
class Run:
    """The curves of a run, by group (one of `GROUPS`) and name."""

    name: str
    curves: dict[tuple[str, str], Curve]
    collapse: Collapse | None = None
    """What the monitors found against it."""
    learning: Judgement | None = None
    """Whether it learns, and what to change."""

    def said(self) -> list[tuple[str, str]]:
        """Lines to stand by the curves, each with a colour."""
        collapsed = [(f"{self.name} collapsed {self.collapse}", "red")] if self.collapse else []
        if self.learning is None:
            return collapsed
        color = {True: "green", False: "red", None: "grey"}[self.learning.learns]
        first, *others = self.learning.lines()
        return [*collapsed, (f"{self.name} {first}", color), *((f"    {line}", "red") for line in others)]


def run(request: PlotRequest) -> Path:
    """Plot as the request asks, and return the file; the errors are those of `read_run` and `plot_runs`."""
    first = request.runs[0]
    target = request.output or (first if first.is_dir() else first.parent) / "plot.png"
    plot_runs([read_run(path) for path in request.runs], target, smooth=request.smooth)
    return target


def read_run(path: Path) -> Run:
    """Read a run folder (or a `training_metrics.json`).

    Raises:
        DataError: no metrics there, or none that can be read.
    """
    folder = path if path.is_dir() else path.parent
    metrics = path / "training_metrics.json" if path.is_dir() else path
    if not metrics.is_file():
        raise DataError(f"{path}: not a run folder (it has no training_metrics.json)")
    points: dict[tuple[str, str], dict[float, float]] = {}
    for line in json_lines(metrics):
        for key, value in line.items():
            if key != "iteration" and (value is None or isinstance(value, int | float)):
                number = math.nan if value is None else float(value)
                points.setdefault((_group(key), key), {})[float(line["iteration"])] = number
    if not points:
        raise DataError(f"{metrics}: no line with metrics")
    for line in json_lines(folder / "knn_metrics.json"):
        if isinstance(line.get("knn_top1"), int | float):
            points.setdefault(("Scores", "k-NN top-1 % (while training)"), {})[line["iteration"]] = line["knn_top1"]
    for results in sorted(folder.rglob("results.json")):
        for name, iteration, top1 in _evaluations(results):
            points.setdefault(("Scores", name), {})[iteration] = top1
    curves: dict[tuple[str, str], Curve] = {}
    for group_and_name, by_iteration in points.items():
        iterations, values = zip(*sorted(by_iteration.items()), strict=True)
        curves[group_and_name] = np.array(iterations), np.array(values)
    return Run(folder.resolve().name, curves, collapse_of(folder), judge(folder))


def plot_runs(runs: Sequence[Run], output: Path, *, smooth: int = 1) -> None:
    """Draw all curves, the runs overlaid, as a `.png` or as a self-contained `.html`.

    Args:
        smooth: logged points in the moving mean that is drawn over the raw curve; 1 draws the raw curve alone.

    Raises:
        DataError: another suffix.
        EnvironmentProblem: matplotlib is not installed, or the file cannot be written.
    """
    suffix = output.suffix.lower()
    if suffix not in (".png", ".html"):
        raise DataError(f"{output}: unknown output type {suffix!r}; give .png or .html")
    keep_others(output)
    content = (
        marked(_saved(figure_of(runs, smooth=smooth), "png")) if suffix == ".png" else _html(runs, smooth).encode()
    )
    with writing(output):
        write_bytes(output, content)


def _html(runs: Sequence[Run], smooth: int) -> str:
    runs, names, sections = _with_distinct_names(runs), _names(runs), []
    for group in GROUPS:
        if of_group := [key for key in names if key[0] == group]:
            svg = _saved(_draw(runs, of_group, smooth), "svg").decode()
            sections.append(f"<h2>{group}</h2>\n{svg[svg.index('<svg') :]}\n{_table(runs, of_group)}")
    said = [f"<p style='color:{color}'>{html.escape(line)}</p>" for run in runs for line, color in run.said()]
    title = html.escape("dino2: " + ", ".join(run.name for run in runs))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        "<style>body{font-family:sans-serif;max-width:1500px;margin:2em auto;padding:0 1em}svg{width:100%;height:auto}"
        "td,th{padding:.2em 1em;text-align:right}td:first-child,th:first-child{text-align:left}</style></head>\n"
        f"<body><h1>{title}</h1>\n" + "\n".join(said + sections) + "\n</body></html>\n"
    )


def _table(runs: Sequence[Run], names: Sequence[tuple[str, str]]) -> str:
    """Last values of the curves, one column a run."""
    head = "".join(f"<th>{html.escape(run.name)}</th>" for run in runs)
    rows = []
    for key in names:
        cells = []
        for run in runs:
            values = run.curves[key][1] if key in run.curves else np.array([])
            values = values[np.isfinite(values)]
            cells.append(f"<td>{values[-1]:.5g}</td>" if len(values) else "<td></td>")
        rows.append(f"<tr><td>{html.escape(key[1])}</td>{''.join(cells)}</tr>")
    return f"<table><tr><th>last value</th>{head}</tr>{''.join(rows)}</table>"


def figure_of(runs: Sequence[Run], *, smooth: int = 1) -> "Figure":
    """All curves, the runs overlaid, as `plot_runs` draws them into a file; notebooks show it.

    Raises:
        EnvironmentProblem: matplotlib is not installed.
    """
    figure = _draw(_with_distinct_names(runs), _names(runs), smooth)
    # What notebooks ask for: pyplot would teach them figures, and take over the process.
    setattr(figure, "_repr_png_", lambda: _saved(figure, "png"))  # noqa: B010  (no attribute that Figure declares)
    return figure


def _saved(figure: "Figure", file_format: str) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format=file_format, dpi=110)
    return content.getvalue()


def _draw(runs: Sequence[Run], names: Sequence[tuple[str, str]], smooth: int) -> "Figure":
    """One panel a curve, `COLUMNS` in a row; every group begins a row."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise EnvironmentProblem(
            f"plots need matplotlib, which does not import ({error})", "pip install 'dinov2cli[plots]'"
        ) from error
    places: list[tuple[str, str] | None] = []
    for group in GROUPS:
        of_group = [key for key in names if key[0] == group]
        places += [*of_group, *[None] * (-len(of_group) % COLUMNS)]
    rows = len(places) // COLUMNS
    figure = Figure(figsize=(4 * COLUMNS, 2.8 * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    for place, key in enumerate(places):
        if key is None:
            continue
        axes = figure.add_subplot(rows, COLUMNS, place + 1)
        for index, run in enumerate(runs):
            if key in run.curves:
                _draw_curve(axes, *run.curves[key], smooth=smooth, color=f"C{index % 10}", marked=key[0] == "Scores")
        for bound, where in ((LOWEST.get(key[1]), "below"), (HIGHEST.get(key[1]), "above")):
            if bound is not None and key[0] == "Monitors":
                axes.axhline(bound, color="red", linestyle="--", linewidth=0.8)
                axes.text(0.99, bound, f"collapsed {where} {bound:g}", transform=axes.get_yaxis_transform(),
                          ha="right", va="bottom", fontsize=7, color="red")  # fmt: skip
        axes.set_title(f"{key[0]}: {key[1]}", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    handles = [figure.axes[0].plot([], [], color=f"C{i % 10}")[0] for i in range(len(runs))]
    figure.legend(handles, [run.name for run in runs], loc="outside upper center", ncols=4)
    said = [(part, color) for run in runs for line, color in run.said() for part in textwrap.wrap(line, 250)]
    if said:
        step = 0.19 / figure.get_figheight()
        for number, (line, color) in enumerate(reversed(said)):
            figure.text(0.01, number * step, line, color=color, fontsize=9, va="bottom")
        engine: Any = figure.get_layout_engine()
        room = (len(said) + 0.5) * step
        engine.set(rect=(0, room, 1, 1 - room))
    return figure


def _draw_curve(
    axes: Any, iterations: NDArray[np.float64], values: NDArray[np.float64], *, smooth: int, color: str, marked: bool
) -> None:
    marker = "o" if marked or len(values) == 1 else None
    if smooth <= 1 or marked or len(values) <= smooth:
        axes.plot(iterations, values, color=color, linewidth=1, marker=marker, markersize=3)
        return
    axes.plot(iterations, values, color=color, linewidth=0.5, alpha=0.3)
    axes.plot(iterations, moving_mean(values, smooth), color=color, linewidth=1.2)


def moving_mean(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Mean of the last `window` values (fewer at the start), nan left out: [n] -> [n]."""
    known = np.isfinite(values)
    sums = np.cumsum(np.where(known, values, 0.0))
    counts = np.cumsum(known)
    sums[window:] -= sums[:-window].copy()
    counts[window:] -= counts[:-window].copy()
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _names(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """All curves of all runs, in the order of the groups and of their first appearance."""
    seen = dict.fromkeys(key for run in runs for key in run.curves)
    return sorted(seen, key=lambda key: GROUPS.index(key[0]))


def _with_distinct_names(runs: Sequence[Run]) -> list[Run]:
    named: dict[str, Run] = {}
    for run in runs:
        name, number = run.name, 2
        while name in named:
            name, number = f"{run.name} ({number})", number + 1
        named[name] = replace(run, name=name)
    return list(named.values())


def _group(key: str) -> str:
    if key.endswith("_loss"):
        return "Losses"
    return "Schedules" if key in SCHEDULES else "Speed" if key in SPEED else "Monitors"


def _evaluations(path: Path) -> list[tuple[str, float, float]]:
    """(curve name, iteration, value) of an evaluation's `results.json`.

    Raises:
        DataError: a damaged file.
    """
    try:
        return [
            (f"{evaluation['task']} {row['name']} {measure}", float(evaluation["iteration"]), float(value))
            for evaluation in parse_json(path.read_bytes())["evaluations"]
            if evaluation["iteration"] is not None
            for row in evaluation["rows"]
            for measure, value in (row.get("scores") or {"top-1 %": row["top1"]}).items()
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: cannot be read as evaluation results ({error})") from error
