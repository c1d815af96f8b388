"""How well near-duplicates are told from other images, by features and threshold: copies are planted, and looked for.

Of some images of DATA, copies are added: resized (to 60 %), recompressed (JPEG, quality 30), cropped (5 % of each side
off, at a random place), mirrored; each kind of other images. The features are those of each MODEL, of a random network
of the same shape, and raw thumbnails (8 x 8 pixels of each channel, each channel's mean taken away). A line is a
threshold: which copies are dropped, by kind and of all, and the share of what is dropped that is rightly so: an image
is wrongly dropped where nothing that shows the same is kept.

usage: python tests/learning/curation.py OUT DATA MODEL ... [--each N] [--neighbours K] [--thresholds T ...]
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image

import dinov2cli
from dinov2cli.curate.graph import sweep
from dinov2cli.data.datasets import ImageDataset, make_dataset
from dinov2cli.models.vision_transformer import VisionTransformer
from dinov2cli.search.neighbours import neighbours

THUMBNAIL = 8
KINDS = ("resized", "recompressed", "cropped", "mirrored")


class Planted(NamedTuple):
    """A folder of images, which picture each shows (the number of its original), and its kind (-1: an original)."""

    folder: Path
    shows: np.ndarray
    kind: np.ndarray


def plant(data: ImageDataset, each: int, folder: Path) -> Planted:
    """Write all images and the copies, in the order of their names."""
    rng, shows, kinds = np.random.default_rng(0), [], []
    chosen = rng.permutation(len(data))[: each * len(KINDS)].reshape(len(KINDS), -1)
    folder.mkdir(parents=True, exist_ok=True)
    for row in range(len(data)):
        shows.append(row)
        kinds.append(-1)
        if not (file := folder / f"0-{row:06d}.png").exists():
            Image.fromarray(data.image(row)).save(file)
    for kind, rows in enumerate(chosen):
        for row in rows.tolist():
            shows.append(row)
            kinds.append(kind)
            copy = altered(Image.fromarray(data.image(row)), KINDS[kind], rng)
            if kind == KINDS.index("recompressed"):
                copy.save(folder / f"{kind + 1}-{row:06d}.jpg", quality=30)
            else:
                copy.save(folder / f"{kind + 1}-{row:06d}.png")
    order = np.argsort([f"{kind + 1}-{row:06d}" for row, kind in zip(shows, kinds, strict=True)])
    return Planted(folder, np.array(shows)[order], np.array(kinds)[order])


def altered(picture: Image.Image, kind: str, rng: np.random.Generator) -> Image.Image:
    """A copy of a picture."""
    width, height = picture.size
    if kind == "resized":
        return picture.resize((round(0.6 * width), round(0.6 * height)), Image.Resampling.BICUBIC)
    if kind == "mirrored":
        return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if kind == "cropped":
        across, down = max(1, round(0.95 * width)), max(1, round(0.95 * height))
        left, top = rng.integers(width - across + 1), rng.integers(height - down + 1)
        return picture.crop((left, top, left + across, top + down))
    return picture


def features_of(planted: Planted, models: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Features by name, float32 [N, D]."""
    for number, name in enumerate(models):
        model = dinov2cli.load_model(name)
        yield name, dinov2cli.embed(str(planted.folder), model, num_workers=0).numpy()
        if number == 0:
            torch.manual_seed(0)
            random = VisionTransformer(model.config)
            random.images = model.images
            yield "a random network", dinov2cli.embed(str(planted.folder), random.eval(), num_workers=0).numpy()
    images = make_dataset(str(planted.folder))
    pixels = np.stack(
        [cv2.resize(images.image(i), (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA) for i in range(len(images))]
    )
    pixels = pixels.reshape(len(pixels), -1, 3).astype(np.float32)
    yield "raw thumbnails", (pixels - pixels.mean(1, keepdims=True)).reshape(len(pixels), -1)


def table(planted: Planted, features: np.ndarray, k: int, thresholds: list[float]) -> Iterator[str]:
    """A line of Markdown for each threshold."""
    found = neighbours(features, features, k, exclude=np.arange(len(features)))

    def edges(above: float) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        one, column = (found.scores > above).nonzero()
        yield one, found.rows[one, column], found.scores[one, column]

    n = len(planted.shows)
    for at, roots in sweep(n, edges, thresholds):
        kept = roots == np.arange(n)
        there = np.zeros(planted.shows.max() + 1, bool)
        there[planted.shows[kept]] = True
        dropped, lost = n - int(kept.sum()), int((~there).sum())
        # A copy is found where it and its original are in one component.
        original = np.full(planted.shows.max() + 1, -1)
        original[planted.shows[planted.kind < 0]] = np.flatnonzero(planted.kind < 0)
        same = roots == roots[original[planted.shows]]
        of_kind = [100 * float(same[planted.kind == kind].mean()) for kind in range(len(KINDS))]
        recall = 100 * float(same[planted.kind >= 0].mean())
        precision = f"{100 * (dropped - lost) / dropped:.1f}" if dropped else ""
        cells = [f"{at.threshold:g}", *(f"{each:.0f}" for each in of_kind), f"{recall:.1f}", precision]
        yield f"| {' | '.join(cells)} | {lost} | {at.largest} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("data", metavar="DATA")
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--each", type=int, default=100, metavar="N", help="copies of each kind")
    parser.add_argument("--neighbours", type=int, default=64, metavar="K")
    usual = [0.6, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999]
    parser.add_argument("--thresholds", nargs="+", type=float, default=usual, metavar="T")
    words = parser.parse_args()
    planted = plant(make_dataset(words.data), words.each, words.out)
    copies = int((planted.kind >= 0).sum())
    print(f"{words.data}: {len(planted.kind) - copies} images and {copies} copies\n")
    for name, features in features_of(planted, words.models):
        names = ("cosine above", *KINDS, "all copies", "precision", "pictures lost", "largest group")
        print(f"{name}:\n\n| {' | '.join(names)} |\n{'|---' * len(names)}|")
        print("\n".join(table(planted, features, words.neighbours, words.thresholds)), "\n", flush=True)


if __name__ == "__main__":
    main()
