"""hubconf.py: the reference's entry points, through torch.hub itself."""

import importlib.util
from pathlib import Path

import pytest
import torch
from weight_samples import PLAIN, assert_same_state, sample_model, sample_state, save

from dinov2cli.errors import WeightsError
from dinov2cli.models.classifier import LinearClassifier, head_input, load_classifier, read_linear_head
from dinov2cli.models.dense_heads import DPTHead
from dinov2cli.models.load.released import RELEASED
from dinov2cli.models.vision_transformer import shapes_of

DEPTHERS = [f"dinov2_vit{size}14_{kind}" for size in "sblg" for kind in ("ld", "dd")]
REPOSITORY = str(Path(__file__).parents[1])


def hub_load(name: str, **arguments: object) -> torch.nn.Module:
    model = torch.hub.load(REPOSITORY, name, source="local", **arguments)
    assert isinstance(model, torch.nn.Module)
    return model


def test_entry_points_are_the_released_names() -> None:
    specification = importlib.util.spec_from_file_location("hubconf", f"{REPOSITORY}/hubconf.py")
    assert specification is not None and specification.loader is not None
    hubconf = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(hubconf)
    entries = {name for name in dir(hubconf) if not name.startswith("_") and callable(getattr(hubconf, name))}
    assert entries == {*RELEASED, *DEPTHERS}
    for name in entries:
        assert getattr(hubconf, name).__name__ == name
        assert "Args:" in getattr(hubconf, name).__doc__  # what torch.hub.help prints


@torch.no_grad()
def test_depth_without_weights() -> None:
    """Names and arguments of the reference: a linear head of one or four layers, a DPT head; the range by the data."""
    linear = hub_load("dinov2_vits14_ld", pretrained=False, layers=1, weights="KITTI")
    assert linear(torch.randn(1, 3, 30, 41)).shape == (1, 1, 30, 41)
    assert linear.layers == (11,) and linear.head.config.max_depth == 80 and not linear.training
    assert hub_load("dinov2_vits14_ld", pretrained=False).layers == (2, 5, 8, 11)
    fused = hub_load("dinov2_vits14_dd", pretrained=False)
    assert isinstance(fused.head, DPTHead) and fused.head.config.max_depth == 10
    with pytest.raises(WeightsError, match="layers=2"):
        hub_load("dinov2_vits14_ld", pretrained=False, layers=2)


@pytest.mark.parametrize("name", ["dinov2_vits14", "dinov2_vits14_reg"])
def test_backbone_without_weights(name: str) -> None:
    model = hub_load(name, pretrained=False)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert shapes == shapes_of(RELEASED[name].architecture)
    assert not model.training


def test_backbone_with_weights_of_a_file(tmp_path: Path) -> None:
    state = sample_state(PLAIN)
    model = hub_load("dinov2_vits14", weights=str(save(state, tmp_path / "weights.pth")))
    assert_same_state(model.state_dict(), state)


@torch.no_grad()
def test_classifier_sees_what_the_reference_feeds_it() -> None:
    """One layer: class token and mean patch token. Four: the class tokens, earliest first, and that mean."""
    images = torch.randn(1, 3, 28, 42)
    for layers in (1, 4):
        model = hub_load("dinov2_vits14_lc", pretrained=False, layers=layers)
        assert isinstance(model, LinearClassifier)
        blocks = model.backbone.get_intermediate_layers(images, n=layers, return_class_token=True)
        features = torch.cat([*(cls for _, cls in blocks), blocks[-1][0].mean(1)], dim=1)
        torch.testing.assert_close(model(images), model.linear_head(features))
        final = model.backbone.forward_features(images)
        torch.testing.assert_close(features[:, -768:-384], final["x_norm_clstoken"])
        torch.testing.assert_close(features[:, -384:], final["x_norm_patchtokens"].mean(1))


def test_heads_of_every_input_are_recognised() -> None:
    assert [head_input(n * 384, 384, 12) for n in (2, 5, 1, 4)] == [(1, True), (4, True), (1, False), (4, False)]
    with pytest.raises(WeightsError, match=r"1000 inputs .* 384 wide with 12 blocks \(it would take 768, 1920, 384, "):
        head_input(1000, 384, 12)
    with pytest.raises(WeightsError, match=r"3 blocks \(it would take 768, 384\)"):
        head_input(5 * 384, 384, 3)


def test_own_head_on_own_backbone(tmp_path: Path) -> None:
    head = {"weight": torch.randn(7, 384), "bias": torch.randn(7)}
    backbone = save(sample_state(PLAIN), tmp_path / "weights.pth")
    classifier = load_classifier(backbone, save(head, tmp_path / "head.pth"))
    assert classifier(torch.randn(2, 3, 28, 28)).shape == (2, 7)
    assert_same_state(dict(classifier.linear_head.state_dict()), head)
    assert_same_state(classifier.backbone.state_dict(), sample_model(PLAIN).state_dict())


@pytest.mark.parametrize(("content", "message"), [
    ({"weight": torch.ones(3, 4)}, r"no linear head; it would hold 'weight' and 'bias', it holds \['weight'\]"),
    ({"weight": torch.ones(3, 4), "bias": torch.ones(4)}, r"weight \(3, 4\) and bias \(4,\) are no linear layer"),
    ([torch.ones(3)], "no linear head"),
])  # fmt: skip
def test_wrong_head_is_refused(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        read_linear_head(save(content, tmp_path / "head.pth"))


def test_arguments_without_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="layers=2: heads are released for 1 and for 4 layers"):
        hub_load("dinov2_vits14_lc", pretrained=False, layers=2)
    with pytest.raises(WeightsError, match="only released names have a released head"):
        load_classifier(save(sample_state(PLAIN), tmp_path / "weights.pth"))
