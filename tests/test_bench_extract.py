"""`dino2 bench extract` measures images that are there, and those that are still files."""

from pathlib import Path

import pytest
from test_bench_train import run
from test_cost import SIZES

import dinov2cli
from dinov2cli.errors import ConfigError
from dinov2cli.requests.bench import BenchExtractRequest


def test_extraction_from_memory_and_from_files() -> None:
    sizes = ["--image-size", "56", "--batches", "2", "--batch-size", "4"]
    result = run("extract", *SIZES, *sizes, "--data", "SamplePhotos:split=VAL")
    assert result["model_images_per_s"] > 0 and result["files_images_per_s"] > 0
    assert result["image_size"] == 56


def test_a_file_replaces_the_preset_by_default_and_excludes_one_that_is_named() -> None:
    file = Path("/no/such.yaml")
    with pytest.raises(ConfigError, match="no such config file"):
        dinov2cli.run(BenchExtractRequest(config_file=file))
    with pytest.raises(ConfigError, match="--preset and --config-file are both given"):
        dinov2cli.run(BenchExtractRequest(config_file=file, preset="vits14"))
