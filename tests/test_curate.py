"""`dino2 curate`: each step on features whose answer is known, images to a list that trains, resuming, mistakes."""

import csv
import json
import re
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ready
import torch
from PIL import Image
from processes import run_in_processes
from tiny_run import write_images, write_weights

from dinov2cli.curate import collection, graph
from dinov2cli.curate.curation import look, need
from dinov2cli.curate.graph import usual_probes
from dinov2cli.curate.results import Curated
from dinov2cli.data.datasets import make_dataset
from dinov2cli.errors import DataError, Dino2Error, EnvironmentProblem
from dinov2cli.files import lock
from dinov2cli.models.load.tensor_files import write_tensors
from dinov2cli.requests.base import run
from dinov2cli.requests.curate import CurateRequest

DIM = 32


def directions(n: int, seed: int = 0) -> np.ndarray:
    """Unit vectors, orthogonal to each other: float32 [n, DIM]."""
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(DIM, DIM)))[0][:n].astype(np.float32)


def at(cosine: float, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """A unit vector of that cosine to the first, towards the second."""
    return (cosine * one + (1 - cosine**2) ** 0.5 * other).astype(np.float32)


def curate(folder: Path, features: np.ndarray, **how: Any) -> tuple[Curated, list[int]]:
    """The result and the rows that are kept."""
    np.save(folder / "f.npy", features)
    result = run(CurateRequest(output=folder / "out", data=(str(folder / "f.npy"),), device="cpu", **how))
    return result, np.load(folder / "out/kept.npy").tolist()


def reasons(folder: Path) -> dict[str, tuple[str, str, str]]:
    with (folder / "out/dropped.csv").open() as file:
        return {row["path"]: (row["reason"], row["beside"], row["cosine"]) for row in csv.DictReader(file)}


def saved(folder: Path, name: str, features: np.ndarray) -> str:
    np.save(folder / name, features)
    return str(folder / name)


class TestSteps:
    def test_of_each_component_the_first_is_kept(self, tmp_path: Path) -> None:
        d = directions(8)
        # 1 is near 0, 2 near 1 but not 0: one chain. 3 and 4 are just not near enough, 5 is alone.
        near = at(0.7, d[0], d[1])
        chain = at(0.7, near, d[2])
        features = np.stack([d[0], near, chain, d[3], at(0.58, d[3], d[4]), d[5]])
        result, kept = curate(tmp_path, 3 * features)
        assert kept == [0, 3, 4, 5] and result.kept == 4 and result.images == 6 and result.list is None
        assert reasons(tmp_path) == {"row 1": ("near-duplicate", "row 0", "0.7000"),
                                     "row 2": ("near-duplicate", "row 0", f"{chain @ d[0]:.4f}")}  # fmt: skip
        assert curate(tmp_path, 3 * features, duplicates=0.5)[1] == [0, 3, 5]
        assert curate(tmp_path, 3 * features, duplicates=0.75)[1] == [0, 1, 2, 3, 4, 5]
        report = json.loads((tmp_path / "out/report.json").read_text())
        assert {each["threshold"]: each["largest"] for each in report["thresholds"]}[0.6] == 3
        assert report["fates"]["kept"] == 6 and sum(report["histogram"]["counts"]) == 6

    def test_every_component_that_an_evaluation_set_touches_is_dropped(self, tmp_path: Path) -> None:
        d = directions(8)
        reference = np.stack([d[0], d[7]])
        features = np.stack([at(0.5, d[0], d[1]), at(0.5, d[1], d[2]), at(0.4, d[0], d[3]), d[4], at(0.8, d[4], d[5])])
        features[1] = at(0.55, features[0], d[2])  # linked to the first, and itself not near
        how = {"against": (saved(tmp_path, "ref.npy", reference),)}
        _, kept = curate(tmp_path, features, **how, keep_duplicates=True)
        assert kept == [2, 3, 4]
        found = reasons(tmp_path)
        assert found["row 0"] == ("near an evaluation set", "row 0", "0.5000")
        assert found["row 1"][0] == "near an evaluation set" and float(found["row 1"][2]) < 0.45
        assert curate(tmp_path, features, **how)[1] == [2, 3]  # near-duplicates as well
        assert curate(tmp_path, features, **how, against_threshold=0.35)[1] == [3]

    def test_the_nearest_of_each_image_of_a_set_are_kept(self, tmp_path: Path) -> None:
        d = directions(12)
        features = np.stack([at(c, d[0], d[i + 2]) for i, c in enumerate((0.3, 0.5, 0.2, 0.4))] + [d[1], d[11]])
        like = (saved(tmp_path, "like.npy", d[:2]),)
        how = {"like": like, "retrieval": "neighbours", "keep_duplicates": True}
        assert curate(tmp_path, features, **how, per_query=1)[1] == [1, 4]
        result, kept = curate(tmp_path, features, **how, per_query=3)
        assert {1, 3, 0, 4} <= set(kept) and len(kept) <= 6
        assert result.steps[-1]["said"][like[0]]["way"] == "neighbours"

    def test_clusters_that_hold_several_of_a_set_are_kept(self, tmp_path: Path) -> None:
        d, rng = directions(4), np.random.default_rng(0)
        features = np.repeat(d, 20, 0) + 0.05 * rng.normal(size=(80, DIM)).astype(np.float32)
        like = np.repeat(d[[1, 3, 0]], [4, 5, 3], 0)  # of the first kind only three: not more than `hits`
        how = {"like": (saved(tmp_path, "like.npy", like),), "keep_duplicates": True, "pool_clusters": 4}
        assert curate(tmp_path, features, **how)[1] == [*range(20, 40), *range(60, 80)]
        _, kept = curate(tmp_path, features, **how, per_cluster=5, hits=2)
        assert np.bincount(np.array(kept) // 20, minlength=4).tolist() == [5, 5, 0, 5]
        assert len(curate(tmp_path, features, **how, at_most=7)[1]) == 7

    def test_a_sample_is_even_over_clusters(self, tmp_path: Path) -> None:
        d, rng = directions(4), np.random.default_rng(0)
        of = np.repeat(np.arange(4), [100, 10, 10, 3])
        features = d[of] + 0.03 * rng.normal(size=(123, DIM)).astype(np.float32)
        result, kept = curate(tmp_path, features, sample=23, clusters=(4,), keep_duplicates=True)
        assert sorted(np.bincount(of[kept]).tolist()) == [3, 6, 7, 7]
        assert curate(tmp_path, features, sample=23, clusters=(4,), keep_duplicates=True)[1] == kept
        assert curate(tmp_path, features, sample=23, clusters=(4,), keep_duplicates=True, seed=1)[1] != kept
        result, kept = curate(tmp_path, features, sample=200, keep_duplicates=True)
        assert len(kept) == 123 and "there are 123 images; all are kept" in result.warnings[0]

    def test_a_threshold_that_would_drop_nearly_all_is_called_too_low(self, tmp_path: Path) -> None:
        d, rng = directions(2), np.random.default_rng(0)
        features = d[0] + 0.08 * rng.normal(size=(100, DIM)).astype(np.float32)  # all of them like DINOv2's
        features[1::2] = features[::2] + 0.002 * rng.normal(size=(50, DIM)).astype(np.float32)
        result, kept = curate(tmp_path, features)
        assert len(kept) == 1
        found = re.search(r"--duplicates 0.6 is too low .* 100 of 100 .* --duplicates ([\d.]+);", result.warnings[0])
        assert found
        result, kept = curate(tmp_path, features, duplicates=float(found[1]))
        assert kept == [*range(0, 100, 2)] and not result.warnings

    def test_features_that_are_none_are_dropped_as_unreadable(self, tmp_path: Path) -> None:
        features = directions(6)
        features[2] = np.nan
        _, kept = curate(tmp_path, features)
        assert kept == [0, 1, 3, 4, 5] and reasons(tmp_path)["row 2"][0] == "unreadable"
        assert curate(tmp_path, directions(1))[1] == [0]

    def test_nothing_left_is_an_error(self, tmp_path: Path) -> None:
        features = directions(2)
        with pytest.raises(DataError, match="near evaluation sets: none of 2 images is left"):
            curate(tmp_path, features, against=(saved(tmp_path, "ref.npy", features),))


class TestProbing:
    def test_all_cells_give_what_a_search_of_all_gives(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(graph, "BLOCK", 50)
        rng = np.random.default_rng(0)
        features = (directions(10)[rng.integers(0, 10, 300)] + 0.15 * rng.normal(size=(300, DIM))).astype(np.float32)
        how = {"duplicates": 0.8, "neighbours": 5}
        _, exact = curate(tmp_path, features, **how)
        result, all_cells = curate(tmp_path, features, **how, probes=1000)
        assert all_cells == exact and 10 < len(exact) < 290
        assert result.steps[1]["said"]["recall"] == 1
        few = curate(tmp_path, features, **how, probes=1)[0].steps[1]["said"]["recall"]
        more = curate(tmp_path, features, **how, probes=12)[0].steps[1]["said"]["recall"]
        assert 0.1 < few < more <= 1


def _share(folder: str) -> list[int]:
    place = Path(folder)
    run(CurateRequest(output=place / "two", data=(str(place / "f.npy"),), device="cpu", duplicates=0.8, sample=40,
                      clusters=(10,), against=(str(place / "ref.npy"),)))  # fmt: skip
    return [file.stat().st_mtime_ns for file in sorted((place / "two" / "work" / "neighbours").glob("block*"))]


@pytest.mark.long
def test_processes_share_the_work(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    features = (directions(10)[rng.integers(0, 10, 200)] + 0.15 * rng.normal(size=(200, DIM))).astype(np.float32)
    saved(tmp_path, "ref.npy", directions(1))
    how: dict[str, Any] = {"duplicates": 0.8, "sample": 40, "clusters": (10,)}
    _, alone = curate(tmp_path, features, **how, against=(str(tmp_path / "ref.npy"),))
    run_in_processes(2, _share, str(tmp_path))
    assert np.load(tmp_path / "two/kept.npy").tolist() == alone


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, of which three have a smaller copy each under a name that comes first; weights."""
    folder = tmp_path_factory.mktemp("curate")
    write_images(folder / "photos", classes=3, per_class=4)
    for number in range(3):
        file = folder / f"photos/class{number}/2.png"
        with Image.open(file) as image:
            image.resize((36, 36)).save(file.with_name("0-copy.png"))
    write_weights(folder)
    return folder


def dino2(place: Path, *words: str, code: int = 0) -> Any:
    data = () if any(word == "--data" for word in words) else ("--data", "photos")
    done = ready.dino2("curate", *words, *data, "--json", "--num-workers", "0", "--device", "cpu", cwd=place)
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout) if code == 0 else done.stderr


WITH_MODEL = ("--model", "weights.pth", "--duplicates", "0.9988")
"""A threshold that links the copies to what they are of, by these random weights."""


class TestImages:
    def test_a_folder_becomes_a_list_that_trains(self, place: Path) -> None:
        found = dino2(place, "out", *WITH_MODEL)
        dataset = make_dataset(f"list:{place / found['list']}")
        names = [str(Path(dataset.path(i)).relative_to(place / "photos")) for i in range(len(dataset))]
        dropped = reasons(place)
        # The larger picture stays, though the copy's name comes first.
        assert {f"photos/class{i}/0-copy.png" for i in range(3)} <= {*dropped}
        assert {f"class{i}/2.png" for i in range(3)} <= {*names} and len(names) == found["kept"] == 15 - len(dropped)
        assert dropped["photos/class1/0-copy.png"][:2] == ("near-duplicate", "photos/class1/2.png")
        assert dataset.class_names == ("class0", "class1", "class2")
        page = (place / "out/report.html").read_text()
        assert page.count("data:image/jpeg;base64,") >= 6 and "0-copy.png" in page and 'src="http' not in page

    def test_the_same_command_goes_on_and_another_threshold_begins_where_it_matters(self, place: Path) -> None:
        dino2(place, "again", *WITH_MODEL)
        work = place / "again/work"
        files = [work / "images/features.npy", *sorted((work / "neighbours").glob("block-*"))]
        times = [file.stat().st_mtime_ns for file in files]
        first = (place / "again/list.txt").read_text()
        dino2(place, "again", *WITH_MODEL)
        assert (place / "again/list.txt").read_text() == first
        assert dino2(place, "again", *WITH_MODEL[:2], "--duplicates", "1")["kept"] == 15
        assert [file.stat().st_mtime_ns for file in files] == times
        # Half of the features and a block of neighbours are lost, as by a kill: they alone are made again.
        stage = json.loads((work / "images/stage.json").read_text())
        (work / "images/stage.json").write_text(json.dumps({**stage, "said": None}))
        state = np.load(work / "images/state.npy", mmap_mode="r+")
        features = np.load(work / "images/features.npy", mmap_mode="r+")
        before = features.copy()
        state[7:] = 0
        features[7:] = 0
        features[:7] += 1  # is not computed again
        state.flush()
        features.flush()
        assert dino2(place, "again", *WITH_MODEL)
        after = np.load(work / "images/features.npy")
        assert np.array_equal(after[7:], before[7:]) and np.array_equal(after[:7], before[:7] + 1)

    def test_members_of_shards_become_rows(self, place: Path) -> None:
        (place / "shards").mkdir()
        with tarfile.open(place / "shards/0.tar", "w") as tar:
            for path in sorted((place / "photos").rglob("*.png")):
                tar.add(path, f"{path.parent.name}-{path.stem}.png")
        found = dino2(place, "of-shards", "--data", "shards", *WITH_MODEL)
        text = (place / "of-shards/list.txt").read_text().splitlines()
        assert text[0] == f"# rows of {place / 'shards'}" and len(text) == found["kept"] + 1
        dataset = make_dataset(f"list:{place / 'of-shards/list.txt'}")
        assert len(dataset) == found["kept"] and dataset.image(0).shape == (40, 40, 3)

    def test_features_files_and_indexes_give_what_images_give(self, place: Path) -> None:
        expected = dino2(place, "images-out", *WITH_MODEL)["kept"]
        data = ("--data", "photos", "--num-workers", "0")
        for name in ("f.safetensors", "f.parquet", "f.npy"):
            embedded = ready.dino2("embed", "weights.pth", *data, "--output", name, "--device", "cpu", cwd=place)
            assert embedded.returncode == 0, embedded.stderr
        built = ready.dino2("search", "build", "index", "--model", "weights.pth", *data, "--device", "cpu", cwd=place)
        assert built.returncode == 0, built.stderr
        lines = (place / "images-out/list.txt").read_text()
        paths = [line.partition("\t")[0] for line in lines.splitlines()]
        for name, more in (("f.safetensors", ()), ("f.parquet", ()), ("f.npy", ("--images", "photos")), ("index", ())):
            found = dino2(place, f"of-{name}", "--data", name, *more, *WITH_MODEL[2:])
            assert found["kept"] == expected, name
            listed = (place / f"of-{name}/list.txt").read_text()
            assert [line.partition("\t")[0] for line in listed.splitlines()] == paths
        # The same model's features go together, another's do not.
        torch.manual_seed(3)
        write_tensors({"cls": torch.randn(4, 24)}, place / "other.safetensors", {"dino2.weights": "0123"})
        said = dino2(place, "mixed", "--data", "f.safetensors", "--against", "other.safetensors", code=2)
        assert "--against other.safetensors: its features are of another model" in said

    def test_what_cannot_be_read_is_left_out_within_bounds(self, place: Path, tmp_path: Path) -> None:
        shutil.copytree(place / "photos", tmp_path / "photos")
        (tmp_path / "photos/class0/1.png").write_bytes(b"no picture")
        shutil.copy(place / "weights.pth", tmp_path)
        shutil.copy(place / "config.yaml", tmp_path)
        assert "1 of 15 images are unreadable" in dino2(tmp_path, "out", *WITH_MODEL, code=2)
        found = dino2(tmp_path, "out", *WITH_MODEL, "--max-bad-fraction", "0.1")
        assert found["steps"][0]["after"] == 14 and reasons(tmp_path)["photos/class0/1.png"][0] == "unreadable"
        (tmp_path / "photos/class0/1.png").unlink()  # the images have changed: features are made again
        assert dino2(tmp_path, "out", *WITH_MODEL)["images"] == 14

    @pytest.mark.long
    def test_two_commands_in_processes(self, place: Path) -> None:
        one = dino2(place, "one", *WITH_MODEL, "--sample", "8")
        dino2_of_two = ready.dino2("curate", "two", "--data", "photos", *WITH_MODEL, "--sample", "8", "--gpus", "2",
                                   "--device", "cpu", "--num-workers", "0", cwd=place)  # fmt: skip
        assert dino2_of_two.returncode == 0, dino2_of_two.stderr
        assert one["kept"] == 8 and "8 of 15 images kept" in dino2_of_two.stdout
        assert (place / "one/list.txt").read_text() == (place / "two/list.txt").read_text()

    def test_a_dry_run_prints_what_it_would_take(self, place: Path) -> None:
        plan = dino2(place, "nowhere", *WITH_MODEL, "--sample", "5", "--dry-run")
        assert plan["images"].startswith("folder photos: 15 images") and not (place / "nowhere").exists()
        assert {"features", "neighbours", "duplicates", "sample", "memory", "disk"} <= plan.keys()


def test_what_a_hundred_million_images_take_is_said() -> None:
    found = need(100_000_000, 1024, 64, usual_probes(100_000_000))
    assert found.features_disk == 204_800_000_000 and found.search_disk == 38_400_000_000
    assert need(100_000_000, 1024, 64, probes=0).search == pytest.approx(2e19, rel=0.03)
    assert found.search < 3e16 and found.memory < 12 * 2**30


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"data": ("photos",)}, r"photos: images, and no model(.|\n)*Give --model CKPT"),
        ({"data": ("nowhere",)}, "'nowhere' is neither a folder nor a known dataset"),
        ({"data": ("f.npy",), "against": ("photos",)}, "--against photos: images, and no model"),
        ({"data": ("f.npy",), "images": "photos"}, "--images photos: 15 images, and f.npy has features of 4"),
        ({"data": ("photos",), "model": "weights.pth", "images": "photos"}, "--images photos goes with features"),
        ({"data": ("weights.safetensors",)}, "weights.safetensors holds no features"),
        ({"data": ("wrong.npy",)}, r"wrong\.npy: int64 \[3\]; features are float16 or float32"),
        ({"data": ("cut.npy",)}, r"cut\.npy: not a file of features"),
        ({"data": ("f.npy",), "model": "nowhere.pth"}, "nowhere"),
    ],
)
def test_mistakes_are_named(how: dict[str, Any], message: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    np.save("f.npy", np.eye(4, dtype=np.float32))
    np.save("wrong.npy", np.arange(3))
    Path("cut.npy").write_bytes(Path("f.npy").read_bytes()[:50])
    write_tensors({"weight": torch.zeros(2)}, Path("weights.safetensors"))
    with pytest.raises(Dino2Error, match=message):
        look(CurateRequest(output=Path("out"), **how))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--keep-duplicates",), "--keep-duplicates leaves nothing to do"),
        (("--keep-duplicates", "--sample", "3", "--duplicates", "0.9"), "--duplicates and --keep-duplicates exclude"),
        (("--hits", "2"), "--hits goes with --like"),
        (("--against-threshold", "0.2"), "--against-threshold goes with --against"),
        (("--clusters", "5"), "--clusters goes with --sample"),
        (("--sample", "9", "--clusters", "5", "5"), "--clusters 5 5: each level has fewer"),
        (("--duplicates", "1.5"), "--duplicates 1.5: must be"),
    ],
)
def test_options_that_do_not_go_together(words: tuple[str, ...], message: str, place: Path) -> None:
    assert message in dino2(place, "out-wrong", *words, code=2)
    assert not (place / "out-wrong").exists()


def test_nothing_is_put_among_other_things_and_a_failure_leaves_no_folder(place: Path) -> None:
    said = dino2(place, "photos", "--data", "photos", "--model", "weights.pth", code=2)
    assert "OUT photos: a folder of other things, such as " in said and not (place / "photos/list.txt").exists()
    (place / "page.pth").write_text("<!DOCTYPE html>")
    assert "an HTML page" in dino2(place, "out-new", "--data", "photos", "--model", "page.pth", code=2)
    assert not (place / "out-new").exists()


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    with lock(tmp_path / "out/.work"), pytest.raises(EnvironmentProblem, match="another curation is writing there"):
        curate(tmp_path, directions(3))


def test_images_that_are_none_of_the_features_are_refused(place: Path, tmp_path: Path) -> None:
    paths = [str(path) for path in sorted((place / "photos").rglob("*.png"))]
    lists = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(15 * 4, np.float32)), 4)
    pq.write_table(pa.table({"cls": lists, "path": [*paths[1:], paths[0]]}), tmp_path / "f.parquet")
    with pytest.raises(DataError, match=r"image 0 is .* and in .* it was"):
        collection.Stored(tmp_path / "f.parquet", str(place / "photos"))
