"""`dino2 info`: what a checkpoint is, from the command line."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import ready
import yaml
from typer.testing import CliRunner
from weight_samples import PLAIN, REGISTERS, export_model, sample_state, save

from dinov2cli.cli.main import app, main
from dinov2cli.export import description
from dinov2cli.requests.tools import InfoRequest


def info_json(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["info", *arguments, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found


def make_run(folder: Path) -> Path:
    state = {f"backbone.{name}": tensor for name, tensor in sample_state(PLAIN).items()}
    for iteration in (99, 199):
        save({"teacher": state | {"dino_head.mlp.0.bias": state["backbone.norm.bias"]}},
             folder / "eval" / f"training_{iteration}" / "teacher_checkpoint.pth")  # fmt: skip
    config = {
        "train": {"dataset_path": "somewhere", "seed": 5, "OFFICIAL_EPOCH_LENGTH": 20, "output_dir": str(folder)},
        "optim": {"epochs": 30, "warmup_epochs": 1},
        "student": {"arch": "vit_tiny", "depth": 2, "patch_size": 14},
        "crops": {"global_crops_size": 56, "local_crops_size": 28},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    lines = ['{"iteration": 190, "total_loss": 9.5}', '{"iteration": 199, "total_loss": 9.25}', '{"iteration": 20']
    (folder / "training_metrics.json").write_text("\n".join(lines))
    return folder


def test_run_folder(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    found = info_json(str(run))
    assert found["parameters"] == sum(tensor.numel() for tensor in sample_state(PLAIN).values())
    assert found["architecture"] == PLAIN.model_dump()
    assert found["left_out"] == ["dino_head.mlp.0.bias"]
    training = found["training"]
    assert training["iteration"] == 199 and training["is_newest_teacher"] and training["iterations"] == 600
    assert training["seed"] == 5 and training["dataset"] == "somewhere"
    assert training["last_metrics"] == {"iteration": 199, "total_loss": 9.25}
    older = info_json(str(run / "eval" / "training_99" / "teacher_checkpoint.pth"))
    assert older["training"]["iteration"] == 99 and not older["training"]["is_newest_teacher"]


def test_provenance_of_an_export(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    export_model(run, "safetensors", tmp_path / "model.safetensors")
    found = info_json(str(tmp_path / "model.safetensors"), "--sha256")
    teacher = (run / "eval" / "training_199" / "teacher_checkpoint.pth").read_bytes()
    assert found["provenance"]["iteration"] == 199
    assert found["provenance"]["source_sha256"] == hashlib.sha256(teacher).hexdigest()
    assert found["sha256"] == hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert found["training"] == {}


def test_for_people(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["info", str(save(sample_state(REGISTERS), tmp_path / "weights.pth"))])
    assert result.exit_code == 0
    for words in ("192 wide, 2 blocks, 3 heads", "4 registers", "56x56", "parameters", "antialias True"):
        assert words in " ".join(result.stdout.split())


def test_unreadable_config_is_said_and_does_not_hide_the_rest(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "config.yaml").write_text("student: {patch_size: 14}\nnonsense: 3\n")
    assert "not readable" in description.run(InfoRequest(checkpoint=str(run)))["training"]["config"]


def test_wrong_input_is_one_message_and_exit_code_2(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "weights.pth"
    file.write_text("hello")
    with pytest.raises(SystemExit) as stop:
        main(["info", str(file)])
    assert stop.value.code == 2
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert "not a PyTorch file" in printed.err


def test_json_is_the_only_thing_on_standard_output(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "eval" / "training_300").mkdir()
    (run / "eval" / "training_300" / "teacher_checkpoint.pth").write_bytes(b"PK cut")  # passed over with a warning
    result = ready.dino2("info", run, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["training"]["iteration"] == 199
    assert "training_300" in result.stderr
