"""The memory estimate against what autograd keeps, and against the hardware the presets were made for."""

import pytest
import torch

from dinov2cli.bench.train import synthetic_batch
from dinov2cli.config import load_config
from dinov2cli.train.memory import MemoryEstimate, estimate, room_for_gaps
from dinov2cli.train.objective import SSLMetaArch

SIZES = [
    "student.arch=vit_tiny", "student.depth=4", "student.patch_size=14", "crops.global_crops_size=98",
    "crops.local_crops_size=56", "crops.local_crops_number=4", "dino.head_n_prototypes=4096",
    "dino.head_hidden_dim=256", "dino.head_bottleneck_dim=64", "train.batch_size_per_gpu=8",
]  # fmt: skip


@pytest.mark.parametrize(
    "variant",
    [
        [],
        ["student.drop_path_rate=0.0"],
        ["student.ffn_layer=swiglufused", "ibot.separate_head=true", "ibot.head_n_prototypes=2048"],
    ],
)
def test_activations_are_those_that_autograd_keeps(variant: list[str]) -> None:
    config = load_config(overrides=[*SIZES, *variant])
    torch.manual_seed(0)
    objective, batch = SSLMetaArch(config).train(), synthetic_batch(config)
    parameters = {p.untyped_storage().data_ptr() for p in objective.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = objective(batch, {"iteration": 0, "teacher_temp": 0.05})
    assert losses.total.isfinite()
    expected = estimate(config, world_size=1, sharding="none", precision="fp32")
    masked = batch.mask_indices.shape[0]
    of_patches = config.ibot.head_n_prototypes if config.ibot.separate_head else config.dino.head_n_prototypes
    later = 4 * (6 * 8 * config.dino.head_n_prototypes + masked * of_patches)  # the gradient of the student's scores
    before_backward = (expected.activations + expected.prototypes) * 1e9 - later
    assert sum(storage.nbytes() for storage in kept.values()) == pytest.approx(before_backward, rel=0.15)


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

    assert total("train.activation_checkpointing=true") < total() < total(precision="fp32")
    assert total(sharding="fsdp", world_size=64) < total(sharding="fsdp") < total()
    assert total("train.batch_size_per_gpu=6") < total()


def test_freed_memory_is_kept_only_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = MemoryEstimate(1, 2, 3, 4, 5, 3, 2)  # 20 GB
    for gigabytes, processes, kept in ((24, 1, False), (32, 1, True), (32, 2, False), (64, 2, True)):
        monkeypatch.setattr("dinov2cli.device.main_memory", lambda there=gigabytes: there * 10**9)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert room_for_gaps(expected) == kept


def test_parts_make_the_total() -> None:
    assert MemoryEstimate(1, 2, 3, 4, 5, 6, 7).total == 28
