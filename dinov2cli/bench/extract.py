"""How fast features are extracted on this machine: `dino2 bench extract`."""

import statistics
import time

import torch

from dinov2cli.bench.clock import Measured, matrix_rate, name_of
from dinov2cli.config import load_config
from dinov2cli.data.datasets import make_dataset
from dinov2cli.device import choose_device
from dinov2cli.eval.extract import Extractor
from dinov2cli.requests.bench import BenchExtractRequest
from dinov2cli.site import read_site
from dinov2cli.train.allocator import keep_freed_memory
from dinov2cli.train.cost import class_token_flops
from dinov2cli.train.networks import build_backbone


def run(request: BenchExtractRequest) -> Measured:
    """Time the configured backbone with fresh weights on random batches, then on the dataset, if one is given.

    Of the figures, `model_images_per_s` is the median over the batches, of images that are there already;
    `files_images_per_s` is from files to features with the extraction's own loader, over the whole dataset;
    `matrix_gflops_per_s` is the rate of the block's widest layer, the higher of that before and that after.

    Raises:
        ConfigError: the image size does not fit the model's patches.
    """
    preset = request.preset if "preset" in request.model_fields_set or not request.config_file else None
    config = load_config(preset, request.config_file, request.overrides, read_site().keys())
    device, image_size, batch_size = choose_device(request.device), request.image_size, request.batch_size
    dataset = None if request.data is None else make_dataset(request.data)
    model = build_backbone(config).eval()
    extractor = Extractor(model, image_size=image_size, batch_size=batch_size, device=device)
    dtype, dim = extractor.precision.dtype, model.embed_dim
    tokens = batch_size * ((image_size // model.patch_size) ** 2 + model.prefix_tokens)
    images = torch.randn(batch_size, config.student.in_chans, image_size, image_size)

    if device.type == "cpu":
        keep_freed_memory()  # as in an evaluation
    rates, seconds = [matrix_rate(tokens, dim, 4 * dim, device, dtype, 5)], []
    for _ in range(request.batches + 1):
        began = time.perf_counter()
        extractor.features_of(images)["cls"].cpu()
        seconds.append(time.perf_counter() - began)
    rates.append(matrix_rate(tokens, dim, 4 * dim, device, dtype, 5))
    per_s, from_files = batch_size / statistics.median(seconds[1:]), None
    if dataset is not None:
        began = time.perf_counter()
        extractor(dataset)
        from_files = len(dataset) / (time.perf_counter() - began)
    gflops_per_s, best = per_s * class_token_flops(config, image_size) / 1e9, max(rates)
    figures = {
        "device": name_of(device),
        "threads": torch.get_num_threads(),
        "batch_size": batch_size,
        "image_size": image_size,
        "precision": str(dtype).removeprefix("torch."),
        "model_images_per_s": per_s,
        "files_images_per_s": from_files,
        "model_gflops_per_s": gflops_per_s,
        "matrix_gflops_per_s": best,
        "utilisation": gflops_per_s / best,
    }
    shown = [
        "{device}, {threads} threads, {precision}: {model_images_per_s:.1f} images/s of {image_size} pixels in batches "
        "of {batch_size}" + ("; {files_images_per_s:.1f} from files" if from_files else ""),
        "{model_gflops_per_s:.0f} GFLOP/s of the model, {utilisation:.0%} of the measured matrix rate "
        "({matrix_gflops_per_s:.0f} GFLOP/s)",
    ]
    return Measured(figures, [line.format(**figures) for line in shown])
