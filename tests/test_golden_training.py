"""Whole trainings, step by step, against what the reference printed: losses, gradient norms, final weights.

Where the initial weights in the files come from: tests/golden/recover_initial_weights.py.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from dinov2cli.config import Config, load_config
from dinov2cli.data.collate import MultiCropBatch
from dinov2cli.train.objective import SSLMetaArch
from dinov2cli.train.optimizer import build_optimizer, clip_gradients
from dinov2cli.train.parameter_groups import apply_schedules

CPU = torch.device("cpu")
GOLDEN = Path(__file__).parent / "golden"
SHARED = [
    "student.arch=vit_tiny", "student.embed_dim=24", "student.depth=4", "student.num_heads=2", "student.patch_size=14",
    "student.drop_path_rate=0.0", "crops.global_crops_size=42", "crops.local_crops_size=28",
    "crops.local_crops_number=3", "dino.head_n_prototypes=64", "dino.head_hidden_dim=32", "dino.head_bottleneck_dim=16",
    "train.batch_size_per_gpu=4",
]  # fmt: skip
TRAININGS = {
    "train_centering_shared_head": [],
    "train_sinkhorn_separate_head": [
        "train.centering=sinkhorn_knopp", "student.ffn_layer=swiglufused", "student.num_register_tokens=2",
        "optim.layerwise_decay=1.0", "ibot.separate_head=true", "ibot.head_n_prototypes=80", "ibot.head_hidden_dim=32",
        "ibot.head_bottleneck_dim=16",
    ],
}  # fmt: skip


DISTILLATION = [
    "student.arch=vit_tiny", "student.embed_dim=16", "student.depth=2", "student.num_heads=2", "student.patch_size=8",
    "student.num_register_tokens=2", "student.interpolate_antialias=true", "student.interpolate_offset=0.0",
    "student.drop_path_rate=0.0", "crops.global_crops_size=32", "crops.local_crops_size=16",
    "crops.local_crops_number=3", "dino.head_hidden_dim=24", "dino.head_bottleneck_dim=12", "ibot.head_hidden_dim=24",
    "ibot.head_bottleneck_dim=12", "dino.head_n_prototypes=48", "ibot.head_n_prototypes=40", "ibot.separate_head=true",
    "train.centering=sinkhorn_knopp", "train.batch_size_per_gpu=3", "optim.layerwise_decay=1.0",
]  # fmt: skip
ROTARY = [
    *(word for word in DISTILLATION if "register" not in word and "interpolate" not in word),
    "student.pos_embed_type=rope", "student.n_storage_tokens=2",
]  # fmt: skip


class Step(NamedTuple):
    """What one step printed; `objective` holds the weights after it."""

    objective: SSLMetaArch
    total: float
    losses: dict[str, float]
    grad_norms: dict[str, float]


@pytest.mark.gpu
@pytest.mark.parametrize("name", TRAININGS)
def test_on_a_gpu_it_equals_the_reference_too(name: str) -> None:
    test_training_equals_the_reference(name, checkpointing=False, device=torch.device("cuda"))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", TRAININGS)
def test_training_equals_the_reference(name: str, checkpointing: bool, device: torch.device = CPU) -> None:
    golden = np.load(GOLDEN / f"{name}.npz")
    config = config_of(name, f"train.activation_checkpointing={str(checkpointing).lower()}")
    for number, step in enumerate(train_steps(golden, config, arrays(golden, "init/"), device)):
        for key, value in step.losses.items():
            assert value == pytest.approx(golden[f"step{number}/loss/{key}"].item(), rel=1e-4), (number, key)
        for module, norm in step.grad_norms.items():
            assert norm == pytest.approx(golden[f"step{number}/grad_norm/{module}"].item(), rel=1e-4), number

    assert_final_weights(step.objective.student, arrays(golden, "final_student/"))
    assert_final_weights(step.objective.teacher, arrays(golden, "final_teacher/"))


@pytest.mark.parametrize("rotary", [False, True])
def test_distillation_equals_the_reference(tmp_path: Path, rotary: bool) -> None:
    """From a teacher with heads of its own, of other widths than the student's, in the file that a training leaves.

    DINOv3's own vision transformer and heads were recorded, too, whose last layers are plain.
    """
    golden = np.load(GOLDEN / f"distillation{'_rope' * rotary}.npz")
    teacher, weights = arrays(golden, "teacher/"), tmp_path / "teacher_checkpoint.pth"
    torch.save({"teacher": teacher}, weights)
    options = "num_heads: 2, norm_layer: layernorm, interpolate_antialias: true, interpolate_offset: 0.0"
    (tmp_path / "config.yaml").write_text(f"student: {{{options}}}")
    words = [*(ROTARY if rotary else DISTILLATION), f"distillation.teacher={weights}"]
    config = load_config(overrides=words)
    initial = arrays(golden, "init_student/")
    for number, step in enumerate(train_steps(golden, config, initial, CPU, plain_heads=rotary)):
        printed = printed_by_dinov3(golden, number, config)
        for key, value in {**step.losses, "total": step.total}.items():
            assert value == pytest.approx(printed[key], rel=1e-5), (number, key)
        for module, norm in step.grad_norms.items():
            assert norm == pytest.approx(golden[f"step{number}/grad_norm/{module}"].item(), rel=1e-4), number
    assert_final_weights(step.objective.student, arrays(golden, "final_student/"))
    assert_final_weights(step.objective.teacher, arrays(golden, "final_ema/"))
    frozen = step.objective.networks.followers["frozen_teacher"].state_dict()
    assert rotary or frozen.keys() == teacher.keys()
    assert all(torch.equal(frozen[key], teacher[key]) for key in frozen.keys() & teacher.keys())


def printed_by_dinov3(golden: np.lib.npyio.NpzFile, number: int, config: Config) -> dict[str, float]:
    """Its losses as ours are: it prints other parts of the same total.

    Means over the pairs of crops, which are 6 of local and global ones and 2 of global ones, KoLeo without its weight,
    and iBOT of both crops.
    """
    losses = arrays(golden, f"step{number}/loss/")
    printed = {key: value.item() for key, value in losses.items() if "weight" not in key}
    for crops, share in (("local", 6 / 8), ("global", 2 / 8)):
        printed[f"dino_{crops}_crops_loss"] *= share
    printed["koleo_loss"] *= config.dino.koleo_loss_weight
    printed["ibot_loss"] /= 2
    return printed


def test_gram_anchoring_equals_the_reference() -> None:
    """With larger crops for the Gram teacher, which is refreshed once, after the second step."""
    golden = np.load(GOLDEN / "train_gram.npz")
    gram = ["use_loss=true", "img_level=true", "it_load_ema_teacher=0", "update_frequency=2", "it_first_update=2",
            "max_updates=1"]  # fmt: skip
    sizes = ["train.batch_size_per_gpu=2", "crops.gram_teacher_crops_size=64"]
    config = load_config(overrides=[*DISTILLATION, *sizes, *(f"gram.{word}" for word in gram)])
    initial, before = arrays(golden, "init_student/"), arrays(golden, "init_gram_teacher/")
    for number, step in enumerate(train_steps(golden, config, initial, CPU, before)):
        for key, value in {**step.losses, "total": step.total}.items():
            assert value == pytest.approx(printed_by_dinov3(golden, number, config)[key], rel=1e-5), (number, key)
        for module, norm in step.grad_norms.items():
            assert norm == pytest.approx(golden[f"step{number}/grad_norm/{module}"].item(), rel=1e-4), number
        now = step.objective.networks.followers["gram_teacher"].state_dict()
        refreshed = any(not torch.equal(now[key], before[key]) for key in now)
        assert refreshed == golden[f"step{number}/gram_refreshed_after"], number
        before = {key: value.clone() for key, value in now.items()}
    assert_final_weights(step.objective.student, arrays(golden, "final_student/"))
    assert_final_weights(step.objective.teacher, arrays(golden, "final_ema/"))


def assert_final_weights(network: torch.nn.Module, final: dict[str, torch.Tensor]) -> None:
    assert final.keys() == network.state_dict().keys()
    for key, value in network.state_dict().items():
        difference = (value.cpu() - final[key]).abs()
        if key.endswith("attn.qkv.bias"):
            # Softmax is blind to the keys' bias: its gradient is rounding noise, which Adam makes full steps of.
            queries, keys, values = difference.chunk(3)
            assert keys.max() <= 5e-3, key
            difference = torch.cat([queries, values])
        assert difference.max() <= 1e-4, key


def config_of(name: str, *overrides: str) -> Config:
    return load_config(overrides=[*SHARED, *TRAININGS[name], *overrides])


def train_steps(
    golden: np.lib.npyio.NpzFile,
    config: Config,
    initial: dict[str, torch.Tensor],
    device: torch.device,
    gram_teacher: dict[str, torch.Tensor] | None = None,
    plain_heads: bool = False,
) -> Iterator[Step]:
    """The recorded four steps from the given weights, with our code."""
    objective = SSLMetaArch(config).train()
    for head in (*objective.student.heads(), *objective.teacher.heads()):
        if plain_heads:
            prototypes, width = head.last_layer.weight_v.shape
            head.last_layer = torch.nn.Linear(width, prototypes, bias=False)  # type: ignore[assignment]
    objective.teacher.requires_grad_(False)
    objective.student.load_state_dict(initial, strict=True)
    objective.teacher.load_state_dict(initial, strict=True)
    if gram_teacher is not None:
        objective.networks.followers["gram_teacher"].load_state_dict(gram_teacher, strict=True)
    objective.to(device)
    optimizer = build_optimizer(objective.student, config)
    for number in range(4):
        lr, weight_decay, momentum, temperature, last_lr = golden[f"step{number}/hyper_lr_wd_mom_temp_lastlr"]
        values = {
            "iteration": number, "lr": lr, "last_layer_lr": last_lr, "backbone_lr": lr, "weight_decay": weight_decay,
            "momentum": momentum, "teacher_temp": temperature,
        }  # fmt: skip
        apply_schedules(optimizer.param_groups, values)
        losses = objective(batch_of(golden, number, config).to(device), values)
        losses.total.backward()
        norms = clip_gradients(objective.student, config.optim.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        objective.networks.follow(values)
        printed = {name: value.item() for name, value in losses.logged.items()}
        yield Step(objective, losses.total.item(), printed, {module: norm.item() for module, norm in norms.items()})


def arrays(golden: np.lib.npyio.NpzFile, prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): torch.from_numpy(golden[key]) for key in golden if key.startswith(prefix)}


def batch_of(golden: np.lib.npyio.NpzFile, step: int, config: Config) -> MultiCropBatch:
    crops = arrays(golden, f"step{step}/")
    larger = crops.get("gram_teacher_crops")
    masks = crops["masks"]
    per_image = masks.sum(1, keepdim=True).clamp(min=1)
    return MultiCropBatch(
        global_crops=pixels(crops["global"]),
        local_crops=pixels(crops["local"]),
        masks=masks,
        mask_indices=masks.flatten().nonzero().flatten(),
        masks_weight=(1 / per_image).expand_as(masks)[masks],
        iteration=step,
        samples=torch.arange(config.train.batch_size_per_gpu),
        gram_teacher_crops=None if larger is None else pixels(larger),
    )


def pixels(crops: torch.Tensor) -> torch.Tensor:
    """Normalised crops; later files hold them as whole 32nds."""
    return crops.float() / 32 if crops.dtype == torch.int8 else crops
