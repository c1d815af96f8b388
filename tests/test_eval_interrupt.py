"""Ctrl-C during evaluations: exit code 130, nothing half-written, and the same command works or goes on afterwards."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ready
import torch
from tiny_run import write_images, write_weights

from dinov2cli.cli.main import main
from dinov2cli.console import Interrupted, interruption, stoppable
from dinov2cli.eval.extract import Extractor
from dinov2cli.eval.linear import CHECKPOINT
from dinov2cli.eval.linear_heads import HeadTrainer
from dinov2cli.eval.nearest import KeyBank
from dinov2cli.eval.softmax_regression import _Problem

DATA = ["--train-dataset", "SamplePhotos:split=TRAIN", "--val-dataset", "SamplePhotos:split=VAL"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("DINO2_CACHE", str(tmp_path / "cache"))
    before = signal.getsignal(signal.SIGINT)  # ignored, where the tests run in the background of a script
    yield
    assert signal.getsignal(signal.SIGINT) is before


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return write_weights(tmp_path)


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
        ("knn", Extractor, "features_of", 1, 0),
        ("knn", KeyBank, "search", 1, 2),
        ("logreg", _Problem, "evaluate", 5, 2),
        ("embed", Extractor, "features_of", 1, 0),
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
    begun = list((tmp_path / "cache").rglob("*.unfinished"))
    assert len(whole) == kept and len(begun) == (place is Extractor)  # features that were complete stay
    if task == "knn":
        assert dino2(*words) == 0
        assert "results_eval_knn.json" in files(output)


def test_an_interrupted_embed_goes_on_where_it_was(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["embed", weights, "--data", "SamplePhotos:split=VAL", "--batch-size", "64", "--num-workers", "0"]
    assert dino2(*words, "--output", tmp_path / "whole.npy", "--no-cache") == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Extractor, "features_of", interrupted_in_call(Extractor.features_of, 2))
        assert dino2(*words, "--output", tmp_path / "cut.npy") == 130
    assert "128 of 300 images are kept" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "cut.npy").exists()
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        whole = Extractor.features_of
        patch.setattr(Extractor, "features_of", lambda self, images: (seen.append(len(images)), whole(self, images))[1])
        assert dino2(*words, "--output", tmp_path / "cut.npy") == 0
    assert seen == [64, 64, 44] and "128 of 300 images are from an interrupted run" in capsys.readouterr().err
    assert (tmp_path / "cut.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()
    assert not list((tmp_path / "cache").rglob("*.unfinished"))
    assert dino2(*words, "--output", tmp_path / "cut.npy") == 2  # nothing is replaced unasked
    assert "is there already" in capsys.readouterr().err
    assert dino2(*words, "--output", tmp_path / "cut.npy", "--overwrite") == 0


def test_features_of_other_images_are_not_gone_on_with(weights: Path, tmp_path: Path) -> None:
    photos = write_images(tmp_path / "photos")
    words = ["embed", weights, "--data", photos, "--batch-size", "4", "--num-workers", "0", "--output"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Extractor, "features_of", interrupted_in_call(Extractor.features_of, 2))
        assert dino2(*words, tmp_path / "f.npy") == 130
    (photos / "class0/0.png").write_bytes((photos / "class1/0.png").read_bytes())
    assert dino2(*words, tmp_path / "f.npy") == 0
    assert dino2(*words, tmp_path / "anew.npy", "--no-cache") == 0
    assert (tmp_path / "f.npy").read_bytes() == (tmp_path / "anew.npy").read_bytes()


def test_embed_takes_single_files(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = write_images(tmp_path / "photos")
    files = [photos / "class0/0.png", photos / "class1/3.png"]
    assert dino2("embed", weights, "--data", *files, "--output", tmp_path / "two.csv", "--no-cache") == 0
    lines = (tmp_path / "two.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["path", *map(str, files)]
    assert dino2("embed", weights, "--data", files[0], tmp_path / "no.png", "--output", tmp_path / "f.csv") == 2
    assert "no.png is no file" in " ".join(capsys.readouterr().err.split())


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


def test_sigterm_leaves_nothing_half_written(tmp_path: Path, weights: Path) -> None:
    words = ["export", weights, "--format", "onnx", "--output", tmp_path / "out" / "m.onnx"]
    process = ready.server().start(*words)
    while process.poll() is None and not list(tmp_path.glob("out/.m.onnx.*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 130 and os.listdir(tmp_path / "out") == []


def test_a_ctrl_c_that_python_drops_comes_again() -> None:
    """One that comes in a finaliser would be lost there, and a traceback shown."""
    code = """
import signal, sys, time
from dinov2cli.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs begin without
sys.unraisablehook = main._again
class Finalised:
    def __del__(self):
        raise KeyboardInterrupt
try:
    Finalised()
    time.sleep(20)
except KeyboardInterrupt:
    print("again")
"""
    ended = ready.server().run(code=code)
    assert ended.stdout == "again\n" and not ended.stderr
