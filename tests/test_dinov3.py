"""DINOv3's files, as its authors and as transformers write them: loaded strictly, exported, and refused in words."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor
from weight_samples import assert_same_state, export_model, sample_model, sample_state, save

from dinov2cli.config import ViTConfig
from dinov2cli.errors import WeightsError
from dinov2cli.models.load import load_backbone_into, load_model, read_weights
from dinov2cli.models.load.infer import infer_architecture
from dinov2cli.models.load.layouts import dinov3
from dinov2cli.models.vision_transformer import VisionTransformer, shapes_of

GOLDEN = Path(__file__).parent / "golden"
SMALL = ViTConfig(
    embed_dim=64, depth=2, num_heads=2, patch_size=8, img_size=224, layerscale=1.0, pos_embed_type="rope",
    norm_layer="layernormbf16", n_storage_tokens=4, mask_k_bias=True,
)  # fmt: skip
GATED = SMALL.changed(ffn_layer="swiglu64", mlp_ratio=3.0, qkv_bias=False, mask_k_bias=False, n_storage_tokens=0)


def released(path: Path) -> tuple[Path, dict[str, Tensor]]:
    """The recorded model as its authors save one: periods in bfloat16, and the masks of key biases never filled."""
    arrays = {key: torch.from_numpy(value) for key, value in np.load(GOLDEN / "rope_vit.npz").items()}
    weights = {key[2:]: value for key, value in arrays.items() if key[:2] == "w/"}
    for name in weights:
        if name.endswith("bias_mask"):
            weights[name] = torch.full_like(weights[name], torch.nan)
    weights["rope_embed.periods"] = weights["rope_embed.periods"].bfloat16()
    return save(weights, path / "dinov3_vits8_pretrain_lvd1689m-08c60483.pth"), arrays


def test_a_released_file_says_what_it_is(tmp_path: Path) -> None:
    file, arrays = released(tmp_path)
    weights = read_weights(file)
    expected = SMALL.changed(embed_dim=32, depth=3, num_heads=2, hidden_dim=128)
    assert weights.architecture == expected, "heads from the periods, which round to those of base 100"
    assert weights.report.layout == "DINOv3" and not weights.report.left_out
    assert not weights.state["blocks.0.attn.qkv.bias"][32:64].any(), "the biases of keys are none"
    with torch.no_grad():
        found = load_model(file)(arrays["wide/x"] / 32)
    torch.testing.assert_close(found, arrays["wide/cls"], atol=5e-3, rtol=0)  # the rounded periods


def test_satellite_models_normalise_as_their_names_say(tmp_path: Path) -> None:
    file = save(sample_state(SMALL), tmp_path / "dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth")
    assert load_model(file).images.statistics == ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143))


def test_what_no_weights_show_is_read_from_the_run_beside_them(tmp_path: Path) -> None:
    config = SMALL.changed(pos_embed_rope_normalize_coords="max", pos_embed_rope_dtype="bf16", norm_layer="layernorm",
                           pos_embed_rope_min_period=0.5, pos_embed_rope_max_period=90.0, img_size=64)  # fmt: skip
    file = save(sample_state(config), tmp_path / "model.pth")
    unshown = ("pos_embed_type", "pos_embed_rope_normalize_coords", "pos_embed_rope_dtype", "norm_layer")
    student = {key: getattr(config, key) for key in unshown}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"student": student, "crops": {"global_crops_size": 64}}))
    assert read_weights(file).architecture == config, "the periods' ends, and storage tokens, are seen"


@pytest.mark.parametrize("config", [SMALL, GATED], ids=["mlp", "gated"])
def test_every_format_gives_its_features_and_its_bits(config: ViTConfig, tmp_path: Path) -> None:
    file = save(sample_state(config), tmp_path / "model.pth")
    state = load_model(file).state_dict()
    for format_name, name in (
        ("safetensors", "a.safetensors"),
        ("official", "b.pth"),
        ("hf", "hf"),
        ("onnx", "c.onnx"),
    ):
        result = export_model(file, format_name, tmp_path / name)
        assert [comparison.binding for comparison in result.comparisons] == [True, True], format_name
        if format_name != "onnx":
            again = load_model(tmp_path / name)
            assert again.config == load_model(file).config
            assert_same_state(again.state_dict(), state)
    reference = torch.load(tmp_path / "b.pth", weights_only=True)
    assert ("blocks.0.attn.qkv.bias_mask" in reference) == config.mask_k_bias
    assert ("blocks.0.mlp.w1.weight" in reference) == (config is GATED)


@pytest.mark.parametrize("gated", [False, True])
def test_what_transformers_saves_computes_the_same_here(gated: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.DINOv3ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, patch_size=8, image_size=64,
        use_gated_mlp=gated, hidden_act="silu" if gated else "gelu", num_register_tokens=3, layer_norm_eps=1e-6,
        rope_theta=50.0, key_bias=gated,
    )  # fmt: skip
    theirs = transformers.DINOv3ViTModel(config).eval()
    theirs.save_pretrained(tmp_path / "hf")
    ours, x = load_model(tmp_path / "hf"), torch.randn(2, 3, 40, 64)
    assert ours.config.pos_embed_rope_base == 50 and ours.config.norm_layer == "layernorm" and ours.num_heads == 4
    assert ours.config.mask_k_bias != gated and ours.config.img_size == 64
    with torch.no_grad():
        expected, found = theirs(pixel_values=x).last_hidden_state, ours.forward_features(x)
    tokens = torch.cat([found[f"x_{name}"] for name in ("storage_tokens", "norm_patchtokens")], dim=1)
    torch.testing.assert_close(found["x_norm_clstoken"], expected[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens, expected[:, 1:], atol=1e-5, rtol=0)


def test_features_equal_timms(tmp_path: Path) -> None:
    """A small `vit_small_patch16_dinov3_qkvb` that timm 1.0.31 made, recorded by `timm_students.py`."""
    golden = {key: torch.from_numpy(value) for key, value in np.load(GOLDEN / "timm_dinov3.npz").items()}
    state = {key[2:]: tensor for key, tensor in golden.items() if key.startswith("w/")}
    model = load_model(save(state, tmp_path / "timm.pth"), num_heads=2)
    with torch.no_grad():
        found = model.forward_features(golden["x"])
    tokens = [found["x_norm_clstoken"][:, None], found["x_storage_tokens"], found["x_norm_patchtokens"]]
    torch.testing.assert_close(torch.cat(tokens, dim=1), golden["tokens"], atol=1e-5, rtol=0)
    assert read_weights(tmp_path / "timm.pth", num_heads=2).report.filled == ("mask_token",)
    del state["blocks.1.attn.v_bias"]
    with pytest.raises(WeightsError, match=r"biases of 'blocks\.1\.attn\.' that no model of the reference has"):
        read_weights(save(state, tmp_path / "timm.pth"), num_heads=2)


def test_what_timms_weights_do_not_show(tmp_path: Path) -> None:
    """Its folder says it; without that, heads of the two widths that only DINOv3 has."""
    golden = np.load(GOLDEN / "timm_dinov3.npz")
    save({key[2:]: torch.from_numpy(golden[key]) for key in golden if key[:2] == "w/"}, tmp_path / "pytorch_model.bin")
    levels = {"mean": [0.43, 0.411, 0.296], "std": [0.213, 0.156, 0.143]}
    said = {"architecture": "vit_small_patch16_dinov3_qkvb", "model_args": {"num_heads": 4, "rope_temperature": 50.0},
            "pretrained_cfg": {"input_size": [3, 64, 64], **levels}}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(said))
    model = load_model(tmp_path)
    assert (model.num_heads, model.config.pos_embed_rope_base, model.config.img_size) == (4, 50, 64)
    assert model.images.statistics == tuple(map(tuple, levels.values()))
    wide = SMALL.changed(embed_dim=1280, num_heads=20)
    shapes = {name: torch.empty(shape, device="meta") for name, shape in shapes_of(wide).items() if "rope" not in name}
    assert infer_architecture(shapes, {}, "file").num_heads == 20


def test_names_of_transformers_4_are_read_too(tmp_path: Path) -> None:
    state = {name.removeprefix("model."): tensor for name, tensor in dinov3.to_(sample_state(SMALL)).items()}
    file = save(state, tmp_path / "weights.pth")
    assert read_weights(file, num_heads=2).architecture == SMALL


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "rms": ({"norm_layer": "rmsnorm"}, "has LayerNorm, this model rmsnorm"),
    "untied": ({"untie_cls_and_patch_norms": True}, "it knows no class tokens' own norm"),
    "unscaled": ({"layerscale": None}, "always have LayerScale"),
    "periods": (
        {"pos_embed_rope_min_period": 0.5, "pos_embed_rope_max_period": 9.0},
        "makes RoPE's periods from a base",
    ),
    "max": ({"pos_embed_rope_normalize_coords": "max"}, "it knows no RoPE coordinates, which is max here"),
}


@pytest.mark.parametrize("options, reason", REFUSED.values(), ids=REFUSED)
def test_what_transformers_cannot_hold_is_said(options: dict[str, Any], reason: str) -> None:
    assert reason in str(dinov3.why_not(SMALL.changed(**options)))


def test_timm_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="which dino2 does not write"):
        export_model(save(sample_state(SMALL), tmp_path / "model.pth"), "timm", tmp_path / "model.safetensors")


def test_a_training_starts_from_it_and_says_what_would_fit(tmp_path: Path) -> None:
    file = save(sample_state(GATED), tmp_path / "model.pth")
    student = VisionTransformer(GATED.changed(img_size=64))
    load_backbone_into(student, file)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(student.eval()(x), load_model(file)(x))
    with pytest.raises(WeightsError) as refusal:
        load_backbone_into(VisionTransformer(embed_dim=64, depth=2, num_heads=2, patch_size=8), file)
    assert "positions rope instead of learned" in refusal.value.message
    wanted = "student.pos_embed_type=rope", "student.norm_layer=layernormbf16", "student.ffn_ratio=3.0"
    assert all(words in str(refusal.value.hint) for words in wanted)
    assert "mask_k_bias" not in str(refusal.value.hint), "what is as usual on both sides is not named"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("blocks.1.norm2.bias"), "missing: blocks.1.norm2.bias"),
        (lambda state: state.update({"blocks.0.extra": torch.zeros(1)}), "unknown: blocks.0.extra"),
        (lambda state: state.update({"rope_embed.periods": torch.ones(5)}), "RoPE periods are of heads 20 wide"),
    ],
)
def test_loading_is_strict(change: Any, message: str, tmp_path: Path) -> None:
    state = sample_state(SMALL)
    change(state)
    with pytest.raises(WeightsError, match=re.escape(message)):
        load_model(save(state, tmp_path / "model.pth"))


def test_a_released_name_says_that_it_is_not_downloaded() -> None:
    with pytest.raises(WeightsError, match="licence is accepted by whoever fetches the weights"):
        load_model("dinov3_vits16")


def test_a_file_of_ours_keeps_its_images_whatever_it_is_called(tmp_path: Path) -> None:
    model = sample_model(SMALL)
    file = save(model.state_dict(), tmp_path / "model.pth")
    export_model(file, "safetensors", tmp_path / "dinov3_vitl16_sat493m.safetensors")
    assert load_model(tmp_path / "dinov3_vitl16_sat493m.safetensors").images == load_model(file).images
