"""The vision transformer: the reference's outputs, and properties of packing, stochastic depth and masks."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dinov2cli.models.attention import ATTENTION_BACKENDS, AttentionUse, TokenLayout, why_not
from dinov2cli.models.layers import LayerScale, linear_and_scale
from dinov2cli.models.stochastic_depth import draw_by_block
from dinov2cli.models.vision_transformer import VisionTransformer, parameter_count, shapes_of

GOLDEN = Path(__file__).parent / "golden"
VARIANTS: dict[str, dict[str, Any]] = {
    "mlp": {},
    "chunked": {},
    "swiglu": {"ffn_layer": "swiglufused"},
    "reg4": {"num_register_tokens": 4, "interpolate_antialias": True, "interpolate_offset": 0.0},
}


def golden_model(variant: str) -> tuple[VisionTransformer, dict[str, torch.Tensor]]:
    arrays = {key: torch.from_numpy(value) for key, value in np.load(GOLDEN / f"vit_{variant}.npz").items()}
    model = VisionTransformer(
        img_size=56, patch_size=14, embed_dim=24, depth=4, num_heads=2, layerscale=1.0, **VARIANTS[variant]
    ).eval()
    # The recordings name blocks by chunk and global number: blocks.<chunk>.<number>.
    weights = {re.sub(r"^w/(blocks\.)\d+\.(\d+\.)", r"w/\1\2", k)[2:]: v for k, v in arrays.items() if k[:2] == "w/"}
    model.load_state_dict(weights, strict=True)
    return model, arrays


@pytest.mark.parametrize("size", ["native", "small", "wide", "tall"])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_features_equal_the_reference(variant: str, size: str) -> None:
    model, golden = golden_model(variant)
    features = model.forward_features(golden[f"{size}/x"])
    for key, name in (("cls", "x_norm_clstoken"), ("patch", "x_norm_patchtokens"), ("reg", "x_norm_regtokens")):
        torch.testing.assert_close(features[name], golden[f"{size}/{key}"], atol=1e-5, rtol=0)
    layers = model.get_intermediate_layers(golden[f"{size}/x"], n=3, return_class_token=True)
    for i, (patch, cls) in enumerate(layers):
        torch.testing.assert_close(patch, golden[f"{size}/inter{i}/patch"], atol=1e-5, rtol=0)
        torch.testing.assert_close(cls, golden[f"{size}/inter{i}/cls"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_masked_features_equal_the_reference(variant: str) -> None:
    model, golden = golden_model(variant)
    features = model.forward_features(golden["masked/x"], golden["masked/mask"])
    torch.testing.assert_close(features["x_norm_clstoken"], golden["masked/cls"], atol=1e-5, rtol=0)
    torch.testing.assert_close(features["x_norm_patchtokens"], golden["masked/patch"], atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_list_of_batches_equals_each_by_itself() -> None:
    model, golden = golden_model("reg4")
    sizes = ["native", "small", "wide"]
    together = model.forward_features([golden[f"{size}/x"] for size in sizes])
    for size, features in zip(sizes, together, strict=True):
        alone = model.forward_features(golden[f"{size}/x"])
        for key in ("x_norm_clstoken", "x_norm_regtokens", "x_norm_patchtokens", "x_prenorm"):
            torch.testing.assert_close(features[key], alone[key], atol=1e-6, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_images_alone_go_through_the_blocks_as_in_the_reference(variant: str) -> None:
    model, golden = golden_model(variant)
    x = golden["wide/x"]
    seen: list[tuple[int, ...]] = []
    parts = [part for block in model.blocks for part in (block, block.attn, block.attn.qkv, block.mlp)]
    hooks = [part.register_forward_hook(lambda m, inputs, y: seen.append((inputs[0].ndim, y.ndim))) for part in parts]
    features = model(x, is_training=True)
    for hook in hooks:
        hook.remove()
    assert seen == [(3, 3)] * len(parts)
    tokens = model.prepare_tokens_with_masks(x, None)
    bare = model.patch_embed(x)
    with_cls = torch.cat([model.cls_token.expand(len(x), -1, -1), bare], dim=1)
    placed = with_cls + model.interpolate_pos_encoding(with_cls, *x.shape[-2:])
    assert torch.equal(torch.cat([tokens[:, :1], tokens[:, model.prefix_tokens :]], dim=1), placed)
    for block in model.blocks:
        halfway = tokens + block.ls1(block.attn(block.norm1(tokens)))
        torch.testing.assert_close(
            block(tokens), halfway + block.ls2(block.mlp(block.norm2(halfway))), atol=1e-5, rtol=0
        )
        tokens = block(tokens)
    assert torch.equal(tokens, features["x_prenorm"]) and torch.equal(model(x), features["x_norm_clstoken"])
    torch.testing.assert_close(model.norm(tokens)[:, 0], golden["wide/cls"], atol=1e-5, rtol=0)
    (packed,) = model.forward_features([x])
    assert all(torch.equal(packed[key], features[key]) for key in features if key != "masks")


def test_images_alone_keep_their_sequences_under_stochastic_depth() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=28, patch_size=14, embed_dim=16, depth=2, num_heads=2, drop_path_rate=0.5
    ).train()
    x = torch.randn(6, 3, 28, 28)
    tokens, (stream, layout) = model.prepare_tokens_with_masks(x), model.prepare_tokens([x], [None])
    assert layout.grids == ((2, 2),)
    alone = model.forward_blocks(tokens, drop_generator=torch.Generator().manual_seed(0))
    packed = model.forward_blocks(stream, layout, torch.Generator().manual_seed(0))
    assert torch.equal(alone.flatten(0, 1), packed)


@torch.no_grad()
def test_training_tokens_are_those_of_forward_features() -> None:
    model, golden = golden_model("reg4")
    x, local, mask = golden["masked/x"], golden["small/x"], golden["masked/mask"]
    cls, patches = model.forward_tokens([x, local], [mask, None], mask.flatten().nonzero().flatten())
    full, small = model.forward_features([x, local], [mask, None])
    torch.testing.assert_close(cls, torch.cat([full["x_norm_clstoken"], small["x_norm_clstoken"]]), atol=1e-6, rtol=0)
    torch.testing.assert_close(patches, full["x_norm_patchtokens"][mask], atol=1e-6, rtol=0)


def test_intermediate_layers_reshape_and_choice() -> None:
    model, golden = golden_model("mlp")
    wide = golden["wide/x"]  # 70 x 112 pixels: 5 x 8 patches
    (grid,) = model.get_intermediate_layers(wide, n=[1], reshape=True, norm=False)
    (flat,) = model.get_intermediate_layers(wide, n=[1], norm=False)
    assert grid.shape == (2, 24, 5, 8)
    torch.testing.assert_close(grid[:, :, 2, 3], flat[:, 2 * 8 + 3])
    with pytest.raises(ValueError, match="blocks 0 to 3"):
        model.get_intermediate_layers(wide, n=[4])


def test_a_scale_within_the_weights_is_the_scale_of_the_output() -> None:
    torch.manual_seed(0)
    layer, scale = nn.Linear(6, 4).double(), LayerScale(4, 1.0).double()
    nn.init.normal_(scale.gamma)
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    inputs = [x, layer.weight, layer.bias, scale.gamma]
    found, expected = linear_and_scale(x, layer, scale), scale(layer(x))
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(*(torch.autograd.grad(y.cos().sum(), inputs) for y in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert torch.equal(linear_and_scale(x, layer, None), layer(x))


def test_small_scales_survive_float16() -> None:
    torch.manual_seed(0)
    layer, scale, x = nn.Linear(64, 4, bias=False), LayerScale(4, 1e-7), torch.randn(5, 64)
    exact = scale(layer(x))
    with torch.autocast("cpu", dtype=torch.float16):
        found = linear_and_scale(x, layer, scale)
    torch.testing.assert_close(found.float(), exact, rtol=1e-2, atol=1e-9)


def test_the_gradient_of_packed_heads_is_that_of_plain_attention() -> None:
    torch.manual_seed(0)
    layout = TokenLayout(((2, 5), (3, 2)))
    qkv = torch.randn(layout.tokens, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda values: ATTENTION_BACKENDS["sdpa"](values, layout), qkv)
    plain = []
    for q, k, v in (part.unbind(1) for part in qkv.split([5, 5, 2, 2, 2])):
        weights = torch.softmax(torch.einsum("qhc,khc->hqk", q, k) / 2, -1)
        plain.append(torch.einsum("hqk,khc->qhc", weights, v))
    torch.testing.assert_close(ATTENTION_BACKENDS["sdpa"](qkv, layout), torch.cat(plain))


@pytest.mark.parametrize("layerscale", [None, 0.5])
def test_under_autocast_an_evaluated_stream_is_float32(layerscale: float | None) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(img_size=28, patch_size=14, embed_dim=16, depth=3, num_heads=2, layerscale=layerscale)
    x = torch.randn(2, 3, 28, 28)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = model.eval().forward_features(x)
    assert features["x_prenorm"].dtype == torch.float32
    torch.testing.assert_close(features["x_prenorm"], model.forward_features(x)["x_prenorm"], rtol=0, atol=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["xformers", "varlen"])
def test_packed_kernels_agree_with_sdpa(name: str) -> None:
    if problem := why_not(name, AttentionUse(torch.device("cuda", 0), torch.bfloat16, 6, 64, (257, 50))):
        pytest.skip(problem)
    layout = TokenLayout(((4, 257), (16, 50)))
    qkv = torch.randn(layout.tokens, 3, 6, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    expected = ATTENTION_BACKENDS["sdpa"](qkv, layout)
    found = ATTENTION_BACKENDS[name](qkv, layout)
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)
    of_expected, of_found = (torch.autograd.grad(y.float().square().sum(), qkv)[0] for y in (expected, found))
    torch.testing.assert_close(of_found, of_expected, atol=5e-2, rtol=5e-2)


def test_what_a_new_layerscale_leaves_of_the_blocks_is_not_rounded_away() -> None:
    """Under autocast with stochastic depth, as in training: in a bfloat16 stream nothing of it would be left."""
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=28, patch_size=14, embed_dim=64, depth=4, num_heads=2, layerscale=1e-5, drop_path_rate=0.3
    ).train()
    stream, layout = model.prepare_tokens([torch.randn(8, 3, 28, 28)], [None])
    plain = model.forward_blocks(stream, layout, torch.Generator().manual_seed(1)) - stream
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model.forward_blocks(stream, layout, torch.Generator().manual_seed(1)) - stream
    assert (found - plain).norm() < 0.02 * plain.norm()


def test_every_parameter_has_a_layer() -> None:
    model = VisionTransformer(embed_dim=24, depth=12, num_heads=2, num_register_tokens=1)
    layers = {name: model.layer_of(name) for name, _ in model.named_parameters()}
    assert layers["blocks.11.norm1.weight"] == 12 and layers["norm.weight"] == 13
    assert {name for name, layer in layers.items() if layer == 0} == {
        "cls_token", "pos_embed", "register_tokens", "mask_token", "patch_embed.proj.weight", "patch_embed.proj.bias",
    }  # fmt: skip
    assert model.layer_of("tokens_of_another_kind") == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_shapes_are_those_of_the_built_model_and_cost_no_random_numbers(variant: str) -> None:
    model, _ = golden_model(variant)
    before = torch.get_rng_state()
    assert shapes_of(model.config) == {name: tuple(t.shape) for name, t in model.state_dict().items()}
    assert parameter_count(model.config) == sum(p.numel() for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), before)


def test_wrong_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="multiples of patch size 14"):
        golden_model("mlp")[0](torch.zeros(1, 3, 56, 50))
    with pytest.raises(ValueError, match="num_heads 5"):
        VisionTransformer(embed_dim=24, num_heads=5)
    with pytest.raises(ValueError, match="ffn_layer 'glu' is unknown"):
        VisionTransformer(ffn_layer="glu")


def test_depth_dependent_rates_draw_for_each_block() -> None:
    model = VisionTransformer(
        img_size=28, patch_size=14, embed_dim=16, depth=3, num_heads=2, drop_path_rate=0.5, drop_path_uniform=False
    ).train()
    stream, layout = model.prepare_tokens([torch.randn(8, 3, 28, 28)], [None])
    first, second, third = draw_by_block(model.drop_path_rates, layout, torch.Generator(), stream.device)
    assert first is None
    assert [kept.layout.groups[0][0] for kept in (*second, *third)] == [6, 6, 4, 4]
