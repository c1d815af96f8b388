"""What the evaluations and `dino2 embed` may be asked for: a class for what all share, and one for each.

The names and defaults of the options are the reference implementation's.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from dinov2cli.errors import WeightsError
from dinov2cli.requests.base import Argument, AsJson, AtLeastOne, Option, Request
from dinov2cli.requests.launch import Gpus, Slurm

Metric = Literal["mean_accuracy", "mean_per_class_accuracy", "per_class_accuracy", "imagenet_real_accuracy"]
"""How hits are averaged."""
ConfigFile = Annotated[Path | None, Option("Configuration instead of the run's own.", metavar="YAML")]
BatchSize = Annotated[AtLeastOne, Option("Images at a time.", flags="--batch-size --batch_size")]
NumWorkers = Annotated[
    Annotated[int, Field(ge=0)] | None, Option("Processes that decode images; by default from the cores.", last=True)
]
ImageSize = Annotated[
    AtLeastOne | None, Option("Side in pixels to evaluate at; by default the model's, at most 224.", last=True)
]
Device = Annotated[str | None, Option("cpu, cuda or cuda:N; by default a GPU if there is one.", last=True)]
NoCache = Annotated[bool, Option("Extract features anew and keep none.", last=True)]


class EvalRequest(
    Request, run_by="dinov2cli.eval.protocol:evaluate", launched_by="dinov2cli.launch.evaluation:launch", logs=True
):
    """What all evaluations share. The words of `command` end with the name of a module of `dinov2cli.eval`."""

    checkpoint: Annotated[
        str,
        Argument(
            "What to evaluate: a run folder (its newest teacher), a teacher_checkpoint.pth, .pth or .safetensors "
            "file, a Hugging Face folder, a URL or a released name such as dinov2_vits14.",
            metavar="CKPT",
            default_text=False,
        ),
    ] = ""
    overrides: Annotated[
        tuple[str, ...], Argument("Changes of its config.", metavar="[a.b=value ...]", completes="overrides")
    ] = ()
    train_dataset: Annotated[
        str | None,
        Option(
            "Labelled images to learn from: a folder with a subfolder per class, or a string such as "
            "ImageNet:split=TRAIN:root=/data:extra=/data. By default what the run's config names.",
            metavar="DATASET",
        ),
    ] = None
    val_dataset: Annotated[str | None, Option("Labelled images to classify, likewise.", metavar="DATASET")] = None
    output_dir: Annotated[
        Path | None, Option("Where results go; by default beside the run's teacher.", metavar="DIR")
    ] = None
    config_file: ConfigFile = None
    pretrained_weights: Annotated[
        str | None, Option("Another way to give CKPT.", metavar="CKPT", names_argument=True)
    ] = None
    num_workers: NumWorkers = None
    image_size: ImageSize = None
    device: Device = None
    no_cache: NoCache = False
    as_json: AsJson = False
    gpus: Gpus = None
    slurm: Slurm = Slurm()

    @classmethod
    def protocol(cls) -> str:
        """The module of `dinov2cli.eval` whose `run` does it."""
        return cls.command.split()[-1]

    @model_validator(mode="before")
    @classmethod
    def _one_checkpoint(cls, values: dict[str, Any]) -> dict[str, Any]:
        if weights := values.get("pretrained_weights"):
            words = [word for word in (values.get("checkpoint"), *values.get("overrides", ())) if word]
            values = {**values, "checkpoint": weights, "overrides": words, "pretrained_weights": None}
        if not values.get("checkpoint"):
            raise WeightsError(
                "No checkpoint given.",
                hint="Name a run folder, a weights file or a released model: dino2 eval knn CKPT ...",
            )
        return values

    @field_validator("overrides")
    @classmethod
    def _are_overrides(cls, words: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if other := [word for word in words if "=" not in word]:
            raise ValueError(
                f"'{other[0]}' is no change of the configuration; these are written a.b=value. "
                f"What is evaluated is '{info.data.get('checkpoint')}', the first word that belongs to no option."
            )
        return words


class KnnRequest(EvalRequest, command="eval knn"):
    """Classify images by their nearest neighbours in feature space.

    Nothing is trained: the `cls` features of the train images vote, weighted by similarity. Where train and val are
    the same images, each is classified by the others.

    Example:

        dino2 eval knn runs/demo --train-dataset photos/train --val-dataset photos/val
    """

    nb_knn: Annotated[
        tuple[AtLeastOne, ...],
        Option("Numbers of neighbours [10 20 100 200].", flags="--nb-knn --nb_knn", default_text=False),
    ] = (10, 20, 100, 200)
    temperature: Annotated[float, Field(ge=1e-4), Option("T of the votes' softmax.")] = 0.07
    n_per_class_list: Annotated[
        tuple[Annotated[int, Field(ge=-1)], ...],
        Option(
            "Train images of each class; -1 for all [-1].", flags="--n-per-class-list --n-per-class", default_text=False
        ),
    ] = (-1,)
    n_tries: Annotated[AtLeastOne, Option("Random choices of these to average over.")] = 1
    gather_on_cpu: Annotated[bool, Option("Search on the CPU. Features never need to fit on a GPU.")] = False
    batch_size: BatchSize = 256

    @field_validator("n_per_class_list")
    @classmethod
    def _are_numbers_of_images(cls, numbers: tuple[int, ...]) -> tuple[int, ...]:
        if 0 in numbers:
            raise ValueError("--n-per-class-list 0: give at least 1 image per class, or -1 for all.")
        return numbers


class LogregRequest(EvalRequest, command="eval logreg"):
    """Fit a logistic regression to the features, its strength C chosen among 45 values.

    C is chosen on a random tenth of the train images (or a fine-tune set, or val), then all train images are fitted.

    Example:

        dino2 eval logreg runs/demo --train-dataset photos/train --val-dataset photos/val
    """

    finetune_dataset: Annotated[
        str | None,
        Option("Images to choose C on.", flags="--finetune-dataset --finetune-dataset-str", metavar="DATASET"),
    ] = None
    finetune_on_val: Annotated[bool, Option("Choose C on the val set instead of a tenth of the train set.")] = False
    metric_type: Annotated[
        Literal["mean_accuracy", "mean_per_class_accuracy", "per_class_accuracy"],
        Option("mean_accuracy, mean_per_class_accuracy or per_class_accuracy.", metavar="METRIC"),
    ] = "mean_accuracy"
    train_dtype: Annotated[
        Literal["float64", "float32"], Option("float64, or float32 for less precision.", metavar="DTYPE")
    ] = "float64"
    train_features_device: Annotated[str | None, Option("Where to fit; by default where features are made.")] = None
    max_train_iters: Annotated[AtLeastOne, Option("Steps of L-BFGS for each C.")] = 1000
    batch_size: BatchSize = 256


class LinearRequest(EvalRequest, command="eval linear"):
    """Train linear classifiers on the frozen features and report the best.

    52 of them side by side: 13 learning rates, the last block or the last four, with and without the mean patch token.

    Example:

        dino2 eval linear runs/demo --train-dataset photos/train --val-dataset photos/val --epochs 1
    """

    head: Annotated[
        str | None,
        Option(
            "Evaluate a trained head instead of training: a file of weight and bias, a URL, or a released name "
            "such as dinov2_vitb14_lc.",
            flags="--head --classifier-fpath",
            metavar="HEAD",
        ),
    ] = None
    head_layers: Annotated[int, Option("1 or 4: which of the released heads.")] = 4
    frozen_crops: Annotated[bool, Option("Fast approximation: train on the features of centre crops.")] = False
    test_datasets: Annotated[tuple[str, ...], Option("Further datasets to test on.", metavar="DATASET")] = ()
    test_metric_types: Annotated[
        tuple[Metric, ...],
        Option(
            "For each test dataset: mean_accuracy, mean_per_class_accuracy, per_class_accuracy or "
            "imagenet_real_accuracy [as val].",
            metavar="METRIC",
        ),
    ] = ()
    test_class_mapping_fpaths: Annotated[
        tuple[str, ...], Option("For each test dataset: classes, or None.", metavar="NPY")
    ] = ()
    test_labels: Annotated[
        tuple[str, ...], Option("For each test dataset: .npy or .json labels, or None.", metavar="FILE")
    ] = ()
    val_class_mapping_fpath: Annotated[Path | None, Option("Classes of val, with --head.", metavar="NPY")] = None
    val_metric_type: Annotated[Metric, Option("As --test-metric-types.", metavar="METRIC")] = "mean_accuracy"
    epochs: Annotated[AtLeastOne, Option("Epochs.")] = 10
    epoch_length: Annotated[AtLeastOne, Option("Iterations of an epoch.")] = 1250
    batch_size: Annotated[AtLeastOne, Option("Images in a step on each process.")] = 128
    learning_rates: Annotated[
        tuple[float, ...], Option("Rates for a batch of 256 [13 from 1e-5 to 0.1].", default_text=False)
    ] = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
    eval_period_iterations: Annotated[int, Field(ge=0), Option("Iterations between looks at val; 0: none.")] = 1250
    save_checkpoint_frequency: Annotated[AtLeastOne, Option("Epochs between checkpoints.")] = 1
    no_resume: Annotated[bool, Option("Start anew even if there is a checkpoint.")] = False

    @field_validator("head_layers")
    @classmethod
    def _are_released(cls, layers: int) -> int:
        if layers not in (1, 4):
            raise ValueError(f"--head-layers {layers} is unknown; known: 1, 4.")
        return layers

    @model_validator(mode="after")
    def _one_for_each_test_dataset(self) -> "LinearRequest":
        for name in ("test_metric_types", "test_class_mapping_fpaths", "test_labels"):
            given, sets = len(getattr(self, name)), len(self.test_datasets)
            if given not in (0, sets):
                option = "--" + name.replace("_", "-")
                raise ValueError(f"{option}: {given} values for {sets} test datasets; give one for each.")
        return self


EVALUATIONS: dict[str, type[EvalRequest]] = {it.protocol(): it for it in (KnnRequest, LogregRequest, LinearRequest)}
"""What may follow `dino2 eval`, or stand in `evaluation.tasks`."""


class EmbedRequest(Request, command="embed", run_by="dinov2cli.eval.embed:run", logs=True):
    """Write the features of every image to a file.

    For each image: the class token, the mean patch token, the class tokens of the last four blocks, label and path.

    Example:

        dino2 embed runs/demo --data photos --output photos.safetensors

        dino2 embed dinov2_vits14 --data photos --output photos.parquet
    """

    checkpoint: Annotated[str, Argument("A run folder, a weights file, a URL or a released name.", metavar="CKPT")]
    data: Annotated[str, Option("A folder of images or a dataset string.", metavar="DATASET")]
    output: Annotated[Path, Option("A .safetensors or .parquet file.", metavar="FEATURES")]
    config_file: ConfigFile = None
    batch_size: BatchSize = 256
    num_workers: NumWorkers = None
    image_size: ImageSize = None
    resize_ratio: Annotated[
        float,
        Field(ge=1),
        Option(
            "Short side to resize to, as a multiple of the image size: 256/224 as in eval knn and linear, 1 as in "
            "eval logreg.",
            default_text="256/224",
            last=True,
        ),
    ] = 256 / 224
    device: Device = None
    no_cache: NoCache = False
    as_json: Annotated[bool, Option("Print one JSON object about the file.", flags="--json", last=True)] = False
