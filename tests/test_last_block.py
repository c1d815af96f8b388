"""The last block, computed for the tokens that are used afterwards, against the whole block."""

import pytest
import torch
from torch import Tensor

from dinov2cli.config import ViTConfig
from dinov2cli.models.attention import TokenLayout
from dinov2cli.models.last_block import LastBlock
from dinov2cli.models.stochastic_depth import draw_for_branches
from dinov2cli.models.vision_transformer import VisionTransformer

LAYOUT = TokenLayout(((6, 10), (8, 5)))


def block_of(ffn_layer: str) -> LastBlock:
    torch.manual_seed(0)
    config = ViTConfig(embed_dim=24, num_heads=2, ffn_layer=ffn_layer, layerscale=0.5)
    return LastBlock(config, "sdpa").double()


def used_tokens() -> Tensor:
    """Every sequence's first token, then in no order tokens of some of the long sequences: none of two, 9 of one."""
    later = torch.tensor([3, 1, 9, 15, 22, 28, 21, *range(31, 40)])
    return torch.cat([LAYOUT.sequence_starts(torch.device("cpu")), later])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("ffn_layer", "drop_rate"), [("mlp", 0.0), ("mlp", 0.4), ("swiglu", 0.4)])
def test_used_tokens_alone_are_as_in_the_whole_block(ffn_layer: str, drop_rate: float, compiled: bool) -> None:
    block, used = block_of(ffn_layer), used_tokens()
    # Compiled, shapes may not depend on the data, and dropped tokens are computed with a factor of 0.
    shortened = torch.compile(block, backend="eager", dynamic=False) if compiled else block
    generator = torch.Generator().manual_seed(1)
    cpu = torch.device("cpu")
    kept = None
    if drop_rate:
        kept = tuple(draw_for_branches(2, LAYOUT, drop_rate, generator, cpu))
    stream = torch.randn(LAYOUT.tokens, 24, dtype=torch.float64, generator=generator)
    weights = torch.randn(used.shape[0], 24, dtype=torch.float64, generator=generator)
    results = []
    for compute in (lambda x: block(x, LAYOUT, kept)[used], lambda x: shortened(x, LAYOUT, kept, used)):
        x = stream.clone().requires_grad_()
        block.zero_grad()
        y = compute(x)
        (y * weights).sum().backward()
        results.append([y.detach(), x.grad, *(p.grad.clone() for p in block.parameters())])
    for whole, short in zip(*results, strict=True):
        torch.testing.assert_close(short, whole, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("registers", [0, 3])
def test_class_token_of_a_batch_equals_that_of_all_features(registers: int) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=28, patch_size=14, embed_dim=16, depth=2, num_heads=2, num_register_tokens=registers, layerscale=1.0
    ).eval()
    x, mask = torch.randn(3, 3, 28, 28), torch.tensor([[True, False, False, True]] * 3)
    torch.testing.assert_close(model.class_tokens(x), model(x), atol=1e-6, rtol=0)
    for masks in (None, mask):
        assert torch.equal(model(x, masks), model.forward_features(x, masks)["x_norm_clstoken"])
