"""Dense heads: the reference's numbers, and what they read of a backbone."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dinov2cli.errors import WeightsError
from dinov2cli.models.dense_heads import (
    DenseModel,
    DepthHead,
    DPTHead,
    HeadConfig,
    SegmentationHead,
    pad_to_patches,
    spread_blocks,
)
from dinov2cli.models.vision_transformer import VisionTransformer

CLOSE = {"rtol": 1e-6, "atol": 1e-5}  # metres, or logits; at 60 m a float32 is good to 4e-6
DEPTH = HeadConfig(task="depth")


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with np.load(Path(__file__).parent / "golden/dense_heads.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def under(golden: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in golden.items() if name.startswith(prefix)}


@pytest.fixture(scope="module")
def backbone(golden: dict[str, Tensor]) -> VisionTransformer:
    model = VisionTransformer(img_size=56, patch_size=14, embed_dim=16, depth=4, num_heads=2, layerscale=1.0)
    model.load_state_dict(under(golden, "depth/backbone/"))
    return model.eval()


@pytest.mark.parametrize("blocks", ("linear1", "linear4"))
@torch.no_grad()
def test_linear_depth_is_the_references(golden: dict[str, Tensor], backbone: VisionTransformer, blocks: str) -> None:
    """From pixels to depths: blocks without the norm, padding, bins, range, and the stretched map."""
    weights = under(golden, f"depth/{blocks}/w/decode_head.")
    images, (low, high) = golden["depth/x"] / 32, golden[f"depth/{blocks}/depth_range"].tolist()
    for how, name in (("linear", "depth_low"), ("softmax", "depth_low_softmax"), ("sigmoid", "depth_low_sigmoid")):
        config = HeadConfig(task="depth", min_depth=low, max_depth=high, bin_weights=how)
        head = DepthHead(weights["conv_depth.weight"].shape[1], 12, config)
        head.load_state_dict(weights)
        model = DenseModel(backbone, head)
        torch.testing.assert_close(head(model.features(images)), golden[f"depth/{blocks}/{name}"], **CLOSE)
        if how == "linear":
            torch.testing.assert_close(model(images)[..., ::6, ::6], golden[f"depth/{blocks}/depth"], **CLOSE)


@torch.no_grad()
def test_dpt_is_the_references(golden: dict[str, Tensor]) -> None:
    features = [(golden[f"dpt/feat{i}/patch"], golden[f"dpt/feat{i}/cls"]) for i in range(4)]
    head = DPTHead(128, 8)
    head.load_state_dict(under(golden, "dpt/w/decode_head."))
    torch.testing.assert_close(head(features)[..., ::6, ::6], golden["dpt/depth_low"], **CLOSE)


@pytest.mark.parametrize("blocks", ("linear", "ms"))
@torch.no_grad()
def test_segmentation_is_the_references(golden: dict[str, Tensor], blocks: str) -> None:
    maps = [value for name, value in sorted(under(golden, f"segmentation/{blocks}/feat").items())]
    head = SegmentationHead(16 * len(maps), 6)
    head.load_state_dict(under(golden, f"segmentation/{blocks}/w/decode_head."))
    logits = head.eval()([(each, each.mean((2, 3))) for each in maps])
    torch.testing.assert_close(logits, golden[f"segmentation/{blocks}/logits"], **CLOSE)


@torch.no_grad()
def test_few_bins_are_computed_before_tokens_are_enlarged(backbone: VisionTransformer) -> None:
    """The plain way: enlarge, then convolve."""
    torch.manual_seed(0)
    head = DepthHead(128, 12)
    features = DenseModel(backbone, head).features(torch.randn(1, 3, 45, 60))
    parts = [part for patches, cls in features for part in (patches, cls[..., None, None].expand_as(patches))]
    enlarged = torch.nn.functional.interpolate(torch.cat(parts, 1), scale_factor=4, mode="bilinear")
    positive = torch.relu(head.conv_depth(enlarged)) + 0.1
    bins = torch.linspace(0.001, 10, 12)[:, None, None]
    plain = (positive / positive.sum(1, keepdim=True) * bins).sum(1, keepdim=True)
    torch.testing.assert_close(head(features), plain, **CLOSE)


def test_blocks_that_are_read() -> None:
    assert [spread_blocks(depth) for depth in (4, 12, 24, 40)] == [
        (0, 1, 2, 3), (2, 5, 8, 11), (4, 11, 17, 23), (9, 19, 29, 39)
    ]  # fmt: skip
    model = VisionTransformer(img_size=16, patch_size=8, embed_dim=8, depth=6, num_heads=2)
    assert SegmentationHead(8, 2).blocks_read(model) == (5,)
    assert SegmentationHead(32, 2).blocks_read(model) == (2, 3, 4, 5)
    assert DepthHead(16).blocks_read(model) == (5,)
    assert DepthHead(64).blocks_read(model) == (0, 2, 3, 5)
    assert DepthHead(32, config=HeadConfig(task="depth", layers=(1, 3))).blocks_read(model) == (1, 3)
    for head in (
        SegmentationHead(12, 2),
        SegmentationHead(56, 2),
        DepthHead(24),
        DepthHead(32),
        DepthHead(32, config=HeadConfig(task="depth", layers=(1, 6))),
        DepthHead(32, config=HeadConfig(task="depth", layers=(1,))),
    ):
        with pytest.raises(WeightsError, match=rf"head with {head.in_channels} inputs .* 8 wide with 6 blocks"):
            head.blocks_read(model)


@pytest.mark.parametrize("options", (
    {"in_chans": 5, "num_register_tokens": 2},
    {"pos_embed_type": "rope", "n_storage_tokens": 2, "mask_k_bias": True, "untie_cls_and_patch_norms": True},
))  # fmt: skip
@torch.no_grad()
def test_any_backbone_carries_heads(options: dict[str, object]) -> None:
    """Channels, registers, rotary positions: the map has the image's size, and only patches are read."""
    torch.manual_seed(0)
    backbone = VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=4, num_heads=2, **options).eval()
    images = torch.randn(2, backbone.config.in_chans, 21, 40)
    for head, channels in ((SegmentationHead(64, 3), 3), (DepthHead(128), 1), (DPTHead(128, 8), 1)):
        model = DenseModel(backbone, head.eval())
        assert model(images).shape == (2, channels, 21, 40)
    plain = backbone.get_intermediate_layers(pad_to_patches(images, 8), n=4, norm=False, return_class_token=True)
    for (patches, cls), (tokens, expected) in zip(model.features(images), plain, strict=True):
        torch.testing.assert_close(patches.flatten(2).transpose(1, 2), tokens)
        torch.testing.assert_close(cls, expected)


def test_padding_keeps_the_larger_half_right_and_below() -> None:
    padded = pad_to_patches(torch.ones(1, 1, 5, 8), 8)
    assert padded.shape == (1, 1, 8, 8) and padded[0, 0, :, 0].tolist() == [0, 1, 1, 1, 1, 1, 0, 0]
