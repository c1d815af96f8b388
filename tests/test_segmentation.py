"""`dino2 eval segmentation`: what it scores, writes, resumes and refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import ready
import torch
from dense_sets import write_masks
from test_cli_eval import dino2, own_cache, run  # noqa: F401  (fixtures)

import dinov2cli
from dinov2cli.console import Interrupted
from dinov2cli.errors import CheckpointError, ConfigError, DataError
from dinov2cli.eval import dense
from dinov2cli.eval.reports import Evaluation, read_results
from dinov2cli.models.load.dense import read_head

SMALL: dict[str, Any] = {
    "image_size": 32, "crop_size": 32, "stride": 16, "iterations": 25, "batch_size": 4, "learning_rates": (0.03,),
    "num_workers": 0, "device": "cpu",
}  # fmt: skip
TYPED = """--image-size 32 --crop-size 32 --stride 16 --iterations 25 --batch-size 4 --learning-rates 0.03 0.001
--num-workers 0 --cpu"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_masks(tmp_path / "data")


def evaluated(run: Path, data: Path, **changed: Any) -> Evaluation:  # noqa: F811
    request = dinov2cli.SegmentationRequest(checkpoint=str(run), **{**SMALL, "train_dataset": str(data), **changed})
    result = dinov2cli.run(request)
    assert isinstance(result, Evaluation)
    return result


def test_the_command_trains_measures_and_keeps_the_best_head(
    run: Path,  # noqa: F811
    data: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [*TYPED.split(), "--inference", "slide", "whole", "ms"]
    assert dino2("eval", "segmentation", run, "--data", data, *words, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row["scores"] for row in result["rows"]}
    best = result["rows"][0]["name"].partition(",")[0]
    assert list(rows) == [f"{best}, {how}" for how in ("sliding window", "whole image", "multi-scale")]
    for scores in rows.values():
        assert 60 < scores["mIoU %"] < scores["aAcc %"] <= 100  # a patch of colours is told, but for borders
    assert set(result["rows"][0]["per_class"]) == {"0", "1", "2"} and result["rows"][0]["images"] == 4
    assert result["train_dataset"] == f"Masks:images={data}/images/train:masks={data}/masks/train"
    assert result["val_dataset"].endswith("masks/val")
    folder = run / "eval/training_19/segmentation"
    assert json.loads((folder / "results_eval_segmentation.json").read_text().splitlines()[0])
    (kept,) = read_results(run)
    assert kept.task == "segmentation" and kept.iteration == 19
    assert dino2("results", run) == 0
    shown = capsys.readouterr().out
    assert "segmentation" in shown and "mIoU %" in shown and best in shown
    head = read_head(folder / "best_head.pth")
    assert head.config.layers == (3,) and head.config.short_side == head.config.window == 32 and head.config.dataset
    assert head.config.backbone == str(
        (folder.parent / "teacher_checkpoint.pth").resolve()
    )  # not the run, which goes on
    again = evaluated(run, data, head=str(folder / "best_head.pth"), train_dataset=None, val_dataset=str(data))
    assert again.rows[0].scores == rows[f"{best}, sliding window"]


def test_an_interrupted_training_goes_on_to_the_same_head(
    run: Path,  # noqa: F811
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = run / "eval/training_19/segmentation"
    whole = evaluated(run, data)
    head = torch.load(folder / "best_head.pth")["state_dict"]
    (folder / "running_checkpoint_segmentation_eval.pth").unlink()
    step = dense.DenseTrainer.step

    def broken(self: Any, iteration: int, *args: Any) -> Any:
        if iteration == 13:
            raise Interrupted(2)
        return step(self, iteration, *args)

    monkeypatch.setattr(dense.DenseTrainer, "step", broken)
    with pytest.raises(Interrupted):
        evaluated(run, data, checkpoint_period=5)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"belongs to a probe with batch_size=4; this one has batch_size=2"):
        evaluated(run, data, batch_size=2)
    assert evaluated(run, data).rows == whole.rows
    resumed = torch.load(folder / "best_head.pth")["state_dict"]
    assert all(torch.equal(head[name], resumed[name]) for name in head)


def test_frozen_crops_and_four_layers_say_what_they_are(run: Path, data: Path) -> None:  # noqa: F811
    how = {"frozen_crops": True, "layers": 4, "stride": None, "output_dir": run.parent / "frozen"}
    result = evaluated(run, data, **how)
    assert result.notes == (dense.FROZEN_CROPS,)
    assert result.settings["stride"] == 16 and result.settings["layers"] == 4
    assert result.rows[0].scores and result.rows[0].scores["mIoU %"] > 60
    assert read_head(run.parent / "frozen" / "best_head.pth").config.layers == (0, 1, 2, 3)
    kept = evaluated(
        run, data, frozen_crops=True, layers=4, stride=None, no_resume=True, output_dir=run.parent / "frozen"
    )
    assert kept.rows == result.rows  # from the cache


def test_baselines_stand_beside_the_model(run: Path, data: Path) -> None:  # noqa: F811
    result = evaluated(run, data, iterations=3, baselines=True)
    names = [row.name.partition(", ")[0] for row in result.rows]
    assert names == ["lr 0.03", "raw colours", "random network"]
    assert len({row.scores["mIoU %"] for row in result.rows if row.scores}) == 3


def test_what_does_not_fit_is_one_clear_message(run: Path, data: Path) -> None:  # noqa: F811
    with pytest.raises(ConfigError, match=r"--stride 40 is more than a window's side, 32"):
        evaluated(run, data, stride=40)
    with pytest.raises(DataError, match="has no part for VAL"):
        evaluated(run, data, train_dataset=f"Masks:images={data}/images/train:masks={data}/masks/train")
    with pytest.raises(ConfigError, match=r"--data missing.*masks"):
        evaluated(run, data, train_dataset=None)
    (data / "masks/val/1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"1 of 4 images are unreadable.*masks/val/1\.png"):
        evaluated(run, data, iterations=1)
    result = evaluated(run, data, iterations=1, max_bad_fraction=0.5)
    assert len(result.notes) == 1 and "1 of 4 images could not be read and are left out" in result.notes[0]
    assert result.rows[0].images == 3


@pytest.mark.long
def test_two_processes_train_the_head_of_one(run: Path, data: Path) -> None:  # noqa: F811
    found = []
    for more in ([], ["--gpus", "2"]):
        folder = run.parent / f"with{len(more)}"
        words = ["eval", "segmentation", run, "--data", data, *TYPED.split(), "--output-dir", folder, "--json", *more]
        done = ready.dino2(*map(str, words), timeout=300)
        assert done.returncode == 0, done.stderr
        head = torch.load(folder / "best_head.pth")["state_dict"]
        found.append((json.loads(done.stdout)["rows"][0], head))
    (alone, one), (together, two) = found
    assert together["images"] == 4 and together["scores"] == pytest.approx(alone["scores"], abs=0.2)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4)
