"""Monitors tell a collapsed teacher from a healthy one."""

import io
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import ready
import torch
from rich.console import Console, RenderableType
from tiny_run import TINY, write_images

from dinov2cli.cli.main import main
from dinov2cli.eval.baselines import names
from dinov2cli.eval.results import RunResults
from dinov2cli.launch.status import read_status
from dinov2cli.train.monitors import (
    TeacherView,
    collapse_verdict,
    entropy,
    patch_locality,
    teacher_health,
    teacher_numbers,
)

S, D, K = 64, 32, 128


def targets(cls: torch.Tensor, scores: torch.Tensor) -> TeacherView:
    return TeacherView(cls, torch.softmax(scores, -1))


def healthy() -> TeacherView:
    generator = torch.Generator().manual_seed(0)
    return targets(torch.randn(S, D, generator=generator), 5 * torch.randn(S, K, generator=generator))


def test_a_healthy_teacher_gets_no_verdict() -> None:
    health = teacher_health(teacher_numbers(healthy()))
    assert collapse_verdict(health, S) is None
    assert 0.9 < health.feature_std < 1.1  # spread over the sphere
    assert health.effective_rank > 0.8 * D
    assert health.prototypes_in_use > 20


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (targets(torch.ones(S, D) + 1e-4 * torch.randn(S, D), 5 * torch.randn(S, K)), "nearly the same feature"),
        (targets(torch.randn(S, 1) * torch.ones(1, D), 5 * torch.randn(S, K)), "one direction only"),
        (targets(torch.randn(S, D), 50 * torch.eye(K)[:1].expand(S, K)), "one prototype"),
        (targets(torch.randn(S, D), torch.zeros(S, K)), "uniform"),
    ],
)
def test_each_kind_of_collapse_is_named(broken: TeacherView, words: str) -> None:
    verdict = collapse_verdict(teacher_health(teacher_numbers(broken)), S)
    assert verdict is not None and words in verdict
    assert collapse_verdict(teacher_health(teacher_numbers(broken)), samples=4) is None  # too few crops to say


def test_entropy_counts_zero_as_zero() -> None:
    assert entropy(torch.tensor([0.0, 1.0])).item() == 0
    assert entropy(torch.full((4,), 0.25)).item() == pytest.approx(math.log(4))


def said(shown: RenderableType) -> str:
    console = Console(width=100, file=io.StringIO())
    console.print(shown)
    return " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]


def train(run: Path, *words: str) -> int:
    images = run.parent / "images"
    if not images.exists():
        write_images(images)
    # A network that learns nothing stays as it began: all features alike.
    stuck = ["optim.base_lr=1e-12", "optim.min_lr=0", "student.layerscale=1e-5"]
    try:
        main(["train", "--cpu", "--data", str(images), "--output-dir", str(run), *TINY, *stuck, *words])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_a_collapse_is_said_again_summed_up_and_shown_by_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(run) == 0
    shown = " ".join(capsys.readouterr().err.split())
    verdicts = [json.loads(line) for line in (run / "verdicts.json").read_text().splitlines()]
    assert [each["iteration"] for each in verdicts] == list(range(5, 12))
    assert shown.count("the run has collapsed") == 4 + 1  # in every tenth of the run, and at its end
    assert "the run looked collapsed since iteration 5, at 7 looks" in shown
    assert "collapse since iteration 5, at 7 looks: all images get nearly" in " ".join(str(read_status(run)).split())


def test_stop_on_collapse_saves_and_stops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert train(run, "train.stop_on_collapse=3") == 1
    shown = " ".join(capsys.readouterr().err.split())
    assert "3 times in a row (train.stop_on_collapse)" in shown and "Traceback" not in shown
    assert (run / "checkpoints/iteration_00000008").is_dir()
    assert train(run, "train.stop_on_collapse=0") == 0
    assert "resumed after 8 iterations" in " ".join(capsys.readouterr().err.split())


@pytest.mark.long
def test_a_collapse_ends_all_processes_saved(tmp_path: Path) -> None:
    """The first process alone looks; all save and end, and none is started again."""
    images, run = write_images(tmp_path / "images"), tmp_path / "run"
    words = ["train", "--cpu", "--gpus", "2", "--data", images, "--output-dir", run, *TINY]
    stuck = ["optim.base_lr=1e-12", "optim.min_lr=0", "student.layerscale=1e-5", "train.stop_on_collapse=3"]
    result = ready.dino2(*words, *stuck, env={**os.environ, "COLUMNS": "250"}, workers=True)
    assert result.returncode == 1 and result.stderr.count("error:") == 1, result.stderr
    assert "3 times in a row (train.stop_on_collapse)" in result.stderr and "Traceback" not in result.stderr
    assert (run / "checkpoints/iteration_00000008").is_dir() and not (run / "logs/restarts.jsonl").exists()


def test_training_ends_with_where_the_weights_are_the_score_beside_baselines_and_what_is_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, data = tmp_path / "run", tmp_path / "images"
    sets = [f"evaluation.knn_{name}_dataset={data}" for name in ("train", "val")]
    assert train(run, "evaluation.knn_period=6", *sets) == 0
    shown = "".join(capsys.readouterr().err.split())  # whatever the terminal's width
    assert f"theweightsarein{run}/eval/training_11/teacher_checkpoint.pth" in shown
    assert "k-NNtop-1whiletraining:" in shown and f"next:dino2evalknn{run}" in shown
    found = json.loads((run / "knn_baselines.json").read_text())
    assert tuple(found["top1"]) == names(3) and found["k"] == 8 and found["train_images"] == 16
    assert "rawpixels100.0%" in shown and "randomnetwork100.0%" in shown and re.search(r"trained[0-9.]+%", shown)
    results = RunResults.of(run)
    assert results.baselines == found["top1"]
    assert "without training: raw pixels 100.0, colour histogram 100.0" in said(results)


def test_the_locality_of_patches() -> None:
    """Adjacent patches against all pairs of a crop, each crop around its own mean; none without order in the image."""
    torch.manual_seed(0)
    side = 6
    rows, columns = (each.flatten() for each in torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"))
    place, crop = torch.stack([rows, columns], -1).repeat(3, 1), torch.arange(3).repeat_interleave(side**2)
    noise = torch.randn(3 * side**2, 16)
    smooth = noise.view(3, side, side, 16).permute(0, 3, 1, 2)
    smooth = torch.nn.functional.avg_pool2d(smooth, 3, 1, 1).permute(0, 2, 3, 1).reshape(-1, 16)
    assert patch_locality(noise, crop, place, 3) == pytest.approx(0, abs=0.15)
    assert patch_locality(smooth, crop, place, 3) > 1
    # By hand, of one crop; alone or with others, as each is around its own mean.
    unit = torch.nn.functional.normalize(smooth[: side**2], dim=-1)
    pairs = [(a, b) for a in range(side**2) for b in range(side**2) if a != b]
    similarity = {pair: float(unit[pair[0]] @ unit[pair[1]]) for pair in pairs}
    adjacent = [similarity[a, b] for a, b in pairs if abs(rows[a] - rows[b]) + abs(columns[a] - columns[b]) == 1]
    every = np.array(list(similarity.values()))
    expected = (np.mean(adjacent) - every.mean()) / every.std()
    alone = slice(side**2)
    assert patch_locality(smooth[alone], crop[alone], place[alone], 1).item() == pytest.approx(expected, rel=1e-3)
    assert patch_locality(torch.ones(9, 4), crop[:9], place[:9], 1).isfinite()
