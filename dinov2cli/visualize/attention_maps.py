"""Where the class token and the registers look: attention of one block over the patches.

Shape legend: B pictures, H heads, R registers, N = h*w patches, T = 1+R+N tokens, D embedding dimension.
"""

from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinov2cli.console import counted
from dinov2cli.data.augmentations import normalize_pixels
from dinov2cli.data.decoding import read_image
from dinov2cli.errors import DataError, WeightsError
from dinov2cli.models.library_backbone import Backbone, LibraryBackbone
from dinov2cli.models.vision_transformer import VisionTransformer
from dinov2cli.requests.pictures import AttentionRequest
from dinov2cli.visualize.features import PatchFeatures, Picture, resize
from dinov2cli.visualize.pictures import Written, check_picture_output, expand_inputs, load_picture_model, save_picture
from dinov2cli.visualize.rendering import places_shown, sheet, shown


def run(request: AttentionRequest) -> Written:
    """Draw what `dino2 attention` asks for; the errors are those of `dino2 pca-image`."""
    output = request.output
    pictures = expand_inputs(request.inputs, request.output)
    check_picture_output(output)
    model, _, reading = load_picture_model(request)
    places_shown(model.images, request.show_channels)
    rows, files = [], 0
    for name, path in pictures:
        photo = read_image(path, reading)
        maps = attention_maps(model, photo, resolution=request.resolution, block=request.block)
        drawn = draw_attention(maps, shown(photo, model.images, request.show_channels), overlay=request.overlay)
        if output.suffix:
            rows += drawn
            continue
        for query, (_, *heats) in zip(maps.queries, drawn, strict=True):
            for index, heat in enumerate(heats):
                what = f"head{index}" if index else "mean"
                save_picture(output / f"{name}-{query.replace(' ', '')}-{what}.png", heat)
                files += 1
    if output.suffix:
        save_picture(output, sheet(rows, width=max(1280, 200 * len(rows[0]))))
    return Written(((output, counted(files, "file") if files else ""),))


class AttentionMaps(NamedTuple):
    """Attention of one picture."""

    weights: NDArray[np.float32]
    """[1+R, H, h, w]: from the class token, then from each register, over the patches. What is missing to 1 per
    head goes to the class token and the registers."""
    queries: tuple[str, ...]
    """Names of the first axis: `cls`, `register 1`, ..."""


def attention_maps(model: Backbone, picture: Picture, *, resolution: int = 32, block: int = -1) -> AttentionMaps:
    """Attention weights of a block, as its softmax gives them in float32.

    Args:
        model: in evaluation mode.
        picture: as the network is shown it, uint8 or float32 in 0..1 [H, W, C].
        resolution: patches along the short side.
        block: index of the block; -1 is the last.

    Raises:
        DataError: a block that the model does not have.
        WeightsError: the model is no vision transformer.
    """
    if isinstance(model, LibraryBackbone):
        raise WeightsError(f"{model.config.arch}: attention maps are of vision transformers")
    if not -model.depth <= block < model.depth:
        raise DataError(f"--block {block}: the model has blocks 0 to {model.depth - 1} (or -1 for the last)")
    grid = PatchFeatures(model, resolution).grid((picture.shape[0], picture.shape[1]))
    fitted = resize(picture, (grid[0] * model.patch_size, grid[1] * model.patch_size))
    pixels = torch.from_numpy(fitted)[None].to(next(model.parameters()).device)
    images = normalize_pixels(pixels, model.images.statistics)
    with torch.inference_mode():
        weights = special_token_attention(model, images, block)[0, :, :, model.prefix_tokens :]
    heats = weights.transpose(0, 1).unflatten(2, grid).float().cpu().numpy()
    return AttentionMaps(heats, model.config.prefix_names)


def special_token_attention(model: VisionTransformer, images: Tensor, block: int = -1) -> Tensor:
    """Attention of the class token and the registers over all tokens: [B, 3, height, width] -> [B, H, 1+R, T].

    They are computed by the block's attention itself from what enters it.
    """
    attention: Any = model.blocks[block].get_submodule("attn")
    entered: list[Any] = []
    hook = attention.register_forward_pre_hook(lambda module, inputs: entered.extend(inputs))
    try:
        model.forward_features(images)
    finally:
        hook.remove()
    tokens, layout = entered
    weights: Tensor = attention.weights(tokens, model.prefix_tokens, layout)
    return weights


def draw_attention(maps: AttentionMaps, picture: Picture, *, overlay: bool = False) -> list[list[Picture]]:
    """One row a query: the picture, the mean over the heads, then each head. uint8 [H, W, 3] each.

    Each map is scaled by itself: black is no attention, the brightest is its largest weight (99.5th percentile).
    """
    rows = []
    for heads in maps.weights:
        drawn = [_heat(weights, (picture.shape[0], picture.shape[1])) for weights in (heads.mean(0), *heads)]
        if overlay:
            drawn = [(picture * 0.4 + heat * 0.6 + 0.5).astype(np.uint8) for heat in drawn]
        rows.append([picture, *drawn])
    return rows


def _heat(weights: NDArray[np.float32], size: tuple[int, int]) -> Picture:
    top = max(float(np.percentile(weights, 99.5)), 1e-12)
    levels = cv2.resize(np.clip(weights / top, 0, 1), size[::-1], interpolation=cv2.INTER_CUBIC)
    levels = (np.clip(levels, 0, 1) * 255 + 0.5).astype(np.uint8)
    coloured: NDArray[np.uint8] = cv2.cvtColor(cv2.applyColorMap(levels, cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB)
    return coloured
