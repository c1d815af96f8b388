"""TensorBoard and W&B get the numbers of training_metrics.json, and only when switched on."""

import subprocess
import sys
from pathlib import Path

import pytest

from dinov2cli.config import load_config
from dinov2cli.errors import EnvironmentProblem
from dinov2cli.train.trackers import make_trackers


def test_off_by_default(tmp_path: Path) -> None:
    assert make_trackers(load_config(), tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_holds_what_was_written(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = load_config(overrides=["train.tensorboard=true"])
    (tracker,) = make_trackers(config, tmp_path)
    for iteration in (0, 10, 20):
        tracker.write({"iteration": iteration, "total_loss": 5.0 - iteration / 10, "note": "text", "lr": 1e-3})
    tracker.close()
    # The run is lost after iteration 10 and resumed there: its later points are replaced.
    (tracker,) = make_trackers(config, tmp_path, resume_at=11)
    tracker.write({"iteration": 20, "total_loss": 3.25})
    tracker.close()
    events = accumulator.EventAccumulator(str(tmp_path / "logs" / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("total_loss")] == [(0, 5.0), (10, 4.0), (20, 3.25)]
    assert sorted(events.Tags()["scalars"]) == ["lr", "total_loss"]


def test_wandb_logs_offline_and_resumes_the_same_run(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = load_config(overrides=["train.wandb=true"])
    ids = []
    for resume_at in (0, 11):
        (tracker,) = make_trackers(config, tmp_path, resume_at=resume_at)
        tracker.write({"iteration": resume_at, "total_loss": 5.0})
        tracker.close()
        ids.append((tmp_path / "logs" / "wandb_run").read_text().strip())
    assert ids[0] == ids[1]
    written = list((tmp_path / "logs").rglob(f"run-{ids[0]}.wandb"))
    assert written and all(file.stat().st_size for file in written)


@pytest.mark.parametrize(
    ("switch", "module", "extra"), [("tensorboard", "tensorboard", "plots"), ("wandb", "wandb", "wandb")]
)
def test_a_missing_package_is_named(tmp_path: Path, monkeypatch, switch: str, module: str, extra: str) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == module or "utils.tensorboard" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(EnvironmentProblem, match=f"train.{switch}=true") as caught:
        make_trackers(load_config(overrides=[f"train.{switch}=true"]), tmp_path)
    assert f"dinov2cli[{extra}]" in str(caught.value)


def test_neither_package_is_imported_unless_switched_on() -> None:
    code = "import sys, dinov2cli.train.trackers; assert not {'wandb', 'tensorboard'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
