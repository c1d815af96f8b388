"""Continued pretraining: a training that starts from weights made elsewhere."""

from pathlib import Path

import pytest
import torch
from tiny_run import TINY, metrics_of, write_images
from weight_samples import assert_same_state, export_model, sample_model, sample_state, save

from dinov2cli.config import Config, ViTConfig
from dinov2cli.errors import WeightsError
from dinov2cli.launch.training import resolve_config
from dinov2cli.models.load import load_backbone_into, load_model
from dinov2cli.requests.train import TrainRequest
from dinov2cli.start import train
from dinov2cli.train.trainer import Trainer

SOURCE = ViTConfig(
    embed_dim=24, depth=2, num_heads=2, patch_size=8, img_size=32, hidden_dim=64, ffn_layer="swiglu",
    layerscale=1.0,    num_register_tokens=2, interpolate_antialias=True, interpolate_offset=0.0,
)  # fmt: skip
# The tiny run without its architecture, which then follows the weights.
_SIZE = ("student.arch", "student.embed", "student.depth", "student.num")
TRAINING = [key for key in TINY if not key.startswith(_SIZE)]


def config_for(tmp_path: Path, weights: Path, *overrides: str) -> Config:
    data = tmp_path / "data"
    if not data.exists():
        write_images(data)
    overrides = (*TRAINING, *overrides)
    return resolve_config(
        TrainRequest(overrides=overrides, data=str(data), output_dir=tmp_path / "run", init_from=str(weights))
    )


def exported(tmp_path: Path, format_name: str, architecture: ViTConfig = SOURCE) -> Path:
    """An export of a teacher whose run's config.yaml says how many heads it has."""
    model = sample_model(architecture)
    folder = tmp_path / "source"
    teacher = {f"backbone.{name}": tensor for name, tensor in model.state_dict().items()}
    save({"teacher": teacher}, folder / "eval" / "training_7" / "teacher_checkpoint.pth")
    (folder / "config.yaml").write_text(f"student: {{num_heads: {architecture.num_heads}}}")
    output = tmp_path / {"hf": "hf", "official": "weights.pth", "timm": "timm.safetensors"}[format_name]
    export_model(folder, format_name, output)
    return output


@pytest.mark.parametrize("format_name", ["hf", "official", "timm"])
@torch.no_grad()
def test_first_teacher_gives_the_sources_features(tmp_path: Path, format_name: str) -> None:
    weights = exported(tmp_path, format_name)
    config = config_for(tmp_path, weights)
    trainer = Trainer(config, torch.device("cpu"), init_backbone=lambda backbone: load_backbone_into(backbone, weights))
    source = load_model(weights)
    images = torch.randn(2, 3, 32, 48)
    for network in (trainer.objective.teacher, trainer.objective.student):
        assert_same_state(network.backbone.state_dict(), source.state_dict())
        assert torch.equal(network.backbone.eval()(images), source(images))


@pytest.mark.slow
def test_training_from_an_export_runs_and_warms_the_heads_up_first(tmp_path: Path) -> None:
    """Through the first epoch only the heads learn; then the backbone moves too."""
    weights = exported(tmp_path, "hf")
    config = config_for(tmp_path, weights, "student.freeze_backbone_epochs=1")
    train(config, TrainRequest(cpu=True))
    source = load_model(weights)
    warmed_up = load_model(tmp_path / "run" / "eval" / "training_3" / "teacher_checkpoint.pth")
    for name, tensor in source.state_dict().items():
        torch.testing.assert_close(warmed_up.state_dict()[name], tensor, atol=1e-6, rtol=1e-6)
    trained = load_model(tmp_path / "run")
    assert (trained.blocks[0].attn.qkv.weight - source.blocks[0].attn.qkv.weight).abs().max() > 1e-5
    metrics = metrics_of(tmp_path / "run")
    assert len(metrics) == 12 and all(line["total_loss"] is not None for line in metrics)


@torch.no_grad()
def test_a_larger_resolution_starts_with_the_sources_features_there(tmp_path: Path) -> None:
    weights = exported(tmp_path, "official")
    config = config_for(tmp_path, weights, "crops.global_crops_size=64")
    trainer = Trainer(config, torch.device("cpu"), init_backbone=lambda backbone: load_backbone_into(backbone, weights))
    images = torch.randn(2, 3, 64, 64)
    backbone = trainer.objective.teacher.backbone.eval()
    assert backbone.pos_embed.shape == (1, 65, 24)
    torch.testing.assert_close(backbone(images), load_model(weights)(images), atol=1e-5, rtol=0)


def test_architecture_follows_the_weights_unless_it_is_set(tmp_path: Path) -> None:
    weights = exported(tmp_path, "official")
    student = config_for(tmp_path, weights).student
    assert (student.embed_dim, student.depth, student.num_heads) == (24, 2, 2)
    assert (student.ffn_layer, student.num_register_tokens, student.interpolate_offset) == ("swiglu", 2, 0.0)
    chosen = config_for(tmp_path, weights, "student.arch=vit_small", "student.num_register_tokens=0").student
    assert (chosen.arch, chosen.embed_dim, chosen.num_register_tokens) == ("vit_small", None, 0)


def test_a_run_resumes_without_the_weights_it_began_with(tmp_path: Path) -> None:
    weights = exported(tmp_path, "official")
    begun = config_for(tmp_path, weights, "optim.epochs=1")
    train(begun, TrainRequest(cpu=True))
    weights.unlink()
    resumed = config_for(tmp_path, weights)  # as typed before, but for its length
    assert resumed.student == begun.student
    train(resumed, TrainRequest(cpu=True))
    assert len(metrics_of(tmp_path / "run")) == 12


def test_adaptation_preset_takes_the_weights_architecture(tmp_path: Path) -> None:
    source = save(sample_state(SOURCE.changed(embed_dim=192, num_heads=3, hidden_dim=512, patch_size=14, img_size=56)),
                  tmp_path / "weights.pth")  # fmt: skip
    photos, run = "SamplePhotos:split=TRAIN", tmp_path / "run"
    config = resolve_config(TrainRequest(preset="adapt_518", data=photos, output_dir=run, init_from=str(source)))
    assert config.iterations() == 10_000 and config.crops.global_crops_size == 518
    assert (config.student.embed_dim, config.student.depth, config.student.ffn_layer) == (192, 2, "swiglu")


def test_another_patch_size_is_refused_in_words(tmp_path: Path) -> None:
    weights = exported(tmp_path, "official")
    config = config_for(tmp_path, weights, "student.patch_size=16")
    with pytest.raises(WeightsError, match="cannot start this model: it has patch size 8 instead of 16"):
        train(config, TrainRequest(cpu=True))
