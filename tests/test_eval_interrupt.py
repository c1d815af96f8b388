"""Ctrl-C during evaluations: exit code 130, nothing half-written, and the same command works or goes on afterwards."""

import json
import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dinov2cli.cli.main import main
from dinov2cli.console import Interrupted, interruption, stoppable
from dinov2cli.eval.extract import Extractor
from dinov2cli.eval.linear import CHECKPOINT
from dinov2cli.eval.linear_heads import HeadTrainer
from dinov2cli.eval.nearest import KeyBank
from dinov2cli.eval.softmax_regression import _Problem
from dinov2cli.models.vision_transformer import VisionTransformer

DATA = ["--train-dataset", "SamplePhotos:split=TRAIN", "--val-dataset", "SamplePhotos:split=VAL"]


@pytest.fixture(autouse=True)
def own_cache_and_logging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("DINO2_CACHE", str(tmp_path / "cache"))
    before = signal.getsignal(signal.SIGINT)  # ignored, where the tests run in the background of a script
    yield
    assert signal.getsignal(signal.SIGINT) is before
    logger = logging.getLogger("dino2")  # a command takes over the logger of its process
    logger.propagate = True
    logger.handlers.clear()


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=2, layerscale=1.0)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    size = "arch: vit_tiny, embed_dim: 24, depth: 4, num_heads: 2, patch_size: 8, layerscale: 1.0"
    crops = "global_crops_size: 32, local_crops_size: 16"
    (tmp_path / "config.yaml").write_text(f"student: {{{size}}}\ncrops: {{{crops}}}")
    return tmp_path / "weights.pth"


def dino2(*words: str | Path) -> int:
    try:
        main([str(word) for word in words])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def interrupted_in_call(method: Callable[..., Any], number: int) -> Callable[..., Any]:
    """`method`, during whose n-th call this process gets the signal of Ctrl-C."""
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGINT)
        return method(*args, **kwargs)

    return wrapped


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("task", "place", "name", "call", "kept"),
    [
        ("knn", Extractor, "features_of", 2, 0),
        ("knn", KeyBank, "search", 1, 2),
        ("logreg", _Problem, "evaluate", 5, 2),
        ("embed", Extractor, "features_of", 2, 0),
    ],
)
def test_ends_with_130_and_leaves_only_whole_things(
    task: str, place: type, name: str, call: int, kept: int, weights: Path, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    output.mkdir()
    words: list[str | Path] = ["eval", task, weights, *DATA, "--output-dir", output]
    if task == "embed":
        words = ["embed", weights, "--data", "SamplePhotos:split=TRAIN", "--output", output / "f.safetensors"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, name, interrupted_in_call(getattr(place, name), call))
        assert dino2(*words, "--batch-size", "100", "--num-workers", "0") == 130
    assert files(output) == []
    whole = list((tmp_path / "cache").rglob("entry.json"))
    assert len(whole) == kept and len(files(tmp_path / "cache")) == 2 * kept  # features that were complete stay
    if task == "knn":
        assert dino2(*words) == 0
        assert "results_eval_knn.json" in files(output)


def test_a_linear_probe_goes_on_where_it_was(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = [
        "--epoch-length",
        "12",
        "--epochs",
        "1",
        "--batch-size",
        "8",
        "--learning-rates",
        "0.1",
        "--num-workers",
        "0",
    ]
    words = ["eval", "linear", weights, *DATA, *short, "--frozen-crops", "--json", "--output-dir"]
    assert dino2(*words, tmp_path / "whole") == 0
    whole = json.loads(capsys.readouterr().out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeadTrainer, "step", interrupted_in_call(HeadTrainer.step, 5))
        assert dino2(*words, tmp_path / "cut") == 130
    assert files(tmp_path / "cut") == [CHECKPOINT]
    assert torch.load(tmp_path / "cut" / CHECKPOINT)["iteration"] == 5
    capsys.readouterr()
    assert dino2(*words, tmp_path / "cut") == 0
    assert json.loads(capsys.readouterr().out)["extra"] == whole["extra"]


def test_what_cannot_be_stopped_halfway_is_ended_first() -> None:
    steps = []
    with pytest.raises(Interrupted) as raised, stoppable():
        os.kill(os.getpid(), signal.SIGINT)
        steps.append("written")
    assert steps == ["written"] and raised.value.signal == signal.SIGINT


def test_inside_a_training_the_training_decides() -> None:
    with interruption("saving") as signals:
        with stoppable() as stop_if_asked:
            os.kill(os.getpid(), signal.SIGINT)
            stop_if_asked()
        assert signals == [signal.SIGINT]
