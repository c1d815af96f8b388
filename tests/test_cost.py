"""What a step is said to take against what it takes, and against the hardware the presets were made for."""

import sys
import time
from collections.abc import Sequence

import pytest
import ready
import torch
from tiny_run import AUGMENTED_ROPE, DINOV3
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dinov2cli.bench.train import synthetic_batch
from dinov2cli.config import Config, load_config
from dinov2cli.train.cost import MemoryEstimate, _measure, class_token_flops, estimate, room_for_gaps, step_flops
from dinov2cli.train.networks import build_backbone
from dinov2cli.train.objective import SSLMetaArch

VALUES = {"iteration": 0, "teacher_temp": 0.05}
SIZES = [
    "student.arch=vit_tiny", "student.depth=4", "student.patch_size=14", "crops.global_crops_size=98",
    "crops.local_crops_size=56", "crops.local_crops_number=4", "dino.head_n_prototypes=4096",
    "dino.head_hidden_dim=256", "dino.head_bottleneck_dim=64", "train.batch_size_per_gpu=8",
]  # fmt: skip
VARIANTS = [
    [],
    ["student.drop_path_rate=0.0"],
    ["student.drop_path_uniform=false"],
    ["student.ffn_layer=swiglufused", "ibot.separate_head=true", "ibot.head_n_prototypes=2048"],
    [*DINOV3, *AUGMENTED_ROPE],
    ["ibot.separate_head=true", "ibot.head_n_prototypes=8192", "ibot.head_hidden_dim=2048", "ibot.head_nlayers=5"],
]


def config_of(*overrides: str) -> Config:
    return load_config(overrides=[*SIZES, *overrides])


def gigabytes(config: Config) -> MemoryEstimate:
    return estimate(config, world_size=1, sharding="none", precision="fp32")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_holds_what_autograd_keeps_and_its_gradients(variant: list[str]) -> None:
    config = config_of(*variant)
    torch.manual_seed(0)
    objective, batch = SSLMetaArch(config).train(), synthetic_batch(config)
    parameters = {p.untyped_storage().data_ptr() for p in objective.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = objective(batch, VALUES)
    assert losses.total.isfinite()
    masked = batch.mask_indices.shape[0]
    of_patches = config.ibot.head_n_prototypes if config.ibot.separate_head else config.dino.head_n_prototypes
    later = 4 * (6 * 8 * config.dino.head_n_prototypes + masked * of_patches)  # the gradient of the student's scores
    pixels = 3 * 4 * 8 * (2 * 98**2 + 4 * 56**2)
    held = sum(storage.nbytes() for storage in kept.values()) + later + pixels
    # What is held beside that: the last block's other tokens, a head's gradients.
    assert gigabytes(config).activations * 1e9 == pytest.approx(held, rel=0.2)


@pytest.mark.parametrize("variant", [VARIANTS[1], [*VARIANTS[1], *VARIANTS[3]], [*VARIANTS[1], *VARIANTS[5]]])
def test_flops_are_those_that_pytorch_counts_in_a_whole_step(variant: list[str]) -> None:
    config = config_of(*variant)
    objective, batch = SSLMetaArch(config).train(), synthetic_batch(config)
    # PyTorch's counter knows attention only as the two products that it is made of.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        objective(batch, VALUES).total.backward()
    expected = step_flops(config)
    # Of the last block, the meta device computes what a GPU does: attention of all tokens.
    assert expected.step == pytest.approx(counted.get_total_flops(), rel=0.05)
    assert counted.get_total_flops() < expected.whole < 1.5 * expected.step


def test_a_class_token_is_counted_as_pytorch_counts_it() -> None:
    config = config_of("student.num_register_tokens=1")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted, torch.no_grad():
        build_backbone(config).eval()(torch.randn(3, 3, 56, 56))
    assert 3 * class_token_flops(config, 56) == pytest.approx(counted.get_total_flops(), rel=0.1)


@pytest.mark.parametrize("recomputed", ["false", "selective", "true"])
@pytest.mark.parametrize("part", ["all", "last:2", "lora:8"])
def test_depth_is_extrapolated_to_what_a_deep_network_takes(part: str, recomputed: str) -> None:
    deep = config_of("student.depth=7", f"student.train={part}", "student.pretrained_weights=some",
                     f"train.activation_checkpointing={recomputed}")  # fmt: skip
    whole = _measure(deep, 7, "fp32", trained=2)
    if recomputed == "false":
        assert step_flops(deep).step == pytest.approx(whole.flops, rel=1e-9)
    expected = gigabytes(deep)
    student, followers, peak = (each * 1e-9 for each in whole[:3])
    assert (expected.parameters, expected.teacher) == pytest.approx((student, followers), rel=1e-9)
    assert expected.activations == pytest.approx(peak, rel=0.02)
    assert expected.optimizer == pytest.approx(2e-9 * whole.trained, rel=1e-9)
    assert (expected.gradients < 0.7 * expected.parameters) == (part != "all")


def test_stochastic_depth_and_recomputation_save_what_they_drop() -> None:
    whole, dropped = (step_flops(config_of(f"student.drop_path_rate={rate}")).step for rate in (0.0, 0.5))
    assert 0.5 * whole < dropped < 0.9 * whole  # teacher, heads and embedding stay
    recomputed = config_of("train.activation_checkpointing=true", "student.depth=12")
    assert gigabytes(recomputed).activations < 0.7 * gigabytes(config_of("student.depth=12")).activations
    assert step_flops(recomputed) == step_flops(config_of("student.depth=12"))


def test_presets_fit_the_gpus_they_are_for() -> None:
    large = load_config(preset="vitl16_short")
    assert large.train.batch_size_per_gpu == 64 and not large.train.activation_checkpointing
    assert estimate(large, world_size=32, sharding="ddp", precision="bf16").total < 70
    giant = load_config(preset="vitg14")
    assert estimate(giant, world_size=8, sharding="fsdp", precision="bf16").total < 70


def test_what_saves_memory_does() -> None:
    def total(*overrides: str, world_size: int = 8, sharding: str = "ddp", precision: str = "bf16") -> float:
        config = load_config(preset="vitg14", overrides=overrides)
        return estimate(config, world_size=world_size, sharding=sharding, precision=precision).total

    recomputed, selective = (total(f"train.activation_checkpointing={how}") for how in ("true", "selective"))
    assert recomputed + 5 < selective < total() - 5 and total() < total(precision="fp32")
    for how, rehearsed in (("false", 24.4), ("selective", 17.5), ("true", 9.4)):  # docs/speed.md
        assert rehearsed < total(f"train.activation_checkpointing={how}", sharding="fsdp") < 1.2 * rehearsed
    assert total(sharding="fsdp", world_size=64) < total(sharding="fsdp") < total()
    assert total("train.batch_size_per_gpu=6") < total()


def test_measuring_takes_no_time() -> None:
    def seconds(batch: int, *others: str) -> float:
        words = [f"train.batch_size_per_gpu={batch}", *others]
        giant, began = load_config(preset="vitg14", overrides=words), time.process_time()
        estimate(giant, world_size=8, sharding="fsdp", precision="bf16")
        return time.process_time() - began

    seconds(11)  # what PyTorch sets up once
    assert seconds(13) < 1.5
    others = "train.output_dir=other", "train.seed=1", "optim.base_lr=0.001", "teacher.momentum_teacher=0.9"
    assert seconds(13, *others) < 0.1, "it is known"


GROWTH = """
import re, torch
from dinov2cli.config import load_config
from dinov2cli.bench.train import synthetic_batch
from dinov2cli.train.objective import SSLMetaArch
config = load_config(overrides={overrides})
batch = synthetic_batch(config)
torch.ones(64, 64) @ torch.ones(64, 64)
def most():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
open("/proc/self/clear_refs", "w").write("5")  # forget the peak of the imports
before = most()
objective = SSLMetaArch(config).train()
objective(batch, {{"iteration": 0, "teacher_temp": 0.05}}).total.backward()
print((most() - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc says how much is resident")
@pytest.mark.parametrize(
    "variant", [["train.batch_size_per_gpu=32"], [*VARIANTS[4], *VARIANTS[5], "train.batch_size_per_gpu=32"]]
)
def test_resident_memory_grows_by_what_is_expected(variant: list[str]) -> None:
    code = GROWTH.format(overrides=[*SIZES, *variant])
    grown = int(ready.server().run(code=code).stdout)
    expected = gigabytes(config_of(*variant))
    without_optimizer = (expected.total - expected.optimizer) * 1e9
    assert grown == pytest.approx(without_optimizer, rel=0.25)


def test_a_follower_more_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    from test_objective import gram

    from dinov2cli.train.objective import TERMS

    before = gigabytes(config_of())
    monkeypatch.setitem(TERMS, "gram", gram)
    after = gigabytes(config_of())
    backbone = sum(parameter.numel() for parameter in build_backbone(config_of()).parameters())
    assert after.teacher - before.teacher == pytest.approx(4e-9 * backbone, rel=1e-6)
    assert after.activations > before.activations


def test_freed_memory_is_kept_only_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = MemoryEstimate(1, 2, 3, 4, 8, 2)  # 20 GB
    for there, processes, kept in ((24, 1, False), (32, 1, True), (32, 2, False), (64, 2, True)):
        monkeypatch.setattr("dinov2cli.device.main_memory", lambda there=there: there * 10**9)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert room_for_gaps(expected) == kept


def test_parts_make_the_total() -> None:
    assert MemoryEstimate(1, 2, 3, 4, 5, 6).total == 21


def test_the_largest_head_counts_whosever_it_is() -> None:
    """The patches' own head may be larger than the class tokens', and is gathered beside two blocks."""
    small, large = (
        config_of("ibot.separate_head=true", f"ibot.head_n_prototypes={number}") for number in (16, 1_000_000)
    )
    heads = [sum(p.numel() for p in head.parameters()) for config in (small, large) for head in _heads(config)]
    assert max(heads) == heads[-1]
    sharded = [estimate(config, world_size=4, sharding="fsdp", precision="bf16") for config in (small, large)]
    more = heads[-1] - heads[1]
    gathered = heads[-1] - max(heads[:2])
    expected = (4 * more / 4 + 2 * gathered) * 1e-9
    assert sharded[1].teacher - sharded[0].teacher == pytest.approx(expected, rel=1e-6)


def _heads(config: Config) -> Sequence[nn.Module]:
    with torch.device("meta"):
        return SSLMetaArch(config).student.heads()
