"""Options that the evaluations share, and what they do with them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dinov2cli.errors import ConfigError, WeightsError
from dinov2cli.launch.environment import worker_rank

if TYPE_CHECKING:
    from dinov2cli.eval.metrics import MetricType
    from dinov2cli.eval.reports import Evaluation
    from dinov2cli.eval.subject import Subject
    from dinov2cli.eval.tasks import Extraction
    from dinov2cli.eval.test_sets import TestSet

Arguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="CKPT [a.b=value ...]",
        show_default=False,
        help="What to evaluate: a run folder (its newest teacher), a teacher_checkpoint.pth, .pth or .safetensors "
        "file, a Hugging Face folder, a URL or a released name such as dinov2_vits14; then changes of its config.",
    ),
]
PretrainedWeights = Annotated[
    str | None, typer.Option("--pretrained-weights", metavar="CKPT", help="Another way to give CKPT.")
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config-file", metavar="YAML", help="Configuration instead of the run's own.")
]
TrainDataset = Annotated[
    str | None,
    typer.Option(
        "--train-dataset",
        metavar="DATASET",
        help="Labelled images to learn from: a folder with a subfolder per class, or a string such as "
        "ImageNet:split=TRAIN:root=/data:extra=/data. By default what the run's config names.",
    ),
]
ValDataset = Annotated[
    str | None, typer.Option("--val-dataset", metavar="DATASET", help="Labelled images to classify, likewise.")
]
OutputDir = Annotated[
    Path | None,
    typer.Option("--output-dir", metavar="DIR", help="Where results go; by default beside the run's teacher."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
BatchSize = Annotated[int, typer.Option("--batch-size", "--batch_size", min=1, help="Images at a time.")]
NumWorkers = Annotated[
    int | None, typer.Option("--num-workers", min=0, help="Processes that decode images; by default from the cores.")
]
ImageSize = Annotated[
    int | None,
    typer.Option("--image-size", min=1, help="Side in pixels to evaluate at; by default the model's, at most 224."),
]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda or cuda:N; by default a GPU if there is one.")]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Extract features anew and keep none.")]


def split_arguments(arguments: list[str] | None, pretrained_weights: str | None) -> tuple[str, list[str]]:
    """CKPT and overrides from the positional arguments; CKPT may come from `--pretrained-weights` instead.

    Raises:
        WeightsError: there is no CKPT.
        ConfigError: something after it is no `a.b=value`.
    """
    words = list(arguments or [])
    checkpoint = pretrained_weights or (words.pop(0) if words else None)
    if checkpoint is None:
        raise WeightsError(
            "No checkpoint given.",
            hint="Name a run folder, a weights file or a released model: dino2 eval knn CKPT ...",
        )
    for word in words:
        if "=" not in word:
            raise ConfigError(f"'{word}' is no change of the configuration; these are written a.b=value.")
    return checkpoint, words


def load(
    arguments: list[str] | None,
    pretrained_weights: str | None,
    config_file: Path | None,
    train_dataset: str | None,
    val_dataset: str | None,
    *,
    trains: bool = True,
) -> tuple["Subject", str, str]:
    """The model to evaluate and its train and val dataset; without training the train dataset may be left out."""
    from dinov2cli.console import set_up_logging
    from dinov2cli.eval.subject import datasets_for, load_subject

    set_up_logging(quiet=worker_rank() > 0)
    checkpoint, overrides = split_arguments(arguments, pretrained_weights)
    subject = load_subject(checkpoint, config_file, overrides)
    return subject, *datasets_for(subject.config, train_dataset or (None if trains else "none"), val_dataset)


def one_of(word: str, known: tuple[str, ...], option: str) -> str:
    """`word` if it is known, else ConfigError."""
    if word not in known:
        raise ConfigError(f"{option} {word} is unknown; known: {', '.join(known)}.")
    return word


def metric_type(word: str, option: str) -> "MetricType":
    """The way to average that `word` names, as the reference implementation spells it."""
    from dinov2cli.eval.metrics import MetricType

    return MetricType(one_of(word, tuple(MetricType), option))


def make_test_sets(
    datasets: list[str] | None,
    metrics: list[str] | None,
    mappings: list[str] | None,
    labels: list[str] | None,
    metric: "MetricType",
) -> list["TestSet"]:
    """Test sets from options that give one value for each dataset, or none at all; `None` leaves one out."""
    from dinov2cli.eval.test_sets import TestSet

    names = datasets or []
    for option, values in (
        ("--test-metric-types", metrics),
        ("--test-class-mapping-fpaths", mappings),
        ("--test-labels", labels),
    ):
        if values and len(values) != len(names):
            raise ConfigError(f"{option}: {len(values)} values for {len(names)} test datasets; give one for each.")

    def path(values: list[str] | None, i: int) -> Path | None:
        return Path(values[i]) if values and values[i] != "None" else None

    return [
        TestSet(
            name,
            metric_type(metrics[i], "--test-metric-types") if metrics else metric,
            path(mappings, i),
            path(labels, i),
        )
        for i, name in enumerate(names)
    ]


def read_head(head: str | None, layers: int) -> Any:
    """A linear head from a file, a URL or a released name; None for none."""
    if head is None:
        return None
    from dinov2cli.models import zoo
    from dinov2cli.models.classifier import read_linear_head
    from dinov2cli.models.download import fetch

    if (released := zoo.RELEASED.get(head)) is None:
        return read_linear_head(head)
    one_of(str(layers), ("1", "4"), "--head-layers")
    return read_linear_head(fetch(released.head_url(layers), expect_bytes=released.head_bytes(layers)))


def make_extraction(
    image_size: int | None, batch_size: int, num_workers: int | None, device: str | None, no_cache: bool
) -> "Extraction":
    from dinov2cli.eval.cache import FeatureCache
    from dinov2cli.eval.tasks import Extraction

    return Extraction(image_size, batch_size, num_workers, device, None if no_cache else FeatureCache())


def show(result: "Evaluation", as_json: bool, **extra: Any) -> None:
    from dinov2cli.console import out, print_json
    from dinov2cli.eval.reports import results_table

    if worker_rank() > 0:  # the processes have parted by now, so that each would be the main one
        return
    if as_json:
        print_json({**result.as_dict(), **extra})
    else:
        out.print(results_table([result]))
