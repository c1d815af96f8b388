"""What a person sees of a training run: the plan before it, and its progress."""

import time
from collections.abc import Iterable
from types import TracebackType

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from dinov2cli.console import err, logger


def print_plan(rows: Iterable[tuple[str, str]], deviations: Iterable[str]) -> None:
    """Print what will be run, and every switch that departs from the reference."""
    table = Table.grid("what", "value", padding=(0, 2, 0, 0))
    table.columns[1].overflow = "fold"
    for name, value in rows:
        table.add_row(Text(name, "bold"), Text(value))
    err.print(table)
    listed = list(deviations)
    if listed:
        err.print("Departures from the reference's published code:")
        for line in listed:
            err.print(f"  - {line}", markup=False, highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """`1 d 02:03:04`, or without the days."""
    days, rest = divmod(int(seconds), 86400)
    clock = f"{rest // 3600:d}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
    return f"{days} d {clock}" if days else clock


class TrainingDisplay:
    """A live line on a terminal; elsewhere a line in the log at each update of the metrics.

    Args:
        total: iterations of the run.
        done: iterations done before this process started.
        images_per_iteration: over all processes.
        quiet: show nothing (processes other than the first).
    """

    def __init__(self, total: int, done: int, images_per_iteration: int, *, quiet: bool = False) -> None:
        self.images_per_iteration = images_per_iteration
        self.total, self.first = total, done
        self.started = time.perf_counter()
        self.quiet = quiet
        self.waited = 0.0
        self.live = err.is_terminal and not quiet
        self.progress = Progress(
            TextColumn("[bold]training"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total}  {task.fields[status]}"),
            TextColumn("elapsed"),
            TimeElapsedColumn(),
            console=err,
            disable=not self.live,
            refresh_per_second=4,
        )
        self.task = self.progress.add_task("training", total=total, completed=done, status="")

    def __enter__(self) -> "TrainingDisplay":
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def update(self, iteration: int, losses: dict[str, float], data_time: float, *, log: bool) -> None:
        """Show the state after `iteration` iterations; `log` writes a line where there is no terminal."""
        self.waited += data_time
        elapsed = time.perf_counter() - self.started
        done_here = iteration - self.first
        rate = done_here / max(elapsed, 1e-9)
        of_terms: dict[str, float] = {}
        for name, value in losses.items():
            term = name.partition("_")[0]  # what is logged of a term begins with its name
            of_terms[term] = of_terms.get(term, 0.0) + value
        total = of_terms.pop("total")
        status = (
            f"loss {total:.4f}  ({'  '.join(f'{term} {value:.3f}' for term, value in of_terms.items())})  "
            f"{rate * self.images_per_iteration:.1f} images/s  data wait {self.waited / elapsed:.0%}  "
            f"left {duration((self.total - iteration) / max(rate, 1e-9))}"
        )
        if self.live:
            self.progress.update(self.task, completed=iteration, status=status)
        elif log and not self.quiet:
            logger.info("iteration %d/%d  %s", iteration, self.total, status)
