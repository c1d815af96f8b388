"""torch.compile for a GPU that is not there: Inductor decides which kernels it would write, and they are counted.

What it decides depends on shapes and the kind of card alone, so neither a GPU nor Triton is needed. The graph's
operators run instead, on fake tensors, and of these only the matrix products, which it leaves as they are, are counted.
For a process that does nothing else, like `fake_gpu`.
"""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import torch
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import scheduler
from torch._inductor.graph import GraphLowering
from torch.fx import Interpreter
from torch.utils.flop_counter import flop_registry

from dinov2cli.bench.fake_gpu import Ledger

HOPPER = SimpleNamespace(
    name="H100",
    gcnArchName="",
    major=9,
    minor=0,
    multi_processor_count=132,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
)
"""What Inductor asks of a card: how it splits large sums depends on it."""


def pretend_compiler(ledger: Ledger) -> None:
    """Let torch.compile work on fake CUDA tensors in this process, its graphs made for each size anew.

    A kernel counts as reading each of its arrays once, and writing each once, as Inductor itself reckons.
    """
    answers: dict[str, Any] = {
        "is_available": True,
        "is_bf16_supported": True,
        "get_compute_capability": 90,
        "get_device_properties": HOPPER,
    }
    for name, answer in answers.items():
        setattr(CudaInterface, name, staticmethod(lambda *_, answer=answer, **__: answer))
    setattr(CudaInterface.Worker, "get_device_properties", staticmethod(lambda *_: HOPPER))  # noqa: B010
    setattr(torch.cuda, "get_device_properties", lambda *_: HOPPER)  # noqa: B010
    setattr(scheduler, "has_triton", lambda: True)  # noqa: B010
    setattr(GraphLowering, "compile_to_module", lambda graph: _module(graph, ledger))  # noqa: B010
    # Sizes are the run's own in each graph; a compiled training has one for several.
    dynamo, inductor = torch._dynamo.config, torch._inductor.config
    dynamo.automatic_dynamic_shapes, dynamo.recompile_limit, dynamo.accumulated_recompile_limit = False, 1000, 1000
    inductor.fx_graph_cache = inductor.joint_graph_constant_folding = False
    inductor.compile_threads = 1  # else it begins processes for code that is never compiled


def _module(graph: GraphLowering, ledger: Ledger) -> SimpleNamespace:
    """What stands for the file that Inductor would write, after its kernels are decided."""
    graph.init_wrapper_code()
    graph._update_scheduler()
    kernels: Counter[str] = Counter()
    launched = 0
    for node in graph.scheduler.nodes:
        origins = [origin.target for part in node.get_nodes() if part.node for origin in part.node.get_origins()]
        size = node.get_read_write_buffers_sizes()
        if size and not any(getattr(target, "_overloadpacket", None) in flop_registry for target in origins):
            names = dict.fromkeys(str(target).split(".")[-2] for target in origins if "convert" not in str(target))
            kernels["+".join(names)[:60] or "cast"] += size
            launched += 1

    def call(arguments: list[Any]) -> Any:
        with ledger.compiled(kernels, launched):
            results = Interpreter(graph.module).boxed_run(arguments)
            ledger.hold(results)
            return results

    return SimpleNamespace(call=call, runner=None, key="", __file__=None)
