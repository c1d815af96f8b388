"""`dino2 eval`: k-NN, logistic regression and linear probe of frozen features."""

from pathlib import Path
from typing import Annotated

import typer

from dinov2cli.cli.eval_options import (
    METRICS,
    Arguments,
    AsJson,
    BatchSize,
    ConfigFile,
    Device,
    ImageSize,
    NoCache,
    NumWorkers,
    OutputDir,
    PretrainedWeights,
    TrainDataset,
    ValDataset,
    one_of,
    request_of,
    run,
    split_arguments,
)
from dinov2cli.cli.slurm_options import (
    Account,
    Comment,
    Constraint,
    CpusPerTask,
    Exclude,
    GpusEach,
    Mem,
    Nodes,
    Partition,
    Qos,
    Setup,
    Slurm,
    TimeoutMin,
    launched_evaluation,
)
from dinov2cli.cli.variadic import VariadicCommand
from dinov2cli.errors import ConfigError
from dinov2cli.requests.eval import KnnRequest, LinearRequest, LogregRequest

evaluation = typer.Typer(
    name="eval",
    help="Evaluate frozen features by k-NN, logistic regression or linear probe.\n\n"
    "Example:\n\n    dino2 eval knn runs/demo",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


@evaluation.command("knn", cls=VariadicCommand)
def knn(
    context: typer.Context,
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
    gpus: GpusEach = None,
    nodes: Nodes = None,
    partition: Partition = None,
    account: Account = None,
    qos: Qos = None,
    constraint: Constraint = None,
    exclude: Exclude = None,
    comment: Comment = None,
    timeout_min: TimeoutMin = None,
    cpus_per_task: CpusPerTask = None,
    mem: Mem = None,
    slurm: Slurm = None,
    setup: Setup = None,
) -> None:
    """Classify images by their nearest neighbours in feature space.

    Nothing is trained: the `cls` features of the train images vote, weighted by similarity. Where train and val are
    the same images, each is classified by the others.

    Example:

        dino2 eval knn runs/demo --train-dataset photos/train --val-dataset photos/val
    """
    checkpoint, _ = split_arguments(arguments, pretrained_weights)
    if launched_evaluation(context, checkpoint, gpus=gpus, device=device, output_dir=output_dir):
        return
    request = request_of(
        KnnRequest,
        context,
        nb_knn=nb_knn,
        temperature=temperature,
        n_per_class_list=n_per_class,
        n_tries=n_tries,
        gather_on_cpu=gather_on_cpu,
        batch_size=batch_size,
    )
    if 0 in request.n_per_class_list:
        raise ConfigError("--n-per-class-list 0: give at least 1 image per class, or -1 for all.")
    run(request, as_json)


@evaluation.command("logreg", cls=VariadicCommand)
def logreg(
    context: typer.Context,
    arguments: Arguments = None,
    train_dataset: TrainDataset = None,
    val_dataset: ValDataset = None,
    output_dir: OutputDir = None,
    config_file: ConfigFile = None,
    pretrained_weights: PretrainedWeights = None,
    finetune_dataset: Annotated[
        str | None,
        typer.Option("--finetune-dataset", "--finetune-dataset-str", metavar="DATASET", help="Images to choose C on."),
    ] = None,
    finetune_on_val: Annotated[
        bool, typer.Option("--finetune-on-val", help="Choose C on the val set instead of a tenth of the train set.")
    ] = False,
    metric: Annotated[
        str, typer.Option("--metric-type", help="mean_accuracy, mean_per_class_accuracy or per_class_accuracy.")
    ] = "mean_accuracy",
    train_dtype: Annotated[str, typer.Option("--train-dtype", help="float64, or float32 for less precision.")] = (
        "float64"
    ),
    train_device: Annotated[
        str | None, typer.Option("--train-features-device", help="Where to fit; by default where features are made.")
    ] = None,
    max_iter: Annotated[int, typer.Option("--max-train-iters", min=1, help="Steps of L-BFGS for each C.")] = 1000,
    batch_size: BatchSize = 256,
    num_workers: NumWorkers = None,
    image_size: ImageSize = None,
    device: Device = None,
    no_cache: NoCache = False,
    as_json: AsJson = False,
    gpus: GpusEach = None,
    nodes: Nodes = None,
    partition: Partition = None,
    account: Account = None,
    qos: Qos = None,
    constraint: Constraint = None,
    exclude: Exclude = None,
    comment: Comment = None,
    timeout_min: TimeoutMin = None,
    cpus_per_task: CpusPerTask = None,
    mem: Mem = None,
    slurm: Slurm = None,
    setup: Setup = None,
) -> None:
    """Fit a logistic regression to the features, its strength C chosen among 45 values.

    C is chosen on a random tenth of the train images (or a fine-tune set, or val), then all train images are fitted.

    Example:

        dino2 eval logreg runs/demo --train-dataset photos/train --val-dataset photos/val
    """
    checkpoint, _ = split_arguments(arguments, pretrained_weights)
    if launched_evaluation(context, checkpoint, gpus=gpus, device=device, output_dir=output_dir):
        return
    request = request_of(
        LogregRequest,
        context,
        finetune_dataset=finetune_dataset,
        finetune_on_val=finetune_on_val,
        metric_type=one_of(metric, METRICS, "--metric-type"),
        train_dtype=one_of(train_dtype, ("float64", "float32"), "--train-dtype"),
        train_features_device=train_device,
        max_train_iters=max_iter,
        batch_size=batch_size,
    )
    run(request, as_json)


@evaluation.command("linear", cls=VariadicCommand)
def linear(
    context: typer.Context,
    arguments: Arguments = None,
    train_dataset: TrainDataset = None,
    val_dataset: ValDataset = None,
    output_dir: OutputDir = None,
    config_file: ConfigFile = None,
    pretrained_weights: PretrainedWeights = None,
    head: Annotated[
        str | None,
        typer.Option(
            "--head",
            "--classifier-fpath",
            metavar="HEAD",
            help="Evaluate a trained head instead of training: a file of weight and bias, a URL, or a released name "
            "such as dinov2_vitb14_lc.",
        ),
    ] = None,
    head_layers: Annotated[int, typer.Option("--head-layers", help="1 or 4: which of the released heads.")] = 4,
    frozen_crops: Annotated[
        bool, typer.Option("--frozen-crops", help="Fast approximation: train on the features of centre crops.")
    ] = False,
    test_datasets: Annotated[
        list[str] | None, typer.Option("--test-datasets", metavar="DATASET", help="Further datasets to test on.")
    ] = None,
    test_metrics: Annotated[
        list[str] | None,
        typer.Option(
            "--test-metric-types",
            help="For each test dataset: mean_accuracy, mean_per_class_accuracy, per_class_accuracy or "
            "imagenet_real_accuracy [as val].",
        ),
    ] = None,
    test_mappings: Annotated[
        list[str] | None,
        typer.Option("--test-class-mapping-fpaths", metavar="NPY", help="For each test dataset: classes, or None."),
    ] = None,
    test_labels: Annotated[
        list[str] | None,
        typer.Option("--test-labels", metavar="FILE", help="For each test dataset: .npy or .json labels, or None."),
    ] = None,
    val_mapping: Annotated[
        Path | None, typer.Option("--val-class-mapping-fpath", metavar="NPY", help="Classes of val, with --head.")
    ] = None,
    val_metric: Annotated[str, typer.Option("--val-metric-type", help="As --test-metric-types.")] = "mean_accuracy",
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Epochs.")] = 10,
    epoch_length: Annotated[int, typer.Option("--epoch-length", min=1, help="Iterations of an epoch.")] = 1250,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images in a step on each process.")] = 128,
    learning_rates: Annotated[
        list[float] | None, typer.Option("--learning-rates", help="Rates for a batch of 256 [13 from 1e-5 to 0.1].")
    ] = None,
    eval_period: Annotated[
        int, typer.Option("--eval-period-iterations", min=0, help="Iterations between looks at val; 0: none.")
    ] = 1250,
    save_frequency: Annotated[
        int, typer.Option("--save-checkpoint-frequency", min=1, help="Epochs between checkpoints.")
    ] = 1,
    no_resume: Annotated[bool, typer.Option("--no-resume", help="Start anew even if there is a checkpoint.")] = False,
    num_workers: NumWorkers = None,
    image_size: ImageSize = None,
    device: Device = None,
    no_cache: NoCache = False,
    as_json: AsJson = False,
    gpus: GpusEach = None,
    nodes: Nodes = None,
    partition: Partition = None,
    account: Account = None,
    qos: Qos = None,
    constraint: Constraint = None,
    exclude: Exclude = None,
    comment: Comment = None,
    timeout_min: TimeoutMin = None,
    cpus_per_task: CpusPerTask = None,
    mem: Mem = None,
    slurm: Slurm = None,
    setup: Setup = None,
) -> None:
    """Train linear classifiers on the frozen features and report the best.

    52 of them side by side: 13 learning rates, the last block or the last four, with and without the mean patch token.

    Example:

        dino2 eval linear runs/demo --train-dataset photos/train --val-dataset photos/val --epochs 1
    """
    checkpoint, _ = split_arguments(arguments, pretrained_weights)
    if launched_evaluation(context, checkpoint, gpus=gpus, device=device, output_dir=output_dir):
        return
    request = request_of(
        LinearRequest,
        context,
        head=head,
        head_layers=head_layers,
        frozen_crops=frozen_crops,
        test_datasets=test_datasets,
        test_metric_types=[one_of(word, METRICS, "--test-metric-types") for word in test_metrics or ()],
        test_class_mapping_fpaths=test_mappings,
        test_labels=test_labels,
        val_class_mapping_fpath=val_mapping,
        val_metric_type=one_of(val_metric, METRICS, "--val-metric-type"),
        epochs=epochs,
        epoch_length=epoch_length,
        batch_size=batch_size,
        learning_rates=learning_rates,
        eval_period_iterations=eval_period,
        save_checkpoint_frequency=save_frequency,
        no_resume=no_resume,
    )
    run(request, as_json)
