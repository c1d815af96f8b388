"""Whether Gram anchoring keeps patch features that a long training loses.

python tests/learning/gram.py OUT [--iterations 200 600]

The images are tiles of the twelve built-in photos, grey and with equalised histograms. A run learns with all of
DINOv2's losses first. Then it goes on with the loss on class tokens alone, once without and once with Gram anchoring to
the teacher of the first part: a toy's way of making happen in minutes what takes hundreds of thousands of iterations,
that the loss of whole images wins over that of patches. Of every teacher on the way, on mosaics of four tiles: whether
patches are told apart (k-NN with 20 neighbours: which photo does a patch show?), and how alike patches of an image are.
What is there in OUT already is not done again. Prints a table and draws OUT/gram.png.
"""

import argparse
import shutil
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from dinov2cli import load_model
from dinov2cli.config.images import IMAGENET
from dinov2cli.data.augmentations import normalize_pixels
from dinov2cli.data.datasets.sample_photos import SamplePhotos
from dinov2cli.requests.base import run
from dinov2cli.requests.train import TrainRequest

PATCH, SIDE, EPOCH = 8, 64, 20
COMMON = (
    "dino.head_n_prototypes=64", "dino.head_bottleneck_dim=32", "dino.head_hidden_dim=128", "ibot.separate_head=true",
    "ibot.head_n_prototypes=64", "ibot.head_bottleneck_dim=32", "ibot.head_hidden_dim=128",
    "train.batch_size_per_gpu=48", f"train.OFFICIAL_EPOCH_LENGTH={EPOCH}", "train.centering=sinkhorn_knopp",
    "train.num_workers=0", "train.compile=false", "student.arch=vit", "student.embed_dim=64", "student.depth=3",
    "student.num_heads=2", f"student.patch_size={PATCH}", "student.drop_path_rate=0.0", "student.layerscale=1.0",
    "teacher.momentum_teacher=0.98", "teacher.final_momentum_teacher=0.98", "teacher.teacher_temp=0.05",
    "teacher.warmup_teacher_temp_epochs=2", "optim.warmup_epochs=2", "optim.layerwise_decay=1.0",
    "optim.base_lr=0.006", "optim.min_lr=0.001", "optim.weight_decay_end=0.1", "crops.global_crops_size=64",
    "crops.local_crops_size=32", "crops.local_crops_number=2", "crops.global_crops_scale=[0.5, 1.0]",
    "crops.local_crops_scale=[0.15, 0.5]", "crops.blur_prob=[0.0, 0.3, 0.2]", "crops.solarize_prob=0.0",
    f"evaluation.eval_period_iterations={2 * EPOCH}",
)  # fmt: skip
GRAM = ("gram.use_loss=true", "gram.img_level=true", "gram.rep_update=false", "gram.loss_weight=10")


def gray(dataset: SamplePhotos, index: int) -> np.ndarray:
    tile = cv2.equalizeHist(cv2.cvtColor(dataset.image(index), cv2.COLOR_RGB2GRAY))
    return cv2.cvtColor(tile, cv2.COLOR_GRAY2RGB)


Mosaics = tuple[np.ndarray, np.ndarray]


def mosaics(split: str, count: int) -> Mosaics:
    """uint8 [count, SIDE, SIDE, 3] of four tiles each, and the photo that each patch shows [count, patches]."""
    dataset, rng = SamplePhotos(split), np.random.default_rng(len(split))
    labels, half, cells = dataset.targets(), SIDE // 2, SIDE // PATCH // 2
    images = np.zeros((count, SIDE, SIDE, 3), np.uint8)
    shown = np.zeros((count, 2 * cells, 2 * cells), np.int64)
    for image, of_patches in zip(images, shown, strict=True):
        for number, index in enumerate(rng.choice(len(dataset), 4, replace=False)):
            row, column = divmod(number, 2)
            tile = cv2.resize(gray(dataset, int(index)), (half, half), interpolation=cv2.INTER_AREA)
            image[row * half :, column * half :][:half, :half] = tile
            of_patches[row * cells :, column * cells :][:cells, :cells] = labels[index]
    return images, shown.reshape(count, -1)


def trained(run_folder: Path, data: Path, iterations: int, *overrides: str) -> None:
    """The run of this folder to that many iterations."""
    run(TrainRequest(
        data=str(data), output_dir=run_folder, cpu=True, quiet=True,
        overrides=(*COMMON, *overrides, f"optim.epochs={iterations // EPOCH}"),
    ))  # fmt: skip


@torch.inference_mode()
def measured(checkpoint: Path, train: Mosaics, val: Mosaics) -> list[float]:
    """Share of patches whose photo 20 neighbours know, in percent; mean and spread of similarities in an image."""
    model = load_model(checkpoint).eval()

    def features(images: np.ndarray) -> torch.Tensor:
        pixels = normalize_pixels(torch.from_numpy(images), IMAGENET)
        return F.normalize(model.forward_features(pixels)["x_norm_patchtokens"], dim=-1)

    known, asked = features(train[0]), features(val[0])
    nearest = (asked.flatten(0, 1) @ known.flatten(0, 1).T).topk(20).indices
    votes = F.one_hot(torch.from_numpy(train[1]).flatten()[nearest], 12).sum(1)
    right = (votes.argmax(1) == torch.from_numpy(val[1]).flatten()).float().mean()
    alike = asked @ asked.mT
    pairs = alike[:, ~torch.eye(alike.shape[1], dtype=torch.bool)]
    return [100 * right.item(), pairs.mean().item(), pairs.std(1).mean().item()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--iterations", type=int, nargs=2, default=[200, 600], help="Of the first part, and in all.")
    words = parser.parse_args()
    out, (first, total) = words.out.absolute(), words.iterations
    train, val = mosaics("TRAIN", 400), mosaics("VAL", 100)
    (out / "data").mkdir(parents=True, exist_ok=True)
    tiles = SamplePhotos("TRAIN")
    for index in range(len(tiles)):
        cv2.imwrite(str(out / "data" / f"{index:04d}.png"), gray(tiles, index))
    # The first part is planned as long as the whole, so that its schedules are those of the others.
    trained(out / "first", out / "data", first)
    anchor = out / "first" / "eval" / f"training_{first - 1}" / "teacher_checkpoint.pth"
    curves: dict[str, dict[int, list[float]]] = {}
    for name, more in (("class tokens alone", ()), ("with Gram anchoring", (*GRAM, f"gram.ckpt={anchor}"))):
        folder = out / name.replace(" ", "-")
        if not folder.exists():
            shutil.copytree(out / "first", folder)
        trained(folder, out / "data", total, "ibot.loss_weight=0.0", *more)
        curves[name] = {
            int(path.parent.name[9:]) + 1: measured(path, train, val)
            for path in sorted(folder.glob("eval/*/teacher_checkpoint.pth"))
        }
    print(f"{'iterations':>10}  " + "  ".join(f"{name:^26}" for name in curves))
    for done in sorted(next(iter(curves.values()))):
        rows = (f"{c[done][0]:8.1f} %  {c[done][1]:6.3f}  {c[done][2]:6.3f}" for c in curves.values())
        print(f"{done:>10}  " + "  ".join(f"{row:^26}" for row in rows))
    draw(curves, first, out / "gram.png")


def draw(curves: dict[str, dict[int, list[float]]], first: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    titles = ("patches whose photo is known, %", "spread of patch similarities")
    for axis, title, column in zip(axes, titles, (0, 2), strict=True):
        for name, curve in curves.items():
            at = sorted(curve)
            axis.plot(at, [curve[done][column] for done in at], marker=".", label=name)
        axis.axvline(first, color="gray", linewidth=0.8, linestyle=":")
        axis.set(title=title, xlabel="iterations")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
