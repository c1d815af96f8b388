"""Schedules against the reference's, and the parameter groups they apply to."""

from pathlib import Path

import numpy as np
import pytest

from dinov2cli.config import load_config
from dinov2cli.train.networks import build_network
from dinov2cli.train.parameter_groups import apply_schedules, parameter_groups
from dinov2cli.train.schedules import Schedules, cosine, linear

GOLDEN = np.load(Path(__file__).parent / "golden" / "schedules.npz")


@pytest.mark.parametrize(
    ("key", "ends", "warmup"),
    [("lr", (4e-3, 1e-6), 100), ("wd", (0.04, 0.4), 0), ("momentum", (0.992, 1.0), 0)],
)
def test_cosine_schedules_equal_the_reference(key: str, ends: tuple[float, float], warmup: int) -> None:
    ours = [cosine(i, 1000, *ends, warmup=warmup) for i in range(1000)]
    np.testing.assert_allclose(ours, GOLDEN[key], rtol=1e-12, atol=1e-15)


def test_teacher_temperature_equals_the_reference() -> None:
    ours = [linear(i, 300, 0.04, 0.07) for i in range(300)]
    np.testing.assert_allclose(ours, GOLDEN["teacher_temp"], rtol=1e-12)
    assert linear(5000, 300, 0.04, 0.07) == 0.07 == linear(0, 0, 0.04, 0.07)


def test_run_schedules() -> None:
    config = load_config(overrides=["train.OFFICIAL_EPOCH_LENGTH=10", "student.freeze_backbone_epochs=2"])
    schedules = Schedules(config, world_size=32)
    first, later, peak, last = (schedules.at(i) for i in (0, 15, 99, config.iterations() - 1))
    expected = {"lr": 0, "last_layer_lr": 0, "backbone_lr": 0, "weight_decay": 0.04, "momentum": 0.992}
    loss_weights = {"dino_local_loss_weight": 1.0, "gram_loss_weight": 0.0}
    assert first == pytest.approx({"iteration": 0, **expected, "teacher_temp": 0.04, **loss_weights})
    assert later["last_layer_lr"] == later["lr"] > 0 == later["backbone_lr"] and schedules.at(9)["last_layer_lr"] == 0
    assert peak["lr"] == pytest.approx(0.004 * (64 * 32 / 1024) ** 0.5)
    assert 1e-6 <= last["lr"] < 1.1e-5 and 0.399 < last["weight_decay"] <= 0.4 and last["teacher_temp"] == 0.07


def test_every_parameter_is_in_one_group_with_its_own_factors() -> None:
    config = load_config(overrides=["student.arch=vit_tiny", "student.depth=3", "ibot.separate_head=true",
                                    "student.num_register_tokens=2", "dino.head_n_prototypes=16",
                                    "ibot.head_n_prototypes=16"])  # fmt: skip
    network = build_network(config)
    groups = parameter_groups(network, config)
    values = {"lr": 1.0, "backbone_lr": 1.0, "last_layer_lr": 0.0, "weight_decay": 0.1}
    apply_schedules(groups, values)
    found = {id(p): group for group in groups for p in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups) == len(list(network.parameters()))
    names = dict(network.named_parameters())

    def lr_and_decay(name: str) -> tuple[float, float]:
        group = found[id(names[name])]
        return pytest.approx(group["lr"]), group["weight_decay"]

    assert lr_and_decay("backbone.patch_embed.proj.weight") == (0.9**4 * 0.2, 0.1)
    assert lr_and_decay("backbone.patch_embed.proj.bias") == (0.9**4 * 0.2, 0.0)
    for token in ("cls_token", "pos_embed", "mask_token", "register_tokens"):
        assert lr_and_decay(f"backbone.{token}") == (0.9**4, 0.1)
    assert lr_and_decay("backbone.blocks.0.attn.qkv.weight") == (0.9**3, 0.1)
    assert lr_and_decay("backbone.blocks.2.ls1.gamma") == (0.9, 0.0)
    assert lr_and_decay("backbone.norm.weight") == (1.0, 0.0)
    assert lr_and_decay("dino_head.mlp.0.weight") == (1.0, 0.1)
    assert lr_and_decay("ibot_head.last_layer.weight_v") == (0.0, 0.1)
