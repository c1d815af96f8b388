"""Whether Gram anchoring keeps patch features that a long training loses.

python tests/learning/gram.py OUT [--iterations 200 600]

The images are tiles of the twelve built-in photos, grey and with equalised histograms. A run learns with all of
DINOv2's losses first. Then it goes on with the loss on class tokens alone, once without and once with Gram anchoring to
the teacher of the first part: a toy's way of making happen in minutes what takes hundreds of thousands of iterations,
that the loss of whole images wins over that of patches. Of every teacher on the way it tells, on mosaics of four tiles,
whether similarities of patches show what belongs together. What is there in OUT already is not done again. Prints a
table and draws OUT/gram.png. Five minutes on one core.
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
    "optim.base_lr=0.006", "optim.min_lr=0.001", "optim.weight_decay_end=0.1", f"crops.global_crops_size={SIDE}",
    f"crops.local_crops_size={SIDE // 2}", "crops.local_crops_number=2", "crops.global_crops_scale=[0.5, 1.0]",
    "crops.local_crops_scale=[0.15, 0.5]", "crops.blur_prob=[0.0, 0.3, 0.2]", "crops.solarize_prob=0.0",
    f"evaluation.eval_period_iterations={2 * EPOCH}",
)  # fmt: skip
GRAM = ("gram.use_loss=true", "gram.img_level=true", "gram.rep_update=false", "gram.loss_weight=10")


def gray(dataset: SamplePhotos, index: int) -> np.ndarray:
    tile = cv2.equalizeHist(cv2.cvtColor(dataset.image(index), cv2.COLOR_RGB2GRAY))
    return cv2.cvtColor(tile, cv2.COLOR_GRAY2RGB)


def mosaics(count: int) -> np.ndarray:
    """uint8 [count, SIDE, SIDE, 3], of four tiles each that no training sees."""
    dataset, rng, half = SamplePhotos("VAL"), np.random.default_rng(0), SIDE // 2
    images = np.zeros((count, SIDE, SIDE, 3), np.uint8)
    for image in images:
        for number, index in enumerate(rng.choice(len(dataset), 4, replace=False)):
            row, column = divmod(number, 2)
            tile = cv2.resize(gray(dataset, int(index)), (half, half), interpolation=cv2.INTER_AREA)
            image[row * half :, column * half :][:half, :half] = tile
    return images


def trained(run_folder: Path, data: Path, iterations: int, *overrides: str) -> None:
    """The run of this folder to that many iterations."""
    run(TrainRequest(
        data=str(data), output_dir=run_folder, cpu=True, quiet=True,
        overrides=(*COMMON, *overrides, f"optim.epochs={iterations // EPOCH}"),
    ))  # fmt: skip


@torch.inference_mode()
def measured(checkpoint: Path, images: np.ndarray) -> list[float]:
    """Of mosaics: how often two adjacent patches of a tile are more alike than two of different tiles, in percent; and
    how much more alike than any two adjacent ones are, in standard deviations."""
    model = load_model(checkpoint).eval()
    features = model.forward_features(normalize_pixels(torch.from_numpy(images), IMAGENET))["x_norm_patchtokens"]
    features = F.normalize(features, dim=-1)
    side = SIDE // PATCH
    place = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    adjacent, same_tile = torch.cdist(place.float(), place.float(), p=1) == 1, torch.cdist(
        (place // (side // 2)).float(), (place // (side // 2)).float()) == 0  # fmt: skip
    different, right, above = ~torch.eye(side**2, dtype=torch.bool), [], []
    for similarity in features @ features.mT:
        within, across, every = (
            similarity[adjacent & same_tile],
            similarity[adjacent & ~same_tile],
            similarity[different],
        )
        right.append((within[:, None] > across).float().mean())
        above.append((similarity[adjacent].mean() - every.mean()) / every.std())
    return [100 * torch.stack(right).mean().item(), torch.stack(above).mean().item()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--iterations", type=int, nargs=2, default=[200, 400], help="Of the first part, and in all.")
    words = parser.parse_args()
    out, (first, total), images = words.out.absolute(), words.iterations, mosaics(100)
    (out / "data").mkdir(parents=True, exist_ok=True)
    tiles = SamplePhotos("TRAIN")
    for index in range(len(tiles)):
        cv2.imwrite(str(out / "data" / f"{index:04d}.png"), gray(tiles, index))
    trained(out / "first", out / "data", first)
    anchor = out / "first" / "eval" / f"training_{first - 1}" / "teacher_checkpoint.pth"
    curves: dict[str, dict[int, list[float]]] = {}
    for name, more in (("class tokens alone", ()), ("with Gram anchoring", (*GRAM, f"gram.ckpt={anchor}"))):
        folder = out / name.replace(" ", "-")
        if not folder.exists():
            shutil.copytree(out / "first", folder)
        trained(folder, out / "data", total, "ibot.loss_weight=0.0", *more)
        checkpoints = {int(path.parent.name[9:]) + 1: path for path in folder.glob("eval/*/teacher_checkpoint.pth")}
        curves[name] = {done: measured(path, images) for done, path in sorted(checkpoints.items())}
    print(f"{'iterations':>10}  " + "  ".join(f"{name:^20}" for name in curves))
    for done in next(iter(curves.values())):
        rows = (f"{curve[done][0]:8.1f} %  {curve[done][1]:6.3f}" for curve in curves.values())
        print(f"{done:>10}  " + "  ".join(f"{row:^20}" for row in rows))
    draw(curves, first, out / "gram.png")


def draw(curves: dict[str, dict[int, list[float]]], first: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    titles = ("borders of tiles known by patches, %", "locality of patch similarities, std")
    for axis, title, column in zip(axes, titles, (0, 1), strict=True):
        for name, curve in curves.items():
            axis.plot(list(curve), [values[column] for values in curve.values()], marker=".", label=name)
        axis.axvline(first, color="gray", linewidth=0.8, linestyle=":")
        axis.set(title=title, xlabel="iterations")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
