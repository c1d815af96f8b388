"""`dino2 eval depth`: what it scores, writes and refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
from dense_sets import write_depths
from test_cli_eval import dino2, own_cache, run  # noqa: F401  (fixtures)

import dinov2cli
from dinov2cli.config import load_config
from dinov2cli.errors import ConfigError, DataError
from dinov2cli.eval.protocol import evaluate_teacher
from dinov2cli.eval.reports import Evaluation
from dinov2cli.models.load.dense import read_head

SMALL: dict[str, Any] = {
    "iterations": 30, "batch_size": 4, "learning_rates": (0.03,), "num_workers": 0, "device": "cpu", "layers": 4,
}  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_depths(tmp_path / "data")


def evaluated(run: Path, data: Path, **changed: Any) -> Evaluation:  # noqa: F811
    request = dinov2cli.DepthRequest(checkpoint=str(run), **{**SMALL, "train_dataset": str(data), **changed})
    result = dinov2cli.run(request)
    assert isinstance(result, Evaluation)
    return result


def test_the_command_trains_measures_and_keeps_the_best_head(
    run: Path,  # noqa: F811
    data: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = "--iterations 30 --batch-size 4 --learning-rates 0.03 0.0001 --layers 4"
    assert dino2("eval", "depth", run, "--data", data, *words.split(), "--num-workers", "0", "--cpu", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    (row,) = result["rows"]
    assert row["name"] == "lr 0.03" and row["images"] == 4
    assert row["scores"]["RMSE m"] < 0.8  # of depths 1, 2 and 4 m, whose own deviation is 1.2 m
    assert set(result["extra"]["further"]["lr 0.03"]) == {"sq_rel", "log10", "rmse_log", "silog"}
    assert result["settings"]["range"] == [0.001, 4.001] and result["settings"]["crop"] == [32, 40]
    folder = run / "eval/training_19/depth"
    head = read_head(folder / "best_head.pth")
    assert head.config.max_depth == 4.001 and head.config.layers == (0, 1, 2, 3)
    again = evaluated(run, data, head=str(folder / "best_head.pth"), train_dataset=None, val_dataset=str(data))
    assert again.rows[0].scores == row["scores"]
    assert dino2("results", run, "--csv") == 0
    assert "RMSE m" in capsys.readouterr().out


def test_a_training_measures_it_after_every_teacher(run: Path, data: Path) -> None:  # noqa: F811
    config = load_config(config_file=run / "config.yaml", overrides=[
        f"evaluation.depth_dataset={data}", "evaluation.tasks=[depth]", "evaluation.task_options.depth.iterations=2",
        "evaluation.task_options.depth.num_workers=0", "evaluation.task_options.depth.learning_rates=[0.03, 0.01]",
    ])  # fmt: skip
    teacher = run / "eval/training_9/teacher_checkpoint.pth"
    (done,) = evaluate_teacher(teacher, config, config.evaluation.tasks, device="cpu")
    assert (done.task, done.iteration) == ("depth", 9) and done.val_dataset.endswith("depth/val")
    assert done.settings["iterations"] == 2 and done.settings["learning_rates"] == (0.03, 0.01)


def test_frozen_crops_and_baselines(run: Path, data: Path) -> None:  # noqa: F811
    result = evaluated(run, data, frozen_crops=True, baselines=True, iterations=3, image_size=24)
    assert [row.name.partition(", ")[0] for row in result.rows] == ["lr 0.03", "raw colours", "random network"]
    assert "approximation" in result.notes[0] and result.settings["crop"] == (24, 30)


def test_what_does_not_fit_is_one_clear_message(run: Path, data: Path) -> None:  # noqa: F811
    with pytest.raises(ConfigError, match=r"--min-depth 5 is not below --max-depth 4"):
        evaluated(run, data, min_depth=5.0, max_depth=4.0)
    with pytest.raises(ValueError, match=r"max_depth\n  Input should be greater than 0"):
        evaluated(run, data, max_depth=-1.0)
    with pytest.raises(DataError, match=r"no depth above 0\.001 m"):
        evaluated(run, data, depth_scale=1e9)
    with pytest.raises(DataError, match=r"no depth between 0\.001 and 0\.5 m"):
        evaluated(run, data, max_depth=0.5, iterations=1)
