"""What is counted while code runs on the meta device: arrays that are held, and attention's operations."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class Arrays(TorchDispatchMode):
    """Bytes of arrays made within it: those that are `held`, and the most that were at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.there: dict[int, int] = {}
        """Their sizes in bytes."""
        self.held = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.hold(result if isinstance(result, tuple | list) else (result,))
        return result

    def hold(self, results: Iterable[Any]) -> None:
        """Count those of an operator's results that are new arrays, until they are freed."""
        for tensor in results:
            if isinstance(tensor, Tensor) and id(storage := tensor.untyped_storage()) not in self.there:
                self.resize(id(storage), storage.nbytes())
                weakref.finalize(storage, self._freed, id(storage))

    def resize(self, number: int, size: int) -> None:
        """The array of this number, an `id`, takes so many bytes now."""
        self.held += size - self.there.get(number, 0)
        self.there[number] = size
        self.peak = max(self.peak, self.held)

    def begin_again(self) -> int:
        """The peak so far; from now on, that of what follows is found."""
        before, self.peak = self.peak, self.held
        return before

    def _freed(self, number: int) -> None:
        self.held -= self.there.pop(number)


class MatrixPrecision(TorchFunctionMode):
    """What autocast does on a GPU, which the meta device does not know; and attention as one kernel."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtypes = dict.fromkeys((F.linear, F.conv2d, torch.conv2d, F.scaled_dot_product_attention), dtype)
        self.dtypes[F.layer_norm] = self.dtypes[F.rms_norm] = torch.float32
        self.attention_flops = 0

    def count_attention_of(self, network: nn.Module) -> list[int]:
        """To which every pass of the network adds the FLOPs of its attention."""
        parts: list[int] = []
        network.register_forward_pre_hook(lambda *_: parts.append(-self.attention_flops))
        network.register_forward_hook(lambda *_: parts.append(self.attention_flops))
        return parts

    def around(self, part: Callable[..., Any]) -> Callable[..., Any]:
        """What may be computed again in the backward pass, which PyTorch runs outside of modes like this one."""

        def within(*inputs: Any) -> Any:
            with self:
                return part(*inputs)

        return within

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (dtype := self.dtypes.get(func)) is not None:
            args, kwargs = tree_map_only(Tensor, lambda each: each.to(dtype), (args, kwargs))
        if func is F.scaled_dot_product_attention:
            q, k, _ = args
            self.attention_flops += (3 if q.requires_grad else 1) * 4 * q.numel() * k.shape[-2]
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args)[0]
        result = func(*args, **(kwargs or {}))
        # The stream is float32 under autocast (`exact_under_autocast`), which is not seen here.
        return result.float() if func in (F.conv2d, torch.conv2d) else result
