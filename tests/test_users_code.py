"""The model object as published code uses it: adapters, visualisers and trainers written for the reference."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from weight_samples import PLAIN, REGISTERS, SWIGLU, sample_model

from dinov2cli.models.vision_transformer import VisionTransformer

IMAGES = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
SAMPLES = {"plain": PLAIN, "registers": REGISTERS, "swiglu": SWIGLU}


@pytest.fixture(params=SAMPLES)
def model(request: pytest.FixtureRequest) -> VisionTransformer:
    return sample_model(SAMPLES[request.param])


@torch.no_grad()
def test_is_training_gives_all_tokens(model: VisionTransformer) -> None:
    out = model(IMAGES, is_training=True)
    assert set(out) == {"x_norm_clstoken", "x_norm_regtokens", "x_norm_patchtokens", "x_prenorm", "masks"}
    assert torch.equal(model(IMAGES), out["x_norm_clstoken"])
    masks = torch.zeros(2, 16, dtype=torch.bool)
    masks[:, 3] = True
    masked = model(IMAGES, masks=masks, is_training=True)
    assert masked["masks"] is masks and not torch.equal(masked["x_norm_clstoken"], out["x_norm_clstoken"])


@torch.no_grad()
def test_a_forward_pass_written_by_hand(model: VisionTransformer) -> None:
    x = model.prepare_tokens_with_masks(IMAGES)
    assert x.shape == (2, 1 + model.num_register_tokens + 16, model.embed_dim)
    for block in model.blocks:
        x = block(x)
    x = model.norm(x)
    torch.testing.assert_close(x[:, 0], model(IMAGES))


@torch.no_grad()
def test_a_block_written_by_hand(model: VisionTransformer) -> None:
    x = model.prepare_tokens_with_masks(IMAGES)
    block: Any = model.blocks[0]
    y = x + block.ls1(block.attn(block.norm1(x)))
    y = y + block.ls2(block.mlp(block.norm2(y)))
    torch.testing.assert_close(y, block(x))


@torch.no_grad()
def test_position_embeddings_for_an_oblong_image(model: VisionTransformer) -> None:
    x = model.prepare_tokens_with_masks(IMAGES)[:, : 1 + 16]
    assert torch.equal(model.interpolate_pos_encoding(x, 56, 56), model.pos_embed)
    wide = torch.randn(1, 3, 28, 84)  # the reference's names: the first side is w
    tokens = torch.zeros(1, 1 + 2 * 6, model.embed_dim)
    assert model.interpolate_pos_encoding(tokens, *wide.shape[-2:]).shape == (1, 13, model.embed_dim)


@torch.no_grad()
def test_attention_maps_from_the_last_qkv(model: VisionTransformer) -> None:
    seen: list[Tensor] = []
    last: Any = model.blocks[-1]
    handle = last.attn.qkv.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(IMAGES)
    model.get_intermediate_layers(IMAGES, n=1)
    model.class_tokens(IMAGES)  # what evaluations call, which computes less of the last block
    handle.remove()
    assert len(seen) == 3
    b, n, _ = seen[0].shape
    q, k, _ = seen[0].reshape(b, n, 3, model.num_heads, -1).permute(2, 0, 3, 1, 4)
    attention = (q * last.attn.scale @ k.transpose(-2, -1)).softmax(-1)
    entered = last.norm1(_entering(model, len(model.blocks) - 1))
    torch.testing.assert_close(attention, last.attn.weights(entered), atol=1e-5, rtol=1e-4)


def _entering(model: VisionTransformer, index: int) -> Tensor:
    x = model.prepare_tokens_with_masks(IMAGES)
    for block in model.blocks[:index]:
        x = block(x)
    return x


@torch.no_grad()
def test_hooks_on_every_block_and_layer_fire_and_change_nothing(model: VisionTransformer) -> None:
    plain = model(IMAGES)
    shapes: dict[str, Any] = {}
    modules = {name: m for name, m in model.named_modules() if name.startswith("blocks.")}
    for name, module in modules.items():
        module.register_forward_hook(lambda m, inputs, output, name=name: shapes.__setitem__(name, output.shape))
    torch.testing.assert_close(model(IMAGES), plain)
    assert shapes.keys() == modules.keys()
    n, d = 1 + model.num_register_tokens + 16, model.embed_dim
    assert all(shapes[f"blocks.{i}"] == shapes[f"blocks.{i}.attn.proj"] == (2, n, d) for i in range(model.depth))
    assert shapes["blocks.1.attn.qkv"] == (2, n, 3 * d)


def test_backward_hooks_and_gradients_of_one_block(model: VisionTransformer) -> None:
    kept: list[Tensor] = []
    handle = model.blocks[0].register_full_backward_hook(lambda m, given, got: kept.append(got[0]))
    model(IMAGES).sum().backward()
    handle.remove()
    assert kept[0].shape == (2, 1 + model.num_register_tokens + 16, model.embed_dim)


class LowRank(nn.Module):
    """An adapter in the place of a linear layer, as LoRA does it: `weight` is there, and not all that it does."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer, self.weight, self.bias = layer, layer.weight, layer.bias
        self.up = nn.Parameter(0.05 * torch.ones(layer.out_features, 1))
        self.down = nn.Parameter(0.05 * torch.ones(1, layer.in_features))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.down.T @ self.up.T


@pytest.mark.parametrize("path", ["attn.qkv", "attn.proj", "mlp.fc2"])
def test_an_adapter_in_the_place_of_a_layer_is_heard(path: str) -> None:
    model = sample_model(PLAIN)
    before = model(IMAGES)
    parent, _, name = path.rpartition(".")
    for block in model.blocks:
        group = block.get_submodule(parent)
        setattr(group, name, LowRank(getattr(group, name)))
    after = model(IMAGES)
    assert not torch.allclose(before, after, atol=1e-3)
    torch.testing.assert_close(model.class_tokens(IMAGES), after, atol=1e-5, rtol=1e-4)
    after.square().mean().backward()
    adapters = [module for module in model.modules() if isinstance(module, LowRank)]
    assert adapters and all(adapter.up.grad is not None and adapter.up.grad.abs().sum() > 0 for adapter in adapters)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_jit_trace(model: VisionTransformer) -> None:
    traced = torch.jit.trace(model, IMAGES)
    torch.testing.assert_close(traced(IMAGES), model(IMAGES))
    more = torch.randn(3, 3, 56, 56)
    torch.testing.assert_close(traced(more), model(more))


def test_names_of_the_reference() -> None:
    model = sample_model(PLAIN)
    assert model.patch_embed.patch_size == (14, 14)
    assert model.patch_embed.img_size == (56, 56)
    assert model.patch_embed.patches_resolution == (4, 4)
    assert (model.patch_embed.num_patches, model.patch_embed.in_chans, model.patch_embed.embed_dim) == (16, 3, 192)
    assert (model.patch_size, model.embed_dim, model.num_features) == (14, 192, 192)
    assert (model.num_heads, model.n_blocks) == (3, 2)
    assert (model.num_tokens, model.num_register_tokens, model.chunked_blocks) == (1, 0, False)
    assert model.register_tokens is None and "register_tokens" not in model.state_dict()
    attention: Any = model.blocks[0].get_submodule("attn")
    assert (attention.num_heads, attention.scale) == (3, 64**-0.5)
    assert sample_model(REGISTERS).register_tokens.shape == (1, 4, 192)


def test_keywords_of_the_reference() -> None:
    model = VisionTransformer(
        img_size=56, patch_size=14, in_chans=4, embed_dim=192, depth=2, num_heads=3, mlp_ratio=4, init_values=1.0,
        ffn_layer="swiglufused", block_chunks=4, num_register_tokens=1, drop_path_rate=0.1, drop_path_uniform=True,
        interpolate_antialias=True, interpolate_offset=0.0,
    )  # fmt: skip
    assert model.config.layerscale == 1.0 and model.config.in_chans == 4 and model.config.ffn_layer == "swiglu"
    assert model(torch.randn(1, 4, 28, 28)).shape == (1, 192)
    block = VisionTransformer(embed_dim=192, depth=1, num_heads=3, init_values=None).blocks[0]
    assert isinstance(block.get_submodule("ls1"), nn.Identity)


def test_copies_and_halves(model: VisionTransformer) -> None:
    twin = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(twin(IMAGES), model(IMAGES))
        half = twin.to(torch.bfloat16)(IMAGES.bfloat16())
        assert half.dtype == torch.bfloat16
        assert torch.nn.functional.cosine_similarity(half.float(), model(IMAGES)).min() > 0.99
