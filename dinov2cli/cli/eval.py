"""`dino2 eval`: k-NN, logistic regression and linear probe of frozen features."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dinov2cli.cli.variadic import VariadicCommand
from dinov2cli.errors import ConfigError, WeightsError

if TYPE_CHECKING:
    from dinov2cli.eval.reports import Evaluation
    from dinov2cli.eval.subject import Subject
    from dinov2cli.eval.tasks import Extraction

evaluation = typer.Typer(
    name="eval",
    help="Evaluate frozen features by k-NN, logistic regression or linear probe.\n\n"
    "Example:\n\n    dino2 eval knn runs/demo",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

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


@evaluation.command("knn", cls=VariadicCommand)
def knn(
    arguments: Arguments = None,
    train_dataset: TrainDataset = None,
    val_dataset: ValDataset = None,
    output_dir: OutputDir = None,
    config_file: ConfigFile = None,
    pretrained_weights: PretrainedWeights = None,
    nb_knn: Annotated[
        list[int] | None, typer.Option("--nb-knn", "--nb_knn", min=1, help="Numbers of neighbours [10 20 100 200].")
    ] = None,
    temperature: Annotated[float, typer.Option("--temperature", min=1e-4, help="T of the votes' softmax.")] = 0.07,
    n_per_class: Annotated[
        list[int] | None,
        typer.Option(
            "--n-per-class-list", "--n-per-class", min=-1, help="Train images of each class; -1 for all [-1]."
        ),
    ] = None,
    n_tries: Annotated[int, typer.Option("--n-tries", min=1, help="Random choices of these to average over.")] = 1,
    gather_on_cpu: Annotated[
        bool, typer.Option("--gather-on-cpu", help="Search on the CPU. Features never need to fit on a GPU.")
    ] = False,
    batch_size: BatchSize = 256,
    num_workers: NumWorkers = None,
    image_size: ImageSize = None,
    device: Device = None,
    no_cache: NoCache = False,
    as_json: AsJson = False,
) -> None:
    """Classify images by their nearest neighbours in feature space.

    Nothing is trained: the `cls` features of the train images vote, weighted by similarity. Where train and val are
    the same images, each is classified by the others.

    Example:

        dino2 eval knn runs/demo --train-dataset photos/train --val-dataset photos/val
    """
    from dinov2cli.distributed import process_group
    from dinov2cli.eval.knn import ALL_IMAGES, DEFAULT_KS, KnnSettings
    from dinov2cli.eval.tasks import run_knn

    settings = KnnSettings(tuple(nb_knn or DEFAULT_KS), temperature, tuple(n_per_class or (ALL_IMAGES,)), n_tries)
    if 0 in settings.n_per_class:
        raise ConfigError("--n-per-class-list 0: give at least 1 image per class, or -1 for all.")
    with process_group():
        subject, train, val = _load(arguments, pretrained_weights, config_file, train_dataset, val_dataset)
        result = run_knn(
            subject,
            train,
            val,
            settings=settings,
            extraction=_extraction(image_size, batch_size, num_workers, device, no_cache),
            search_on_cpu=gather_on_cpu,
            output_dir=output_dir,
        )
    _print(result, as_json)


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


def _load(
    arguments: list[str] | None,
    pretrained_weights: str | None,
    config_file: Path | None,
    train_dataset: str | None,
    val_dataset: str | None,
) -> tuple["Subject", str, str]:
    from dinov2cli.console import set_up_logging
    from dinov2cli.eval.subject import datasets_for, load_subject

    set_up_logging()
    checkpoint, overrides = split_arguments(arguments, pretrained_weights)
    subject = load_subject(checkpoint, config_file, overrides)
    return subject, *datasets_for(subject.config, train_dataset, val_dataset)


def _extraction(
    image_size: int | None, batch_size: int, num_workers: int | None, device: str | None, no_cache: bool
) -> "Extraction":
    from dinov2cli.eval.cache import FeatureCache
    from dinov2cli.eval.tasks import Extraction

    return Extraction(image_size, batch_size, num_workers, device, None if no_cache else FeatureCache())


def _print(result: "Evaluation", as_json: bool, **extra: Any) -> None:
    from dinov2cli.console import out, print_json
    from dinov2cli.distributed import is_main
    from dinov2cli.eval.reports import results_table

    if not is_main():
        return
    if as_json:
        print_json({**result.as_dict(), **extra})
    else:
        out.print(results_table([result]))
