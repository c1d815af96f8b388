"""What a training step takes, memory and floating-point operations: measured while it runs on the meta device.

There tensors have shapes and no contents, so that the real code runs in no time. Networks of one block and of two are
measured, and what the second adds is added for each further one. Attention counts as the fused kernel that it is;
matrix products have the precision of the run.
"""

import weakref
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dinov2cli.config import Config
from dinov2cli.data.augmentations import GLOBAL_CROPS, normalize
from dinov2cli.data.collate import MultiCropBatch
from dinov2cli.device import DTYPES, main_memory_of_a_process
from dinov2cli.train.networks import build_backbone
from dinov2cli.train.objective import SSLMetaArch

GB = 1e9
FLOAT32 = 4
META = torch.device("meta")


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
        """Sum of the parts, GB."""
        return sum(self)


class StepFlops(NamedTuple):
    """Of one batch, in FLOPs: a multiplication and an addition count as two.

    Elementwise operations, softmaxes, normalisations, the optimizer and recomputation are not counted.
    """

    step: float
    """What the step computes, forward and backward; in the last block, most of it for the tokens in use alone."""
    whole: float
    """The same with every token of the last block."""


def estimate(config: Config, *, world_size: int, sharding: str, precision: str) -> MemoryEstimate:
    """Peak memory of one training process.

    Not counted are the interpreter, the libraries (on a GPU its context, half a gigabyte to one) and the loader's
    batches.

    Args:
        config: the run.
        world_size: processes.
        sharding: `none`, `ddp` or `fsdp` (parameters, gradients and moments split over the processes).
        precision: `fp32`, `bf16` or `fp16`, the dtype of matrix products; parameters are float32 always.
    """
    first, second = (_measure(_of_depth(config, depth), precision) for depth in (1, 2))
    of_block = [two - one for one, two in zip(first.bytes, second.bytes, strict=True)]
    block = of_block[0]
    if config.train.activation_checkpointing:
        of_block[2] = first.stream  # all that is kept of a block, until it is computed again
    student, followers, peak = (
        one + (config.arch().depth - 1) * more for one, more in zip(first.bytes, of_block, strict=True)
    )
    shards, kept, gathered = 1, 0.0, 0.0
    if sharding == "fsdp":
        shards = world_size
        # The student's stay whole from forward to backward; in half precision the measured copies are these.
        kept = student if precision == "fp32" else 0.0
        # Two blocks and a head: the one at work and the next, of the followers' weights and the student's gradients.
        gathered = DTYPES[precision].itemsize / FLOAT32 * (2 * block + first.head)
    expected = MemoryEstimate(
        parameters=(student / shards + kept) / GB,
        gradients=(student / shards + gathered) / GB,
        optimizer=2 * student / shards / GB,
        teacher=(followers / shards + gathered) / GB,
        activations=peak / GB,
        workspace=0.0,
    )
    return expected._replace(workspace=0.05 * expected.total)


def step_flops(config: Config) -> StepFlops:
    """FLOPs of an average step."""
    first, second = (_measure(_of_depth(config, depth), "fp32") for depth in (1, 2))
    step = first.flops + (config.arch().depth - 1) * (second.flops - first.flops)
    return StepFlops(step, step + second.left_out)


def class_token_flops(config: Config, image_size: int) -> int:
    """FLOPs of the class token of one square image of `image_size` pixels."""
    with META, torch.no_grad(), _Meter() as meter:
        build_backbone(config).eval()(torch.empty(1, 3, image_size, image_size))
    return meter.flops


class _Measured(NamedTuple):
    bytes: tuple[float, float, float]
    """Parameters of the student and of all followers, float32; the most that a step holds beside them and gradients."""
    head: float
    """Parameters of the largest head, float32."""
    stream: float
    """The tokens of all crops, float32."""
    flops: float
    left_out: float
    """FLOPs that the last block saves."""


def _measure(config: Config, precision: str) -> _Measured:
    with META, torch.enable_grad():  # a step has gradients, even if the caller has switched them off
        objective, batch = SSLMetaArch(config).train(), _meta_batch(config)
        networks = objective.networks
        for parameter in networks.student.parameters():
            parameter.grad = torch.zeros_like(parameter)
        known = [*objective.parameters(), *objective.buffers(), batch.global_crops, batch.local_crops]
        known += [parameter.grad for parameter in networks.student.parameters() if parameter.grad is not None]
        with _Meter(known, DTYPES[precision]) as meter:
            total = objective(batch, {"iteration": 0, "teacher_temp": 1.0}, torch.Generator().manual_seed(0)).total
            total.backward()
        crops = [views for views in (batch.global_crops, batch.local_crops) if len(views)]
        stream, _ = networks.student.backbone.prepare_tokens([normalize(views) for views in crops], [None] * len(crops))
    blocks = [meter.flops_within(f"{name}.backbone.blocks") for name, _ in networks.named()]
    followers = sum(_size(network) for network in networks.followers.values())
    return _Measured(
        bytes=(_size(networks.student), followers, meter.peak),
        head=max(_size(head) for head in networks.student.heads()),
        stream=float(FLOAT32 * stream.numel()),
        flops=meter.flops,
        left_out=sum(flops[0] - flops[-1] for flops in blocks if flops),
    )


def _size(module: nn.Module) -> float:
    return float(FLOAT32 * sum(parameter.numel() for parameter in module.parameters()))


def _of_depth(config: Config, depth: int) -> Config:
    """The same with fewer blocks, of which each drops what is dropped on average; nothing is computed again."""
    student = config.student
    rate = student.drop_path_rate if student.drop_path_uniform else student.drop_path_rate / 2
    changes = {"depth": depth, "drop_path_rate": rate, "drop_path_uniform": True}
    train = config.train.model_copy(update={"activation_checkpointing": False})
    return config.model_copy(update={"student": student.model_copy(update=changes), "train": train})


def _meta_batch(config: Config) -> MultiCropBatch:
    """Shapes of a batch in which as much is masked as on average."""
    crops, batch = config.crops, config.train.batch_size_per_gpu
    patches = (crops.global_crops_size // config.student.patch_size) ** 2
    masked = masked_patches(config)
    sizes = ((GLOBAL_CROPS, crops.global_crops_size), (crops.local_crops_number, crops.local_crops_size))
    views = [torch.empty(number * batch, size, size, 3, dtype=torch.uint8) for number, size in sizes]
    masks = torch.empty(GLOBAL_CROPS * batch, patches, dtype=torch.bool)
    indices, weights = torch.empty(masked, dtype=torch.int64), torch.empty(masked)
    samples = torch.empty(batch, dtype=torch.int64)
    return MultiCropBatch(views[0], views[1], masks, indices, weights, iteration=0, samples=samples)


def masked_patches(config: Config) -> int:
    """Masked patches of a batch as they are on average."""
    if not config.ibot.loss_weight:
        return 0
    low, high = config.ibot.mask_ratio_min_max
    images = int(GLOBAL_CROPS * config.train.batch_size_per_gpu * config.ibot.mask_sample_probability)
    patches = (config.crops.global_crops_size // config.student.patch_size) ** 2
    return round(images * patches * (low + high) / 2)


class _Meter(ExitStack):
    """Counts FLOPs, and the most bytes that arrays made within it take at once.

    Args:
        known: arrays that do not count.
        dtype: of matrix products.
    """

    def __init__(self, known: Iterable[Tensor] = (), dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.counter, self.arrays = FlopCounterMode(display=False), _Arrays(known)
        self.precision = _Precision(dtype)

    def __enter__(self) -> "_Meter":
        for mode in (self.counter, self.arrays, self.precision):
            self.enter_context(mode)
        return self

    @property
    def flops(self) -> int:
        return self.counter.get_total_flops() + self.precision.attention_flops

    @property
    def peak(self) -> float:
        return float(self.arrays.peak)

    def flops_within(self, modules: str) -> list[int]:
        """Of each of the modules with such a name and a number, in order, without attention."""
        counts = self.counter.get_flop_counts()
        found = {name: sum(of.values()) for name, of in counts.items() if name.rpartition(".")[0].endswith(modules)}
        return [found[name] for name in sorted(found)]


class _Arrays(TorchDispatchMode):
    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known = [tensor.untyped_storage() for tensor in known]  # held, so that no other gets their numbers
        self.there = {id(storage) for storage in self.known}
        self.held = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and id(storage := tensor.untyped_storage()) not in self.there:
                self.there.add(id(storage))
                self.held += storage.nbytes()
                weakref.finalize(storage, self._freed, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.held)
        return result

    def _freed(self, number: int, size: int) -> None:
        self.there.discard(number)
        self.held -= size


class _Precision(TorchFunctionMode):
    """What autocast does on a GPU, which the meta device does not know; and attention as one kernel."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtypes = dict.fromkeys((F.linear, F.conv2d, torch.conv2d, F.scaled_dot_product_attention), dtype)
        self.dtypes[F.layer_norm] = torch.float32
        self.attention_flops = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (dtype := self.dtypes.get(func)) is not None:
            args = [each.to(dtype) if isinstance(each, Tensor) else each for each in args]
            kwargs = {key: each.to(dtype) if isinstance(each, Tensor) else each for key, each in (kwargs or {}).items()}
        if func is F.scaled_dot_product_attention:
            q, k, _ = args
            self.attention_flops += (3 if q.requires_grad else 1) * 4 * q.numel() * k.shape[-2]
            return _FusedAttention.apply(*args)  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


class _FusedAttention(torch.autograd.Function):
    """Shapes of [b, H, L, C], as a kernel lays them out: by token."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        answered = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        ctx.save_for_backward(q, k, v, answered)
        return answered

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(each) for each in ctx.saved_tensors[:3])


def room_for_gaps(expected: MemoryEstimate) -> bool:
    """Whether a process on the CPU may keep freed memory (`train.allocator`).

    Reused memory has gaps: a step then needs up to a fifth more. Interpreter and loader take a gigabyte.
    """
    return 1.25 * expected.total + 1 < main_memory_of_a_process() / GB


def describe(expected: MemoryEstimate) -> str:
    """One line for a plan."""
    unit, size, digits = ("GB", 1.0, 1) if expected.total >= 1 else ("MB", 1e-3, 0)
    parts = (f"{name} {value / size:.{digits}f}" for name, value in zip(expected._fields, expected, strict=True))
    return f"about {expected.total / size:.{digits}f} {unit} a process ({', '.join(parts)})"
