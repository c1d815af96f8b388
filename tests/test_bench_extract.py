"""`dino2 bench extract` measures images that are there, and those that are still files."""

from test_bench_train import run
from test_cost import SIZES


def test_extraction_from_memory_and_from_files() -> None:
    sizes = ["--image-size", "56", "--batches", "2", "--batch-size", "4"]
    result = run("extract", *SIZES, *sizes, "--data", "SamplePhotos:split=VAL")
    assert result["model_images_per_s"] > 0 and result["files_images_per_s"] > 0
    assert result["image_size"] == 56
