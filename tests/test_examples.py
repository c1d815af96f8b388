"""Every program in examples/ runs as its first lines say, and does what they promise."""

import runpy
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tiny_run import metrics_of, write_images

from dinov2cli.data.datasets.recognise_dense import PARTS, dense_dataset, dense_string
from dinov2cli.data.datasets.strings import KINDS
from dinov2cli.train.objective import TERMS

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = [
    "student.embed_dim=32", "student.depth=2", "dino.head_n_prototypes=32", "dino.head_hidden_dim=32",
    "train.batch_size_per_gpu=4", "train.OFFICIAL_EPOCH_LENGTH=2", "optim.epochs=2", "train.num_workers=0",
    "train.log_period=1", "evaluation.knn_period=0",
]  # fmt: skip


def python(example: str, *words: str | Path) -> None:
    """`python examples/EXAMPLE WORDS`, in this process; what it adds to tables is taken out again."""
    argv, tables = sys.argv, [(table, dict(table)) for table in (TERMS, KINDS)]
    sys.argv = [example, *map(str, words)]
    try:
        runpy.run_path(str(EXAMPLES / example), run_name="__main__")
    finally:
        sys.argv = argv
        for table, before in tables:
            table.clear()
            table.update(before)


@pytest.fixture(autouse=True, scope="module")
def cpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: False)
        yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("examples") / "photos", per_class=4)


@pytest.fixture(scope="module")
def trained(photos: Path) -> Path:
    python("train_on_folder.py", photos, photos.parent / "run", *SMALL)
    return photos.parent / "run"


def test_each_example_stands_in_the_readme_and_is_run_here() -> None:
    readme, here = (EXAMPLES / "README.md").read_text(), Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        assert f"({path.name})" in readme and f'python("{path.name}"' in here, path.name


def test_training_on_a_folder_leaves_a_run_with_a_score(trained: Path) -> None:
    assert len(metrics_of(trained)) == 4
    assert (trained / "results.json").exists() and (trained / "curves.png").exists()


def test_features_pair_each_image_with_another(trained: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    python("features.py", trained, photos)
    pairs = [line.split(": ") for line in capsys.readouterr().out.splitlines()]
    images = {f"{path.parent.name}/{path.name}" for path in photos.glob("*/*.png")}
    assert [name for name, _ in pairs] == sorted(images)
    assert all(name != other and other in images for name, other in pairs)


def test_a_hook_sees_every_block(trained: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    python("hook_on_block.py", trained, next(photos.glob("*/*.png")))
    steps = [float(line.split(": ")[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(steps) == 2 and all(0 <= step < 1 for step in steps)


def test_sets_with_labels_for_every_pixel_are_made_and_recognised(tmp_path: Path) -> None:
    python("dense_sets.py", tmp_path, "2", "1")
    for name, labels in (("shapes", "masks"), ("things", "depth")):
        train, val = (dense_dataset(dense_string(str(tmp_path / name), part, labels), labels) for part in PARTS)
        assert (len(train), len(val)) == (2, 1)
        assert len(np.unique([train.label(i) for i in range(2)])) > 1 and train.pair(0)[0].shape == (96, 96, 3)


def test_a_term_of_ones_own_is_computed_logged_and_summed(photos: Path, tmp_path: Path) -> None:
    python("own_loss.py", photos, tmp_path / "run", *SMALL)
    for line in metrics_of(tmp_path / "run"):
        own = line["patch_variance_loss"]
        dino = line["dino_local_crops_loss"] + line["dino_global_crops_loss"]
        others = dino + 2 * (line["koleo_loss"] + line["ibot_loss"])  # logged for each of two global crops
        assert 0 < own < 1
        assert line["total_loss"] == pytest.approx(others + 0.5 * own, rel=1e-5)


def test_a_dataset_of_ones_own_is_trained_on(photos: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for path in photos.glob("*/*.png"):
            archive.write(path, path.parent.name + path.name)
    python("own_dataset.py", tmp_path / "photos.zip", tmp_path / "run", *SMALL)
    assert [line["bad_images"] for line in metrics_of(tmp_path / "run")] == [0] * 4
