"""How fast features are extracted on this machine."""

import statistics
import time
from typing import NamedTuple

import torch

from dinov2cli.config import Config
from dinov2cli.data.datasets import ImageDataset
from dinov2cli.eval.extract import Extractor
from dinov2cli.models.allocator import keep_freed_memory
from dinov2cli.train.benchmark import matrix_rate
from dinov2cli.train.flops import forward_flops
from dinov2cli.train.networks import build_backbone


class ExtractionBenchmark(NamedTuple):
    """Class tokens of one model, measured in one process."""

    device: str
    threads: int
    batch_size: int
    image_size: int
    precision: str
    model_images_per_s: float
    """Median over the batches, of images that are there already."""
    files_images_per_s: float | None
    """From files to features with the extraction's own loader, over the whole dataset; None without one."""
    model_gflops_per_s: float
    matrix_gflops_per_s: float
    """Median rate of the block's widest layer."""
    utilisation: float


def benchmark_extraction(
    config: Config,
    device: torch.device,
    *,
    dataset: ImageDataset | None,
    batch_size: int,
    batches: int,
    image_size: int,
) -> ExtractionBenchmark:
    """Time the configured backbone with fresh weights on `batches` random batches, then on the dataset.

    Raises:
        ConfigError: `image_size` does not fit the model's patches.
    """
    model = build_backbone(config).eval()
    if device.type == "cpu":
        keep_freed_memory()  # as in an evaluation
    extractor = Extractor(model, image_size=image_size, batch_size=batch_size, device=device)
    dtype, dim = extractor.precision.dtype, model.embed_dim
    tokens = batch_size * ((image_size // model.patch_size) ** 2 + 1)
    images = torch.randn(batch_size, 3, image_size, image_size)

    rates, seconds = [matrix_rate(tokens, dim, 4 * dim, device, dtype, 5)], []
    for _ in range(batches + 1):
        began = time.perf_counter()
        extractor.features_of(images)["cls"].cpu()
        seconds.append(time.perf_counter() - began)
    rates.append(matrix_rate(tokens, dim, 4 * dim, device, dtype, 5))
    per_s = batch_size / statistics.median(seconds[1:])
    from_files = None
    if dataset is not None:
        began = time.perf_counter()
        extractor(dataset)
        from_files = len(dataset) / (time.perf_counter() - began)
    gflops_per_s = per_s * forward_flops(model, image_size) / 1e9
    return ExtractionBenchmark(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        threads=torch.get_num_threads(),
        batch_size=batch_size,
        image_size=image_size,
        precision=str(dtype).removeprefix("torch."),
        model_images_per_s=per_s,
        files_images_per_s=from_files,
        model_gflops_per_s=gflops_per_s,
        matrix_gflops_per_s=max(rates),
        utilisation=gflops_per_s / max(rates),
    )
