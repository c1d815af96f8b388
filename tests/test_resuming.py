"""What may change between two sessions of a run: each key has a rule, and what a change does is said."""

import logging
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import ready
import yaml
from tiny_run import TINY, metrics_of, write_images

from dinov2cli.config import load_config
from dinov2cli.config.gram import WeightSchedule
from dinov2cli.config.tree import FIELDS
from dinov2cli.data.datasets import make_dataset
from dinov2cli.data.spelling import absolute
from dinov2cli.errors import ConfigError
from dinov2cli.launch.training import resolve_config
from dinov2cli.launch.typed import print_origins
from dinov2cli.requests.train import TrainRequest
from dinov2cli.train import resuming

SHORT = [*TINY, "optim.epochs=2", "optim.warmup_epochs=1"]


def dino2(*words: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return ready.dino2(*words, cwd=cwd, env={**os.environ, "COLUMNS": "250"})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `photos/` and `run/`, trained for two epochs from a relative path."""
    place = tmp_path_factory.mktemp("place")
    write_images(place / "photos")
    result = dino2("train", "--cpu", "--data", "photos", "--output-dir", "run", *SHORT, cwd=place)
    assert result.returncode == 0, result.stderr
    return place


def run_of(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run."""
    subprocess.run(["cp", "-r", trained / "run", tmp_path / "run"], check=True)
    return tmp_path / "run"


@pytest.mark.parametrize("key", FIELDS)
def test_every_key_has_one_rule(key: str) -> None:
    groups = (
        resuming.SHAPING_KEYS,
        resuming.SCHEDULED_KEYS,
        resuming.FREE_KEYS,
        resuming.BATCH_KEYS,
        resuming.NAMED_KEYS,
    )
    assert sum(key in group for group in groups) == 1
    assert resuming.on_resume(key).startswith("no" if key in resuming.SHAPING_KEYS else "yes")


def another(value: Any) -> Any:
    """A value of the same kind; of names any, as nothing looks at them."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, dict):
        return {"depths": [1]}
    if isinstance(value, int | float):
        return value + 1 if isinstance(value, int) else value / 2 + 0.01
    return "other" if isinstance(value, str) else (0.125, *value[1:])


@pytest.mark.filterwarnings("ignore:Pydantic serializer")
def test_a_changed_key_is_refused_named_drawn_or_free_as_its_rule_says(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = load_config(overrides=SHORT)
    before.save(tmp_path / "config.yaml")
    for key in FIELDS:
        group, _, name = key.partition(".")
        values = getattr(before, group)
        others = {"optim.scaling_rule": "none"} | dict.fromkeys(
            ("gram.loss_weight_schedule", "dino.local_loss_weight_schedule"), WeightSchedule(end=0.5)
        )
        value = others.get(key) or another(getattr(values, name))
        after = before.model_copy(update={group: values.model_copy(update={name: value})})
        caplog.clear()
        says, refused = "", False
        with caplog.at_level("WARNING", logger="dino2"):
            try:
                resuming.check_resumable(tmp_path / "config.yaml", after, iteration=1)
            except ConfigError as error:
                refused, says = True, error.message
        says += caplog.text
        rule = resuming.on_resume(key)
        assert refused == (rule == "no"), key
        is_named = key in says or (key == "distillation.digest" and "learns from" in says)
        assert is_named == (rule in ("no", "yes, schedules shown", "yes, named")), (key, says)
        assert ("other schedules" in says) == (rule == "yes, schedules shown"), key


def test_the_run_folder_alone_resumes_from_anywhere(trained: Path, tmp_path: Path) -> None:
    run = run_of(trained, tmp_path)
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["train"]["dataset_path"] == str(trained / "photos"), "true in every working folder"
    ended = dino2("train", "--cpu", "--output-dir", run, cwd=tmp_path)
    assert ended.returncode == 0 and "finished already: 8 of 8 iterations" in ended.stderr, ended.stderr
    longer = dino2("train", "--cpu", "--output-dir", "run", "optim.epochs=3", cwd=tmp_path)
    assert longer.returncode == 0, longer.stderr
    assert len(metrics_of(run)) == 12 and "changed keys" not in longer.stderr


def test_other_schedules_are_shown_before_and_after(trained: Path, tmp_path: Path) -> None:
    longer = dino2("train", "--cpu", "--output-dir", run_of(trained, tmp_path), "optim.epochs=4")
    shown = longer.stderr
    assert longer.returncode == 0 and "the run goes on with other schedules: optim.epochs (2 there, 4 here)" in shown
    rows = {words[0]: words for words in map(str.split, shown.splitlines()) if len(words) > 6 and words[0].isdigit()}
    assert sorted(map(int, rows)) == [8, 10, 12, 13, 15]
    first = rows["8"]
    assert first[1:3] == ["1e-06", "->"] and float(first[3]) > 1e-4, "the learning rate jumps, and that is said"
    table = [line for line in shown.splitlines() if "warmup_teacher_temp_epochs" not in line]  # a forewarning has it
    assert not any("teacher_temp" in line for line in table), "what stays is not shown"


def test_a_run_is_not_made_shorter_than_it_is(trained: Path, tmp_path: Path) -> None:
    run = run_of(trained, tmp_path)
    shorter = dino2("train", "--cpu", "--output-dir", run, "optim.epochs=1", "optim.base_lr=0.1")
    assert shorter.returncode == 2
    assert "has done 8 iterations, more than these 4" in shorter.stderr and "At least optim.epochs=2" in shorter.stderr
    assert "goes on" not in shorter.stderr.replace("optim.epochs=2 goes on", "")
    assert yaml.safe_load((run / "config.yaml").read_text())["optim"]["epochs"] == 2


def test_a_finished_run_does_not_go_on_with_changed_keys(trained: Path, tmp_path: Path) -> None:
    ended = dino2(
        "train", "--cpu", "--output-dir", run_of(trained, tmp_path), "optim.base_lr=0.1", "crops.solarize_prob=0.1"
    )
    assert ended.returncode == 0 and "finished already" in ended.stderr and "goes on with" not in ended.stderr


def test_other_data_under_the_same_path_is_said(trained: Path, tmp_path: Path) -> None:
    run, photos = run_of(trained, tmp_path), tmp_path / "photos"
    write_images(photos)
    moved = dino2("train", "--cpu", "--output-dir", run, "--data", photos, "optim.epochs=3")
    assert moved.returncode == 0 and "the data has changed" not in moved.stderr, "moved, and the same"
    for image in sorted((photos / "class1").iterdir())[2:]:
        image.unlink()
    fewer = dino2("train", "--cpu", "--output-dir", run, "--data", photos, "optim.epochs=4")
    assert fewer.returncode == 0
    assert "the data has changed since iteration 12: 16 -> 10 images" in fewer.stderr
    (photos / "class0" / "0.png").rename(photos / "class0" / "other.png")
    renamed = dino2("train", "--cpu", "--output-dir", run, "--data", photos, "optim.epochs=5")
    assert "the data has changed since iteration 16: as many images, and other names" in renamed.stderr


def test_what_is_remembered_of_data_does_not_depend_on_where_it_lies(tmp_path: Path) -> None:
    facts = [resuming.data_facts(make_dataset(str(write_images(tmp_path / name / "data")))) for name in ("a", "b")]
    assert facts[0] == facts[1] and facts[0]["images"] == 16 and facts[0]["classes"] == 2
    assert all(isinstance(value, int) for value in facts[0].values())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("photos", "{here}/photos"),
        ("2*photos + SamplePhotos:split=TRAIN", "2*{here}/photos + SamplePhotos:split=TRAIN"),
        ("Folder:root=photos", "Folder:root={here}/photos"),
        ("folder:photos", "folder:{here}/photos"),
        (
            "ImageNet:split=TRAIN:root=photos:extra=photos",
            "ImageNet:split=TRAIN:root={here}/photos:extra={here}/photos",
        ),
        ("ImageNet:split=TRAIN", "ImageNet:split=TRAIN"),
        ("/gone", "/gone"),
        ("~nobody-is-called-so/photos", "~nobody-is-called-so/photos"),
    ],
)
def test_paths_in_dataset_strings_become_absolute(
    text: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    assert absolute(text) == expected.format(here=tmp_path)


def test_older_checkpoints_do_not_say_what_data_they_saw(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "dino2"):
        resuming.tell_of_other_data({"iteration": 3, "world_size": 1}, {"images": 5, "classes": 1, "names": 7})
    assert not caplog.text


def test_where_values_come_from_is_said_of_a_run_that_goes_on(trained: Path) -> None:
    """Its own configuration counts: this word fits its patches of 8 pixels, and not the default's of 16."""
    request = TrainRequest(output_dir=trained / "run", overrides=("crops.local_crops_size=24",))
    print_origins(request, resolve_config(request))
