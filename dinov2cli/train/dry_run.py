"""`--dry-run`: all that a run is going to do, without training."""

import resource
import sys
import tempfile
import time
from pathlib import Path

import torch

from dinov2cli import distributed
from dinov2cli.checkpoint import Checkpointer, tensor_bytes
from dinov2cli.config import Config
from dinov2cli.console import clock
from dinov2cli.data.loaders import make_train_loader
from dinov2cli.train.agreement import next_batches
from dinov2cli.train.cost import describe, estimate, step_flops
from dinov2cli.train.display import print_plan
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


def rehearse(run: Trainer) -> None:
    """Steps on real batches, timed, and a checkpoint there and back. Prints the plan and what was found.

    Nothing is kept: the steps are not saved, and the checkpoint is written to a folder that is removed.
    """
    start = run.iteration
    run.print_plan(run.make_loader())
    seconds = _seconds_of_few_images(run) if run.device.type == "cpu" else 0.0
    whole = run.config.train.batch_size_per_gpu * run.accumulation / FEW * seconds < SECONDS
    if whole:
        step, how, memory = _seconds_of_whole_steps(run), "without waiting for data", memory_used(run.device)
    else:
        step = run.config.train.batch_size_per_gpu * run.accumulation / FEW * seconds
        how, memory = f"reckoned from one with {FEW} images", f"as expected above; {memory_used(run.device)} so far"
    size, written = _checkpoint_there_and_back(run)
    if distributed.is_main():
        left = clock(step * (run.total - start))
        rows = [
            ("step", f"{step:.3g} s {how}, so {left} in all"),
            ("memory", memory),
            ("checkpoint", f"{size / 1e6:,.0f} MB each, {run.config.train.keep} kept; {written}"),
        ]
        print_plan(rows, [])


def _seconds_of_whole_steps(run: Trainer) -> float:
    start, batches, seconds = run.iteration, iter(run.make_loader()), []
    for _ in range(min(STEPS, run.total - start)):
        micro_batches, _ = next_batches(batches, run.accumulation, signals=(), checkpoint_failed=False, collapsed=False)
        began = time.perf_counter()
        result = run.train_step([run.on_device(batch) for batch in micro_batches])
        run.record.check(run.record.take(result))
        seconds.append(time.perf_counter() - began)
        run.iteration += 1
    return min(seconds, default=0.0)


def _seconds_of_few_images(run: Trainer) -> float:
    """The slowest process's time for a step of `FEW` images each."""
    small = run.config.train.model_copy(update={"batch_size_per_gpu": FEW, "num_workers": 0})
    config = run.config.model_copy(update={"train": small})
    ranks = {"rank": distributed.rank(), "world_size": run.world_size}
    batches = make_train_loader(config, start=0, stop=1, first_sample=0, **ranks, pin_memory=False, dataset=run.dataset)
    batch = run.on_device(next(iter(batches)))
    began = time.perf_counter()
    run.train_step([batch])
    return max(distributed.all_gather_objects(time.perf_counter() - began))


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


def print_plan_of_job(config: Config, *, processes: int, cpu: bool) -> None:
    """The plan of a run that a job will do on so many processes, told without reading its data or asking its machines.

    Memory and time are those of GPUs unless `cpu`.
    """
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
