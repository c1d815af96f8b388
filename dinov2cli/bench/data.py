"""How fast images become batches, by stage and by number of processes: `dino2 bench augment`."""

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dinov2cli.bench.clock import Measured, table
from dinov2cli.config import Config, load_config
from dinov2cli.data.augmentations import COLOR_STEPS, GEOMETRIC_STEPS, MultiCropAugmentation, in_their_sizes
from dinov2cli.data.collate import CropBuffers, collate
from dinov2cli.data.datasets import ImageDataset, make_dataset
from dinov2cli.data.decoding import Reading
from dinov2cli.data.loaders import make_train_loader
from dinov2cli.data.masking import masks_of_batches
from dinov2cli.data.randomness import mask_rng, sample_rng
from dinov2cli.data.workers import available_cores, opencv_on_one_thread
from dinov2cli.requests.bench import BenchAugmentRequest
from dinov2cli.site import read_site


def run(request: BenchAugmentRequest) -> Measured:
    """Measure samples of a dataset, from file to collated batch, with the crops that the configuration describes.

    The stages are timed one by one in this process (`stages_ms`, milliseconds an image); the rates are of whole epochs
    of the training's own loader: the median of the repeats and each of them, by number of processes.
    """
    config = load_config(request.preset, request.config_file, request.overrides, read_site().keys())
    cores, dataset = available_cores(), make_dataset(request.data)
    workers = request.workers or (0, *(2**i for i in range(cores.bit_length()) if 2**i <= cores))
    with _one_thread():
        stages = time_stages(config, dataset, request.images)
        rates = [measure_rate(config, dataset, count, request.images, request.repeats) for count in workers]
    figures = {"dataset": dataset.describe(), "images": request.images, "cores": cores, "stages_ms": stages,
               "rates": rates}  # fmt: skip
    total = sum(stages.values())
    parts = [(stage, f"{ms:.3f}", f"{ms / total:.0%}") for stage, ms in stages.items()]
    counted = ("{workers}", "{images_per_s:.1f}", "{images_per_s_per_core:.1f}")
    by_workers = [[each.format(**rate) for each in counted] for rate in rates]
    return Measured(figures, [
        f"{dataset.describe()}; {cores} cores",
        table("stage", "ms an image", "share", rows=[*parts, ("all", f"{total:.3f}", "")]),
        table("workers", "images/s", "images/s a core", rows=by_workers),
    ])  # fmt: skip


def measure_rate(config: Config, dataset: ImageDataset, workers: int, images: int, repeats: int) -> dict[str, Any]:
    """Images per second of the training loader. The first batches, in which processes start, are not counted."""
    batch_size = config.train.batch_size_per_gpu
    steps = max(1, images // batch_size)
    warm_up = max(1, 2 * workers)
    with_workers = config.model_copy(update={"train": config.train.model_copy(update={"num_workers": workers})})
    loader = iter(make_train_loader(with_workers, start=0, stop=warm_up + repeats * steps, dataset=dataset))
    for _ in range(warm_up):
        next(loader)
    rates = []
    for _ in range(repeats):
        started = time.perf_counter()
        for _ in range(steps):
            next(loader)
        rates.append(steps * batch_size / (time.perf_counter() - started))
    median = statistics.median(rates)
    per_core = median / max(1, min(workers, available_cores()))
    return {"workers": workers, "images_per_s": median, "images_per_s_per_core": per_core, "repeats": rates}


def time_stages(config: Config, dataset: ImageDataset, images: int) -> dict[str, float]:
    """Milliseconds an image that each stage takes, in the order of the stages."""
    augmentation = MultiCropAugmentation.from_config(config)
    make_masks, order = masks_of_batches(config), dataset.order(config.train.seed)
    batch_size, reading = config.train.batch_size_per_gpu, Reading.of(config.images(), config)
    channels = reading.images.in_chans
    total: dict[str, float] = defaultdict(float)

    @contextmanager
    def timed(stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        total[stage] += time.perf_counter() - started

    buffers = CropBuffers(augmentation.recipes, batch_size, channels)
    for k in range(-min(images, 10), images):  # the first few warm caches up
        if k == 0:
            total.clear()
        with timed("read"):
            encoded = dataset.open(order.index(abs(k)), reading)
        with timed("decode"):
            image = encoded.pixels()
        with timed("draw parameters"):
            height, width = image.shape[:2]
            drawn = augmentation.draw(height, width, sample_rng(0, abs(k)))
        views = [image] * len(drawn)
        for name, step in {**GEOMETRIC_STEPS, **COLOR_STEPS}.items():
            with timed(name):
                views = [step(view, decisions) for view, decisions in zip(views, drawn, strict=True)]
        place = k % batch_size
        with timed("collate"):
            buffers.put(place, in_their_sizes(views, drawn))
        if place == batch_size - 1 or k == images - 1:
            with timed("masks"):
                masks = make_masks(mask_rng(0, abs(k), 0))
            with timed("collate"):
                collate(
                    buffers, masks, iteration=0, samples=[0] * batch_size, bad=[], statistics=reading.images.statistics
                )
                buffers = CropBuffers(augmentation.recipes, batch_size, channels)
    return {stage: 1000 * seconds / images for stage, seconds in total.items()}


@contextmanager
def _one_thread() -> Iterator[None]:
    """This process on one thread, as a loader process runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with opencv_on_one_thread(True):
            yield
    finally:
        torch.set_num_threads(before)
