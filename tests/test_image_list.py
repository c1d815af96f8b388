"""Lists of images: files by their paths, members of shards by their rows; what is wrong with one is said."""

import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov2cli.data.datasets import check_dataset, make_dataset
from dinov2cli.data.datasets.image_list import printable
from dinov2cli.data.datasets.joined import RowsDataset
from dinov2cli.data.loaders import make_eval_loader
from dinov2cli.data.transforms import EvalTransform
from dinov2cli.errors import DataError


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for level, name in enumerate(("a.png", "b/b.png", "b/c d.png", "é.png")):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 4), (level * 10,) * 3).save(path)
    return tmp_path / "photos"


@pytest.fixture
def shards(photos: Path) -> Path:
    folder = photos.parent / "shards"
    folder.mkdir()
    with tarfile.open(folder / "0.tar", "w") as tar:
        for label, path in enumerate(sorted(photos.rglob("*.png"))):
            tar.add(path, f"{label}.png")
            (photos.parent / "label").write_text(str(label))
            tar.add(photos.parent / "label", f"{label}.cls")
    return folder


def levels(dataset_string: str) -> list[int]:
    dataset = make_dataset(dataset_string)
    return [int(dataset.image(i)[0, 0, 0]) for i in range(len(dataset))]


def written(file: Path, text: str | bytes) -> Path:
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


@pytest.mark.parametrize(
    "text",
    [
        "b/b.png\na.png\né.png\n",
        "b/b.png\r\na.png\r\n\r\né.png",
        "\ufeffb/b.png\na.png\né.png",
        "# chosen\nb/b.png\n# \na.png\né.png\n# the end",
    ],
)
def test_files_in_the_order_of_the_list_from_its_folder_on(photos: Path, text: str) -> None:
    file = written(photos / "chosen.txt", text)
    check_dataset(f"list:{file}")
    assert levels(f"list:{file}") == levels(f"List:file={file}") == [10, 0, 30]
    elsewhere = written(photos.parent / "chosen.txt", text)
    assert levels(f"List:file={elsewhere}:root={photos}") == [10, 0, 30]
    dataset = make_dataset(f"list:{file}")
    assert dataset.targets().tolist() == [-1] * 3 and not dataset.class_names
    assert dataset.file_size(0) == os.path.getsize(photos / "b/b.png")
    assert dataset.describe() == f"list {file}: 3 images, no labels"


def test_classes_behind_a_tab_and_paths_from_the_root_on(photos: Path) -> None:
    lines = [f"{photos}/b/c d.png\tdog", f"{photos}/a.png", f"{photos}/b/b.png\tcat"]
    dataset = make_dataset(f"list:{written(photos.parent / 'l', chr(10).join(lines))}")
    assert dataset.class_names == ("cat", "dog") and dataset.targets().tolist() == [1, -1, 0]
    assert dataset.path(0) == f"{photos}/b/c d.png" and pickle.loads(pickle.dumps(dataset)).path(1) == dataset.path(1)


def test_rows_of_shards_keep_their_classes_and_are_read_by_loaders(photos: Path, shards: Path) -> None:
    base = make_dataset(str(shards))
    text = f"# rows of {shards}\n3\t{base.path(3)}\n1\t{base.path(1)}\n"
    name = f"list:{written(photos.parent / 'rows.txt', text)}"
    dataset = make_dataset(name)
    assert levels(name) == [30, 10] and dataset.targets().tolist() == [3, 1]
    assert dataset.path(0) == base.path(3) and dataset.container(0) == base.container(3)
    assert dataset.file_size(1) == base.file_size(1) and bytes(dataset.encoded(1)) == bytes(base.encoded(1))
    (batch,) = make_eval_loader(dataset, EvalTransform(4, 4), 8, 2)
    assert batch.targets.tolist() == [3, 1] and batch.indices.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no images found"),
        ("\n\n", "no images found"),
        ("no.png\n", r"none exists; the first is .*/no\.png(.|\n)*root=FOLDER"),
        ("# rows of {shards}\n", "no images found"),
        ("# rows of {shards}\n4\n", "rows 4 to 4 of a dataset of 4 images"),
        ("# rows of {shards}\n-1\n", "rows -1 to -1 of a dataset"),
        ("# rows of {shards}\nx\n", "not a list of rows"),
        ("# rows of {shards}\n99999999999999999999\n", "not a list of rows"),
        (
            "# rows of {shards}\n1\t/other.tar:1.png\n",
            r"row 1 was /other\.tar:1\.png, and is .* now: the dataset has changed",
        ),
        ("# rows of nowhere\n1\n", "neither a folder nor a known dataset"),
        ("# rows of 2*{shards} + {shards}\n1\n", "leave out the weights of its first line"),
        ("# rows of list:{here}\n1\n", "a list of rows of itself"),
    ],
)
def test_mistakes(photos: Path, shards: Path, text: str, message: str) -> None:
    file = photos / "chosen.txt"
    written(file, text.format(shards=shards, here=file))
    with pytest.raises(DataError, match=message):
        make_dataset(f"list:{file}")


def test_a_list_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no .*nowhere"):
        check_dataset(f"list:{tmp_path / 'nowhere'}")
    with pytest.raises(DataError, match="nowhere: cannot be read"):
        make_dataset(f"list:{tmp_path / 'nowhere'}")


def test_names_with_signs_that_part_columns_are_written_so_that_they_do_not(photos: Path) -> None:
    assert printable("a\tb\nc\udcff") == r"a\x09b\x0ac\xff"
    rows = RowsDataset(make_dataset(str(photos)), np.array([2, 0]))
    assert rows.class_names == ("b",) and len(rows) == 2
    with pytest.raises(IndexError):
        rows.path(2)
