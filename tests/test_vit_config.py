"""One class says what a backbone is, and all that depends on it loops over its fields."""

from typing import Any

import pytest

from dinov2cli.config import ARCHITECTURES, ViTConfig, load_config
from dinov2cli.config.schema import Student
from dinov2cli.config.vit import RESIZING, ViTOptions, swiglu_width
from dinov2cli.eval.extract import weights_hash
from dinov2cli.models.vision_transformer import VisionTransformer
from dinov2cli.train.resuming import SHAPING_KEYS

SMALL = ViTConfig(embed_dim=24, depth=2, num_heads=2, patch_size=14, img_size=56, layerscale=1.0)
OTHER: dict[str, Any] = {
    "embed_dim": 48, "depth": 3, "num_heads": 4, "patch_size": 28, "img_size": 84, "in_chans": 1, "hidden_dim": 40,
    "ffn_layer": "swiglu", "num_register_tokens": 1, "layerscale": None, "qkv_bias": False, "proj_bias": False,
    "ffn_bias": False, "interpolate_antialias": True, "interpolate_offset": 0.0,
    "norm_layer": "rmsnorm", "pos_embed_type": "rope", "pos_embed_rope_base": 50.0,
    "pos_embed_rope_normalize_coords": "min", "pos_embed_rope_dtype": "bf16", "n_storage_tokens": 1,
    "mask_k_bias": True, "untie_cls_and_patch_norms": True, "untie_global_and_local_cls_norm": True,
    "pos_embed_rope_min_period": 0.5, "pos_embed_rope_max_period": 90.0,
}  # fmt: skip


PERIODS = ("pos_embed_rope_min_period", "pos_embed_rope_max_period")


def other(name: str) -> dict[str, Any]:
    """Another value of a field, and what goes with it."""
    return {key: OTHER[key] for key in (PERIODS if name in PERIODS else (name,))}


def test_every_field_has_another_value_here() -> None:
    assert set(OTHER) == set(ViTConfig.model_fields)
    assert all(getattr(SMALL, name) != value for name, value in OTHER.items())


@pytest.mark.parametrize("name", OTHER)
def test_every_field_changes_the_key_of_cached_features(name: str) -> None:
    model, same = VisionTransformer(SMALL), VisionTransformer(SMALL)
    same.load_state_dict(model.state_dict())
    changed = VisionTransformer(SMALL, **other(name))
    if {key: t.shape for key, t in changed.state_dict().items()} == {
        key: t.shape for key, t in model.state_dict().items()
    }:
        changed.load_state_dict(model.state_dict())  # all else is equal
    assert weights_hash(same) == weights_hash(model) != weights_hash(changed)


@pytest.mark.parametrize("name", OTHER)
def test_a_model_is_what_its_config_says(name: str) -> None:
    config = SMALL.changed(**other(name))
    assert VisionTransformer(config).config == config == ViTConfig(**config.model_dump())
    assert VisionTransformer(**config.model_dump()).config == config


@pytest.mark.parametrize("ffn_layer", ["mlp", "swiglu"])
def test_every_hidden_width_is_kept(ffn_layer: str) -> None:
    for width in (1, 7, 8, 24, 40, 344, 1023, 1365, 4096):
        config = SMALL.changed(ffn_layer=ffn_layer, hidden_dim=width)
        mlp = VisionTransformer(config).blocks[0].get_submodule("mlp")
        last = mlp.get_parameter("fc2.weight" if ffn_layer == "mlp" else "w3.weight")
        assert last.shape[1] == width == ViTConfig(**config.model_dump()).hidden_dim


def test_the_ratio_stands_for_the_hidden_width() -> None:
    assert ViTConfig(embed_dim=96, num_heads=3).hidden_dim == 384
    assert ViTConfig(embed_dim=96, num_heads=3, mlp_ratio=3.1).hidden_dim == 297
    assert ViTConfig(embed_dim=1536, num_heads=24, ffn_layer="swiglufused").hidden_dim == 4096 == swiglu_width(4 * 1536)
    assert SMALL.changed(mlp_ratio=2).hidden_dim == 48


@pytest.mark.parametrize(("options", "message"), [
    ({"foo": 1}, "no option 'foo'"),
    ({"depth": 0}, "depth 0: input should be greater than or equal to 1"),
    ({"embed_dim": "wide"}, "embed_dim 'wide'"),
    ({"img_size": 225}, "img_size 225 is not a multiple of patch_size 16"),
    ({"embed_dim": 0, "num_heads": 0}, "embed_dim 0: .*; num_heads 0: "),
])  # fmt: skip
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ViTConfig(**options)


def test_a_runs_backbone_has_all_options_of_its_student_group() -> None:
    assert set(ViTOptions.model_fields) <= set(Student.model_fields)
    overrides = [f"student.{key}={'null' if OTHER[key] is None else OTHER[key]}" for key in ViTOptions.model_fields]
    config = load_config(overrides=["student.arch=vit_tiny", "student.depth=3", "crops.global_crops_size=224",
                                    "crops.local_crops_size=84", "data.mean=[0.4]", "data.std=[0.2]",
                                    *overrides])  # fmt: skip
    vit = config.vit()
    assert {key: getattr(vit, key) for key in ViTOptions.model_fields} == {
        key: OTHER[key] for key in ViTOptions.model_fields
    }
    assert (vit.embed_dim, vit.depth, vit.num_heads, vit.img_size) == (192, 3, 3, 224)
    assert load_config(overrides=["student.layerscale=0"]).vit().layerscale is None


def test_a_run_resumes_with_the_options_that_it_has() -> None:
    shaping = {key.removeprefix("student.") for key in SHAPING_KEYS if key.startswith("student.")}
    assert shaping >= set(ViTOptions.model_fields) - set(RESIZING) | {"arch", "embed_dim", "depth", "num_heads"}


def test_known_sizes_have_names() -> None:
    for name, size in ARCHITECTURES.items():
        assert ViTConfig(**size._asdict()).name == name
    assert SMALL.name == "vit"
