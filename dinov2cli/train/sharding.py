"""How the networks are spread over processes: not at all, replicated (DDP), or sharded (FSDP2).

The model knows nothing of it. Both ways average the gradients of the processes' own mean losses, as the reference does,
so that two processes with half the batch each do what one does with the whole.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dinov2cli import distributed
from dinov2cli.config import Config
from dinov2cli.device import Precision
from dinov2cli.errors import ConfigError
from dinov2cli.models.library_backbone import Backbone
from dinov2cli.train.cost import estimate
from dinov2cli.train.networks import OF_ANOTHER, SSLNetwork, build_backbone
from dinov2cli.train.objective import SSLMetaArch


def choose_sharding(config: Config, precision: Precision, world_size: int) -> tuple[str, str]:
    """`none`, `ddp` or `fsdp`, and the reason in words.

    Raises:
        ConfigError: the wish, `train.sharding`, cannot be had.
    """
    asked, scaled = config.train.sharding, precision.scale_gradients
    if asked == "none" and world_size > 1:
        raise ConfigError(
            f"train.sharding=none with {world_size} processes: nothing would combine their gradients",
            "Use ddp, fsdp or auto.",
        )
    if asked == "fsdp" and scaled:
        raise ConfigError(
            "train.sharding=fsdp with compute_precision.precision=fp16 and a gradient scaler",
            "Use precision bf16, or train.sharding=ddp.",
        )
    if asked != "auto":
        return asked, "as configured"
    if world_size == 1:
        return "none", "one process"
    if precision.device.type == "cuda" and not scaled:
        needed_gb = estimate(config, world_size=world_size, sharding="ddp", precision=precision.name).total
        there = torch.cuda.get_device_properties(precision.device).total_memory / 1e9
        needs = f"about {needed_gb:.0f} GB of the device's {there:.0f} GB"
        if needed_gb > 0.85 * there:
            return "fsdp", f"a replica would need {needs}"
        return "ddp", f"a replica needs {needs}"
    return "ddp", "a replica in every process"


class Sharding:
    """The networks of an objective, spread in place over the processes; parameters keep their names.

    Args:
        objective: on its device, with the same weights in every process.
        mode: `none`, `ddp` or `fsdp`.
        precision: FSDP gathers the parameters of blocks and heads, and reduces the blocks' gradients, in its dtype; the
            heads' gradients are reduced in float32, as in the reference.
    """

    def __init__(self, objective: SSLMetaArch, mode: str, precision: Precision) -> None:
        self.objective, self.networks = objective, objective.networks
        self.mode = mode
        self._ddp: DistributedDataParallel | None = None
        if mode == "ddp":
            self._ddp = DistributedDataParallel(
                self.networks.student, gradient_as_bucket_view=True, broadcast_buffers=False
            )
            objective.forward_student = self._ddp.__call__
        elif mode == "fsdp":
            # The outputs are views, which is harmless as long as nobody writes into them, and the losses do not.
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
            # The student's parameters stay whole from forward to backward, which saves gathering them again; the
            # followers have no backward.
            for network in (each for _, each in self.networks.named() if not isinstance(each, FSDPModule)):
                _shard_network(network, precision, reshard_after_forward=network is not self.networks.student)

    @contextmanager
    def averaging_gradients(self, now: bool) -> Iterator[None]:
        """Around one backward pass: whether it combines the processes' gradients, or keeps adding to its own."""
        if self._ddp is not None and not now:
            with self._ddp.no_sync():
                yield
            return
        if isinstance(self.networks.student, FSDPModule):
            self.networks.student.set_requires_gradient_sync(now)
        yield

    def teacher_state(self) -> dict[str, Tensor]:
        """The teacher's whole parameters, in main memory, on the first process; empty on the others. Collective."""
        saved = (
            pair for pair in self.networks.teacher.state_dict().items() if not pair[0].startswith(f"{OF_ANOTHER}.")
        )
        whole = {name: _whole(value) for name, value in saved}
        return {name: value.cpu() for name, value in whole.items()} if distributed.is_main() else {}

    def teacher_backbone(self) -> Backbone:
        """The teacher's backbone as an ordinary module: itself or, if it is sharded, a whole copy. Collective."""
        backbone = self.networks.teacher.backbone
        if self.mode != "fsdp":
            return backbone
        state = {name: _whole(value) for name, value in backbone.state_dict().items()}
        copy = build_backbone(self.objective.config, self.objective.attention_backend)
        copy.load_state_dict(state)
        return copy.to(next(iter(state.values())).device).eval()


def _shard_network(network: SSLNetwork, precision: Precision, *, reshard_after_forward: bool) -> None:
    mesh = init_device_mesh(precision.device.type, (distributed.world_size(),))
    dtype = None if precision.dtype == torch.float32 else precision.dtype
    policies = {
        "block": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype, cast_forward_inputs=False),
        "head": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False),
        # Embeddings and the last norm: small, and position embeddings are resized in float32.
        "rest": MixedPrecisionPolicy(),
    }

    def apply(module: nn.Module, policy: str) -> None:
        fully_shard(module, mesh=mesh, mp_policy=policies[policy], reshard_after_forward=reshard_after_forward)

    for block in network.backbone.blocks:
        apply(block, "block")
    for head in network.heads():
        apply(head, "head")
    apply(network, "rest")
    # A block asks for the next one's parameters before it begins, however late the host is. Backward, they are there.
    for block, following in pairwise(network.backbone.blocks):
        assert isinstance(block, FSDPModule) and isinstance(following, FSDPModule)
        block.set_modules_to_forward_prefetch([following])


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value
