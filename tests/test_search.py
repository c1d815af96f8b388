"""`dino2 search`: an index holds what `dino2 embed` gives, whatever was added, removed or cut short meanwhile."""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import write_images, write_weights

from dinov2cli.cli.main import main
from dinov2cli.requests.base import run
from dinov2cli.requests.eval import EmbedRequest
from dinov2cli.requests.search import SearchAddRequest, SearchBuildRequest, SearchQueryRequest, SearchRemoveRequest
from dinov2cli.search.adding import Changed
from dinov2cli.search.index import Index, locked
from dinov2cli.search.neighbours import KINDS, Approximation, neighbours

HERE: dict[str, Any] = {"num_workers": 0, "device": "cpu"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with weights, photos, and an index of these."""
    folder = tmp_path_factory.mktemp("search")
    write_images(folder / "photos", per_class=6)
    write_weights(folder)
    build(folder)
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it; a path in an index is one in the first, so it is moved there."""
    shutil.copytree(made, tmp_path / "here")
    shutil.rmtree(tmp_path / "here" / "photos.index")
    monkeypatch.setenv("DINO2_CACHE", str(tmp_path / "cache"))
    build(tmp_path / "here")
    return tmp_path / "here"


def build(folder: Path, **more: Any) -> Changed:
    request = {
        "index": folder / "photos.index",
        "model": str(folder / "weights.pth"),
        "data": (str(folder / "photos"),),
    }
    done = run(SearchBuildRequest(**{**request, **HERE, **more}))
    assert isinstance(done, Changed)
    return done


def add(folder: Path, *data: Path | str, **more: Any) -> Changed:
    done = run(SearchAddRequest(index=folder / "photos.index", data=tuple(map(str, data)), **HERE, **more))
    assert isinstance(done, Changed)
    return done


def query(folder: Path, *words: Path, **more: Any) -> list[list[tuple[str, float]]]:
    request = SearchQueryRequest(index=folder / "photos.index", query=tuple(map(str, words)), **HERE, **more)
    return [[(each["path"], each["score"]) for each in one["results"]] for one in run(request).as_dict()["queries"]]


def dino2(*words: str | Path) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    return int(stop.value.code or 0)


def embedded(folder: Path, data: Path) -> dict[str, np.ndarray]:
    """Class tokens by path, of `dino2 embed`."""
    from dinov2cli.data.datasets import make_dataset

    output = folder / "features.npy"
    request = EmbedRequest(
        checkpoint=str(folder / "weights.pth"), data=(str(data),), output=output, overwrite=True, **HERE
    )
    run(request)
    return {make_dataset(str(data)).path(i): row for i, row in enumerate(np.load(output))}


def stored(folder: Path) -> dict[str, np.ndarray]:
    """Features by path, of all images that an index finds."""
    index = Index.open(folder / "photos.index")
    return {index.path(row): np.array(index.features[row]) for row in np.flatnonzero(index.alive).tolist()}


def assert_same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    assert all(np.abs(found[path] - wanted[path]).max() < 2e-3 for path in wanted)


def test_an_index_holds_what_embed_gives_and_finds_by_cosine(here: Path) -> None:
    features = embedded(here, here / "photos")
    assert_same(stored(here), features)
    assert {each.dtype.name for each in stored(here).values()} == {"float16"}
    names = list(features)
    rows = np.stack([features[name] for name in names]).astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    for results, name, cosines in zip(query(here, here / "photos", top=5), names, rows @ rows.T, strict=True):
        assert results[0][0] == name and results[0][1] == pytest.approx(1, abs=1e-4)
        assert [score for _, score in results] == pytest.approx(np.sort(cosines)[::-1][:5].tolist(), abs=1e-3)
    one = query(here, here / "photos/class0/3.png", top=3, not_itself=True)[0]
    assert [path for path, _ in one] == [path for path, _ in query(here, here / "photos/class0/3.png", top=4)[0][1:]]
    by_index = query(here, here / "photos.index", top=5)
    assert [[path for path, _ in each] for each in by_index] == [
        [path for path, _ in each] for each in query(here, here / "photos", top=5)
    ]


def test_additions_see_what_is_new_and_what_has_changed(here: Path) -> None:
    photos = here / "photos"
    assert add(here, photos)[1:] == (12, 0, 0, 12, 0, 0, 0)
    write_images(here / "more", classes=1, per_class=3)
    Image.fromarray(np.full((40, 40, 3), 200, np.uint8)).save(photos / "class0/2.png")
    os.utime(photos / "class0/2.png", ns=(1, 1))
    (photos / "class1/5.png").unlink()
    shutil.copy(photos / "class0/0.png", photos / "class0/copy.png")  # duplicates are images, as in embed
    done = add(here, photos, here / "more", photos / "class0/1.png", photos / "class0/1.png")
    assert done == Changed(str(here / "photos.index"), 16, added=4, replaced=1, there=12, gone=1)
    expected = embedded(here, photos) | embedded(here, here / "more")
    found = stored(here)
    assert found.pop(str(photos / "class1/5.png")) is not None
    assert_same(found, expected)
    again = run(SearchRemoveRequest(index=here / "photos.index", missing=True))
    assert (again.removed, again.images) == (1, 15)
    assert_same(stored(here), expected)


@pytest.mark.parametrize(
    ("which", "left"),
    [("photos/class0", 6), ("photos/class1/3.png", 11), ("*/class?/[01].png", 8), ("photos", 0), ("photos/cl*1/*", 6)],
)
def test_what_is_removed_is_not_found_and_the_rest_is_as_it_was(
    here: Path, which: str, left: int, monkeypatch: Any
) -> None:
    monkeypatch.chdir(here)
    before = stored(here)
    assert run(SearchRemoveRequest(index=here / "photos.index", which=(which,))).images == left
    after = stored(here)
    assert len(after) == left and all(np.array_equal(after[path], before[path]) for path in after)
    index = Index.open(here / "photos.index")
    compact = left < 9  # more than a quarter had gone
    assert index.contents.data == ("data-2" if compact else "data-1") and len(index.features) == (
        left if compact else 12
    )
    if left:
        assert {path for path, _ in query(here, here / "photos/class0/0.png", top=99)[0]} == set(after)
    assert add(here, "photos").added == 12 - left
    assert_same(stored(here), before)


def test_a_change_cut_short_at_any_moment_leaves_the_index_before_or_after_it(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, before = here / "photos.index", stored(here)
    shutil.copytree(folder, here / "kept")
    more = {f"more/{n}": np.full(24, n, np.float16) for n in range(5)}

    def change() -> None:
        """Five images more in place of three, which are dropped."""
        with locked(folder):
            index = Index.open(folder)
            images = np.repeat(np.array(index.images[:1]), 5)
            index.with_images(np.stack(list(more.values())), images, list(more), [0, 1, 2])

    def compact() -> None:
        with locked(folder):
            Index.open(folder).compacted()

    changed = {path: row for path, row in before.items() if "class0" not in path or path[-5] > "2"} | more
    for act, wanted in ((change, changed), (compact, changed)):
        ends = set()
        start = stored(here)
        for moment in range(100):
            with monkeypatch.context() as cut, contextlib.suppress(PowerLoss):
                left = cut_after(moment, cut)
                act()
            found = stored(here)
            if found.keys() != wanted.keys():
                assert_same(found, start)
                ends.add("before")
                act()
            assert_same(stored(here), wanted)
            assert len(list(folder.glob("data-*"))) == 1 or left() == 0
            if left() > 0:
                break
            if act is change:
                shutil.rmtree(folder)
                shutil.copytree(here / "kept", folder)
        assert moment > 5 and (ends or act is compact)
    assert query(here, here / "photos/class0/4.png")[0][0][0] == str(here / "photos/class0/4.png")


def test_an_addition_that_was_interrupted_goes_on(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(here / "more", classes=2, per_class=2)
    with monkeypatch.context() as cut, pytest.raises(PowerLoss):
        cut_after(3, cut)
        add(here, here / "more")
    assert add(here, here / "more").added == 4
    assert_same(stored(here), embedded(here, here / "photos") | embedded(here, here / "more"))


class PowerLoss(BaseException):
    """Nothing after it is done."""


def cut_after(count: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let `count` calls that reach the disk be made, and no more."""
    left = [count]

    def counted(call: Any) -> Any:
        def maybe(*words: Any, **named: Any) -> Any:
            if left[0] <= 0:
                raise PowerLoss
            left[0] -= 1
            return call(*words, **named)

        return maybe

    for name in ("fsync", "replace", "unlink"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    return lambda: left[0]


def test_unreadable_images_are_counted_and_looked_at_again_when_they_have_changed(here: Path) -> None:
    bad = here / "photos/class0/bad.png"
    bad.write_bytes((here / "photos/class0/0.png").read_bytes()[:60])
    add_bad = ("search", "add", here / "photos.index", "--data", here / "photos", "--num-workers", "0")
    assert dino2(*add_bad) == 2  # 1 of 13 are more than 1 %
    assert add(here, here / "photos", max_bad_fraction=0.1)[1:] == (12, 0, 0, 12, 1, 0, 0)
    assert str(bad) not in stored(here)
    shutil.copy(here / "photos/class0/0.png", bad)
    assert add(here, here / "photos").added == 1 and str(bad) in stored(here)


def test_two_do_not_write_at_once(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with locked(here / "photos.index"):
        assert dino2("search", "add", here / "photos.index", "--data", here / "photos") == 2
        assert "is being changed by another process" in capsys.readouterr().err
        assert len(query(here, here / "photos/class0/0.png")[0]) == 10  # it can be searched meanwhile


def test_other_weights_and_other_preparation_are_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index, photo = here / "photos.index", here / "photos/class0/0.png"
    shutil.copy(here / "weights.pth", here / "its own.pth")
    state = torch.load(here / "weights.pth")
    state["cls_token"] += 1
    torch.save(state, here / "weights.pth")
    other = ("--model", here / "weights.pth", "--data", here / "photos")
    for words in (("query", index, photo), ("add", index, "--data", photo), ("build", index, *other)):
        assert dino2("search", *words) == 2
        assert "are of other weights" in capsys.readouterr().err.replace("\n", " ")
    assert len(query(here, photo, model=str(here / "its own.pth"))[0]) == 10
    shutil.copy(here / "its own.pth", here / "weights.pth")
    assert dino2("search", "build", index, *other, "--image-size", "16") == 2
    assert "prepared in another way" in capsys.readouterr().err.replace("\n", " ")
    (here / "weights.pth").unlink()
    assert dino2("search", "query", index, photo) == 2
    assert "Say where they are: --model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda index: (index / "data-1/features.npy").write_bytes(b"x"), "features.npy cannot be read"),
        (lambda index: os.truncate(index / "data-1/images.npy", 300), "images.npy cannot be read"),
        (lambda index: (index / "data-1/paths").unlink(), "paths is gone"),
        (lambda index: os.truncate(index / "data-1/paths", 9), "does not hold what index.json says"),
        (lambda index: (index / "index.json").write_text("{"), "index.json cannot be read"),
        (lambda index: (index / "index.json").write_text('{"about": 3}'), "index.json cannot be read"),
        (lambda index: (index / "index.json").unlink(), "is no index: it has no index.json"),
    ],
)
def test_a_damaged_index_is_refused_in_one_message(
    here: Path, damage: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(here / "photos.index")
    assert dino2("search", "info", here / "photos.index") == 2
    shown = capsys.readouterr().err.replace("\n", " ")
    assert message in shown and "Traceback" not in shown


def test_sheets_show_every_query_and_what_was_found(here: Path) -> None:
    (here / "odd <b>").mkdir()
    odd = here / "odd <b>/& name.png"
    shutil.copy(here / "photos/class1/0.png", odd)
    add(here, odd)
    (here / "photos/class1/1.png").unlink()  # shown as one that cannot be read
    queries = [odd, here / "photos/class0/0.png"]
    query(here, *queries, top=12, sheet=here / "sheet.html")
    text = (here / "sheet.html").read_text()
    assert len(re.findall("<figure>", text)) == 2 * 13 and text.count("cannot be read") >= 2
    assert len(re.findall('src="data:image/jpeg;base64,', text)) == 2 * 13 - text.count('"none">')
    assert "http" not in text and "odd &lt;b&gt;/&amp; name.png" in text and "<b>/&" not in text
    query(here, *queries, top=12, sheet=here / "sheet.png")
    sheet = np.asarray(Image.open(here / "sheet.png"))
    photo = np.asarray(Image.open(odd).resize((160, 160), Image.Resampling.BICUBIC), np.float32)
    assert np.abs(sheet[16:176, 16:176] - photo).mean() < 2  # the first query, in its corner
    assert np.abs(sheet[16:176, 200:360] - photo).mean() < 2  # and what it finds first: itself
    assert dino2("search", "query", here / "photos.index", odd, "--sheet", here / "sheet.pdf") == 2


def test_results_and_facts_as_json(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = here / "photos/class0/0.png"
    assert dino2("search", "query", here / "photos.index", photo, "--top", "2", "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)["queries"]
    assert found["query"] == str(photo) and found["results"][0] == {
        "path": str(photo),
        "score": pytest.approx(1, abs=1e-4),
    }
    assert dino2("search", "info", here / "photos.index", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["images"], facts["dim"], facts["sources"]) == (12, 24, {str(here / "photos"): 12})
    assert dino2("search", "remove", here / "photos.index", "elsewhere") == 2
    assert "has no image elsewhere" in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_faiss_finds_nearly_all_scores_as_the_exact_search_does_and_keeps_up(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(20, 16))
    rows = (centres[rng.integers(0, 20, 3000)] + 0.5 * rng.normal(size=(3000, 16))).astype(np.float16)
    alive = rng.random(3000) > 0.2
    file = tmp_path / "faiss.index"
    Approximation(rows[:2500], kind, file)
    approximation = Approximation(rows, kind, file)
    assert approximation.faiss_index.ntotal == 3000
    queries, own = rows[:100], np.arange(100)
    exact = neighbours(rows, queries, 10, alive=alive, exclude=own)
    found = approximation.search(queries, 10, nprobe=16, ef_search=200, alive=alive, exclude=own)
    hits = [len(set(a) & set(b)) for a, b in zip(found.rows.tolist(), exact.rows.tolist(), strict=True)]
    assert sum(hits) >= 0.97 * 1000
    assert alive[found.rows].all() and not (found.rows == own[:, None]).any()
    same = found.rows == exact.rows
    np.testing.assert_allclose(found.scores[same], exact.scores[same], atol=1e-5)
    file.write_bytes(b"damaged")
    assert Approximation(rows, kind, file).faiss_index.ntotal == 3000


def test_faiss_of_an_index_knows_additions_and_removals(here: Path) -> None:
    pytest.importorskip("faiss")
    photo = here / "photos/class0/0.png"
    assert paths_found(here, photo, faiss="hnsw") == paths_found(here, photo)
    shutil.copy(photo, here / "new.png")
    add(here, here / "new.png")
    run(SearchRemoveRequest(index=here / "photos.index", which=(str(photo),)))
    found = paths_found(here, photo, faiss="hnsw")
    assert found == paths_found(here, photo) and found[0] == str(here / "new.png")


def paths_found(folder: Path, photo: Path, **more: Any) -> list[str]:
    return [path for path, _ in query(folder, photo, top=4, **more)[0]]
