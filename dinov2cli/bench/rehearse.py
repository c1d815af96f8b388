"""A training step rehearsed for a GPU, without one: the run's own step at its own sizes, on fake tensors.

What it says of time is a bound: matrix products at the card's rate and all else at its bandwidth, one kernel after the
other, each of which reads its arrays once and writes them once. Where `train.compile` is on, kernels are those that
Inductor decides on for the compiled parts; else, and in the rest of the step, each operator is one.
"""

import warnings
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh

from dinov2cli.bench.clock import Measured, Result, in_own_process, table
from dinov2cli.bench.fake_compiler import pretend_compiler
from dinov2cli.bench.fake_gpu import Ledger, pretend, pretend_group
from dinov2cli.config import Config
from dinov2cli.config.library import LIBRARIES, library_of
from dinov2cli.data.augmentations import GLOBAL_CROPS, MultiCropAugmentation
from dinov2cli.data.collate import MultiCropBatch
from dinov2cli.data.crop_parameters import draw_crops
from dinov2cli.data.device_augment import ColorDecisions
from dinov2cli.data.randomness import sample_rng
from dinov2cli.device import Precision
from dinov2cli.errors import ConfigError, Dino2Error, EnvironmentProblem
from dinov2cli.train import sharding
from dinov2cli.train.cost import shapes_of_batch
from dinov2cli.train.frozen_teacher import check_fits
from dinov2cli.train.objective import SSLMetaArch
from dinov2cli.train.record import Record
from dinov2cli.train.run_folder import RunFolder
from dinov2cli.train.step import TrainingStep


class Card(NamedTuple):
    """A GPU's rates, and what it holds."""

    matrix_tflops: float
    """In bf16, dense, by its data sheet."""
    bandwidth_gb: float
    """Of its memory, a second."""
    memory_gb: float


CARDS = {
    "h100": Card(989, 3350, 80),  # SXM
    "h200": Card(989, 4800, 141),
    "a100": Card(312, 2039, 80),  # SXM
    "l4": Card(121, 300, 24),
    "rtx4090": Card(165, 1008, 24),
}
REACHED = 0.81
"""The share of a data sheet's matrix rate that large products reach: 800 TFLOP/s on an H100."""

GPU = torch.device("cuda", 0)
SMALL = {
    "student": {"arch": "vit_tiny", "embed_dim": 24, "depth": 3, "num_heads": 2, "patch_size": 8},
    "crops": {
        "global_crops_size": 32,
        "local_crops_size": 16,
        "gram_teacher_crops_size": None,
        "global_local_crop_pairs_ratios": (1.0,),
    },
    "train": {"batch_size_per_gpu": 4},
}
"""Sizes at which compilation is rehearsed: where graphs break does not depend on them."""


class Rehearsal(NamedTuple):
    """One training step on a named card, as counted on fake tensors."""

    card: str
    gpus: int
    batch_size: int
    """Of each GPU."""
    precision: str
    waits: dict[str, int]
    """How often each place of the code asks the GPU for a number or a shape: 0 are allowed."""
    blocking_copies: dict[str, int]
    """How often each place copies between main memory and GPU and waits for it: 0 are allowed."""
    compiled: bool
    """The parts that `train.compile` compiles."""
    operators: int
    """That start at least one kernel; kernels of what is compiled."""
    tflop: float
    """Matrix products, attention among them."""
    other_gb: float
    """Read and written by all other operators or kernels."""
    largest_gb: dict[str, float]
    """The largest parts of it."""
    communicated_gb: float
    """That a GPU gives to the others or gets from them. No time is counted for it."""
    memory_gb: float
    """Most that is allocated at once, without an allocator's gaps and CUDA's own half gigabyte."""
    fits: bool
    """In the card's memory."""
    matrix_ms: float
    other_ms: float
    images_per_s: float
    """Of all GPUs, in a step that takes the two times one after the other."""
    graph_breaks: dict[str, int] | None = None
    """Reasons, where `train.compile` is on."""
    recompilations: int | None = None
    """After the second step."""


def run(configs: Sequence[Config], card: str, gpus: int = 1) -> Measured:
    """Rehearse the steps of these configurations, each alone in a process of its own.

    Raises:
        ConfigError: several GPUs that do not share the parameters.
        EnvironmentProblem: this PyTorch cannot, and why.
    """
    for config in configs if gpus > 1 else ():
        if config.train.sharding in ("none", "ddp"):
            raise ConfigError(
                f"--gpus {gpus} with train.sharding={config.train.sharding}: each has all parameters, and works as one "
                "alone does",
                "Leave --gpus out, or rehearse train.sharding=fsdp.",
            )
    results = [rehearse_whole(config, card, gpus) for config in configs]
    figures = {"card": card, "variants": [result._asdict() for result in results]}
    cards = card if gpus == 1 else f"{gpus} x {card} (FSDP2)"
    head = f"rehearsal without a GPU for {cards}; batches of {results[0].batch_size} images, attention as PyTorch's own"
    names = [f"{result.precision}{' compiled' * result.compiled}" for result in results]
    columns = [rows_of(result) for result in results]
    rows = [[label, *(column[label] for column in columns)] for label in columns[0]]
    found = [line for result in results for line in complaints(result)]
    return Measured(figures, [head, table("", *names, rows=rows, numbers_right=True), *found])


def rehearse_whole(config: Config, card: str, gpus: int = 1) -> Rehearsal:
    """The step and, if it is compiled, its compilation, each alone in a process."""
    result = counted(rehearse, config, card, gpus)
    if not result.compiled:
        return result
    breaks, later = counted(graph_breaks, config)
    return result._replace(graph_breaks=breaks, recompilations=later)


def counted(function: Callable[..., Result], *arguments: Any) -> Result:
    """What a function gives in a new process.

    Raises:
        EnvironmentProblem: it failed, or the process died.
    """
    try:
        result: Result = in_own_process(_in_words, function, *arguments)
        return result
    except BrokenProcessPool as error:
        raise _not_rehearsed(error) from None


def _in_words(function: Callable[..., Result], *arguments: Any) -> Result:
    """In the new process, without warnings: the user's has given those that matter. Not all errors of torch's leave it
    as they are."""
    warnings.filterwarnings("ignore")
    try:
        for config in (each for each in arguments if isinstance(each, Config)):
            check_fits(config)  # what is known of a frozen teacher is read while tensors still have numbers
        return function(*arguments)
    except Dino2Error:
        raise
    except Exception as error:
        raise _not_rehearsed(error) from None


def _not_rehearsed(error: Exception) -> EnvironmentProblem:
    why = str(error).strip().partition("\n")[0] or type(error).__name__
    problem = f"a step cannot be rehearsed with this PyTorch: {why}"
    return EnvironmentProblem(problem, "With train.compile=false less of PyTorch is needed.")


def rows_of(result: Rehearsal) -> dict[str, str]:
    """What is shown to people."""
    return {
        "waits for the GPU": f"{sum(result.waits.values())}",
        "blocking copies": f"{sum(result.blocking_copies.values())}",
        "graph breaks, compiled": "-" if result.graph_breaks is None else f"{sum(result.graph_breaks.values())}",
        "recompilations after two steps": "-" if result.recompilations is None else f"{result.recompilations}",
        "operators, or kernels": f"{result.operators:,}",
        "matrix products, TFLOP": f"{result.tflop:,.3g}",
        "  ms at the card's rate": f"{result.matrix_ms:,.3g}",
        "all else, GB": f"{result.other_gb:,.3g}",
        "  ms at the card's bandwidth": f"{result.other_ms:,.3g}",
        "exchanged with other GPUs, GB": f"{result.communicated_gb:,.3g}",
        "images/s at most": f"{result.images_per_s:,.4g}",
        "memory, GB": f"{result.memory_gb:.3g}" + ("" if result.fits else ": too much"),
    }


def complaints(result: Rehearsal) -> list[str]:
    """A line for each place of the code where a step waits, and each reason of a graph break."""
    breaks = (result.graph_breaks or {}).items()
    return [
        *(f"waits for the GPU {times} times: {what}" for what, times in result.waits.items()),
        *(f"copies and waits {times} times: {what}" for what, times in result.blocking_copies.items()),
        *(f"breaks a graph {times} times: {' '.join(why.split())[:200]}" for why, times in breaks),
    ]


def short_form(config: Config, card: str = "h100") -> str:
    """A line for a plan; why there is none, where this PyTorch cannot."""
    train = config.train.model_copy(update={"compile": False})  # compiling would take longer than the rest of a plan
    try:
        result = counted(rehearse, config.model_copy(update={"train": train}), card)
    except EnvironmentProblem as error:
        return f"not rehearsed: {error.message}"
    waits, copies = sum(result.waits.values()), sum(result.blocking_copies.values())
    size = f"{result.tflop:.3g} TFLOP, {result.other_gb:.3g} GB moved, {result.memory_gb:.3g} GB held"
    most = f"at most {result.images_per_s:.3g} images/s on one {card}, not compiled"
    return f"{waits} waits, {copies} blocking copies, {result.operators:,} operators; {size}; {most}"


def rehearse(config: Config, card: str, gpus: int = 1, prepare: Callable[[], object] | None = None) -> Rehearsal:
    """Count a step of one of a run's processes, in a process that does nothing else.

    Args:
        config: of the run; its attention is rehearsed as PyTorch's own, whatever backend it names.
        card: a key of `CARDS`.
        gpus: how many share the parameters.
        prepare: called first, for those who want to change the step.

    Raises:
        EnvironmentProblem: this PyTorch cannot.
    """
    if library := library_of(config.student.arch):
        raise EnvironmentProblem(
            f"a step of {config.student.arch} cannot be rehearsed: {LIBRARIES[library]} asks tensors for numbers, "
            "which those of a rehearsal have not"
        )
    pretend()
    if gpus > 1:
        pretend_group(gpus)
        mesh = init_device_mesh("cuda", (gpus,))  # not of fake tensors, whose numbers are not there
        setattr(sharding, "init_device_mesh", lambda *_: mesh)  # noqa: B010
    if prepare is not None:
        prepare()
    matrix_tflops, bandwidth_gb, memory_gb = CARDS[card]
    ledger = Ledger(REACHED * matrix_tflops * 1e12, bandwidth_gb * 1e9)
    with fake_mode(), ledger:
        asked = config.compute_precision.precision
        precision = Precision.resolve(asked, GPU, grad_scaler=False)
        with GPU:
            objective = SSLMetaArch(config, "sdpa").train()
        if compiled := config.train.compile is not False:  # on a GPU, auto means yes
            pretend_compiler(ledger)
            objective.compile_parts()
        spread = sharding.Sharding(objective, "none" if gpus == 1 else "fsdp", precision)
        step = TrainingStep(config, objective, spread, precision)
        record = Record(config, RunFolder(Path()), watched_gradients=True)
        batches = [batch_in_main_memory(config) for _ in range(config.train.gradient_accumulation)]
        for iteration, some in enumerate((batches[:1], batches)):  # the first one makes what is kept for all
            ledger.begin()
            result = step(iteration, [batch.to(GPU, non_blocking=True, compiled=compiled) for batch in some])
            record.take(result)
    seconds = ledger.matrix_s + ledger.other_s
    images = config.train.batch_size_per_gpu * len(batches) * gpus
    return Rehearsal(
        card=card,
        gpus=gpus,
        batch_size=config.train.batch_size_per_gpu,
        precision=precision.name,
        compiled=compiled,
        waits=dict(ledger.waits),
        blocking_copies=dict(ledger.copies),
        operators=ledger.operators,
        tflop=ledger.flops / 1e12,
        other_gb=sum(ledger.bytes.values()) / 1e9,
        largest_gb={name: size / 1e9 for name, size in ledger.bytes.most_common(12)},
        communicated_gb=ledger.communicated / 1e9,
        memory_gb=ledger.peak / 1e9,
        fits=ledger.peak < memory_gb * 1e9,
        matrix_ms=1e3 * ledger.matrix_s,
        other_ms=1e3 * ledger.other_s,
        images_per_s=images / seconds,
    )


@lru_cache
def fake_mode() -> FakeTensorMode:
    """One for the whole process, as the program keeps some of its tensors."""
    return FakeTensorMode()


def batch_in_main_memory(config: Config) -> MultiCropBatch:
    """Fake, page-locked, as the loader gives it."""
    batch = shapes_of_batch(config)
    if config.data.device_augment:
        recipes = MultiCropAugmentation.from_config(config).recipes
        side = 2 * config.crops.largest().global_size
        drawn = [draw_crops(recipes, side, side, sample_rng(0, k)) for k in range(config.train.batch_size_per_gpu)]
        views = list(zip(*drawn, strict=True))
        of_global, of_local = (
            ColorDecisions.of([crop for view in some for crop in view])
            for some in (views[:GLOBAL_CROPS], views[GLOBAL_CROPS:])
        )
        batch = replace(batch, pending=(of_global, of_local))
    return batch.pin_memory()


def graph_breaks(config: Config, steps: int = 6) -> tuple[dict[str, int], int]:
    """Why graphs of the compiled parts break, and how many are made after the second step: in a tiny copy of the run.

    They are traced on the CPU and run as they are: no compiler is needed.
    """
    setattr(torch, "compile", partial(torch.compile, backend="eager"))  # noqa: B010
    sizes = SMALL | {name: {"head_n_prototypes": 32, "head_hidden_dim": 32} for name in ("dino", "ibot")}
    groups = {name: getattr(config, name).model_copy(update=changes) for name, changes in sizes.items()}
    small = config.model_copy(update=groups)
    objective = SSLMetaArch(small).train()
    objective.compile_parts()
    made = []
    for seed in range(steps):
        # Other masks in each: the number of masked patches is what changes from step to step.
        masks = torch.rand(GLOBAL_CROPS * 4, 16, generator=torch.Generator().manual_seed(seed)) < 0.3
        places = masks.flatten().nonzero().flatten()
        batch = replace(shapes_of_batch(small), masks=masks, mask_indices=places, masks_weight=torch.ones(len(places)))
        objective(batch, {"iteration": 0, "teacher_temp": 0.05}, torch.Generator().manual_seed(seed)).total.backward()
        made.append(counters["stats"]["unique_graphs"])
    return dict(counters["graph_break"]), made[-1] - made[1]
