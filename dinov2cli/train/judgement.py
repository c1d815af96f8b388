"""Whether a run learns, from the files in its folder, and what to change if it does not. Imports no torch."""

import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dinov2cli.config import Config, load_config
from dinov2cli.errors import ConfigError
from dinov2cli.train.forewarnings import Advice, class_tokens, cold, forewarnings, too_many_prototypes
from dinov2cli.train.verdicts import (
    HIGHEST,
    LOWEST,
    baselines_of,
    fall_of,
    json_lines,
    keys_of_anchoring,
    localities_of,
)

MOST_LOOKS = 20
FEWEST_TOKENS = 8  # of an iteration, for its monitors to mean something
AT_GUESS = 0.003
"""How near the loss of a guess, as a share of it, is no better than one."""
ABOVE_GUESS = 0.1
NEARLY_UNIFORM = 0.85
ONE_HOT = 0.02
ALIKE = 0.98
NETWORK = "random network"


class Judgement(NamedTuple):
    """What a run's monitors and scores come to.

    Args:
        learns: None where it is too early, or nothing tells.
        summary: one sentence with the figures that decide.
        advice: what was found against the run, and what to change; empty for a run that learns.
    """

    learns: bool | None
    summary: str
    advice: list[Advice]

    def lines(self) -> list[str]:
        """The sentence, and a line for each finding."""
        word = {True: "learns", False: "does not learn", None: "cannot be told yet"}[self.learns]
        but = ", but see below" if self.learns and self.advice else ""
        return [f"{word}{but}: {self.summary}", *map(str, self.advice)]

    def as_dict(self) -> dict[str, Any]:
        """Plain values; `Judgement.of` is the inverse."""
        return {**self._asdict(), "advice": [each._asdict() for each in self.advice]}

    @staticmethod
    def of(values: dict[str, Any]) -> "Judgement":
        return Judgement(values["learns"], values["summary"], [Advice(**each) for each in values["advice"]])


class Scores(NamedTuple):
    """Of the k-NN while training, in percent.

    Args:
        by_iteration: (iterations done, top-1) of the teacher.
        baselines: by the name of features that nobody has learned.
        images: that are classified.
        classes: that they have, None if unknown.
    """

    by_iteration: list[tuple[int, float]]
    baselines: dict[str, float]
    images: int
    classes: int | None

    @property
    def last(self) -> float:
        return self.by_iteration[-1][1]

    def margin(self) -> float:
        """Points by which two scores must differ to count: two standard errors of the last one's."""
        share = min(max(self.last / 100, 0.05), 0.95)
        return 200 * math.sqrt(share * (1 - share) / max(1, self.images))


def judge(run: Path) -> Judgement | None:
    """What the files of a run folder say; None where it has no metrics or no configuration."""
    lines = json_lines(run / "training_metrics.json")
    try:
        config = load_config(config_file=run / "config.yaml") if lines else None
    except ConfigError:
        return None
    if config is None:
        return None
    done, total = int(lines[-1]["iteration"]) + 1, config.iterations()
    begun = max(config.iterations(config.optim.warmup_epochs) if done < total else 0, total // 10)
    if done <= begun:
        return Judgement(None, f"{done} of {total} iterations are too few to judge by", [])
    recent = [line for line in lines if line["iteration"] >= begun]
    recent = recent[-max(1, min(MOST_LOOKS, len(recent) // 3)) :]
    seen = {key: statistics.median(values) for key in recent[-1] if (values := _numbers(recent, key))}
    scores = _scores(run)
    images = int(seen.get("current_batch_size", config.effective_batch()))
    advice = list(_from_monitors(config, seen, len(recent), images))
    if scores is None:
        judgement = _without_scores(config, seen, advice, forewarnings(config, images))
    else:
        judgement = _with_scores(config, seen, scores, advice, forewarnings(config, images))
    if fall := fall_of(localities_of(lines, max(config.iterations(config.optim.warmup_epochs), total // 10))):
        degrades = Advice(str(fall), keys_of_anchoring(run, fall, config))
        judgement = judgement._replace(advice=[*judgement.advice, degrades])
    return judgement


def _with_scores(
    config: Config, seen: dict[str, float], scores: Scores, advice: list[Advice], forewarned: list[Advice]
) -> Judgement:
    """The scores decide; monitors and configuration say why."""
    last, margin = scores.last, scores.margin()
    if scores.classes == 1:
        found = "all images of evaluation.knn_val_dataset are of one class: its k-NN says nothing"
        change = "evaluation.knn_train_dataset and knn_val_dataset, to labelled images of several classes"
        return _without_scores(config, seen, [Advice(found, change), *advice], forewarned)
    name, best = max(
        scores.baselines.items(), key=lambda each: each[1], default=("untrained", scores.by_iteration[0][1])
    )
    random = scores.baselines.get(NETWORK, scores.by_iteration[0][1])
    highest, at = max((top1, iteration) for iteration, top1 in scores.by_iteration)
    summary = f"k-NN {last:.1f} % beside {best:.1f} % of what takes no training ({name})"
    if at and last < highest - 2 * margin:
        fell = f"the k-NN was {highest:.1f} % after {at} iterations and has fallen to {last:.1f} %"
        change = f"optim.base_lr={config.optim.base_lr / 3:.2g}, or stop earlier"
        advice.append(Advice(fell, change))
    if last > best + margin:
        return Judgement(True, summary, [*(each for each in advice if "has fallen" in each.found), *forewarned])
    if last > random + margin and not advice:
        what = f"the k-NN is above a random network's ({random:.1f} %) and not clearly above {name} ({best:.1f} %)"
        longer = f"optim.epochs={2 * config.optim.epochs}"
        by_colour = "colour" in name and config.crops.color_jitter_prob > 0
        colour = "crops.color_jitter_prob=0.2 crops.grayscale_prob=0.0, if colour tells the classes; else " * by_colour
        return Judgement(True, summary, [Advice(what, colour + longer), *forewarned])
    advice = _joined(forewarned, [*advice, *_stands_at_guess(config, seen)])
    if not advice:
        nothing = (
            f"the k-NN is not clearly above a random network's ({random:.1f} %), and the monitors find nothing wrong"
        )
        change = f"optim.epochs={2 * config.optim.epochs}; or train.dataset_path, to images like those of the k-NN"
        advice.append(Advice(nothing, change))
    return Judgement(False, summary, advice)


def _without_scores(
    config: Config, seen: dict[str, float], advice: list[Advice], forewarned: list[Advice]
) -> Judgement:
    said = []
    if (loss := _loss(seen)) is not None:
        said.append(f"loss {loss:.3g} beside {math.log(config.dino.head_n_prototypes):.3g} of a guess")
    if (matched := seen.get("crops_matched")) is not None:
        said.append(f"{matched:.0%} of the images known again by their other crop")
    summary = ", ".join(said) or "no monitors"
    advice = [*advice, *_stands_at_guess(config, seen)]
    if not advice:
        return Judgement(True if said else None, f"{summary}; evaluation.knn_period would tell more", [])
    return Judgement(False, summary, _joined(forewarned, advice))


def _joined(advice: list[Advice], more: list[Advice]) -> list[Advice]:
    """Both, each change once."""
    return list({each.change: each for each in reversed([*advice, *more])}.values())[::-1]


def _from_monitors(config: Config, seen: dict[str, float], looks: int, images: int) -> Iterator[Advice]:
    """What the medians of the last looks say against a run; the first is the nearest to the cause."""
    tokens = class_tokens(config, images)
    if tokens < FEWEST_TOKENS:
        return
    optim, guess, loss = config.optim, math.log(config.dino.head_n_prototypes), _loss(seen)
    slower = f"optim.base_lr={optim.base_lr / 10:.2g}"
    std, rank = seen.get("feature_std", 1.0), seen.get("effective_rank", math.inf)
    in_use, entropy = seen.get("prototypes_in_use", math.inf), seen.get("teacher_entropy", 0.5)
    if loss is not None and loss > guess * (1 + ABOVE_GUESS):
        yield Advice(f"the loss, {loss:.3g}, is above that of a guess, log(prototypes) = {guess:.3g}", slower)
    collapsed = True
    if in_use < LOWEST["prototypes_in_use"]:
        other = "train.centering=sinkhorn_knopp" if config.train.centering != "sinkhorn_knopp" else slower
        yield Advice(f"the teacher maps all images to one prototype (prototypes_in_use {in_use:.3g})", other)
    elif std < LOWEST["feature_std"]:
        koleo = max(0.1, config.dino.koleo_loss_weight)
        yield Advice(
            f"all images get nearly the same feature (feature_std {std:.2g})",
            f"{slower} optim.warmup_epochs={max(1, optim.epochs // 10)} dino.koleo_loss_weight={koleo:g}",
        )
    elif rank < LOWEST["effective_rank"]:
        yield Advice(f"features vary along one direction only (effective_rank {rank:.3g})", slower)
    else:
        collapsed = False
    many = too_many_prototypes(config, images)
    if entropy > HIGHEST["teacher_entropy"] or (many and entropy > NEARLY_UNIFORM):
        yield many or Advice(
            f"the teacher's targets are uniform (teacher_entropy {entropy:.5f} of 1)",
            "teacher.warmup_teacher_temp=0.04 teacher.teacher_temp=0.04",
        )
    if entropy < ONE_HOT and not collapsed:
        yield cold(config)._replace(
            found=f"the teacher's targets are one prototype and nothing else (teacher_entropy {entropy:.2g} of 1)"
        )
    if not collapsed and _at_chance(seen, looks, config.train.batch_size_per_gpu):
        yield Advice(
            f"an image is known again by its other crop no more often than by chance ({seen['crops_matched']:.1%}): "
            "the images may be all the same, or the crops too small to show what they have in common",
            f"train.dataset_path, to different images; or crops.global_crops_scale=[0.5, 1.0] {slower}",
        )
    if seen.get("patch_similarity", 0.0) > ALIKE and not collapsed:
        yield Advice(
            f"the patches of an image are all alike (patch_similarity {seen['patch_similarity']:.3f})",
            f"ibot.loss_weight={max(1.0, config.ibot.loss_weight):g} {slower}",
        )


def _stands_at_guess(config: Config, seen: dict[str, float]) -> list[Advice]:
    """A loss as that of a guess: it may begin to fall, so that a score which has risen outweighs it."""
    loss, guess = _loss(seen), math.log(config.dino.head_n_prototypes)
    if loss is None or abs(loss / guess - 1) >= AT_GUESS:
        return []
    found = f"the loss stands at that of a guess, log(prototypes) = {guess:.3g}"
    return [Advice(found, f"optim.base_lr={config.optim.base_lr / 10:.2g}")]


def _at_chance(seen: dict[str, float], looks: int, images: int) -> bool:
    """Whether matched crops are no more than by chance, and three standard errors, in so many looks."""
    if "crops_matched" not in seen or images < FEWEST_TOKENS:
        return False
    chance = 1 / images
    return seen["crops_matched"] <= chance + 3 * math.sqrt(chance * (1 - chance) / (looks * images))


def _loss(seen: dict[str, float]) -> float | None:
    """Mean cross-entropy of a student crop with a teacher's: log(prototypes) for a guess."""
    parts = [seen.get(f"dino_{crops}_crops_loss") for crops in ("global", "local")]
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


def _scores(run: Path) -> Scores | None:
    by_iteration = [
        (int(line["iteration"]), float(line["knn_top1"]))
        for line in json_lines(run / "knn_metrics.json")
        if isinstance(line.get("knn_top1"), int | float)
    ]
    found = baselines_of(run)
    if not by_iteration or by_iteration[-1][0] == 0:
        return None
    return Scores(by_iteration, found.top1, found.images, found.classes)


def _numbers(lines: list[dict[str, Any]], key: str) -> list[float]:
    return [float(line[key]) for line in lines if isinstance(line.get(key), int | float)]
