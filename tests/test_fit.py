"""`dinov2cli.train`: a run from Python, interrupted and gone on with in one process, which stays as it was."""

import inspect
import logging
import multiprocessing
import os
import platform
import random
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import ready
import torch
from tiny_run import TINY, write_images
from torch import Tensor

import dinov2cli
from dinov2cli.console import Manner, logger
from dinov2cli.errors import ConfigError, DataError, Dino2Error
from dinov2cli.fit import words_of
from dinov2cli.losses.term import Batch, LossTerm, Tokens
from dinov2cli.train.objective import TERMS, Term


def of_the_process() -> dict[str, Any]:
    """What a training could leave changed."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TORCHINDUCTOR")}  # on import
    signals = signal.SIGINT, signal.SIGTERM, signal.SIGUSR2
    return {
        "logging": (list(logger.handlers), logger.level, logger.propagate, list(logging.getLogger().handlers)),
        "manner": (Manner.quiet, Manner.verbose),
        "signals": [signal.getsignal(each) for each in signals],
        "threads": (torch.get_num_threads(), cv2.getNumThreads(), {each.name for each in threading.enumerate()}),
        "loaders": [each.pid for each in multiprocessing.active_children()],
        "random": (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())),
        "torch": (torch.get_default_dtype(), torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled()),
        "python": (environment, os.getcwd(), sys.excepthook, list(warnings.filters)),
    }


class StopButton(LossTerm):
    """The person presses Ctrl-C in the iteration `presses_in`, counted from 1."""

    reads = frozenset({"patches"})

    def __init__(self) -> None:
        super().__init__()
        self.presses_in, self.iteration = 0, 0

    def forward(self, tokens: Tokens, targets: None, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        zero = 0.0 * tokens["patches"].float().mean()
        if not zero.is_meta:  # where memory is estimated
            self.iteration += 1
            if self.iteration == self.presses_in:
                os.kill(os.getpid(), signal.SIGINT)
        return zero, {}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("fit") / "data")


def test_a_run_is_interrupted_and_gone_on_with_and_leaves_the_process_as_it_was(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    button = StopButton()
    monkeypatch.setitem(TERMS, "button", lambda config: Term(button, weight=1.0, follower=None))
    knn = f"evaluation: {{knn_period: 6, knn_train_dataset: {images}, knn_val_dataset: {images}}}"
    (tmp_path / "knn.yaml").write_text(knn)

    def train() -> dinov2cli.Fit:
        overrides = [*TINY, "train.num_workers=1", "train.hang_timeout=60"]
        run = tmp_path / "run"
        return dinov2cli.train(
            images, config_file=tmp_path / "knn.yaml", output_dir=run, overrides=overrides, device="cpu"
        )

    before = of_the_process()
    button.presses_in = 5
    with pytest.raises(KeyboardInterrupt):
        train()
    assert of_the_process() == before
    assert [line["iteration"] for line in dinov2cli.Fit(tmp_path / "run").metrics] == [*range(5)]
    button.presses_in = 0
    fit = train()
    assert of_the_process() == before
    assert [line["iteration"] for line in fit.metrics] == [*range(12)]
    assert [score["iteration"] for score in fit.scores] == [0, 6, 12]
    assert repr(fit) == f"Fit('{tmp_path / 'run'}', iteration 12, k-NN {fit.scores[-1]['knn_top1']:.1f} %)"
    picture = images / "class0" / "0.png"
    assert torch.equal(fit.embed(picture), dinov2cli.embed(picture, tmp_path / "run"))
    figure = fit.plot()
    assert {"Losses: total_loss", "Scores: k-NN top-1 % (while training)"} <= {axes.get_title() for axes in figure.axes}
    assert figure._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]  # as notebooks look for it
    written = (tmp_path / "run" / "training_metrics.json").read_bytes()
    assert train().metrics == fit.metrics and (tmp_path / "run" / "training_metrics.json").read_bytes() == written


def test_what_is_wrong_is_an_error_that_can_be_caught(images: Path, tmp_path: Path) -> None:
    before = of_the_process()
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"data": tmp_path / "none"}, "neither a folder nor a known dataset"),
        ({"overrides": {"optim.epoch": 3}}, "did you mean optim.epochs?"),
        ({"overrides": {"optim.epochs": object()}}, "is no number, text"),
        ({"overrides": [3]}, "overrides"),
        ({"device": "cdua"}, "device='cdua'"),
        ({"preset": "dmo"}, "Did you mean demo?"),
        ({"preset": "demo", "config_file": "x.yaml"}, "are both given"),
    ]
    for given, message in wrong:
        with pytest.raises(Dino2Error, match="(?s).*" + message.replace("?", r"\?")):
            dinov2cli.train(**{"data": images, "output_dir": tmp_path / "run", **given})
    with pytest.raises(DataError, match="no such run folder"):
        dinov2cli.Fit(tmp_path / "run")
    assert of_the_process() == before and not list(tmp_path.iterdir())


def test_overrides_are_what_the_command_would_be_given() -> None:
    given = {
        "optim": {"epochs": np.int64(50), "base_lr": 1e-5}, "crops.blur_prob": (0.0, 0.5, 0.2), "data.channels": ["0"],
        "train.compile": False, "student.layerscale": None, "train.output_dir": Path("a b"),
    }  # fmt: skip
    words = words_of(given)
    assert words == (
        "optim.epochs=50", "optim.base_lr=1e-05", "crops.blur_prob=[0.0, 0.5, 0.2]", 'data.channels=["0"]',
        "train.compile=false", "student.layerscale=null", "train.output_dir=a b",
    )  # fmt: skip
    from dinov2cli.config import load_config

    config = load_config(overrides=[each for each in words if "channels" not in each])
    assert (config.optim.epochs, config.optim.base_lr, config.crops.blur_prob) == (50, 1e-5, (0.0, 0.5, 0.2))
    assert words_of("optim.epochs=5") == words_of(["optim.epochs=5"]) == ("optim.epochs=5",)
    with pytest.raises(ConfigError, match="is no number"):
        words_of({"optim": {"epochs": {1, 2}}})


def test_the_call_and_the_folder_of_its_name_are_one() -> None:
    code = "import dinov2cli, dinov2cli.train.schedules as s; assert callable(dinov2cli.train) and s.__name__"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert list(inspect.signature(dinov2cli.train).parameters)[:2] == ["data", "preset"]
    assert len(inspect.signature(dinov2cli.train).parameters) <= 12
    assert {"train", "Fit"} <= set(dir(dinov2cli))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's malloc")
def test_memory_goes_back_to_the_system_after_a_training() -> None:
    code = """
import resource, torch
from dinov2cli.train.allocator import keep_freed_memory, memory_given_back
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
before = resident()
with memory_given_back():
    assert keep_freed_memory()
    torch.ones(100_000_000)
    assert resident() - before > 300e6
assert resident() - before < 100e6
torch.ones(100_000_000)
assert resident() - before < 100e6
with memory_given_back():
    assert not keep_freed_memory(room=False)
assert keep_freed_memory()
"""
    done = ready.server().run(code=code)
    assert done.returncode == 0, done.stderr
