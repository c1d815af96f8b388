"""What a training step takes, memory and floating-point operations: measured while it runs on the meta device.

There tensors have shapes and no contents, so that the real code runs in no time. Networks of one block and of two are
measured, and what the second adds is added for each further one. Attention counts as the fused kernel that it is;
matrix products have the precision of the run.
"""

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dinov2cli.config import Config
from dinov2cli.data.augmentations import GLOBAL_CROPS
from dinov2cli.data.collate import MultiCropBatch
from dinov2cli.device import DTYPES, main_memory_of_a_process
from dinov2cli.train.counting import Arrays, MatrixPrecision
from dinov2cli.train.networks import TEACHER, build_backbone, build_frozen_teacher
from dinov2cli.train.objective import TERMS, SSLMetaArch

GB = 1e9
FLOAT32 = 4
META = torch.device("meta")
NOT_OF_A_STEP = ("dataset_path", "output_dir", "seed", "num_workers", "OFFICIAL_EPOCH_LENGTH", "checkpoint_period",
                 "keep", "log_period", "hang_timeout", "gradient_accumulation", "sharding")  # fmt: skip
"""Keys of `train` that have no part in what one costs, as have `optim`, `teacher` and `evaluation`."""


class MemoryEstimate(NamedTuple):
    """Parts of the peak of one process, in GB (1e9 bytes)."""

    parameters: float
    """The student's, float32, and what is gathered of them where they are sharded."""
    gradients: float
    optimizer: float
    """AdamW's two moments."""
    teacher: float
    """All followers' parameters, with the gathered ones where they are sharded."""
    activations: float
    """The most that a step holds beside these at once: crops, tokens, scores, targets, copies in half precision."""
    workspace: float
    """5 % of everything for what an allocator cannot use."""

    @property
    def total(self) -> float:
        return sum(self)


class StepFlops(NamedTuple):
    """Of one batch, in FLOPs: a multiplication and an addition count as two.

    Elementwise operations, softmaxes, normalisations, the optimizer and recomputation are not counted.
    """

    step: float
    """Forward and backward; in the last block, most of it for the tokens in use alone."""
    whole: float
    """With every token of the last block."""
    passes: dict[str, float]
    """The parts of `step` that the passes of other followers than the teacher are, by their names."""


def estimate(config: Config, *, world_size: int, sharding: str, precision: str) -> MemoryEstimate:
    """Peak memory of one training process.

    Not counted are the interpreter, the libraries (on a GPU its context, half a gigabyte to one) and the loader's
    batches.

    Args:
        world_size: processes.
        sharding: `none`, `ddp` or `fsdp` (parameters, gradients and moments split over the processes).
        precision: `fp32`, `bf16` or `fp16`, the dtype of matrix products; parameters are float32 always.
    """
    config = config.at(config.crops.largest())
    first, second, kinds = _blocks(config, precision)
    block, whole = kinds[0][1] if kinds else second, _sum(first, kinds)
    student, followers, activations = whole.student, whole.followers, max(whole.peak, first.peak_before)
    shards, kept, gathered = 1, 0.0, 0.0
    if sharding == "fsdp":
        shards = world_size
        # The student's stay whole from forward to backward. In half precision the measured copies are these,
        # unless those are made anew for the backward pass.
        if precision == "fp32" or config.train.activation_checkpointing:
            kept = DTYPES[precision].itemsize / FLOAT32 * student
        # Two blocks and a head: the one at work and the next, of the followers' weights and the student's gradients.
        gathered = DTYPES[precision].itemsize / FLOAT32 * (2 * block.student + first.head)
    weights, trained = student / shards, whole.trained / shards
    parts = (weights + kept, trained + gathered, 2 * trained, followers / shards + gathered, activations)
    return MemoryEstimate(*(part / GB for part in (*parts, 0.05 * sum(parts))))


def estimate_together(configs: Sequence[Config], *, world_size: int, sharding: str, precision: str) -> MemoryEstimate:
    """Of students that learn together (`train.students`): one frozen teacher, and one student's step at a time.

    Args: as of `estimate`.
    """
    how: dict[str, Any] = {"world_size": world_size, "sharding": sharding, "precision": precision}
    columns = list(zip(*(estimate(config, **how) for config in configs), strict=True))
    with META:
        teacher = _size(build_frozen_teacher(configs[0])) / GB / (world_size if sharding == "fsdp" else 1)
    parameters, gradients, optimizer, followers = (sum(column) for column in columns[:4])
    parts = parameters, gradients, optimizer, followers - (len(configs) - 1) * teacher, max(columns[4])
    return MemoryEstimate(*parts, 0.05 * sum(parts))


def step_flops(config: Config) -> StepFlops:
    """FLOPs of an average step."""
    resolutions = config.crops.resolutions()
    of_each = [_step_flops(config.at(each)) for each in resolutions]
    step, whole = (
        sum(each.share * flops for each, flops in zip(resolutions, part, strict=True))
        for part in zip(*(each[:2] for each in of_each), strict=True)
    )
    shares = list(zip(resolutions, of_each, strict=True))
    passes = {name: sum(each.share * flops.passes[name] for each, flops in shares) for name in of_each[0].passes}
    return StepFlops(step, whole, passes)


def _step_flops(config: Config) -> StepFlops:
    """At one resolution."""
    once = config.train.model_copy(update={"activation_checkpointing": False})
    first, second, kinds = _blocks(config.model_copy(update={"train": once}), "fp32")
    all_blocks = _sum(first, kinds)
    return StepFlops(all_blocks.flops, all_blocks.flops + second.left_out, all_blocks.passes)


def class_token_flops(config: Config, image_size: int) -> int:
    """FLOPs of the class token of one square image of `image_size` pixels."""
    with META, torch.no_grad(), FlopCounterMode(display=False) as counted, MatrixPrecision(torch.float32) as precision:
        build_backbone(config).eval()(torch.empty(1, config.student.in_chans, image_size, image_size))
    return int(counted.get_total_flops() + precision.attention_flops)


class _Measured(NamedTuple):
    student: float
    """Bytes of its parameters, float32, as of all followers' and of the largest head's."""
    followers: float
    peak: float
    """The most bytes that a step holds beside parameters, gradients and crops, from the student's pass on."""
    peak_before: float
    """Likewise, until then: in the followers' passes."""
    head: float
    flops: float
    left_out: float
    """FLOPs that the last block saves, attention apart."""
    trained: float
    """Bytes of the student's parameters that are trained."""
    passes: dict[str, float]
    """FLOPs of other followers than the teacher, attention included."""


def _blocks(config: Config, precision: str) -> tuple[_Measured, _Measured, list[tuple[int, _Measured]]]:
    """Networks of one block and of two, all trained; and of further blocks how many there are, and what each adds.

    Of three and four where activations are computed again: with fewer, the peak is elsewhere in the step. There are two
    kinds of further ones where only the last are trained. Another library's backbone is measured whole.
    """
    if config.student.library():
        whole = _measure(config, None, precision)
        return whole, whole, []
    few = 3 if config.train.activation_checkpointing else 1
    first, second = (_measure(config, depth, precision) for depth in (few, few + 1))
    part, depth = config.student.trained(), config.arch().depth
    kept = depth - part.number if part.kind == "last" else 0
    kinds = [(depth - few - kept, _sum(second, [(-1, first)]))]
    if kept:
        kinds.append((kept, _sum(_measure(config, few + 1, precision, trained=few), [(-1, first)])))
    return first, second, kinds


def _sum(first: _Measured, kinds: list[tuple[int, _Measured]]) -> _Measured:
    """The first, and so many of each kind."""
    every = [(1, first), *kinds]
    columns = zip(*(each[:-1] for _, each in every), strict=True)
    numbers = [sum(count * part for (count, _), part in zip(every, column, strict=True)) for column in columns]
    passes = {name: sum(count * each.passes[name] for count, each in every) for name in first.passes}
    return _Measured._make([*numbers, passes])


def _measure(config: Config, depth: int | None, precision: str, trained: int = 0) -> _Measured:
    """A step of networks with so many blocks (None: as they are), each of which drops what is dropped on average.

    Where only the last blocks are trained, these are so many, by default all. Nothing is done twice: what was measured
    once in this process is known, as a training is asked about for its sharding, memory and plan.
    """
    rate = config.student.drop_path_rate / (1 if config.student.drop_path_uniform else 2)
    size: dict[str, Any] = {} if depth is None else {"arch": "vit", **config.arch()._asdict(), "depth": depth}
    if config.student.trained().kind == "last":
        size["train"] = f"last:{trained or depth}"
    options = config.student.model_copy(update={**size, "drop_path_rate": rate, "drop_path_uniform": True})
    plain = Config()
    train = config.train.model_copy(update={key: getattr(plain.train, key) for key in NOT_OF_A_STEP})
    others = {"optim": plain.optim, "teacher": plain.teacher, "evaluation": plain.evaluation}
    config = config.model_copy(update={"student": options, "train": train, **others})
    return _run_step(config, precision, tuple(TERMS.items()))


@functools.lru_cache(maxsize=64)
@torch.enable_grad()  # a step has gradients, even if the caller has switched them off
def _run_step(config: Config, precision: str, terms: object) -> _Measured:
    """Of networks and terms as they are here; `terms` are what `TERMS` holds now."""
    counter, recomputed = FlopCounterMode(display=False), config.train.activation_checkpointing
    # Its hooks would keep what is computed again, of which FLOPs are not asked for.
    counting: AbstractContextManager[Any] = nullcontext() if recomputed else counter
    with META, counting, Arrays() as arrays, MatrixPrecision(DTYPES[precision]) as casts:
        objective, batch = SSLMetaArch(config).train(), shapes_of_batch(config)
        student = objective.student
        for parameter in filter(lambda each: each.requires_grad, student.parameters()):
            parameter.grad = torch.zeros_like(parameter)
        peaks: list[int] = []
        student.register_forward_pre_hook(lambda *_: peaks.append(arrays.begin_again()))
        others = {name: net for name, net in objective.networks.followers.items() if name != TEACHER.name}
        attention = {name: casts.count_attention_of(network) for name, network in others.items()}
        for block in student.backbone.blocks if recomputed else ():
            setattr(block, "up_to_last_sum", casts.around(block.up_to_last_sum))  # noqa: B010
        before = arrays.peak = arrays.held
        values = {"iteration": 0, "teacher_temp": 1.0}
        objective(batch, values, torch.Generator().manual_seed(0)).total.backward()
    counts = counter.get_flop_counts()
    left_out = 0
    for name, network in objective.networks.named():
        blocks = f"SSLMetaArch.{name}.backbone.blocks"
        whole, last = (counts.get(f"{blocks}.{block}", {}) for block in (0, network.backbone.depth - 1))
        left_out += sum(whole.values()) - sum(last.values())
    return _Measured(
        _size(student),
        sum(_size(network) for network in objective.networks.followers.values()),
        arrays.peak - before,
        peaks[0] - before,
        max(_size(head) for head in student.heads()),
        counter.get_total_flops() + casts.attention_flops,
        left_out,
        float(FLOAT32 * sum(each.numel() for each in student.parameters() if each.requires_grad)),
        {name: sum(counts.get(f"SSLMetaArch.{name}", {}).values()) + sum(attention[name]) for name in others},
    )


def _size(module: nn.Module) -> float:
    return float(FLOAT32 * sum(parameter.numel() for parameter in module.parameters()))


def shapes_of_batch(config: Config) -> MultiCropBatch:
    """Shapes of a batch of the largest resolution in which as much is masked as on average."""
    crops, batch, masked = config.crops.largest(), config.train.batch_size_per_gpu, masked_patches(config)
    patches = (crops.global_size // config.student.patch_size) ** 2
    sizes = ((GLOBAL_CROPS, crops.global_size), (config.crops.local_crops_number, crops.local_size))
    channels = config.student.in_chans
    of_global, of_local = (torch.empty(n * batch, size, size, channels, dtype=torch.uint8) for n, size in sizes)
    masks = torch.empty(GLOBAL_CROPS * batch, patches, dtype=torch.bool)
    indices, samples = (torch.empty(number, dtype=torch.int64) for number in (masked, batch))
    arrays = of_global, of_local, masks, indices, torch.empty(masked)
    larger = None
    if side := crops.gram_teacher_size:
        larger = torch.empty(GLOBAL_CROPS * batch, side, side, channels, dtype=torch.uint8)
    return MultiCropBatch(
        *arrays, iteration=0, samples=samples, statistics=config.images().statistics, gram_teacher_crops=larger
    )


def masked_patches(config: Config) -> int:
    """Masked patches of a batch of the largest resolution as they are on average."""
    if not config.ibot.loss_weight:
        return 0
    low, high = config.ibot.mask_ratio_min_max
    images = int(GLOBAL_CROPS * config.train.batch_size_per_gpu * config.ibot.mask_sample_probability)
    patches = (config.crops.largest().global_size // config.student.patch_size) ** 2
    if config.compares_all_patches():
        return GLOBAL_CROPS * config.train.batch_size_per_gpu * patches
    return round(images * patches * (low + high) / 2)


def room_for_gaps(expected: MemoryEstimate) -> bool:
    """Whether a process on the CPU may keep freed memory (`train.allocator`).

    Reused memory has gaps: a step then needs up to a fifth more. Interpreter and loader take a gigabyte.
    """
    return 1.25 * expected.total + 1 < main_memory_of_a_process() / GB


def describe(expected: MemoryEstimate) -> str:
    unit, size, digits = ("GB", 1.0, 1) if expected.total >= 1 else ("MB", 1e-3, 0)
    parts = (f"{name} {value / size:.{digits}f}" for name, value in zip(expected._fields, expected, strict=True))
    return f"about {expected.total / size:.{digits}f} {unit} a process ({', '.join(parts)})"
