"""Result files and tables, and features in files."""

import csv
import io
import json
import os
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_run import write_images

from dinov2cli.console import MetricLogger
from dinov2cli.data.datasets import make_dataset
from dinov2cli.errors import DataError, EnvironmentProblem
from dinov2cli.eval.embed import check_output, embed
from dinov2cli.eval.extract import Extractor
from dinov2cli.eval.features import FeatureCache
from dinov2cli.eval.metrics import Accuracy, wilson_interval
from dinov2cli.eval.reports import Evaluation, Row, add_result, read_results, results_blocks
from dinov2cli.eval.results import run as run_results
from dinov2cli.models.vision_transformer import VisionTransformer
from dinov2cli.requests.tools import ResultsRequest


def evaluation(iteration: int, top1: float, task: str = "knn", **settings: object) -> Evaluation:
    rows = (Row.of("full, k=10", Accuracy(top1, 99.0, 1000)),)
    return Evaluation(
        task, f"eval/training_{iteration}", iteration, "abc", "train", "val", {"T": 0.07, **settings}, rows
    )


def test_results_gather_and_replace(tmp_path: Path) -> None:
    for each in (evaluation(19, 50.0), evaluation(9, 40.0), evaluation(9, 45.0, "logreg"), evaluation(9, 41.0)):
        add_result(tmp_path, each)
    add_result(tmp_path, evaluation(9, 42.0, T=0.1))
    found = read_results(tmp_path)
    shown = [(each.iteration, each.task, each.rows[0].top1) for each in found]
    assert shown == [(9, "knn", 41.0), (9, "knn", 42.0), (9, "logreg", 45.0), (19, "knn", 50.0)]
    assert json.loads((tmp_path / "results.json").read_text())["format"] == 1


def test_unreadable_results_cost_no_evaluation(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        read_results(tmp_path)
    add_result(tmp_path, evaluation(9, 40.0))
    assert len(read_results(tmp_path)) == 1
    assert (tmp_path / "results.json.unreadable").read_text() == "{"


def test_no_results(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no evaluation has been written there"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("percent", "count", "low", "high"), [(50, 100, 40.38, 59.62), (0, 10, 0, 27.75), (81.2, 50000, 80.86, 81.54)]
)
def test_wilson_interval(percent: float, count: int, low: float, high: float) -> None:
    assert wilson_interval(percent, count) == pytest.approx((low, high), abs=0.01)


def test_embedded_features_in_a_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=5, num_heads=2).eval()
    images = make_dataset("SamplePhotos:split=VAL")
    extract = Extractor(model, num_workers=0, detailed=True, device="cpu")
    features = embed(extract, images, tmp_path / "f.safetensors")
    stored = load_file(tmp_path / "f.safetensors")
    assert torch.equal(stored["cls"], features.cls) and stored["last_cls"].shape == (300, 4, 24)
    assert stored["mean_patch"].shape == (300, 24) and torch.equal(stored["labels"], features.targets)
    joined, ends = bytes(stored["paths"].numpy()), [0, *stored["path_ends"].tolist()]
    paths = [joined[a:b].decode() for a, b in pairwise(ends)]
    assert paths == [images.path(i) for i in range(300)]
    with safe_open(tmp_path / "f.safetensors", "pt") as file:
        assert file.metadata()["dino2.weights"] == extract.weights_hash
    with pytest.raises(DataError, match=r"written as a \.safetensors or \.parquet or \.csv or \.npy file"):
        embed(extract, images, tmp_path / "f.mat")


def test_embedded_rows_keep_their_place_where_an_image_cannot_be_read(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    for i in range(6):
        (folder / "ab"[i // 3]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (40 * i, 0, 9)).save(folder / "ab"[i // 3] / f"{i}.png")
    (folder / "a" / "1.png").write_bytes(b"<html>")
    images = make_dataset(str(folder))
    torch.manual_seed(0)
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=5, num_heads=2).eval()
    extract = Extractor(model, num_workers=0, detailed=True, device="cpu", max_bad_fraction=0.2)
    part = embed(extract, images, tmp_path / "f.safetensors")
    stored = load_file(tmp_path / "f.safetensors")
    assert stored["readable"].tolist() == [True, False, True, True, True, True]
    assert stored["labels"].tolist() == [0, 0, 0, 1, 1, 1] and len(stored["path_ends"]) == 6
    for name in ("cls", "mean_patch", "last_cls"):
        assert torch.equal(stored[name][[0, 2, 3, 4, 5]], part.tensors[name]) and stored[name][1].isnan().all()
    embed(extract, images, tmp_path / "f.parquet")
    table = pq.read_table(tmp_path / "f.parquet")
    assert table["readable"].to_pylist() == stored["readable"].tolist()
    np.testing.assert_array_equal(np.stack(table["cls"].to_pylist()), stored["cls"].numpy())


def test_embedded_features_in_parquet_are_those_in_safetensors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=5, num_heads=2).eval()
    extract = Extractor(model, num_workers=0, detailed=True, device="cpu", cache=FeatureCache(tmp_path / "cache"))
    images = make_dataset("SamplePhotos:split=VAL")
    for name in ("f.safetensors", "f.parquet"):
        embed(extract, images, tmp_path / name)
    stored, table = load_file(tmp_path / "f.safetensors"), pq.read_table(tmp_path / "f.parquet")
    assert (
        set(table.column_names) == {"path", "label", "readable", "cls", "mean_patch", "last_cls"} and len(table) == 300
    )
    for name in ("cls", "mean_patch", "last_cls"):
        assert torch.equal(torch.tensor(np.stack(table[name].to_pylist()), dtype=torch.float32), stored[name])
    assert table["label"].to_pylist() == stored["labels"].tolist()
    assert table["path"].to_pylist() == [images.path(i) for i in range(300)]
    with safe_open(tmp_path / "f.safetensors", "pt") as file:
        written = {key.encode(): value.encode() for key, value in file.metadata().items()}
    assert written.items() <= table.schema.metadata.items()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "f.parquet", "f.safetensors"]


def test_class_tokens_as_csv_and_npy_and_names_that_are_not_utf_8(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2).eval()
    extract = Extractor(model, num_workers=0, detailed=True, device="cpu", cache=FeatureCache(tmp_path / "cache"))
    folder = write_images(tmp_path / "photos", per_class=2)
    os.rename(folder / "class0", os.fsencode(folder) + b"/gr\xfc\xdfe")
    os.rename(folder / "class1/1.png", os.fsencode(folder) + b"/class1/\xff.png")
    images = make_dataset(str(folder))
    cls = embed(extract, images, tmp_path / "f.npy").cls
    assert torch.equal(torch.as_tensor(np.load(tmp_path / "f.npy")), cls)
    for name in ("f.csv", "f.safetensors", "f.parquet"):
        embed(extract, images, tmp_path / name)
    with (tmp_path / "f.csv").open(newline="") as text:
        rows = list(csv.DictReader(text))
    numbers = torch.tensor([[float(row[f"cls_{i}"]) for i in range(24)] for row in rows])
    assert torch.equal(numbers, cls) and [int(row["label"]) for row in rows] == images.targets().tolist()
    names = [row["path"].removeprefix(f"{folder}/") for row in rows]
    assert set(names) == {"class1/0.png", "class1/\\xff.png", "gr\\xfc\\xdfe/0.png", "gr\\xfc\\xdfe/1.png"}
    assert pq.read_table(tmp_path / "f.parquet")["path"].to_pylist() == [row["path"] for row in rows]
    stored = load_file(tmp_path / "f.safetensors")
    joined, ends = bytes(stored["paths"].numpy()), [0, *stored["path_ends"].tolist()]
    assert [joined[a:b] for a, b in pairwise(ends)] == [os.fsencode(images.path(i)) for i in range(4)]


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)  # as if it were not installed
    with pytest.raises(EnvironmentProblem, match="Parquet files need pyarrow") as raised:
        check_output(tmp_path / "f.parquet")
    assert "dinov2cli[parquet]" in str(raised.value.hint)


def test_an_evaluation_may_measure_something_other_than_accuracy(tmp_path: Path) -> None:
    accuracy = evaluation(9, 40.0)
    dense = replace(accuracy, task="segmentation", rows=(Row("linear", images=20, scores={"mIoU %": 44.3}),))
    for each in (accuracy, dense):
        add_result(tmp_path, each)
    assert read_results(tmp_path) == sorted([accuracy, dense], key=lambda each: each.task)
    assert "scores" not in json.loads((tmp_path / "results.json").read_text())["evaluations"][0]["rows"][0]
    assert dense.rows[0].in_words() == "linear: mIoU 44.30 %"
    console = Console(width=80, file=io.StringIO())
    console.print(results_blocks([accuracy, dense]))
    shown = console.file.getvalue()
    assert "44.30" in shown and "mIoU %" in shown and "40.00" in shown


def a_run(folder: Path, top1: float, **settings: object) -> Path:
    for task, train, val in (("knn", "/data/a/train", "/data/a/val"), ("knn", "/data/b/train", "/data/b/val"),
                             ("linear", "/data/a/train", "/data/a/val")):  # fmt: skip
        row = Row.of("classifier_4_blocks_avgpool_True_lr_0_00250", Accuracy(top1, 99.0, 1000))
        one = replace(evaluation(499, top1, task, **settings), train_dataset=train, val_dataset=val, rows=(row,))
        add_result(folder, one)
    (folder / "knn_metrics.json").write_text(
        '{"iteration": 0, "knn_top1": 7.3}\n{"iteration": 500, "knn_top1": 71.25}\n'
    )
    (folder / "config.yaml").write_text("evaluation: {knn_train_dataset: /data/c, knn_val_dataset: /data/d}\n")
    return folder


def shown_at_80_columns(*runs: Path, **options: object) -> str:
    console = Console(width=80, file=io.StringIO())
    console.print(run_results(ResultsRequest(runs=runs, **options)))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80 and "\u2026" not in text
    return text


def test_results_say_what_was_evaluated_on_what_and_how(tmp_path: Path) -> None:
    shown = shown_at_80_columns(a_run(tmp_path / "run", 71.5))
    for words in ("/data/a/train", "/data/b/val", "T 0.07", "68.62 to 74.21", "iteration 499", "k-NN while training",
                  "/data/d", "500: 71.2"):  # fmt: skip
        assert words in shown, words
    parts = [line[17:34].strip() for line in shown.splitlines() if "_" in line[:40] and line[0] == " "]
    assert "".join(parts) == 3 * "classifier_4_blocks_avgpool_True_lr_0_00250"  # folded, not cut off


def test_results_of_several_runs_are_compared(tmp_path: Path) -> None:
    one, two = a_run(tmp_path / "one", 71.5), a_run(tmp_path / "two", 60.0, image_size=112)
    log = MetricLogger(two / "verdicts.json")
    log.write({"iteration": 90, "verdict": "all images get nearly the same feature"})
    log.close()
    shown = shown_at_80_columns(one, two)
    assert "71.50 (68.6 to 74.2)" in shown and "60.00 (56.9 to 63.0)" in shown and "of run 2: image_size 112" in shown
    assert "2 collapsed since iteration 90" in " ".join(shown.split())
    found = run_results(ResultsRequest(runs=(one, two)))
    assert [len(each["evaluations"]) for each in found.as_dict()["runs"]] == [3, 3]


def test_results_as_csv_and_json(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", 71.5)
    rows = list(csv.DictReader(io.StringIO(str(run_results(ResultsRequest(runs=(run,), as_csv=True))))))
    assert [row["task"] for row in rows] == ["k-NN while training"] * 2 + ["knn", "knn", "linear"]
    assert rows[2]["value"] == "71.5" and rows[2]["val_dataset"] == "/data/a/val" and float(rows[2]["low"]) < 71.5
    content = run_results(ResultsRequest(runs=(run,))).as_dict()
    assert content["knn_while_training"][1] == {"iteration": 500, "top1": 71.25} and content["collapse"] is None


def test_a_run_that_was_only_scored_while_training_has_results(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", 71.5)
    (run / "results.json").unlink()
    assert "500: 71.2" in shown_at_80_columns(run)
