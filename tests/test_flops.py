"""The analytic count of a step's FLOPs against PyTorch's counter on the networks themselves."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dinov2cli.bench.train import synthetic_batch
from dinov2cli.config import Config, load_config
from dinov2cli.train.flops import forward_flops, step_flops
from dinov2cli.train.objective import SSLMetaArch

SIZES = [
    "student.arch=vit_tiny", "student.embed_dim=48", "student.depth=3", "student.num_heads=2", "student.patch_size=14",
    "crops.global_crops_size=56", "crops.local_crops_size=28", "crops.local_crops_number=3",
    "dino.head_n_prototypes=64", "dino.head_hidden_dim=40", "dino.head_bottleneck_dim=16", "train.batch_size_per_gpu=8",
]  # fmt: skip


def config_of(*overrides: str) -> Config:
    return load_config(overrides=[*SIZES, *overrides])


@contextmanager
def counter() -> Iterator[FlopCounterMode]:
    """PyTorch's counter; it knows attention only as the two products that it is made of."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counting:
        yield counting


@pytest.mark.parametrize(
    "variant",
    [
        ["student.drop_path_rate=0.0"],
        ["student.drop_path_rate=0.0", "student.ffn_layer=swiglufused", "student.num_register_tokens=2"],
        ["student.drop_path_rate=0.0", "ibot.separate_head=true", "ibot.head_n_prototypes=80"],
    ],
)
def test_forward_passes_are_counted_as_pytorch_counts_them(variant: list[str]) -> None:
    config = config_of(*variant)
    batch, objective = synthetic_batch(config).normalized(), SSLMetaArch(config).train()
    counted = step_flops(config, masked=batch.mask_indices.shape[0])
    with counter() as teacher, torch.no_grad():
        objective.teacher([batch.global_crops], [None], batch.mask_indices)
    with counter() as student:
        objective.student([batch.global_crops, batch.local_crops], [batch.masks, None], batch.mask_indices)
    assert counted.teacher == pytest.approx(teacher.get_total_flops(), rel=1e-9)
    assert counted.student == pytest.approx(student.get_total_flops(), rel=1e-9)
    assert counted.step < counted.whole < 4 * counted.whole


def test_stochastic_depth_saves_what_it_drops() -> None:
    whole, dropped = (step_flops(config_of(f"student.drop_path_rate={rate}"), 100) for rate in (0.0, 0.5))
    assert dropped.teacher == whole.teacher
    assert 0.5 * whole.student < dropped.student < 0.8 * whole.student  # heads and embedding stay


def test_a_class_token_is_counted_as_pytorch_counts_it() -> None:
    model = SSLMetaArch(config_of("student.num_register_tokens=1")).teacher.backbone
    with counter() as counted, torch.no_grad():
        model(torch.randn(3, 3, 56, 56))
    assert 3 * forward_flops(model, 56) == pytest.approx(counted.get_total_flops(), rel=1e-9)
