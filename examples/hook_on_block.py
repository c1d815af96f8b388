"""How far each block moves the tokens of an image: the norm of what it adds, over that of what comes in.

python examples/hook_on_block.py WEIGHTS IMAGE
"""

import sys
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dinov2cli import load_model
from dinov2cli.data.transforms import EvalTransform


def main(weights: str, image: str, *, size: int = 112) -> list[float]:
    model = load_model(weights).eval()
    steps: list[float] = []

    def look(block: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        steps.append(float((output - inputs[0]).norm() / inputs[0].norm()))

    # Images alone go through every block as [B, N, D], registers and class token first.
    for block in model.blocks:
        block.register_forward_hook(look)
    pixels = np.array(Image.open(image).convert("RGB"))
    with torch.inference_mode():
        model.forward_features(EvalTransform(size, size // model.patch_size * model.patch_size)(pixels)[None])
    for number, step in enumerate(steps):
        print(f"block {number}: {step:.4f}")
    return steps


if __name__ == "__main__":
    main(*sys.argv[1:3])
