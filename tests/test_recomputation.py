"""Activation checkpointing: the same bits for less memory, and `selective` without a product done twice."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import AUGMENTED_ROPE, DINOV3, TINY, write_teacher

from dinov2cli.bench.train import synthetic_batch
from dinov2cli.config import load_config
from dinov2cli.models.vision_transformer import VisionTransformer
from dinov2cli.train.counting import Arrays
from dinov2cli.train.objective import SSLMetaArch

VARIANTS = {
    "whole": ["student.drop_path_rate=0"],
    "stochastic depth": [],
    "SwiGLU, registers": ["student.ffn_layer=swiglufused", "student.num_register_tokens=1"],
    "DINOv3": [*DINOV3, *AUGMENTED_ROPE],
    "adapters": ["student.train=lora:2", "student.pretrained_weights=some"],
    "last block": ["student.train=last:1", "student.pretrained_weights=some"],
    "distilled": [],
}
HALF = "stochastic depth", "SwiGLU, registers", "adapters", "distilled"


def loss_and_gradients(words: list[str], half: bool, compiled: bool) -> list[torch.Tensor]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = load_config(overrides=[*TINY, "student.depth=3", *words])
    objective, batch = SSLMetaArch(config).train(), synthetic_batch(config)
    for block in objective.student.backbone.blocks if compiled else ():
        block.compile(backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        losses = objective(batch, {"iteration": 0, "teacher_temp": 0.05}, torch.Generator().manual_seed(0))
    losses.total.backward()
    return [losses.total, *(each.grad for each in objective.student.parameters() if each.grad is not None)]


@pytest.mark.parametrize(
    ("variant", "compiled"),
    [
        *((variant, False) for variant in VARIANTS),
        *(pytest.param(variant, True, marks=pytest.mark.long) for variant in ("stochastic depth", "DINOv3")),
    ],
)
def test_no_bit_of_losses_and_gradients_changes(variant: str, compiled: bool, tmp_path: Path) -> None:
    words = list(VARIANTS[variant])
    if variant == "distilled":
        words.append(f"distillation.teacher={write_teacher(tmp_path)}")
    plain, *others = (
        loss_and_gradients([*words, f"train.activation_checkpointing={how}"], variant in HALF, compiled)
        for how in ("false", "true", "selective")
    )
    assert len(plain) > 10 and plain[0].isfinite()
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


def products_and_memory(dtype: torch.dtype, **options: Any) -> tuple[Counter[str], int]:
    """Matrix products and attention of a step, forward and backward; and bytes held between the two."""
    size = {"img_size": 28, "patch_size": 14, "embed_dim": 32, "depth": 4, "num_heads": 2, "layerscale": 0.5}
    model = VisionTransformer(**size, **options).train()
    counted: Counter[str] = Counter()

    class Count(Arrays):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            counted[func._opname] += 1
            return super().__torch_dispatch__(func, types, args, kwargs)

    with Count() as arrays, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        cls, _ = model.forward_tokens([torch.ones(8, 3, 28, 28)], [None], torch.empty(0, dtype=torch.int64))
        held = arrays.held
        cls.sum().backward()
    names = "mm", "addmm", "_scaled_dot_product_flash_attention_for_cpu"
    return Counter({name: counted[name] for name in names}), held


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"ffn_layer": "swiglu"}, {"drop_path_rate": 0.5, "pos_embed_type": "rope"}])
def test_selective_repeats_no_matrix_product(options: dict[str, Any], dtype: torch.dtype) -> None:
    found = (products_and_memory(dtype, **options, activation_checkpointing=how) for how in (False, "selective", True))
    (plain, most), (selective, less), (whole, least) = found
    assert selective == plain and whole.total() > 1.2 * plain.total()
    assert least < less < (0.95 if dtype == torch.float16 else 0.8) * most
