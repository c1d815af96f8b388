"""Datasets: what a folder, a shard or a string stands for."""

import io
import json
import os
import pickle
import shutil
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dinov2cli.data.datasets import UnreadableImage, base, check_dataset, listing, make_dataset
from dinov2cli.data.datasets.folder import FolderDataset
from dinov2cli.data.datasets.imagenet import ImageNet
from dinov2cli.data.datasets.joined import JoinedDataset
from dinov2cli.data.datasets.sample_photos import PHOTOS, SIZE, SPLITS, SamplePhotos, _tiles_of
from dinov2cli.data.datasets.shards import ShardsDataset
from dinov2cli.data.loaders import make_eval_loader
from dinov2cli.data.transforms import EvalTransform
from dinov2cli.errors import DataError, EnvironmentProblem
from dinov2cli.eval.features import dataset_fingerprint


def save_image(path: Path, level: int = 100, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), (level, level, level)).convert(mode).save(path)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return cache


def names(dataset: FolderDataset) -> list[str]:
    return [str(Path(dataset.path(i)).relative_to(dataset.root)) for i in range(len(dataset))]


class TestFolder:
    def test_classes_are_the_first_folders(self, tmp_path: Path) -> None:
        for name in ("dog/b.png", "dog/deep/er/a.jpg", "cat/1.webp", "cat/2.TIF", "empty/notes.txt"):
            if name.endswith("txt"):
                (tmp_path / "empty").mkdir()
                (tmp_path / name).touch()
            else:
                save_image(tmp_path / name)
        dataset = FolderDataset(tmp_path)
        assert names(dataset) == ["cat/1.webp", "cat/2.TIF", "dog/b.png", "dog/deep/er/a.jpg"]
        assert dataset.class_names == ("cat", "dog")
        assert dataset.targets().tolist() == [0, 0, 1, 1] and dataset.targets().dtype == np.int64
        assert dataset.image(3).shape == (4, 6, 3) and dataset.target(3) == 1
        assert "4 images, 2 classes" in dataset.describe()

    def test_without_class_folders_there_are_no_labels(self, tmp_path: Path) -> None:
        save_image(tmp_path / "b.png")
        save_image(tmp_path / "a.bmp")
        dataset = FolderDataset(tmp_path)
        assert names(dataset) == ["a.bmp", "b.png"]
        assert dataset.class_names == () and dataset.targets().tolist() == [-1, -1]
        assert "no labels" in dataset.describe()

    def test_images_beside_class_folders_have_no_label(self, tmp_path: Path) -> None:
        save_image(tmp_path / "z.png")
        save_image(tmp_path / "cat" / "1.png")
        dataset = FolderDataset(tmp_path)
        assert names(dataset) == ["z.png", "cat/1.png"] and dataset.targets().tolist() == [-1, 0]
        assert "1 images directly in the folder have no label" in dataset.describe()

    def test_hidden_files_are_ignored_and_links_followed(self, tmp_path: Path) -> None:
        save_image(tmp_path / "data" / "cat" / "1.png")
        save_image(tmp_path / "data" / "cat" / ".hidden.png")
        save_image(tmp_path / "data" / ".cache" / "2.png")
        save_image(tmp_path / "elsewhere" / "3.png")
        (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "data" / "cat" / "0.png").symlink_to(tmp_path / "elsewhere" / "3.png")
        (tmp_path / "data" / "cat" / "loop").symlink_to(tmp_path / "data")
        (tmp_path / "data" / "cat" / "dangling.png").symlink_to(tmp_path / "nowhere")
        dataset = FolderDataset(tmp_path / "data")
        assert names(dataset) == ["cat/0.png", "cat/1.png", "cat/dangling.png", "linked/3.png"]
        with pytest.raises(UnreadableImage, match=r"dangling\.png.*No such file"):
            dataset.image(2)

    @pytest.mark.parametrize(
        ("mode", "suffix"),
        [("L", "png"), ("RGBA", "png"), ("P", "gif"), ("1", "png"), ("CMYK", "jpg"), ("L", "jpg"), ("LA", "png")],
    )
    def test_every_mode_becomes_rgb(self, tmp_path: Path, mode: str, suffix: str) -> None:
        save_image(tmp_path / f"a.{suffix}", 255, mode)
        image = FolderDataset(tmp_path).image(0)
        assert image.shape == (4, 6, 3) and image.dtype == np.uint8
        assert np.abs(image.astype(int) - 255).max() <= 2

    def test_sixteen_bit_images_are_scaled(self, tmp_path: Path) -> None:
        Image.fromarray(np.full((4, 4), 0x8000, np.uint16)).save(tmp_path / "a.png")
        assert (FolderDataset(tmp_path).image(0) == np.float32(32768 / 65535)).all()

    @pytest.mark.parametrize("content", [b"", b"no picture", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n\0\0"])
    def test_damaged_files_are_named(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "a.jpg").write_bytes(content)
        with pytest.raises(UnreadableImage, match=r"a\.jpg: ") as caught:
            FolderDataset(tmp_path).image(0)
        again = pickle.loads(pickle.dumps(caught.value))
        assert (again.path, again.reason) == (caught.value.path, caught.value.reason)

    def test_truncated_at_any_point_is_an_error_not_a_gray_picture(self, tmp_path: Path) -> None:
        levels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(levels).save(buffer, "JPEG")
        for keep in range(20, len(buffer.getvalue()) - 2, 397):
            (tmp_path / "a.jpg").write_bytes(buffer.getvalue()[:keep])
            with pytest.raises(UnreadableImage):
                FolderDataset(tmp_path).image(0)

    def test_no_folder_or_no_images(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no images found"):
            FolderDataset(tmp_path)
        with pytest.raises(DataError, match="is not a folder"):
            FolderDataset(tmp_path / "nowhere")

    def test_index_out_of_range(self, tmp_path: Path) -> None:
        save_image(tmp_path / "a.png")
        with pytest.raises(IndexError):
            FolderDataset(tmp_path).image(1)

    def test_names_that_are_not_unicode(self, tmp_path: Path) -> None:
        save_image(tmp_path / "a.png")
        try:
            os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/caf\xe9.png")
        except OSError:
            pytest.skip("this file system takes unicode names only")
        assert FolderDataset(tmp_path).image(0).shape == (4, 6, 3)


class TestCachedListing:
    @pytest.fixture
    def old_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr(listing, "CACHE_FROM", 3)
        for name in ("cat/1.png", "cat/2.png", "dog/x/3.png"):
            save_image(tmp_path / "data" / name)
        self.age(tmp_path / "data")
        return tmp_path / "data"

    @staticmethod
    def age(root: Path) -> None:
        for folder, _, _ in os.walk(root):
            os.utime(folder, (time.time() - 100,) * 2)

    def test_a_remembered_listing_is_the_same(self, old_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = FolderDataset(old_folder)
        with monkeypatch.context() as patch:
            patch.setattr(listing, "_Found", lambda: pytest.fail("the folder was read again"))
            second = FolderDataset(old_folder)
        assert names(first) == names(second) == ["cat/1.png", "cat/2.png", "dog/x/3.png"]
        assert first.targets().tolist() == second.targets().tolist() == [0, 0, 1]
        assert first.class_names == second.class_names

    def test_any_change_below_makes_it_anew(self, old_folder: Path) -> None:
        FolderDataset(old_folder)
        save_image(old_folder / "dog" / "x" / "4.png")
        assert names(FolderDataset(old_folder))[-1] == "dog/x/4.png"
        self.age(old_folder)
        FolderDataset(old_folder)
        (old_folder / "cat" / "1.png").unlink()
        assert names(FolderDataset(old_folder)) == ["cat/2.png", "dog/x/3.png", "dog/x/4.png"]

    def test_a_folder_that_is_still_changing_is_not_remembered(self, old_folder: Path, own_cache: Path) -> None:
        os.utime(old_folder / "cat")
        FolderDataset(old_folder)
        assert not list(own_cache.rglob("*.json"))

    def test_a_damaged_cache_is_made_anew(self, old_folder: Path, own_cache: Path) -> None:
        FolderDataset(old_folder)
        for path in own_cache.rglob("*.ends.npy"):
            path.write_bytes(b"x")
        assert len(FolderDataset(old_folder)) == 3


class TestSamplePhotos:
    def test_labels_and_sizes(self) -> None:
        train, val = SamplePhotos("TRAIN"), SamplePhotos("VAL")
        assert len(train.class_names) == len(PHOTOS) == 12
        for dataset in (train, val):
            assert np.bincount(dataset.targets()).tolist() == [len(dataset) // 12] * 12
            assert dataset.image(len(dataset) - 1).shape == (SIZE, SIZE, 3)
        with pytest.raises(IndexError):
            train.image(len(train))

    def test_images_are_the_same_every_time_and_differ_from_each_other(self) -> None:
        first, again = SamplePhotos("VAL"), SamplePhotos("VAL")
        assert all(np.array_equal(first.image(i), again.image(i)) for i in range(0, 300, 37))
        assert len({first.image(i).tobytes() for i in range(50)}) == 50

    def test_splits_share_no_pixel(self) -> None:
        numbered = np.arange(200 * 300 * 3).reshape(200, 300, 3)
        seen = {split: [int(v) for tile in _tiles_of(numbered, split) for v in tile.ravel()] for split in SPLITS}
        assert not set(seen["TRAIN"]) & set(seen["VAL"])
        assert len(seen["TRAIN"]) == len(set(seen["TRAIN"])) == 0.6 * numbered.size

    def test_unknown_split(self) -> None:
        with pytest.raises(DataError, match="TRAIN and VAL"):
            SamplePhotos("TEST")

    def test_without_scikit_image(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("dinov2cli.data.datasets.sample_photos.find_spec", lambda name: None)
        with pytest.raises(EnvironmentProblem, match=r"pip install 'dinov2cli\[demo\]'"):
            make_dataset("SamplePhotos:split=TRAIN")


def write_shard(path: Path, members: dict[str, bytes], mode: str = "w") -> None:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]  # the mode is a parameter here
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (5, 3), (level, level, level)).save(buffer, "PNG")
    return buffer.getvalue()


class TestShards:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        write_shard(tmp_path / "b.tar", {"000.png": png(30), "000.json": b"{}"})
        write_shard(
            tmp_path / "a.tar", {"x/000.cls": b"2", "x/000.png": png(10), "x/001.left.png": png(20), "x/001.cls": b"0"}
        )
        return tmp_path

    def test_images_by_index(self, folder: Path) -> None:
        dataset = make_dataset(str(folder))
        assert isinstance(dataset, ShardsDataset)
        assert [int(dataset.image(i)[0, 0, 0]) for i in (2, 0, 1)] == [30, 10, 20]
        assert dataset.targets().tolist() == [2, 0, -1]
        assert dataset.path(1).endswith("a.tar:x/001.left.png")
        assert "2 shards" in dataset.describe()

    def test_index_is_remembered_until_a_shard_changes(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for path in folder.iterdir():
            os.utime(path, (time.time() - 100,) * 2)
        first = ShardsDataset(folder)
        with monkeypatch.context() as patch:
            patch.setattr("dinov2cli.data.datasets.shards._images_in", lambda _: pytest.fail("read again"))
            again = ShardsDataset(folder)
        assert [again.path(i) for i in range(3)] == [first.path(i) for i in range(3)]
        assert again.targets().tolist() == first.targets().tolist()
        write_shard(folder / "b.tar", {"1.png": png(1), "2.png": png(2)})
        assert len(ShardsDataset(folder)) == 4

    def test_long_names_and_damage(self, tmp_path: Path) -> None:
        write_shard(tmp_path / "a.tar", {f"{'long' * 60}.png": png(9)})
        assert ShardsDataset(tmp_path).image(0)[0, 0, 0] == 9
        (tmp_path / "b.tar").write_bytes(b"not a tar" * 100)
        with pytest.raises(DataError, match=r"b\.tar: not an uncompressed tar file"):
            ShardsDataset(tmp_path)

    def test_compressed_or_none(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"holds no \.tar files"):
            ShardsDataset(tmp_path)
        write_shard(tmp_path / "a.tar", {"a.png": png(9)}, "w:gz")
        with pytest.raises(DataError, match="unpack"):
            ShardsDataset(tmp_path)


def write_zip(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


PHOTOS_OF_TWO = {
    "photos/dog/b.png": png(20),
    "photos/cat/a.png": png(10),
    "photos/notes.txt": b"x",
    "photos/c.png": png(30),
}


class TestArchives:
    @pytest.mark.parametrize("kind", ["tar", "zip", "stored zip"])
    def test_one_archive_has_classes_by_folder(self, tmp_path: Path, kind: str) -> None:
        if kind == "tar":
            write_shard(path := tmp_path / "a:b.tar", {f"./{name}": data for name, data in PHOTOS_OF_TWO.items()})
        else:
            method = zipfile.ZIP_STORED if "stored" in kind else zipfile.ZIP_DEFLATED
            path = write_zip(tmp_path / "a:b.zip", PHOTOS_OF_TWO, method)
        for text in (str(path), f"archive:{path}", f'Archive:file="{path}"', f'"{path}"'):
            dataset = make_dataset(text)
            assert dataset.class_names == ("cat", "dog")
            found = {
                dataset.path(i).rpartition("/")[2]: (int(dataset.image(i)[0, 0, 0]), dataset.target(i))
                for i in range(3)
            }
            assert found == {"a.png": (10, 0), "b.png": (20, 1), "c.png": (30, -1)}
        assert pickle.loads(pickle.dumps(dataset)).image(0).shape == (3, 5, 3)
        assert "3 images, 2 classes" in dataset.describe() and dataset.file_size(0) == len(png(10))

    def test_webdataset_labels_and_flat_archives(self, tmp_path: Path) -> None:
        flat = make_dataset(str(write_zip(tmp_path / "flat.zip", {"a.png": png(1), "b.png": png(2)})))
        assert flat.class_names == () and flat.targets().tolist() == [-1, -1]
        labelled = {"x/0.png": png(1), "x/0.cls": b"1", "y/1.png": png(2), "y/1.cls": b"0"}
        assert make_dataset(str(write_zip(tmp_path / "web.zip", labelled))).targets().tolist() == [1, 0]

    @pytest.mark.parametrize("kind", ["zip", "tar"])
    def test_what_is_no_class_of_a_folder_is_none_of_an_archive(self, tmp_path: Path, kind: str) -> None:
        hidden = {"./cat/.thumbs/a.png": png(9), ".ipynb_checkpoints/b.png": png(9), "cat/._a.png": b"x"}
        parts = {"set/train/cat/a.png": png(1), "set/val/cat/b.png": png(2)}
        for name, members in (("hidden", PHOTOS_OF_TWO | hidden), ("parts", parts)):
            write = write_zip if kind == "zip" else write_shard
            write(tmp_path / f"{name}.{kind}", members)
        found = make_dataset(str(tmp_path / f"hidden.{kind}"))
        assert len(found) == 3 and found.class_names == ("cat", "dog")
        file = tmp_path / f"parts.{kind}"
        with pytest.raises(DataError, match=rf"holds train and val, which are parts(.|\n)*or archive:{file}"):
            make_dataset(str(file))
        assert make_dataset(f"archive:{file}").class_names == ("train", "val")

    @pytest.mark.parametrize("name", ["photos.tar.gz", "photos.tgz", "photos.tar.xz"])
    def test_compressed_tars_say_what_to_do(self, tmp_path: Path, name: str) -> None:
        write_shard(tmp_path / name, PHOTOS_OF_TWO, "w:gz")
        for given in (tmp_path / name, tmp_path):
            with pytest.raises(DataError, match=r"read from its start to reach an image(.|\n)*Unpack it"):
                make_dataset(str(given))

    def test_a_replaced_archive_is_another_dataset(self, tmp_path: Path) -> None:
        path = write_zip(tmp_path / "a.zip", {"a.png": png(1)})
        before = dataset_fingerprint(make_dataset(str(path)))
        write_zip(path, {"a.png": png(2)})
        os.utime(path, (1, 1))
        assert dataset_fingerprint(make_dataset(str(path))) != before

    def test_what_cannot_be_read_by_position(self, tmp_path: Path) -> None:
        write_zip(tmp_path / "lzma.zip", PHOTOS_OF_TWO, zipfile.ZIP_LZMA)
        (tmp_path / "no.zip").write_bytes(b"PK but no zip")
        write_zip(tmp_path / "empty.zip", {"a.txt": b"x"})
        for name, message in (("lzma", "other than deflate"), ("no", "not a zip file"), ("empty", "no images found")):
            with pytest.raises(DataError, match=message):
                make_dataset(str(tmp_path / f"{name}.zip"))

    def test_damage_inside_is_an_unreadable_image(self, tmp_path: Path) -> None:
        path = write_zip(tmp_path / "a.zip", {"a.png": png(1), "b.png": png(2)})
        dataset = make_dataset(str(path))
        content = bytearray(path.read_bytes())
        content[36:60] = bytes(24)
        path.write_bytes(content)
        with pytest.raises(UnreadableImage, match=r"a\.zip:a\.png"):
            dataset.image(0)
        assert dataset.image(1)[0, 0, 0] == 2


class TestTables:
    @pytest.fixture
    def photos(self, tmp_path: Path) -> Path:
        for i, name in enumerate(("a.png", "b/b.png", "c.png")):
            save_image(tmp_path / name, 10 * i)
        return tmp_path

    @pytest.mark.parametrize(
        ("name", "text", "classes", "targets"),
        [
            ("t.csv", "file_name,label\nc.png,dog\na.png,\nb/b.png,cat\n", ("cat", "dog"), [1, -1, 0]),
            ("t.csv", "id;image;class\n7;c.png;10\n8;a.png;9\n9;b/b.png;10\n", ("9", "10"), [1, 0, 1]),
            ("t.tsv", "\ufeffwhere\tother\nc.png\tx\na.png\ty\nb/b.png\tz\n", (), [-1] * 3),
            ("t.csv", "c.png,1\r\na.png,0\r\nb/b.png,1\r\n", ("0", "1"), [1, 0, 1]),
            ("t.csv", "path|label\nc.png|1\n  \n|\na.png|0\nb/b.png|1\n", ("0", "1"), [1, 0, 1]),
            ("t.csv", '"c.png"\n"a.png"\n"b/b.png"\n', (), [-1] * 3),
        ],
    )
    def test_columns_and_order(
        self, photos: Path, name: str, text: str, classes: tuple[str, ...], targets: list[int]
    ) -> None:
        (photos / "tables").mkdir()
        (photos / "tables" / name).write_text(text, encoding="utf-8")
        dataset = make_dataset(f"Table:file={photos / 'tables' / name}:root={photos}")
        assert [int(dataset.image(i)[0, 0, 0]) for i in range(3)] == [20, 0, 10]
        assert dataset.class_names == classes and dataset.targets().tolist() == targets
        assert "3 images by column" in dataset.describe()

    def test_named_columns_and_parquet(self, photos: Path) -> None:
        (photos / "t.csv").write_text("path,view,species\na.png,c.png,x\nb/b.png,a.png,y\n")
        assert make_dataset(str(photos / "t.csv")).path(0).endswith("/a.png")
        other = make_dataset(f"csv:{photos / 't.csv'}:path=view:label=species")
        assert other.path(0).endswith("/c.png") and other.class_names == ("x", "y")
        check_dataset(f"csv:{photos / 't.csv'}:path=view:label=species")
        with pytest.raises(DataError, match=r"there is no .*/nowhere\.csv"):
            check_dataset(f"csv:{photos / 'nowhere.csv'}:label=species")
        table = pa.table({"path": ["a.png", str(photos / "c.png")], "label": [3, None]})
        pq.write_table(table, photos / "t.parquet")
        from_parquet = make_dataset(str(photos / "t.parquet"))
        assert from_parquet.targets().tolist() == [0, -1] and from_parquet.class_names == ("3",)
        assert int(from_parquet.image(1)[0, 0, 0]) == 20

    @pytest.mark.parametrize(
        ("text", "options", "message"),
        [
            ("", "", "is empty"),
            ("path,label\n", "", "no images found"),
            ("x,y\n1,2\n", "", "has the columns x, y; which one holds the paths"),
            ("x,y\na.png,b.png\n", "", "which one holds the paths"),
            ("path,label\nmissing.png,1\n", "", r"none exists; the first is .*missing\.png(.|\n)*root=FOLDER"),
            ("path,label\na.png\n", "", "row 1 of images has 1 columns, not 2"),
            ("path,label\na.png,1\n", ":label=species", "none 'species'"),
            ('path,label\n"a.png,1\n', "", "not a table in UTF-8"),
        ],
    )
    def test_mistakes(self, photos: Path, text: str, options: str, message: str) -> None:
        (photos / "t.csv").write_text(text)
        with pytest.raises(DataError, match=message):
            make_dataset(f"csv:{photos / 't.csv'}{options}")


class TestParquet:
    @pytest.fixture
    def export(self, tmp_path: Path) -> Path:
        """As Hugging Face's datasets write them: two shards of train, one of test, names of the classes beside."""
        (tmp_path / "data").mkdir()
        features = {"image": {"_type": "Image"}, "label": {"names": ["ant", "bee", "cow"], "_type": "ClassLabel"}}
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        shards = {
            "train-00000-of-00002": range(5),
            "train-00001-of-00002-0a1b": range(5, 7),
            "test-00000-of-00001": [9],
        }
        for name, levels in shards.items():
            images = [{"bytes": png(10 * level), "path": f"{level}.png"} for level in levels]
            labels = [level % 3 if "train" in name else -1 for level in levels]
            table = pa.table({"image": images, "label": labels}).replace_schema_metadata(metadata)
            pq.write_table(table, tmp_path / "data" / f"{name}.parquet", row_group_size=2)
        return tmp_path

    def test_an_export_is_read_in_any_order(self, export: Path) -> None:
        train = make_dataset(f"Parquet:root={export}:split=train")
        assert [int(train.image(i)[0, 0, 0]) for i in (6, 0, 3, 4, 1, 5, 2)] == [60, 0, 30, 40, 10, 50, 20]
        assert train.class_names == ("ant", "bee", "cow") and train.targets().tolist() == [0, 1, 2, 0, 1, 2, 0]
        assert train.path(4).endswith("train-00000-of-00002.parquet:row 4") and train.path(6).endswith("parquet:row 1")
        assert (
            pickle.loads(pickle.dumps(train)).image(3)[0, 0, 0] == 30 and "2 Parquet files (train)" in train.describe()
        )
        assert make_dataset(f"Parquet:root={export}:split=test").targets().tolist() == [-1]
        with pytest.raises(DataError, match=r"holds the splits test, train(.|\n)*split=test"):
            make_dataset(str(export))
        (export / "data" / "test-00000-of-00001.parquet").unlink()
        assert len(make_dataset(str(export))) == 7

    def test_workers_read_it_as_the_main_process_does(self, export: Path) -> None:
        train = make_dataset(f"Parquet:root={export}:split=train")
        train.image(0)  # opened before the workers are forked
        batches = list(make_eval_loader(train, EvalTransform(8, 8), 2, num_workers=2))
        expected = list(make_eval_loader(train, EvalTransform(8, 8), 2, num_workers=0))
        assert (
            all(torch.equal(a.images, b.images) for a, b in zip(batches, expected, strict=True)) and len(batches) == 4
        )

    def test_plain_bytes_and_mistakes(self, tmp_path: Path) -> None:
        table = pa.table({"png": [png(5), None], "species": ["b", "a"], "n": [1, 2]})
        pq.write_table(table, tmp_path / "t.parquet")
        dataset = make_dataset(f"{tmp_path / 't.parquet'}")
        assert dataset.image(0)[0, 0, 0] == 5 and dataset.class_names == ("1", "2")
        assert make_dataset(f"parquet:{tmp_path / 't.parquet'}:label=species").targets().tolist() == [1, 0]
        with pytest.raises(UnreadableImage, match="row 1: the row holds no image"):
            dataset.image(1)
        pq.write_table(pa.table({"png": [png(5)] * 3, "n": [1.0, float("nan"), None]}), tmp_path / "float.parquet")
        floats = make_dataset(f"parquet:{tmp_path / 'float.parquet'}:label=n")
        assert floats.class_names == ("1.0",) and floats.targets().tolist() == [0, -1, -1]
        names = json.dumps({"info": {"features": {"label": {"names": ["cat", "dog"]}}}}).encode()
        for labels, message in (
            ([[0], [1, 0]], r"'label' holds no labels of one number or word each, such as \[0\]"),
            ([{"a": 1}, {"a": 2}], "'label' holds no labels of one"),
            ([1, 2], "label 2 is none of the 2 classes that are named there"),
            ([0, 2**40], "label 1099511627776 is none of the 2 classes"),
        ):
            table = pa.table({"png": [png(5)] * 2, "label": labels})
            named = (
                table if isinstance(labels[0], (list, dict)) else table.replace_schema_metadata({"huggingface": names})
            )
            pq.write_table(named, tmp_path / "v.parquet")
            with pytest.raises(DataError, match=message):
                make_dataset(str(tmp_path / "v.parquet"))
        with pytest.raises(DataError, match="no column 'x'; it has png, species, n"):
            make_dataset(f"parquet:{tmp_path / 't.parquet'}:label=x")
        (tmp_path / "u.parquet").write_bytes(b"PAR1 not")
        with pytest.raises(DataError, match="not a Parquet file"):
            make_dataset(str(tmp_path / "u.parquet"))


class TestLookAlikes:
    def test_parts_of_a_dataset_are_no_classes(self, tmp_path: Path) -> None:
        for part in ("train", "val", "sets/Training_Set", "sets/test-set"):
            save_image(tmp_path / part / "cat" / "1.png")
        with pytest.raises(DataError, match="holds Training_Set and test-set, which are parts"):
            make_dataset(str(tmp_path / "sets"))
        shutil.rmtree(tmp_path / "sets")
        with pytest.raises(
            DataError, match=rf"holds train and val, which are parts(.|\n)*{tmp_path}/train; or folder:"
        ):
            make_dataset(str(tmp_path))
        assert make_dataset(f"folder:{tmp_path}").class_names == ("train", "val")
        assert make_dataset(f"Folder:root={tmp_path}").class_names == ("train", "val")
        assert make_dataset(str(tmp_path / "train")).class_names == ("cat",)

    def test_roots_of_imagenet(self, tmp_path: Path) -> None:
        for part in ("train", "val"):
            save_image(tmp_path / "ILSVRC/Data/CLS-LOC" / part / "n01440764" / "n01440764_1.JPEG")
        for root in (tmp_path, tmp_path / "ILSVRC/Data/CLS-LOC"):
            with pytest.raises(
                DataError, match=rf"ImageNet(.|\n)*--root {root}, and then ImageNet:split=TRAIN:root={root}"
            ):
                make_dataset(str(root))

    def test_what_shows_at_once_is_refused_before_anything_is_listed(self, tmp_path: Path) -> None:
        for part in ("parts/train", "parts/val", "inside/set/train", "inside/set/val", "imagenet/val"):
            save_image(tmp_path / part / "cat" / "1.png")
        save_image(tmp_path / "imagenet/train/n01440764/n01440764_1.JPEG")
        (tmp_path / "inside/README.md").touch()
        (tmp_path / "empty").mkdir()
        (tmp_path / "texts").mkdir()
        (tmp_path / "texts/a.txt").touch()
        for name in ("parts", "inside", "imagenet", "empty", "texts", "texts/a.txt", "parts/train/cat/1.png"):
            said = []
            for look in (make_dataset, check_dataset):
                with pytest.raises(DataError) as error:
                    look(str(tmp_path / name))
                said.append(str(error.value))
            assert said[0] == said[1], name
        for name in ("parts/train", "parts/val/cat"):
            check_dataset(str(tmp_path / name))
        check_dataset(f"folder:{tmp_path / 'parts'}")

    def test_one_folder_that_holds_the_classes(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        for name in ("cat", "dog"):
            save_image(tmp_path / "images" / name / "1.png")
        (tmp_path / "README.md").touch()
        with caplog.at_level("INFO", logger="dino2"):
            dataset = make_dataset(str(tmp_path))
        assert dataset.class_names == ("cat", "dog") and "one folder alone" in caplog.text
        assert make_dataset(f"folder:{tmp_path}").class_names == ("images",)
        (tmp_path / "images" / "dog" / "1.png").rename(tmp_path / "images" / "cat" / "2.png")
        (tmp_path / "images" / "dog").rmdir()
        assert make_dataset(str(tmp_path)).class_names == ("images",), "one class in one folder is one class"

    def test_no_images_but_an_archive_or_tables(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        write_zip(tmp_path / "photos.zip", PHOTOS_OF_TWO)
        with caplog.at_level("INFO", logger="dino2"):
            assert len(make_dataset(str(tmp_path))) == 3
        assert "those of photos.zip" in caplog.text
        write_zip(tmp_path / "more.zip", PHOTOS_OF_TWO)
        with pytest.raises(DataError, match=r"no images found in .*more.zip, photos.zip\nGive the file: .*more\.zip"):
            make_dataset(str(tmp_path))

    def test_other_files_are_counted(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        save_image(tmp_path / "cat" / "1.png")
        for name in ("a.raw", "b.RAW", "cat/notes.txt", "cat/LICENSE", ".hidden.raw"):
            (tmp_path / name).touch()
        with caplog.at_level("INFO", logger="dino2"):
            make_dataset(str(tmp_path))
            make_dataset(str(tmp_path))
        assert caplog.text.count("passed over 4 files of other types: 2 .raw, 1 ") == 1
        (tmp_path / "cat" / "1.png").unlink()
        with pytest.raises(DataError, match=r"no images found in .*; it holds 2 \.raw"):
            make_dataset(str(tmp_path))

    def test_a_folder_of_what_is_given_otherwise(self, tmp_path: Path) -> None:
        (tmp_path / "up").mkdir()
        write_shard(tmp_path / "up" / "A.TAR", {"1.png": png(1), "1.cls": b"0"})
        assert make_dataset(str(tmp_path / "up")).targets().tolist() == [0]
        (tmp_path / "rows").mkdir()
        pq.write_table(pa.table({"image": [png(3)]}), tmp_path / "rows" / "B.PARQUET")
        assert int(make_dataset(str(tmp_path / "rows")).image(0)[0, 0, 0]) == 3
        with pytest.raises(
            DataError, match=r"it holds 1 \.parquet, 1 \.tar\nGive the folder in which the \.tar files lie"
        ):
            make_dataset(f"folder:{tmp_path}")
        (tmp_path / "saved").mkdir()
        (tmp_path / "saved" / "data-00000-of-00001.arrow").touch()
        with pytest.raises(DataError, match=r"to_parquet\(FILE\) writes one that is read"):
            make_dataset(str(tmp_path / "saved"))

    def test_a_file_that_is_no_dataset(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").touch()
        with pytest.raises(DataError, match=r"a\.txt is a file that is no dataset(.|\n)*list:.*a\.txt$"):
            make_dataset(str(tmp_path / "a.txt"))
        for look in (make_dataset, check_dataset):
            with pytest.raises(DataError, match="/dev/null is a file that is no dataset"):
                look("/dev/null")
        save_image(tmp_path / "a.png")
        with pytest.raises(DataError, match=r"a\.png is a file that is no dataset"):
            make_dataset(str(tmp_path / "a.png"))


class TestStrings:
    @pytest.mark.parametrize(
        "name", ["plain", "with:colon", "a=b", "a+b", "it's", "sp ace", "x:root=y", "a + b", "2*x"]
    )
    def test_any_folder_name(self, tmp_path: Path, name: str) -> None:
        save_image(tmp_path / name / "a.png")
        folder = tmp_path / name
        assert make_dataset(str(folder)).path(0) == str(folder / "a.png")
        assert make_dataset(f'"{folder}"').path(0) == str(folder / "a.png")
        assert make_dataset(f'Folder:root="{folder}"').path(0) == str(folder / "a.png")
        joined = make_dataset(f'"{folder}" + 2*"{folder}"')
        assert isinstance(joined, JoinedDataset) and len(joined) == 2 and joined.weights == [1, 2]

    def test_colons_and_equals_in_unquoted_values(self, tmp_path: Path) -> None:
        root = tmp_path / "a:b=c"
        save_image(root / "train" / "n1" / "n1_5.JPEG")
        dtype = [("actual_index", "<u4"), ("class_index", "<u4"), ("class_id", "U2"), ("class_name", "U1")]
        (tmp_path / "e:x=1").mkdir()
        np.save(tmp_path / "e:x=1" / "entries-TRAIN.npy", np.array([(5, 0, "n1", "a")], dtype=dtype))
        dataset = make_dataset(f"ImageNet:split=TRAIN:root={root}:extra={tmp_path / 'e:x=1'}")
        assert isinstance(dataset, ImageNet) and dataset.image(0).shape == (4, 6, 3)

    def test_joining(self, tmp_path: Path) -> None:
        save_image(tmp_path / "one" / "cat" / "1.png", 10)
        save_image(tmp_path / "two" / "ant" / "1.png", 20)
        save_image(tmp_path / "two" / "cat" / "1.png", 30)
        joined = make_dataset(f"{tmp_path / 'one'} + 0.5*{tmp_path / 'two'}+SamplePhotos:split=VAL")
        assert isinstance(joined, JoinedDataset) and joined.weights == [1.0, 0.5, 1.0]
        assert len(joined) == 303
        assert [int(joined.image(i)[0, 0, 0]) for i in range(3)] == [10, 20, 30]
        assert joined.class_names[:2] == ("cat", "ant")
        assert joined.targets()[:4].tolist() == [0, 1, 0, 2] and joined.target(2) == 0
        assert joined.path(2).endswith("two/cat/1.png") and "303 images joined" in joined.describe()
        seen = {joined.order(0).index(k) for k in range(302 * 2)}
        assert seen == set(range(303)), "half of the second a pass, all in two"

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "the dataset is empty"),
            ("/no/such/folder", "neither a folder nor a known dataset"),
            ("SamplePhoto:split=TRAIN", "did you mean SamplePhotos"),
            ("SamplePhotos:spilt=TRAIN", "no key 'spilt'; it has split"),
            ("SamplePhotos:split=TRAIN:split=VAL", "given twice"),
            ("SamplePhotos:split=train", "no split 'train'"),
            ("ImageNet:split=TRAIN", "ImageNet needs root=..."),
            ("ImageNet:root=/x:split=TRAIN", "entries-TRAIN.npy does not exist"),
            ("ImageNet22k:root=/x", "has not been prepared"),
            ("0*SamplePhotos", "weights are above 0"),
        ],
    )
    def test_mistakes(self, text: str, message: str) -> None:
        with pytest.raises(DataError) as caught:
            make_dataset(text)
        assert message in str(caught.value)


class TestFiles:
    def test_records_equal_numpys(self, tmp_path: Path) -> None:
        table = np.array([(i, i * 2, f"n{i}", "") for i in range(50)], dtype="<u4,<u4,U4,U0")
        np.save(tmp_path / "t.npy", table)
        records = base.RecordFile(tmp_path / "t.npy")
        assert len(records) == 50 and [records[i].tolist() for i in range(50)] == table.tolist()
        assert pickle.loads(pickle.dumps(records))[7].tolist() == table[7].tolist()
        np.testing.assert_array_equal(records.column("f1"), table["f1"])
        with pytest.raises(IndexError):
            records[50]
        content = (tmp_path / "t.npy").read_bytes()
        place = content.index("n7".encode("utf-32-le"))
        (tmp_path / "t.npy").write_bytes(content[:place] + b"\xff" * 4 + content[place + 4 :])  # no character
        with pytest.raises(UnreadableImage, match="record 7 is damaged: its f2 is no text"):
            base.RecordFile(tmp_path / "t.npy")[7]

    @pytest.mark.parametrize("content", [b"", b"hello", b"\x93NUMPY\x01\x00\x05\x00{{{{{"])
    def test_what_is_no_table(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "t.npy").write_bytes(content)
        with pytest.raises(DataError, match=r"t\.npy"):
            base.RecordFile(tmp_path / "t.npy")
        np.save(tmp_path / "u.npy", np.zeros(3))
        with pytest.raises(DataError, match="structured array"):
            base.RecordFile(tmp_path / "u.npy")

    def test_few_files_stay_open(self, tmp_path: Path) -> None:
        reader = base.OpenFiles()
        for i in range(40):
            (tmp_path / str(i)).write_bytes(bytes([i] * 10))
            assert reader.read(str(tmp_path / str(i)), 2, 3) == bytes([i] * 3)
        assert len(reader._descriptors) == base.OPEN_FILES
        assert reader.read(str(tmp_path / "0"), 0, 1) == b"\0", "closed ones open again"
        with pytest.raises(UnreadableImage, match="ends at byte 10"):
            reader.read(str(tmp_path / "0"), 8, 5)


def test_containers_as_other_programs_write_them(tmp_path: Path) -> None:
    """Names that are not ASCII, Windows's separators, previews of macOS; files beside a Parquet; tables of Excel's."""
    named = {"Vögel/größe 1.png": png(7), "猫/二.png": png(9), "__MACOSX/Vögel/._größe 1.png": b"\0\5\x16\7"}
    zipped = make_dataset(str(write_zip(tmp_path / "a.zip", named)))
    assert zipped.class_names == ("Vögel", "猫") and [int(zipped.image(i)[0, 0, 0]) for i in (0, 1)] == [7, 9]
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        for name in ("a\\1.png", "b\\2.png"):
            archive.writestr(zipfile.ZipInfo(name), png(7))
    assert make_dataset(str(tmp_path / "b.zip")).class_names == ("a", "b")
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "1.png").write_bytes(png(42))
    rows = [{"bytes": None, "path": "f/1.png"}, {"bytes": png(3), "path": "x"}, {"bytes": None, "path": "f/no.png"}]
    pq.write_table(pa.table({"image": rows}), tmp_path / "c.parquet")
    beside = make_dataset(str(tmp_path / "c.parquet"))
    assert [int(beside.image(i)[0, 0, 0]) for i in (0, 1)] == [42, 3]
    with pytest.raises(UnreadableImage, match=r"f/no.png: cannot be read"):
        beside.image(2)
    (tmp_path / "bom.csv").write_text('\ufeffpath,label,\r\n"f/1.png","x, y",\r\n', encoding="utf-8")
    assert make_dataset(str(tmp_path / "bom.csv")).class_names == ("x, y",)
    (tmp_path / "twice.csv").write_text("path,path,label\nf/1.png,f/2.png,x\n")
    with pytest.raises(DataError, match="two columns are named 'path'"):
        make_dataset(str(tmp_path / "twice.csv"))
    (tmp_path / "wide.csv").write_text("path,label\nf/1.png,x\n", encoding="utf-16")
    with pytest.raises(DataError, match=r"not a table in UTF-8 .* save it as such"):
        make_dataset(str(tmp_path / "wide.csv"))


def test_links_that_lead_back_and_names_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "1.png").write_bytes(png(7))
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "self").symlink_to(".")
    (tmp_path / "a" / "loop.png").symlink_to("loop.png")
    (tmp_path / "c").symlink_to(tmp_path / "a")
    folder = os.fsencode(tmp_path) + b"/\xff\xfe"
    os.makedirs(folder)
    Path(os.fsdecode(folder + b"/\xe9.png")).write_bytes(png(5))
    dataset = make_dataset(str(tmp_path))
    paths = [dataset.path(i).rpartition("/")[2] for i in range(5)]
    assert paths == ["loop.png", "1.png"] * 2 + ["\udce9.png"]
    assert [int(dataset.image(i)[0, 0, 0]) for i in (1, 3, 4)] == [7, 7, 5]
    with pytest.raises(UnreadableImage, match=r"loop\.png: cannot be read \(Too many levels"):
        dataset.image(0)
    assert dataset.class_names == ("a", "c", "\udcff\udcfe")
