"""Stochastic depth: what is drawn, that it is right on average, and that its short ways equal the plain one."""

import pytest
import torch
from torch import Tensor

from dinov2cli.models import stochastic_depth
from dinov2cli.models.attention import TokenLayout
from dinov2cli.models.stochastic_depth import draw_for_branches
from dinov2cli.models.vision_transformer import VisionTransformer


def test_stochastic_depth_keeps_the_right_numbers_and_scales() -> None:
    layout = TokenLayout(((8, 5), (6, 3)))
    kept = draw_for_branches(1, layout, 0.4, torch.Generator().manual_seed(0), torch.device("cpu"))[0]
    assert kept.layout.groups == ((4, 5), (3, 3))  # int(8 * 0.6), int(6 * 0.6)
    assert torch.allclose(kept.factor, torch.tensor([[2.0]] * 33)[: kept.layout.tokens])
    globals_, locals_ = kept.index[:20].view(4, 5), kept.index[20:].view(3, 3)
    assert (globals_[:, 0] % 5 == 0).all() and (globals_ < 40).all() and ((locals_[:, 0] - 40) % 3 == 0).all()
    assert (globals_.diff(dim=1) == 1).all() and len(set(globals_[:, 0].tolist())) == 4
    one = draw_for_branches(1, TokenLayout(((2, 5),)), 0.9, torch.Generator(), torch.device("cpu"))[0]
    assert one.layout.groups == ((1, 5),)


def test_stochastic_depth_is_right_on_average_and_repeatable() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(img_size=28, patch_size=14, embed_dim=16, depth=1, num_heads=2, drop_path_rate=0.5)
    x = torch.randn(8, 3, 28, 28)
    stream, layout = model.prepare_tokens([x], [None])
    block = model.blocks[0]
    residual = block.attention_branch(stream, layout)
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros_like(stream)
    for _ in range(2000):
        kept = draw_for_branches(1, layout, 0.5, generator, stream.device)[0]
        branch = block.attention_branch(stream[kept.index], kept.layout) * kept.factor
        total += torch.zeros_like(stream).index_add(0, kept.index, branch)
    torch.testing.assert_close(total / 2000, residual, atol=0.05 * residual.abs().max().item(), rtol=0)
    model.train()
    runs = [model.forward_blocks(stream, layout, torch.Generator().manual_seed(s)) for s in (3, 3, 4)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert torch.equal(model.eval().forward_blocks(stream, layout), model.forward_blocks(stream, layout))


def test_draws_for_several_branches_are_those_made_one_by_one() -> None:
    layout, cpu = TokenLayout(((8, 5), (6, 3))), torch.device("cpu")
    together = draw_for_branches(4, layout, 0.4, torch.Generator().manual_seed(7), cpu)
    generator = torch.Generator().manual_seed(7)
    for drawn in together:
        alone = draw_for_branches(1, layout, 0.4, generator, cpu)[0]
        assert torch.equal(drawn.index, alone.index) and torch.equal(drawn.scale, alone.scale)
        assert torch.equal(drawn.place, alone.place)
    assert len({tuple(drawn.index.tolist()) for drawn in together}) > 1


def test_gathers_equal_what_autograd_does_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a GPU and of compiled blocks, forward and backward, beside that of the CPU."""
    layout = TokenLayout(((8, 5), (6, 3)))
    generator = torch.Generator().manual_seed(0)
    kept = draw_for_branches(1, layout, 0.4, generator, torch.device("cpu"))[0]
    stream = torch.randn(layout.tokens, 4, dtype=torch.float64, generator=generator)
    weights = torch.randn(layout.tokens, 4, dtype=torch.float64, generator=generator)

    def residual_of_sines(x: Tensor) -> Tensor:
        rest, chosen = kept.select(x)
        return kept.add(rest, chosen.sin())

    def outcome() -> list[Tensor]:
        x = stream.clone().requires_grad_()
        y = residual_of_sines(x)
        (y * weights).sum().backward()
        assert x.grad is not None
        return [y.detach(), x.grad]

    plain = outcome()
    monkeypatch.setattr(stochastic_depth, "shapes_may_depend_on_data", lambda x: False)
    for gathered, expected in zip(outcome(), plain, strict=True):
        assert torch.equal(gathered, expected)
    torch.autograd.gradcheck(residual_of_sines, stream.clone().requires_grad_())
