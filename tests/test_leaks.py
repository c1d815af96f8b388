"""Val images that are in train: found by content, in files, shards and joined sets; in the table and in the JSON."""

import shutil
import tarfile
from pathlib import Path

import pytest
from tiny_run import write_images

from dinov2cli.data.datasets import ImageDataset, make_dataset
from dinov2cli.eval import leaks
from dinov2cli.eval.leaks import overlap


@pytest.fixture
def train(tmp_path: Path) -> Path:
    return write_images(tmp_path / "train")


def of(*folders: Path) -> list[ImageDataset]:
    return [make_dataset(str(folder)) for folder in folders]


def some_of(train: Path, val: Path, n: int, *, others: int = 0) -> Path:
    """A folder of `n` of train's images under other names, and of `others` that train has not."""
    images = sorted(path for path in train.rglob("*") if path.is_file())
    for i in range(n + others):
        target = val / images[i].parent.name / f"copy{i}{images[i].suffix}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(images[i], target)
        if i >= n:  # as long as the original, with other content
            content = bytearray(target.read_bytes())
            content[-1] ^= 1
            target.write_bytes(content)
    return val


def test_the_same_set_is_all_in_train(train: Path) -> None:
    found = overlap(*of(train, train))
    assert found.percent == 100 and found.compared == found.images == len(of(train)[0])


def test_copies_under_other_names_are_found(train: Path, tmp_path: Path) -> None:
    found = overlap(*of(train, some_of(train, tmp_path / "val", 3, others=2)))
    assert found == (3, 5, 5) and str(found).startswith("60 % of val (3 of 5 images) is in train")


def test_other_images_are_not(train: Path, tmp_path: Path) -> None:
    assert overlap(*of(train, some_of(train, tmp_path / "val", 0, others=4))) == (0, 4, 4)


def test_shards_and_joined_sets(train: Path, tmp_path: Path) -> None:
    val = some_of(train, tmp_path / "val", 2, others=2)
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards/0.tar", "w") as tar:
        for path in sorted(val.rglob("copy*")):
            tar.add(path, path.name)
    assert overlap(*of(train, tmp_path / "shards")) == (2, 4, 4)
    joined = make_dataset(f"{train} + SamplePhotos:split=VAL")
    assert overlap(joined, make_dataset("SamplePhotos:split=VAL")) == (300, 300, 300)
    assert overlap(make_dataset("SamplePhotos:split=TRAIN"), make_dataset("SamplePhotos:split=VAL")) == (0, 300, 300)


def test_large_sets_are_sampled(train: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaks, "ALL_UP_TO", 5)
    monkeypatch.setattr(leaks, "SAMPLED", 3)
    found = overlap(*of(train, some_of(train, tmp_path / "val", 4)))
    assert found == (3, 3, 4) and "3 of 3 sampled images" in str(found)
