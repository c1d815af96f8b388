"""How fast a training step runs on this machine, where its time goes, and how much of the hardware it uses."""

import resource
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from itertools import pairwise, product, repeat
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from dinov2cli.bench import rehearse
from dinov2cli.bench.clock import Clock, Measured, in_own_process, matrix_rate, name_of, table
from dinov2cli.config import Config, load_config
from dinov2cli.config.vit import ViTConfig
from dinov2cli.console import err, progress
from dinov2cli.data.augmentations import GLOBAL_CROPS, MultiCropAugmentation
from dinov2cli.data.collate import CropBuffers, MultiCropBatch, collate
from dinov2cli.data.datasets import make_dataset
from dinov2cli.data.loaders import make_train_loader
from dinov2cli.data.masking import masks_of_batches
from dinov2cli.data.randomness import mask_rng
from dinov2cli.device import Precision, choose_device
from dinov2cli.errors import ConfigError
from dinov2cli.requests.bench import BenchTrainRequest
from dinov2cli.site import read_site
from dinov2cli.train.allocator import grow_segments, keep_freed_memory
from dinov2cli.train.choices import choose_attention, choose_compile
from dinov2cli.train.cost import estimate, masked_patches, room_for_gaps, step_flops
from dinov2cli.train.networks import SSLNetwork
from dinov2cli.train.objective import SSLMetaArch
from dinov2cli.train.sharding import Sharding
from dinov2cli.train.step import TrainingStep

WARM_UP = 2
REST = ("heads and losses", "backward", "optimizer", "EMA")
"""Parts of a step after its data and the networks' passes."""
ROWS = (
    ("images/s", "images_per_s", ".2f"),
    ("seconds a step", "step_s", ".3f"),
    ("  ", "parts_s", ".3f"),
    ("model GFLOP a step", "model_gflops", ",.0f"),
    ("  with a whole last block", "whole_gflops", ",.0f"),
    ("model GFLOP/s", "model_gflops_per_s", ",.0f"),
    ("matrix GFLOP/s, ", "matrix_gflops_per_s", ",.0f"),
    ("utilisation", "utilisation", ".1%"),
    ("memory, GB", "memory_gb", ".2f"),
    ("  expected", "expected_memory_gb", ".2f"),
)
"""What is shown: text, figure, format."""


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
    """Median time of each part of a step: data, passes of the backbones, `REST`."""
    model_gflops: float
    """Of an average step, counted by `cost.step_flops`: what it computes."""
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
    """`cost.estimate`."""
    kernels: list[tuple[str, float, int]]
    """The longest kernels of a step on a GPU, if they are asked for: name, milliseconds, calls."""


def run(request: BenchTrainRequest) -> Measured:
    """Measure every combination of what the request names.

    Raises:
        ConfigError: none of them can be measured.
    """
    configs = variants_of(request)
    if request.rehearse:
        return rehearse.run(configs, request.card, request.gpus)
    device = choose_device(request.device)
    if device.type == "cpu" and set(request.precision) - {"fp32"}:
        raise ConfigError("--precision: the CPU trains in fp32 only")
    asked = None if request.synthetic else request.data
    data = make_dataset(asked).describe() if asked else "random crops"
    outcomes = list(benchmark_variants(configs, device, data=asked, steps=request.steps, kernels=request.kernels))
    results = [outcome for outcome in outcomes if isinstance(outcome, TrainBenchmark)]
    failures = [outcome.message for outcome in outcomes if isinstance(outcome, ConfigError)]
    if not results:
        raise ConfigError("; ".join(failures))
    for failure in failures:
        err.print(f"not measured: {failure}", markup=False, highlight=False)
    first = results[0]
    head = f"{first.device}, {first.threads} threads; batches of {first.batch_size} images: {data}"
    figures = {"data": data, "variants": [result._asdict() for result in results], "not_measured": failures}
    names = [f"{each.precision} {each.attention}{' compiled' if each.compiled else ''}" for each in results]
    return Measured(figures, [head, table("", *names, rows=[*rows_of(results)], numbers_right=True)])


def variants_of(request: BenchTrainRequest) -> list[Config]:
    """Every combination that is asked for."""
    choices = (
        [f"student.attention_backend={backend}" for backend in request.attention],
        [f"compute_precision.precision={kind}" for kind in request.precision],
        [f"train.compile={'true' if word == 'on' else 'false'}" for word in request.compiled],
    )
    combinations = product(*filter(None, choices))
    words, site = [[*request.overrides, *each] for each in combinations], read_site().keys()
    return [load_config(request.preset, request.config_file, each, site) for each in words]


def rows_of(results: Sequence[TrainBenchmark]) -> Iterator[list[str]]:
    """A row for each figure, with a column for each variant."""
    for text, name, spec in ROWS:
        values = [getattr(result, name) for result in results]
        if isinstance(values[0], dict):
            yield from ([text + part, *(format(value[part], spec) for value in values)] for part in values[0])
        else:
            yield [text, *(format(value, spec) for value in values)]


def benchmark_variants(
    configs: list[Config], device: torch.device, *, data: str | None, steps: int, kernels: int = 0
) -> Iterator[TrainBenchmark | ConfigError]:
    """Several variants, each in a process of its own: one's memory and compiled code do not count for the next.

    Args:
        device, data, steps, kernels: as in `benchmark_training`.
    """
    for config in configs:
        try:
            yield in_own_process(benchmark_training, config, device, data, steps, kernels)
        except ConfigError as error:
            yield error
        except (torch.OutOfMemoryError, BrokenProcessPool) as error:
            said = "its process was killed" if isinstance(error, BrokenProcessPool) else "out of memory"
            variant = f"{config.student.attention_backend}, train.compile={config.train.compile}"
            yield ConfigError(f"train.batch_size_per_gpu={config.train.batch_size_per_gpu} ({variant}): {said}")


def benchmark_training(
    config: Config, device: torch.device, data: str | None = None, steps: int = 5, kernels: int = 0
) -> TrainBenchmark:
    """Time `steps` training steps after two that are not counted.

    Args:
        config: what to train; its precision, attention backend and `train.compile` make the variant.
        data: dataset string for the training's own loader; None for random crops that are always the same.
        kernels: on a GPU, how many of a further step's kernels to list.

    Raises:
        ConfigError: the attention backend cannot run here.
    """
    arithmetic = config.compute_precision
    precision = Precision.resolve(arithmetic.precision, device, grad_scaler=arithmetic.grad_scaler)
    expected = estimate(config, world_size=1, sharding="none", precision=precision.name)
    grow_segments()
    if device.type == "cpu":
        keep_freed_memory(room=room_for_gaps(expected))
    attention, _ = choose_attention(config, device, precision)
    compiled, _ = choose_compile(config, device)
    memory_before = _memory(device)
    step = _TimedStep(config, device, precision, attention, compiled)
    total = WARM_UP + steps
    times, rates = [], []
    batches: Iterator[MultiCropBatch]
    if data is None:
        batches = repeat(synthetic_batch(config))
    else:
        on_gpu = device.type == "cuda"
        batches = iter(make_train_loader(config, start=0, stop=total, pin_memory=on_gpu, dataset=make_dataset(data)))
    waiting = time.perf_counter()
    name = f"{precision.name} {attention}{' compiled' if compiled else ''}, steps"
    with progress() as bar:
        for number in bar.track(range(total), description=name):
            batch = next(batches)
            waited = time.perf_counter() - waiting
            parts = step(batch)
            if number >= WARM_UP:
                times.append({**parts, "data": parts["data"] + waited})
            if number >= WARM_UP - 1:  # before and after each step that counts
                rates.append(matrix_rates(config, device, precision.dtype))
            waiting = time.perf_counter()

    flops = step_flops(config)
    seconds = [sum(parts.values()) for parts in times]
    order = ["data", *(part for part in times[0] if part.endswith(" forward")), *REST]
    step_s = statistics.median(seconds)
    around = [max(*before.values(), *after.values()) for before, after in pairwise(rates)]
    return TrainBenchmark(
        device=name_of(device),
        threads=torch.get_num_threads(),
        batch_size=config.train.batch_size_per_gpu,
        precision=precision.name,
        attention=attention,
        compiled=compiled,
        images_per_s=config.train.batch_size_per_gpu / step_s,
        step_s=step_s,
        parts_s={part: statistics.median(parts[part] for parts in times) for part in order},
        model_gflops=flops.step / 1e9,
        whole_gflops=flops.whole / 1e9,
        model_gflops_per_s=flops.step / 1e9 / step_s,
        matrix_gflops_per_s={shape: statistics.median(each[shape] for each in rates) for shape in rates[0]},
        utilisation=statistics.median(flops.step / 1e9 / s / rate for s, rate in zip(seconds, around, strict=True)),
        memory_gb=(_memory(device) - memory_before) / 1e9,
        expected_memory_gb=expected.total,
        kernels=longest_kernels(step, batch, kernels) if kernels and device.type == "cuda" else [],
    )


def longest_kernels(step: "_TimedStep", batch: MultiCropBatch, count: int) -> list[tuple[str, float, int]]:
    """Of one step: name, milliseconds in all, calls; the longest first."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step(batch)
    found = sorted(profiler.key_averages(), key=lambda event: event.self_device_time_total, reverse=True)
    return [(event.key, event.self_device_time_total / 1e3, event.count) for event in found[:count]]


class _TimedStep:
    """The training step with a clock that is read between its parts."""

    def __init__(
        self, config: Config, device: torch.device, precision: Precision, attention: str, compiled: bool
    ) -> None:
        torch.manual_seed(config.train.seed)
        self.device, self.clock, self.compiled = device, Clock(device), compiled
        with device:  # a GPU draws the weights in no time; which they are does not matter
            objective = SSLMetaArch(config, attention).to(device).train()
        if compiled:
            objective.compile_parts()
        self.step = TrainingStep(config, objective, Sharding(objective, "none", precision), precision)
        for name, network in self.step.networks.named():
            self._time_network(name, network)

    def __call__(self, batch: MultiCropBatch) -> dict[str, float]:
        """Seconds by part of one step."""
        self.clock.start()
        batch = batch.to(self.device, non_blocking=True, compiled=self.compiled)
        self.step(batch.iteration, [batch], self.clock.mark)
        return self.clock.read()

    def _time_network(self, name: str, network: SSLNetwork) -> None:
        """Around a network and its backbone, not inside of them, where torch.compile would meet the clock."""
        backbone, forward_tokens = network.backbone, network.backbone.forward_tokens

        def pass_and_mark(*args: Any) -> Any:
            result = forward_tokens(*args)
            self.clock.mark(f"{name} forward")
            return result

        # What passes before a network is called belongs to the part before: the data, if it is the first.
        network.register_forward_pre_hook(lambda *_: self.clock.mark("data" if self.clock.only_started else REST[0]))
        setattr(backbone, "forward_tokens", pass_and_mark)  # noqa: B010
        network.register_forward_hook(lambda *_: self.clock.mark(REST[0]))


def matrix_rates(config: Config, device: torch.device, dtype: torch.dtype, repeats: int = 3) -> dict[str, float]:
    """Median GFLOP/s of the step's own matrix products: the blocks' layers, the prototypes, and one square product."""
    batch, crops, patch = config.train.batch_size_per_gpu, config.crops.largest(), config.student.patch_size
    sizes = [crops.global_size] * GLOBAL_CROPS + [crops.local_size] * config.crops.local_crops_number
    blocks, backbone = [], config.backbone()
    if isinstance(backbone, ViTConfig):
        tokens, dim = batch * sum((size // patch) ** 2 + backbone.prefix_tokens for size in sizes), backbone.embed_dim
        blocks = [(tokens, dim, 3 * dim), (tokens, dim, 4 * dim), (tokens, 4 * dim, dim)]
    rows = batch * len(sizes) + masked_patches(config)
    prototypes = rows, config.dino.head_bottleneck_dim, config.dino.head_n_prototypes
    shapes = [*blocks, prototypes, (2048, 2048, 2048)]
    return {f"{m} x {k} x {n}": matrix_rate(m, k, n, device, dtype, repeats) for m, k, n in shapes}


def synthetic_batch(config: Config) -> MultiCropBatch:
    """Random pixels, with masks as in training."""
    batch = config.train.batch_size_per_gpu
    images = config.images()
    buffers = CropBuffers(MultiCropAugmentation.from_config(config).recipes, batch, images.in_chans)
    generator = torch.Generator().manual_seed(0)
    for views in (buffers.global_crops, buffers.local_crops):
        views.random_(256, generator=generator)
    masks = masks_of_batches(config)(mask_rng(config.train.seed, 0, 0))
    samples = list(range(batch))
    return collate(buffers, masks, iteration=0, samples=samples, bad=[], statistics=images.statistics)


def _memory(device: torch.device) -> float:
    """Most bytes that were in use so far."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
