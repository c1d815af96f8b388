"""What a curation writes: the list, the rows, what was dropped and why, numbers as JSON, and the report."""

import csv
import json
import os
from typing import Any, NamedTuple

import numpy as np

from dinov2cli import __version__
from dinov2cli.console import counted
from dinov2cli.curate.report import write_report
from dinov2cli.curate.steps import AGAINST, DUPLICATE, KEPT, REASONS, UNREADABLE, Curation
from dinov2cli.data.datasets import make_dataset
from dinov2cli.data.datasets.image_list import ROWS_OF, printable
from dinov2cli.data.datasets.joined import JoinedDataset
from dinov2cli.data.spelling import absolute, complete, joined
from dinov2cli.files import replacing, write_array, write_text, writing

LOOKED_AT = 100
"""Images of which it is tried whether they are files."""


class Curated(NamedTuple):
    """What a curation has made: `steps` with the images before and after each, and its seconds; `list` is None where
    there were features of no images, whose rows are in `rows`."""

    output: str
    images: int
    kept: int
    list: str | None
    rows: str
    report: str
    steps: tuple[dict[str, Any], ...]
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"{each['name']:<22}{each['before']:>12,} -> {each['after']:>12,} {each['seconds']:>9.1f} s"
            for each in self.steps
            if each["before"] != each["after"] or each["name"] not in ("features", "neighbours")
        ]
        train = f"Train on them: --data list:{self.list}" if self.list else f"Their rows: {self.rows}"
        return "\n".join(
            [f"{self.kept} of {counted(self.images, 'image')} kept", *lines, f"Look at {self.report}", train]
        )


def write_results(state: Curation) -> Curated:
    """Write all of it.

    Raises:
        EnvironmentProblem: the disk is full.
    """
    folder, pool = state.request.output, state.pool
    kept = np.flatnonzero(state.alive)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_array(folder / "kept.npy", kept)
    listed = folder / "list.txt"
    if pool.images is not None:
        with writing(listed), replacing(listed) as aside, aside.open("wb") as file:
            write_list(file, state, kept)
    dropped = folder / "dropped.csv"
    with writing(dropped), replacing(dropped) as aside, aside.open("w", newline="", encoding="utf-8") as text:
        _write_dropped(csv.writer(text), state)
    result = Curated(
        str(folder), len(pool), len(kept), str(listed) if pool.images is not None else None, str(folder / "kept.npy"),
        str(folder / "report.html"),
        tuple({**vars(each), "seconds": round(each.seconds, 2)} for each in state.steps), tuple(state.warnings),
    )  # fmt: skip
    numbers = {
        **result._asdict(),
        "fates": {REASONS[fate]: int((state.fate == fate).sum()) for fate in range(len(REASONS))},
        "thresholds": [each._asdict() for each in state.swept],
        "histogram": histogram(state),
        "request": state.request.model_dump(mode="json", exclude_unset=True),
        "version": __version__,
    }
    with writing(folder / "report.json"):
        write_text(folder / "report.json", json.dumps(numbers, indent=1))
    write_report(folder / "report.html", state, numbers)
    return result


def write_list(file: Any, state: Curation, kept: np.ndarray) -> None:
    """The kept images as `--data list:FILE` reads them: their files, or rows of the dataset that holds them."""
    images = state.pool.images
    assert images is not None
    words = absolute(complete(state.request.images or state.request.data[0]))
    if isinstance(images, JoinedDataset) and images.is_weighted():
        words = " + ".join(part for _, part in joined(words))
        state.warn(f"--data {state.pool.name}: its weights are not in the list, which names each image once.")
    sample = kept[:: max(1, len(kept) // LOOKED_AT)].tolist()
    are_files = all(images.container(row) == images.path(row) and os.path.isfile(images.path(row)) for row in sample)
    paths = (images.path(row) for row in kept.tolist())
    if are_files and not any("\n" in path or "\t" in path or path.startswith(ROWS_OF) for path in paths):
        targets, names = images.targets(), [printable(name) for name in images.class_names]
        for row in kept.tolist():
            label = f"\t{names[targets[row]]}" if targets[row] >= 0 else ""
            file.write(os.fsencode(os.path.abspath(images.path(row))) + f"{label}\n".encode())
        return
    file.write(os.fsencode(f"{ROWS_OF}{words}\n"))
    base = make_dataset(words)  # by other paths where those given were relative
    for row in kept.tolist():
        file.write(f"{row}\t{printable(base.path(row))}\n".encode())


def _write_dropped(table: Any, state: Curation) -> None:
    """A line for each image that was dropped: its path, why, what it is beside, and their cosine."""
    table.writerow(["path", "reason", "beside", "cosine"])
    for row in np.flatnonzero(state.fate != KEPT).tolist():
        fate, beside, score = state.fate[row], int(state.beside[row]), state.score[row]
        of, at = state.set_of(fate, beside) if fate in (DUPLICATE, AGAINST) else (None, 0)
        near = of.path(at) if of else ""
        table.writerow([state.pool.path(row), REASONS[fate], near, "" if np.isnan(score) else f"{score:.4f}"])


def histogram(state: Curation) -> dict[str, list[float]] | None:
    """How many images have their nearest that similar: 50 counts, and the 51 edges between them."""
    if state.nearest is None:
        return None
    found = state.nearest[(state.fate != UNREADABLE) & (state.nearest >= -1)]
    thresholds = (state.request.duplicates, state.request.against_threshold)
    low = np.floor(10 * min(float(found.min(initial=1)), *thresholds)) / 10 - 0.1
    counts, edges = np.histogram(found.clip(max=1), 50, (low, 1.0))
    return {"counts": counts.tolist(), "edges": edges.round(4).tolist()}
