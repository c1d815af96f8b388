"""Retrieval: the benchmark's own numbers, and mAP and recall by counting."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import write_images, write_weights

from dinov2cli.cli.main import main
from dinov2cli.data.datasets.revisited import Truth, read_revisited
from dinov2cli.data.transforms import WholeTransform
from dinov2cli.errors import DataError
from dinov2cli.eval.features import Features
from dinov2cli.eval.retrieval import SETUPS, rank_classes, rank_revisited
from dinov2cli.requests.retrieval import RetrievalRequest

GOLDEN = Path(__file__).parent / "golden" / "retrieval_map.npz"


@pytest.mark.parametrize("setup", SETUPS)
def test_measures_of_revisited_are_those_of_its_own_code(setup: str) -> None:
    golden = np.load(GOLDEN)
    similarity = torch.from_numpy(golden["sim"].T)
    truths = [Truth(*(golden[f"query{q}/{grade}"] for grade in ("easy", "hard", "junk"))) for q in range(6)]
    ranked = rank_revisited(similarity, truths, setup, (1, 5, 10))
    np.testing.assert_allclose(ranked.average_precision, golden[f"{setup}/ap_per_query"], atol=1e-6)
    np.testing.assert_allclose(ranked.average_precision.nanmean(), golden[f"{setup}/map"], atol=1e-6)
    measured = golden[f"{setup}/mean_precision_at_1_5_10"]
    np.testing.assert_allclose(ranked.precision.nanmean(0), measured, atol=1e-6)


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_map_and_recall_of_classes_are_what_counting_gives(leave_one_out: bool) -> None:
    rng = np.random.default_rng(0)
    targets = torch.from_numpy(rng.integers(0, 5, 40))
    targets[7] = 5  # the only one of its class
    train = Features(
        {"cls": torch.from_numpy(rng.normal(size=(40, 6)).astype(np.float32))}, targets, torch.arange(40), 40
    )
    val = train
    if not leave_one_out:
        val = Features(
            {"cls": torch.from_numpy(rng.normal(size=(9, 6)).astype(np.float32))}, targets[:9], torch.arange(9), 9
        )
    ranked = rank_classes(train, val, (1, 3), leave_one_out=leave_one_out)
    unit = [each.cls / each.cls.norm(dim=1, keepdim=True) for each in (train, val)]
    for query in range(val.size):
        cosines = (unit[0].double() @ unit[1][query].double()).tolist()
        others = [i for i in range(40) if not (leave_one_out and i == query)]
        order = sorted(others, key=lambda i: -cosines[i])
        hits = [int(targets[i]) == int(val.targets[query]) for i in order]
        total = 0.0
        for rank, hit in enumerate(hits):
            if hit:
                before = sum(hits[:rank]) / rank if rank else 1.0
                total += (before + sum(hits[: rank + 1]) / (rank + 1)) / 2
        expected = total / sum(hits) if any(hits) else float("nan")
        assert float(ranked.average_precision[query]) == pytest.approx(expected, abs=1e-9, nan_ok=True)
        recalls = [float(any(hits[:k])) if any(hits) else float("nan") for k in (1, 3)]
        assert ranked.recall[query].tolist() == pytest.approx(recalls, nan_ok=True)
    assert ranked.average_precision.isnan().any() == leave_one_out


def revisited(folder: Path, **changed: Any) -> Path:
    """Six images, of which two are queries, too."""
    (folder / "jpg").mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = [f"all_souls_{i:06d}" for i in range(6)]
    for name in names:
        Image.fromarray(rng.integers(0, 256, (30, 50, 3), np.uint8)).save(folder / "jpg" / f"{name}.jpg")
    truths = [{"bbx": [5, 2.4, 25, 22], "easy": [q, 3], "hard": np.array([4]), "junk": [5]} for q in range(2)]
    content = {"imlist": names, "qimlist": names[:2], "gnd": truths, **changed}
    (folder / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(content, 2))
    return folder


def dino2(*words: str | Path) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    return int(stop.value.code or 0)


def test_a_folder_of_revisited_is_measured_and_stands_among_the_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DINO2_CACHE", str(tmp_path / "cache"))
    benchmark, weights = revisited(tmp_path / "roxford5k"), write_weights(tmp_path)
    words = ("eval", "retrieval", weights, "--output-dir", tmp_path / "out", "--num-workers", "0", "--device", "cpu")
    assert dino2(*words, "--val-dataset", benchmark, "--whole", "--json") == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["name"], row["images"]) for row in rows] == [("easy", 2), ("medium", 2), ("hard", 2)]
    assert rows[0]["scores"]["mP@1 %"] == 100  # a query finds itself first
    boxes = read_revisited(benchmark, boxes=True).queries.image(0)
    np.testing.assert_array_equal(boxes, read_revisited(benchmark).queries.image(0)[2:22, 5:25])
    photos = write_images(tmp_path / "photos", per_class=6)
    assert dino2(*words, "--train-dataset", photos, "--val-dataset", photos, "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["images"] == 12 and list(row["scores"]) == ["mAP %", "R@1 %", "R@5 %", "R@10 %"]
    assert row["scores"]["mAP %"] > 70  # the two classes are plain to see
    assert dino2("results", tmp_path / "out") == 0
    shown = capsys.readouterr().out
    assert "R@10 %" in shown and "mP@5 %" in shown and "leave-one-out" in shown


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"gnd": os.system}, "could run code; refused"),
        ({"qimlist": ["a"]}, "2 truths of 1 queries"),
        ({"imlist": ["all_souls_000000"]}, "names image 5 of a database of 1"),
        ({"qimlist": ["a", "b"]}, "a.jpg is missing, one of 2"),
        ({"imlist": None}, "no ground truth"),
    ],
)
def test_what_is_wrong_with_a_ground_truth_is_said(content: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read_revisited(revisited(tmp_path / "benchmark", **content))


def test_whole_images_keep_their_shape_on_black() -> None:
    image = np.full((20, 80, 3), 255, np.uint8)
    fitted = WholeTransform(32, 32)(image)
    assert fitted.shape == (3, 32, 32)
    bright = (fitted[0] > 2).float()
    assert bright.sum() == 8 * 32 and bright[12:20].all()


def test_train_is_not_asked_for_where_val_is_a_benchmark(tmp_path: Path) -> None:
    folder = revisited(tmp_path / "rparis6k")
    assert not RetrievalRequest(checkpoint="x", val_dataset=str(folder)).trains
    assert RetrievalRequest(checkpoint="x", val_dataset=str(tmp_path)).trains
