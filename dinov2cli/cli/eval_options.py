"""Options that the evaluations share, and what they do with them."""

from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import typer

from dinov2cli.errors import ConfigError, WeightsError
from dinov2cli.launch.environment import worker_rank
from dinov2cli.requests.eval import EvalRequest, Metric

R = TypeVar("R", bound=EvalRequest)
METRICS = get_args(Metric)

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


def request_of(kind: type[R], context: typer.Context, **options: Any) -> R:
    """The request that a command line means; what it leaves out is the request's default."""
    params = context.params
    checkpoint, overrides = split_arguments(params["arguments"], params["pretrained_weights"])
    shared = ("train_dataset", "val_dataset", "output_dir", "config_file", "num_workers", "image_size", "device")
    options |= {name: params[name] for name in (*shared, "no_cache")}
    given = {name: value for name, value in options.items() if value is not None and value != []}
    return kind(checkpoint=checkpoint, overrides=tuple(overrides), **given)


def run(request: EvalRequest, as_json: bool) -> None:
    """Do what is asked, alone or as one of several processes, and print the result."""
    from dinov2cli.console import out, print_json, set_up_logging
    from dinov2cli.distributed import process_group
    from dinov2cli.eval.protocol import evaluate
    from dinov2cli.eval.reports import results_table

    set_up_logging(quiet=worker_rank() > 0)
    with process_group():
        result = evaluate(request)
    if worker_rank() > 0:  # the processes have parted by now, so that each would be the main one
        return
    if as_json:
        print_json(result.as_dict())
    else:
        out.print(results_table([result]))


def one_of(word: str, known: tuple[str, ...], option: str) -> str:
    """`word` if it is known, else ConfigError."""
    if word not in known:
        raise ConfigError(f"{option} {word} is unknown; known: {', '.join(known)}.")
    return word
