"""What a run is going to do, in rows for the person who starts it."""

import resource
import sys
from typing import TYPE_CHECKING

import torch
from torch import nn

from dinov2cli.data.collate import MultiCropBatch
from dinov2cli.data.loaders import Loader
from dinov2cli.train.memory import describe, room_for_gaps

if TYPE_CHECKING:
    from dinov2cli.train.trainer import Trainer


def plan_rows(trainer: "Trainer", loader: Loader[MultiCropBatch]) -> list[tuple[str, str]]:
    """(what, value) of the data, the model, the schedule and the machine."""
    config, student = trainer.config, trainer.objective.student
    crops, arch = config.crops, config.arch()
    world = trainer.world_size
    batch = config.effective_batch(world)
    factors = f"{config.train.batch_size_per_gpu} per process x {world} process{'es' if world > 1 else ''}"
    if trainer.accumulation > 1:
        factors += f" x {trainer.accumulation} accumulated"
    epochs = trainer.total * batch / max(len(loader.dataset), 1)
    workers = f"{loader.num_workers} loader worker{'s' if loader.num_workers != 1 else ''}"
    resumed = f", resumed after {trainer.iteration} iterations" if trainer.iteration else ""
    head_sizes = " + ".join(count_parameters(head) for head in student.heads())
    hint = ""
    if trainer.device.type == "cpu" and not room_for_gaps(trainer.expected_memory):
        hint = "; little room, a smaller train.batch_size_per_gpu would be faster an image"
    rows = [
        ("run", f"{trainer.folder.path}{resumed}"),
        ("data", f"{loader.dataset.describe()}; {workers}"),
        (
            "crops",
            f"2 of {crops.global_crops_size} and {crops.local_crops_number} of {crops.local_crops_size} pixels, "
            f"patches of {config.student.patch_size}",
        ),
        (
            "student",
            f"ViT {arch.embed_dim} wide, {arch.depth} deep, {arch.num_heads} heads, {config.student.ffn_layer}: "
            f"{count_parameters(student.backbone)} parameters; heads {head_sizes}",
        ),
        ("length", f"{trainer.total:,} iterations, {epochs:,.1f} passes over the data"),
        ("batch", f"{batch} images ({factors})"),
        (
            "learning rate",
            f"{trainer.step.schedules.peak_lr:.3g} at its peak (base_lr {config.optim.base_lr:g} at 1024 images)",
        ),
        ("device", f"{trainer.device}, {trainer.precision.name} ({trainer.precision.reason})"),
        ("processes", f"{world}; sharding {trainer.sharding.mode} ({trainer.sharding_reason})"),
        ("attention", f"{trainer.attention_backend} ({trainer.attention_reason})"),
        ("expected memory", describe(trainer.expected_memory) + hint),
    ]
    return rows


def count_parameters(module: nn.Module) -> str:
    """Number of parameters, such as `21.6 M` or `24 k`."""
    number = sum(parameter.numel() for parameter in module.parameters())
    return f"{number / 1e6:.1f} M" if number >= 1e6 else f"{number / 1e3:.0f} k"


def memory_used(device: torch.device) -> str:
    """Most memory that this process has held: on the GPU if it trains there, else resident in main memory."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return f"{torch.cuda.max_memory_reserved(device) / 1e9:.1f} GB of the device's {total / 1e9:.1f} GB"
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.1f} GB of main memory"
