"""Print for each image of a folder the one that is most like it to the model.

python examples/features.py WEIGHTS FOLDER      (WEIGHTS: a run, a file, or a released name such as dinov2_vits14)
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from dinov2cli import load_model
from dinov2cli.data.datasets import make_dataset
from dinov2cli.data.transforms import EvalTransform


def main(weights: str, folder: str, *, size: int = 112) -> list[tuple[str, str]]:
    model = load_model(weights).eval()
    dataset = make_dataset(folder)
    transform = EvalTransform(resize=size * 8 // 7, crop=size // model.patch_size * model.patch_size)
    images = torch.stack([transform(dataset.image(index)) for index in range(len(dataset))])
    with torch.inference_mode():
        found = model.forward_features(images)  # x_norm_patchtokens [B, N, D] and others are in it, too
    cls = F.normalize(found["x_norm_clstoken"], dim=-1)  # [B, D]
    nearest = (cls @ cls.T).fill_diagonal_(-1).argmax(1).tolist()
    names = ["/".join(Path(dataset.path(index)).parts[-2:]) for index in range(len(dataset))]
    pairs = [(name, names[other]) for name, other in zip(names, nearest, strict=True)]
    for name, other in pairs:
        print(f"{name}: {other}")
    return pairs


if __name__ == "__main__":
    main(*sys.argv[1:3])
