"""`dino2 eval` from the command line: arguments of ours and of the reference, files, messages."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from tiny_run import TINY, write_images, write_weights

from dinov2cli.cli.main import main
from dinov2cli.models.vision_transformer import VisionTransformer

CONFIG = """
student: {arch: vit_tiny, embed_dim: 24, depth: 4, num_heads: 2, patch_size: 8, layerscale: 1.0}
crops: {global_crops_size: 32, local_crops_size: 16}
"""
DATA = ["--train-dataset", "SamplePhotos:split=TRAIN", "--val-dataset", "SamplePhotos:split=VAL"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINO2_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with two teachers."""
    run = tmp_path / "run"
    for iteration in (9, 19):
        torch.manual_seed(iteration)
        model = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=2, layerscale=1.0)
        state = {f"backbone.{name}": tensor for name, tensor in model.state_dict().items()}
        folder = run / "eval" / f"training_{iteration}"
        folder.mkdir(parents=True)
        torch.save({"teacher": state}, folder / "teacher_checkpoint.pth")
    (run / "config.yaml").write_text(CONFIG)
    return run


def dino2(*words: str | Path) -> int:
    try:
        main([str(word) for word in words])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_knn_of_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dino2("eval", "knn", run, *DATA, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["iteration"] == 19 and result["checkpoint"] == "eval/training_19/teacher_checkpoint.pth"
    lines = (run / "eval/training_19/knn/results_eval_knn.json").read_text().splitlines()
    reference = {key: value for line in lines for key, value in json.loads(line).items()}
    assert set(reference) == {f"('full', {k}) Top {n}" for k in (10, 20, 100, 200) for n in (1, 5)}
    assert reference["('full', 10) Top 1"] == result["rows"][0]["top1"]
    assert result["rows"][0]["top1"] > 20  # even random features tell photos apart; chance is 8


def test_reference_arguments(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = run / "eval/training_9/teacher_checkpoint.pth"
    output = tmp_path / "out"
    assert dino2(
        "eval", "knn", "--config-file", run / "config.yaml", "--pretrained-weights", weights, "--output-dir", output,
        *DATA, "--nb_knn", "5", "7", "--temperature", "0.1", "--gather-on-cpu", "--batch-size", "64",
        "--n-per-class-list", "6", "-1", "--n-tries", "2",
    ) == 0  # fmt: skip
    lines = (output / "results_eval_knn.json").read_text().splitlines()
    keys = [key for line in lines for key in json.loads(line)]
    groups = [("6 per class", 5), ("6 per class", 6), ("full", 5), ("full", 7)]
    assert keys == [f"{group} Top {n}" for group in groups for n in (1, 5)]
    assert "iteration 9" in capsys.readouterr().out


def test_datasets_of_the_config(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dino2("eval", "knn", run, "train.dataset_path=SamplePhotos:split=TRAIN", "--nb-knn", "3", "--json") == 0
    assert json.loads(capsys.readouterr().out)["val_dataset"] == "SamplePhotos:split=VAL"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "No checkpoint given"),
        (["RUN", "knn"], "'knn' is no change of the configuration"),
        (["RUN", *DATA, "--image-size", "30"], "image size 30 is not a multiple of the model's patch size 8"),
        (["RUN", "train.dataset_path=photos"], "--train-dataset and --val-dataset missing"),
        (["RUN", *DATA, "--nb-knn", "5000"], "needs at least 5000 train images, but there are 1200"),
        (["RUN", "--train-dataset", "EMPTY", "--val-dataset", "EMPTY"], "EMPTY"),
        (["nowhere.pth", *DATA], "nowhere.pth"),
        (["EMPTY", *DATA], "no weights in this folder; looked for eval/training_*/teacher_checkpoint.pth"),
        (["NO_TEACHER", *DATA], "no model weights in it"),
        (
            ["RUN", "--train-dataset", "PHOTOS", "--val-dataset", "OTHERS"],
            "1 of 2 classes that the train dataset has not",
        ),
        (["RUN", "--train-dataset", "ONE_CLASS", "--val-dataset", "ONE_CLASS"], "8 of 8 images without a class"),
    ],
)
def test_wrong_input(
    words: list[str], message: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "EMPTY").mkdir()
    photos, others = write_images(tmp_path / "PHOTOS"), write_images(tmp_path / "OTHERS")
    (others / "class1").rename(others / "class2")
    torch.save({"student": {}}, tmp_path / "NO_TEACHER")
    places = {"RUN": run, "PHOTOS": photos, "OTHERS": others, "ONE_CLASS": photos / "class0"}
    places |= {word: tmp_path / word for word in ("EMPTY", "NO_TEACHER")}
    assert dino2("eval", "knn", *(places.get(word, word) for word in words)) == 2
    shown = capsys.readouterr()
    assert message in shown.err.replace("\n", " ") and "Traceback" not in shown.err and not shown.out


def test_one_bad_file_ends_no_evaluation_and_is_in_its_message(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = write_images(tmp_path / "photos", per_class=20)
    bad = sorted((photos / "class0").iterdir())[3]
    bad.write_bytes(bad.read_bytes()[:100])
    sets = ["--train-dataset", photos, "--val-dataset", photos, "--json"]
    short = ["--epochs", "1", "--epoch-length", "4", "--batch-size", "8", "--learning-rates", "0.01"]
    many = ["--max-bad-fraction", "0.1"]
    for words in (["knn", "--nb-knn", "3"], ["logreg", "--max-train-iters", "9"], ["linear", *short],
                  ["linear", *short, "--frozen-crops", "--no-resume"]):  # fmt: skip
        assert dino2("eval", words[0], run, *words[1:], *sets, *many) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["rows"][0]["images"] == 39 and any(bad.name in note for note in result["notes"]), words
    assert dino2("eval", "knn", run, *sets) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "1 of 40 images are unreadable" in said and "--max-bad-fraction" in said
    assert dino2("embed", run, "--data", photos, "--output", tmp_path / "f.safetensors", *many) == 0
    assert "40 images, 24 dimensions; 1 could not be read" in " ".join(capsys.readouterr().out.split())


def test_embed_tiles(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = write_images(tmp_path / "photos", per_class=1)  # 40 x 40 pixels
    assert dino2("embed", run, "--data", photos, "--tiles", "24", "--overlap", "8", "--output", tmp_path / "t.csv") == 0
    rows = [line.split(",") for line in (tmp_path / "t.csv").read_text().splitlines()]
    assert rows[0][:8] == ["path", "label", "readable", "top", "left", "height", "width", "cls_0"]
    assert [row[1:7] for row in rows[1:]] == [
        [label, "1", top, left, "24", "24"] for label in "01" for top in ("0", "16") for left in ("0", "16")
    ]
    assert dino2("embed", run, "--data", photos, "--tiles", "24", "--output", tmp_path / "t.parquet") == 0
    table = pq.read_table(tmp_path / "t.parquet")
    assert table["tiles"].to_pylist()[:3] == [[0, 0, 24, 24], [0, 16, 24, 24], [16, 0, 24, 24]] and len(table) == 8
    capsys.readouterr()
    assert dino2("embed", run, "--data", photos, "--overlap", "8", "--output", tmp_path / "u.csv") == 2
    assert "--overlap 8 goes with --tiles SIZE" in capsys.readouterr().err


def test_logreg_linear_results_and_embed(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dino2("eval", "logreg", run, *DATA, "--max-train-iters", "30", "--json") == 0
    logreg = json.loads(capsys.readouterr().out)
    short = ["--epochs", "1", "--epoch-length", "4", "--batch-size", "8", "--learning-rates", "0.01", "0.1"]
    tests = ["--test-datasets", "SamplePhotos:split=VAL", "--test-metric-types", "mean_per_class_accuracy"]
    assert dino2("eval", "linear", run, *DATA, *short, *tests, "--frozen-crops", "--json") == 0
    linear = json.loads(capsys.readouterr().out)
    assert "approximation" in linear["notes"][0] and len(linear["extra"]["heads"]) == 8
    folder = run / "eval/training_19"
    lines = [json.loads(line) for line in (folder / "linear/results_eval_linear.json").read_text().splitlines()]
    assert lines[0]["best_classifier"]["accuracy"] == pytest.approx(linear["rows"][0]["top1"] / 100)
    assert lines[1] == {"SamplePhotos:split=VAL_accuracy": pytest.approx(linear["rows"][1]["top1"])}

    head = folder / "linear/best_head.pth"
    assert dino2("eval", "linear", run, *DATA[2:], "--head", head, "--output-dir", tmp_path / "again", "--json") == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["top1"] == pytest.approx(linear["rows"][0]["top1"])

    assert dino2("results", run, "--json") == 0
    gathered = json.loads(capsys.readouterr().out)["evaluations"]
    assert [each["task"] for each in gathered] == ["linear", "linear", "logreg"]
    assert gathered[2] == logreg


def test_logreg_chooses_C_on_other_images(  # noqa: N802
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, few = write_images(tmp_path / "images", classes=3), write_images(tmp_path / "few", classes=3, per_class=2)
    words = [
        "eval",
        "logreg",
        run,
        "--train-dataset",
        images,
        "--val-dataset",
        images,
        "--json",
        "--max-train-iters",
        "9",
    ]
    assert dino2(*words, "--finetune-on-val") == 0
    on_val = json.loads(capsys.readouterr().out)
    assert on_val["settings"]["finetune_on_val"] and on_val["rows"][0]["top1"] == max(on_val["extra"]["sweep"].values())
    assert dino2(*words, "--finetune-dataset", few) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["finetune_dataset"] == str(few)


def test_labels_of_other_length(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "labels.json").write_text("[1, 2, 3]")
    test = ["--test-datasets", "SamplePhotos:split=VAL", "--test-labels", tmp_path / "labels.json"]
    assert dino2("eval", "linear", run, *DATA, *test) == 2
    assert "3 labels, but SamplePhotos VAL" in capsys.readouterr().err.replace("\n", " ")


def test_training_evaluates_each_of_its_teachers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, run = write_images(tmp_path / "data"), tmp_path / "run"
    datasets = [f"evaluation.knn_{name}_dataset={images}" for name in ("train", "val")]
    tasks = ["evaluation.tasks=[knn,logreg]", *datasets]
    assert dino2("train", "--cpu", "--data", images, "--output-dir", run, *TINY, *tasks) == 0
    capsys.readouterr()
    assert dino2("results", run, "--json") == 0
    gathered = json.loads(capsys.readouterr().out)["evaluations"]
    assert [(each["iteration"], each["task"]) for each in gathered] == [
        (iteration, task) for iteration in (3, 7, 11) for task in ("knn", "logreg")
    ]
    assert all(each["checkpoint"] == f"eval/training_{each['iteration']}/teacher_checkpoint.pth" for each in gathered)
    assert gathered[-1]["rows"][0]["top1"] == 100  # two colours, and the images fitted are those measured
    assert dino2("eval", "knn", run, "--train-dataset", images, "--val-dataset", images, "--json") == 0
    assert json.loads(capsys.readouterr().out)["rows"] == gathered[-2]["rows"]


def test_tasks_of_a_training(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dinov2cli.config import load_config
    from dinov2cli.eval import leaks
    from dinov2cli.eval.protocol import evaluate_teacher

    looked, compare = [], leaks._compare
    monkeypatch.setattr(leaks, "_compare", lambda *sets: (looked.append(sets), compare(*sets))[1])
    data = "evaluation.knn_train_dataset=SamplePhotos:split=TRAIN", "evaluation.knn_val_dataset=SamplePhotos:split=VAL"
    config = load_config(config_file=run / "config.yaml", overrides=[*data, "evaluation.tasks=[knn,logreg]"])
    done, other = evaluate_teacher(run / "eval/training_9/teacher_checkpoint.pth", config, config.evaluation.tasks)
    assert (done.task, done.iteration, other.task) == ("knn", 9, "logreg")
    assert done.extra["val_in_train"] == other.extra["val_in_train"] and len(looked) == 1  # for both of them
    assert json.loads((run / "results.json").read_text())["evaluations"][0]["rows"][0]["top1"] == done.rows[0].top1


@pytest.mark.parametrize("protocol", ["knn", "logreg", "linear"])
def test_what_val_shares_with_train_is_said(
    protocol: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, val = write_images(tmp_path / "train", per_class=12), write_images(tmp_path / "val", per_class=2)
    shutil.copy(train / "class1/5.png", val / "class1/other.png")
    options = {"linear": ["--epochs", "1", "--epoch-length", "2"], "knn": ["--nb-knn", "3"], "logreg": []}[protocol]
    words = ["eval", protocol, run, "--train-dataset", train, "--val-dataset", val, *options, "--device", "cpu"]
    assert dino2(*words, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    seen = {path.read_bytes() for path in train.rglob("*.png")}
    n = sum(path.read_bytes() in seen for path in val.rglob("*.png"))
    assert found["extra"]["val_in_train"] == {"percent": 100 * n / 5, "found": n, "compared": 5, "images": 5} and n
    assert dino2(*words) == 0
    shown = capsys.readouterr()
    assert f"({n} of 5 images) is in train" in " ".join(shown.out.split()) and "is in train" in " ".join(
        shown.err.split()
    )


def test_no_top_5_where_fewer_than_five_classes_can_have_a_vote(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dino2("eval", "knn", run, *DATA, "--nb-knn", "1", "10", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    one, ten = result["rows"]
    assert one["top5"] is None and 0 < ten["top5"] <= 100
    assert any("filled up as in the reference" in note and "k=10" in note for note in result["notes"])


@pytest.mark.parametrize("protocol", ["knn", "logreg", "linear"])
def test_a_dry_run_prints_the_plan_and_evaluates_nothing(
    protocol: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert dino2("eval", protocol, run, *DATA, "--device", "cpu", "--dry-run") == 0
    shown = capsys.readouterr().out
    assert f"eval {protocol}" in shown and "1200 crops" in shown and "300 crops" in shown and "cpu" in shown
    assert dino2("eval", protocol, run, *DATA, "--dry-run", "--partition", "gpu", "--mem", "4G") == 0
    assert "#SBATCH --mem=4G" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before


def test_a_plan_says_beside_what_results_will_be(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(write_weights(tmp_path / "other").parent)  # a config.yaml beside weights makes no run of them
    for checkpoint, where in (("weights.pth", "printed only"), (run, "beside the run's teacher")):
        assert dino2("eval", "knn", checkpoint, *DATA, "--device", "cpu", "--dry-run") == 0
        assert where in capsys.readouterr().out
    before = sorted(Path().rglob("*"))
    assert dino2("eval", "knn", "weights.pth", *DATA, "--device", "cpu", "--json") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["rows"] and sorted(Path().rglob("*")) == before
    assert "weights.pth is in no run: nothing is written; --output-dir DIR keeps" in " ".join(printed.err.split())
