"""Training checkpoints: complete or not there, the newest whole one is loaded, damage is noticed."""

import json
import logging
import os
import pickle
import shutil
import subprocess
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from dinov2cli.checkpoint import Checkpointer, save_teacher
from dinov2cli.data.workers import loader_errors
from dinov2cli.errors import CheckpointError, ProcessKilled


def state_of(value: float) -> dict[str, object]:
    return {"model": {"w": torch.full((300, 7), value), "b": torch.tensor(value)}, "plain": {"scale": value}}


@pytest.fixture()
def checkpointer(tmp_path: Path) -> Checkpointer:
    checkpointer = Checkpointer(tmp_path / "checkpoints", keep=3)
    for iteration in (10, 20, 30, 40):
        checkpointer.save(iteration, state_of(iteration))
    return checkpointer


def test_the_newest_are_kept_and_loaded_in_place(checkpointer: Checkpointer) -> None:
    assert [iteration for iteration, _ in checkpointer.list()] == [40, 30, 20]
    state = state_of(0)
    tensor = state["model"]["w"]
    assert checkpointer.load_latest(state) == 40
    assert tensor.eq(40).all() and state["model"]["w"] is tensor and state["plain"]["scale"] == 40


def test_in_the_background_what_was_there_is_written(tmp_path: Path) -> None:
    """The state may change while it is written, and again before the next copy of it."""
    checkpointer = Checkpointer(tmp_path, keep=3)
    live = state_of(0)
    for iteration in (1, 2, 3):
        live["model"]["w"].fill_(iteration)
        checkpointer.save(iteration, live, facts={"world_size": 7}, wait=False)
        live["model"]["w"].fill_(-1)
    checkpointer.finish()
    assert [iteration for iteration, _ in checkpointer.list()] == [3, 2, 1]
    for iteration, path in checkpointer.list():
        loaded = {"model": {"w": torch.zeros(300, 7)}}
        torch.distributed.checkpoint.load(loaded, checkpoint_id=path, no_dist=True)
        assert loaded["model"]["w"].eq(iteration).all()
    assert checkpointer.newest() == (3, {"iteration": 3, "world_size": 7})


def test_a_failure_in_the_background_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    checkpointer = Checkpointer(tmp_path / "file", keep=1)
    checkpointer.save(1, state_of(0), wait=False)
    until = time.monotonic() + 30
    while not checkpointer.failed():
        assert time.monotonic() < until
        time.sleep(0.01)
    with pytest.raises(CheckpointError, match="iteration_00000001: the checkpoint could not be written"):
        checkpointer.finish()
    checkpointer.finish()  # told once
    assert not checkpointer.failed()


def test_the_death_of_a_loader_is_not_taken_for_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch raises it in the main thread wherever that stands, here within the writing of a checkpoint."""

    def interrupted(*_: object, **__: object) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    monkeypatch.setattr("dinov2cli.checkpoint.dcp.save", interrupted)
    monkeypatch.setattr("dinov2cli.checkpoint.torch.save", interrupted)
    with pytest.raises(ProcessKilled, match="killed by the system"), loader_errors():
        Checkpointer(tmp_path / "checkpoints", keep=1).save(1, state_of(0), wait=True)
    assert not list((tmp_path / "checkpoints").iterdir())
    with pytest.raises(ProcessKilled, match="killed by the system"), loader_errors():
        save_teacher(tmp_path / "teacher_checkpoint.pth", {})


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert Checkpointer(tmp_path, keep=1).load_latest(state_of(0)) is None


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no_manifest", "lost_file", "another_fact"])
def test_a_damaged_checkpoint_is_passed_over_loudly(
    checkpointer: Checkpointer, damage: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = checkpointer.list()[0][1]
    data = next(newest.glob("*.distcp"))
    content = bytearray(data.read_bytes())
    if damage == "truncated":
        data.write_bytes(content[:-100])
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    elif damage == "no_manifest":
        (newest / "manifest.json").unlink()
    elif damage == "another_fact":  # a digit, in what is still JSON
        text = (newest / "manifest.json").read_text()
        (newest / "manifest.json").write_text(text.replace('"iteration": 40', '"iteration": 44'))
    else:
        data.unlink()
    monkeypatch.setattr(logging.getLogger("dino2"), "propagate", True)
    state = state_of(0)
    assert checkpointer.newest() == (30, {"iteration": 30}), "what is said is said of the one that is loaded"
    assert checkpointer.load_latest(state) == 30
    assert state["model"]["w"].eq(30).all()
    said = [each.getMessage() for each in caplog.records if each.name == "dino2" and "passed over" in each.getMessage()]
    assert len(said) == 1 and newest.name in said[0]  # torch's own loggers, if heard, tell of the error again
    checkpointer.save(40, state_of(41))  # the run has come there again
    assert checkpointer.load_latest(state) == 40 and state["model"]["w"].eq(41).all()


def test_a_manifest_of_before_it_had_a_checksum(checkpointer: Checkpointer) -> None:
    path = checkpointer.list()[0][1] / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["crc32"]
    path.write_text(json.dumps(manifest))
    assert checkpointer.newest()[0] == 40


def test_nothing_whole_is_an_error(checkpointer: Checkpointer) -> None:
    for _, path in checkpointer.list():
        (path / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match="no checkpoint of this run can be loaded") as error:
        checkpointer.load_latest(state_of(0))
    assert "--no-resume" in str(error.value)


def test_what_a_killed_run_left_behind_is_not_a_checkpoint(checkpointer: Checkpointer) -> None:
    aside = checkpointer.folder / ".iteration_00000050.incomplete"
    aside.mkdir()
    (aside / "__0_0.distcp").write_bytes(b"half")
    assert checkpointer.load_latest(state_of(0)) == 40
    checkpointer.save(60, state_of(60))
    assert not aside.exists()


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    """On a real small file system, where mounting one is allowed."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        checkpointer = Checkpointer(tmp_path / "checkpoints", keep=2)
        small = {"w": torch.ones(1000)}
        checkpointer.save(1, small)
        with pytest.raises(CheckpointError, match="No space left on device"):
            checkpointer.save(2, {"w": torch.ones(1_000_000)})
        loaded = {"w": torch.zeros(1000)}
        assert checkpointer.load_latest(loaded) == 1 and loaded["w"].eq(1).all()
        assert [p.name for p in checkpointer.folder.iterdir()] == ["iteration_00000001"]
        # Space for the tensors, and none for what torch writes around them: it fails while it writes.
        with (tmp_path / "filler").open("wb") as file:
            file.write(bytes(shutil.disk_usage(tmp_path).free - 4096))
        with pytest.raises(CheckpointError, match=r"No space left on device"):
            checkpointer.save(2, {"w": torch.ones(1000)})
        (tmp_path / "filler").unlink()
        checkpointer.save(2, small)
        assert checkpointer.load_latest(loaded) == 2
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_manifest_lists_every_file(checkpointer: Checkpointer) -> None:
    newest = checkpointer.list()[0][1]
    manifest = json.loads((newest / "manifest.json").read_text())
    assert manifest["iteration"] == 40
    assert set(manifest["files"]) == {p.name for p in newest.iterdir()} - {"manifest.json"}


def test_teacher_checkpoints_have_the_reference_format(tmp_path: Path) -> None:
    path = tmp_path / "eval" / "training_9" / "teacher_checkpoint.pth"
    save_teacher(path, {"backbone.cls_token": torch.ones(1, 1, 4)})
    loaded = torch.load(path, weights_only=True)
    assert set(loaded) == {"teacher"} and loaded["teacher"]["backbone.cls_token"].eq(1).all()
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="could not be written"):
        save_teacher(tmp_path / "file" / "teacher_checkpoint.pth", {})


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("where", ["index", "value"])
def test_nothing_in_a_checkpoint_is_executed(
    checkpointer: Checkpointer, where: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With a manifest that fits: whoever hands a run on can write that, too."""
    newest, canary = checkpointer.list()[0][1], tmp_path / "canary"
    if where == "index":
        (newest / ".metadata").write_bytes(pickle.dumps({"x": Payload(canary)}))
    else:
        shutil.rmtree(newest)
        checkpointer.save(40, {**state_of(40), "plain": {"scale": Payload(canary)}})
    manifest = json.loads((newest / "manifest.json").read_text())
    file = newest / ".metadata"
    manifest["files"][file.name] = {"bytes": file.stat().st_size, "crc32": zlib.crc32(file.read_bytes())}
    del manifest["crc32"]
    (newest / "manifest.json").write_text(json.dumps(manifest))
    with caplog.at_level(logging.WARNING, "dino2"):
        logging.getLogger("dino2").propagate = True
        assert checkpointer.load_latest(state_of(0)) == 30
    assert not canary.exists() and "passed over" in caplog.text
