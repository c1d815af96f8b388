"""How fast a training step runs on this machine, where its time goes, and how much of the hardware it uses."""

import resource
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import islice, repeat
from typing import NamedTuple

import torch
import torch.nn.functional as F

from dinov2cli.config import Config
from dinov2cli.data.augmentations import MultiCropAugmentation
from dinov2cli.data.collate import CropBuffers, MultiCropBatch, collate
from dinov2cli.data.datasets import ImageDataset
from dinov2cli.data.loaders import make_train_loader
from dinov2cli.data.masking import MaskingGenerator, make_masks, max_block_patches
from dinov2cli.data.randomness import mask_rng
from dinov2cli.models.allocator import keep_freed_memory
from dinov2cli.train.compilation import compile_networks
from dinov2cli.train.flops import step_flops
from dinov2cli.train.memory import crop_groups, estimate, masked_patches
from dinov2cli.train.optimizer import build_optimizer, clip_gradients
from dinov2cli.train.parameter_groups import apply_schedules
from dinov2cli.train.precision import Precision
from dinov2cli.train.schedules import Schedules
from dinov2cli.train.ssl_meta_arch import N_GLOBAL, SSLMetaArch, SSLNetwork
from dinov2cli.train.trainer import choose_attention

PARTS = ("data", "teacher forward", "student forward", "heads and losses", "backward", "optimizer", "EMA")
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
    """Median time of each part of a step; see `PARTS`."""
    model_gflops: float
    """Of an average step, counted by `flops.step_flops`: what its losses and gradients need."""
    whole_gflops: float
    """The same with every token of the last block."""
    model_gflops_per_s: float
    matrix_gflops_per_s: dict[str, float]
    """Median rate of `F.linear` in the step's precision, by rows x inputs x outputs."""
    utilisation: float
    """`model_gflops_per_s` over the highest of those rates."""
    memory_gb: float
    """Largest amount that the steps took: allocated on the GPU; on the CPU, growth of the process's resident memory."""
    expected_memory_gb: float
    """`memory.estimate`."""


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
    if device.type == "cpu":
        keep_freed_memory()
    precision = Precision.resolve(config, device)
    attention, _ = choose_attention(config, device, precision)
    rates = [matrix_rates(config, device, precision.dtype)]
    memory_before = _memory(device)
    step = _Step(config, device, precision, attention)
    total, waiting = WARM_UP + steps, time.perf_counter()
    for number, batch in enumerate(islice(_batches(config, dataset, total, device), total)):
        step(batch, counted=number >= WARM_UP, waited=time.perf_counter() - waiting)
        waiting = time.perf_counter()
    rates.append(matrix_rates(config, device, precision.dtype))  # the machine may have been busier before, or later

    flops = step_flops(config, masked=round(statistics.mean(step.masked)))
    step_s = statistics.median(sum(parts.values()) for parts in step.times)
    best = {shape: max(rate[shape] for rate in rates) for shape in rates[0]}
    return TrainBenchmark(
        device=_name(device),
        threads=torch.get_num_threads(),
        batch_size=config.train.batch_size_per_gpu,
        precision=precision.name,
        attention=attention,
        compiled=config.train.compile,
        images_per_s=config.train.batch_size_per_gpu / step_s,
        step_s=step_s,
        parts_s={part: statistics.median(parts[part] for parts in step.times) for part in PARTS},
        model_gflops=flops.step / 1e9,
        whole_gflops=flops.whole / 1e9,
        model_gflops_per_s=flops.step / 1e9 / step_s,
        matrix_gflops_per_s=best,
        utilisation=flops.step / 1e9 / step_s / max(best.values()),
        memory_gb=(_memory(device) - memory_before) / 1e9,
        expected_memory_gb=estimate(config, world_size=1, sharding="none", precision=precision.name).total,
    )


class _Step:
    """The training step of `train.trainer`, with a clock between its parts."""

    def __init__(self, config: Config, device: torch.device, precision: Precision, attention: str) -> None:
        torch.manual_seed(config.train.seed)
        self.config, self.device, self.precision = config, device, precision
        self.meta_arch = SSLMetaArch(config, attention).to(device).train()
        if config.train.compile:
            compile_networks(self.meta_arch)
        self.optimizer = build_optimizer(self.meta_arch.student, config)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision.scale_gradients)
        self.schedules = Schedules(config, 1)
        self.clock = _Clock(device)
        self.times: list[dict[str, float]] = []
        self.masked: list[int] = []
        self._time_networks()

    def __call__(self, batch: MultiCropBatch, *, counted: bool, waited: float) -> None:
        values = self.schedules.at(batch.iteration)
        apply_schedules(self.optimizer.param_groups, values)
        self.clock.start()
        batch = batch.to(self.device, non_blocking=True)
        with self.precision.autocast():
            losses = self.meta_arch(batch, values.teacher_temp, torch.Generator().manual_seed(batch.iteration))
        self.clock.mark("heads and losses")
        self.scaler.scale(losses.total).backward()
        self.clock.mark("backward")
        self.scaler.unscale_(self.optimizer)
        clip_gradients(self.meta_arch.student, self.config.optim.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.clock.mark("optimizer")
        self.meta_arch.update_teacher(values.momentum)
        self.clock.mark("EMA")
        parts = self.clock.read()
        if counted:
            self.times.append({**parts, "data": parts["data"] + waited})
            self.masked.append(batch.mask_indices.shape[0])

    def _time_networks(self) -> None:
        """Around networks and heads: what passes before a network is called belongs to the part before it."""

        def at_entry(part: str) -> Callable[..., None]:
            return lambda *_: self.clock.mark(part)

        networks: list[tuple[SSLNetwork, str, str]] = [
            (self.meta_arch.teacher, "data", "teacher forward"),
            (self.meta_arch.student, "heads and losses", "student forward"),
        ]
        for network, before, within in networks:
            network.register_forward_pre_hook(at_entry(before))
            network.register_forward_hook(at_entry(within))
            for head in [network.dino_head, *([network.ibot_head] if network.separate_head else [])]:
                head.register_forward_pre_hook(at_entry(within))
                head.register_forward_hook(at_entry("heads and losses"))


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


def matrix_rates(config: Config, device: torch.device, dtype: torch.dtype, repeats: int = 5) -> dict[str, float]:
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
    masks = make_masks(N_GLOBAL * batch, masking, numbers, sample_probability=probability, ratio_range=ratios)
    return collate(buffers, masks, iteration=0, samples=list(range(batch)), bad=[])


def _memory(device: torch.device) -> float:
    """Most bytes that were in use so far."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
