"""Presets: complete, valid, documented, and shown by `dino2 presets`."""

import json
import math
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import ready
import yaml

from dinov2cli.config import Preset, find_preset, list_presets, load_config
from dinov2cli.config.tree import FIELDS
from dinov2cli.errors import ConfigError
from dinov2cli.train.forewarnings import forewarnings

NAMES = {
    "vitl16_short", "vitl14", "vitg14", "vits14", "vitb14", "single_gpu", "demo",
    "small_1k", "small_10k", "small_100k", "small_pictures", "continue_from_weights",
    *(f"vit{size}14{registers}_pretrain" for size in "sblg" for registers in ("", "_reg4")),
}  # fmt: skip


def dino2(*arguments: str) -> subprocess.CompletedProcess[str]:
    return ready.dino2(*arguments, env={**os.environ, "COLUMNS": "100"})


def test_all_presets_are_there() -> None:
    assert {preset.name for preset in list_presets()} >= NAMES


@pytest.mark.parametrize("preset", list_presets(), ids=lambda preset: preset.name)
def test_preset_states_only_differences_and_is_documented(preset: Preset) -> None:
    config = load_config(preset=preset.name)
    short_run = load_config()
    for group, keys in yaml.safe_load(preset.text).items():
        for key, value in keys.items():
            if f"{group}.{key}" not in {"student.arch", "train.dataset_path", "train.batch_size_per_gpu"}:
                default = getattr(getattr(short_run, group), key)
                assert value != default, f"{group}.{key} repeats the default"
    command = next(line for line in preset.comment if line.startswith("  dino2 "))
    assert f"--preset {preset.name} " in command or preset.kind == "weights"
    assert any(line.startswith("Hardware: ") for line in preset.comment)
    assert any("xpected" in line for line in preset.comment)
    assert len(preset.summary) <= 80
    assert config.crops.global_crops_size % config.student.patch_size == 0


@pytest.mark.parametrize("name", ["small_1k", "small_10k", "small_100k", "small_pictures", "continue_from_weights"])
def test_recipes_for_small_data_scale_with_their_length_and_batch(name: str) -> None:
    config = load_config(preset=name)
    dino, teacher, optim, crops = config.dino, config.teacher, config.optim, config.crops
    class_tokens = crops.global_crops_number * config.train.batch_size_per_gpu
    measured = name == "small_pictures"  # which learned beyond these rules: docs/recipes.md
    assert dino.head_n_prototypes <= (1 + measured) * class_tokens  # else Sinkhorn-Knopp's targets are nearly uniform
    halved_in = math.log(0.5) / math.log(teacher.momentum_teacher)
    assert (50 if measured else config.iterations() / 20) < halved_in < config.iterations() / 5
    assert optim.warmup_epochs <= 0.1 * optim.epochs and teacher.warmup_teacher_temp_epochs <= 0.2 * optim.epochs
    if name.startswith("small_"):
        assert config.student.layerscale == 1.0 or config.arch().depth > 6
        patches = min(crops.global_crops_size, crops.local_crops_size) // config.student.patch_size
        assert patches >= 4 or (measured and patches**2 == 4)
        assert not forewarnings(config, config.effective_batch())
    if name == "small_pictures":
        assert not any(crops.blur_prob)


def test_training_recipes_of_the_paper() -> None:
    large, giant = load_config(preset="vitl14"), load_config(preset="vitg14")
    assert large.arch() == (1024, 24, 16)
    assert (large.student.patch_size, large.student.ffn_layer) == (14, "swiglufused")
    assert large.ibot.separate_head
    assert (large.dino.head_bottleneck_dim, large.ibot.head_bottleneck_dim) == (384, 256)
    assert large.iterations() == 625_000
    assert giant.arch() == (1536, 40, 24)
    differences = {
        key for key in FIELDS if getattr(getattr(large, key.split(".")[0]), key.split(".")[1])
        != getattr(getattr(giant, key.split(".")[0]), key.split(".")[1])
    }  # fmt: skip
    assert differences == {"student.arch", "train.batch_size_per_gpu"}
    assert load_config(preset="vits14").effective_batch(8) == load_config(preset="vitb14").effective_batch(8) == 1024


def test_adaptation_to_a_higher_resolution_is_the_papers_training_but_for_what_it_says() -> None:
    """10,000 iterations at 518 pixels; schedules compressed, learning rate lowered, heads fresh."""
    adapted, large = load_config(preset="adapt_518"), load_config(preset="vitl14")
    assert adapted.iterations() == 10_000 and adapted.optim.base_lr < large.optim.base_lr
    differences = {
        key for key in FIELDS if getattr(getattr(large, key.split(".")[0]), key.split(".")[1])
        != getattr(getattr(adapted, key.split(".")[0]), key.split(".")[1])
    }  # fmt: skip
    schedules = {"optim.epochs", "optim.base_lr", "optim.warmup_epochs", "teacher.warmup_teacher_temp_epochs"}
    run = {"train.batch_size_per_gpu", "train.dataset_path", "evaluation.eval_period_iterations"}
    student = {"student.ffn_layer", "student.drop_path_rate", "student.freeze_backbone_epochs"}
    assert differences == {"crops.global_crops_size", *schedules, *run, *student}


@pytest.mark.parametrize("size", "sblg")
def test_released_architectures(size: str) -> None:
    plain, registers = load_config(preset=f"vit{size}14_pretrain"), load_config(preset=f"vit{size}14_reg4_pretrain")
    assert plain.arch() == registers.arch()
    assert plain.arch().embed_dim == {"s": 384, "b": 768, "l": 1024, "g": 1536}[size]
    for config in (plain, registers):
        assert config.student.patch_size == 14
        assert config.crops.global_crops_size == 518
        assert config.student.ffn_layer == ("swiglufused" if size == "g" else "mlp")
    assert (plain.student.num_register_tokens, registers.student.num_register_tokens) == (0, 4)
    assert (plain.student.interpolate_offset, registers.student.interpolate_offset) == (0.1, 0.0)
    assert (plain.student.interpolate_antialias, registers.student.interpolate_antialias) == (False, True)


def test_names_as_the_reference_writes_them() -> None:
    assert find_preset("eval/vitl14_pretrain").name == "vitl14_pretrain"
    assert find_preset("train/vitl14.yaml").name == "vitl14"


def test_unknown_name_gets_a_guess_and_the_list() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(preset="vitl16-short")
    assert caught.value.message == "no preset named 'vitl16-short'. Did you mean vitl16_short?"
    assert all(name in str(caught.value.hint) for name in NAMES)


def test_list_prints_a_table_or_json() -> None:
    table = dino2("presets", "list")
    assert table.returncode == 0, table.stderr
    assert all(name in table.stdout for name in NAMES)
    listed = json.loads(dino2("presets", "list", "--json").stdout)["presets"]
    assert {entry["name"] for entry in listed} >= NAMES
    assert {entry["kind"] for entry in listed} == {"training", "weights"}


def test_show_prints_a_file_that_loads(tmp_path: Path) -> None:
    shown = dino2("presets", "show", "demo")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout == find_preset("demo").text
    full = dino2("presets", "show", "demo", "--full")
    assert {f"{group}.{key}" for group, keys in yaml.safe_load(full.stdout).items() for key in keys} == set(FIELDS)
    for text in (shown.stdout, full.stdout):
        (tmp_path / "mine.yaml").write_text(text)
        assert load_config(config_file=tmp_path / "mine.yaml") == load_config(preset="demo")


def test_show_of_an_unknown_preset_is_one_message() -> None:
    shown = dino2("presets", "show", "dmo")
    assert shown.returncode == 2
    assert shown.stdout == ""
    assert "Did you mean demo?" in shown.stderr
    assert "Traceback" not in shown.stderr


def test_presets_travel_inside_an_installed_package(tmp_path: Path) -> None:
    # Laid out as pyproject.toml makes the wheel: presets/ goes to dinov2cli/presets.
    checkout = Path(__file__).parents[1]
    included = tomllib.loads((checkout / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert included["force-include"]["presets"] == "dinov2cli/presets"
    installed = tmp_path / "dinov2cli"
    shutil.copytree(checkout / "dinov2cli", installed, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(checkout / "presets", installed / "presets")
    code = "import dinov2cli.config as c; print(*(p.path for p in c.list_presets()), sep='\\n')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    paths = [Path(line) for line in result.stdout.splitlines()]
    assert {path.stem for path in paths} >= NAMES, result.stderr
    assert {path.parent.resolve() for path in paths} == {(installed / "presets").resolve()}
