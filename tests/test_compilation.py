"""`train.compile`: the same losses and gradients, through PyTorch's compiler for the CPU."""

import shutil

import pytest
import torch
from tiny_run import AUGMENTED_ROPE, DINOV3

from dinov2cli.bench.train import synthetic_batch
from dinov2cli.config import Config, load_config
from dinov2cli.losses.cross_entropy import soft_cross_entropy
from dinov2cli.train.objective import SSLMetaArch

SIZES = [
    "student.arch=vit_tiny", "student.embed_dim=32", "student.depth=3", "student.num_heads=2", "student.patch_size=14",
    "student.layerscale=0.5", "student.drop_path_rate=0.3",
    "crops.global_crops_size=56", "crops.local_crops_size=28", "crops.local_crops_number=2",
    "dino.head_n_prototypes=64", "dino.head_hidden_dim=40", "dino.head_bottleneck_dim=16", "train.batch_size_per_gpu=6",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="PyTorch compiles for the CPU with g++")
@pytest.mark.parametrize(
    "variant",
    [[], ["ibot.separate_head=true", "train.centering=sinkhorn_knopp", *DINOV3, *AUGMENTED_ROPE]],
)
def test_compiled_steps_equal_uncompiled_ones(variant: list[str]) -> None:
    config = load_config(overrides=[*SIZES, *variant])
    plain, compiled = (losses_and_gradients(config, compile_it) for compile_it in (False, True))
    for (plain_losses, plain_gradients), (losses, gradients) in zip(plain, compiled, strict=True):
        torch.testing.assert_close(losses, plain_losses, rtol=1e-5, atol=1e-6)
        assert gradients.keys() == plain_gradients.keys()
        for name, gradient in gradients.items():
            difference = (gradient - plain_gradients[name]).norm() / plain_gradients[name].norm().clamp(min=1e-6)
            assert difference < 1e-3, (name, difference)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="PyTorch compiles for the CPU with g++")
def test_compiled_losses_of_half_precision_scores_are_exact_too() -> None:
    torch.manual_seed(0)
    scores = torch.randn(3, 8, 512, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.softmax(3 * torch.randn(8, 512), -1)
    results = []
    for function in (soft_cross_entropy, torch.compile(soft_cross_entropy)):
        terms = function(scores, targets, 0.1)
        assert terms.dtype == torch.float32
        results.append((terms.detach(), torch.autograd.grad(terms.sum(), scores)[0]))
    (terms, gradient), (compiled_terms, compiled_gradient) = results
    torch.testing.assert_close(compiled_terms, terms, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(compiled_gradient, gradient, rtol=1e-2, atol=1e-6)


def losses_and_gradients(config: Config, compile_it: bool) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Of three batches with different numbers of masked patches."""
    torch.manual_seed(0)
    objective = SSLMetaArch(config).train()
    if compile_it:
        objective.compile_parts()
    results = []
    for seed in range(3):
        batch = synthetic_batch(config.model_copy(update={"train": config.train.model_copy(update={"seed": seed})}))
        objective.zero_grad()
        losses = objective(batch, {"iteration": 0, "teacher_temp": 0.05}, torch.Generator().manual_seed(seed))
        losses.total.backward()
        gradients = {name: p.grad.clone() for name, p in objective.student.named_parameters() if p.grad is not None}
        results.append((torch.stack([losses.total, *losses.logged.values()]).detach(), gradients))
    return results
