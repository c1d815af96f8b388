"""What the evaluations and `dino2 embed` may be asked for: a class for what all share, and one for each.

The names and defaults of the options are the reference implementation's.
"""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from dinov2cli.errors import WeightsError
from dinov2cli.requests.base import AboveZero, AtLeastOne, CheckpointRequest, DeviceRequest, argument, option
from dinov2cli.requests.images import ImagesRequest
from dinov2cli.requests.launch import Slurm

Metric = Literal["mean_accuracy", "mean_per_class_accuracy", "per_class_accuracy", "imagenet_real_accuracy"]
"""How hits are averaged."""
OneOrSeveral = Annotated[tuple[str, ...], BeforeValidator(lambda words: (words,) if isinstance(words, str) else words)]
MAX_BAD_FRACTION: Any = option(
    None,
    "Share of unreadable images above which it stops; by default the run's train.max_bad_fraction, or 0.01.",
    ge=0,
    le=1,
    last=True,
)
RESIZE_RATIO: Any = option(
    256 / 224, "Short side to resize to, as a multiple of the image size.", ge=1, default_text="256/224", last=True
)


class FeaturesRequest(ImagesRequest, DeviceRequest, logs=True):
    """What commands share that extract features."""

    num_workers: int | None = option(None, "Processes that decode images; by default from the cores.", ge=0, last=True)
    image_size: AtLeastOne | None = option(
        None, "Side in pixels to evaluate at; by default the model's, at most 224.", last=True
    )
    max_bad_fraction: float | None = MAX_BAD_FRACTION


class EvalRequest(
    FeaturesRequest,
    run_by="dinov2cli.eval.protocol:perform",
    launched_by="dinov2cli.launch.slurm:launch_evaluation",
    checked_by="dinov2cli.eval.first_look:look",
):
    """What all evaluations share. The words of `command` end with the name of a module of `dinov2cli.eval`."""

    labels: ClassVar[Literal["classes", "masks", "depth"]] = "classes"
    """What the datasets are to have: a class for every image, or a class or a depth for every pixel."""

    checkpoint: str = argument(
        "What to evaluate: a run folder (its newest teacher), a teacher_checkpoint.pth, .pth or .safetensors "
        "file, a Hugging Face folder, a URL or a released name such as dinov2_vits14.",
        default="",
        metavar="CKPT",
        default_text=False,
    )
    overrides: tuple[str, ...] = argument("Changes of its config.", default=(), completes="overrides")
    train_dataset: str | None = option(
        None,
        "Labelled images to learn from: a folder with a subfolder per class, or a string such as "
        "ImageNet:split=TRAIN:root=/data:extra=/data. By default what the run's config names, else ImageNet.",
        metavar="DATASET",
        flags="--train-dataset --data",
    )
    val_dataset: str | None = option(None, "Labelled images to classify, likewise.", metavar="DATASET")
    output_dir: Path | None = option(
        None,
        "Where results go; by default beside the run's teacher. Of weights outside of a run they are printed only.",
        metavar="DIR",
    )
    config_file: Path | None = option(None, "Configuration instead of the run's own.", metavar="YAML")
    pretrained_weights: str | None = option(
        None, "Another way to give CKPT.", metavar="CKPT", names_argument=True, flags="--model --pretrained-weights"
    )
    device: str | None = option(None, "cpu, cuda or cuda:N; by default a GPU if there is one.", last=True)
    no_cache: bool = option(False, "Extract features anew and keep none.", last=True)
    as_json: bool = option(False, "Print one JSON object instead of a table.", flags="--json", last=True)
    gpus: AtLeastOne | None = option(
        None, "Processes, each on a GPU of its own (or --device cpu) [1].", metavar="N", last=True
    )
    dry_run: bool = option(
        False, "Check everything and print the plan; evaluate nothing. With Slurm options: print the script.", last=True
    )
    slurm: Slurm = Slurm()

    @classmethod
    def protocol(cls) -> str:
        """The module of `dinov2cli.eval` whose `run` does it."""
        return cls.command.split()[-1]

    @property
    def trains(self) -> bool:
        """Whether it needs a train dataset."""
        return not getattr(self, "head", None)

    @model_validator(mode="before")
    @classmethod
    def _one_checkpoint(cls, values: dict[str, Any]) -> dict[str, Any]:
        if weights := values.get("pretrained_weights"):
            words = [word for word in (values.get("checkpoint"), *values.get("overrides", ())) if word]
            values = {**values, "checkpoint": weights, "overrides": words, "pretrained_weights": None}
        if not values.get("checkpoint"):
            raise WeightsError(
                "No checkpoint given.",
                hint=f"Name a run folder, a weights file or a released model: dino2 {cls.command} CKPT ...",
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

    nb_knn: tuple[AtLeastOne, ...] = option(
        (10, 20, 100, 200), "Numbers of neighbours [10 20 100 200].", flags="--nb-knn --nb_knn", default_text=False
    )
    temperature: float = option(0.07, "T of the votes' softmax.", ge=1e-4)
    n_per_class_list: tuple[Annotated[int, Field(ge=-1)], ...] = option(
        (-1,),
        "Train images of each class; -1 for all [-1].",
        flags="--n-per-class-list --n-per-class",
        default_text=False,
    )
    n_tries: AtLeastOne = option(1, "Random choices of these to average over.")
    baselines: bool = option(
        False,
        "Score raw pixels, histograms of colours and greys, HOG and a random network of the same shape beside it.",
    )
    gather_on_cpu: bool = option(False, "Search on the CPU. Features never need to fit on a GPU.")
    batch_size: AtLeastOne = option(256, "Images at a time.", flags="--batch-size --batch_size")

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

    finetune_dataset: str | None = option(
        None, "Images to choose C on.", flags="--finetune-dataset --finetune-dataset-str", metavar="DATASET"
    )
    finetune_on_val: bool = option(False, "Choose C on the val set instead of a tenth of the train set.")
    metric_type: Literal["mean_accuracy", "mean_per_class_accuracy", "per_class_accuracy"] = option(
        "mean_accuracy", "mean_accuracy, mean_per_class_accuracy or per_class_accuracy.", metavar="METRIC"
    )
    train_dtype: Literal["float64", "float32"] = option(
        "float64", "float64, or float32 for less precision.", metavar="DTYPE"
    )
    train_features_device: str | None = option(None, "Where to fit; by default where features are made.")
    max_train_iters: AtLeastOne = option(1000, "Steps of L-BFGS for each C.")
    batch_size: AtLeastOne = option(256, "Images at a time.", flags="--batch-size --batch_size")

    @model_validator(mode="after")
    def _one_choice_of_c(self) -> Self:
        if self.finetune_on_val and self.finetune_dataset is not None:
            raise ValueError("--finetune-on-val and --finetune-dataset exclude each other")
        return self


class LinearRequest(EvalRequest, command="eval linear"):
    """Train linear classifiers on the frozen features and report the best.

    52 of them side by side: 13 learning rates, the last block or the last four, with and without the mean patch token.

    Example:

        dino2 eval linear runs/demo --train-dataset photos/train --val-dataset photos/val --epochs 1
    """

    head: str | None = option(
        None,
        "Evaluate a trained head instead of training: a file of weight and bias, a URL, or a released name "
        "such as dinov2_vitb14_lc.",
        flags="--head --classifier-fpath",
        metavar="HEAD",
    )
    head_layers: int = option(4, "1 or 4: which of the released heads.")
    frozen_crops: bool = option(False, "Fast approximation: train on the features of centre crops.")
    test_datasets: tuple[str, ...] = option((), "Further datasets to test on.", metavar="DATASET")
    test_metric_types: tuple[Metric, ...] = option(
        (),
        "For each test dataset: mean_accuracy, mean_per_class_accuracy, per_class_accuracy or "
        "imagenet_real_accuracy [as val].",
        metavar="METRIC",
    )
    test_class_mapping_fpaths: tuple[str, ...] = option((), "For each test dataset: classes, or None.", metavar="NPY")
    test_labels: tuple[str, ...] = option((), "For each test dataset: .npy or .json labels, or None.", metavar="FILE")
    val_class_mapping_fpath: Path | None = option(None, "Classes of val, with --head.", metavar="NPY")
    val_metric_type: Metric = option("mean_accuracy", "As --test-metric-types.", metavar="METRIC")
    epochs: AtLeastOne = option(10, "Epochs.")
    epoch_length: AtLeastOne = option(1250, "Iterations of an epoch.")
    batch_size: AtLeastOne = option(128, "Images in a step on each process.")
    learning_rates: tuple[AboveZero, ...] = option(
        (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1),
        "Rates for a batch of 256 [13 from 1e-5 to 0.1].",
        default_text=False,
    )
    eval_period_iterations: int = option(1250, "Iterations between looks at val; 0: none.", ge=0)
    save_checkpoint_frequency: AtLeastOne = option(1, "Epochs between checkpoints.")
    no_resume: bool = option(False, "Start anew even if there is a checkpoint.")

    @model_validator(mode="after")
    def _classes_are_of_a_head(self) -> Self:
        if self.val_class_mapping_fpath is not None and self.head is None:
            raise ValueError("--val-class-mapping-fpath goes with --head")
        return self

    @field_validator("head_layers")
    @classmethod
    def _are_released(cls, layers: int) -> int:
        if layers not in (1, 4):
            raise ValueError(f"--head-layers {layers} is unknown; known: 1, 4.")
        return layers

    @model_validator(mode="after")
    def _one_for_each_test_dataset(self) -> Self:
        for name in ("test_metric_types", "test_class_mapping_fpaths", "test_labels"):
            given, sets = len(getattr(self, name)), len(self.test_datasets)
            if given not in (0, sets):
                option = "--" + name.replace("_", "-")
                raise ValueError(f"{option}: {given} values for {sets} test datasets; give one for each.")
        return self


class EmbedRequest(CheckpointRequest, FeaturesRequest, logs=True, command="embed", run_by="dinov2cli.eval.embed:run"):
    """Write the features of every image to a file.

    For each image: the class token, the mean patch token, the class tokens of the last four blocks, label and path;
    in a .csv the class token, label and path, in a .npy the class token alone. Interrupted, the same command goes on.

    Example:

        dino2 embed runs/demo --data ~/photos --output photos.safetensors

        dino2 embed dinov2_vits14 --data dog.jpg cat.jpg --output pets.csv

        dino2 embed dinov2_vits14 --data slides --tiles 224 --output slides.parquet
    """

    checkpoint: str = argument(
        "A run folder, a weights file, a URL or a released name.", metavar="CKPT", default="", default_text=False
    )
    data: OneOrSeveral = option(..., "Image files, a folder of images or a dataset string.", metavar="DATASET")
    output: Path = option(..., "A .safetensors, .parquet, .csv or .npy file.", metavar="FEATURES")
    overwrite: bool = option(False, "Replace an output that is there already.")
    tiles: AtLeastOne | None = option(
        None, "Cut each image into tiles of this side in pixels; a row is a tile, with its place.", metavar="SIZE"
    )
    overlap: int = option(0, "Pixels that neighbouring tiles share.", ge=0, metavar="N")
    config_file: Path | None = option(None, "Configuration instead of the run's own.", metavar="YAML")
    batch_size: AtLeastOne = option(256, "Images at a time.", flags="--batch-size --batch_size")
    resize_ratio: float = option(
        256 / 224,
        "Short side to resize to, as a multiple of the image size: 256/224 as in eval knn and linear, 1 as in "
        "eval logreg.",
        ge=1,
        default_text="256/224, tiles 1",
        last=True,
    )
    device: str | None = option(None, "cpu, cuda or cuda:N; by default a GPU if there is one.", last=True)
    no_cache: bool = option(False, "Extract features anew and keep none.", last=True)
    as_json: bool = option(False, "Print one JSON object about the file.", flags="--json", last=True)

    @model_validator(mode="after")
    def _tiles_advance(self) -> Self:
        if self.overlap and (self.tiles is None or self.overlap >= self.tiles):
            raise ValueError(f"--overlap {self.overlap} goes with --tiles SIZE, and is less than SIZE")
        return self
