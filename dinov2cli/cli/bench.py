"""`dino2 bench`: how fast the parts of dino2 run on this machine."""

from pathlib import Path
from typing import Annotated

import typer

from dinov2cli.cli.bench_eval import knn_command, linear_command, logreg_command
from dinov2cli.cli.bench_train import extract_command, train_command
from dinov2cli.cli.completion import complete_override, complete_preset
from dinov2cli.console import out, print_json
from dinov2cli.errors import ConfigError

bench = typer.Typer(
    name="bench",
    help="Measure how fast the parts of dino2 run on this machine.\n\nExample:\n\n    dino2 bench augment",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

bench.command("train")(train_command)
bench.command("extract")(extract_command)
bench.command("knn")(knn_command)
bench.command("logreg")(logreg_command)
bench.command("linear")(linear_command)


@bench.command("augment")
def augment_command(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[a.b=value ...]",
            help="Changes of single configuration keys.",
            autocompletion=complete_override,
        ),
    ] = None,
    data: Annotated[
        str, typer.Option("--data", metavar="DATASET", help="A folder of images or a dataset string.")
    ] = "SamplePhotos:split=TRAIN",
    preset: Annotated[
        str | None,
        typer.Option("--preset", metavar="NAME", help="Whose crops to make.", autocompletion=complete_preset),
    ] = None,
    config_file: Annotated[
        Path | None, typer.Option("--config-file", metavar="YAML", help="A configuration file instead of a preset.")
    ] = None,
    workers: Annotated[
        list[int] | None,
        typer.Option(
            "--workers",
            min=0,
            help="Loader processes; repeatable. 0: the main process.",
            show_default="0, 1, 2, 4, ... cores",
        ),
    ] = None,
    images: Annotated[int, typer.Option("--images", min=1, help="Images a repeat.")] = 200,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Repeats; the median is reported.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Measure images per second from file to augmented batch, and where the time goes.

    Stages are timed on one core. Rates are those of the training's own loader, by number of processes.

    Example:

        dino2 bench augment --data ~/photos --workers 0 --workers 4

        dino2 bench augment --preset vitl14 --json > rates.json
    """
    if preset and config_file:
        raise ConfigError("--preset and --config-file are both given; choose one")
    from dinov2cli.config import load_config
    from dinov2cli.data.benchmark import benchmark_augmentation
    from dinov2cli.data.datasets import make_dataset
    from dinov2cli.data.workers import available_cores

    config = load_config(preset=preset, config_file=config_file, overrides=overrides or [])
    cores = available_cores()
    counts = workers or [0, *(2**i for i in range(cores.bit_length()) if 2**i <= cores)]
    result = benchmark_augmentation(config, make_dataset(data), workers=counts, images=images, repeats=repeats)
    if as_json:
        print_json({**result._asdict(), "rates": [rate._asdict() for rate in result.rates]})
        return
    from rich import box
    from rich.table import Table

    out.print(f"{result.dataset}; {result.cores} cores", markup=False, highlight=False)
    total = sum(result.stages_ms.values())
    stages = Table("stage", "ms an image", "share", box=box.SIMPLE_HEAD, pad_edge=False)
    for stage, ms in result.stages_ms.items():
        stages.add_row(stage, f"{ms:.3f}", f"{ms / total:.0%}")
    stages.add_row("all", f"{total:.3f}", "")
    out.print(stages)
    rates = Table("workers", "images/s", "images/s a core", box=box.SIMPLE_HEAD, pad_edge=False)
    for rate in result.rates:
        rates.add_row(str(rate.workers), f"{rate.images_per_s:.1f}", f"{rate.images_per_s_per_core:.1f}")
    out.print(rates)
