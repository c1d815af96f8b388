"""Configuration: what loads, what is refused and in which words, and what is derived."""

import logging
import math
import os
from pathlib import Path

import pytest
import yaml

from dinov2cli.config import ARCHITECTURES, Config, list_presets, load_config
from dinov2cli.config.messages import suggest
from dinov2cli.config.tree import FIELDS, annotated_yaml, expectation
from dinov2cli.errors import ConfigError, EnvironmentProblem

GOLDEN = Path(__file__).parent / "golden"


def refused(*overrides: str, preset: str | None = None, config_file: str | Path | None = None) -> list[str]:
    """The lines of the message with which a configuration is refused."""
    with pytest.raises(ConfigError) as caught:
        load_config(preset, config_file, overrides)
    return caught.value.message.splitlines()


# --- what loads


def test_defaults_are_the_reference_short_run() -> None:
    config = load_config()
    assert config == Config()
    assert config.arch() == (1024, 24, 16)
    assert config.iterations() == 125_000
    assert config.iterations(config.optim.warmup_epochs) == 12_500
    assert config.iterations(config.teacher.warmup_teacher_temp_epochs) == 37_500
    assert config.iterations(config.optim.freeze_last_layer_epochs) == 1250
    assert config.checkpoint_period() == 3750
    assert config.scaled_lr(32) == pytest.approx(0.004 * math.sqrt(2), rel=1e-15)


def test_every_key_has_description_and_expectation() -> None:
    for key, field in FIELDS.items():
        assert field.description and field.description.endswith("."), key
        assert expectation(field), key


@pytest.mark.parametrize("preset", [p.name for p in list_presets()])
def test_yaml_round_trip(preset: str, tmp_path: Path) -> None:
    config = load_config(
        preset=preset, overrides=["optim.min_lr=1e-7", "train.num_workers=3", "student.layerscale=null"]
    )
    config.save(tmp_path / "run" / "config.yaml")
    assert load_config(config_file=tmp_path / "run" / "config.yaml") == config
    assert load_config(config_file=tmp_path / "run") == config, "a run folder stands for its config.yaml"
    assert os.listdir(tmp_path / "run") == ["config.yaml"]
    (tmp_path / "annotated.yaml").write_text(annotated_yaml(config))
    assert load_config(config_file=tmp_path / "annotated.yaml") == config


def test_saved_file_is_complete(tmp_path: Path) -> None:
    load_config(preset="demo").save(tmp_path / "config.yaml")
    content = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert {f"{group}.{key}" for group, keys in content.items() for key in keys} == set(FIELDS)


def test_save_to_an_impossible_place_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentProblem, match=r"file/config\.yaml: cannot be written"):
        Config().save(tmp_path / "file" / "config.yaml")


def test_config_is_immutable() -> None:
    config = Config()
    with pytest.raises(ValueError, match="frozen"):
        config.train.seed = 3  # type: ignore[misc]
    assert hash(config) == hash(Config())


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optim.base_lr=1e-5", 1e-5),
        ("optim.base_lr=2.0e-04", 2e-4),
        ("optim.base_lr=1", 1.0),
        ("crops.global_crops_scale=[0.2,0.9]", (0.2, 0.9)),
        ("train.checkpoint_period=null", None),
        ("ibot.separate_head=true", True),
        ("train.dataset_path=ImageNet:split=TRAIN:root=/a:extra=/b", "ImageNet:split=TRAIN:root=/a:extra=/b"),
        ("train.dataset_path=/photos: 2024 #1/{new}", "/photos: 2024 #1/{new}"),
        ("train.dataset_path='/with quotes'", "/with quotes"),
        ("train.dataset_path=", ""),
        ("train.output_dir=2024-11-23", "2024-11-23"),
        ("student.arch=vit_base_memeff", "vit_base"),
    ],
)
def test_override_values(override: str, value: object) -> None:
    config = load_config(overrides=[override])
    group, key = override.split("=")[0].split(".")
    got = getattr(getattr(config, group), key)
    assert got == value
    assert type(got) is type(value)


def test_layers_win_in_order(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("optim:\n  epochs: 20\n  base_lr: 1e-3\ntrain:\n")
    config = load_config(config_file=path, overrides=["optim.epochs=30", "optim.epochs=40"])
    assert config.optim.epochs == 40
    assert config.optim.base_lr == 1e-3
    assert config.optim.min_lr == Config().optim.min_lr


def test_sizes_override_the_named_architecture_one_by_one() -> None:
    assert load_config(overrides=["student.arch=vit_tiny", "student.depth=3"]).arch() == (192, 3, 3)
    assert load_config(overrides=["student.embed_dim=96", "student.num_heads=4"]).arch() == (96, 24, 4)
    for name, architecture in ARCHITECTURES.items():
        assert load_config(overrides=[f"student.arch={name}"]).arch() == architecture


def test_effective_batch_counts_processes_and_accumulation() -> None:
    config = load_config(overrides=["train.batch_size_per_gpu=16", "train.gradient_accumulation=4"])
    assert config.effective_batch(8) == 512
    assert config.scaled_lr(8) == pytest.approx(0.004 / math.sqrt(2), rel=1e-15)
    assert load_config(overrides=["optim.scaling_rule=none"]).scaled_lr(8) == 0.004


def test_a_long_temperature_warmup_is_allowed() -> None:
    config = load_config(overrides=["optim.epochs=10"])
    assert config.iterations(config.teacher.warmup_teacher_temp_epochs) > config.iterations()


# --- files of the reference


@pytest.mark.parametrize(("name", "gpus"), [("vitl16_short", 32), ("vitl14", 96)])
def test_reference_config_loads_as_it_is(name: str, gpus: int, caplog: pytest.LogCaptureFixture) -> None:
    path = GOLDEN / f"reference_config_{name}.yaml"
    written = yaml.safe_load(path.read_text())
    with caplog.at_level(logging.INFO, logger="dino2"):
        config = load_config(config_file=path)
    preset = load_config(preset=name)
    for group in ("dino", "ibot", "student", "teacher", "optim", "crops", "data", "evaluation"):
        assert getattr(config, group) == getattr(preset, group), group
    # Every key of the file that has a meaning here arrived with its value.
    for group, keys in written.items():
        for key, value in keys.items():
            if f"{group}.{key}" in FIELDS and key not in ("lr", "block_chunks"):
                got = getattr(getattr(config, group), key)
                assert (list(got) if isinstance(got, tuple) else got) == value, f"{group}.{key}"
    assert config.compute_precision.precision == "fp16"
    # The learning rate in the file is the scaled one; it is derived again, not scaled twice.
    assert config.scaled_lr(gpus) == pytest.approx(written["optim"]["lr"], rel=1e-12)
    messages = [record.getMessage() for record in caplog.records]
    ignored = [m for m in messages if "MODEL.WEIGHTS" in m]
    assert len(ignored) == 1
    assert "train.saveckp_freq" in ignored[0]
    assert "train.cache_dataset" in ignored[0]
    assert sum("optim.lr=" in m for m in messages) == 1
    assert sum("precision=fp16" in m for m in messages) == 1
    assert sum("block_chunks=4 is taken as 0" in m for m in messages) == 1


def test_our_own_file_loads_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Config().save(tmp_path / "config.yaml")
    with caplog.at_level(logging.DEBUG, logger="dino2"):
        load_config(config_file=tmp_path / "config.yaml", overrides=["train.seed=1"])
    assert not caplog.records


def test_reference_style_overrides() -> None:
    nested = "compute_precision.student.backbone.mixed_precision.param_dtype"
    assert load_config(overrides=[f"{nested}=bf16"]).compute_precision.precision == "bf16"
    reference = GOLDEN / "reference_config_vitl14.yaml"
    assert load_config(config_file=reference, overrides=[f"{nested}=fp32"]).compute_precision.precision == "fp32"
    flat = load_config(config_file=reference, overrides=["compute_precision.precision=bf16"])
    assert flat.compute_precision.precision == "bf16"
    assert refused(f"{nested}=fp8")[0].startswith("compute_precision.precision=fp8: must be one of auto, fp32, bf16")


def test_derived_lr_given_by_hand_is_ignored_and_said_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="dino2"):
        config = load_config(overrides=["optim.lr=0.1"])
    assert config == Config()
    assert "set optim.base_lr" in caplog.text


def test_paths_of_the_reference_source_tree_mean_presets() -> None:
    config = load_config(config_file="dinov2/configs/train/vitl14.yaml")
    assert config == load_config(preset="vitl14")
    assert load_config(config_file="dinov2/configs/eval/vitb14_pretrain.yaml") == load_config(preset="vitb14_pretrain")


# --- what is refused, in which words


@pytest.mark.parametrize(
    ("override", "message"),
    [
        # unknown keys: right name in a wrong group, misspelling, common other names, unknown group
        ("train.epochs=3", "train.epochs=3: no such key; did you mean optim.epochs?"),
        ("optim.base_rl=3", "optim.base_rl=3: no such key; did you mean optim.base_lr?"),
        ("train.lr=0.1", "train.lr=0.1: no such key; did you mean optim.base_lr?"),
        ("lr=0.1", "lr=0.1: no such key; did you mean optim.base_lr?"),
        ("train.batch_size=8", "train.batch_size=8: no such key; did you mean train.batch_size_per_gpu?"),
        ("student.ffn=mlp", "student.ffn=mlp: no such key; did you mean student.ffn_layer?"),
        ("optm.base_lr=1", "optm: no such group; did you mean optim?"),
        ("dino.zzz=1", "dino.zzz=1: no such key; dino has loss_weight, head_n_prototypes, head_bottleneck_dim, "
         "head_nlayers, head_hidden_dim, koleo_loss_weight, reweight_dino_local_loss, local_loss_weight_schedule"),
        # words with a meaning
        ("data.value_range=[9, 1]",
         "data.value_range=[9, 1]: must be auto, dtype, [LOW, HIGH] or percentile [P, Q]"),
        ("data.value_range=[0, 1e999]",
         "data.value_range=[0, 1e999]: must be auto, dtype, [LOW, HIGH] or percentile [P, Q]"),
        ("data.background=[0, 0, 300]",
         "data.background=[0, 0, 300]: must be mean, drop, or [RED, GREEN, BLUE] from 0 to 255"),
        # wrong types
        ("optim.epochs=ten", "optim.epochs=ten: must be a whole number, at least 1"),
        ("optim.epochs=2.5", "optim.epochs=2.5: must be a whole number, at least 1"),
        ("train.seed=true", "train.seed=true: must be a whole number, at least 0"),
        ("optim.base_lr='1'", "optim.base_lr=1: must be a number, above 0"),
        ("optim.base_lr=.nan", "optim.base_lr=NaN: must be a number, above 0"),
        ("ibot.separate_head=1", "ibot.separate_head=1: must be true or false"),
        ("crops.global_crops_scale=0.3",
         "crops.global_crops_scale=0.3: must be a list of 2 numbers, each above 0 and at most 1"),
        ("crops.blur_prob=[0, 1]", "crops.blur_prob=[0, 1]: must be a list of 3 numbers, each from 0 to 1"),
        ("optim=3", "optim=3: is a group of keys; name one of them, such as optim.epochs"),
        ("train.seed.deep=3", 'train.seed={"deep": 3}: must be a whole number, at least 0'),
        # out of range, unknown words
        ("train.num_workers=-1", "train.num_workers=-1: must be a whole number, at least 0, or null"),
        ("student.drop_path_rate=1.0", "student.drop_path_rate=1.0: must be a number, at least 0 and below 1"),
        ("optim.layerwise_decay=0", "optim.layerwise_decay=0: must be a number, above 0 and at most 1"),
        ("train.centering=sinkhorn",
         "train.centering=sinkhorn: must be one of centering, sinkhorn_knopp; did you mean sinkhorn_knopp?"),
        # contradictions
        ("crops.local_crops_size=90",
         "crops.local_crops_size=90: must be a multiple of student.patch_size=16, such as 80 or 96"),
        ("crops.local_crops_size=9",
         "crops.local_crops_size=9: must be a multiple of student.patch_size=16, such as 16"),
        ("crops.global_crops_size=64",
         "crops.global_crops_size=64: must be at least crops.local_crops_size=96; "
         "swap them, or make the global crops larger"),
        ("student.num_heads=7",
         "student.num_heads=7: must divide student.embed_dim=1024; student.num_heads=8 would"),
        ("crops.local_crops_scale=[0.5, 0.1]",
         "crops.local_crops_scale=[0.5, 0.1]: the first number must not exceed the second; write [0.1, 0.5]"),
        ("ibot.mask_ratio_min_max=[0.5, 0.1]",
         "ibot.mask_ratio_min_max=[0.5, 0.1]: the first number must not exceed the second; write [0.1, 0.5]"),
        ("optim.epochs=5",
         "optim.warmup_epochs=10: the warm-up must not be longer than the run; at most optim.epochs=5"),
        ("optim.min_lr=0.1", "optim.min_lr=0.1: must not exceed optim.base_lr=0.004"),
        ("student.in_chans=5",
         "data.mean=null: ImageNet's is of 3 channels, and student.in_chans=5; measure yours with dino2 datasets stats "
         "DATASET"),
        ("data.channels=[0, DAPI]",
         "student.in_chans=3: data.channels names 2; set student.in_chans to that"),
        ("data.std=[0.2, 0.2, 0.2]",
         "data.mean=null: data.mean and data.std are given together, or neither"),
        # overrides that are none
        ("optim.epochs", "override 'optim.epochs': must have the form group.key=value, such as optim.base_lr=0.001"),
        ("--foo=3", "override '--foo=3': must have the form group.key=value, such as optim.base_lr=0.001"),
        ("train.dataset_path=${oc.env:DATA}",
         "train.dataset_path=${oc.env:DATA}: OmegaConf placeholders are not resolved; write the value itself"),
    ],
)  # fmt: skip
def test_one_line_names_key_value_and_remedy(override: str, message: str) -> None:
    assert refused(override) == [message]


def test_a_lost_letter_or_a_wrong_group_finds_the_key() -> None:
    for key in set(FIELDS) - {"optim.lr"}:
        group, leaf = key.split(".")
        for at in range(len(leaf)):
            misspelt = leaf[:at] + leaf[at + 1 :]
            found = suggest(f"{group}.{misspelt}")
            assert found == key or misspelt == "adamw_beta", (misspelt, found)
        namesakes = {known for known in FIELDS if known.split(".")[1] == leaf}
        elsewhere = "data" if group != "data" else "train"
        assert suggest(f"{elsewhere}.{leaf}") in namesakes
    assert suggest("train.zzzz") is None
    assert suggest("teacher.temp") == "teacher.teacher_temp"


def test_all_problems_at_once() -> None:
    lines = refused("optim.epochs=0", "train.sede=1", "student.patch_size=x")
    assert len(lines) == 3
    assert {line.split("=")[0] for line in lines} == {"optim.epochs", "train.sede", "student.patch_size"}
    assert len(refused("evaluation.knn_period=5")) == 2


def test_no_local_crops_need_no_fitting_size() -> None:
    config = load_config(overrides=["crops.local_crops_number=0", "crops.local_crops_size=97"])
    assert config.crops.local_crops_number == 0


def test_messages_name_the_file_a_value_came_from(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("optim:\n  epochs: 0\n  base_lr: 0\ntrain:\n  output_dir: 2024\n")
    lines = refused("optim.base_lr=-1", config_file=path)
    assert f"optim.epochs=0: must be a whole number, at least 1 (in {path})" in lines
    assert "optim.base_lr=-1: must be a number, above 0" in lines
    assert f"train.output_dir=2024: must be text; write it in quotes (in {path})" in lines


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim:\n  epochs: [1\ntrain:\n", ", line 3: not valid YAML: "),
        ("optim:\n  epochs: 1\n  epochs: 2\n", ", line 3: not valid YAML: the key 'epochs' is given twice"),
        ("just words", ": must hold groups of keys"),
        ("- a\n- b\n", ": must hold groups of keys"),
        ("optim: !!python/object:os.system {}\n", ", line 1: not valid YAML: "),
    ],
)
def test_bad_files_are_named_with_the_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    (line,) = refused(config_file=path)
    assert line.startswith(f"{path}{message}")


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    missing = tmp_path / "missing.yaml"
    assert refused(config_file=missing) == [f"{missing}: no such config file"]
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert refused(config_file=binary) == [f"{binary}: cannot read this config file: it is not UTF-8 text"]
    assert refused(config_file=tmp_path) == [f"{tmp_path}: cannot read this config file: Is a directory"]


def test_preset_and_file_exclude_each_other() -> None:
    assert "--preset and --config-file are both given" in refused(preset="demo", config_file="x.yaml")[0]


# --- deviations from the reference


def test_deviations_follow_the_switches() -> None:
    as_published = [
        "compute_precision.precision=fp16", "train.max_nonfinite=1", "train.max_bad_fraction=0",
        "data.exif_orientation=false", "data.background=drop",
    ]  # fmt: skip
    assert load_config(overrides=as_published).deviations() == []
    switches = {
        "compute_precision.precision": "bf16",
        "compute_precision.grad_scaler": "false",
        "crops.blur_prob": "[1.0, 0.1, 0.5]",
        "train.gradient_accumulation": "2",
        "optim.scaling_rule": "none",
        "train.max_nonfinite": "2",
        "train.max_bad_fraction": "0.5",
        "data.exif_orientation": "true",
        "data.background": "[0, 0, 0]",
    }
    for key, value in switches.items():
        (line,) = load_config(overrides=[*as_published, f"{key}={value}"]).deviations()
        assert line.startswith(f"{key}={value}: ")


@pytest.mark.parametrize(("word", "value"), [("auto", "auto"), ("true", True), ("false", False)])
def test_compile_is_a_word_or_a_truth(word: str, value: object, tmp_path: Path) -> None:
    config = load_config(overrides=[f"train.compile={word}", "train.output_dir=x"])
    config.save(tmp_path / "config.yaml")
    assert config.train.compile is value or config.train.compile == value == "auto"
    assert load_config(config_file=tmp_path / "config.yaml").train.compile == value
    with pytest.raises(ConfigError, match=r"train\.compile=maybe: must be one of auto, true, false"):
        load_config(overrides=["train.compile=maybe"])
