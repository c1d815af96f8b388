"""Exports: opened in their own ecosystem they give the same features, and come back with the same bits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from tiny_run import write_images
from torch import Tensor, nn
from typer.testing import CliRunner
from weight_samples import (
    PLAIN,
    REGISTERS,
    SAMPLES,
    SWIGLU,
    assert_same_state,
    export_model,
    sample_model,
    sample_state,
    save,
    to_chunked,
)

from dinov2cli.cli.main import app
from dinov2cli.config import ViTConfig
from dinov2cli.errors import Dino2Error, EnvironmentProblem, WeightsError, need
from dinov2cli.export import exporter
from dinov2cli.export.bundle import Bundle, Runner
from dinov2cli.export.exporter import FORMATS, ExportError
from dinov2cli.export.own_formats import ExportableVisionTransformer
from dinov2cli.models.classifier import load_classifier
from dinov2cli.models.load import load_backbone_into, load_model, read_weights
from dinov2cli.models.load.layouts import huggingface, timm
from dinov2cli.models.load.released import RELEASED

NAMES = {"safetensors": "m.safetensors", "official": "m.pth", "hf": "m", "timm": "m.safetensors", "onnx": "m.onnx",
         "torch-export": "m.pt2"}  # fmt: skip
# A model whose architecture no file of tensors shows: an unknown width, and resizing unlike the released models.
ODD = PLAIN.changed(embed_dim=48, num_heads=4, hidden_dim=192, interpolate_offset=0.0)


def source_file(tmp_path: Path, architecture: ViTConfig) -> Path:
    """Weights that say all about themselves."""
    file = tmp_path / "source.safetensors"
    save_file(sample_state(architecture), file, {"dino2.architecture": json.dumps(architecture.model_dump())})
    return file


def head_file(tmp_path: Path, features: int = 2 * 192) -> Path:
    generator = torch.Generator().manual_seed(0)
    head = {"weight": torch.randn(7, features, generator=generator), "bias": torch.randn(7, generator=generator)}
    return save(head, tmp_path / "head.pth")


def installed(package: str) -> bool:
    try:
        need(package)
    except EnvironmentProblem:
        return False
    return True


def test_an_export_is_as_readable_as_any_new_file(tmp_path: Path) -> None:
    source = source_file(tmp_path, REGISTERS)
    (tmp_path / "other").touch()
    for kind, name in (("safetensors", "m.safetensors"), ("official", "m.pth"), ("hf", "m")):
        export_model(source, kind, tmp_path / name)
    files = [tmp_path / "m.safetensors", tmp_path / "m.pth", *(tmp_path / "m").iterdir()]
    assert len(files) == 5
    assert {file.stat().st_mode for file in files} == {(tmp_path / "other").stat().st_mode}


# ---- Round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format_name", ["safetensors", "official", "hf", "timm"])
@pytest.mark.parametrize("sample", [*SAMPLES, "odd"])
def test_round_trip_keeps_every_bit(tmp_path: Path, sample: str, format_name: str) -> None:
    architecture = SAMPLES.get(sample, ODD)
    output = tmp_path / NAMES[format_name]
    export_model(source_file(tmp_path, architecture), format_name, output)
    again = read_weights(output)
    assert_same_state(again.state, sample_state(architecture))
    assert again.architecture == architecture
    assert not list(tmp_path.glob(".*")), "staging left behind"


@pytest.mark.parametrize("format_name", ["official", "hf", "timm"])
def test_round_trip_of_a_chunked_teacher(tmp_path: Path, format_name: str) -> None:
    state = sample_state(REGISTERS)
    teacher = {f"backbone.{name}": tensor for name, tensor in to_chunked(state, 2).items()}
    source = save({"teacher": teacher}, tmp_path / "teacher_checkpoint.pth")
    export_model(source, format_name, tmp_path / NAMES[format_name])
    assert_same_state(read_weights(tmp_path / NAMES[format_name]).state, state)


def test_official_file_is_a_flat_state_dict(tmp_path: Path) -> None:
    export_model(source_file(tmp_path, SWIGLU), "official", tmp_path / "m.pth")
    assert_same_state(torch.load(tmp_path / "m.pth", weights_only=True), sample_state(SWIGLU))


def test_weights_changed_after_a_timm_export_are_taken_as_they_are(tmp_path: Path) -> None:
    """The metadata bring back what timm drops, unless the class token has since been trained on."""
    output = tmp_path / "m.safetensors"
    export_model(source_file(tmp_path, REGISTERS), "timm", output)
    from safetensors import safe_open

    with safe_open(output, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(output)
    tensors["cls_token"] += 1
    save_file(tensors, output, metadata)
    state = read_weights(output).state
    assert torch.equal(state["cls_token"], tensors["cls_token"])
    assert not state["pos_embed"][:, 0].any()


def test_timm_models_are_named_and_their_differences_given() -> None:
    for name, expected in (("dinov2_vits14", "vit_small_patch14_dinov2"),
                           ("dinov2_vitg14_reg", "vit_giant_patch14_reg4_dinov2")):  # fmt: skip
        assert timm.model_of(RELEASED[name].architecture) == (expected, {"num_classes": 0, "img_size": 518})
    name, arguments = timm.model_of(SWIGLU.changed(num_register_tokens=2))
    assert name == "vit_giant_patch14_reg4_dinov2"
    assert arguments.pop("reg_tokens") == 2
    assert arguments == {"num_classes": 0, "img_size": 56, "embed_dim": 192, "depth": 2, "num_heads": 3}


# ---- Features in the other ecosystem ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", SAMPLES)
@torch.no_grad()
def test_transformers_own_model_gives_our_features(tmp_path: Path, sample: str) -> None:
    """transformers' random weights, saved by transformers itself, at the native size."""
    transformers = pytest.importorskip("transformers")
    kind = "Dinov2WithRegisters" if sample == "registers" else "Dinov2"
    config = getattr(transformers, kind + "Config")(
        hidden_size=192, num_hidden_layers=2, num_attention_heads=3, image_size=56, patch_size=14,
        use_swiglu_ffn=sample == "swiglu", initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = getattr(transformers, kind + "Model")(config).eval()
    theirs.save_pretrained(tmp_path / "hf")
    ours = load_model(tmp_path / "hf")
    images = torch.randn(2, 3, 56, 56)
    tokens = theirs(images).last_hidden_state
    features = ours.forward_features(images)
    torch.testing.assert_close(features["x_norm_clstoken"], tokens[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(
        features["x_norm_patchtokens"], tokens[:, 1 + ours.num_register_tokens :], atol=1e-5, rtol=0
    )
    # And back: the file that transformers wrote, key for key.
    assert_same_state(huggingface.to_(ours.state_dict()), load_file(tmp_path / "hf" / "model.safetensors"))


@pytest.mark.parametrize("sample", SAMPLES)
def test_transformers_opens_the_export(tmp_path: Path, sample: str) -> None:
    pytest.importorskip("transformers")
    result = export_model(source_file(tmp_path, SAMPLES[sample]), "hf", tmp_path / "m")
    native, other = result.comparisons
    assert native.binding and native.difference < 1e-5
    # With registers transformers resizes position embeddings as DINOv2 does; without, the offset is missing there.
    assert other.binding == (sample == "registers")
    assert other.difference < 1e-5 if other.binding else other.difference > 1e-5
    assert any("offset 0.1" in note for note in result.notes) != other.binding


def test_transformers_classifies_with_the_head(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    source = source_file(tmp_path, REGISTERS.changed(depth=4))
    result = export_model(source, "hf", tmp_path / "m", linear_head=head_file(tmp_path))
    # Scores reach 40: the difference is one of rounding, a millionth of the largest.
    assert all(comparison.difference < 1e-6 * comparison.scale for comparison in result.comparisons)
    with pytest.raises(WeightsError, match="this linear head has 960 inputs instead of 384"):
        export_model(source, "hf", tmp_path / "n", linear_head=head_file(tmp_path, 5 * 192))


@pytest.mark.skipif(not installed("timm"), reason="timm needs torchvision; test_load compares with its recordings")
@pytest.mark.parametrize("sample", SAMPLES)
def test_timm_opens_the_export(tmp_path: Path, sample: str) -> None:
    result = export_model(source_file(tmp_path, SAMPLES[sample]), "timm", tmp_path / "m.safetensors")
    assert result.comparisons[0].difference < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("format_name", ["onnx", "torch-export"])
@pytest.mark.parametrize("sample", SAMPLES)
def test_graphs_give_our_features_at_any_size_and_batch(tmp_path: Path, sample: str, format_name: str) -> None:
    if format_name == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    output = tmp_path / NAMES[format_name]
    architecture = SAMPLES[sample].changed(depth=4 if sample == "registers" else 2)
    head = head_file(tmp_path, 5 * 192) if sample == "registers" else None
    source = source_file(tmp_path, architecture)
    result = export_model(source, format_name, output, linear_head=head)
    assert [comparison.shape for comparison in result.comparisons] == [(1, 3, 56, 56), (2, 3, 28, 56)]
    assert all(comparison.difference < 1e-4 for comparison in result.comparisons)
    linear = load_classifier(source, head).linear_head if head else None
    bundle = Bundle(sample_state(architecture), architecture, sample_model(architecture), linear)
    run = FORMATS[format_name].open(bundle, output)
    for shape in ((3, 28, 28), (1, 112, 42), (5, 70, 154)):
        assert exporter.compare(bundle, run, shape).difference < 1e-4


@pytest.mark.slow
def test_onnx_of_one_size_declares_what_it_takes(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    result = export_model(source_file(tmp_path, PLAIN), "onnx", tmp_path / "m.onnx", image_size="28x70", opset=20)
    model = onnx.load(tmp_path / "m.onnx")
    onnx.checker.check_model(model)
    assert [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")] == [20]
    assert [entry.name for entry in model.graph.input] == ["images"]
    assert [entry.name for entry in model.graph.output] == ["cls", "patches"]
    batch, *others = model.graph.input[0].type.tensor_type.shape.dim
    assert batch.dim_param and [side.dim_value for side in others] == [3, 28, 70]
    assert json.loads({p.key: p.value for p in model.metadata_props}["dino2.architecture"]) == PLAIN.model_dump()
    if installed("onnxruntime"):
        assert [comparison.shape for comparison in result.comparisons] == [(1, 3, 28, 70), (3, 3, 28, 70)]


@pytest.mark.slow
def test_onnx_of_a_large_model_keeps_its_weights_in_a_file_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.setattr("dinov2cli.export.own_formats._EXTERNAL_DATA_ABOVE", 0)  # instead of 1.8 GB
    result = export_model(source_file(tmp_path, PLAIN.changed(depth=1)), "onnx", tmp_path / "out" / "m.onnx")
    graph, data = tmp_path / "out" / "m.onnx", tmp_path / "out" / "m.onnx.data"
    assert set(result.files) == {str(graph), str(data)}
    bundle = Bundle(sample_state(PLAIN.changed(depth=1)), PLAIN, sample_model(PLAIN.changed(depth=1)))
    assert exporter.compare(bundle, FORMATS["onnx"].open(bundle, graph), (1, 56, 56)).difference < 1e-4


def test_image_size_must_fit_the_patches(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="image size 30x70: both must be multiples of patch size 14"):
        export_model(source_file(tmp_path, PLAIN), "torch-export", tmp_path / "m.pt2", image_size="30x70")


@pytest.mark.parametrize("architecture", [PLAIN, REGISTERS, PLAIN.changed(interpolate_antialias=True), ODD])
@torch.no_grad()
def test_position_embeddings_by_matrices_equal_pytorchs_resize(architecture: ViTConfig) -> None:
    model = sample_model(architecture)
    graph = ExportableVisionTransformer(architecture)
    graph.load_state_dict(model.state_dict())
    for size in ((56, 56), (28, 28), (14, 70), (112, 42), (518, 518), (238, 28)):
        theirs, ours = (each.interpolate_pos_encoding(each.cls_token, *size) for each in (model, graph))
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


# ---- Failing leaves nothing ------------------------------------------------------------------------------------------


def perturbed(open_format: Callable[[Bundle, Path], Runner]) -> Callable[[Bundle, Path], Runner]:
    def open_and_spoil(bundle: Bundle, path: Path) -> Runner:
        run = open_format(bundle, path)

        def spoiled(images: Tensor) -> dict[str, Tensor]:
            return {name: tensor + 0.01 for name, tensor in run(images).items()}

        return spoiled

    return open_and_spoil


@pytest.mark.parametrize("format_name", ["safetensors", "official", "torch-export"])
def test_an_export_that_differs_leaves_no_file(
    tmp_path: Path, format_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = FORMATS[format_name]
    monkeypatch.setitem(FORMATS, format_name, chosen._replace(open=perturbed(chosen.open)))
    folder = tmp_path / "out"
    with pytest.raises(ExportError, match=r"differ by 1\.0.e-02 on images \[1, 3, 56, 56\].*nothing was written"):
        export_model(source_file(tmp_path, PLAIN), format_name, folder / NAMES[format_name])
    assert list(folder.iterdir()) == []


def test_an_existing_output_is_kept_unless_overwritten(tmp_path: Path) -> None:
    output = tmp_path / "m.pth"
    output.write_text("precious")
    with pytest.raises(WeightsError, match="exists; --overwrite replaces it"):
        export_model(source_file(tmp_path, PLAIN), "official", output)
    assert output.read_text() == "precious"
    export_model(source_file(tmp_path, ODD), "official", output, overwrite=True)
    assert read_weights(output).architecture == ODD
    # What the file of the odd model needed beside it would mislead about this one.
    export_model(source_file(tmp_path, PLAIN), "official", output, overwrite=True)
    assert read_weights(output).architecture == PLAIN


def test_a_folder_of_other_things_is_never_replaced(tmp_path: Path) -> None:
    photos = write_images(tmp_path / "photos", classes=1, per_class=1)
    with pytest.raises(WeightsError, match=r"photos holds what no export has written \(class0\)"):
        export_model(source_file(tmp_path, PLAIN), "hf", photos, overwrite=True)
    assert (photos / "class0" / "0.png").is_file()
    for _ in range(2):  # what is an export is replaced
        export_model(source_file(tmp_path, PLAIN), "hf", tmp_path / "hf", overwrite=True)


def test_a_head_in_the_way_stops_the_export_before_anything_is_moved(tmp_path: Path) -> None:
    (tmp_path / "m_linear_head.pth").write_text("precious")
    with pytest.raises(WeightsError, match=r"m_linear_head\.pth exists"):
        export_model(source_file(tmp_path, PLAIN), "official", tmp_path / "m.pth", linear_head=head_file(tmp_path))
    assert not (tmp_path / "m.pth").exists()


@pytest.mark.parametrize("format_name", ["safetensors", "official"])
@torch.no_grad()
def test_a_head_goes_beside_the_backbone(tmp_path: Path, format_name: str) -> None:
    source, head = source_file(tmp_path, PLAIN.changed(depth=4)), head_file(tmp_path, 5 * 192)
    output = tmp_path / "out" / NAMES[format_name]
    result = export_model(source, format_name, output, linear_head=head)
    written = output.with_name(f"m_linear4_head{output.suffix}")
    told = {"safetensors": [], "official": [f"{output}.dino2.yaml"]}[format_name]
    assert set(result.files) == {str(output), str(written), *told}
    images = torch.randn(1, 3, 56, 56)
    assert torch.equal(load_classifier(output, written)(images), load_classifier(source, head)(images))


@pytest.mark.parametrize(("format_name", "output", "changes", "message"), [
    ("onnx", "m.pth", {}, r"format onnx writes a file that ends in \.onnx"),
    ("timm", "m.pth", {}, r"format timm writes a file that ends in \.safetensors"),
    ("hf", "m", {"layerscale": None}, "transformers cannot hold this model: .* always have LayerScale"),
    ("hf", "m", {"hidden_dim": 700}, "an MLP of 700 is not a whole multiple of the width 192"),
    ("hf", "m", {"ffn_bias": False}, "always have a bias"),
    ("timm", "m.safetensors", {"ffn_bias": False}, "timm has one switch for the biases"),
])  # fmt: skip
def test_what_a_format_cannot_hold_is_refused(
    tmp_path: Path, format_name: str, output: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(WeightsError, match=message):
        export_model(source_file(tmp_path, PLAIN.changed(**changes)), format_name, tmp_path / "out" / output)
    assert not (tmp_path / "out" / output).exists()


def test_an_unknown_format_is_refused_and_the_known_ones_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="'safetensors', 'official', 'hf', 'timm', 'onnx' or 'torch-export'"):
        export_model(source_file(tmp_path, PLAIN), "gguf", tmp_path / "m.gguf")


def test_a_head_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    head = save({"weight": torch.ones(3, 100), "bias": torch.ones(3)}, tmp_path / "head.pth")
    with pytest.raises(WeightsError, match="100 inputs does not fit a backbone 192 wide"):
        export_model(source_file(tmp_path, PLAIN), "official", tmp_path / "m.pth", linear_head=head)
    with pytest.raises(WeightsError, match="it cannot go along"):
        export_model(source_file(tmp_path, PLAIN), "timm", tmp_path / "m.safetensors", linear_head=head_file(tmp_path))


def test_an_ecosystem_that_is_not_installed_is_named() -> None:
    with pytest.raises(EnvironmentProblem, match=r"pip install 'dinov2cli\[export\]'"):
        need("a_package_that_does_not_exist")


# ---- The command, and a training from an export ----------------------------------------------------------------------


def test_command_prints_the_largest_difference(tmp_path: Path) -> None:
    source = source_file(tmp_path, PLAIN)
    command = ["export", str(source), "--format", "official", "--output", str(tmp_path / "m.pth")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "dino2, 1 x 56x56: largest difference 0.00e+00" in result.stdout
    result = CliRunner().invoke(app, [*command, "--json", "--overwrite"])
    assert json.loads(result.stdout)["comparisons"][0]["difference"] == 0.0
    result = CliRunner().invoke(app, [*command, "--overwrite", "--image-size", "14x14x14"])
    assert isinstance(result.exception, Dino2Error) and "--image-size 14x14x14: give" in str(result.exception)


@pytest.mark.parametrize("format_name", ["official", "hf", "timm"])
@torch.no_grad()
def test_a_backbone_started_from_an_export_gives_the_sources_features(tmp_path: Path, format_name: str) -> None:
    source = source_file(tmp_path, SWIGLU)
    export_model(source, format_name, tmp_path / NAMES[format_name])
    model = sample_model(SWIGLU, seed=1, layerscale=1e-5)
    load_backbone_into(model, tmp_path / NAMES[format_name])
    images = torch.randn(2, 3, 56, 56)
    assert torch.equal(model(images), load_model(source)(images))


def test_head_is_a_linear_layer(tmp_path: Path) -> None:
    assert isinstance(load_classifier(source_file(tmp_path, PLAIN), head_file(tmp_path)).linear_head, nn.Linear)
