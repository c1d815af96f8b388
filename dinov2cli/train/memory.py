"""How much memory a training process needs at its peak, counted from the configuration.

Shape legend: T tokens of all crops of a process's batch, D embedding dimension, K prototypes, M masked patches,
W processes.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from dinov2cli.config import Config
from dinov2cli.data.augmentations import GLOBAL_CROPS
from dinov2cli.device import main_memory_of_a_process
from dinov2cli.train.networks import build_network

GB = 1e9
FLOAT32 = 4
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


class MemoryEstimate(NamedTuple):
    """Parts of the peak of one process, in GB (1e9 bytes)."""

    parameters: float
    """The student's, float32, with their copies in the compute dtype."""
    gradients: float
    optimizer: float
    """AdamW's two moments."""
    teacher: float
    """Its parameters, with the gathered ones where it is sharded."""
    activations: float
    """What the student's backbone and heads keep for the backward pass."""
    prototypes: float
    """Scores of student and teacher, their targets and gradients: arrays of K columns."""
    workspace: float
    """Short-lived arrays of the widest layer, crops, and 5 % of everything for what an allocator cannot use."""

    @property
    def total(self) -> float:
        """Sum of the parts, GB."""
        return sum(self)


def estimate(config: Config, *, world_size: int, sharding: str, precision: str) -> MemoryEstimate:
    """Peak memory of one training process.

    The parts are added as if they were all there at once, which they nearly are when the backward pass begins. Not
    counted are the interpreter, the libraries (on a GPU its context, half a gigabyte to one) and the loader's batches.

    Args:
        config: the run.
        world_size: processes, W.
        sharding: `none`, `ddp` or `fsdp` (parameters, gradients and moments split over the processes).
        precision: `fp32`, `bf16` or `fp16`, the dtype of matrix products; parameters are float32 always.
    """
    with torch.device("meta"):
        network = build_network(config, "sdpa", drop_path_rate=config.student.drop_path_rate)
    half = BYTES[precision]
    whole, block, head = _sizes(network)
    shards = world_size if sharding == "fsdp" else 1
    # Whole in the compute dtype from forward to backward: gathered under FSDP, else autocast's copies (not in float32).
    copies = half * whole if shards > 1 or half < FLOAT32 else 0
    # The sharded teacher gathers a block or head at a time, and the next one meanwhile.
    gathered = half * (2 * block + head) if shards > 1 else 0
    unreduced = half * (2 * block + head) if shards > 1 else 0
    activations, workspace = _activations(config, network.backbone.drop_path_rates, precision)
    expected = MemoryEstimate(
        parameters=(FLOAT32 * whole / shards + copies) / GB,
        gradients=(FLOAT32 * whole / shards + unreduced) / GB,
        optimizer=2 * FLOAT32 * whole / shards / GB,
        teacher=(FLOAT32 * whole / shards + gathered) / GB,
        activations=(activations + _heads(config, half)) / GB,
        prototypes=_prototypes(config, half) / GB,
        workspace=(workspace + _crops(config)) / GB,
    )
    return expected._replace(workspace=expected.workspace + 0.05 * expected.total)


def room_for_gaps(expected: MemoryEstimate) -> bool:
    """Whether a process on the CPU may keep freed memory (`models.allocator`).

    Reused memory has gaps: a step then needs up to a fifth more. Interpreter and loader take a gigabyte.
    """
    return 1.25 * expected.total + 1 < main_memory_of_a_process() / GB


def describe(expected: MemoryEstimate) -> str:
    """One line for a plan."""
    unit, size, digits = ("GB", 1.0, 1) if expected.total >= 1 else ("MB", 1e-3, 0)
    parts = (f"{name} {value / size:.{digits}f}" for name, value in zip(expected._fields, expected, strict=True))
    return f"about {expected.total / size:.{digits}f} {unit} a process ({', '.join(parts)})"


def _sizes(network: nn.Module) -> tuple[int, int, int]:
    """Parameters of the network, of its largest block and of its largest head."""

    def count(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    heads = [child for name, child in network.named_children() if name != "backbone"]
    blocks = network.get_submodule("backbone.blocks").children()
    return count(network), max(map(count, blocks)), max(map(count, heads))


def crop_groups(config: Config) -> Iterator[tuple[int, int]]:
    """(number of crops, tokens of one) of the global and the local crops."""
    crops, batch = config.crops, config.train.batch_size_per_gpu
    special = 1 + config.student.num_register_tokens
    yield GLOBAL_CROPS * batch, (crops.global_crops_size // config.student.patch_size) ** 2 + special
    if crops.local_crops_number:
        yield (
            crops.local_crops_number * batch,
            (crops.local_crops_size // config.student.patch_size) ** 2 + special,
        )


def masked_patches(config: Config) -> int:
    """Masked patches of a batch as they are on average: M."""
    if not config.ibot.loss_weight:
        return 0
    low, high = config.ibot.mask_ratio_min_max
    images = int(GLOBAL_CROPS * config.train.batch_size_per_gpu * config.ibot.mask_sample_probability)
    patches = (config.crops.global_crops_size // config.student.patch_size) ** 2
    return round(images * patches * (low + high) / 2)


def _activations(config: Config, drop_rates: list[float], precision: str) -> tuple[float, float]:
    """Bytes that the student's blocks keep for the backward pass, and the largest short-lived ones beside them."""
    dim, half = config.arch().embed_dim, BYTES[precision]
    groups = list(crop_groups(config))
    tokens = sum(count * length for count, length in groups)
    used = sum(count for count, _ in groups) + masked_patches(config)
    gated = config.student.ffn_layer != "mlp"
    hidden = config.vit().hidden_dim
    wide = (4 if gated else 2) * hidden  # gate, value, silu(gate), product; or before and after GELU
    # LayerScale is part of the weights, of which float32 keeps the product; in float16 it keeps its input.
    scaled = bool(config.student.layerscale) and precision == "fp16"
    weights = FLOAT32 * (dim + hidden) * dim if config.student.layerscale and precision == "fp32" else 0
    attended = 2 if precision == "fp32" else 1  # PyTorch's kernel keeps each group's output, too
    by_block = []
    for i, rate in enumerate(drop_rates):
        kept = sum(max(int(count * (1 - rate)), 1) * length for count, length in groups) if rate else tokens
        # LayerNorm keeps its input (the stream is float32 where nothing is dropped), the next layer LayerNorm's output.
        stream = half if rate else FLOAT32
        attention = kept * dim * (stream + half * (1 + 3 + attended + scaled))
        after = used if i == len(drop_rates) - 1 else kept
        by_block.append(weights + attention + after * (dim * (stream + half * (1 + scaled)) + half * wide))
    workspace = 3 * tokens * hidden * half + 4 * tokens * dim * FLOAT32
    if config.train.activation_checkpointing:
        return len(by_block) * tokens * dim * FLOAT32 + max(by_block), workspace
    return sum(by_block), workspace


def _head_rows(config: Config) -> tuple[int, int]:
    """Rows that go through the student's and the teacher's heads."""
    crops = sum(count for count, _ in crop_groups(config))
    masked = masked_patches(config)
    return crops + masked, GLOBAL_CROPS * config.train.batch_size_per_gpu + masked


def _heads(config: Config, half: int) -> float:
    """Bytes that the student's heads keep, without the scores."""
    rows, _ = _head_rows(config)
    sizes = config.dino
    kept_rows = rows * (2 * (sizes.head_nlayers - 1) * sizes.head_hidden_dim + 3 * sizes.head_bottleneck_dim)
    # Normalised prototypes of student and teacher, in float32 and for the product.
    prototypes = config.dino.head_n_prototypes * config.dino.head_bottleneck_dim
    if config.ibot.separate_head:
        prototypes += config.ibot.head_n_prototypes * config.ibot.head_bottleneck_dim
    return kept_rows * half + 2 * prototypes * (FLOAT32 + (half if half < FLOAT32 else 0))


def _prototypes(config: Config, half: int) -> float:
    crops = sum(count for count, _ in crop_groups(config))
    teacher_crops, masked = GLOBAL_CROPS * config.train.batch_size_per_gpu, masked_patches(config)
    of_patches = (config.ibot if config.ibot.separate_head else config.dino).head_n_prototypes
    of_crops = config.dino.head_n_prototypes
    student = crops * of_crops + masked * of_patches
    teacher = teacher_crops * of_crops + masked * of_patches
    # The student's scores and their gradient; the teacher's scores are gone when the student's come, their targets not.
    return 2 * student * half + teacher * FLOAT32


def _crops(config: Config) -> float:
    """Normalised pixels of all crops, float32."""
    crops, batch = config.crops, config.train.batch_size_per_gpu
    pixels = GLOBAL_CROPS * crops.global_crops_size**2 + crops.local_crops_number * crops.local_crops_size**2
    return 3 * FLOAT32 * batch * pixels
