"""Batches: their layout, their independence of workers and restarts, and what unreadable files do to them."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from multiprocessing.connection import Client, Listener
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from dinov2cli.config import Config, load_config
from dinov2cli.data import workers
from dinov2cli.data.collate import MultiCropBatch
from dinov2cli.data.datasets import make_dataset
from dinov2cli.data.datasets.sample_photos import SamplePhotos
from dinov2cli.data.decoding import LazyImage, Reading
from dinov2cli.data.loaders import make_eval_loader, make_train_loader, refuse_too_many_bad
from dinov2cli.data.randomness import place_drawn
from dinov2cli.data.transforms import EvalTransform
from dinov2cli.errors import ConfigError, DataError, EnvironmentProblem, ProcessKilled

SMALL = [
    "train.dataset_path=SamplePhotos:split=TRAIN", "train.batch_size_per_gpu=3", "student.patch_size=8",
    "crops.global_crops_size=48", "crops.local_crops_size=24", "crops.local_crops_number=2",
]  # fmt: skip


def small_config(*overrides: str) -> Config:
    return load_config(overrides=[*SMALL, *overrides])


def bytes_of(batch: MultiCropBatch) -> tuple[bytes, ...]:
    tensors = (
        batch.global_crops,
        batch.local_crops,
        batch.masks,
        batch.masks_weight,
        batch.mask_indices,
        batch.samples,
    )
    return tuple(tensor.numpy().tobytes() for tensor in tensors)


def test_layout() -> None:
    batch = next(iter(make_train_loader(small_config("train.num_workers=0"), start=7, stop=8)))
    assert batch.iteration == 7 and batch.bad == []
    assert batch.global_crops.shape == (6, 48, 48, 3) and batch.global_crops.dtype == torch.uint8
    assert batch.local_crops.shape == (6, 24, 24, 3)
    assert batch.masks.shape == (6, 36) and batch.masks.dtype == torch.bool
    assert (batch.masks.sum(1) > 0).sum() == 3
    assert torch.equal(batch.masks.flatten()[batch.mask_indices], torch.ones(len(batch.mask_indices), dtype=torch.bool))
    assert len(batch.mask_indices) == batch.masks.sum() == len(batch.masks_weight)
    assert batch.masks_weight.sum().item() == pytest.approx(3), "every masked image weighs 1"


def test_views_come_view_by_view() -> None:
    """Crop v of image b stands at v * B + b: each image's two global crops are B apart."""
    dataset = make_dataset("SamplePhotos:split=TRAIN")
    config = small_config("train.num_workers=0", "crops.global_crops_scale=[0.9,1.0]")
    batch = next(iter(make_train_loader(config, start=0, stop=1)))
    for b, index in enumerate(batch.samples.tolist()):
        mean = dataset.image(index).mean()
        for crop in (batch.global_crops[b], batch.global_crops[3 + b]):
            others = [dataset.image(i).mean() for i in batch.samples.tolist() if i != index]
            error = abs(crop.float().mean().item() - mean)
            assert error < 60 or all(error < abs(crop.float().mean().item() - other) for other in others)


def test_same_bytes_for_any_number_of_workers_and_after_a_restart() -> None:
    whole = [bytes_of(b) for b in make_train_loader(small_config("train.num_workers=0"), start=0, stop=6)]
    assert len(set(whole)) == 6
    for count in (1, 2, 3):
        config = small_config(f"train.num_workers={count}")
        assert [bytes_of(b) for b in make_train_loader(config, start=0, stop=6)] == whole
        assert [bytes_of(b) for b in make_train_loader(config, start=4, stop=6)] == whole[4:]


def test_an_iteration_has_one_of_several_resolutions() -> None:
    """By (seed, iteration) alone: the same for any number of workers, after a restart, in all processes and their
    accumulated batches."""
    sizes = ["crops.global_crops_size=[24, 48]", "crops.local_crops_size=[16, 24]", "train.num_workers=0"]
    words = [*sizes, "crops.global_local_crop_pairs_ratios=[0.7, 0.3]", "train.gradient_accumulation=2"]
    config = small_config(*words)
    assert config.vit().img_size == 48, "positions are kept for the largest"

    def sides_of(batch: MultiCropBatch) -> tuple[int, int]:
        assert batch.masks.shape[1] == (batch.global_crops.shape[1] // 8) ** 2
        return batch.global_crops.shape[1], batch.local_crops.shape[1]

    whole = list(make_train_loader(config, start=0, stop=24))
    sides = [sides_of(batch) for batch in whole]
    assert set(sides) == {(24, 16), (48, 24)} and sides[::2] == sides[1::2]
    drawn = [place_drawn(config.train.seed, iteration, (0.7, 0.3)) for iteration in range(2000)]
    assert sum(drawn) / 2000 == pytest.approx(0.3, abs=0.05)
    assert sides[::2] == [((24, 16), (48, 24))[place] for place in drawn[:12]]
    assert sides == [sides_of(b) for b in make_train_loader(config, start=0, stop=24, rank=1, world_size=2)]
    bytes_ = [bytes_of(batch) for batch in whole[6:10]]
    for workers_ in (0, 2):
        again = small_config(*words[:-3], *words[-2:], f"train.num_workers={workers_}")
        assert [bytes_of(b) for b in make_train_loader(again, start=6, stop=10)] == bytes_


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["crops.global_crops_size=[24, 48]"], r"global_crops_size=\[24, 48\]: has 2 sides, and .*=\[1.0\] 1; gi"),
        (["crops.global_local_crop_pairs_ratios=[0.5, 0.5]"], r"ratios=\[0.5, 0.5\]: is for lists of sides"),
        (["crops.global_local_crop_pairs_ratios=0.5"], r"ratios=\[0.5\]: add up to 0.5, and must to 1"),
        (["crops.global_crops_size=[]"], r"crops.global_crops_size=\[\]: must be a whole number, at least 1, or"),
        (["crops.local_crops_size=[8, a]"], r"crops.local_crops_size=\[8, \"a\"\]: must be a whole number, at least"),
    ],
)  # fmt: skip
def test_sides_that_do_not_go_together_are_named(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small_config(*words)


def test_ranks_share_one_global_order() -> None:
    config = small_config("train.num_workers=0", "train.batch_size_per_gpu=2")
    of_ranks = [list(make_train_loader(config, start=0, stop=3, rank=r, world_size=2)) for r in range(2)]
    alone = list(make_train_loader(small_config("train.num_workers=0", "train.batch_size_per_gpu=4"), start=0, stop=3))
    for step in range(3):
        together = torch.cat([of_ranks[r][step].samples for r in range(2)])
        assert torch.equal(together, alone[step].samples)
        assert torch.equal(
            torch.cat([of_ranks[r][step].global_crops[:2] for r in range(2)]), alone[step].global_crops[:4]
        )
        assert not torch.equal(of_ranks[0][step].masks, of_ranks[1][step].masks)


def test_normalizing_in_the_workers_gives_the_same_numbers() -> None:
    later = next(iter(make_train_loader(small_config("train.num_workers=0"), start=0, stop=1)))
    config = small_config("train.num_workers=0", "data.normalize_on_device=false")
    now = next(iter(make_train_loader(config, start=0, stop=1)))
    assert now.global_crops.shape == (6, 3, 48, 48)
    assert later.global_crops.dtype == torch.uint8 and later.normalized().are_normalized
    assert torch.equal(now.normalized().global_crops, later.normalized().global_crops)
    assert torch.equal(now.local_crops, later.normalized().local_crops)


@pytest.fixture
def folder_with_damage(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for i in range(8):
        image = Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))
        image.save(tmp_path / f"{i}.jpg")
    (tmp_path / "3.jpg").write_bytes((tmp_path / "3.jpg").read_bytes()[:300])
    (tmp_path / "5.jpg").write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_images_are_replaced_and_named(folder_with_damage: Path, num_workers: int) -> None:
    overrides = [f"train.dataset_path={folder_with_damage}", f"train.num_workers={num_workers}"]
    overrides += ["train.batch_size_per_gpu=4"]
    first, second = list(make_train_loader(small_config(*overrides), start=0, stop=2))
    assert not {3, 5} & {*first.samples.tolist(), *second.samples.tolist()}
    bad = sorted(first.bad + second.bad)
    assert {message.split(":")[0] for message in bad} == {
        str(folder_with_damage / "3.jpg"), str(folder_with_damage / "5.jpg")
    }  # fmt: skip
    again = list(make_train_loader(small_config(*overrides), start=0, stop=2))
    assert [bytes_of(b) for b in again] == [bytes_of(first), bytes_of(second)]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_dataset_without_any_readable_image_ends_the_run(tmp_path: Path, num_workers: int) -> None:
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"not a picture")
    config = small_config(f"train.dataset_path={tmp_path}", f"train.num_workers={num_workers}")
    with pytest.raises(DataError, match=r"could not be read, the last: .*png"):
        list(make_train_loader(config, start=0, stop=1))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_eval_loader_keeps_order_and_says_which_files_are_bad(folder_with_damage: Path, num_workers: int) -> None:
    photos = make_dataset("SamplePhotos:split=VAL")
    loader = make_eval_loader(photos, EvalTransform(32, 24), 7, num_workers, indices=list(range(0, 300, 10)))
    batches = list(loader)
    assert len(loader) == len(batches) == 5 and batches[0][0].shape == (7, 3, 24, 24)
    assert torch.cat([b[2] for b in batches]).tolist() == list(range(0, 300, 10))
    assert torch.cat([b[1] for b in batches]).tolist() == photos.targets()[::10].tolist()
    first, second = make_eval_loader(make_dataset(str(folder_with_damage)), EvalTransform(32, 24), 4, num_workers)
    assert first.indices.tolist() == [0, 1, 2] and second.indices.tolist() == [4, 6, 7]
    assert [Path(message.split(":")[0]).name for message in first.bad + second.bad] == ["3.jpg", "5.jpg"]


def test_a_batch_of_nothing_readable_is_empty(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"<html>")
    (batch,) = make_eval_loader(make_dataset(str(tmp_path)), EvalTransform(32, 24), 4, 0)
    assert len(batch.images) == len(batch.targets) == len(batch.indices) == 0 and len(batch.bad) == 1


def test_too_many_bad_images_are_named_once() -> None:
    refuse_too_many_bad(1, 100, 0.01, ["a"])
    refuse_too_many_bad(0, 0, 0.0, [])
    with pytest.raises(DataError, match="3 of 4 images drawn are unreadable") as caught:
        refuse_too_many_bad(3, 4, 0.01, ["empty.jpg: x", "page.jpg: y", "page.jpg: y"], drawn=True)
    assert caught.value.message.count("page.jpg") == 1


def test_a_worker_that_dies_is_explained() -> None:
    class Dying(SamplePhotos):
        def open(self, index: int, *reading: Reading) -> LazyImage:
            os.kill(os.getpid(), signal.SIGKILL)
            return super().open(index, *reading)

    loader = make_train_loader(small_config("train.num_workers=1"), start=0, stop=1, dataset=Dying())
    with pytest.raises(EnvironmentProblem, match="killed by the system") as caught:
        list(loader)
    assert "train.num_workers" in str(caught.value)


def test_number_of_workers_comes_from_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "available_cores", lambda: 8)
    assert workers.choose_workers(None) == 7
    with monkeypatch.context() as four:
        four.setenv("LOCAL_WORLD_SIZE", "4")
        assert workers.choose_workers(None) == 1
    assert workers.choose_workers(0) == 0 and workers.choose_workers(5) == 5
    monkeypatch.setattr(workers, "available_cores", lambda: 1)
    assert workers.choose_workers(None) == 1
    monkeypatch.setattr(workers, "available_cores", lambda: 256)
    assert workers.choose_workers(None) == workers.MAX_WORKERS


def test_a_vanished_folder_is_named(folder_with_damage: Path) -> None:
    config = small_config(f"train.dataset_path={folder_with_damage}", "train.num_workers=0")
    loader = make_train_loader(config, start=0, stop=1)
    shutil.rmtree(folder_with_damage)
    with pytest.raises(DataError, match="No such file"):
        list(loader)


INTERRUPTED = """
import multiprocessing, sys
from dinov2cli.config import load_config
from dinov2cli.data.loaders import make_train_loader
from dinov2cli.console import interruption
if __name__ == "__main__":
    config = load_config(overrides=sys.argv[1:])
    with interruption('stopping') as interrupted:
        for batch in make_train_loader(config, start=0, stop=10**6):
            if batch.iteration == 1:
                print(*(child.pid for child in multiprocessing.active_children()), flush=True)
            if interrupted:
                sys.exit(130)
"""


def test_ctrl_c_leaves_no_process_and_no_traceback(tmp_path: Path) -> None:
    """Also where TMPDIR is longer than the path of a socket may be: without one, no batch would ever come."""
    (tmp_path / "script.py").write_text(INTERRUPTED)
    long = tmp_path / ("x" * 100)
    long.mkdir()
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py"), *SMALL, "train.num_workers=2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "TMPDIR": str(long)},
    )
    assert process.stdout is not None
    workers_pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(workers_pids) == 2
    os.killpg(process.pid, signal.SIGINT)  # as the terminal does: to every process of the group
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130
    assert "Traceback" not in errors
    for pid in workers_pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_long_tmpdir_without_a_short_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    monkeypatch.setattr(workers, "SHORT_FOLDERS", (str(tmp_path / "none"),))
    with pytest.raises(EnvironmentProblem, match=f"TMPDIR={long} is too long") as caught:
        make_train_loader(small_config("train.num_workers=1"), start=0, stop=1)
    assert "train.num_workers=0" in str(caught.value)


DIED = "DataLoader worker (pid 7) is killed by signal: "
CAUGHT = "Caught an error in DataLoader worker process 0.\n"


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (RuntimeError(DIED + "Killed. "), ProcessKilled, "killed by the system"),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), ProcessKilled, "killed by the system"),
        (ConnectionResetError("of something else"), ConnectionResetError, "something else"),
        (RuntimeError(DIED + "Bus error. "), EnvironmentProblem, "shared memory"),
        (RuntimeError(CAUGHT + "X: can't allocate memory"), ProcessKilled, "found no memory: X: can't allocate memory"),
        (MemoryError(CAUGHT + "MemoryError"), ProcessKilled, "found no memory"),
        (RuntimeError(CAUGHT + "a mistake"), RuntimeError, "a mistake"),
        (RuntimeError("something else"), RuntimeError, "something else"),
    ],
)
def test_what_befalls_a_loader_is_told(error: Exception, kind: type[Exception], says: str) -> None:
    """Killed or without memory, a supervised training starts again; a mistake keeps its own words and place."""
    with pytest.raises(kind, match=says) as told, workers.loader_errors():
        raise error
    assert type(told.value) is kind


def test_a_loader_that_has_gone_before_its_batch_is_taken_was_killed(tmp_path: Path) -> None:
    with Listener(str(tmp_path / "socket")) as listener:
        os.link(listener.address, left := tmp_path / "left")  # as a process that is killed leaves it
    with pytest.raises(ProcessKilled, match="killed by the system"), workers.loader_errors():
        Client(str(left))


class _NoMemory:
    def __reduce__(self) -> str:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")


def test_a_batch_that_cannot_be_handed_over_ends_its_loader_and_does_not_hang(
    capfd: pytest.CaptureFixture[str],
) -> None:
    loader = DataLoader([_NoMemory()], batch_size=None, num_workers=1, worker_init_fn=workers.set_up_worker, timeout=60)
    with pytest.raises(ProcessKilled), workers.loader_errors():
        list(loader)
    assert "Traceback" not in capfd.readouterr().err
