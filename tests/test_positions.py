"""Rotary positions and what came with them: the reference's numbers, and that packing and dropping change nothing."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dinov2cli.models.adapt import AnySizeVisionTransformer
from dinov2cli.models.attention import TokenLayout
from dinov2cli.models.positions import RopeAugmentation, _rotate, rotate
from dinov2cli.models.vision_transformer import VisionTransformer

GOLDEN = Path(__file__).parent / "golden"
VARIANTS: dict[str, dict[str, Any]] = {
    "rope_vit": {"n_storage_tokens": 4, "mask_k_bias": True, "norm_layer": "layernormbf16"},
    "rope_vit_b": {"n_storage_tokens": 2, "qkv_bias": False, "ffn_layer": "swiglu64", "mlp_ratio": 3.0,
                   "untie_cls_and_patch_norms": True, "untie_global_and_local_cls_norm": True},
    "rope_vit_c": {"ffn_layer": "swiglu", "norm_layer": "rmsnorm", "pos_embed_rope_normalize_coords": "max",
                   "pos_embed_rope_min_period": 0.5, "pos_embed_rope_max_period": 90.0},
}  # fmt: skip
SIZE: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "layerscale": 1.0}
AUGMENTATION = RopeAugmentation(shift=0.3, jitter=1.7, rescale=2.0)


def golden_model(variant: str, **options: Any) -> tuple[VisionTransformer, dict[str, Tensor]]:
    """Arrays of images are saved as int8 of 32 times them."""
    arrays = {key: torch.from_numpy(value) for key, value in np.load(GOLDEN / f"{variant}.npz").items()}
    arrays = {key: value / 32 if value.dtype == torch.int8 else value for key, value in arrays.items()}
    model = VisionTransformer(**SIZE, pos_embed_type="rope", **VARIANTS[variant], **options).eval()
    model.load_state_dict({key[2:]: value for key, value in arrays.items() if key[:2] == "w/"}, strict=True)
    return model, arrays


def fresh(**options: Any) -> VisionTransformer:
    """All of DINOv3's options at once, with random weights."""
    torch.manual_seed(0)
    every = {**VARIANTS["rope_vit"], "untie_cls_and_patch_norms": True, "untie_global_and_local_cls_norm": True}
    model = VisionTransformer(**SIZE, pos_embed_type="rope", **every, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", ["square", "wide", "tall"])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_features_equal_the_reference(variant: str, size: str) -> None:
    model, golden = golden_model(variant)
    x = golden[f"{size}/x"]
    features = model.forward_features(x)
    for key, name in (("cls", "x_norm_clstoken"), ("patch", "x_norm_patchtokens"), ("storage", "x_storage_tokens")):
        assert_close(features[name], golden[f"{size}/{key}"])
    assert_close(model.class_tokens(x), golden[f"{size}/cls"])
    for norm, name in ((True, "inter"), (False, "inter")):
        raw = "" if norm else "_raw"
        layers = model.get_intermediate_layers(
            x, n=[0, 2], return_class_token=True, norm=norm, return_extra_tokens=True
        )
        for i, found in enumerate(layers):
            for key, tokens in zip(("patch", "cls", "storage"), found, strict=True):
                assert_close(tokens, golden[f"{size}/{name}{i}{raw}/{key}"])
    assert model.rope_embed is not None
    for key, table in zip(("sin", "cos"), model.rope_embed(model.grid_of(x)), strict=True):
        assert_close(table, golden[f"{size}/rope_{key}"])


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_masked_and_training_features_equal_the_reference(variant: str) -> None:
    model, golden = golden_model(variant)
    features = model.forward_features(golden["masked/x"], golden["masked/mask"])
    assert_close(features["x_norm_clstoken"], golden["masked/cls"])
    assert_close(features["x_norm_patchtokens"], golden["masked/patch"])
    if "train/global" not in golden:
        return
    crops, nothing = [golden["train/global"], golden["train/local"]], torch.zeros(0, dtype=torch.int64)
    of_global, of_local = model.train().forward_features(crops)
    assert_close(of_global["x_norm_clstoken"], golden["train/global_cls"])
    for key, name in (("cls", "x_norm_clstoken"), ("patch", "x_norm_patchtokens"), ("storage", "x_storage_tokens")):
        assert_close(of_local[name], golden[f"train/local_{key}"])
    cls, _ = model.forward_tokens(crops, [None, None], nothing)
    assert_close(cls, torch.cat([golden["train/global_cls"], golden["train/local_cls"]]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_augmented_coordinates_equal_the_reference(variant: str) -> None:
    model, golden = golden_model(variant, rope_augmentation=AUGMENTATION)
    # The recording has the numbers themselves: shifts, and logarithms of factors.
    draws = torch.cat([
        golden["aug/shift_hw_u"] / 0.3, golden["aug/jitter_hw_logu"] / math.log(1.7),
        golden["aug/rescale_logu"] / math.log(2.0),
    ])  # fmt: skip
    assert model.rope_embed is not None
    sin, cos = model.rope_embed((3, 5), draws[None])
    assert_close(sin[0], golden["aug/sin_3x5"])
    assert_close(cos[0], golden["aug/cos_3x5"])


def test_each_block_and_crop_size_draws_once_from_the_steps_numbers() -> None:
    rope = fresh(rope_augmentation=AUGMENTATION).rope_embed
    assert rope is not None
    one, same, other = (
        rope.train().rotations([(4, 4), (2, 2)], 3, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    sines = [sin for block in one for sin, _ in block]
    assert all(torch.equal(a, b) for a, b in zip(sines, (sin for block in same for sin, _ in block), strict=True))
    assert not torch.equal(one[0][0][0], one[1][0][0]) and not torch.equal(one[0][0][0], other[0][0][0])
    (undrawn, _), *_ = rope.eval().rotations([(4, 4), (2, 2)], 3, torch.Generator())
    assert (one[0][0][0][:5] == 0).all(), "class and storage tokens do not turn"
    assert not torch.allclose(one[0][0][0], undrawn[0])
    generator = torch.Generator().manual_seed(0)
    fresh().train().forward_features(torch.randn(2, 3, 32, 32))
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(0).get_state()), "nothing else is drawn"


@pytest.mark.parametrize("training", [False, True])
def test_two_crop_sizes_in_one_stream_equal_each_alone_and_used_tokens_the_whole(training: bool) -> None:
    """In training with dropped sequences and drawn coordinates, too: the same generator, the same numbers."""
    model = fresh(drop_path_rate=0.4 if training else 0.0, rope_augmentation=AUGMENTATION).train(training)
    crops = [torch.randn(4, 3, 32, 24), torch.randn(6, 3, 16, 16)]
    chosen = torch.tensor([0, 5, 11, 13, 40])
    with torch.no_grad():
        cls, patches = model.forward_tokens(crops, [None, None], chosen, torch.Generator().manual_seed(1))
        stream, layout = model.prepare_tokens(crops, [None, None])
        whole = list(layout.split(model.forward_blocks(stream, layout, torch.Generator().manual_seed(1))))
        normed = [model.norm_tokens(tokens, local=i > 0) for i, tokens in enumerate(whole)]
        torch.testing.assert_close(cls, torch.cat([tokens[:, 0] for tokens in normed]), atol=1e-5, rtol=0)
        torch.testing.assert_close(patches, normed[0][:, 5:].flatten(0, 1)[chosen], atol=1e-5, rtol=0)
        if not training:
            for batch, tokens in zip(crops, normed, strict=True):
                alone = model.forward_features(batch)
                torch.testing.assert_close(alone["x_norm_patchtokens"], tokens[:, 5:], atol=1e-5, rtol=0)


def test_masked_key_biases_learn_nothing_and_change_nothing() -> None:
    model = fresh().train()
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    bias = model.blocks[0].get_parameter("attn.qkv.bias")
    assert bias.grad is not None and not bias.grad[32:64].any() and bias.grad[:32].any() and bias.grad[64:].any()
    model.eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        before = model(x)
        bias[32:64] = 7.0
        assert torch.equal(model(x), before)


def test_a_block_without_places_says_what_it_needs() -> None:
    with pytest.raises(ValueError, match="needs the layout"):
        fresh().blocks[0](torch.randn(1, 9, 32))


@pytest.mark.parametrize(("policy", "height"), [("pad", 40), ("crop", 32)])
@torch.no_grad()
def test_places_are_those_of_the_fitted_image(policy: str, height: int) -> None:
    model = fresh().eval()
    fitting = AnySizeVisionTransformer(policy, model.config).eval()
    fitting.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 34, 32)
    fitted = torch.nn.functional.pad(x, (0, 0, 0, 6)) if policy == "pad" else x[:, :, 1:33]
    assert fitted.shape[2] == height
    for found in (fitting(x), fitting.class_tokens(x)):
        torch.testing.assert_close(found, model(fitted), atol=1e-5, rtol=0)
    assert fitting.get_intermediate_layers(x, reshape=True)[0].shape[2:] == (height // 8, 4)


@torch.no_grad()
def test_bf16_arithmetic_is_nearly_the_exact_one() -> None:
    model = fresh().eval()
    other = VisionTransformer(model.config, pos_embed_rope_dtype="bf16").eval()
    other.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 32, 32)
    difference = (other(x) - model(x)).norm() / model(x).norm()
    assert 1e-5 < difference < 0.05


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_short_way_of_turning_is_the_plain_one(dtype: torch.dtype) -> None:
    """Forward and backward, of tokens in the rotation's arithmetic and in another."""
    model = fresh().double()
    assert model.rope_embed is not None
    model.rope_embed.dtype = torch.float64
    grids = ((3, 2), (2, 2))
    layout = TokenLayout(((2, 11), (3, 9)), grids, rotation=model.rope_embed.rotations(grids, 1, None)[0])
    qkv, weights = (torch.randn(49, 3, 2, 16, dtype=torch.float64).to(dtype) for _ in range(2))
    results = []
    for way in (_rotate, rotate):
        x = qkv.clone().requires_grad_()
        turned = way(x, layout)
        (turned * weights).sum().backward()
        results.append((turned.detach(), x.grad))
    for plain, short in zip(*results, strict=True):
        torch.testing.assert_close(short, plain, atol=1e-12 if dtype == torch.float64 else 0.05, rtol=1e-2)
