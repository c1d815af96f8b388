"""Evaluations as requests: Python, the command line and a training do the same; one's own is two files."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import typer
from test_cli_eval import DATA, dino2, own_cache, run  # noqa: F401  (fixtures)
from tiny_run import write_images
from typer.testing import CliRunner

import dinov2cli.eval
from dinov2cli.cli.command import add_command
from dinov2cli.config import load_config
from dinov2cli.errors import ConfigError, WeightsError
from dinov2cli.eval import knn, protocol
from dinov2cli.eval.protocol import evaluate_teacher, labelled
from dinov2cli.models.vision_transformer import VisionTransformer
from dinov2cli.requests.base import option
from dinov2cli.requests.eval import EvalRequest, KnnRequest, LinearRequest
from dinov2cli.requests.protocols import EVALUATIONS, OF_THE_TRAINING, task_request

PHOTOS = {"train_dataset": "SamplePhotos:split=TRAIN", "val_dataset": "SamplePhotos:split=VAL"}


class MeansRequest(EvalRequest):
    """Classify images by the nearest mean of a class.

    Example:

        dino2 eval means runs/demo
    """

    command = "eval means"

    shrink: float = option(0.0, "How far the means move to their own mean.")


MEANS = '''
"""Nearest class mean of frozen features."""

import torch

from dinov2cli.eval.metrics import AccuracyMeter
from dinov2cli.eval.protocol import Trial, labelled
from dinov2cli.eval.reports import Row


def run(request, subject=None):
    trial = Trial.of(request, subject)
    train_images, val_images = (labelled(each, "a", "it") for each in (trial.train_dataset, trial.val_dataset))
    extract = trial.extractor(256)
    train, val = extract(train_images), extract(val_images)
    means = torch.stack([train.cls[train.targets == label].mean(0) for label in train.targets.unique()])
    means = means.lerp(means.mean(0), request.shrink)
    meter = AccuracyMeter(len(means))
    meter.update(-torch.cdist(val.cls, means), val.targets)
    (accuracy,) = meter.compute()
    return trial.report(extract, {"shrink": request.shrink}, [Row.of("means", accuracy)], [{"top-1": accuracy.top1}])
'''


@pytest.fixture
def means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation of one's own: its module beside the others, its request in their table."""
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "means.py").write_text(MEANS)
    monkeypatch.setattr(dinov2cli.eval, "__path__", [*dinov2cli.eval.__path__, str(tmp_path / "eval")])
    monkeypatch.setitem(EVALUATIONS, "means", MeansRequest)
    monkeypatch.delitem(sys.modules, "dinov2cli.eval.means", raising=False)


@pytest.mark.usefixtures("means")
def test_an_evaluation_of_ones_own_is_a_module_and_a_request(run: Path, tmp_path: Path) -> None:  # noqa: F811
    images = write_images(tmp_path / "images", classes=12)
    data = ["--train-dataset", str(images), "--val-dataset", str(images)]
    app = typer.Typer()
    app.callback()(lambda: None)
    add_command(app, "means", MeansRequest)
    typed = CliRunner().invoke(app, ["means", str(run), *data, "--shrink", "0.1", "--json"], catch_exceptions=False)
    result = json.loads(typed.stdout)
    assert result["task"] == "means" and result["settings"]["shrink"] == 0.1
    assert result["rows"][0]["top1"] > 20
    config = load_config(config_file=run / "config.yaml", overrides=[
        "evaluation.knn_train_dataset=SamplePhotos:split=TRAIN", "evaluation.knn_val_dataset=SamplePhotos:split=VAL",
    ])  # fmt: skip
    (done,) = evaluate_teacher(run / "eval/training_9/teacher_checkpoint.pth", config, ["means"])
    assert (done.task, done.iteration) == ("means", 9)
    written = json.loads((run / "results.json").read_text())["evaluations"]
    assert [each["task"] for each in written] == ["means", "means"]


@pytest.mark.parametrize("words", [["eval", "knn"], ["knn"]])
def test_python_gives_what_the_command_prints(
    words: list[str],
    run: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert dino2(*words, run, *DATA, "--nb-knn", "5", "10", "--json") == 0
    typed = json.loads(capsys.readouterr().out)
    request = dinov2cli.KnnRequest(checkpoint=str(run), nb_knn=(5, 10), **PHOTOS)
    for result in (knn.run(request), dinov2cli.run(request)):
        assert {**result.as_dict(), "date": ""} == {**typed, "date": ""}


def test_a_request_names_its_checkpoint_by_position_or_option() -> None:
    assert KnnRequest(checkpoint="a.b=c", pretrained_weights="w.pth", overrides=("d.e=f",)).overrides == (
        "a.b=c",
        "d.e=f",
    )
    with pytest.raises(WeightsError, match="No checkpoint given"):
        LinearRequest()


def test_a_training_may_name_every_evaluation() -> None:
    config = load_config(overrides=[f"evaluation.tasks=[{','.join(EVALUATIONS)}]"])
    assert config.evaluation.tasks == tuple(EVALUATIONS)


@pytest.mark.parametrize("task", EVALUATIONS)
def test_a_training_may_set_any_option_of_an_evaluation_but_where_it_runs(task: str, tmp_path: Path) -> None:
    kind = EVALUATIONS[task]
    own = {name: field.default for name, field in kind.model_fields.items() if name not in OF_THE_TRAINING}
    load_config(
        overrides=[f"evaluation.tasks=[{task}]", f"evaluation.task_options={{{task}: {{batch_size: 7}}}}"]
    ).save(tmp_path / "config.yaml")
    config = load_config(config_file=tmp_path / "config.yaml")
    request = config.evaluation.request(task, "weights.pth", "cpu")
    assert type(request) is kind and request.model_dump(exclude_unset=True) == {
        "checkpoint": "weights.pth", "device": "cpu", "batch_size": 7,
    }  # fmt: skip
    plain = kind(checkpoint="weights.pth")
    assert task_request(task, own, "weights.pth") == plain


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("{segment: {layers: 4}}", r"evaluation.task_options.segment=.*must be {TASK: .* of knn, "),
        ("{depth: 4}", r"evaluation.task_options.depth=4: must be {TASK: "),
        ("{depth: {layers: 3}}", r"evaluation.task_options.depth.layers=3: --layers 3 is unknown; known: 1, 4"),
        ("{knn: {iterations: 3}}", r"evaluation.task_options.knn.iterations: no such option; there are .*nb_knn"),
        ("{knn: {device: cpu}}", r"evaluation.task_options.knn.device: no such option"),
        ("{linear: {epochs: 0}}", r"evaluation.task_options.linear.epochs=0: .*greater than or equal to 1"),
    ],
)
def test_what_no_evaluation_takes_is_refused_before_a_training(said: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(overrides=[f"evaluation.task_options={said}"])


def test_what_is_named_is_what_was_loaded_though_a_training_goes_on(
    run: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load = protocol.load_model

    def load_while_a_newer_teacher_is_written(source: object, **options: object) -> VisionTransformer:
        shutil.copytree(run / "eval" / "training_9", run / "eval" / "training_29")
        return load(source, **options)

    monkeypatch.setattr(protocol, "load_model", load_while_a_newer_teacher_is_written)
    found = protocol.load_subject(str(run))
    assert found.iteration == 19
    saved = torch.load(found.weights)["teacher"]
    assert torch.equal(found.model.pos_embed, saved["backbone.pos_embed"])


def test_classes_that_differ_in_case_alone_are_pointed_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_images(tmp_path / "imgs", per_class=1)
    (tmp_path / "imgs" / "class1").rename(tmp_path / "imgs" / "Class0")
    assert len(labelled(str(tmp_path / "imgs"), "train", "k-NN").class_names) == 2
    assert "names differ in case alone, such as Class0 and class0" in caplog.text
