"""A part of a backbone is trained: the rest keeps its bits, adapters merge, and runs resume exactly."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import assert_same_weights, stop_after, weights
from tiny_run import TINY, metrics_of, write_images, write_weights
from torch import nn

from dinov2cli.config import load_config
from dinov2cli.config.vit import TrainedPart
from dinov2cli.errors import ConfigError
from dinov2cli.launch.training import resolve_config
from dinov2cli.launch.typed import print_origins
from dinov2cli.models.load import load_backbone_into, load_model
from dinov2cli.models.trained_part import LowRankLinear, plain_parameters, train_only
from dinov2cli.models.vision_transformer import VisionTransformer
from dinov2cli.requests.train import TrainRequest
from dinov2cli.train.trainer import Trainer

SIZE: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "layerscale": 0.5}
OPTIONS = [*(word for word in TINY if not word.startswith(("student.arch", "student.depth"))),
           "student.arch=vit", "student.depth=4", "optim.base_lr=0.05", "student.layerscale=1.0",
           "optim.layerwise_decay=1.0"]  # fmt: skip


def adapted(rank: int = 4, **options: Any) -> tuple[VisionTransformer, VisionTransformer]:
    """A backbone, and one with its weights and adapters."""
    torch.manual_seed(0)
    plain, model = (VisionTransformer(**SIZE, **options).eval() for _ in range(2))
    train_only(model, TrainedPart("lora", rank))
    model.load_state_dict(plain.state_dict(), strict=True)
    return plain, model


@pytest.mark.parametrize(
    "options", [{}, {"pos_embed_type": "rope", "mask_k_bias": True, "ffn_layer": "swiglu64", "norm_layer": "rmsnorm"}]
)
@torch.no_grad()
def test_adapters_begin_as_nothing_and_merge_into_the_same_features(options: dict[str, Any]) -> None:
    plain, model = adapted(**options)
    images = [torch.randn(2, 3, 32, 32), torch.randn(3, 3, 16, 16)]
    before = plain.forward_tokens(images, [None, None], torch.tensor([1, 20]))
    for expected, found in zip(before, model.forward_tokens(images, [None, None], torch.tensor([1, 20])), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    layers = [module for module in model.modules() if isinstance(module, LowRankLinear)]
    assert len(layers) == sum(isinstance(module, nn.Linear) for module in plain.blocks.modules())
    for layer in layers:
        nn.init.normal_(layer.lora_B, std=0.1)
    learnt = model.forward_features(images[0])["x_norm_patchtokens"]
    merged = VisionTransformer(plain.config).eval()
    merged.load_state_dict({**plain.state_dict(), **plain_parameters(model)}, strict=True)
    torch.testing.assert_close(
        merged.forward_features(images[0])["x_norm_patchtokens"], learnt, atol=1e-6 * float(learnt.abs().max()), rtol=0
    )
    assert not torch.allclose(plain.forward_features(images[0])["x_norm_patchtokens"], learnt, atol=1e-2)


def test_the_change_of_a_layer_has_the_rank_asked_for() -> None:
    plain, model = adapted(rank=3)
    layer = model.blocks[1].get_submodule("attn.qkv")
    assert isinstance(layer, LowRankLinear)
    nn.init.normal_(layer.lora_B)
    change = layer.merged() - plain.blocks[1].get_parameter("attn.qkv.weight")
    assert torch.linalg.matrix_rank(change.double(), atol=1e-4) == 3


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    write_images(folder / "images")
    write_weights(folder)
    return folder


def trainer_of(place: Path, run: Path, part: str) -> Trainer:
    words = [f"train.dataset_path={place / 'images'}", f"train.output_dir={run}", f"student.train={part}",
             f"student.pretrained_weights={place / 'weights.pth'}"]  # fmt: skip
    config = load_config(overrides=[*OPTIONS, *words])
    load = lambda backbone: load_backbone_into(backbone, place / "weights.pth")  # noqa: E731
    return Trainer(config, torch.device("cpu"), init_backbone=load)  # type: ignore[arg-type]


@pytest.mark.parametrize("part", ["last:2", "lora:2"])
def test_the_rest_keeps_its_bits_and_a_run_resumes_bit_for_bit(place: Path, tmp_path: Path, part: str) -> None:
    whole = trainer_of(place, tmp_path / "whole", part)
    before = whole.objective.student.backbone.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    trained = {name for name, parameter in whole.objective.student.named_parameters() if parameter.requires_grad}
    assert trained == set(whole.state()["optimizer"]), "moments are kept of nothing else"
    whole.train()
    after = whole.objective.student.backbone.state_dict()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {name.removeprefix("backbone.") for name in trained if name.startswith("backbone.")}

    given, teacher = load_model(place / "weights.pth").state_dict(), load_model(tmp_path / "whole").state_dict()
    assert teacher.keys() == given.keys(), "plain names, whatever was trained"
    moved = {name for name, tensor in teacher.items() if not torch.equal(tensor, given[name])}
    if part == "lora:2":
        linear = {name for name in given if name.endswith(".weight") and (".attn." in name or ".mlp." in name)}
        assert moved == linear
    else:
        assert moved == changed
        assert all(name.startswith(("blocks.2.", "blocks.3.", "norm.")) for name in moved)

    stop_after(trainer_of(place, tmp_path / "parts", part), 5)
    resumed = trainer_of(place, tmp_path / "parts", part)
    assert resumed.iteration == 6
    resumed.train()
    assert_same_weights(weights(whole), weights(resumed))
    assert metrics_of(whole.folder.path) == metrics_of(resumed.folder.path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["student.train=last:2"], "the rest would stay random; set student.pretrained_weights"),
        (["student.train=last:13", "student.pretrained_weights=x"], "there are 12 blocks; at most last:12"),
        (["student.train=lora:384", "student.pretrained_weights=x"], "layers of 384 have no higher rank"),
        (["student.train=lora:0", "student.pretrained_weights=x"], "student.train=lora:0: must be"),
        (["student.train=some"], "student.train=some: must be"),
    ],
)
def test_what_cannot_be_trained_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        load_config(overrides=["student.arch=vit_small", *words])
    assert message in refusal.value.message


def test_the_commands_own_way_from_words(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The size follows the weights, and what needs an option is not judged without it."""
    words = tuple(word for word in OPTIONS if not word.startswith("student.") or "rate" in word)
    request = TrainRequest(overrides=(*words, "student.train=last:1"), data=str(place / "images"), cpu=True,
                           output_dir=tmp_path / "run", init_from=str(place / "weights.pth"))  # fmt: skip
    config = resolve_config(request)
    assert (config.student.size(), config.student.train) == ((24, 4, 2), "last:1")
    print_origins(request, config)
    assert "run folder" in capsys.readouterr().err
