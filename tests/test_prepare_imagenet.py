"""`dino2 prepare-imagenet` on a generated ImageNet tree with every awkward case, and what training makes of each."""

import gzip
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from dinov2cli.cli.main import main
from dinov2cli.config import load_config
from dinov2cli.data.datasets import UnreadableImage, make_dataset
from dinov2cli.data.datasets.imagenet import NO_CLASS, Split
from dinov2cli.data.loaders import make_train_loader
from dinov2cli.data.prepare.imagenet import entries_of, list_split
from dinov2cli.data.prepare.labels import Labels, read_labels
from dinov2cli.errors import DataError

FISH, SHARK, HEN = "n01440764", "n01491361", "n01514859"
LABELS = f'{FISH},tench\n{SHARK},"great white shark, white shark"\n{HEN},hen\n'


def picture(mode: str = "RGB", kind: str = "JPEG", **options: object) -> bytes:
    levels = np.random.default_rng(0).integers(0, 256, (60, 80, 4), dtype=np.uint8)
    image = Image.fromarray(levels[..., :3]).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rotated_by_exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    return picture(exif=exif)


# name in train/n01440764 -> (content, what prepare does, what reading it gives)
AWKWARD: dict[str, tuple[bytes, str, str]] = {
    f"{FISH}_10026.JPEG": (picture(), "entry 10026", "pixels"),
    f"{FISH}_1003.JPEG": (picture("CMYK"), "entry 1003", "pixels"),
    f"{FISH}_2.JPEG": (picture("L"), "entry 2", "pixels"),
    f"{FISH}_30.JPEG": (picture(kind="PNG"), "entry 30", "pixels"),
    f"{FISH}_31.JPEG": (rotated_by_exif(), "entry 31", "pixels, turned"),
    f"{FISH}_40.JPEG": (picture()[:1000], "entry 40", "damaged image"),
    f"{FISH}_41.JPEG": (b"", "entry 41", "the file is empty"),
    f"{FISH}_42.JPEG": (b"hello", "entry 42", "not an image"),
    f"{FISH}_007.JPEG": (picture(), "left out", ""),
    f"{FISH}_50.jpg": (picture(), "left out", ""),
    "notes.txt": (b"", "left out", ""),
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "imagenet"
    fish = root / "train" / FISH
    fish.mkdir(parents=True)
    for name, (content, _, _) in AWKWARD.items():
        (fish / name).write_bytes(content)
    (fish / f"{FISH}_60.JPEG").mkdir()  # a folder named like an image
    (root / "train" / SHARK).mkdir()
    (root / "train" / SHARK / f"{SHARK}_1.JPEG").write_bytes(picture())  # a class with one image
    for class_id, number in ((SHARK, 3), (FISH, 2)):
        (root / "val" / class_id).mkdir(parents=True)
        (root / "val" / class_id / f"ILSVRC2012_val_{number:08d}.JPEG").write_bytes(picture())
    (root / "test").mkdir()
    for number in (1, 2):
        (root / "test" / f"ILSVRC2012_test_{number:08d}.JPEG").write_bytes(picture())
    (root / "labels.txt").write_text(LABELS)
    return root


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["prepare-imagenet", *map(str, arguments)])
    return int(stopped.value.code or 0)


def test_files_equal_what_the_reference_writes(tree: Path, tmp_path: Path) -> None:
    extra = tmp_path / "extra"
    assert run("--root", tree, "--extra", extra) == 0
    assert sorted(path.name for path in extra.iterdir()) == [
        "class-ids-TRAIN.npy", "class-ids-VAL.npy", "class-names-TRAIN.npy", "class-names-VAL.npy",
        "entries-TEST.npy", "entries-TRAIN.npy", "entries-VAL.npy",
    ]  # fmt: skip
    entries = np.load(extra / "entries-TRAIN.npy")
    shark = "great white shark, white shark"
    assert entries.dtype == np.dtype(
        [("actual_index", "<u4"), ("class_index", "<u4"), ("class_id", "<U9"), ("class_name", f"<U{len(shark)}")]
    )
    expected = [(n, 0, FISH, "tench") for n in (10026, 1003, 2, 30, 31, 40, 41, 42)] + [(1, 1, SHARK, shark)]
    assert entries.tolist() == expected, "sorted by class, then by file name"
    class_ids, class_names = np.load(extra / "class-ids-TRAIN.npy"), np.load(extra / "class-names-TRAIN.npy")
    assert class_ids.dtype == np.dtype("<U9") and class_ids.tolist() == [FISH, SHARK]
    assert class_names.dtype == np.dtype(f"<U{len(shark)}") and class_names.tolist() == ["tench", shark]
    assert np.load(extra / "entries-VAL.npy")[["actual_index", "class_index"]].tolist() == [(2, 0), (3, 1)]
    test = np.load(extra / "entries-TEST.npy")
    assert test.dtype == np.dtype(
        [("actual_index", "<u4"), ("class_index", "<u4"), ("class_id", "<U0"), ("class_name", "<U0")]
    )
    assert test.tolist() == [(1, NO_CLASS, "", ""), (2, NO_CLASS, "", "")]


def test_what_happens_to_each_awkward_file(tree: Path) -> None:
    assert run("--root", tree) == 0
    dataset = make_dataset(f"ImageNet:split=TRAIN:root={tree}")
    index_of = {Path(dataset.path(i)).name: i for i in range(len(dataset))}
    for name, (_, prepared, read) in AWKWARD.items():
        assert (name in index_of) == (prepared != "left out"), name
        if prepared == "left out":
            continue
        i = index_of[name]
        assert prepared == f"entry {np.load(tree / 'entries-TRAIN.npy')['actual_index'][i]}"
        if read.startswith("pixels"):
            assert dataset.image(i).shape == ((80, 60, 3) if "turned" in read else (60, 80, 3)), name
        else:
            with pytest.raises(UnreadableImage, match=read) as caught:
                dataset.image(i)
            assert name in str(caught.value)


def test_train_on_it(tree: Path) -> None:
    assert run("--root", tree) == 0
    config = load_config(
        overrides=[
            f"train.dataset_path=ImageNet:split=TRAIN:root={tree}:extra={tree}",
            "train.batch_size_per_gpu=9",
            "train.num_workers=0",
            "student.patch_size=8",
            "crops.global_crops_size=32",
            "crops.local_crops_size=16",
        ]
    )
    (batch,) = make_train_loader(config, start=0, stop=1)
    named = {Path(message.split(":")[0]).name for message in batch.bad}
    assert named == {f"{FISH}_40.JPEG", f"{FISH}_41.JPEG", f"{FISH}_42.JPEG"}
    assert batch.global_crops.shape == (18, 32, 32, 3)


def test_dataset_gives_targets_and_names(tree: Path) -> None:
    assert run("--root", tree) == 0
    train = make_dataset(f"ImageNet:split=TRAIN:root={tree}:extra={tree}")
    assert train.targets().tolist() == [0] * 8 + [1] and train.target(8) == 1
    assert train.class_names == ("tench", "great white shark, white shark")
    assert "9 of 1281167 images" in train.describe()
    test = make_dataset(f"ImageNet:split=TEST:root={tree}:extra={tree}")
    assert test.targets().tolist() == [-1, -1] and test.target(0) == -1
    assert test.image(1).shape == (60, 80, 3)
    with pytest.raises(IndexError):
        train.path(9)


def test_reads_files_that_the_reference_wrote(tree: Path, tmp_path: Path) -> None:
    dtype = [("actual_index", "<u4"), ("class_index", "<u4"), ("class_id", "U9"), ("class_name", "U5")]
    np.save(tmp_path / "entries-VAL.npy", np.array([(3, 1, SHARK, "shark"), (2, 0, FISH, "tench")], dtype=dtype))
    np.save(tmp_path / "class-names-VAL.npy", np.array(["tench", "shark"]))
    dataset = make_dataset(f"ImageNet:split=VAL:root={tree}:extra={tmp_path}")
    assert dataset.targets().tolist() == [1, 0] and dataset.class_names == ("tench", "shark")
    assert dataset.image(0).shape == (60, 80, 3)


def test_second_run_does_nothing_and_says_so(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--root", tree, "--split", "VAL") == 0
    before = (tree / "entries-VAL.npy").stat().st_mtime_ns
    assert run("--root", tree, "--split", "VAL") == 0
    assert "already prepared" in capsys.readouterr().out
    assert (tree / "entries-VAL.npy").stat().st_mtime_ns == before
    (tree / "val" / SHARK / "ILSVRC2012_val_00000009.JPEG").write_bytes(picture())
    os.utime(tree / "val" / SHARK, (2e9, 2e9))
    assert run("--root", tree, "--split", "VAL") == 0
    assert "changed since" in capsys.readouterr().err
    assert len(np.load(tree / "entries-VAL.npy")) == 2
    assert run("--root", tree, "--split", "VAL", "--force") == 0
    assert len(np.load(tree / "entries-VAL.npy")) == 3
    assert not list(tree.glob(".*tmp")), "nothing is left aside"


def test_check_names_every_problem_and_writes_nothing(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--root", tree, "--check") == 2
    said = capsys.readouterr()
    assert "9 images in 2 classes, 1 / 4 / 8 a class" in said.out
    assert f"1 classes of labels.txt without images: {HEN}" in said.out
    for problem in (
        f"{FISH}_41.JPEG",
        "4 names that are not of the layout",
        f"{FISH}_40.JPEG: damaged",
        "1 empty files",
    ):
        assert problem in said.err
    assert not list(tree.glob("*.npy"))


def test_check_of_a_sound_tree_is_silent(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--root", tree, "--check", "--split", "VAL") == 0
    assert "no problems found" in capsys.readouterr().out


def broken(text: str) -> Callable[[Path], object]:
    return lambda root: (root / "labels.txt").write_bytes(text.encode())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (broken(f"{FISH},tench\n"), f"labels.txt does not name 1 of the class folders of train/: {SHARK}"),
        (broken(""), "labels.txt is empty"),
        (broken(f"{FISH}\n"), "line 1: expected 'class id,name'"),
        (broken(LABELS + f"{FISH},again\n"), "line 4: n01440764 stands there twice"),
        (lambda root: (root / "labels.txt").write_bytes(b"n01440764,t\xe9nch\n"), "not UTF-8"),
        (lambda root: (root / "labels.txt").unlink(), "--write-labels makes one"),
    ],
)
def test_unusable_labels(
    tree: Path, damage: Callable[[Path], object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(tree)
    assert run("--root", tree) == 2
    assert message in capsys.readouterr().err
    assert not list(tree.glob("*.npy"))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (LABELS.replace("\n", "\r\n"), "Windows line ends"),
        (LABELS.replace('"', ""), "a comma in a name without quotes"),
        ("\n".join(reversed(LABELS.splitlines())), "not sorted by class id"),
    ],
)
def test_odd_labels_are_read_and_reported(tree: Path, text: str, problem: str) -> None:
    (tree / "labels.txt").write_bytes(text.encode())
    labels = read_labels(tree)
    assert labels.names == {FISH: "tench", SHARK: "great white shark, white shark", HEN: "hen"}
    assert labels.class_index() == {FISH: 0, SHARK: 1, HEN: 2}
    assert len(labels.problems) == 1 and problem in labels.problems[0]
    entries = entries_of(list_split(tree, Split.VAL), labels)
    assert entries[["class_id", "class_index"]].tolist() == [(FISH, 0), (SHARK, 1)]


def test_labels_from_folder_names(tree: Path) -> None:
    (tree / "labels.txt").unlink()
    assert run("--root", tree, "--write-labels") == 0
    assert (tree / "labels.txt").read_text() == f"{FISH},{FISH}\n{SHARK},{SHARK}\n"
    assert run("--root", tree, "--write-labels") == 2, "it is not overwritten"


def test_a_failure_leaves_no_labels_behind(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tree / "labels.txt").unlink()
    for path in (tree / "val").rglob("*.JPEG"):
        path.rename(path.with_suffix(".png"))
    assert run("--root", tree, "--write-labels") == 2
    assert "val/ holds no image of ImageNet's layout; it holds names such as val/" in capsys.readouterr().err
    assert not (tree / "labels.txt").exists() and not list(tree.glob("*.npy")), "all is read before anything is written"
    assert run("--root", tree, "--write-labels", "--check", "--split", "TRAIN") == 2
    assert not (tree / "labels.txt").exists()


@pytest.fixture
def kaggle(tmp_path: Path) -> Path:
    """Two classes as Kaggle's archive unpacks them: val/ is flat, the labels lie beside ILSVRC/."""
    root = tmp_path / "kaggle"
    data = root / "ILSVRC" / "Data" / "CLS-LOC"
    for class_id in (FISH, SHARK):
        (data / "train" / class_id).mkdir(parents=True)
        for number in (18, 36):
            (data / "train" / class_id / f"{class_id}_{number}.JPEG").write_bytes(picture())
    (data / "val").mkdir()
    (data / "test").mkdir()
    for number in (1, 2, 3):
        (data / "val" / f"ILSVRC2012_val_{number:08d}.JPEG").write_bytes(picture())
    (data / "test" / "ILSVRC2012_test_00000001.JPEG").write_bytes(picture())
    (root / "LOC_synset_mapping.txt").write_text(f"{FISH} tench, Tinca tinca\n{SHARK} great white shark, white shark\n")
    boxes = {1: f"{FISH} 1 2 30 40 ", 2: f"{SHARK} 5 6 30 40 {SHARK} 9 9 20 20 ", 3: f"{FISH} 0 0 9 9 "}
    rows = "".join(f"ILSVRC2012_val_{number:08d},{text}\n" for number, text in boxes.items())
    (root / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + rows)
    return root


@pytest.mark.parametrize("below", ["", "ILSVRC", "ILSVRC/Data/CLS-LOC"])
def test_kaggles_download_as_it_is(kaggle: Path, below: str, capsys: pytest.CaptureFixture[str]) -> None:
    root = kaggle / below
    assert run("--root", root) == 0
    said = capsys.readouterr()
    assert ("Kaggle's download" in said.out) == (below != "ILSVRC/Data/CLS-LOC") and "not of the layout" not in said.err
    train, val, test = (make_dataset(f"ImageNet:split={split}:root={root}") for split in ("TRAIN", "VAL", "TEST"))
    assert train.class_names == ("tench, Tinca tinca", "great white shark, white shark")
    assert train.targets().tolist() == [0, 0, 1, 1] and len(test) == 1
    labels = {Path(val.path(i)).name: val.target(i) for i in range(3)}
    assert labels == {f"ILSVRC2012_val_{n:08d}.JPEG": target for n, target in ((1, 0), (2, 1), (3, 0))}
    assert all(each.image(0).shape == (60, 80, 3) for each in (train, val, test))
    assert len(list((kaggle / "ILSVRC/Data/CLS-LOC/val").glob("*.JPEG"))) == 3, "nothing is moved"


def test_kaggles_files_under_other_names(kaggle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (kaggle / "LOC_synset_mapping.txt").rename(kaggle / "labels.txt")
    (kaggle / "LOC_val_solution.csv").rename(kaggle / "truth.csv")
    assert run("--root", kaggle) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "lie in no class folders" in said and "--val-labels" in said
    assert run("--root", kaggle, "--val-labels", kaggle / "truth.csv", "--link") == 0
    assert "not of the layout" not in capsys.readouterr().err, "the files that have just been linked are not strange"
    assert make_dataset(f"ImageNet:split=VAL:root={kaggle}").class_names[0] == "tench, Tinca tinca"


@pytest.mark.parametrize("flat", [False, True])
def test_names_of_the_hugging_face_export(tmp_path: Path, flat: bool, capsys: pytest.CaptureFixture[str]) -> None:
    for class_id in (FISH, SHARK):
        for number in (10026, 10027):
            folder = tmp_path / "train" / ("" if flat else class_id)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{class_id}_{number}_{class_id}.JPEG").write_bytes(picture())
    (tmp_path / "val").mkdir()
    for number, class_id in ((1, SHARK), (2, FISH)):
        (tmp_path / "val" / f"ILSVRC2012_val_{number:08d}_{class_id}.JPEG").write_bytes(picture())
    assert run("--root", tmp_path, "--write-labels") == 0
    assert f"the reference implementation expects train/{FISH}/{FISH}_10026.JPEG" in capsys.readouterr().out
    train, val = (make_dataset(f"ImageNet:split={split}:root={tmp_path}") for split in ("TRAIN", "VAL"))
    assert train.targets().tolist() == [0, 0, 1, 1] and train.image(3).shape == (60, 80, 3)
    assert [(Path(val.path(i)).name[:23], val.target(i)) for i in range(2)] == [
        ("ILSVRC2012_val_00000002", 0), ("ILSVRC2012_val_00000001", 1)
    ]  # fmt: skip
    assert val.image(0).shape == (60, 80, 3)


def test_missing_or_empty_split(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--root", tmp_path / "nowhere") == 2
    (tree / "val" / "n1").mkdir()
    assert run("--root", tmp_path) == 2
    assert "no train/, val/ or test/" in capsys.readouterr().err
    with pytest.raises(DataError, match="holds no image of ImageNet's layout"):
        for path in (tree / "test").iterdir():
            path.rename(path.with_suffix(".png"))
        entries_of(list_split(tree, Split.TEST), Labels({}, []))


@pytest.fixture
def flat_val(tmp_path: Path) -> Path:
    root = tmp_path / "raw"
    (root / "val").mkdir(parents=True)
    for number in (1, 2, 3):
        (root / "val" / f"ILSVRC2012_val_{number:08d}.JPEG").write_bytes(picture())
    (root / "labels.txt").write_text(LABELS)
    return root


@pytest.mark.parametrize("form", ["devkit", "class ids", "pairs", "solution.csv"])
@pytest.mark.parametrize("how", [[], ["--link"]])
def test_flat_val_is_sorted(flat_val: Path, form: str, how: list[str]) -> None:
    labels = flat_val / "labels-of-val.txt"
    classes = [HEN, FISH, HEN]
    if form == "devkit":
        labels.write_text("2\n1\n2\n")
        synsets = np.array(
            [(i + 1, wnid) for i, wnid in enumerate((FISH, HEN, SHARK))], dtype=[("ID", "O"), ("WNID", "O")]
        )
        savemat(flat_val / "meta.mat", {"synsets": synsets}, do_compression=True)
    elif form == "class ids":
        labels.write_text("".join(f"{class_id}\n" for class_id in classes))
    elif form == "pairs":
        labels.write_text("".join(f"ILSVRC2012_val_{i + 1:08d}.JPEG {c}\n" for i, c in enumerate(classes)))
    else:
        rows = [f"ILSVRC2012_val_{i + 1:08d},{c} 1 2 30 40" for i, c in enumerate(classes)]
        labels.write_text("ImageId,PredictionString\n" + "\n".join(rows) + "\n")
    assert run("--root", flat_val, "--val-labels", labels, *how) == 0
    dataset = make_dataset(f"ImageNet:split=VAL:root={flat_val}")
    assert [(Path(dataset.path(i)).parent.name, dataset.target(i)) for i in range(3)] == [(FISH, 0), (HEN, 2), (HEN, 2)]
    assert all(dataset.image(i).shape == (60, 80, 3) for i in range(3))
    assert len(list((flat_val / "val").glob("*.JPEG"))) == (3 if how else 0)
    assert run("--root", flat_val, "--val-labels", labels, *how) == 0, "a second time changes nothing"


def test_flat_val_with_unusable_labels_moves_nothing(flat_val: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = flat_val / "truth.txt"
    for text, message in (
        (f"{HEN}\n{FISH}\n", "no label for 1 images"),
        ("1\n2\n1\n", "meta.mat does not exist"),
        ("x\n", "understood"),
    ):
        labels.write_text(text)
        assert run("--root", flat_val, "--val-labels", labels) == 2
        assert message in capsys.readouterr().err
        assert len(list((flat_val / "val").glob("*.JPEG"))) == 3


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    root = tmp_path / "22k"
    root.mkdir()
    contents = {
        "n2": [("n2_1.JPEG", picture()), ("n2_7.JPEG", gzip.compress(picture("L")))],
        "n10": [("n10_3.JPEG", picture())],
    }
    for class_id, members in contents.items():
        with tarfile.open(root / f"{class_id}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return root


def test_22k(tars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extra = tmp_path / "extra22k"
    assert run("--root", tars, "--extra", extra, "--variant", "22k") == 0
    lines = (tars / "blocks" / "n2.log").read_text().splitlines()
    assert lines[0] == "block 0: n2_1.JPEG" and lines[-1].endswith(": ** Block of NULs **") and len(lines) == 3
    entries = np.load(extra / "entries.npy")
    assert entries.dtype == np.dtype(
        [
            ("class_index", "<u4"),
            ("class_id", "<U3"),
            ("start_offset", "<u4"),
            ("end_offset", "<u4"),
            ("filename", "<U10"),
        ]
    )
    assert np.load(extra / "class-ids.npy").tolist() == ["n10", "n2"]
    assert entries["filename"].tolist() == ["n10_3.JPEG", "n2_1.JPEG", "n2_7.JPEG"]
    assert (entries["start_offset"] % 512 == 0).all() and entries["end_offset"][1] == entries["start_offset"][2]
    dataset = make_dataset(f"ImageNet22k:root={tars}:extra={extra}")
    assert [dataset.image(i).shape for i in range(3)] == [(60, 80, 3)] * 3, "the gzipped one included"
    assert dataset.targets().tolist() == [0, 1, 1] and dataset.class_names == ("n10", "n2")
    assert run("--root", tars, "--extra", extra, "--variant", "22k") == 0
    assert "already prepared" in capsys.readouterr().out


def test_22k_leaves_out_what_is_no_image(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "n06470073.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in (47248, 47249, 47250):
            info = tarfile.TarInfo(f"n06470073_{number}.JPEG")
            info.size = len(picture())
            tar.addfile(info, io.BytesIO(picture()))
    assert run("--root", tmp_path, "--variant", "22k") == 0
    entries = np.load(tmp_path / "entries.npy")
    assert entries["filename"].tolist() == ["n06470073_47248.JPEG", "n06470073_47250.JPEG"]
    assert entries["start_offset"][1] > entries["end_offset"][0], "its bytes belong to no other"
    assert make_dataset(f"ImageNet22k:root={tmp_path}").image(1).shape == (60, 80, 3)


def test_22k_reads_listings_that_are_there(tars: Path) -> None:
    (tars / "blocks").mkdir()
    (tars / "blocks" / "n10.log").write_text("block 0: renamed.JPEG\nblock 9: ** Block of NULs **\n")
    assert run("--root", tars, "--variant", "22k") == 0
    entries = np.load(tars / "entries.npy")
    assert entries[0].tolist() == (0, "n10", 0, 9 * 512, "renamed.JPEG")


@pytest.mark.parametrize("text", ["block 0: a.JPEG\n", "hello\n", "block 0: a\nblock 99999999: ** Block of NULs **\n"])
def test_22k_with_a_listing_that_does_not_fit(tars: Path, text: str) -> None:
    (tars / "blocks").mkdir()
    (tars / "blocks" / "n10.log").write_text(text)
    assert run("--root", tars, "--variant", "22k") == 2
    assert not (tars / "entries.npy").exists()


def test_22k_refuses_tars_beyond_4_gib(tars: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open(tars / "n3.tar", "wb") as file:
        file.truncate(2**32)  # sparse: takes no space
    assert run("--root", tars, "--variant", "22k") == 2
    assert "4 GiB" in capsys.readouterr().err
    assert not (tars / "entries.npy").exists()
