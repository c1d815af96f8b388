"""`dino2 embed`: features of a dataset in a file."""

from pathlib import Path
from typing import Annotated

import typer

from dinov2cli.cli.eval_options import BatchSize, ConfigFile, Device, ImageSize, NoCache, NumWorkers


def embed(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CKPT", help="A run folder, a weights file, a URL or a released name.", show_default=False
        ),
    ],
    data: Annotated[
        str,
        typer.Option("--data", metavar="DATASET", help="A folder of images or a dataset string.", show_default=False),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", metavar="FEATURES", help="A .safetensors or .parquet file.", show_default=False),
    ],
    config_file: ConfigFile = None,
    batch_size: BatchSize = 256,
    num_workers: NumWorkers = None,
    image_size: ImageSize = None,
    resize_ratio: Annotated[
        float,
        typer.Option(
            "--resize-ratio",
            min=1,
            help="Short side to resize to, as a multiple of the image size: 256/224 as in eval knn and linear, 1 as in "
            "eval logreg.",
            show_default="256/224",
        ),
    ] = 256 / 224,
    device: Device = None,
    no_cache: NoCache = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object about the file.")] = False,
) -> None:
    """Write the features of every image to a file.

    For each image: the class token, the mean patch token, the class tokens of the last four blocks, label and path.

    Example:

        dino2 embed runs/demo --data photos --output photos.safetensors

        dino2 embed dinov2_vits14 --data photos --output photos.parquet
    """
    from dinov2cli.console import out, print_json, set_up_logging
    from dinov2cli.data.datasets import make_dataset
    from dinov2cli.distributed import is_main, process_group
    from dinov2cli.eval import embed as embedding
    from dinov2cli.eval.cache import FeatureCache
    from dinov2cli.eval.extract import Extractor
    from dinov2cli.eval.subject import load_subject

    set_up_logging()
    embedding.check_output(output)
    with process_group():
        images = make_dataset(data)
        subject = load_subject(checkpoint, config_file)
        extract = Extractor(
            subject.model,
            image_size=image_size,
            resize_ratio=resize_ratio,
            batch_size=batch_size,
            num_workers=num_workers,
            device=device,
            precision=subject.precision,
            detailed=True,
            cache=None if no_cache else FeatureCache(),
        )
        features = embedding.embed(extract, images, output)
        if not is_main():
            return
    facts = {"output": str(output), "images": features.size, "dim": features.cls.shape[1], "dataset": images.describe()}
    if as_json:
        print_json(facts)
    else:
        out.print(f"{output}: {features.size} images, {features.cls.shape[1]} dimensions", markup=False)
