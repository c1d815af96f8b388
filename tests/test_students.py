"""Several students of one pass of a teacher: each is the run that it would be alone, to the last bit."""

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from processes import run_in_processes
from tiny_run import LIBRARY, TINY, metrics_of

from dinov2cli.config import Config
from dinov2cli.console import Interrupted
from dinov2cli.errors import ConfigError, TrainingFailure
from dinov2cli.launch.training import first_look, resolve_config, resolve_students
from dinov2cli.requests.train import TrainRequest
from dinov2cli.start import train
from dinov2cli.train.cost import estimate_together, step_flops
from dinov2cli.train.dry_run import rehearse
from dinov2cli.train.students import train_students
from dinov2cli.train.trainer import Trainer

CPU = torch.device("cpu")
WIDE = {"student": {"embed_dim": 32}, "optim": {"epochs": 1, "base_lr": 0.001}}
DEEP = {"student": {"depth": 3, "drop_path_rate": 0.2}, "dino": {"koleo_loss_weight": 0.0}}
SCORED = ["evaluation.knn_period=8", "evaluation.knn_train_dataset={data}", "evaluation.knn_val_dataset={data}"]


def ask(
    place: Path, run: Path, students: dict[str, dict[str, Any]], *words: str, teacher: str = "teacher"
) -> TrainRequest:
    several = [{"name": name, **keys} for name, keys in students.items()]
    typed = [word for word in TINY if "prototypes" not in word]
    words = (*typed, "dino.head_n_prototypes=32", *words, f"distillation.students={json.dumps(several)}")
    return TrainRequest(
        data=str(place / "data"), output_dir=run, teacher=str(place / teacher), overrides=words, cpu=True
    )


def alone(request: TrainRequest, run: Path, keys: dict[str, dict[str, Any]]) -> Config:
    """The configuration of a student that is trained by itself, with what is said of it as a person would type it."""
    own = [
        f"{group}.{key}={value if isinstance(value, str) else json.dumps(value)}"
        for group, each in keys.items()
        for key, value in each.items()
    ]
    return resolve_config(request.model_copy(update={"output_dir": run, "overrides": (*request.overrides[:-1], *own)}))


def train_all(request: TrainRequest) -> None:
    config, *others = resolve_students(request)
    train(config, request, *others)


def outcome(run: Path) -> dict[str, Any]:
    """All that a run leaves, but for times and places."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    place = config["train"].pop("output_dir")
    scores = run / "knn_metrics.json"
    return {
        "place": Path(place).name,
        "config": config,
        "metrics": metrics_of(run),
        "scores": scores.read_text() if scores.exists() else "",
        **{
            str(file.relative_to(run)): torch.load(file, weights_only=True)["teacher"]
            for file in run.glob("eval/*/teacher_checkpoint.pth")
        },
    }


def assert_same(one: Path, other: Path) -> None:
    a, b = outcome(one), outcome(other)
    assert a.keys() == b.keys()
    for name, value in a.items():
        if name.endswith(".pth"):
            assert value.keys() == b[name].keys()
            assert all(torch.equal(tensor, b[name][key]) for key, tensor in value.items()), name
        else:
            assert value == b[name], name


@pytest.mark.parametrize(
    ("teacher", "students", "words"),
    [
        ("teacher", {"wide": WIDE, "deep": DEEP}, [*SCORED, "optim.epochs=2", "train.gradient_accumulation=2"]),
        pytest.param("backbone", {"deep": DEEP, "resnet": {}}, ["optim.epochs=1"], marks=pytest.mark.long),
    ],
)
def test_each_is_the_run_that_it_is_alone(
    place: Path, tmp_path: Path, teacher: str, students: dict[str, dict[str, Any]], words: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """With heads of the teacher's own or fresh ones, of any length; also after a signal between their steps."""
    if "resnet" in students:
        pytest.importorskip("transformers")
        keys = [word.removeprefix("student.").partition("=") for word in LIBRARY["resnet"]]
        students = {**students, "resnet": {"student": {key: yaml.safe_load(value) for key, _, value in keys}}}
    words = [word.format(data=place / "data") for word in words]
    request = ask(place, tmp_path / "all", students, *words, "train.checkpoint_period=2", teacher=teacher)
    for name, own in students.items():
        train(alone(request, tmp_path / name, own), request)
    seen = count_passes(monkeypatch, of_width=48)
    train_all(request)
    accumulated = 2 if "train.gradient_accumulation=2" in words else 1
    total = max(len(metrics_of(tmp_path / name)) for name in students)
    assert len(seen) == total * accumulated, "the teacher looks once at each batch"
    for name in students:
        assert_same(tmp_path / "all" / name, tmp_path / name)
        for line in (f"{each}: iteration 1/" for each in students):
            assert line in (tmp_path / "all" / name / "logs/train.log").read_text()

    request = request.model_copy(update={"output_dir": tmp_path / "parts"})
    stop_after(3, monkeypatch)
    with pytest.raises(Interrupted):
        train_all(request)
    saved = {name: sorted((tmp_path / "parts" / name / "checkpoints").iterdir()) for name in students}
    ended = {name: [int(path.name.removeprefix("iteration_")) for path in paths] for name, paths in saved.items()}
    first, last = students
    assert ended == {first: [2, 3], last: [2]}, "the signal came between the two"
    train_all(request)
    for name in students:
        assert_same(tmp_path / "parts" / name, tmp_path / name)
        # Each folder is a run like any other, which its own files continue.
        again = resolve_config(TrainRequest(output_dir=tmp_path / "parts" / name, cpu=True))
        assert again.train.output_dir == str(tmp_path / "parts" / name)
    train_all(request)  # finished already


def count_passes(monkeypatch: pytest.MonkeyPatch, of_width: int) -> list[int]:
    """Grows by one for each pass of a backbone of this width."""
    from dinov2cli.models.vision_transformer import VisionTransformer

    passes, forward = [], VisionTransformer.forward_tokens

    def counted(self: VisionTransformer, *arguments: Any, **more: Any) -> Any:
        if self.embed_dim == of_width and not self.patch_embed.proj.weight.is_meta:
            passes.append(1)
        return forward(self, *arguments, **more)

    monkeypatch.setattr(VisionTransformer, "forward_tokens", counted)
    return passes


def stop_after(iterations: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM while the last of these runs, in the first student's step; once."""
    step, sent = Trainer.train_step, []

    def interrupting(self: Trainer, batches: Any) -> Any:
        if self.iteration + 1 == iterations and not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
        return step(self, batches)

    monkeypatch.setattr(Trainer, "train_step", interrupting)


def test_one_that_fails_is_left_behind(place: Path, tmp_path: Path) -> None:
    """Its losses are not finite any more; the others come to their ends, and the command ends with its error."""
    bad = {"optim": {"base_lr": 1e30, "min_lr": 1e30, "warmup_epochs": 0, "clip_grad": 0.0}}
    request = ask(place, tmp_path / "all", {"bad": bad, "deep": DEEP}, "optim.epochs=2", "optim.layerwise_decay=1.0")
    train(alone(request, tmp_path / "deep", DEEP), request)
    with pytest.raises(TrainingFailure, match=r"student bad: iteration .* not finite for 3 iterations in a row"):
        train_all(request)
    assert_same(tmp_path / "all" / "deep", tmp_path / "deep")


@pytest.mark.parametrize(
    ("students", "message"),
    [
        ({"a": {}, "b": {"train": {"seed": 1}}}, r"distillation.students: train.seed=0 of a, 1 of b\n.*same batches"),
        ({"a": {}, "b": {"ibot": {"loss_weight": 0}}}, r"ibot.loss_weight=1.0 of a, 0.0 of b"),
        ({"a": {}, "b": {"crops": {"local_crops_number": 1}}}, r"crops.local_crops_number=2 of a, 1 of b"),
        ({"a": {}, "b": {"student": {"patch_size": 16}}}, r"student b: student.patch_size=16: the teacher has patches"),
        ({"a": {}, "b": {"student": {"dept": 3}}}, r"student b: student.dept=3: no such key; did you mean student.dep"),
        ({"a/b": {}}, r"distillation.students=.*a/b.*: needs a name that a folder can have"),
        ({"a": {"student": 3}}, r"distillation.students: a: student: must be a group of keys"),
    ],
)
def test_what_does_not_go_together_is_named(
    place: Path, tmp_path: Path, students: dict[str, dict[str, Any]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_students(ask(place, tmp_path / "run", students))
    assert not (tmp_path / "run").exists()


def test_all_is_looked_at_before_it_begins(place: Path, tmp_path: Path) -> None:
    request = ask(place, tmp_path / "run", {"a": {}, "b": {"train": {"seed": 1}}})
    with pytest.raises(ConfigError, match=r"train.seed=0 of a, 1 of b"):
        first_look(request)
    with pytest.raises(ConfigError, match=r"distillation.students: there is no teacher to learn from"):
        first_look(request.model_copy(update={"teacher": None}))


def test_what_one_has_learnt_alone_from_other_batches_does_not_go_on_beside(place: Path, tmp_path: Path) -> None:
    request = ask(place, tmp_path / "all", {"a": {}, "b": DEEP}, "optim.epochs=2")
    smaller = "train.batch_size_per_gpu=4", "optim.epochs=1"
    of_b = request.model_copy(update={"overrides": (*request.overrides[:-1], *smaller, request.overrides[-1])})
    train(alone(of_b, tmp_path / "all" / "b", DEEP), request)
    with pytest.raises(ConfigError, match=r"have not seen the same images: .*a 0 images in 0 iter.*b 16 images in 4"):
        train_all(request)


def test_the_plan_counts_the_teacher_once(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Memory and operations; a rehearsal leaves nothing."""
    configs = resolve_students(ask(place, tmp_path / "all", {"wide": WIDE, "deep": DEEP}))
    first = Trainer(configs[0], CPU)
    runs = [first, Trainer(configs[1], CPU, beside=first)]
    for run in runs:
        run.folder.path.mkdir(parents=True)
    followers = {id(network): network for run in runs for network in run.objective.networks.followers.values()}
    assert len(followers) == 3
    expected = estimate_together(configs, world_size=1, sharding="none", precision="fp32")
    held = sum(4 * value.numel() for network in followers.values() for value in network.parameters())
    assert expected.teacher == pytest.approx(held / 1e9)
    rehearse(runs)
    said = " ".join(capsys.readouterr().err.split())
    flops = [step_flops(config) for config in configs]
    once, alone = flops[0].passes["frozen_teacher"], sum(each.step for each in flops)
    assert f"its pass, once for all, is {once / (alone - once):.0%} of a step's operations; one by one the" in said
    assert f"would take {alone / (alone - once):.2f} times as many" in said
    assert all(not list(run.folder.path.iterdir()) for run in runs)


def train_each_way(*ways: Sequence[Config]) -> None:
    """The students of each way together."""
    for first, *others in ways:
        run = Trainer(first, CPU)
        train_students([run, *(Trainer(each, CPU, beside=run) for each in others)])


@pytest.mark.long
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_several_processes(place: Path, tmp_path: Path, sharding: str) -> None:
    """The teacher is spread over the processes once."""
    students = {"wide": WIDE, "deep": DEEP}
    words = "optim.epochs=1", f"train.sharding={sharding}"
    request = ask(place, tmp_path / "all", students, *words, teacher="backbone")
    by_themselves = [[alone(request, tmp_path / name, own)] for name, own in students.items()]
    run_in_processes(2, train_each_way, resolve_students(request), *by_themselves)
    for name in students:
        assert_same(tmp_path / "all" / name, tmp_path / name)
