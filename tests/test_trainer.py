"""Training in one process: files, exact resume, interruption, bad data and non-finite losses."""

import gc
import json
import logging
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import AUGMENTED_ROPE, DINOV3, GRAM, MIXED, TINY, metrics_of, write_images, write_teacher

from dinov2cli.config import load_config
from dinov2cli.errors import ConfigError, DataError, TrainingFailure, WeightsError
from dinov2cli.train.dry_run import rehearse
from dinov2cli.train.trainer import Trainer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "data")


@pytest.fixture()
def make_trainer(images: Path, tmp_path: Path) -> Callable[..., Trainer]:
    def make(name: str = "run", *overrides: str, **arguments: Any) -> Trainer:
        paths = [f"train.dataset_path={images}", f"train.output_dir={tmp_path / name}"]
        return Trainer(load_config(overrides=[*TINY, *paths, *overrides]), CPU, **arguments)

    return make


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in trainer.objective.state_dict().items()}


def assert_same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]), key


def stop_after(trainer: Trainer, iteration: int) -> None:
    """Ctrl-C while the given iteration runs."""
    step = trainer.train_step

    def interrupting(batches: Any) -> Any:
        if trainer.iteration == iteration:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGINT)
        return step(batches)

    trainer.train_step = interrupting
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


def test_a_run_writes_the_reference_files(make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer()
    trainer.train()
    run = trainer.folder.path
    lines = [json.loads(line) for line in (run / "training_metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(12))
    keys = {
        "iteration", "lr", "wd", "mom", "last_layer_lr", "current_batch_size", "total_loss", "dino_local_crops_loss",
        "dino_global_crops_loss", "koleo_loss", "ibot_loss", "iter_time", "data_time",
    }  # fmt: skip
    assert keys <= set(lines[0])
    assert [p.parent.name for p in sorted(run.glob("eval/*/teacher_checkpoint.pth"))] == [
        "training_11", "training_3", "training_7",
    ]  # fmt: skip
    teacher = torch.load(trainer.folder.teacher(11), weights_only=True)["teacher"]
    assert_same_weights(teacher, trainer.objective.teacher.state_dict())
    assert load_config(config_file=run / "config.yaml") == trainer.config
    assert [i for i, _ in trainer.checkpointer.list()] == [12, 8, 4]


def test_garbage_is_collected_between_steps(make_trainer: Callable[..., Trainer]) -> None:
    """Within none of them; and what is there after the first is looked at no more, until the training ends."""
    trainer = make_trainer()
    seen: list[tuple[bool, int]] = []
    trainer.objective.register_forward_pre_hook(lambda *_: seen.append((gc.isenabled(), gc.get_freeze_count())))
    trainer.train()
    assert gc.isenabled() and gc.get_freeze_count() == 0
    assert not any(collecting for collecting, _ in seen)
    frozen = [count > 10_000 for _, count in seen]
    assert frozen == [False, *[True] * (trainer.total - 1)]


def test_the_student_follows_its_gradient_and_the_teacher_the_student(make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer("run", "optim.warmup_epochs=0", "optim.freeze_last_layer_epochs=1")
    before = weights(trainer)
    batch = next(iter(trainer.make_loader()))
    values = trainer.train_step([batch]).values
    after = weights(trainer)
    for key in ("backbone.blocks.0.attn.proj.weight", "backbone.patch_embed.proj.weight", "dino_head.mlp.0.weight"):
        old, new = before[f"student.{key}"], after[f"student.{key}"]
        assert not torch.equal(old, new)
        expected = values["momentum"] * before[f"teacher.{key}"] + (1 - values["momentum"]) * new
        torch.testing.assert_close(after[f"teacher.{key}"], expected)
    frozen = "student.dino_head.last_layer.weight_v"
    assert torch.equal(before[frozen], after[frozen])


PLAIN: list[str] = []
ACCUMULATED = ["train.centering=sinkhorn_knopp", "ibot.separate_head=true", "ibot.head_n_prototypes=24",
               "train.gradient_accumulation=2", *DINOV3, *AUGMENTED_ROPE]  # fmt: skip


@pytest.mark.parametrize(
    ("variant", "teacher"),
    [*product([PLAIN, ACCUMULATED], [None, "with heads", "backbone alone"]), (ACCUMULATED, "Gram teacher")],
)
def test_an_interrupted_run_resumes_bit_for_bit(
    make_trainer: Callable[..., Trainer], variant: list[str], teacher: str | None, tmp_path: Path
) -> None:
    if teacher == "Gram teacher":
        variant = [*variant, *GRAM, *MIXED]
    elif teacher:
        sizes = [word for word in variant if word.startswith("ibot")]
        variant = [*variant, f"distillation.teacher={write_teacher(tmp_path, *sizes, heads=teacher == 'with heads')}"]
    whole = make_trainer("whole", *variant)
    whole.train()
    stop_after(make_trainer("parts", *variant), 5)
    resumed = make_trainer("parts", *variant)
    assert resumed.iteration == 6
    resumed.train()
    assert_same_weights(weights(whole), weights(resumed))
    assert metrics_of(whole.folder.path) == metrics_of(resumed.folder.path)
    again = make_trainer("parts", *variant)
    again.train()  # finished already: nothing happens
    assert_same_weights(weights(whole), weights(again))


def test_a_run_takes_up_gram_anchoring(
    make_trainer: Callable[..., Trainer], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checkpoint holds no Gram teacher: that begins as the teacher does then, or as the weights that are named."""
    monkeypatch.setattr(logging.getLogger("dino2"), "propagate", True)
    caplog.set_level(logging.INFO, "dino2")
    make_trainer("run", "optim.epochs=1").train()
    joined = make_trainer("run", *GRAM, "gram.update_frequency=6")
    gram, teacher = joined.objective.networks.followers["gram_teacher"], joined.objective.teacher.state_dict()
    anchor = {name: value.clone() for name, value in gram.state_dict().items()}
    assert joined.iteration == 4 and all(torch.equal(value, teacher[name]) for name, value in anchor.items())
    assert "takes up Gram anchoring; its Gram teacher is the teacher after 4 iterations" in caplog.text
    stop_after(joined, 4)
    named = joined.folder.teacher(3)
    # Its checkpoint does: what the keys say of the beginning does not count any more.
    again = make_trainer("run", *GRAM, "gram.update_frequency=6", f"gram.ckpt={named}-which-is-gone")
    assert_same_weights(anchor, again.objective.networks.followers["gram_teacher"].state_dict())
    again.train()
    lines = metrics_of(again.folder.path)
    assert "gram_loss" not in lines[3] and lines[4]["gram_loss"] > 0 and lines[4]["gram_loss_weight"] == 1.0
    # Named weights, in a run of its own, and without the loss again.
    words = ["gram.use_loss=true", f"gram.ckpt={named}", "gram.rep_update=false"]
    fresh = make_trainer("fresh", *words, "optim.epochs=1")
    fresh.train()
    assert_same_weights(anchor, fresh.objective.networks.followers["gram_teacher"].state_dict())
    without = make_trainer("fresh", "optim.epochs=2")
    assert without.iteration == 4 and "gram_teacher" not in without.objective.networks.followers
    with pytest.raises(WeightsError, match=r"^gram.ckpt: .*cannot start this model"):
        make_trainer("other", *words, "student.embed_dim=32")


def test_work_lost_after_the_checkpoint_is_done_again(make_trainer: Callable[..., Trainer]) -> None:
    whole = make_trainer("whole")
    whole.train()
    killed = make_trainer("killed")

    def crash(batches: Any) -> Any:
        if killed.iteration == 10:
            raise RuntimeError("killed")
        return Trainer.train_step(killed, batches)

    killed.train_step = crash
    with pytest.raises(RuntimeError, match="killed"):
        killed.train()
    assert len(metrics_of(killed.folder.path)) == 10
    resumed = make_trainer("killed")
    assert resumed.iteration == 8
    resumed.train()
    assert metrics_of(whole.folder.path) == metrics_of(resumed.folder.path)


def test_resuming_with_another_shape_is_refused(make_trainer: Callable[..., Trainer]) -> None:
    make_trainer("run", "optim.epochs=1", "optim.warmup_epochs=0").train()
    with pytest.raises(ConfigError, match=r"student.embed_dim \(24 there, 32 here\)"):
        make_trainer("run", "student.embed_dim=32")


def test_resuming_with_changed_keys_says_so(
    make_trainer: Callable[..., Trainer], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("dino2"), "propagate", True)
    make_trainer("run", "optim.epochs=1", "optim.warmup_epochs=0").train()
    assert make_trainer("run", "optim.warmup_epochs=0").iteration == 4
    assert "optim.epochs (1 there, 3 here)" in caplog.text


def test_a_non_finite_loss_is_left_out_then_stops_the_run(
    make_trainer: Callable[..., Trainer], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("dino2"), "propagate", True)
    trainer = make_trainer("run", "train.max_nonfinite=2")
    head = trainer.objective.student.dino_head
    forward = head.forward
    poisoned = {2, 6, 7}
    head.forward = lambda x: forward(x) * (float("nan") if trainer.iteration in poisoned else 1.0)
    before: dict[int, dict[str, torch.Tensor]] = {}
    step = trainer.train_step
    trainer.train_step = lambda batches: before.setdefault(trainer.iteration, weights(trainer)) and step(batches)
    with pytest.raises(TrainingFailure, match=r"iteration 7: .*dino_local_crops_loss.* for 2 iterations in a row"):
        trainer.train()
    # The step that had no finite loss left the student as it was; the teacher's average over the students went on.
    assert_same_weights(*({k: v for k, v in before[i].items() if k.startswith("student.")} for i in (2, 3)))
    momentum = trainer.step.schedules.at(2)["momentum"]
    for name in trainer.objective.student.state_dict():
        expected = momentum * before[2][f"teacher.{name}"] + (1 - momentum) * before[2][f"student.{name}"]
        torch.testing.assert_close(before[3][f"teacher.{name}"], expected)
    assert "iteration 2: dino_local_crops_loss" in caplog.text
    assert [i for i, _ in trainer.checkpointer.list()] == [4]
    assert all(value.isfinite().all() for value in weights(make_trainer("run")).values())


def test_bad_images_are_replaced_counted_and_stop_the_run_when_too_many(
    make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    data = write_images(tmp_path / "bad", per_class=4)
    (data / "class0" / "broken.png").write_bytes(b"\x89PNG not an image")
    allowed = make_trainer("allowed", f"train.dataset_path={data}", "train.max_bad_fraction=1.0")
    allowed.train()
    counts = [line["bad_images"] for line in metrics_of(allowed.folder.path)]
    assert counts[-1] >= 10  # one of nine images, 96 draws
    stopped = make_trainer("stopped", f"train.dataset_path={data}")
    with pytest.raises(DataError, match=r"train.max_bad_fraction=0.01 allows.*broken.png"):
        stopped.train()


def test_gradient_accumulation_counts_into_batch_and_rate(make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer("run", "train.gradient_accumulation=2")
    assert trainer.step.schedules.peak_lr == pytest.approx(0.004 * (16 / 1024) ** 0.5)
    trainer.train()
    assert metrics_of(trainer.folder.path)[0]["current_batch_size"] == 16
    assert trainer.record.samples_seen == 12 * 16


def test_online_knn_is_written_at_the_start_each_period_and_the_end(make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer("run", "evaluation.knn_period=5", "evaluation.knn_train_dataset=x",
                           "evaluation.knn_val_dataset=x", online_knn=lambda backbone: 12.5)  # fmt: skip
    trainer.train()
    lines = [json.loads(line) for line in trainer.folder.knn_metrics.read_text().splitlines()]
    assert [(line["iteration"], line["knn_top1"]) for line in lines] == [(0, 12.5), (5, 12.5), (10, 12.5), (12, 12.5)]


@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
def test_training_without_ibot_and_without_local_crops(make_trainer: Callable[..., Trainer], centering: str) -> None:
    trainer = make_trainer("run", "ibot.loss_weight=0", "crops.local_crops_number=0", f"train.centering={centering}")
    trainer.train()
    last = metrics_of(trainer.folder.path)[-1]
    assert last["ibot_loss"] == 0 == last["dino_local_crops_loss"] and last["dino_global_crops_loss"] > 0


@pytest.mark.parametrize(
    ("seconds", "said"), [(1e6, "s without waiting for data"), (0.0, "s reckoned from one with 2")]
)
def test_a_rehearsal_leaves_no_trace(
    make_trainer: Callable[..., Trainer],
    seconds: float,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("dinov2cli.train.dry_run.SECONDS", seconds)
    trainer = make_trainer()
    trainer.folder.path.mkdir()
    rehearse([trainer])
    assert list(trainer.folder.path.iterdir()) == []
    assert said in " ".join(capsys.readouterr().err.split())
    assert trainer.iteration == (3 if seconds else 0), "of a slow machine only a small step is asked"


def test_an_earlier_run_is_set_aside(make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer("run", "optim.epochs=1", "optim.warmup_epochs=0")
    trainer.train()
    folder = trainer.folder
    assert folder.set_aside() == folder.path / "previous_1"
    assert folder.set_aside() is None
    assert make_trainer("run").iteration == 0
    assert (folder.path / "previous_1" / "training_metrics.json").exists()


def test_the_seed_decides_everything(make_trainer: Callable[..., Trainer]) -> None:
    short = ["optim.epochs=1", "optim.warmup_epochs=0"]
    runs = [make_trainer(f"run{i}", *short, f"train.seed={seed}") for i, seed in enumerate((0, 0, 1))]
    for run in runs:
        run.train()
    assert_same_weights(weights(runs[0]), weights(runs[1]))
    key = "student.backbone.pos_embed"
    assert not torch.equal(weights(runs[0])[key], weights(runs[2])[key])
