"""Requests for measurements: how fast the parts of dino2 run on this machine."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from dinov2cli.requests.base import Argument, AtLeastOne, Option, Request
from dinov2cli.requests.train import ConfigFile

Overrides = Annotated[
    tuple[str, ...],
    Argument(
        "Changes of single configuration keys.", metavar="[a.b=value ...]", completes="overrides", default_text=False
    ),
]
Preset = Annotated[str | None, Option("What to run.", metavar="NAME", completes="presets")]
Data = Annotated[str, Option("A folder of images or a dataset string.", metavar="DATASET")]
Device = Annotated[str, Option("cpu, cuda, or auto: a GPU if there is one.")]
Tables = Annotated[bool, Option("Print one JSON object instead of tables.", flags="--json")]
SAMPLE_PHOTOS = "SamplePhotos:split=TRAIN"


class Bench(Request):
    """A measurement; of a preset and a configuration file only one can be meant."""

    @model_validator(mode="after")
    def _one_configuration(self) -> "Bench":
        given = self.model_fields_set
        if {"preset", "config_file"} <= given:
            raise ValueError("--preset and --config-file are both given; choose one")
        return self


class BenchTrain(Bench, command="bench train", run_by="dinov2cli.bench.train:run"):
    """Measure a training step: images per second, where the time goes, and the share of the hardware's rate.

    Every combination of the given attention backends, precisions and compilation is measured. The model's FLOPs are
    those that the losses and gradients need (a table in docs/speed.md); the share is of the highest matrix-product rate
    that the same process measures, before and after each step.

    Example:

        dino2 bench train --preset vits14 train.batch_size_per_gpu=16

        dino2 bench train --preset vitl16_short --synthetic --attention xformers --attention varlen

        dino2 bench train --preset vitl16_short --compile off --compile on --json
    """

    overrides: Overrides = ()
    preset: Preset = None
    config_file: ConfigFile = None
    data: Data = SAMPLE_PHOTOS
    synthetic: Annotated[bool, Option("Random crops, always the same, instead of a dataset.")] = False
    steps: Annotated[AtLeastOne, Option("Steps to time, after two that are not.")] = 5
    attention: Annotated[tuple[str, ...], Option("Attention backend: sdpa, xformers or varlen; repeatable.")] = ()
    precision: Annotated[tuple[str, ...], Option("fp32, bf16 or fp16; repeatable.")] = ()
    compiled: Annotated[
        tuple[str, ...], Option("on or off; repeatable: --compile off --compile on.", flags="--compile")
    ] = ()
    kernels: Annotated[int, Field(ge=0), Option("On a GPU, also list this many kernels of a step, the longest.")] = 0
    device: Device = "auto"
    as_json: Tables = False

    @field_validator("compiled")
    @classmethod
    def _on_or_off(cls, words: tuple[str, ...]) -> tuple[str, ...]:
        for word in words:
            if word not in ("on", "off"):
                raise ValueError(f"--compile {word}: on or off")
        return words


class BenchExtract(Request, command="bench extract", run_by="dinov2cli.bench.extract:run"):
    """Measure feature extraction: class tokens per second of a backbone with fresh weights.

    Example:

        dino2 bench extract --preset vits14 --batch-size 64
    """

    overrides: Overrides = ()
    preset: Preset = "vits14"
    config_file: ConfigFile = None
    data: Annotated[str | None, Option("Extract from these files, too.", metavar="DATASET")] = None
    batch_size: Annotated[AtLeastOne, Option("Images of a batch.")] = 32
    batches: Annotated[AtLeastOne, Option("Batches to time.")] = 10
    image_size: Annotated[AtLeastOne, Option("Side in pixels.")] = 224
    device: Device = "auto"
    as_json: Tables = False


class BenchAugment(Bench, command="bench augment", run_by="dinov2cli.bench.data:run"):
    """Measure images per second from file to augmented batch, and where the time goes.

    Stages are timed on one core. Rates are those of the training's own loader, by number of processes.

    Example:

        dino2 bench augment --data ~/photos --workers 0 --workers 4

        dino2 bench augment --preset vitl14 --json > rates.json
    """

    overrides: Overrides = ()
    data: Data = SAMPLE_PHOTOS
    preset: Annotated[str | None, Option("Whose crops to make.", metavar="NAME", completes="presets")] = None
    config_file: ConfigFile = None
    workers: Annotated[
        tuple[Annotated[int, Field(ge=0)], ...],
        Option("Loader processes; repeatable. 0: the main process.", default_text="0, 1, 2, 4, ... cores"),
    ] = ()
    images: Annotated[AtLeastOne, Option("Images a repeat.")] = 200
    repeats: Annotated[AtLeastOne, Option("Repeats; the median is reported.")] = 5
    as_json: Tables = False


Dim = Annotated[AtLeastOne, Option("Dimensions of a feature.")]
Classes = Annotated[int, Field(ge=2), Option("Number of classes.")]
PlainDevice = Annotated[str, Option("cpu or cuda.")]
Json = Annotated[bool, Option("Print one JSON object.", flags="--json")]


class BenchKnn(Request, command="bench knn", run_by="dinov2cli.bench.eval:knn"):
    """Measure the exact k-NN search beside the bare matrix product.

    Example:

        dino2 bench knn --queries 2000
    """

    queries: Annotated[AtLeastOne, Option("Features to classify.")] = 10_000
    keys: Annotated[AtLeastOne, Option("Features to search.")] = 100_000
    dim: Dim = 384
    k: Annotated[AtLeastOne, Option("Neighbours.")] = 200
    device: PlainDevice = "cpu"
    as_json: Json = False


class BenchLogreg(Request, command="bench logreg", run_by="dinov2cli.bench.eval:logreg"):
    """Measure the sweep over 45 values of C beside scikit-learn's fits one by one.

    Example:

        dino2 bench logreg --images 6000
    """

    images: Annotated[int, Field(ge=100), Option("Features; a tenth of them for testing.")] = 60_000
    dim: Dim = 384
    classes: Classes = 10
    every: Annotated[AtLeastOne, Option("Fit every n-th C with scikit-learn.")] = 9
    limit: Annotated[float, Field(ge=0), Option("Seconds after which scikit-learn begins no further fit.")] = (
        300  # fits take longer the larger C, so that the time of those left out is underestimated
    )
    as_json: Json = False


class BenchLinear(Request, command="bench linear", run_by="dinov2cli.bench.eval:linear"):
    """Measure a training step of 52 linear heads beside 52 separate ones.

    Example:

        dino2 bench linear --classes 1000 --steps 3
    """

    dim: Dim = 384
    classes: Classes = 10
    batch: Annotated[AtLeastOne, Option("Images of a step.", flags="--batch-size")] = 128
    steps: Annotated[AtLeastOne, Option("Steps to time.")] = 20
    device: PlainDevice = "cpu"
    as_json: Json = False


class BenchGpu(Request, command="bench gpu", run_by="dinov2cli.bench.gpu:run"):
    """Measure all that is worth knowing of a GPU in a few minutes, and write it to one file.

    Checks of the machine, the tests that need a GPU (in the source tree), the training step with each attention
    backend, compiled and not, other presets, extraction, k-NN, and the kernels that a step spends its time in. Each
    part is a process of its own; one that fails is named, and the others go on.

    Example:

        dino2 bench gpu --output gpu.json

        dino2 bench gpu --preset vits14 --minutes 3 --output gpu.json
    """

    output: Annotated[Path, Option("The JSON file, written anew after each part.", metavar="FILE")] = Path("gpu.json")
    preset: Annotated[str, Option("What is trained in every way.", metavar="NAME", completes="presets")] = (
        "vitl16_short"
    )
    others: Annotated[
        tuple[str, ...], Option("What is trained as configured.", metavar="NAME", completes="presets")
    ] = ("vits14", "vitl14")
    extract_preset: Annotated[str, Option("Whose features are extracted.", metavar="NAME", completes="presets")] = (
        "vitl14"
    )
    steps: Annotated[AtLeastOne, Option("Steps to time of each.")] = 20
    minutes: Annotated[float, Field(gt=0), Option("After which no part begins, and the one that runs is ended.")] = 8
    device: Annotated[str, Option("cuda, cuda:N, or cpu to try the command itself.")] = "cuda"
    as_json: Json = False


BENCHES = (BenchTrain, BenchExtract, BenchKnn, BenchLogreg, BenchLinear, BenchAugment, BenchGpu)
