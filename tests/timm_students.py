"""Students of timm, from words to timm alone: distilled, resumed, evaluated, exported, opened by timm, and equal.

No part of the suite, as timm needs torchvision, which may be built for another PyTorch than the one here. In an
environment of its own:

    python3 -m venv V && V/bin/pip install -c constraints.txt -e '.[export,test]' timm torchvision
    V/bin/python tests/timm_students.py FOLDER

A torchvision that was built for another PyTorch (with CUDA, say) does not import for want of its compiled operators, of
which timm uses none: two of them are declared here then, so that its Python part does.
"""

import importlib
import sys
from pathlib import Path
from typing import Any

import torch
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


def main() -> None:
    folder = Path(sys.argv[1]).absolute()
    timm = open_timm()
    print(f"timm {timm.__version__}, PyTorch {torch.__version__}")
    if not (folder / "data").exists():
        write_images(folder / "data")
        write_teacher(folder)
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
