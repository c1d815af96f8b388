"""Loading weights: every layout gives the same bits, and what is no DINOv2 backbone is refused by name."""

import json
import logging
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from processes import run_in_processes
from safetensors.torch import save_file
from torch import Tensor
from weight_samples import (
    PLAIN,
    REGISTERS,
    SAMPLES,
    SWIGLU,
    assert_same_state,
    sample_model,
    sample_state,
    save,
    to_chunked,
)

import dinov2cli
from dinov2cli import distributed
from dinov2cli.errors import WeightsError
from dinov2cli.models.adapt import fit_to_patches
from dinov2cli.models.load import load_backbone_into, load_model, locate, read_weights
from dinov2cli.models.load.layouts import huggingface, timm
from dinov2cli.models.load.locate import locate_together

GOLDEN = Path(__file__).parent / "golden"

# ---- The same weights in every layout --------------------------------------------------------------------------------


def as_teacher(state: dict[str, Tensor]) -> Any:
    heads = {"dino_head.mlp.0.weight": torch.ones(2, 2), "ibot_head.last_layer.weight_v": torch.ones(2, 2)}
    return {"teacher": {**{f"backbone.{name}": tensor for name, tensor in state.items()}, **heads}}


HF_MODULES = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "mlp.weights_out": "mlp.down_proj",
}


def as_hf_modules(state: dict[str, Tensor]) -> Any:
    """The names in memory of transformers 5, which joins no projections."""
    renamed = {}
    for name, tensor in huggingface.to_(state).items():
        for old, new in HF_MODULES.items():
            name = name.replace(old, new)
        if ".mlp.weights_in." in name:
            gate, up = tensor.chunk(2)
            renamed[name.replace("weights_in", "gate_proj")] = gate.clone()
            renamed[name.replace("weights_in", "up_proj")] = up.clone()
        else:
            renamed[name] = tensor
    return renamed


def prefixed(prefix: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda state: {prefix + name: tensor for name, tensor in state.items()}


def as_fsdp(state: dict[str, Tensor]) -> Any:
    return {
        "model": {
            f"teacher.backbone._fsdp_wrapped_module.{name.replace('attn.', 'attn._checkpoint_wrapped_module.')}": tensor
            for name, tensor in state.items()
        }
        | {f"student.backbone._fsdp_wrapped_module.{name}": tensor + 1 for name, tensor in state.items()}
    }


LAYOUTS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "released": dict,
    "teacher checkpoint": as_teacher,
    "chunked teacher": lambda state: as_teacher(to_chunked(state, 2)),
    "DDP": prefixed("module."),
    "compiled": prefixed("_orig_mod.backbone."),
    "whole FSDP state": as_fsdp,
    "transformers file": huggingface.to_,
    "transformers modules": as_hf_modules,
    "transformers classifier": lambda state: {
        **prefixed("dinov2.")(huggingface.to_(state)),
        "classifier.weight": torch.ones(3, 3), "classifier.bias": torch.ones(3),
    },
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sample", SAMPLES)
def test_every_layout_gives_the_same_bits(tmp_path: Path, sample: str, layout: str) -> None:
    state = sample_state(SAMPLES[sample])
    weights = read_weights(save(LAYOUTS[layout](state), tmp_path / "weights.pth"))
    assert_same_state(weights.state, state)
    assert weights.architecture == SAMPLES[sample]
    assert_same_state(load_model(tmp_path / "weights.pth").state_dict(), state)


@pytest.mark.parametrize("sample", SAMPLES)
def test_timm_keeps_all_but_the_mask_token_and_the_class_position(tmp_path: Path, sample: str) -> None:
    model = sample_model(SAMPLES[sample])
    file = save(timm.to_(model.state_dict()), tmp_path / "timm.pth")
    again = load_model(file)
    images = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        torch.testing.assert_close(again(images), model(images), atol=1e-6, rtol=0)
    assert "mask_token" in read_weights(file).report.filled
    assert not again.mask_token.any()


@pytest.mark.parametrize("name", ["plain", "reg4", "swiglu"])
def test_features_equal_timms(tmp_path: Path, name: str) -> None:
    """Weights and features of small models that timm 1.0.31 made (timm needs torchvision, which tests do not have)."""
    golden = {key: torch.from_numpy(value) for key, value in np.load(GOLDEN / f"timm_{name}.npz").items()}
    state = {key[2:]: tensor for key, tensor in golden.items() if key.startswith("w/")}
    model = load_model(save(state, tmp_path / "timm.pth"), num_heads=2)
    with torch.no_grad():
        features = model.forward_features(golden["x"])
    torch.testing.assert_close(features["x_norm_clstoken"], golden["cls"], atol=1e-5, rtol=0)
    torch.testing.assert_close(features["x_norm_patchtokens"], golden["patches"], atol=1e-5, rtol=0)
    assert_same_state(timm.to_(model.state_dict()), state)


@pytest.mark.parametrize("variant", ["mlp", "swiglu", "reg4", "chunked"])
def test_features_equal_the_reference(tmp_path: Path, variant: str) -> None:
    golden = {key: torch.from_numpy(value) for key, value in np.load(GOLDEN / f"vit_{variant}.npz").items()}
    state = {key[2:]: tensor for key, tensor in golden.items() if key.startswith("w/")}
    model = load_model(save(as_teacher(state), tmp_path / "teacher_checkpoint.pth"), num_heads=2)
    for size in ("native", "small", "wide", "tall"):
        with torch.no_grad():
            features = model.forward_features(golden[f"{size}/x"])
        torch.testing.assert_close(features["x_norm_clstoken"], golden[f"{size}/cls"], atol=1e-5, rtol=0)
        torch.testing.assert_close(features["x_norm_patchtokens"], golden[f"{size}/patch"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("changes", [
    {"qkv_bias": False}, {"proj_bias": False}, {"ffn_bias": False}, {"layerscale": None}, {"in_chans": 4},
    {"hidden_dim": 700}, {"patch_size": 16, "img_size": 224}, {"embed_dim": 384, "num_heads": 6},
    {"ffn_layer": "swiglu", "hidden_dim": 344},
])  # fmt: skip
def test_architecture_is_inferred_from_shapes(tmp_path: Path, changes: dict[str, Any]) -> None:
    architecture = PLAIN.changed(**changes)
    state = sample_state(architecture)
    weights = read_weights(save(state, tmp_path / "weights.pth"))
    assert weights.architecture == architecture
    assert_same_state(load_model(tmp_path / "weights.pth").state_dict(), state)


def test_loaded_model_is_in_eval_mode_and_draws_no_random_numbers(tmp_path: Path) -> None:
    file = save(sample_state(PLAIN), tmp_path / "weights.pth")
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    model = dinov2cli.load_model(file)
    assert not model.training
    assert torch.equal(before, torch.random.get_rng_state())


def test_files_of_old_pytorch_are_read(tmp_path: Path) -> None:
    state = sample_state(PLAIN)
    torch.save(state, tmp_path / "weights.pth", _use_new_zipfile_serialization=False)
    assert_same_state(load_model(tmp_path / "weights.pth").state_dict(), state)


def test_half_precision_is_widened_and_reported(tmp_path: Path) -> None:
    state = {name: tensor.bfloat16() for name, tensor in sample_state(PLAIN).items()}
    weights = read_weights(save(state, tmp_path / "weights.pth"))
    assert_same_state(weights.state, {name: tensor.float() for name, tensor in state.items()})
    assert any("bfloat16" in note for note in weights.report.notes)


def test_report_names_what_was_left_out(tmp_path: Path) -> None:
    weights = read_weights(save(as_teacher(sample_state(PLAIN)), tmp_path / "t.pth"))
    report = weights.report
    assert weights.architecture.num_heads == 3
    assert set(report.left_out) == {"dino_head.mlp.0.weight", "ibot_head.last_layer.weight_v"}
    assert "left out: dino_head (1), ibot_head (1)" in str(report)


# ---- What lies beside the weights ------------------------------------------------------------------------------------


def make_run(folder: Path, iterations: list[int], student: dict[str, Any] | None = None) -> Path:
    for i in iterations:
        save(as_teacher(sample_state(PLAIN, seed=i)), folder / "eval" / f"training_{i}" / "teacher_checkpoint.pth")
    if student is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump({"student": student}))
    return folder


def test_run_folder_gives_the_newest_teacher_by_number(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [999, 12499, 2000])
    weights = read_weights(run)
    assert weights.source.iteration == 12499
    assert weights.source.run == run
    assert_same_state(weights.state, sample_state(PLAIN, seed=12499))


def test_what_has_been_found_stays_so_when_a_newer_teacher_appears(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [100])
    source = locate(run)
    make_run(run, [200])
    assert locate(run).iteration == 200
    assert locate(source) is source and read_weights(source).source is source
    assert_same_state(load_model(source).state_dict(), sample_state(PLAIN, seed=100))


def late_member(run: str) -> tuple[int | None, float]:
    """Rank 1 comes when the training has written a newer teacher."""
    if distributed.rank() == 1:
        make_run(Path(run), [200])
    source = locate_together(run)
    return source.iteration, float(load_model(source).cls_token.sum())


def test_all_processes_load_what_the_first_one_has_found(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [100])
    for file in run.glob("eval/*/*.pth"):
        assert locate(file).iteration == 100
    results = run_in_processes(2, late_member, str(run))
    assert results[0] == results[1]
    with pytest.raises(Exception, match="neither a file or folder nor a released name"):
        run_in_processes(2, locate_together, str(tmp_path / "nothing"))


def test_truncated_teacher_is_passed_over_loudly(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", [100, 200])
    newest = run / "eval/training_200/teacher_checkpoint.pth"
    newest.write_bytes(newest.read_bytes()[:-100])
    monkeypatch.setattr(logging.getLogger("dino2"), "propagate", True)
    with caplog.at_level("WARNING", logger="dino2"):
        assert read_weights(run).source.iteration == 100
    assert "training_200" in caplog.text


def test_run_config_says_what_shapes_cannot(tmp_path: Path) -> None:
    student = {"arch": "vit_tiny", "depth": 2, "num_heads": 6, "patch_size": 14, "interpolate_offset": 0.0}
    run = make_run(tmp_path / "run", [10], student)
    for source in (run, run / "eval/training_10/teacher_checkpoint.pth"):
        architecture = read_weights(source).architecture
        assert (architecture.num_heads, architecture.interpolate_offset) == (6, 0.0)


def test_config_of_another_model_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [10], {"arch": "vit_large", "patch_size": 14})
    with pytest.raises(WeightsError, match=r"config\.yaml says embed_dim=1024, but the weights have 192"):
        load_model(run)


def test_transformers_folder_with_shards(tmp_path: Path) -> None:
    state = sample_state(REGISTERS)
    tensors = huggingface.to_(state)
    names = sorted(tensors)
    files = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
    for file, part in files.items():
        save_file({name: tensors[name].contiguous() for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"model_type": "dinov2_with_registers", "num_attention_heads": 6}
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = read_weights(tmp_path)
    assert_same_state(weights.state, state)
    assert weights.architecture.num_heads == 6
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"names b\.safetensors, which is not there"):
        read_weights(tmp_path)


def test_unknown_width_asks_for_the_heads(tmp_path: Path) -> None:
    architecture = PLAIN.changed(embed_dim=48, num_heads=4, hidden_dim=192)
    file = save(sample_state(architecture), tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match="number of attention heads of a model 48 wide"):
        load_model(file)
    assert load_model(file, num_heads=4).num_heads == 4
    (tmp_path / "config.yaml").write_text("student: {embed_dim: 48, depth: 2, num_heads: 4}")
    assert load_model(file).num_heads == 4


# ---- Wrong inputs: each has its message, and none loads --------------------------------------------------------------


class RunsCode:
    """A pickle that would create a file when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("pwned"),))


def text(words: bytes) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        path.write_bytes(words)
        return path

    return write


def saved(content: Callable[[], Any]) -> Callable[[Path], Path]:
    return lambda path: save(content(), path)


def changed(**changes: Any) -> Callable[[Path], Path]:
    """Sample weights with tensors replaced, or with None removed; `__` stands for `.`."""

    def build() -> dict[str, Tensor]:
        state: dict[str, Any] = dict(sample_state(PLAIN))
        for name, value in changes.items():
            state[name.replace("__", ".")] = value
        return {name: tensor for name, tensor in state.items() if tensor is not None}

    return saved(build)


def truncated(path: Path) -> Path:
    save(sample_state(PLAIN), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def truncated_safetensors(path: Path) -> Path:
    path = path.with_suffix(".safetensors")
    save_file(sample_state(PLAIN), path)
    path.write_bytes(path.read_bytes()[:-1000])
    return path


def zip_of_text(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "hello")
    return path


def raw_pickle(path: Path) -> Path:
    path.write_bytes(pickle.dumps(RunsCode()))
    return path


def torchscript(path: Path) -> Path:
    class Doubler(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    torch.jit.trace(Doubler(), torch.ones(2)).save(str(path))
    return path


def hf_folder(model_type: str) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        folder = path.with_suffix("")
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
        tensors = {name: tensor.contiguous() for name, tensor in huggingface.to_(sample_state(PLAIN)).items()}
        save_file(tensors, folder / "model.safetensors")
        return folder

    return write


def fsdp_rank_file(path: Path) -> Path:
    """What the reference saves while training: pickled ShardedTensors of flattened parameters."""
    import torch.distributed as dist
    from torch.distributed._shard.sharded_tensor import Shard, init_from_local_shards
    from torch.distributed._shard.sharded_tensor.metadata import ShardMetadata

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        metadata = ShardMetadata([0], [9], "rank:0/cpu")
        piece = init_from_local_shards([Shard(torch.ones(9), metadata)], 9)
        path = path.with_name("model_0004999.rank_0.pth")
        save({"model": {"student.backbone._fsdp_wrapped_module._flat_param": piece}, "iteration": 4999}, path)
    finally:
        dist.destroy_process_group()
    return path


def half_the_keys() -> dict[str, Tensor]:
    state = sample_state(PLAIN)
    return {name: state[name] for name in sorted(state)[: len(state) // 2]}


def without_blocks(*gone: int) -> dict[str, Tensor]:
    state = sample_state(PLAIN.changed(depth=4))
    return {name: t for name, t in state.items() if not name.startswith(tuple(f"blocks.{i}." for i in gone))}


def supervised() -> dict[str, Tensor]:
    state = sample_state(PLAIN.changed(layerscale=None))
    state["head.weight"] = torch.ones(1000, 192)
    return {name: tensor for name, tensor in state.items() if name != "mask_token"}


WRONG: dict[str, tuple[Callable[[Path], Path | str], str]] = {
    "missing file": (lambda path: path, "neither a file or folder nor a released name; released: dinov2_vits14, "),
    "unknown name": (lambda path: "dinov2_vitz14", "nor a released name"),
    "DINOv3 name": (lambda path: "dinov3_vits16", "licence is accepted by whoever fetches"),
    "DINO name": (lambda path: "dino_vits16", "a model of another generation"),
    "classifier name": (lambda path: "dinov2_vits14_lc", "as a backbone alone it is 'dinov2_vits14'"),
    "empty file": (text(b""), "the file is empty"),
    "text file": (text(b"These are not the weights.\n"), "not a PyTorch file, or cut short"),
    "web page": (text(b"\n<!doctype html><title>404</title>"), "an HTML page"),
    "Git LFS pointer": (text(b"version https://git-lfs.github.com/spec/v1\noid"), "run `git lfs pull`"),
    "picture": (text(b"\xff\xd8\xff\xe0" + bytes(100)), "a JPEG image"),
    "truncated file": (truncated, "not a PyTorch file, or cut short"),
    "truncated safetensors": (truncated_safetensors, "not a complete safetensors file"),
    "some zip archive": (zip_of_text, "a zip archive that torch.save did not write"),
    "pickle that runs code": (saved(lambda: {"teacher": RunsCode()}), r"pathlib.*could run code; refused"),
    "bare pickle that runs code": (raw_pickle, "not a PyTorch file, or cut short|could run code"),
    "TorchScript": (torchscript, "a TorchScript model"),
    "optimizer only": (
        saved(lambda: torch.optim.AdamW(sample_model(PLAIN).parameters()).state_dict()), "an optimizer state without"),
    "optimizer in a checkpoint": (saved(lambda: {"optimizer": {"state": {}}, "iteration": 3}), "an optimizer state"),
    "a list": (saved(lambda: [torch.ones(3)]), "a list instead of a dictionary"),
    "no weights": (saved(lambda: {"epoch": 3}), r"no model weights in it \(it holds epoch\)"),
    "half the keys": (saved(half_the_keys), "not the weights of|incomplete weights"),
    "one tensor missing": (changed(blocks__1__attn__proj__bias=None), r"missing: blocks\.1\.attn\.proj\.bias"),
    "one tensor too many": (changed(blocks__1__attn__extra=torch.ones(3)), r"unknown: blocks\.1\.attn\.extra"),
    "wrong shape": (changed(blocks__1__norm1__weight=torch.ones(5)), r"'blocks\.1\.norm1\.weight' has shape \(5,\)"),
    "registers of another width": (
        changed(register_tokens=torch.ones(1, 4, 100)), r"'register_tokens' has shape \(1, 4, 100\)"),
    "blocks missing inside": (saved(lambda: without_blocks(1, 2)), r"transformer blocks \[1, 2\] are missing"),
    "patch grid not square": (changed(pos_embed=torch.ones(1, 13, 192)), "13 position embeddings are not 1 \\+ a sq"),
    "not a number": (changed(norm__bias=torch.full((192,), float("nan"))), r"not finite numbers .*: norm\.bias"),
    "integers": (changed(norm__bias=torch.ones(192, dtype=torch.int8)), r"weights of type torch\.int8"),
    "DINOv3": (changed(storage_tokens=torch.ones(1, 4, 192), pos_embed=None), "missing: rope_embed.periods"),
    "DINOv3 folder": (hf_folder("dinov3_vit"), "says img_size=224, but the weights have 56"),
    "I-JEPA folder": (hf_folder("ijepa"), "a model of type 'ijepa'; dino2 loads dinov2"),
    "supervised transformer": (saved(supervised), "without mask token and LayerScale"),
    "masked autoencoder": (changed(decoder_embed__weight=torch.ones(3, 3)), r"a masked autoencoder \(MAE\)"),
    "CLIP": (saved(lambda: {"visual.conv1.weight": torch.ones(3), "logit_scale": torch.ones(())}), "a CLIP-like model"),
    "ResNet": (saved(lambda: {"layer1.0.conv1.weight": torch.ones(3)}), "a convolutional network"),
    "LoRA": (saved(lambda: {"blocks.0.attn.qkv.lora_A.weight": torch.ones(3, 3)}), "LoRA adapters without the model"),
    "linear head": (saved(lambda: {"weight": torch.ones(3, 3), "bias": torch.ones(3)}), "a linear head without a back"),
    "projection head": (saved(lambda: {"teacher": {"dino_head.mlp.0.weight": torch.ones(3)}}), "a projection head"),
    "rank file of FSDP": (
        saved(lambda: {"model": {"teacher.backbone._fsdp_wrapped_module._flat_param": torch.ones(9)}}),
        r"one rank's shard of an FSDP training checkpoint.*teacher_checkpoint\.pth"),
    "rank file of the reference": (fsdp_rank_file, r"ShardedTensor.*one rank's file of an FSDP training checkpoint"),
    "pieces of q, k, v": (
        saved(lambda: {
            k: v for k, v in huggingface.to_(sample_state(PLAIN)).items() if "0.attention.attention.key" not in k}),
        "'blocks.0.attn.key.(weight|bias)' is missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_refused_with_its_reason(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make, message = WRONG[case]
    source = make(tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match=message) as caught:
        load_model(source)
    assert str(source) in caught.value.message
    assert "\n" not in caught.value.message
    assert not (tmp_path / "pwned").exists()


def test_empty_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(WeightsError, match="a run that has not written a teacher yet"):
        load_model(tmp_path)
    with pytest.raises(WeightsError, match="no weights in this folder"):
        load_model(tmp_path / "checkpoints")


# ---- Other images: sizes and channels --------------------------------------------------------------------------------


@torch.no_grad()
def test_one_channel_sees_grey_images_as_three_do(tmp_path: Path) -> None:
    file = save(sample_state(PLAIN), tmp_path / "weights.pth")
    grey = torch.randn(2, 1, 56, 56)
    three, one = load_model(file), load_model(file, in_chans=1)
    torch.testing.assert_close(one(grey), three(grey.expand(-1, 3, -1, -1)), atol=1e-5, rtol=0)
    six = load_model(file, in_chans=6)
    colour = torch.randn(2, 3, 56, 56)
    torch.testing.assert_close(six(colour.repeat(1, 2, 1, 1)), three(colour), atol=1e-5, rtol=0)
    with pytest.raises(WeightsError, match="in_chans=0"):
        load_model(file, in_chans=0)


@pytest.mark.parametrize("how", ["mean", "repeat", "zero-new"])
@torch.no_grad()
def test_a_model_of_five_channels_starts_from_three(tmp_path: Path, how: str) -> None:
    """zero-new: the first three see what they saw; mean and repeat: equal channels give what equal colours gave."""
    source = sample_model(PLAIN)
    target = sample_model(PLAIN.changed(in_chans=5), seed=1)
    weights = save(source.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match="image channels 3 instead of 5") as refused:
        load_backbone_into(target, weights)
    assert "student.pretrained_channels=mean (or repeat, zero-new)" in str(refused.value.hint)
    report = load_backbone_into(target, weights, channels=how)
    assert f"patch filters of 3 channels made 5 ({how})" in str(report)
    filters, theirs = target.patch_embed.proj.weight, source.patch_embed.proj.weight
    images = torch.randn(2, 5, 56, 56)
    if how == "zero-new":
        assert torch.equal(filters[:, :3], theirs) and not filters[:, 3:].any()
        torch.testing.assert_close(target(images), source(images[:, :3]), atol=1e-5, rtol=0)
    elif how == "mean":
        torch.testing.assert_close(filters.sum(1), theirs.sum(1), atol=1e-5, rtol=0)
        grey = images[:, :1]
        torch.testing.assert_close(
            target(grey.expand(-1, 5, -1, -1)), source(grey.expand(-1, 3, -1, -1)), atol=1e-4, rtol=0
        )
    else:
        assert torch.equal(filters, theirs[:, [0, 1, 2, 0, 1]] * 0.6)
    with pytest.raises(WeightsError, match="the weights have 3, more than the 2 asked for"):
        load_backbone_into(sample_model(PLAIN.changed(in_chans=2), seed=1), weights, channels="zero-new")


@torch.no_grad()
def test_larger_patches_start_with_filters_that_see_enlarged_patches_as_before(tmp_path: Path) -> None:
    source, target = sample_model(PLAIN), sample_model(PLAIN.changed(patch_size=16, img_size=64), seed=1)
    weights = save(source.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match="patch size 14 instead of 16") as refused:
        load_backbone_into(target, weights)
    assert "student.pretrained_patches=resize makes filters of theirs" in str(refused.value.hint)
    report = load_backbone_into(target, weights, patches="resize")
    assert "patch filters resized from 14 to 16 pixels" in str(report)
    patches = torch.randn(8, 3, 14, 14)  # each an image of one patch
    enlarged = torch.nn.functional.interpolate(patches, size=(16, 16), mode="bilinear", antialias=True)
    torch.testing.assert_close(target.patch_embed(enlarged), source.patch_embed(patches), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_size_policies(tmp_path: Path) -> None:
    file = save(sample_state(REGISTERS), tmp_path / "weights.pth")
    images = torch.randn(1, 3, 45, 60)
    strict, pad, crop = (load_model(file, size_policy=policy) for policy in ("error", "pad", "crop"))
    with pytest.raises(ValueError, match="multiples of patch size 14"):
        strict(images)
    padded = torch.zeros(1, 3, 56, 70)
    padded[..., :45, :60] = images
    torch.testing.assert_close(pad(images), strict(padded), atol=0, rtol=0)
    torch.testing.assert_close(crop(images), strict(images[..., 1:43, 2:58]), atol=0, rtol=0)
    (patches,) = crop.get_intermediate_layers(images, reshape=True)
    assert patches.shape == (1, 192, 3, 4)
    with pytest.raises(WeightsError, match="size_policy='shrink' is unknown; known: error, pad, crop"):
        load_model(file, size_policy="shrink")
    with pytest.raises(ValueError, match="smaller than one patch"):
        fit_to_patches(torch.ones(1, 3, 13, 28), 14, "crop")


# ---- Starting a training from weights --------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", SAMPLES)
def test_backbone_starts_with_the_same_bits(tmp_path: Path, sample: str) -> None:
    state = sample_state(SAMPLES[sample])
    model = sample_model(SAMPLES[sample], seed=1, layerscale=1e-5, drop_path_rate=0.3)
    report = load_backbone_into(model, save(as_teacher(state), tmp_path / "teacher_checkpoint.pth"))
    assert_same_state(model.state_dict(), state)
    assert len(report.left_out) == 2


@pytest.mark.parametrize("sample", SAMPLES)
@torch.no_grad()
def test_resized_backbone_gives_the_sources_features_at_its_new_size(tmp_path: Path, sample: str) -> None:
    source = sample_model(SAMPLES[sample])
    target = sample_model(SAMPLES[sample], seed=1, img_size=126)
    report = load_backbone_into(target, save(source.state_dict(), tmp_path / "weights.pth"))
    images = torch.randn(2, 3, 126, 126)
    torch.testing.assert_close(target(images), source(images), atol=1e-5, rtol=0)
    assert "resized from 4x4 patches (56 pixels) to 9x9 (126 pixels)" in str(report)


@pytest.mark.parametrize(("changes", "message", "hint"), [
    ({"patch_size": 16, "img_size": 64}, "patch size 14 instead of 16", "student.patch_size=14"),
    ({"embed_dim": 384, "num_heads": 6}, "width 192 instead of 384, attention heads 3 instead of 6", "num_heads=3"),
    ({"depth": 3}, "depth 2 instead of 3", "student.depth=2"),
    ({"ffn_layer": "swiglu", "hidden_dim": 512}, "feed-forward layer mlp instead of swiglu", "student.ffn_layer=mlp"),
    ({"num_register_tokens": 4}, "registers 0 instead of 4", "student.num_register_tokens=0"),
    ({"layerscale": None}, "LayerScale true instead of false", "student.patch_size=14"),
])  # fmt: skip
def test_backbone_of_another_architecture_is_refused_in_words(
    tmp_path: Path, changes: dict[str, Any], message: str, hint: str
) -> None:
    model = sample_model(PLAIN.changed(**changes), seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(WeightsError, match=message) as caught:
        load_backbone_into(model, save(sample_state(PLAIN), tmp_path / "weights.pth"))
    assert caught.value.hint is not None and hint in caught.value.hint
    assert_same_state(model.state_dict(), before)


def test_training_from_a_moved_file_does_not_follow_it(tmp_path: Path) -> None:
    """Weights are copied, not mapped: the file may go away afterwards."""
    state = sample_state(SWIGLU)
    file = save(state, tmp_path / "folder" / "weights.pth")
    model = load_model(file)
    shutil.rmtree(file.parent)
    assert_same_state(model.state_dict(), state)
