"""`dino2 attention`: where the class token and the registers look."""

from pathlib import Path
from typing import Annotated

import typer

from dinov2cli.cli.picture_options import (
    DeviceOption,
    ModelOption,
    ResolutionOption,
    load_picture_model,
    split_inputs_and_output,
)


def attention(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="INPUT... OUTPUT", help="Images or folders of images, then the output."),
    ],
    model: ModelOption = None,
    resolution: ResolutionOption = 32,
    block: Annotated[int, typer.Option("--block", help="Index of the block; -1 is the last.")] = -1,
    overlay: Annotated[bool, typer.Option("--overlay", help="Draw the maps over the photo.")] = False,
    device: DeviceOption = "auto",
) -> None:
    """Show where the class token and each register look, as the mean over the heads and head by head.

    OUTPUT is a `.png` file, a sheet with one row for the class token and one for each register of each image:
    photo, mean, head 1, head 2, ... Without a suffix it is a folder that gets every map as a file of its own
    (`photo-cls-mean.png`, `photo-register1-head3.png`, ...).

    Example:

        dino2 attention dog.jpg dog-attention.png --model RUN
    """
    from dinov2cli.cli.picture_files import check_picture_output, expand_inputs, save_picture
    from dinov2cli.console import out
    from dinov2cli.data.decoding import read_image
    from dinov2cli.visualize.attention_maps import attention_maps, draw_attention
    from dinov2cli.visualize.rendering import sheet

    inputs, output = split_inputs_and_output(paths)
    pictures = expand_inputs(inputs)
    check_picture_output(output)
    loaded, _ = load_picture_model(model, device)
    rows = []
    files = 0
    for name, path in pictures:
        photo = read_image(path)
        maps = attention_maps(loaded, photo, resolution=resolution, block=block)
        drawn = draw_attention(maps, photo, overlay=overlay)
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
    out.print(f"{output}: {files} files" if files else str(output), markup=False, highlight=False, soft_wrap=True)
