"""The reference's own model, written anew from its description, takes what a run of ours has written.

It is built by the keys of the run's config.yaml alone, as the reference's evaluations build it: block chunks and all.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from tiny_run import write_images
from torch import Tensor, nn

import dinov2cli
from dinov2cli.config import load_config
from dinov2cli.errors import ConfigError
from dinov2cli.models.load import load_model

SIZES = {
    "vit_small": (384, 12, 6),
    "vit_base": (768, 12, 12),
    "vit_large": (1024, 24, 16),
    "vit_giant2": (1536, 40, 24),
}


class ReferenceBlock(nn.Module):
    def __init__(self, dim: int, heads: int, keys: dict[str, Any]) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=1e-6) for _ in range(2))
        self.attn = nn.ModuleDict(
            {
                "qkv": nn.Linear(dim, 3 * dim, bias=keys["qkv_bias"]),
                "proj": nn.Linear(dim, dim, bias=keys["proj_bias"]),
            }
        )
        self.swiglu = keys["ffn_layer"] in ("swiglu", "swiglufused")
        hidden, bias = 4 * dim, keys["ffn_bias"]
        if self.swiglu:
            hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
            layers = {"w12": nn.Linear(dim, 2 * hidden, bias=bias), "w3": nn.Linear(hidden, dim, bias=bias)}
        else:
            layers = {"fc1": nn.Linear(dim, hidden, bias=bias), "fc2": nn.Linear(hidden, dim, bias=bias)}
        self.mlp = nn.ModuleDict(layers)
        self.ls1, self.ls2 = nn.Module(), nn.Module()
        for scale in (self.ls1, self.ls2):
            scale.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.attn["qkv"](self.norm1(x)).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        weights = (q * (d // self.heads) ** -0.5 @ k.transpose(-2, -1)).softmax(-1)
        x = x + self.ls1.gamma * self.attn["proj"]((weights @ v).transpose(1, 2).reshape(b, n, d))
        y = self.norm2(x)
        if self.swiglu:
            gate, value = self.mlp["w12"](y).chunk(2, -1)
            y = self.mlp["w3"](F.silu(gate) * value)
        else:
            y = self.mlp["fc2"](F.gelu(self.mlp["fc1"](y)))
        return x + self.ls2.gamma * y


class ReferenceModel(nn.Module):
    """By the keys `student` and `crops.global_crops_size` of a config.yaml; KeyError for an unknown `arch`."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        keys = config["student"]
        dim, depth, heads = SIZES[keys["arch"]]
        patch, side = keys["patch_size"], config["crops"]["global_crops_size"]
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch, patch)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (side // patch) ** 2, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim))
        if keys["num_register_tokens"]:
            self.register_tokens = nn.Parameter(torch.zeros(1, keys["num_register_tokens"], dim))
        blocks: list[nn.Module] = [ReferenceBlock(dim, heads, keys) for _ in range(depth)]
        if chunks := keys["block_chunks"]:  # a chunk holds its blocks at their places in the whole model
            size = depth // chunks
            self.blocks = nn.ModuleList(
                nn.ModuleList([nn.Identity()] * i + blocks[i : i + size]) for i in range(0, depth, size)
            )
        else:
            self.blocks = nn.ModuleList(blocks)
        self.flat = blocks
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        """Class tokens of images at the native size."""
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        if hasattr(self, "register_tokens"):
            x = torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], 1)
        for block in self.flat:
            x = block(x)
        return self.norm(x)[:, 0]


@pytest.mark.slow
def test_the_reference_loads_our_teacher_by_our_config(tmp_path: Path) -> None:
    """`vitl14`, which has block chunks in the reference, with a smaller model and heads."""
    overrides = (
        "student.arch=vit_small", "student.block_chunks=4", "student.num_register_tokens=2",
        "crops.global_crops_size=56", "crops.local_crops_size=28", "crops.local_crops_number=2",
        "dino.head_n_prototypes=32", "ibot.head_n_prototypes=32", "dino.head_hidden_dim=32", "ibot.head_hidden_dim=32",
        "train.batch_size_per_gpu=4", "train.OFFICIAL_EPOCH_LENGTH=1", "train.num_workers=0", "optim.epochs=1",
        "optim.warmup_epochs=0", "evaluation.eval_period_iterations=1",
    )  # fmt: skip
    run = tmp_path / "run"
    data = str(write_images(tmp_path / "images"))
    request = dinov2cli.TrainRequest(preset="vitl14", data=data, output_dir=run, overrides=overrides, cpu=True)
    dinov2cli.run(request)
    model = ReferenceModel(yaml.safe_load((run / "config.yaml").read_text())).eval()
    teacher = torch.load(run / "eval/training_0/teacher_checkpoint.pth", weights_only=True)["teacher"]
    backbone = {name.removeprefix("backbone."): t for name, t in teacher.items() if name.startswith("backbone.")}
    model.load_state_dict(backbone, strict=True)  # every block of the reference is one of ours, and the reverse
    images = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        torch.testing.assert_close(model(images), load_model(run)(images), atol=1e-4, rtol=1e-4)


def test_chunks_are_taken_as_none_and_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="dino2"):
        config = load_config(overrides=["student.block_chunks=4"])
    assert config.student.block_chunks == 0 and "block_chunks=4 is taken as 0" in caplog.text
    assert all(load_config(preset=name).student.block_chunks == 0 for name in ("vitl14", "vitg14", "vitl16_short"))


def test_no_name_stays_beside_another_size() -> None:
    """The reference, which knows names alone, would build the named size and leave its further blocks random."""
    config = load_config(overrides=["student.arch=vit_small", "student.depth=6"])
    assert config.student.arch == "vit" and config.arch() == (384, 6, 6)
    with pytest.raises(KeyError):
        ReferenceModel(config.model_dump())
    same = load_config(overrides=["student.embed_dim=384", "student.depth=12", "student.num_heads=6"])
    assert same.student == load_config(overrides=["student.arch=vit_small"]).student
    with pytest.raises(ConfigError, match=r"student\.arch=vit: give student\.embed_dim"):
        load_config(overrides=["student.arch=vit"])


def test_the_reference_reads_the_config_beside_an_official_export(tmp_path: Path) -> None:
    from weight_samples import PLAIN, export_model, sample_model, save

    architecture = PLAIN.changed(embed_dim=384, depth=12, num_heads=6, hidden_dim=1536, layerscale=1e-5)
    source = save(sample_model(architecture).state_dict(), tmp_path / "source.pth")
    # Another run's config.yaml lies where the export goes: it is not of this file.
    (tmp_path / "config.yaml").write_text("student: {arch: vit_small, interpolate_offset: 0.0}\n")
    given = tmp_path / "of_source.yaml"
    given.write_text("student: {arch: vit_small, patch_size: 14, interpolate_offset: 0.05}\n")
    export_model(source, "official", tmp_path / "m.pth", config_file=given)
    beside = yaml.safe_load((tmp_path / "m.pth.dino2.yaml").read_text())
    model = ReferenceModel({"student": {**beside["student"], "block_chunks": 0}, "crops": beside["crops"]}).eval()
    model.load_state_dict(torch.load(tmp_path / "m.pth", weights_only=True), strict=True)
    assert beside["student"]["interpolate_offset"] == 0.05
    assert math.isclose(load_model(tmp_path / "m.pth").config.interpolate_offset, 0.05)
