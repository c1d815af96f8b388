"""Whether distillation helps: a small student from a trained teacher, and the same student from scratch.

python tests/learning/distillation.py OUT [--seeds 0 1 2] [--iterations 400]

The task is one in which colour and brightness tell nothing: the tiles of the twelve built-in photos, grey and with
equalised histograms. The teacher is trained there, too. Both students see the same images in the same order, with the
same network, heads, learning rate and schedules; the distilled one learns from the teacher's heads (the runs `own`) or,
from the teacher's backbone alone, by fresh ones (`fresh`). Prints the k-NN accuracy (k = 20) of all. What is there in
OUT already is not done again. An hour and more on one core.
"""

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path

import cv2
import torch

from dinov2cli.checkpoint import save_teacher
from dinov2cli.data.datasets.sample_photos import SamplePhotos
from dinov2cli.requests.base import run
from dinov2cli.requests.eval import KnnRequest
from dinov2cli.requests.train import TrainRequest

COMMON = (
    "dino.head_n_prototypes=64", "dino.head_bottleneck_dim=64", "dino.head_hidden_dim=256", "ibot.separate_head=true",
    "ibot.head_n_prototypes=64", "ibot.head_bottleneck_dim=64", "ibot.head_hidden_dim=256",
    "train.batch_size_per_gpu=64", "train.OFFICIAL_EPOCH_LENGTH=50", "train.centering=sinkhorn_knopp",
    "train.num_workers=0", "student.arch=vit", "student.patch_size=8", "student.drop_path_rate=0.0",
    "student.layerscale=1.0", "teacher.momentum_teacher=0.99", "teacher.teacher_temp=0.05",
    "teacher.warmup_teacher_temp_epochs=2", "optim.warmup_epochs=1", "optim.layerwise_decay=1.0",
    "optim.base_lr=0.006", "optim.weight_decay_end=0.1", "crops.global_crops_size=64", "crops.local_crops_size=32",
    "crops.local_crops_number=4", "crops.global_crops_scale=[0.5, 1.0]", "crops.local_crops_scale=[0.15, 0.5]",
    "crops.blur_prob=[0.0, 0.3, 0.2]", "crops.solarize_prob=0.0", "evaluation.eval_period_iterations=0",
)  # fmt: skip
TEACHER = ("student.embed_dim=128", "student.depth=4", "student.num_heads=4")
STUDENT = ("student.embed_dim=48", "student.depth=2", "student.num_heads=2")


def write_tiles(folder: Path) -> None:
    """OUT/data/{train,val}/<photo>/*.png."""
    for split in ("TRAIN", "VAL"):
        dataset = SamplePhotos(split)
        for index, label in enumerate(dataset.targets()):
            path = folder / split.lower() / dataset.class_names[label] / f"{index:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), cv2.equalizeHist(cv2.cvtColor(dataset.image(index), cv2.COLOR_RGB2GRAY)))


def trained(out: Path, name: str, iterations: int, *overrides: str, teacher: Path | None = None) -> Path:
    """The run of this name, trained to its end; what it has done already is not done again."""
    run(TrainRequest(
        data=str(out / "data" / "train"), output_dir=out / name, cpu=True, teacher=str(teacher) if teacher else None,
        overrides=(*COMMON, *overrides, f"optim.epochs={iterations // 50}"), quiet=True,
    ))  # fmt: skip
    return out / name


def top1(out: Path, name: str) -> float:
    """Of the teacher that the run has saved, by 20 neighbours, in percent."""
    found = run(KnnRequest(
        checkpoint=str(out / name), train_dataset=str(out / "data" / "train"), val_dataset=str(out / "data" / "val"),
        nb_knn=(20,), device="cpu", quiet=True,
    ))  # fmt: skip
    return float(found.as_dict()["rows"][0]["top1"])


def without_heads(teacher: Path, path: Path) -> Path:
    """The teacher's backbone alone, as released ones are."""
    newest = max(teacher.glob("eval/training_*/teacher_checkpoint.pth"), key=lambda file: int(file.parent.name[9:]))
    state = torch.load(newest, weights_only=True)["teacher"]
    save_teacher(path, {name: value for name, value in state.items() if name.startswith("backbone.")})
    (path.parent / "config.yaml").write_text((teacher / "config.yaml").read_text())
    return path


def rows(out: Path, seeds: list[int], iterations: int) -> Iterator[tuple[str, list[float]]]:
    """(what, k-NN top-1 for each seed)."""
    teacher = trained(out, "teacher", 200, *TEACHER)
    yield "teacher, 128 wide, 4 deep, 200 iterations", [top1(out, "teacher")]
    bare = without_heads(teacher, out / "bare" / "teacher_checkpoint.pth")
    for kind, words, source in (
        ("scratch", "student, 48 wide, 2 deep, from scratch", None),
        ("own", "the same, distilled, the teacher's heads", teacher),
        ("fresh", "the same, distilled, fresh heads", bare),
    ):
        scores = []
        for seed in seeds:
            trained(out, f"{kind}-{seed}", iterations, *STUDENT, f"train.seed={seed}", teacher=source)
            scores.append(top1(out, f"{kind}-{seed}"))
            print(f"{kind}-{seed}: {scores[-1]:.1f}", flush=True)
        yield words, scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=400)
    words = parser.parse_args()
    if not (words.out / "data").exists():
        write_tiles(words.out / "data")
    table = list(rows(words.out.absolute(), words.seeds, words.iterations))
    for what, scores in table:
        mean = statistics.mean(scores)
        print(f"{what:45}  {'  '.join(f'{score:5.1f}' for score in scores)}   mean {mean:.1f}")


if __name__ == "__main__":
    main()
