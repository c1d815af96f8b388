"""`dino2 bench train`: what it prints adds up, and wrong wishes are refused."""

import json
import multiprocessing
import threading
import time
from multiprocessing.context import BaseContext
from types import SimpleNamespace

import pytest
import torch
from test_cost import SIZES
from typer.testing import CliRunner

from dinov2cli.bench import clock
from dinov2cli.bench.train import TrainBenchmark, benchmark_variants
from dinov2cli.cli.main import app
from dinov2cli.config import load_config
from dinov2cli.errors import ConfigError

pytestmark = pytest.mark.usefixtures("ready_processes")


def ready_context() -> BaseContext:
    """Its processes are forked from one whose imports are done."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dinov2cli.bench.train", "dinov2cli.bench.rehearse"])
    return context


@pytest.fixture
def ready_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a benchmark are such."""
    monkeypatch.setattr(clock, "multiprocessing", SimpleNamespace(get_context=lambda method: ready_context()))


def run(*arguments: str) -> dict:
    result = CliRunner().invoke(app, ["bench", *arguments, "--device", "cpu", "--json"], catch_exceptions=False)
    return json.loads(result.stdout)


@pytest.mark.parametrize("source", [["--synthetic"], ["--data", "SamplePhotos:split=VAL"]])
def test_parts_of_a_step_make_the_step(source: list[str]) -> None:
    (variant,) = run("train", *SIZES, *source, "--steps", "3", "train.num_workers=0")["variants"]
    # Medians of the parts need not add up exactly to the median step.
    assert sum(variant["parts_s"].values()) == pytest.approx(variant["step_s"], rel=0.5)
    assert all(seconds >= 0 for seconds in variant["parts_s"].values())
    assert variant["images_per_s"] == pytest.approx(8 / variant["step_s"])
    assert variant["model_gflops_per_s"] == pytest.approx(variant["model_gflops"] / variant["step_s"])
    assert 0 < variant["utilisation"] < 1
    assert variant["attention"] == "sdpa" and variant["precision"] == "fp32"


def test_a_backend_that_cannot_run_is_named_and_the_others_are_measured() -> None:
    backends = ["--attention", "varlen", "--attention", "sdpa"]
    result = run("train", *SIZES, "--synthetic", "--steps", "1", *backends)
    assert [variant["attention"] for variant in result["variants"]] == ["sdpa"]
    assert "CUDA" in result["not_measured"][0]
    with pytest.raises(ConfigError, match="varlen"):
        run("train", *SIZES, "--synthetic", "--attention", "varlen")


def test_a_variant_whose_process_is_killed_is_named_and_the_next_is_measured() -> None:
    config = load_config(overrides=SIZES)
    outcomes = benchmark_variants([config, config], torch.device("cpu"), data=None, steps=3)

    def kill_the_first() -> None:
        while not (processes := multiprocessing.active_children()):
            time.sleep(0.05)
        processes[0].kill()

    killer = threading.Thread(target=kill_the_first)
    killer.start()
    killed, measured = outcomes
    killer.join()
    assert isinstance(killed, ConfigError) and "train.batch_size_per_gpu=8 (auto, train.compile=auto)" in killed.message
    assert isinstance(measured, TrainBenchmark) and measured.images_per_s > 0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["train", "--compile", "yes"], "one of on, off"),
        (["train", "--precision", "bf16"], "fp32 only"),
        (["extract", "--image-size", "60"], "not a multiple"),
    ],
)
def test_wrong_wishes_are_refused(arguments: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        run(*arguments, *SIZES)
