"""`dino2 bench train|extract`: what they print adds up, and wrong wishes are refused."""

import json

import pytest
from test_flops import SIZES
from typer.testing import CliRunner

from dinov2cli.cli.bench import bench
from dinov2cli.errors import ConfigError


def run(*arguments: str) -> dict:
    result = CliRunner().invoke(bench, [*arguments, "--device", "cpu", "--json"], catch_exceptions=False)
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


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["train", "--compile", "yes"], "on or off"),
        (["train", "--precision", "bf16"], "fp32 only"),
        (["extract", "--image-size", "60"], "not a multiple"),
    ],
)
def test_wrong_wishes_are_refused(arguments: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        run(*arguments, *SIZES)


def test_extraction_from_memory_and_from_files() -> None:
    sizes = ["--image-size", "56", "--batches", "2", "--batch-size", "4"]
    result = run("extract", *SIZES, *sizes, "--data", "SamplePhotos:split=VAL")
    assert result["model_images_per_s"] > 0 and result["files_images_per_s"] > 0
    assert result["image_size"] == 56
