"""`dino2 bench train|extract`: the training step and feature extraction, beside what the hardware can do."""

from itertools import chain, product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dinov2cli.cli.completion import complete_override, complete_preset
from dinov2cli.errors import ConfigError

if TYPE_CHECKING:
    from dinov2cli.config import Config
    from dinov2cli.train.benchmark import TrainBenchmark

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[a.b=value ...]", help="Changes of single configuration keys.", autocompletion=complete_override
    ),
]
Preset = Annotated[
    str | None, typer.Option("--preset", metavar="NAME", help="What to run.", autocompletion=complete_preset)
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config-file", metavar="YAML", help="A configuration file instead of a preset.")
]
Data = Annotated[str, typer.Option("--data", metavar="DATASET", help="A folder of images or a dataset string.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, or auto: a GPU if there is one.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
SAMPLE_PHOTOS = "SamplePhotos:split=TRAIN"


def train_command(
    overrides: Overrides = None,
    preset: Preset = None,
    config_file: ConfigFile = None,
    data: Data = SAMPLE_PHOTOS,
    synthetic: Annotated[
        bool, typer.Option("--synthetic", help="Random crops, always the same, instead of a dataset.")
    ] = False,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps to time, after two that are not.")] = 5,
    attention: Annotated[
        list[str] | None,
        typer.Option("--attention", help="Attention backend: sdpa, xformers or varlen; repeatable."),
    ] = None,
    precision: Annotated[list[str] | None, typer.Option("--precision", help="fp32, bf16 or fp16; repeatable.")] = None,
    compiled: Annotated[
        list[str] | None, typer.Option("--compile", help="on or off; repeatable: --compile off --compile on.")
    ] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure a training step: images per second, where the time goes, and the share of the hardware's rate.

    Every combination of the given attention backends, precisions and compilation is measured. The model's FLOPs are
    those that the losses and gradients need (a table in docs/speed.md); the share is of the highest matrix-product rate
    that the same process measures, before and after each step.

    Example:

        dino2 bench train --preset vits14 train.batch_size_per_gpu=16

        dino2 bench train --preset vitl16_short --synthetic --attention xformers --attention varlen

        dino2 bench train --preset vitl16_short --compile off --compile on --json
    """
    from dinov2cli.data.datasets import make_dataset
    from dinov2cli.device import choose_device
    from dinov2cli.train.benchmark import benchmark_variants

    place, variants = choose_device(device), _variants(attention, precision, compiled)
    if place.type == "cpu" and precision and set(precision) != {"fp32"}:
        raise ConfigError("--precision: the CPU trains in fp32 only")
    dataset = None if synthetic else make_dataset(data)
    configs = [_config(preset, config_file, [*(overrides or []), *changes]) for changes in variants]
    outcomes = list(benchmark_variants(configs, place, data=None if synthetic else data, steps=steps))
    results = [outcome for outcome in outcomes if not isinstance(outcome, ConfigError)]
    failures = [outcome.message for outcome in outcomes if isinstance(outcome, ConfigError)]
    if not results:
        raise ConfigError("; ".join(failures))
    _show_training(results, failures, "random crops" if dataset is None else dataset.describe(), as_json)


def extract_command(
    overrides: Overrides = None,
    preset: Preset = "vits14",
    config_file: ConfigFile = None,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="DATASET", help="Extract from these files, too."),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images of a batch.")] = 32,
    batches: Annotated[int, typer.Option("--batches", min=1, help="Batches to time.")] = 10,
    image_size: Annotated[int, typer.Option("--image-size", min=1, help="Side in pixels.")] = 224,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure feature extraction: class tokens per second of a backbone with fresh weights.

    Example:

        dino2 bench extract --preset vits14 --batch-size 64
    """
    from dinov2cli.console import out, print_json
    from dinov2cli.data.datasets import make_dataset
    from dinov2cli.device import choose_device
    from dinov2cli.eval.extraction_benchmark import benchmark_extraction

    result = benchmark_extraction(
        _config(None if config_file else preset, config_file, overrides),
        choose_device(device),
        dataset=None if data is None else make_dataset(data),
        batch_size=batch_size,
        batches=batches,
        image_size=image_size,
    )
    if as_json:
        print_json(result._asdict())
        return
    files = "" if result.files_images_per_s is None else f"; {result.files_images_per_s:.1f} from files"
    out.print(
        f"{result.device}, {result.threads} threads, {result.precision}: {result.model_images_per_s:.1f} images/s of "
        f"{result.image_size} pixels in batches of {result.batch_size}{files}",
        highlight=False,
    )
    out.print(
        f"{result.model_gflops_per_s:.0f} GFLOP/s of the model, {result.utilisation:.0%} of the measured matrix rate "
        f"({result.matrix_gflops_per_s:.0f} GFLOP/s)",
        highlight=False,
    )


def _config(preset: str | None, config_file: Path | None, overrides: list[str] | None) -> "Config":
    if preset and config_file:
        raise ConfigError("--preset and --config-file are both given; choose one")
    from dinov2cli.config import load_config

    return load_config(preset=preset, config_file=config_file, overrides=overrides or [])


def _variants(attention: list[str] | None, precision: list[str] | None, compiled: list[str] | None) -> list[list[str]]:
    """Overrides of every combination that was asked for."""
    for word in compiled or []:
        if word not in ("on", "off"):
            raise ConfigError(f"--compile {word}: on or off")
    choices = (
        [[f"student.attention_backend={backend}"] for backend in attention or []],
        [[f"compute_precision.precision={kind}"] for kind in precision or []],
        [[f"train.compile={'true' if word == 'on' else 'false'}"] for word in compiled or []],
    )
    return [list(chain(*chosen)) for chosen in product(*(choice or [[]] for choice in choices))]


def _show_training(results: list["TrainBenchmark"], failures: list[str], data: str, as_json: bool) -> None:
    from dinov2cli.console import err, out, print_json

    for failure in failures:
        err.print(f"not measured: {failure}", markup=False, highlight=False)
    if as_json:
        print_json({"data": data, "variants": [result._asdict() for result in results], "not_measured": failures})
        return
    from rich import box
    from rich.table import Table

    first = results[0]
    head = f"{first.device}, {first.threads} threads; batches of {first.batch_size} images: {data}"
    out.print(head, markup=False, highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for result in results:
        table.add_column(
            f"{result.precision} {result.attention}{' compiled' if result.compiled else ''}", justify="right"
        )
    rows: list[tuple[str, list[str]]] = [
        ("images/s", [f"{r.images_per_s:.2f}" for r in results]),
        ("seconds a step", [f"{r.step_s:.3f}" for r in results]),
        *((f"  {part}", [f"{r.parts_s[part]:.3f}" for r in results]) for part in first.parts_s),
        ("model GFLOP a step", [f"{r.model_gflops:,.0f}" for r in results]),
        ("  with a whole last block", [f"{r.whole_gflops:,.0f}" for r in results]),
        ("model GFLOP/s", [f"{r.model_gflops_per_s:,.0f}" for r in results]),
        *(
            (f"matrix GFLOP/s, {shape}", [f"{r.matrix_gflops_per_s[shape]:,.0f}" for r in results])
            for shape in first.matrix_gflops_per_s
        ),
        ("utilisation", [f"{r.utilisation:.1%}" for r in results]),
        ("memory, GB", [f"{r.memory_gb:.2f}" for r in results]),
        ("  expected", [f"{r.expected_memory_gb:.2f}" for r in results]),
    ]
    for name, values in rows:
        table.add_row(name, *values)
    out.print(table)
