"""Requests for measurements: how fast the parts of dino2 run on this machine."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dinov2cli.requests.base import AboveZero, AtLeastOne, Request, argument, option
from dinov2cli.requests.train import ConfiguredRequest


class BenchConfiguredRequest(ConfiguredRequest):
    """What measurements of a configuration share."""

    overrides: tuple[str, ...] = argument("Changes of single configuration keys.", default=(), completes="overrides")
    preset: str | None = option(None, "What to run.", completes="presets")
    as_json: bool = option(False, "Print one JSON object instead of tables.", flags="--json", last=True)


class BenchTrainRequest(BenchConfiguredRequest, command="bench train", run_by="dinov2cli.bench.train:run"):
    """Measure a training step: images per second, where the time goes, and the share of the hardware's rate.

    Every combination of the given attention backends, precisions and compilation is measured. The model's FLOPs are
    those that the losses and gradients need (a table in docs/speed.md); the share is of the highest matrix-product rate
    that the same process measures, before and after each step.

    Example:

        dino2 bench train --preset vits14 train.batch_size_per_gpu=16

        dino2 bench train --preset vitl16_short --synthetic --attention xformers --attention varlen

        dino2 bench train --preset vitl16_short --compile off --compile on --json

        dino2 bench train --preset vitl16_short --rehearse --card h100

        dino2 bench train --preset vitg14 --rehearse --gpus 8
    """

    data: str = option("SamplePhotos:split=TRAIN", "A folder of images or a dataset string.", metavar="DATASET")
    synthetic: bool = option(False, "Random crops, always the same, instead of a dataset.")
    steps: AtLeastOne = option(5, "Steps to time, after two that are not.")
    attention: tuple[str, ...] = option((), "Attention backend: sdpa, xformers or varlen; repeatable.")
    precision: tuple[str, ...] = option((), "fp32, bf16 or fp16; repeatable.")
    compiled: tuple[Literal["on", "off"], ...] = option(
        (), "on or off; repeatable: --compile off --compile on.", flags="--compile"
    )
    kernels: int = option(0, "On a GPU, also list this many kernels of a step, the longest.", ge=0)
    device: str = option("auto", "cpu, cuda, or auto: a GPU if there is one.")
    rehearse: bool = option(
        False, "Run nothing: count what a step would take on --card, on fake tensors. No GPU is needed."
    )
    card: Literal["h100", "h200", "a100", "l4", "rtx4090"] = option("h100", "The GPU that is rehearsed for.")
    gpus: AtLeastOne = option(1, "GPUs that are rehearsed for; several share the parameters (train.sharding=fsdp).")

    @model_validator(mode="after")
    def _several_are_rehearsed(self) -> Self:
        if self.gpus > 1 and not self.rehearse:
            raise ValueError(f"--gpus {self.gpus} goes with --rehearse; what is measured is a step on one device")
        return self


class BenchExtractRequest(BenchConfiguredRequest, command="bench extract", run_by="dinov2cli.bench.extract:run"):
    """Measure feature extraction: class tokens per second of a backbone with fresh weights.

    Example:

        dino2 bench extract --preset vits14 --batch-size 64
    """

    preset: str | None = option("vits14", "What to run.", completes="presets")
    data: str | None = option(None, "Extract from these files, too.", metavar="DATASET")
    batch_size: AtLeastOne = option(32, "Images of a batch.")
    batches: AtLeastOne = option(10, "Batches to time.")
    image_size: AtLeastOne = option(224, "Side in pixels.")
    device: str = option("auto", "cpu, cuda, or auto: a GPU if there is one.")


class BenchAugmentRequest(BenchConfiguredRequest, command="bench augment", run_by="dinov2cli.bench.data:run"):
    """Measure images per second from file to augmented batch, and where the time goes.

    Stages are timed on one core. Rates are those of the training's own loader, by number of processes.

    Example:

        dino2 bench augment --data ~/photos --workers 0 --workers 4

        dino2 bench augment --preset vitl14 --json > rates.json
    """

    preset: str | None = option(None, "Whose crops to make.", completes="presets")
    data: str = option("SamplePhotos:split=TRAIN", "A folder of images or a dataset string.", metavar="DATASET")
    workers: tuple[Annotated[int, Field(ge=0)], ...] = option(
        (), "Loader processes; repeatable. 0: the main process.", default_text="0, 1, 2, 4, ... cores"
    )
    images: AtLeastOne = option(200, "Images a repeat.")
    repeats: AtLeastOne = option(5, "Repeats; the median is reported.")


class BenchKnnRequest(Request, command="bench knn", run_by="dinov2cli.bench.eval:knn"):
    """Measure the exact k-NN search beside the bare matrix product.

    Example:

        dino2 bench knn --queries 2000
    """

    queries: AtLeastOne = option(10_000, "Features to classify.")
    keys: AtLeastOne = option(100_000, "Features to search.")
    dim: AtLeastOne = option(384, "Dimensions of a feature.")
    k: AtLeastOne = option(200, "Neighbours.")
    device: str = option("cpu", "cpu or cuda.")
    as_json: bool = option(False, "Print one JSON object.", flags="--json")


class BenchLogregRequest(Request, command="bench logreg", run_by="dinov2cli.bench.eval:logreg"):
    """Measure the sweep over 45 values of C beside scikit-learn's fits one by one.

    Example:

        dino2 bench logreg --images 6000
    """

    images: int = option(60_000, "Features; a tenth of them for testing.", ge=100)
    dim: AtLeastOne = option(384, "Dimensions of a feature.")
    classes: int = option(10, "Number of classes.", ge=2)
    every: AtLeastOne = option(9, "Fit every n-th C with scikit-learn.")
    # Fits take longer the larger C, so that the time of those left out is underestimated.
    limit: float = option(300, "Seconds after which scikit-learn begins no further fit.", ge=0)
    as_json: bool = option(False, "Print one JSON object.", flags="--json")


class BenchLinearRequest(Request, command="bench linear", run_by="dinov2cli.bench.eval:linear"):
    """Measure a training step of 52 linear heads beside 52 separate ones.

    Example:

        dino2 bench linear --classes 1000 --steps 3
    """

    dim: AtLeastOne = option(384, "Dimensions of a feature.")
    classes: int = option(10, "Number of classes.", ge=2)
    batch: AtLeastOne = option(128, "Images of a step.", flags="--batch-size")
    steps: AtLeastOne = option(20, "Steps to time.")
    device: str = option("cpu", "cpu or cuda.")
    as_json: bool = option(False, "Print one JSON object.", flags="--json")


class BenchGpuRequest(Request, command="bench gpu", run_by="dinov2cli.bench.gpu:run"):
    """Measure all that is worth knowing of a GPU in a few minutes, and write it to one file.

    Checks of the machine, the tests that need a GPU (in the source tree), the training step with each attention
    backend, compiled and not, other presets, extraction, k-NN, and the kernels that a step spends its time in. Each
    part is a process of its own; one that fails is named, and the others go on.

    Example:

        dino2 bench gpu --output gpu.json

        dino2 bench gpu --preset vits14 --minutes 3 --output gpu.json
    """

    output: Path = option(Path("gpu.json"), "The JSON file, written anew after each part.", metavar="FILE")
    preset: str = option("vitl16_short", "What is trained in every way.", completes="presets")
    others: tuple[str, ...] = option(("vits14", "vitl14"), "What is trained as configured.", completes="presets")
    extract_preset: str = option("vitl14", "Whose features are extracted.", completes="presets")
    steps: AtLeastOne = option(20, "Steps to time of each.")
    minutes: AboveZero = option(8, "After which no part begins, and the one that runs is ended.")
    device: str = option("cuda", "cuda, cuda:N, or cpu to try the command itself.")
    as_json: bool = option(False, "Print one JSON object.", flags="--json")
