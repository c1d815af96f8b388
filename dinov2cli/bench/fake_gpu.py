"""A GPU that is not there: PyTorch's fake CUDA tensors, which have shapes and no contents, and a ledger of what real
ones would cost. For a process that does nothing else: what `pretend` changes stays changed.
"""

import ctypes
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from dinov2cli.bench.traffic import size_of, storage_of, traffic
from dinov2cli.errors import EnvironmentProblem
from dinov2cli.files import digest, replacing
from dinov2cli.site import cache_folder
from dinov2cli.train.counting import Arrays

DEVICE_GUARD = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

using namespace c10;

namespace {
const Device gpu(DeviceType::CUDA, 0);
const Stream queue(Stream::DEFAULT, gpu);

struct Guard : impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device exchangeDevice(Device) const override { return gpu; }
  Device getDevice() const override { return gpu; }
  Stream getStream(Device) const noexcept override { return queue; }
  Stream exchangeStream(Stream) const noexcept override { return queue; }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};

struct Hooks : at::CUDAHooksInterface {
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return false; }
};
Guard guard;
}  // namespace

extern "C" void pretend() {
  static impl::DeviceGuardImplRegistrar registrar(DeviceType::CUDA, &guard);
  auto hooks = const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks());
  if (!hooks->isBuilt()) new (hooks) Hooks();
}
"""
"""What autograd asks of a device: which one it is and its queue. Without a GPU, PyTorch has none and would abort."""

VIEWS = {"device", "detach", "alias", "lift_fresh", "_unsafe_view", "_reshape_alias", "set_", "resize_", "is_pinned"}
EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


def pretend() -> None:
    """Let the work of a GPU be done on fake tensors in this process, forward and backward, under autocast.

    Raises:
        EnvironmentProblem: there is neither a GPU nor a compiler to make up for it.
    """
    if not torch.cuda.is_available():
        ctypes.CDLL(str(_device_guard())).pretend()
    torch.autograd.set_multithreading_enabled(False)  # there are no threads for devices that were not there
    setattr(F, "scaled_dot_product_attention", fused_attention)  # noqa: B010
    setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)  # noqa: B010
    setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)  # noqa: B010


def pretend_group(size: int) -> None:
    """Let this process take itself for the first of so many, each on a fake GPU; the others answer at once."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    there: dict[str, Any] = {"device_count": size, "current_device": 0, "is_initialized": True, "set_device": None}
    for name, answer in there.items():
        setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    setattr(torch.cuda, "Stream", FakeStream)  # noqa: B010
    setattr(torch.cuda, "current_stream", FakeStream)  # noqa: B010
    setattr(torch.cuda, "stream", nullcontext)  # noqa: B010


def _device_guard() -> Path:
    """The library of `DEVICE_GUARD` for this PyTorch, compiled once."""
    name = digest(DEVICE_GUARD + torch.__version__ + sys.platform)[:16]
    library = cache_folder("compiled") / f"device_guard-{name}.so"
    if library.exists():
        return library
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise EnvironmentProblem(
            "a rehearsal needs a GPU or a C++ compiler, and there is no c++ or g++", "Install one, such as g++."
        )
    torch_folder = Path(torch.__file__).parent
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    options = ["-x", "c++", "-std=c++20", "-shared", "-fPIC", abi, f"-I{torch_folder}/include", "-"]
    with replacing(library) as aside:
        libraries = [f"-L{torch_folder}/lib", "-lc10", "-ltorch_cpu"]
        done = subprocess.run(
            [compiler, *options, "-o", aside, *libraries], input=DEVICE_GUARD, capture_output=True, text=True
        )
        if done.returncode:
            said = next((line for line in done.stderr.splitlines() if "error" in line), "it failed")
            raise EnvironmentProblem(f"a rehearsal needs {compiler} to compile for this PyTorch: {said}")
    return library


def fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's attention as the one kernel that it is on a GPU; from fake tensors it would make many."""
    if q.dtype == torch.float32:
        answers: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, q.requires_grad)[0]
    else:
        answers = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
    return answers


class Ledger(Arrays):
    """What the work on a fake GPU costs there: operators, FLOPs, bytes, memory, and where the host would wait.

    Args:
        matrix_rate: FLOP/s of matrix products.
        bandwidth: bytes/s of the GPU's memory.
    """

    def __init__(self, matrix_rate: float, bandwidth: float) -> None:
        super().__init__()
        self.matrix_rate, self.bandwidth = matrix_rate, bandwidth
        self.pinned: dict[int, torch.UntypedStorage] = {}  # held, so that no other gets their numbers
        self.fused = False
        self.begin()
        setattr(torch.cuda, "synchronize", lambda device=None: self.wait("synchronize"))  # noqa: B010
        setattr(torch.cuda, "Event", lambda **_: FakeEvent(self))  # noqa: B010
        setattr(torch.UntypedStorage, "resize_", self._resize(torch.UntypedStorage.resize_))  # noqa: B010

    def begin(self) -> None:
        """Count from here on; memory that is held stays counted."""
        self.waits: Counter[str] = Counter()
        """Places that ask the GPU for a number or a shape."""
        self.copies: Counter[str] = Counter()
        """Places that copy between host and GPU and wait for it."""
        self.bytes: Counter[str] = Counter()
        """By operator, without matrix products."""
        self.communicated = 0
        """Bytes that come from or go to other GPUs."""
        self.operators, self.flops, self.peak = 0, 0, self.held
        self.matrix_s = self.other_s = 0.0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """It is not there while something is compiled, and is again when that runs."""
        return True

    @contextmanager
    def compiled(self, kernels: Mapping[str, int], launched: int) -> Iterator[None]:
        """Around the operators of a graph that is compiled to so many kernels, which move these bytes.

        Of the operators only matrix products are counted.
        """
        self.bytes.update(kernels)
        self.other_s += sum(kernels.values()) / self.bandwidth
        self.operators += launched
        self.fused = True
        try:
            yield
        finally:
            self.fused = False

    def wait(self, name: str) -> None:
        """The host waits, in an operator or function of this name."""
        self.waits[f"{name} in {place()}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # comes again, with what this GPU has of it
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if name in ("_pin_memory", "is_pinned"):
            return self._pin(given[0]) if name == "_pin_memory" else self._is_pinned(given[0])
        asked = [tensor for tensor in given if tensor.is_cuda]
        if name == "_local_scalar_dense" and asked:
            self.wait(name)
            # No: draws of weights that were out of bounds, say, would be repeated for ever.
            return False if asked[0].dtype == torch.bool else 1.0 if asked[0].is_floating_point() else 1
        try:
            result = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            if not asked:
                raise
            self.wait(name)
            result = self._as_if_all(name, args)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if kwargs.get("pin_memory"):
            self.pinned |= {storage_of(tensor): tensor.untyped_storage() for tensor in made}
        if (
            func._overloadpacket in flop_registry or not self.fused
        ):  # of what is fused, arrays are what matrix products read and write
            self.hold([tensor for tensor in (*made, *asked) if tensor.is_cuda])
        if (asked or any(tensor.is_cuda for tensor in made)) and not (func.is_view or name in VIEWS | EMPTY):
            self._count(func, name, args, kwargs, given, result)
        return result

    def _count(self, func: Any, name: str, args: Any, kwargs: Any, given: list[Tensor], result: Any) -> None:
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if self._waits_for_copy(name, args, kwargs, given, made):
            self.copies[f"{name} in {place()}"] += 1
        formula = flop_registry.get(func._overloadpacket)
        if self.fused and formula is None and func.namespace != "c10d":
            return  # counted with its kernel
        self.operators += 1
        if func.namespace == "c10d":
            self.communicated += max(size_of(tensor) for tensor in [*given, *made])
            return
        size = traffic(func, name, args, kwargs, given, made)
        if formula:
            flops = formula(*args, **kwargs, out_val=result)
            self.flops += flops
            self.matrix_s += max(flops / self.matrix_rate, size / self.bandwidth)
        else:
            self.bytes[name] += size
            self.other_s += size / self.bandwidth

    def _waits_for_copy(self, name: str, args: Any, kwargs: Any, given: list[Tensor], made: list[Tensor]) -> bool:
        """Whether the host waits for a copy: unless it is asked for without, and main memory is page-locked."""
        if name not in ("copy_", "_to_copy"):
            return any(not tensor.is_cuda and tensor.dim() for tensor in given)  # an index in main memory, say
        source, target = (args[1], args[0]) if name == "copy_" else (given[0], made[0])
        if source.is_cuda == target.is_cuda:
            return False
        background = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
        if name == "_to_copy" and source.is_cuda:
            return not background  # PyTorch makes its target page-locked
        in_main_memory = target if source.is_cuda else source
        return in_main_memory.dim() > 0 and not (background and self._is_pinned(in_main_memory))

    def _resize(self, resize: Any) -> Any:
        """Memory that is freed and fetched again without an operator, as FSDP does with what it has gathered."""

        def resized(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            result: torch.UntypedStorage = resize(storage, size)
            if id(storage) in self.there:
                self.resize(id(storage), size)
            return result

        return resized

    def _pin(self, tensor: Tensor) -> Tensor:
        pinned = torch.empty_like(tensor)
        self.pinned[storage_of(pinned)] = pinned.untyped_storage()
        return pinned

    def _is_pinned(self, tensor: Tensor) -> bool:
        return storage_of(tensor) in self.pinned

    def _as_if_all(self, name: str, args: Any) -> Any:
        """A result for a shape that depends on numbers: as if none were zero or false."""
        if name == "nonzero":
            return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
        if name == "index":
            indices: list[Any] = []
            for each in args[1]:
                is_mask = each is not None and each.dtype == torch.bool
                indices += self._as_if_all("nonzero", (each,)).unbind(1) if is_mask else [each]
            return args[0][tuple(slice(None) if index is None else index for index in indices)]
        if name == "masked_select":
            return args[0].flatten()
        raise EnvironmentProblem(f"{name} in {place()} waits for the GPU, and the rehearsal cannot go on from there")


class FakeEvent:
    """`torch.cuda.Event` on a GPU that is always done."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def record(self, stream: object = None) -> None:
        pass

    def synchronize(self) -> None:
        self.ledger.wait("Event.synchronize")


class FakeStream:
    """`torch.cuda.Stream`, of which there is one."""

    def __init__(self, *_: object, **options: object) -> None:
        pass

    def wait_stream(self, other: object) -> None:
        pass

    wait_event = wait_stream

    def record_event(self, event: object = None) -> object:
        return event or torch.cuda.Event()


def place() -> str:
    """The line of dino2 that is at work; for a gradient that PyTorch computes, the one that asked for it."""
    package, frame = str(Path(__file__).parents[1]), sys._getframe(1)
    while frame.f_back is not None:
        file = frame.f_code.co_filename
        if file.startswith(package) and not file.startswith(f"{package}/bench"):
            return f"{Path(file).relative_to(package)}:{frame.f_lineno}"
        frame = frame.f_back
    return "no line of dino2"
