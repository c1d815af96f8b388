"""What the monitors said against a run, beside its metrics: for its end, `status`, `results` and the plot. No torch."""

import math
from pathlib import Path
from statistics import fmean, variance
from typing import Any, NamedTuple

from dinov2cli.config import Config
from dinov2cli.console import counted
from dinov2cli.files import parse_json

VERDICTS_FILE = "verdicts.json"
"""A line for each look of the monitors that found a collapse: its iteration, and the verdict."""

BASELINES_FILE = "knn_baselines.json"
"""What the k-NN while training finds with features that nobody has learned: one object, `top1` by their names."""

# Beyond these a teacher is judged to have collapsed.
LOWEST = {"feature_std": 0.02, "effective_rank": 1.5, "prototypes_in_use": 1.5}
HIGHEST = {"teacher_entropy": 0.9999}
MOST_OF_LOCALITY = 0.85
"""Share of its highest below which `patch_locality` tells of patches that degrade."""
LONG_RUN = 10_000
"""Iterations before which its fall is a phase of learning: it fell to that share in a run of 120 that learned well."""


class Collapse(NamedTuple):
    """What a run's verdicts come to.

    Attributes:
        first, last: iterations of the first and the last verdict.
        looks: verdicts in all.
        lasts: the newest line of the metrics has one.
        verdict: the last one.
    """

    first: int
    last: int
    looks: int
    lasts: bool
    verdict: str

    def __str__(self) -> str:
        looks = counted(self.looks, "look")
        if self.lasts:
            return f"since iteration {self.first}, at {looks}: {self.verdict}"
        return f"between iterations {self.first} and {self.last}, at {looks}, not since: {self.verdict}"


def collapse_of(run: Path) -> Collapse | None:
    """What the monitors found in a run folder; None if nothing."""
    verdicts = json_lines(run / VERDICTS_FILE)
    if not verdicts:
        return None
    metrics = run / "training_metrics.json"
    newest = json_lines(metrics)[-1:] if metrics.exists() else []
    last = int(verdicts[-1]["iteration"])
    lasts = not newest or last >= int(newest[0]["iteration"])
    return Collapse(int(verdicts[0]["iteration"]), last, len(verdicts), lasts, str(verdicts[-1]["verdict"]))


class Fall(NamedTuple):
    """Of `patch_locality`: its highest mean, after which iteration that was, and the last one."""

    best: float
    at: int
    now: float

    def __str__(self) -> str:
        return (
            f"patches lose what they show of their place: patch_locality was {self.best:.3f} at iteration {self.at} "
            f"and has fallen to {self.now:.3f}; segmentation and depth suffer from it, while k-NN may still rise"
        )


def fall_of(localities: list[tuple[int, float]]) -> Fall | None:
    """Whether `patch_locality`, by iteration, has fallen far below what it was, and by more than it wavers.

    Means count, of tenths of the looks, and of ten looks at least: a look is at one batch. They must differ by four
    standard errors.
    """
    size = max(10, len(localities) // 10)
    parts = [localities[end - size : end] for end in range(len(localities), size - 1, -size)][::-1]
    if len(parts) < 2 or localities[-1][0] < LONG_RUN:
        return None
    values = [[value for _, value in part] for part in parts]
    highest = max(range(len(parts)), key=lambda part: fmean(values[part]))
    best, now = fmean(values[highest]), fmean(values[-1])
    error = math.sqrt((variance(values[highest]) + variance(values[-1])) / size)
    if now >= MOST_OF_LOCALITY * best or best - now < 4 * error:
        return None
    return Fall(best, parts[highest][-1][0], now)


def localities_of(lines: list[dict[str, Any]], begins: int) -> list[tuple[int, float]]:
    """`patch_locality` by iteration, after the one in which learning begins."""
    found = [(int(line["iteration"]), line.get("patch_locality")) for line in lines]
    return [(at, float(value)) for at, value in found if at > begins and isinstance(value, int | float)]


def keys_of_anchoring(run: Path, fall: Fall, config: Config) -> str:
    """Which keys would keep patches as they were before: anchored to the teacher checkpoint from about then."""
    if config.gram.use_loss:
        return f"gram.loss_weight={2 * config.gram.loss_weight:g}, or an earlier gram.ckpt"
    numbers = [path.name.removeprefix("training_") for path in run.glob("eval/training_*")]
    there = [int(number) for number in numbers if number.isdigit()]
    nearest = min(there, key=lambda iteration: abs(iteration - fall.at), default=None)
    anchor = "an earlier teacher" if nearest is None else f"{run}/eval/training_{nearest}/teacher_checkpoint.pth"
    return f"gram.use_loss=true gram.img_level=true gram.rep_update=false gram.ckpt={anchor}"


class Baselines(NamedTuple):
    """What the k-NN while training finds with features that nobody has learned.

    Attributes:
        top1: in percent, by the features' name; empty if unknown.
        images: that are classified; classes: that these have; 0 if unknown.
    """

    top1: dict[str, float]
    images: int = 0
    classes: int = 0


def baselines_of(run: Path) -> Baselines:
    """Those of a run folder."""
    try:
        found = parse_json((run / BASELINES_FILE).read_text())
        top1 = {str(name): float(value) for name, value in found["top1"].items()}
        return Baselines(top1, int(found["val_images"]), int(found.get("classes", 0)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Baselines({})


def json_lines(path: Path, key: str = "") -> list[dict[str, Any]]:
    """Lines with an iteration, and with a key; one that is being written, or was cut short, is passed over."""
    found = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else []:
        if key not in text:  # most lines of a long run, which need not be parsed
            continue
        try:
            line = parse_json(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("iteration"), int | float):
            found.append(line)
    return found
