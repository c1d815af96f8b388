"""`dino2 bench augment` measures every stage of the real loader."""

import json
from pathlib import Path

import numpy as np
import pytest

from dinov2cli.cli.main import main
from dinov2cli.data.augmentations import COLOR_STEPS, GEOMETRIC_STEPS

SMALL = ["--images", "4", "--repeats", "2", "--workers", "0", "--workers", "1"]
OVERRIDES = ["train.batch_size_per_gpu=2", "crops.local_crops_number=2"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "augment", *arguments])
    assert not stopped.value.code
    return capsys.readouterr().out


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    result = json.loads(run(capsys, *SMALL, "--json", *OVERRIDES))
    assert [rate["workers"] for rate in result["rates"]] == [0, 1]
    assert all(rate["images_per_s"] > 0 and len(rate["repeats"]) == 2 for rate in result["rates"])
    assert len(result["stages_ms"]) == 5 + len(GEOMETRIC_STEPS) + len(COLOR_STEPS)
    assert all(ms > 0 for ms in result["stages_ms"].values())
    assert {"read", "decode", "resized crop", "color jitter", "gaussian blur", "collate"} <= set(result["stages_ms"])


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, *SMALL, *OVERRIDES)
    assert "SamplePhotos TRAIN" in text and "images/s" in text and "solarize" in text


def test_images_of_five_channels(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for i in range(4):
        np.save(tmp_path / f"{i}.npy", np.full((40, 40, 5), 60 * i, np.uint8))
    levels = "[0.5,0.5,0.5,0.5,0.5]"
    five = ["student.in_chans=5", f"data.mean={levels}", f"data.std={levels}"]
    result = json.loads(run(capsys, "--data", str(tmp_path), *SMALL, "--json", *OVERRIDES, *five))
    assert {"decode", "resized crop", "collate"} <= set(result["stages_ms"])
