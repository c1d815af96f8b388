"""How fast a training step runs on this machine, where its time goes, and how much of the hardware it uses."""

import multiprocessing
import resource
import signal
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import pairwise, repeat
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from dinov2cli.config import Config
from dinov2cli.console import progress
from dinov2cli.data.augmentations import GLOBAL_CROPS, MultiCropAugmentation
from dinov2cli.data.collate import CropBuffers, MultiCropBatch, collate
from dinov2cli.data.datasets import ImageDataset, make_dataset
from dinov2cli.data.loaders import make_train_loader
from dinov2cli.data.masking import MaskingGenerator, make_masks, max_block_patches
from dinov2cli.data.randomness import mask_rng
from dinov2cli.device import Precision
from dinov2cli.errors import ConfigError
from dinov2cli.models.allocator import keep_freed_memory
from dinov2cli.train.flops import step_flops
from dinov2cli.train.memory import crop_groups, estimate, masked_patches, room_for_gaps
from dinov2cli.train.objective import SSLMetaArch
from dinov2cli.train.sharding import Sharding
from dinov2cli.train.step import TrainingStep
from dinov2cli.train.trainer import choose_attention

WARM_UP = 2


class TrainBenchmark(NamedTuple):
    """One variant of a training step, measured in one process."""

    device: str
    threads: int
    batch_size: int
    precision: str
    attention: str
    compiled: bool
    images_per_s: float
    """Batch size over the median time of a step, with the time that the step waits for its data."""
    step_s: float
    """Median time of a step."""
    parts_s: dict[str, float]
    """Median time of each part of a step: the data, every network's pass, and what follows."""
    model_gflops: float
    """Of an average step, counted by `flops.step_flops`: what its losses and gradients need."""
    whole_gflops: float
    """The same with every token of the last block."""
    model_gflops_per_s: float
    matrix_gflops_per_s: dict[str, float]
    """Median rate of `F.linear` in the step's precision, by rows x inputs x outputs."""
    utilisation: float
    """Median over the steps of each one's model FLOPs per second over the highest of the rates that were measured
    right before and after it: a machine that others use, too, is not equally fast all the time."""
    memory_gb: float
    """Largest amount that the steps took: allocated on the GPU; on the CPU, growth of the process's resident memory."""
    expected_memory_gb: float
    """`memory.estimate`."""


def benchmark_variants(
    configs: list[Config], device: torch.device, *, data: str | None, steps: int
) -> Iterator[TrainBenchmark | ConfigError]:
    """Several variants, each in a process of its own: one's memory and compiled code do not count for the next.

    Args:
        configs: the variants.
        device: where.
        data: dataset string for the training's own loader; None for random crops.
        steps: see `benchmark_training`.
    """
    context = multiprocessing.get_context("spawn")
    for config in configs:
        with ProcessPoolExecutor(1, context, initializer=_end_on_interrupt) as process:
            try:
                yield process.submit(_benchmark, config, device, data, steps).result()
            except ConfigError as error:
                yield error
            except (torch.OutOfMemoryError, BrokenProcessPool) as error:
                said = "out of memory" if isinstance(error, torch.OutOfMemoryError) else "its process was killed"
                variant = f"{config.student.attention_backend}, {'' if config.train.compile else 'not '}compiled"
                yield ConfigError(f"train.batch_size_per_gpu={config.train.batch_size_per_gpu} ({variant}): {said}")


def _end_on_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches the process that waits for this one, too


def _benchmark(config: Config, device: torch.device, data: str | None, steps: int) -> TrainBenchmark:
    return benchmark_training(config, device, dataset=None if data is None else make_dataset(data), steps=steps)


def benchmark_training(
    config: Config, device: torch.device, *, dataset: ImageDataset | None = None, steps: int = 5
) -> TrainBenchmark:
    """Time `steps` training steps after two that are not counted.

    Args:
        config: what to train; its precision, attention backend and `train.compile` make the variant.
        device: where.
        dataset: images for the training's own loader; None for random crops that are always the same.
        steps: how many steps to time.

    Raises:
        ConfigError: the attention backend cannot run here.
    """
    arithmetic = config.compute_precision
    precision = Precision.resolve(arithmetic.precision, device, grad_scaler=arithmetic.grad_scaler)
    expected = estimate(config, world_size=1, sharding="none", precision=precision.name)
    if device.type == "cpu":
        keep_freed_memory(room=room_for_gaps(expected))
    attention, _ = choose_attention(config, device, precision)
    memory_before = _memory(device)
    step = _TimedStep(config, device, precision, attention)
    total = WARM_UP + steps
    times, masked, rates = [], [], []
    batches, waiting = iter(_batches(config, dataset, total, device)), time.perf_counter()
    name = f"{precision.name} {attention}{' compiled' if config.train.compile else ''}, steps"
    with progress() as bar:
        for number in bar.track(range(total), description=name):
            batch = next(batches)
            waited = time.perf_counter() - waiting
            parts = step(batch)
            if number >= WARM_UP:
                times.append({**parts, "data": parts["data"] + waited})
                masked.append(batch.mask_indices.shape[0])
            if number >= WARM_UP - 1:  # before and after each step that counts
                rates.append(matrix_rates(config, device, precision.dtype))
            waiting = time.perf_counter()

    flops = step_flops(config, masked=round(statistics.mean(masked)))
    seconds = [sum(parts.values()) for parts in times]
    step_s = statistics.median(seconds)
    around = [max(*before.values(), *after.values()) for before, after in pairwise(rates)]
    return TrainBenchmark(
        device=_name(device),
        threads=torch.get_num_threads(),
        batch_size=config.train.batch_size_per_gpu,
        precision=precision.name,
        attention=attention,
        compiled=config.train.compile,
        images_per_s=config.train.batch_size_per_gpu / step_s,
        step_s=step_s,
        parts_s={part: statistics.median(parts[part] for parts in times) for part in step.parts},
        model_gflops=flops.step / 1e9,
        whole_gflops=flops.whole / 1e9,
        model_gflops_per_s=flops.step / 1e9 / step_s,
        matrix_gflops_per_s={shape: statistics.median(each[shape] for each in rates) for shape in rates[0]},
        utilisation=statistics.median(
            flops.step / 1e9 / taken / rate for taken, rate in zip(seconds, around, strict=True)
        ),
        memory_gb=(_memory(device) - memory_before) / 1e9,
        expected_memory_gb=expected.total,
    )


class _TimedStep:
    """The training step with a clock that is read between its parts."""

    def __init__(self, config: Config, device: torch.device, precision: Precision, attention: str) -> None:
        torch.manual_seed(config.train.seed)
        self.device = device
        objective = SSLMetaArch(config, attention).to(device).train()
        if config.train.compile:
            objective.compile_parts()
        self.step = TrainingStep(config, objective, Sharding(objective, "none", precision), precision)
        self.clock = _Clock(device)
        self.parts = ["data", *self._time_networks(), "heads and losses", "backward", "optimizer", "EMA"]

    def __call__(self, batch: MultiCropBatch) -> dict[str, float]:
        """Seconds by part of one step."""
        self.clock.start()
        batch = batch.to(self.device, non_blocking=True)
        self.step(batch.iteration, [batch], self.clock.mark)
        return self.clock.read()

    def _time_networks(self) -> list[str]:
        """Around networks and their backbones: what passes before a network is called belongs to the part before.

        Not inside of them, where torch.compile would meet the clock.

        Returns:
            the parts, in the order of the passes.
        """

        def marking(part: str) -> Callable[..., None]:
            return lambda *_: self.clock.mark(part)

        networks = self.step.networks
        passing = [(name, network) for name, network in networks.followers.items() if network.reads]
        passing.append(("student", networks.student))
        for number, (name, network) in enumerate(passing):
            before, within = "heads and losses" if number else "data", f"{name} forward"
            network.register_forward_pre_hook(marking(before))
            setattr(network.backbone, "forward_tokens", self._timed(network.backbone.forward_tokens, within))  # noqa: B010
            network.register_forward_hook(marking("heads and losses"))
        return [f"{name} forward" for name, _ in passing]

    def _timed(self, run: Callable[..., Any], part: str) -> Callable[..., Any]:
        def run_and_mark(*args: Any) -> Any:
            result = run(*args)
            self.clock.mark(part)
            return result

        return run_and_mark


class _Clock:
    """Seconds by part. On a GPU they are read from events, so that timing makes nobody wait."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[tuple[str, float | torch.cuda.Event]] = []

    def start(self) -> None:
        self.marks = [("", self._now())]

    def mark(self, part: str) -> None:
        """What has passed since the last mark belongs to this part."""
        self.marks.append((part, self._now()))

    def read(self) -> dict[str, float]:
        """Seconds of every part; waits for the GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        parts: dict[str, float] = defaultdict(float)
        for (_, before), (part, now) in zip(self.marks, self.marks[1:], strict=False):
            parts[part] += _seconds(before, now)
        return parts

    def _now(self) -> float | torch.cuda.Event:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds(before: float | torch.cuda.Event, now: float | torch.cuda.Event) -> float:
    if isinstance(before, torch.cuda.Event):
        assert isinstance(now, torch.cuda.Event)
        return float(before.elapsed_time(now)) / 1e3
    assert isinstance(now, float)
    return now - before


def matrix_rates(config: Config, device: torch.device, dtype: torch.dtype, repeats: int = 3) -> dict[str, float]:
    """Median GFLOP/s of the step's own matrix products: the blocks' layers, the prototypes, and one square product."""
    dim = config.arch().embed_dim
    tokens = sum(count * length for count, length in crop_groups(config))
    rows = sum(count for count, _ in crop_groups(config)) + masked_patches(config)
    shapes = [
        (tokens, dim, 3 * dim),
        (tokens, dim, 4 * dim),
        (tokens, 4 * dim, dim),
        (rows, config.dino.head_bottleneck_dim, config.dino.head_n_prototypes),
        (2048, 2048, 2048),
    ]
    return {f"{m} x {k} x {n}": matrix_rate(m, k, n, device, dtype, repeats) for m, k, n in shapes}


@torch.no_grad()
def matrix_rate(rows: int, inputs: int, outputs: int, device: torch.device, dtype: torch.dtype, repeats: int) -> float:
    """Median GFLOP/s of one linear layer."""
    x = torch.randn(rows, inputs, device=device, dtype=dtype)
    weight = torch.randn(outputs, inputs, device=device, dtype=dtype)
    seconds = []
    for _ in range(repeats + 1):
        clock = _Clock(device)
        clock.start()
        F.linear(x, weight)
        clock.mark("product")
        seconds.append(clock.read()["product"])
    return 2 * rows * inputs * outputs / 1e9 / statistics.median(seconds[1:])


def _batches(
    config: Config, dataset: ImageDataset | None, number: int, device: torch.device
) -> Iterator[MultiCropBatch]:
    if dataset is None:
        return repeat(synthetic_batch(config))
    loader = make_train_loader(config, start=0, stop=number, pin_memory=device.type == "cuda", dataset=dataset)
    return iter(loader)


def synthetic_batch(config: Config) -> MultiCropBatch:
    """Random pixels, with masks as in training."""
    crops, batch, patch = config.crops, config.train.batch_size_per_gpu, config.student.patch_size
    buffers = CropBuffers(MultiCropAugmentation.from_config(config).recipes, batch)
    generator = torch.Generator().manual_seed(0)
    for views in (buffers.global_crops, buffers.local_crops):
        views.random_(256, generator=generator)
    side = crops.global_crops_size // patch
    masking = MaskingGenerator(side, side, max_block_patches(crops.global_crops_size, patch))
    probability = config.ibot.mask_sample_probability if config.ibot.loss_weight else 0.0
    ratios = config.ibot.mask_ratio_min_max
    numbers = mask_rng(config.train.seed, 0, 0)
    masks = make_masks(GLOBAL_CROPS * batch, masking, numbers, sample_probability=probability, ratio_range=ratios)
    return collate(buffers, masks, iteration=0, samples=list(range(batch)), bad=[])


def _memory(device: torch.device) -> float:
    """Most bytes that were in use so far."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
