"""Students of timm, from words to timm alone: distilled, resumed, evaluated, exported, opened by timm, and equal.
And timm's own DINOv2 and DINOv3, with random weights, as dino2 loads them: the same features.

No part of the suite, as timm needs torchvision, which may be built for another PyTorch than the one here. In an
environment of its own:

    python3 -m venv V && V/bin/pip install -c constraints.txt -e '.[export,test]' timm torchvision
    V/bin/python tests/timm_students.py FOLDER [RECORDED.npz]

RECORDED.npz gets the weights and features of a DINOv3, for tests that have no timm.

A torchvision that was built for another PyTorch (with CUDA, say) does not import for want of its compiled operators, of
which timm uses none: two of them are declared here then, so that its Python part does.
"""

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from test_library_backbone import try_commands
from tiny_run import NO_VIT, TINY, metrics_of, write_images, write_teacher

from dinov2cli.errors import ConfigError
from dinov2cli.launch.training import resolve_config
from dinov2cli.models.library_backbone import LibraryBackbone
from dinov2cli.models.load import load_model
from dinov2cli.requests.base import run
from dinov2cli.requests.eval import KnnRequest
from dinov2cli.requests.export import ExportRequest
from dinov2cli.requests.train import TrainRequest
from dinov2cli.start import train

STUDENTS = {
    "resnet18": "{channels: [16, 16, 24, 32], layers: [1, 1, 1, 1]}",
    "convnext_atto": "{dims: [8, 12, 16, 24], depths: [1, 1, 1, 1], output_stride: 8, drop_path_rate: 0.5}",
    "swin_tiny_patch4_window7_224": "{img_size: 32, window_size: 2, embed_dim: 16, depths: [1, 1], num_heads: [1, 2], "
    "strict_img_size: false, drop_path_rate: 0.5}",
}
REFUSED = {
    "vit_tiny_patch16_224": "has tokens and no feature map",
    "mobilenetv3_small_050": "its pooled features are 1024 wide and its feature map 288",
    "no_such_network": "timm makes no backbone of this",
}


OWN: dict[str, dict[str, Any]] = {
    "vit_small_patch16_dinov3": {},
    "vit_small_patch16_dinov3_qkvb": {"patch_size": 8},
    "vit_small_plus_patch16_dinov3_qkvb": {"rope_temperature": 50.0},
    "vit_7b_patch16_dinov3": {},
    "vit_small_patch14_dinov2": {"img_size": 56, "dynamic_img_size": True},
    "vit_small_patch14_reg4_dinov2": {"img_size": 56, "dynamic_img_size": True},
    "vit_giant_patch14_reg4_dinov2": {"img_size": 56, "dynamic_img_size": True},
}
"""Names of timm's, and arguments beside a small size."""


def open_timm() -> Any:
    """timm, with the operators that its torchvision misses declared."""
    try:
        return importlib.import_module("timm")
    except (ImportError, RuntimeError) as error:
        print(f"torchvision does not import as it is ({error}): its operators are declared")
        for name in [name for name in sys.modules if name.partition(".")[0] in ("timm", "torchvision")]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        globals()["kept"] = library  # what it declares ends with it
        return importlib.import_module("timm")


def words(folder: Path, name: str, arguments: str, epochs: int, output: str) -> TrainRequest:
    overrides = [word for word in (*TINY, *NO_VIT) if "prototypes" not in word and "drop_path" not in word]
    return TrainRequest(
        data=str(folder / "data"), teacher=str(folder / "teacher"), output_dir=folder / output, cpu=True, quiet=True,
        overrides=(*overrides, f"student.arch=timm:{name}", f"student.backbone_config={arguments}",
                   f"optim.epochs={epochs}", "optim.warmup_epochs=0", "optim.scaling_rule=none", "optim.base_lr=0.001"),
    )  # fmt: skip


def check(folder: Path, timm: Any, name: str, arguments: str) -> None:
    """One architecture; raises AssertionError where something is not as it should be."""
    request = words(folder, name, arguments, 2, name)
    config = resolve_config(request)
    train(config, request)
    again = words(folder, name, arguments, 2, f"{name}-again")
    half = resolve_config(again)
    from dinov2cli.train.trainer import Trainer

    for stop in (3, 8):
        trainer = Trainer(half, torch.device("cpu"))
        trainer.total = stop
        trainer.train()
    assert metrics_of(folder / name) == metrics_of(folder / f"{name}-again"), "a run goes on as if it had not stopped"
    ours = load_model(folder / name)
    assert isinstance(ours, LibraryBackbone)
    try_commands(folder / name, folder, folder / f"{name}-commands")
    data = str(folder / "data")
    scores = run(KnnRequest(checkpoint=str(folder / name), train_dataset=data, val_dataset=data, nb_knn=(2,),
                            device="cpu", no_cache=True, quiet=True)).as_dict()["rows"]  # fmt: skip
    images = torch.randn(2, 3, 32, 32)
    for output in (folder / f"{name}-timm", folder / f"{name}.safetensors"):
        result = run(ExportRequest(checkpoint=str(folder / name), format="timm", output=output, overwrite=True))
        assert result.comparisons and all(each.difference < 1e-5 for each in result.comparisons), result
        assert torch.equal(load_model(output)(images), ours(images)), "and dino2 reads it again"
    alone = timm.create_model(f"local-dir:{folder / f'{name}-timm'}", pretrained=True).eval()
    with torch.no_grad():
        difference = float((alone(images) - ours(images)).abs().max())
    assert difference < 1e-5
    print(f"{name}: k-NN {scores[0]['top1']:.0f} % (chance 50), timm alone differs by {difference:.1e}")


@torch.no_grad()
def check_own(folder: Path, timm: Any, name: str, arguments: dict[str, Any], record: Path | None = None) -> None:
    """A small model of timm's with random weights, by its `state_dict` and as timm saves it for the hub."""
    torch.manual_seed(0)
    small = {"embed_dim": 32, "depth": 2, "num_heads": 2, **arguments}
    model = timm.create_model(name, num_classes=0, **small).eval()
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    side = 3 * model.patch_embed.patch_size[0]
    images = torch.randn(2, 3, side + side // 3, 2 * side)
    if "dinov2" in name:  # at their native size; at others timm resizes position embeddings in its own way
        images = images[:, :, :56, :56]
    theirs = model.forward_features(images)
    timm.models.save_for_hf(model, folder / name, model_args=small)
    torch.save(model.state_dict(), folder / f"{name}.pth")
    places: list[tuple[Path, dict[str, Any]]] = [(folder / name, {})]
    if "rope_temperature" not in arguments:  # which is in no weights, but in the folder's config.json
        places.append((folder / f"{name}.pth", {"num_heads": 2}))
    for place, given in places:
        ours = load_model(place, **given)
        found = ours.forward_features(images)
        registers = found.get("x_storage_tokens", found["x_norm_regtokens"])
        tokens = torch.cat([found["x_norm_clstoken"][:, None], registers, found["x_norm_patchtokens"]], dim=1)
        difference = float((tokens - theirs).abs().max())
        assert tokens.shape == theirs.shape and difference < 1e-5, (name, place, difference)
        print(f"{name}, {place.suffix or 'folder'}: {ours.config.describe()}; differs by {difference:.1e}")
    if record:
        weights = {f"w/{key}": tensor.numpy() for key, tensor in model.state_dict().items()}
        np.savez_compressed(record, x=images.numpy(), tokens=theirs.numpy(), **weights)


def main() -> None:
    folder = Path(sys.argv[1]).absolute()
    record = Path(sys.argv[2]) if len(sys.argv) > 2 else None
    timm = open_timm()
    print(f"timm {timm.__version__}, PyTorch {torch.__version__}")
    if not (folder / "data").exists():
        write_images(folder / "data")
        write_teacher(folder)
    for name, own in OWN.items():
        check_own(folder, timm, name, own, record if name == "vit_small_patch16_dinov3_qkvb" else None)
    for name, arguments in STUDENTS.items():
        check(folder, timm, name, arguments)
    for name, reason in REFUSED.items():
        try:
            resolve_config(words(folder, name, "{}", 1, "refused"))
        except ConfigError as error:
            assert reason in error.message, error
            print(f"{name}: refused, {reason}")
        else:
            raise AssertionError(f"{name} was not refused")


if __name__ == "__main__":
    main()
