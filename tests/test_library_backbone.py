"""A student that is a network of another library: what it learns, how it resumes, what is refused, who opens it."""

import json
import re
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dense_sets import write_depths, write_masks
from PIL import Image
from test_pca_video import write_video
from tiny_run import LIBRARY, TINY, metrics_of, write_images, write_teacher

from dinov2cli.bench.train import synthetic_batch
from dinov2cli.cli.main import main
from dinov2cli.config import Config, load_config
from dinov2cli.config.library import LibraryConfig
from dinov2cli.config.schema import Student
from dinov2cli.data.transforms import EvalTransform
from dinov2cli.errors import ConfigError, Dino2Error, EnvironmentProblem, WeightsError
from dinov2cli.eval.reports import read_results
from dinov2cli.launch.training import resolve_config
from dinov2cli.models.libraries import quiet_transformers, settle
from dinov2cli.models.library_backbone import LibraryBackbone, size_of
from dinov2cli.models.load import load_model, locate
from dinov2cli.requests.base import run
from dinov2cli.requests.export import ExportRequest
from dinov2cli.requests.train import TrainRequest
from dinov2cli.start import train
from dinov2cli.train.batch_norm import running_averages
from dinov2cli.train.cost import estimate, step_flops
from dinov2cli.train.objective import SSLMetaArch
from dinov2cli.train.parameter_groups import parameter_groups
from dinov2cli.train.trainer import Trainer

transformers = pytest.importorskip("transformers")
CPU = torch.device("cpu")
VALUES = {"iteration": 0, "teacher_temp": 0.05}
each_kind = pytest.mark.parametrize("kind", LIBRARY)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data` and a run `teacher` with heads."""
    folder = tmp_path_factory.mktemp("place")
    write_images(folder / "data")
    write_teacher(folder)
    return folder


def words(place: Path, kind: str, *more: str) -> list[str]:
    paths = [f"distillation.teacher={place / 'teacher'}", f"train.dataset_path={place / 'data'}"]
    return [*TINY, *LIBRARY[kind], *paths, *more]


def resolved(place: Path, output: Path, *more: str) -> Config:
    typed = tuple(word for word in (*TINY, *more) if "prototypes" not in word)
    request = TrainRequest(data=str(place / "data"), output_dir=output, teacher=str(place / "teacher"), overrides=typed)
    return resolve_config(request)


@pytest.fixture(scope="module")
def trained(place: Path) -> Path:
    """The run of a ResNet, from words to its end."""
    config = resolved(place, place / "run", *LIBRARY["resnet"], "optim.epochs=1", "optim.warmup_epochs=0")
    train(config, TrainRequest(cpu=True))
    assert load_config(config_file=place / "run" / "config.yaml") == config
    said = config.student.backbone_config
    assert said["hidden_act"] == "relu" and said["depths"] == [1, 1], (
        "what transformers does by default is said for good"
    )
    return place / "run"


@each_kind
def test_all_of_it_learns(place: Path, kind: str) -> None:
    """Every weight has a gradient, norms and biases do not decay, and the plan's numbers are those of the network."""
    config = load_config(overrides=words(place, kind))
    objective = SSLMetaArch(config).train()
    losses = objective(synthetic_batch(config), VALUES, torch.Generator().manual_seed(0))
    losses.total.backward()
    student = objective.student
    without = [name for name, each in student.named_parameters() if not each.requires_grad]
    assert without == [name for name, each in student.named_parameters() if each.grad is None]
    assert len(without) == 2 * (kind == "swin"), "a norm of transformers' that no feature depends on"
    assert losses.logged["ibot_loss"] > 0 and losses.logged["dino_local_crops_loss"] > 0
    names = {parameter: name for name, parameter in student.named_parameters()}
    decays = {names[each]: group["wd_multiplier"] for group in parameter_groups(student, config)
              for each in group["params"]}  # fmt: skip
    for name, factor in decays.items():
        weighs = student.get_parameter(name).ndim > 1 and "bias" not in name
        assert factor == float(weighs), name
    memory = estimate(config, world_size=1, sharding="none", precision="bf16")
    assert memory.parameters == pytest.approx(4e-9 * sum(each.numel() for each in student.parameters()))
    flops = step_flops(config)
    assert 0 < flops.passes["frozen_teacher"] < flops.step
    assert size_of(config.backbone()) == sum(each.numel() for each in student.backbone.parameters())


@each_kind
def test_features_are_the_pooled_map_and_the_map_on_the_teachers_grid(kind: str) -> None:
    config = load_config(overrides=[*TINY, *LIBRARY[kind], "distillation.teacher=none"]).backbone()
    assert isinstance(config, LibraryConfig)
    model = LibraryBackbone(config).eval()
    images = torch.randn(2, 3, 48, 32)
    features = model.forward_features(images)
    found = model.model(pixel_values=images).feature_maps[-1]
    torch.testing.assert_close(features["x_norm_clstoken"], found.mean((2, 3)))
    wanted = torch.nn.functional.interpolate(found, size=(6, 4), mode="bilinear")
    torch.testing.assert_close(features["x_norm_patchtokens"], wanted.flatten(2).transpose(1, 2))
    (patches, cls), = model.get_intermediate_layers(images, n=1, return_class_token=True)  # fmt: skip
    assert torch.equal(cls, model.class_tokens(images)) and torch.equal(patches, features["x_norm_patchtokens"])
    indices = torch.tensor([0, 23, 24])
    both, rows = model.forward_tokens([images, images[:, :, :16, :16]], [None, None], indices)
    assert torch.equal(both[:2], cls) and len(both) == 4
    assert torch.equal(rows, patches.flatten(0, 1)[indices])


@pytest.mark.parametrize("kind", ["resnet", "convnext"])
def test_a_run_goes_on_as_if_it_had_not_stopped(place: Path, tmp_path: Path, kind: str) -> None:
    """To the last bit, running averages and what layers draw by themselves included."""
    more = ["optim.epochs=2"]
    if kind == "convnext":
        more.append("student.backbone_config.drop_path_rate=0.5")
    states = []
    for name, stops in (("whole", [8]), ("parts", [3, 8])):
        for stop in stops:
            config = load_config(overrides=words(place, kind, f"train.output_dir={tmp_path / name}", *more))
            trainer = Trainer(config, CPU)
            trainer.total = stop
            torch.rand(stop)  # what others draw has no part in it
            trainer.train()
        states.append(trainer.state())
    one, other = (state["model"] for state in states)
    assert one.keys() == other.keys() and (("running_var" in "".join(one)) == (kind == "resnet"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "parts")


def test_batch_norms_averages_follow_and_bear_a_step_that_is_left_out(place: Path, tmp_path: Path) -> None:
    config = load_config(overrides=words(place, "resnet", f"train.output_dir={tmp_path}"))
    trainer = Trainer(config, CPU)
    networks, batch = trainer.objective.networks, synthetic_batch(config)
    first = [each.clone() for each in running_averages(networks.teacher.backbone)]
    trainer.step(0, [batch])
    student = [each.clone() for each in running_averages(networks.student.backbone)]
    momentum = trainer.step.schedules.at(0)["momentum"]
    for before, own, now in zip(first, student, running_averages(networks.teacher.backbone), strict=True):
        assert not torch.equal(own, before)
        torch.testing.assert_close(now, momentum * before + (1 - momentum) * own)
    weights = [each.clone() for each in networks.student.parameters()]
    spoilt = replace(batch, masks_weight=batch.masks_weight * float("nan"))
    assert not trainer.step(1, [spoilt]).losses.total.isfinite()
    left = zip(student, running_averages(networks.student.backbone), strict=True)
    assert all(torch.equal(before, now) for before, now in left)
    assert all(torch.equal(before, now) for before, now in zip(weights, networks.student.parameters(), strict=True))


SETS = "--train-dataset DATA --val-dataset DATA --device cpu --no-cache"
DENSE = "--image-size 32 --batch-size 4 --iterations 20 --device cpu --no-cache --num-workers 0"
COMMANDS = {
    "info RUN": "",
    f"eval knn RUN {SETS} --nb-knn 2 --baselines": "",
    f"eval logreg RUN {SETS} --max-train-iters 5": "",
    f"eval linear RUN {SETS} --epochs 1 --epoch-length 2 --batch-size 4": "",
    f"eval retrieval RUN {SETS}": "",
    f"eval segmentation RUN --data MASKS {DENSE} --learning-rates 0.03 --baselines": "",
    f"eval segmentation RUN --data MASKS {DENSE} --head HEAD --inference ms": "",
    f"eval depth RUN --data DEPTHS {DENSE}": "",
    "segment PICTURE OUT/s.png --head HEAD --device cpu": "",
    "depth PICTURE OUT/d.png --head OTHER --device cpu": "",
    "embed RUN --data DATA --output OUT/f.npy --device cpu --no-cache": "",
    "embed RUN --data DATA --output OUT/f.parquet --tiles 16 --device cpu --no-cache": "",
    "pca-image PICTURE OUT/p.png --model RUN --resolution 4 --device cpu": "",
    "pca-video CLIP OUT/p.mp4 --model RUN --resolution 4 --device cpu": "",
    "attention PICTURE OUT/a.png --model RUN --device cpu": "ARCH: attention maps are of vision transformers",
    "search build OUT/i --model RUN --data DATA --device cpu": "",
    "search query OUT/i PICTURE --top 1 --device cpu --json": "",
    "curate OUT/c --data DATA --model RUN --duplicates 0.95 --device cpu --dry-run": "",
    "curate OUT/c --data DATA --model RUN --duplicates 0.95 --device cpu": "",
    "export RUN --format safetensors --output OUT/x.safetensors": "",
    "export RUN --format official --output OUT/x.pth": "format official does not hold ARCH",
    "export RUN --format onnx --output OUT/x.onnx": "format onnx does not hold ARCH",
    "export RUN --format torch-export --output OUT/x.pt2": "format torch-export does not hold ARCH",
    "export RUN --format safetensors --output OUT/y.safetensors --image-size 32": "takes images of any size as it is",
    "results RUN": "",
    "status RUN": "",
}
"""Every command that takes a checkpoint, and what it says where it refuses such a one."""


def try_commands(run: Path, place: Path, folder: Path) -> None:
    """All of them with the run of a library's student, whose `place` has `data`; raises where one does otherwise."""
    folder.mkdir(exist_ok=True)
    model, newest = load_model(run), locate(run).files[0].parent
    picture = next((place / "data" / "class0").glob("*.png"))
    assert isinstance(model, LibraryBackbone) and not model.training
    places = {
        "RUN": run, "DATA": place / "data", "PICTURE": picture, "CLIP": write_video(folder / "clip.mp4", 2),
        "MASKS": write_masks(folder / "masks"), "DEPTHS": write_depths(folder / "depths"), "OUT": folder,
        "HEAD": newest / "segmentation" / "best_head.pth", "OTHER": newest / "depth" / "best_head.pth",
    }  # fmt: skip
    for command, refusal in COMMANDS.items():
        with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err, pytest.raises(SystemExit) as end:
            main(re.sub(r"\b[A-Z]+\b", lambda found: str(places[found[0]]), command).split())
        assert (end.value.code or 0) == 2 * bool(refusal), (command, err.getvalue())
        assert refusal.replace("ARCH", model.config.arch) in err.getvalue(), command
        if command.startswith("search query"):
            assert str(picture) in out.getvalue(), "a picture is the most alike to itself"
    transform = EvalTransform.at(32)
    shown = [transform(np.array(Image.open(file))) for file in sorted((place / "data").rglob("*.png"))]
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(np.load(folder / "f.npy")), model(torch.stack(shown)))


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind == "resnet" else pytest.mark.long) for kind in LIBRARY]
)
def test_every_command_reads_it_or_says_that_it_does_not(
    kind: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DINO2_CACHE", str(tmp_path / "cache"))
    config = resolved(place, tmp_path / "run", *LIBRARY[kind], "optim.epochs=1", "optim.warmup_epochs=0")
    train(config, TrainRequest(cpu=True))
    try_commands(tmp_path / "run", place, tmp_path)
    rows = {result.task: result.rows[0] for result in reversed(read_results(tmp_path / "run"))}
    assert rows["knn"].top1 > 80, "two textures"
    assert rows["segmentation"].scores["aAcc %"] > 60 and rows["depth"].scores["RMSE m"] < 1


def test_what_is_of_vision_transformers_alone_is_refused(place: Path, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="size_policy: hf:resnet is no vision transformer"):
        load_model(trained, size_policy="pad")
    with pytest.raises(WeightsError, match="num_heads, attention_backend: hf:resnet is no vision transformer"):
        load_model(trained, num_heads=2, attention_backend="sdpa")
    with pytest.raises(WeightsError, match="hf:resnet; a teacher is a vision transformer"):
        resolve_config(TrainRequest(data=str(place / "data"), output_dir=tmp_path / "next", teacher=str(trained)))
    request = TrainRequest(data=str(place / "data"), output_dir=tmp_path / "vit", overrides=tuple(TINY),
                           init_from=str(trained), cpu=True)  # fmt: skip
    with pytest.raises(WeightsError, match="cannot start this model: its weights are of hf:resnet"):
        train(resolve_config(request), request)


@pytest.mark.parametrize("kind", ["resnet", "convnext", "convnextv2", "swin", "focalnet"])
def test_an_architecture_needs_no_arguments(kind: str) -> None:
    """Some of transformers' own usual values are of a type that its networks do not take."""
    settled = settle(f"hf:{kind}", {}, 3)
    assert settled.arguments == settle(f"hf:{kind}", json.loads(json.dumps(settled.arguments)), 3).arguments


def test_exports_open_in_the_library_alone_and_here(trained: Path, tmp_path: Path) -> None:
    ours, images = load_model(trained), torch.randn(2, 3, 40, 56)
    for name, output in (("hf", tmp_path / "hf"), ("safetensors", tmp_path / "ours.safetensors")):
        result = run(ExportRequest(checkpoint=str(trained), format=name, output=output))
        assert len(result.comparisons) == 2 and all(each.difference < 1e-5 for each in result.comparisons)
        again = load_model(output)
        assert torch.equal(again(images), ours(images)) and again.config == ours.config
    for opener in (transformers.ResNetBackbone, transformers.AutoModel):
        model, info = opener.from_pretrained(tmp_path / "hf", output_loading_info=True)
        assert not any(info.values())
        found = model.eval()(pixel_values=images)
        pooled = found.feature_maps[-1].mean((2, 3)) if "feature_maps" in found else found.pooler_output[..., 0, 0]
        torch.testing.assert_close(pooled, ours(images))
    for name, output in (
        ("timm", "x.safetensors"),
        ("official", "x.pth"),
        ("onnx", "x.onnx"),
        ("torch-export", "x.pt2"),
    ):
        with pytest.raises(WeightsError, match=f"format {name} does not hold hf:resnet; safetensors and hf do"):
            run(ExportRequest(checkpoint=str(trained), format=name, output=tmp_path / output))
        assert not (tmp_path / output).exists()


def test_a_folder_with_weights_is_gone_on_from(place: Path, tmp_path: Path) -> None:
    """Of a classifier as others have trained it: its weights are where the student begins; the folder may go."""
    arguments = {"depths": [1, 1], "hidden_sizes": [16, 24], "num_stages": 2, "drop_path_rate": 0.1}
    theirs = transformers.ConvNextForImageClassification(transformers.ConvNextConfig(**arguments))
    with quiet_transformers():
        theirs.save_pretrained(tmp_path / "theirs")
    plain = [word for word in LIBRARY["convnext"] if "backbone_config" not in word and "arch" not in word]
    more = [*plain, f"student.arch=hf:{tmp_path / 'theirs'}", "optim.epochs=1", "optim.warmup_epochs=0",
            "optim.base_lr=1e-9", "optim.min_lr=0"]  # fmt: skip
    config = resolved(place, tmp_path / "run", *more)
    assert config.student.arch == "hf:convnext" and config.student.backbone_config["hidden_sizes"] == [16, 24]
    assert config.student.backbone_config["drop_path_rate"] == config.student.drop_path_rate == 0.0, "as it was typed"
    assert config.student.pretrained_weights == str(tmp_path / "theirs")
    train(config, TrainRequest(cpu=True))
    name = "encoder.stages.1.layers.0.pwconv1.weight"
    ours = load_model(tmp_path / "run").model.state_dict()
    torch.testing.assert_close(ours[name], theirs.state_dict()[f"convnext.{name}"])
    (tmp_path / "theirs" / "model.safetensors").rename(tmp_path / "gone")
    assert load_model(tmp_path / "run").embed_dim == 24


REFUSED = [
    (["student.arch=hf:resnet", "distillation.teacher="], r"student.arch=hf:resnet: can only be distilled"),
    (["student.depth=3"], r"student.depth=3: is of vision transformers"),
    (["student.train=last:2"], r"student.train=last:2: is of vision transformers"),
    (["gram.use_loss=true", "gram.it_load_ema_teacher=1"], r"gram.use_loss=true: Gram anchoring is of vision"),
    (["train.activation_checkpointing=selective"], r"train.activation_checkpointing=selective: is of vision"),
    (["student.arch=hf:resnett"], r"student.arch=hf:resnett: no architecture of transformers is called so"),
    (["student.arch=hf:bert"], r"student.arch=hf:bert.*AutoBackbone"),
    (["student.backbone_config.depht=3"], r"student.backbone_config.depht: hf:resnet has no such argument"),
    (["student.backbone_config.layer_type=deep"], r"student.backbone_config=.*transformers makes no backbone of this"),
    (["student.drop_path_rate=0.2"], r"student.drop_path_rate=0.2: hf:resnet has no stochastic depth"),
    (["student.arch=timm:resnet18", "student.backbone_config={}"], r"timm does not import.*pip install timm"),
]  # fmt: skip


@pytest.mark.parametrize(("more", "message"), REFUSED, ids=[words[0] for words, _ in REFUSED])
def test_what_cannot_be_is_refused(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], message: str
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    if more[0] == "student.arch=hf:bert":
        more = [*more, "student.backbone_config={}"]
    with pytest.raises(Dino2Error, match=message):
        if "distillation.teacher=" in more:
            load_config(overrides=[*TINY, *LIBRARY["resnet"], *more])
        resolved(place, tmp_path / "run", *LIBRARY["resnet"], *more)
    assert not (tmp_path / "run").exists()


def test_without_the_library_one_message_says_what_to_install(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(EnvironmentProblem, match=r"transformers does not import .*pip install 'dinov2cli\[export\]'"):
        resolved(place, tmp_path / "run", *LIBRARY["resnet"])


def test_the_name_of_an_architecture_replaces_the_model_of_a_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a preset says of its vision transformer goes; what is typed beside the name stays, and is refused."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "resnet").mkdir()
    assert settle("hf:resnet", {}, 3).folder is None, "a folder that happens to be called so is not meant"
    config = load_config("demo", overrides=["distillation.teacher=x", "student.arch=hf:resnet"])
    defaults = {key: field.default for key, field in Student.model_fields.items()}
    assert config.student.layerscale == defaults["layerscale"] and config.student.embed_dim is None
    assert config.student.patch_size == 8 and config.student.drop_path_rate == 0.0, "these are of any student"
    config.save(tmp_path / "config.yaml")
    assert load_config(config_file=tmp_path / "config.yaml") == config
    with pytest.raises(
        ConfigError, match=r"student.backbone_config=\{\"depths\": \[1\]\}: is for student.arch=hf:NAME"
    ):
        load_config("demo", overrides=["student.backbone_config={depths: [1]}"])


def test_a_file_that_tells_of_something_else(trained: Path, tmp_path: Path) -> None:
    state: dict[str, Any] = torch.load(trained / "eval/training_3/teacher_checkpoint.pth", weights_only=True)["teacher"]
    del state["backbone.model.embedder.embedder.convolution.weight"]
    torch.save({"teacher": state}, tmp_path / "odd.pth")
    (tmp_path / "config.yaml").write_bytes((trained / "config.yaml").read_bytes())
    with pytest.raises(
        WeightsError, match=r"odd.pth: not the weights of such a hf:resnet; missing: .*convolution.weight"
    ):
        load_model(tmp_path / "odd.pth")
    folder = tmp_path / "hf"
    run(ExportRequest(checkpoint=str(trained), format="hf", output=folder))
    config = json.loads((folder / "config.json").read_text())
    config["dino2"]["patch_size"] = 0
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=r"config.json describes no backbone of another library: patch_size"):
        load_model(folder)
