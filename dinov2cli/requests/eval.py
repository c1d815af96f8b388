"""What `dino2 eval` may be asked for: one class for what all evaluations share, one for each protocol.

The names and defaults of the options are the reference implementation's.
"""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

Metric = Literal["mean_accuracy", "mean_per_class_accuracy", "per_class_accuracy", "imagenet_real_accuracy"]


class EvalRequest(BaseModel):
    """What all evaluations share.

    Attributes:
        overrides: `a.b=value` changes of the configuration.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    protocol: ClassVar[str]
    """The module of `dinov2cli.eval` whose `run` does it."""

    checkpoint: str
    overrides: tuple[str, ...] = ()
    train_dataset: str | None = None
    val_dataset: str | None = None
    output_dir: Path | None = None
    config_file: Path | None = None
    batch_size: int = Field(256, ge=1)
    num_workers: int | None = Field(None, ge=0)
    image_size: int | None = Field(None, ge=1)
    device: str | None = None
    no_cache: bool = False


class KnnRequest(EvalRequest):
    """Classify images by their nearest neighbours in feature space."""

    protocol = "knn"

    nb_knn: tuple[Annotated[int, Field(ge=1)], ...] = (10, 20, 100, 200)
    temperature: float = Field(0.07, ge=1e-4)
    n_per_class_list: tuple[Annotated[int, Field(ge=-1)], ...] = (-1,)
    n_tries: int = Field(1, ge=1)
    gather_on_cpu: bool = False


class LogregRequest(EvalRequest):
    """Fit a logistic regression to the features, its strength C chosen among 45 values."""

    protocol = "logreg"

    finetune_dataset: str | None = None
    finetune_on_val: bool = False
    metric_type: Metric = "mean_accuracy"
    train_dtype: Literal["float64", "float32"] = "float64"
    train_features_device: str | None = None
    max_train_iters: int = Field(1000, ge=1)


class LinearRequest(EvalRequest):
    """Train linear classifiers on the frozen features and report the best."""

    protocol = "linear"

    head: str | None = None
    head_layers: int = 4
    frozen_crops: bool = False
    test_datasets: tuple[str, ...] = ()
    test_metric_types: tuple[Metric, ...] = ()
    test_class_mapping_fpaths: tuple[str, ...] = ()
    test_labels: tuple[str, ...] = ()
    val_class_mapping_fpath: Path | None = None
    val_metric_type: Metric = "mean_accuracy"
    epochs: int = Field(10, ge=1)
    epoch_length: int = Field(1250, ge=1)
    batch_size: int = Field(128, ge=1)
    learning_rates: tuple[float, ...] = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
    eval_period_iterations: int = Field(1250, ge=0)
    save_checkpoint_frequency: int = Field(1, ge=1)
    no_resume: bool = False


EVALUATIONS: dict[str, type[EvalRequest]] = {each.protocol: each for each in (KnnRequest, LogregRequest, LinearRequest)}
"""What may follow `dino2 eval` and stand in `evaluation.tasks`."""
