"""`--dry-run`: all that a run is going to do, without training."""

import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from dinov2cli import distributed
from dinov2cli.checkpoint import Checkpointer, tensor_bytes
from dinov2cli.config import Config
from dinov2cli.console import clock, speaking
from dinov2cli.data.loaders import make_train_loader
from dinov2cli.train.agreement import next_batches
from dinov2cli.train.cost import describe, estimate, estimate_together, step_flops
from dinov2cli.train.display import print_plan
from dinov2cli.train.networks import FROZEN_TEACHER
from dinov2cli.train.students import Shared
from dinov2cli.train.trainer import Trainer

STEPS = 3
SECONDS = 6.0
"""Steps are rehearsed whole where one takes less than this on a CPU; else with two images, and the rest is reckoned."""
FEW = 2
MUCH = 1e9
"""Bytes of a checkpoint up to which it is written whole."""
H100_FLOPS = 0.36 * 989e12
"""What a compiled step of vitl16_short reached on an H100 in bf16, FLOP/s: 36 % of the card's peak."""


def memory_used(device: torch.device) -> str:
    """Most memory that this process has held: on the GPU if it trains there, else resident in main memory."""
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
        return f"{torch.cuda.max_memory_reserved(device) / 1e9:.1f} GB of the device's {there / 1e9:.1f} GB"
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.1f} GB of main memory"


def rehearse(runs: Sequence[Trainer]) -> None:
    """Steps on real batches, timed, and a checkpoint there and back. Prints the plan and what was found.

    Nothing is kept: the steps are not saved, and the checkpoint is written to a folder that is removed.

    Args:
        runs: one, or those of students that learn together (`train.students`).
    """
    first, config = runs[0], runs[0].config
    left = [run.total - run.iteration for run in runs]
    for run in runs:
        with speaking(run.folder.path.name if len(runs) > 1 else ""):
            run.print_plan(run.make_loader())
    parts = config.train.batch_size_per_gpu * first.accumulation / FEW
    seconds = _seconds_of_few_images(runs) if first.device.type == "cpu" else [0.0] * len(runs)
    whole = parts * sum(seconds) < SECONDS
    if whole:
        steps, how, memory = _seconds_of_whole_steps(runs), "without waiting for data", memory_used(first.device)
    else:
        steps = [parts * each for each in seconds]
        how, memory = f"reckoned from one with {FEW} images", f"as expected above; {memory_used(first.device)} so far"
    written = [_checkpoint_there_and_back(run) for run in runs]
    if not distributed.is_main():
        return
    in_all = clock(sum(step * iterations for step, iterations in zip(steps, left, strict=True)))
    rows = [("step", f"{sum(steps):.3g} s {how}, so {in_all} in all"), ("memory", memory)]
    if len(runs) > 1:
        how_run: dict[str, Any] = {
            "world_size": first.world_size,
            "sharding": first.sharding.mode,
            "precision": first.precision.name,
        }
        rows.append(("expected memory", describe(estimate_together([run.config for run in runs], **how_run))))
        rows += _of_each([run.config for run in runs], steps)
    for run, (size, how) in zip(runs, written, strict=True):
        rows.append(("checkpoint", f"{size / 1e6:,.0f} MB each, {run.config.train.keep} kept; {how}"))
    print_plan(rows, [])


def _of_each(configs: Sequence[Config], steps: Sequence[float] = ()) -> Iterator[tuple[str, str]]:
    """What students that learn together have in common, and what each takes, of seconds where they are known."""
    flops = [step_flops(config) for config in configs]
    once, alone = flops[0].passes[FROZEN_TEACHER.name], sum(each.step for each in flops)
    together = alone - (len(configs) - 1) * once
    saved = f"one by one the students would take {alone / together:.2f} times as many"
    yield "teacher", f"its pass, once for all, is {once / together:.0%} of a step's operations; {saved}"
    for number, (config, each) in enumerate(zip(configs, flops, strict=True)):
        seconds = f"; {steps[number]:.3g} s{'' if number else ', with the teacher'}" if steps else ""
        yield Path(config.train.output_dir).name, f"{(each.step - once) / together:.0%} of the operations{seconds}"


def _seconds_of_whole_steps(runs: Sequence[Trainer]) -> list[float]:
    """Of each run's steps the shortest."""
    first, seconds = runs[0], [[0.0] for _ in runs]
    shared = Shared(iter(first.make_loader()), first)
    for step in range(min(STEPS, *(run.total - run.iteration for run in runs))):
        for run, of_run in zip(runs, seconds, strict=True):
            shared.again(new=run is first)
            micro_batches, _ = next_batches(
                shared, run.accumulation, signals=(), checkpoint_failed=False, collapsed=False
            )
            began = time.perf_counter()
            result = run.train_step([run.on_device(batch) for batch in micro_batches])
            run.record.check(run.record.take(result))
            of_run[step:] = [time.perf_counter() - began]
            run.iteration += 1
    return [min(of_run) for of_run in seconds]


def _seconds_of_few_images(runs: Sequence[Trainer]) -> list[float]:
    """The slowest process's time for a step of `FEW` images each."""
    first = runs[0]
    small = first.config.train.model_copy(update={"batch_size_per_gpu": FEW, "num_workers": 0})
    config = first.config.model_copy(update={"train": small})
    ranks = {"rank": distributed.rank(), "world_size": first.world_size}
    batches = make_train_loader(
        config, start=0, stop=1, first_sample=0, **ranks, pin_memory=False, dataset=first.dataset
    )
    shared, seconds = Shared(iter(batches), first), []
    for run in runs:
        shared.again(new=run is first)
        batch = next(shared)
        began = time.perf_counter()
        run.train_step([batch])
        seconds.append(max(distributed.all_gather_objects(time.perf_counter() - began)))
    return seconds


def _checkpoint_there_and_back(run: Trainer) -> tuple[int, str]:
    """Bytes of a checkpoint, and what was done with one."""
    size = tensor_bytes(run.state())
    if size > MUCH and run.device.type == "cpu":
        return size, "one of 1 MB was written and read back"  # by the checks before the run
    with tempfile.TemporaryDirectory(dir=run.folder.path, prefix=".dry-run-") as own:
        checkpointer = Checkpointer(Path(distributed.broadcast_object(own)), keep=1)
        path = checkpointer.save(run.iteration, run.state())
        checkpointer.load_latest(run.state())
        size = sum(file.stat().st_size for file in path.iterdir())
        distributed.barrier()
    return size, "written and read back"


def print_plan_of_job(configs: Sequence[Config], *, processes: int, cpu: bool) -> None:
    """The plan of what a job will do on so many processes, told without reading its data or asking its machines.

    Of each of several students that learn together (`train.students`), and then what they have in common. Memory and
    time are those of GPUs unless `cpu`.
    """
    for config in configs:
        _print_plan_of_job(config, processes=processes, cpu=cpu)
    if len(configs) > 1:
        precision = "fp32" if cpu else "bf16"
        ways = {"ddp": "", "fsdp": " sharded (fsdp)"} if processes > 1 else {"none": ""}
        memory = (describe(estimate_together(configs, world_size=processes, sharding=way, precision=precision)) + words
                  for way, words in ways.items())  # fmt: skip
        print_plan([("memory of all", "; ".join(memory)), *_of_each(configs)], [])


def _print_plan_of_job(config: Config, *, processes: int, cpu: bool) -> None:
    precision = "fp32" if cpu else "bf16"
    ways = {"ddp": "", "fsdp": " sharded (fsdp)"} if processes > 1 else {"none": ""}
    memory = [
        describe(estimate(config, world_size=processes, sharding=way, precision=precision)) + words
        for way, words in ways.items()
    ]
    train, total = config.train, config.iterations()
    hours = clock(total * step_flops(config).step * train.gradient_accumulation / H100_FLOPS)
    factors = f"{train.batch_size_per_gpu} per process x {processes} x {train.gradient_accumulation} accumulated"
    rows = [
        ("run", str(Path(train.output_dir).absolute())),
        ("data", train.dataset_path),
        ("length", f"{total:,} iterations"),
        ("batch", f"{config.effective_batch(processes)} images ({factors})"),
        ("learning rate", f"{config.scaled_lr(processes):.3g} at its peak (base_lr {config.optim.base_lr:g})"),
        ("memory", "; ".join(memory)),
    ]
    if not cpu:
        rows.append(
            ("time", f"{hours} on H100s that do as well as one does with vitl16_short, if the data come as fast")
        )
    print_plan(rows, config.deviations())
