"""A student learns from a frozen teacher: what is trained, what is saved, what fits and what is refused."""

import logging
from pathlib import Path

import pytest
import torch
from tiny_run import TINY, metrics_of, write_teacher

from dinov2cli.bench.train import synthetic_batch
from dinov2cli.config import Config, load_config
from dinov2cli.errors import ConfigError, Dino2Error, WeightsError
from dinov2cli.launch.training import resolve_config
from dinov2cli.models.load import load_model
from dinov2cli.models.load.heads import heads_of
from dinov2cli.requests.train import TrainRequest
from dinov2cli.start import train
from dinov2cli.train.cost import estimate, step_flops
from dinov2cli.train.objective import SSLMetaArch

VALUES = {"iteration": 0, "teacher_temp": 0.05}
SHORT = [*TINY, "optim.epochs=1", "optim.warmup_epochs=0", "student.drop_path_rate=0.0"]
# What the teacher's heads decide is not typed.
TYPED = [word for word in SHORT if "prototypes" not in word]


def resolve(place: Path, run: Path, teacher: str | Path, *overrides: str) -> Config:
    request = TrainRequest(
        data=str(place / "data"), output_dir=run, teacher=str(teacher), overrides=(*TYPED, *overrides)
    )
    return resolve_config(request)


def teacher_states(objective: SSLMetaArch) -> dict[str, torch.Tensor]:
    frozen = objective.networks.followers["frozen_teacher"]
    return {name: value.clone() for name, value in frozen.state_dict().items()}


@pytest.mark.parametrize("kind", ["teacher", "backbone"])
def test_a_run_from_words_to_features(place: Path, tmp_path: Path, kind: str) -> None:
    """The command's own way: the run names its teacher for good, and the moving average alone is saved and loads."""
    run, words = tmp_path / "run", ["dino.head_n_prototypes=32"] * (kind == "backbone")
    config = resolve(place, run, place / kind, *words)
    file = place / kind / "eval/training_3/teacher_checkpoint.pth"
    assert config.distillation.teacher == str(file) and len(config.distillation.digest) == 32
    assert config.dino.head_n_prototypes == 32, "as the teacher's, though a head has 65536 by default"
    train(config, TrainRequest(cpu=True))
    assert load_config(config_file=run / "config.yaml") == config
    saved = torch.load(run / "eval/training_3/teacher_checkpoint.pth", weights_only=True)["teacher"]
    assert {name.split(".")[0] for name in saved} == {"backbone", "dino_head"}
    assert load_model(run).embed_dim == 24
    logged = metrics_of(run)[-1]
    assert ("dino_teacher_head_loss" in logged) == ("ibot_teacher_head_loss" in logged) == (kind == "backbone")
    # Another file in the teacher's place is refused by name; the same one elsewhere is the same teacher.
    moved = tmp_path / "moved.pth"
    moved.write_bytes(file.read_bytes())
    (tmp_path / "config.yaml").write_bytes((place / kind / "config.yaml").read_bytes())
    train(resolve(place, run, moved, *words, "optim.epochs=2"), TrainRequest(cpu=True))
    assert len(metrics_of(run)) == 8
    other = write_teacher(tmp_path / "other", "train.seed=1", "student.layerscale=0.5", heads=kind == "teacher")
    with pytest.raises(ConfigError, match=rf"learns from the teacher {moved}, not from the teacher {other}"):
        train(resolve(place, run, other, *words, "optim.epochs=3"), TrainRequest(cpu=True))
    with pytest.raises(ConfigError, match=rf"learns from the teacher {moved}, not from no teacher"):
        train(config.model_copy(update={"distillation": Config().distillation}), TrainRequest(cpu=True))


@pytest.mark.parametrize("kind", ["teacher", "backbone"])
def test_what_is_trained_and_what_is_not(place: Path, kind: str) -> None:
    """The student and fresh heads have gradients; the frozen teacher changes neither in a step nor in a following."""
    config = load_config(overrides=[*SHORT, f"distillation.teacher={place / kind}"])
    objective = SSLMetaArch(config).train()
    before = teacher_states(objective)
    source = load_model(place / kind).state_dict()
    assert all(torch.equal(before[f"backbone.{name}"], value) for name, value in source.items())
    objective(synthetic_batch(config), VALUES).total.backward()
    without = {name for name, value in objective.student.named_parameters() if value.grad is None}
    assert without == {"backbone.mask_token"}, "the student sees all patches"
    assert ("teacher_heads.dino_head.mlp.0.weight" in dict(objective.student.named_parameters())) == (kind != "teacher")
    with torch.no_grad():
        for parameter in objective.student.parameters():
            parameter.add_(1.0)
    objective.networks.follow({"iteration": 0, "momentum": 0.5})
    after = teacher_states(objective)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not [name for name in objective.saved_state() if name.startswith("frozen_teacher")]
    # Monitors look at what is trained.
    view = objective.last_view
    assert view is not None and view.cls.shape == (16, 24) and view.targets.shape == (16, 32)


def test_the_same_student_whatever_it_learns_from(place: Path) -> None:
    """A teacher draws nothing of the numbers that the student begins with."""
    states = []
    for words in ([], [f"distillation.teacher={place / 'teacher'}"]):
        torch.manual_seed(0)
        states.append(SSLMetaArch(load_config(overrides=[*SHORT, *words])).student.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_all_patches_are_compared_where_asked_for(place: Path) -> None:
    words = [
        f"distillation.teacher={place / 'teacher'}",
        "distillation.patches=all",
        f"train.dataset_path={place}/data",
    ]
    config = load_config(overrides=[*SHORT, *words])
    batch = synthetic_batch(config)
    assert batch.masks.all() and len(batch.mask_indices) == batch.masks.numel() == 16 * 16
    torch.testing.assert_close(batch.masks_weight, torch.full((256,), 1 / 16))
    assert SSLMetaArch(config).train()(batch, VALUES).logged["ibot_loss"] > 0


def test_the_teachers_cost_is_counted(place: Path) -> None:
    plain, distilled = (load_config(overrides=[*SHORT, *words])
                        for words in ([], [f"distillation.teacher={place / 'teacher'}"]))  # fmt: skip
    memory = [estimate(c, world_size=1, sharding="none", precision="fp32") for c in (plain, distilled)]
    parameters = 4e-9 * sum(value.numel() for value in teacher_states(SSLMetaArch(distilled)).values())
    assert memory[1].teacher - memory[0].teacher == pytest.approx(parameters)
    flops = step_flops(distilled)
    assert not step_flops(plain).passes and 0 < flops.passes["frozen_teacher"] < flops.step
    # The frozen teacher, twice as wide, costs more than the moving average that is not asked any more.
    assert flops.step > step_flops(plain).step


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["student.patch_size=16"], r"student.patch_size=16: the teacher has patches of 8 pixels.*set student.patch_"),
        (["student.in_chans=1", "data.mean=[0.5]", "data.std=[0.2]"], r"student.in_chans=1: the teacher has 3 image"),
        (["data.mean=[0, 0, 0]", "data.std=[1, 1, 1]"], r"data.mean=\[0.0, 0.0, 0.0\].*learnt from images normalised"),
        (["dino.head_n_prototypes=48"], r"dino.head_n_prototypes=48: the teacher has 32.*dino.head_n_prototypes=32"),
        (["ibot.separate_head=true"], r"ibot.separate_head=true: the teacher has false"),
    ],
)
def test_what_does_not_fit_is_named(place: Path, tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(place, tmp_path / "run", place / "teacher", *overrides)
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_cannot_be_read(place: Path, tmp_path: Path) -> None:
    torn = tmp_path / "torn.pth"
    torn.write_bytes((place / "teacher/eval/training_3/teacher_checkpoint.pth").read_bytes()[:2000])
    odd = torch.load(place / "teacher/eval/training_3/teacher_checkpoint.pth", weights_only=True)["teacher"]
    del odd["dino_head.last_layer.weight_g"]
    torch.save(odd, tmp_path / "odd.pth")
    (tmp_path / "config.yaml").write_bytes((place / "teacher/config.yaml").read_bytes())
    for teacher, said in (
        ("gone", "neither a file"),
        (torn, "cut short"),
        (tmp_path / "odd.pth", "dino_head cannot be"),
    ):
        with pytest.raises(WeightsError, match=rf"^distillation.teacher \(--teacher\): .*{said}"):
            resolve(place, tmp_path / "run", teacher)
    with pytest.raises(Dino2Error, match=r"distillation.patches=all: there is no teacher"):
        load_config(overrides=["distillation.patches=all"])


def test_a_student_larger_than_its_teacher_is_said(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("dino2"), "propagate", True)
    resolve(place, tmp_path / "run", place / "teacher", "student.embed_dim=64")
    assert "the student is larger than its teacher (0.1 M and 0.1 M parameters)" in caplog.text


def test_heads_of_other_hands(place: Path) -> None:
    """A plain last layer, as DINOv3 has it, and a later PyTorch's weight normalisation compute the same."""
    file = place / "teacher/eval/training_3/teacher_checkpoint.pth"
    own = {name: value for name, value in torch.load(file, weights_only=True)["teacher"].items() if "head" in name}
    v, g = (own[f"dino_head.last_layer.weight_{part}"] for part in "vg")
    rest = {name: value for name, value in own.items() if "last_layer" not in name}
    plain = {**rest, "dino_head.last_layer.weight": torch._weight_norm(v, g)}
    later = {f"dino_head.last_layer.parametrizations.weight.original{i}": value for i, value in enumerate((g, v))}
    weights = []
    for state in (own, plain, {**rest, **later}):
        head = heads_of(state, "file")["dino_head"]
        assert head.sizes == (48, 32, 3, 32, 16)
        weights.append(torch._weight_norm(head.state["last_layer.weight_v"], head.state["last_layer.weight_g"]))
    torch.testing.assert_close(weights[1], weights[0])
    assert torch.equal(weights[2], weights[0])
