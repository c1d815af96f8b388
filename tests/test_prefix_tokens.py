"""All that reads tokens heeds a second kind of them before the patches: storage tokens beside the registers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import TINY, write_images

from dinov2cli.config import load_config
from dinov2cli.data.datasets import make_dataset
from dinov2cli.errors import ConfigError, WeightsError
from dinov2cli.eval.extract import Extractor
from dinov2cli.export.exporter import run as export
from dinov2cli.models.load import load_model
from dinov2cli.models.load.layouts import huggingface, timm
from dinov2cli.models.vision_transformer import VisionTransformer
from dinov2cli.requests.export import ExportRequest
from dinov2cli.requests.train import TrainRequest
from dinov2cli.start import run as train
from dinov2cli.train.networks import build_network
from dinov2cli.train.parameter_groups import parameter_groups
from dinov2cli.train.resuming import check_resumable
from dinov2cli.visualize.attention_maps import attention_maps
from dinov2cli.visualize.features import PatchFeatures


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `look` below finds."""
    folder = tmp_path_factory.mktemp("storage")
    return look(write_images(folder / "images"), folder)


def look(images: Path, folder: Path) -> dict[str, Any]:
    """Train a network of one register and two storage tokens (so 4 tokens before 16 patches), and look at it."""

    tokens = ("student.num_register_tokens=1", "student.n_storage_tokens=2")
    options = (*TINY, *tokens, "optim.epochs=1", "student.layerscale=0.1", "optim.base_lr=0.1")
    train(TrainRequest(overrides=options, data=str(images), output_dir=folder / "run", cpu=True))
    config = load_config(config_file=folder / "run" / "config.yaml")
    torch.manual_seed(config.train.seed)
    model = load_model(folder / "run")
    facts: dict[str, Any] = {"n_storage_tokens": model.config.n_storage_tokens}

    pictures = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features = model.forward_features(pictures)
        ((patches, _),) = model.get_intermediate_layers(pictures, return_class_token=True)
        stream, _ = model.prepare_tokens([pictures], [None])
        facts["tokens"] = [features["x_prenorm"].shape[1], len(stream) // 2]
        facts["registers, patches"] = [features[f"x_norm_{kind}tokens"].shape[1] for kind in ("reg", "patch")]
        facts["layers give the patches"] = torch.equal(patches, features["x_norm_patchtokens"])
        facts["of another size"] = list(model.get_intermediate_layers(pictures[..., :24], reshape=True)[0].shape)
        torch.testing.assert_close(model.class_tokens(pictures), features["x_norm_clstoken"])

        # The places of the masked patches, in the pass of training: those of the whole features.
        network = build_network(config, reads=frozenset({"cls", "masked", "patches"})).eval()
        network.backbone.load_state_dict(model.state_dict())
        masks = torch.rand(2, 16) < 0.5
        chosen = masks.flatten().nonzero().flatten()
        given = network([pictures, pictures[..., :16, :16]], [masks, None], chosen)
        whole = model.forward_features(pictures, masks)
        torch.testing.assert_close(given["patches"], whole["x_norm_patchtokens"])
        torch.testing.assert_close(given["masked"], whole["x_norm_patchtokens"].flatten(0, 1)[chosen])
        torch.testing.assert_close(given["cls"][:2], whole["x_norm_clstoken"])

        # They are read: with others the features are others.
        changed = load_model(folder / "run")
        changed.storage_tokens += torch.randn(24)
        facts["are read"] = not torch.allclose(changed(pictures), features["x_norm_clstoken"], atol=1e-3)

    groups = parameter_groups(network, config)
    of = {id(parameter): group["lr_multiplier"] for group in groups for parameter in group["params"]}
    facts["learn as registers"] = of[id(network.backbone.storage_tokens)] == of[id(network.backbone.register_tokens)]
    fresh = torch.load(next((folder / "run" / "eval").glob("*/teacher_checkpoint.pth")), weights_only=True)
    facts["saved"] = [name for name in fresh["teacher"] if "storage" in name]

    photo = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    maps = attention_maps(model, photo, resolution=3)
    facts["attention"] = [list(maps.queries), list(maps.weights.shape)]
    facts["sums"] = bool((maps.weights.sum((2, 3)) < 1).all())
    ((_, picture),) = PatchFeatures(model, 4).maps([(None, photo[:32, :32])])
    facts["picture"] = list(picture.shape)

    dataset = make_dataset(str(images))
    without = VisionTransformer(model.config.changed(n_storage_tokens=0))
    without.load_state_dict({name: value for name, value in model.state_dict().items() if name != "storage_tokens"})
    keys = [Extractor(each, detailed=True).recipe.weights for each in (model, without, changed)]
    facts["keys of the cache"] = len(set(keys))
    extracted = Extractor(model, detailed=True, num_workers=0)(dataset)
    facts["extracted"] = [list(tensor.shape) for tensor in (extracted.cls, extracted.tensors["mean_patch"])]

    facts["refusals"] = [layout.why_not(model.config) for layout in (huggingface, timm)]
    export(ExportRequest(checkpoint=str(folder / "run"), format="safetensors", output=folder / "model.safetensors"))
    with torch.no_grad():
        again = load_model(folder / "model.safetensors").forward_features(pictures)
    facts["exported"] = torch.equal(again["x_prenorm"], features["x_prenorm"])
    try:
        other = load_config(overrides=[*options, "student.n_storage_tokens=3"])
        check_resumable(folder / "run" / "config.yaml", other)
    except ConfigError as error:
        facts["resuming"] = error.message
    try:
        train(
            TrainRequest(
                overrides=(*options, "student.n_storage_tokens=3"),
                data=str(images),
                cpu=True,
                output_dir=folder / "another",
                init_from=str(folder / "run"),
            )
        )
    except WeightsError as error:
        facts["starting from"] = error.message
    return facts


def test_they_are_trained_saved_and_loaded(found: dict[str, Any]) -> None:
    assert found["saved"] == ["backbone.storage_tokens"]
    assert found["n_storage_tokens"] == 2
    assert found["are read"]
    assert found["learn as registers"]


def test_patches_are_found_behind_them(found: dict[str, Any]) -> None:
    assert found["tokens"] == [20, 20]
    assert found["registers, patches"] == [1, 16]
    assert found["layers give the patches"]
    assert found["of another size"] == [2, 24, 4, 3]
    assert found["picture"] == [4, 4, 24]
    assert found["extracted"] == [[16, 24], [16, 24]]


def test_attention_is_drawn_for_each(found: dict[str, Any]) -> None:
    assert found["attention"] == [["cls", "register 1", "storage 1", "storage 2"], [4, 2, 3, 4]]
    assert found["sums"], "what goes to the tokens before the patches is not drawn"


def test_cached_features_tell_them_apart(found: dict[str, Any]) -> None:
    assert found["keys of the cache"] == 3, "with others, and with none, the features are others"


def test_what_does_not_fit_is_refused_by_name(found: dict[str, Any]) -> None:
    assert found["exported"]
    assert all("it knows no storage tokens, which is 2 here" in refusal for refusal in found["refusals"])
    assert "student.n_storage_tokens (2 there, 3 here)" in found["resuming"]
    assert "storage tokens 2 instead of 3" in found["starting from"]
