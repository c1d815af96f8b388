"""Drawn attention is the model's own: it reproduces what the block computes."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from dinov2cli.cli.main import main
from dinov2cli.errors import DataError
from dinov2cli.models.vision_transformer import VisionTransformer
from dinov2cli.visualize.attention_maps import attention_maps, draw_attention, special_token_attention


@pytest.fixture(scope="module")
def model() -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=28, patch_size=14, embed_dim=192, depth=3, num_heads=3, num_register_tokens=2
    ).eval()
    for parameter in model.parameters():  # large enough weights that attention is far from uniform
        parameter.data.mul_(3)
    return model


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)


@pytest.mark.parametrize("block", [0, 1, -1])
def test_weights_reproduce_the_output_of_the_block(model: VisionTransformer, block: int) -> None:
    images = torch.randn(2, 3, 42, 56)
    attention = model.blocks[block].attn
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        attention.qkv.register_forward_hook(lambda module, inputs, output: seen.update(qkv=output)),
        attention.proj.register_forward_hook(lambda module, inputs, output: seen.update(mixed=inputs[0])),
    ]
    with torch.no_grad():
        weights = special_token_attention(model, images, block)
    for hook in hooks:
        hook.remove()
    assert weights.shape == (2, 3, 3, 3 + 12)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 3))
    values = seen["qkv"].view(2, 15, 3, 3, 64)[:, :, 2].transpose(1, 2)
    mixed = (weights @ values).transpose(1, 2).flatten(2)
    torch.testing.assert_close(mixed, seen["mixed"].view(2, 15, 192)[:, :3], atol=1e-5, rtol=1e-4)


def test_what_attention_does_to_queries_and_keys_is_seen(
    model: VisionTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention, images = model.blocks[-1].attn, torch.randn(1, 3, 28, 28)
    plain, doubled = attention.queries_keys_values, torch.tensor([2.0, 1.0, 1.0])[:, None, None]
    with torch.no_grad():
        squared = special_token_attention(model, images) ** 2
        monkeypatch.setattr(attention, "queries_keys_values", lambda x, layout: plain(x, layout) * doubled)
        sharper = special_token_attention(model, images)
    torch.testing.assert_close(sharper, squared / squared.sum(-1, keepdim=True), atol=1e-5, rtol=1e-4)


def test_the_model_is_left_as_it_was(model: VisionTransformer, photo: np.ndarray) -> None:
    attention_maps(model, photo, resolution=3)
    assert not any(module._forward_hooks for module in model.modules())


def test_maps_have_the_shape_of_the_photo(model: VisionTransformer, photo: np.ndarray) -> None:
    maps = attention_maps(model, photo, resolution=4)
    assert maps.weights.shape == (3, 3, 4, 6)
    assert maps.queries == ("cls", "register 1", "register 2")
    assert (maps.weights.sum((2, 3)) < 1).all()
    rows = draw_attention(maps, photo)
    assert [len(row) for row in rows] == [5, 5, 5]
    assert all(picture.shape == photo.shape and picture.dtype == np.uint8 for row in rows for picture in row)
    assert not np.array_equal(draw_attention(maps, photo, overlay=True)[0][1], rows[0][1])


def test_unknown_block_is_named(model: VisionTransformer, photo: np.ndarray) -> None:
    with pytest.raises(DataError, match="--block 7: the model has blocks 0 to 2"):
        attention_maps(model, photo, resolution=2, block=7)


def test_command_writes_a_sheet_or_a_folder(tmp_path: Path, model: VisionTransformer, photo: np.ndarray) -> None:
    weights, image = tmp_path / "model.pth", tmp_path / "photo.png"
    torch.save(model.state_dict(), weights)
    cv2.imwrite(str(image), photo)
    for output in ("sheet.png", "maps"):
        with pytest.raises(SystemExit) as stop:
            main(["attention", str(image), str(tmp_path / output), "--model", str(weights), "--resolution", "4"])
        assert not stop.value.code
    assert cv2.imread(str(tmp_path / "sheet.png")).shape[1] == 1280
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == [
        f"photo-{query}-{what}.png"
        for query in ("cls", "register1", "register2")
        for what in ("head1", "head2", "head3", "mean")
    ]


@pytest.mark.parametrize("output", ["sheet.jpg", "missing.txt"])
def test_unknown_output_type_is_refused(tmp_path: Path, output: str, photo: np.ndarray, capsys) -> None:
    cv2.imwrite(str(tmp_path / "photo.png"), photo)
    with pytest.raises(SystemExit) as stop:
        main(["attention", str(tmp_path / "photo.png"), str(tmp_path / output), "--model", "unused"])
    assert stop.value.code == 2
    assert "unknown output type" in capsys.readouterr().err
