"""Further images to test a trained classifier on: with other labels, other classes or another way of counting."""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dinov2cli.data.datasets import ImageDataset, make_dataset
from dinov2cli.errors import DataError
from dinov2cli.eval.extract import Extractor
from dinov2cli.eval.linear_heads import measure_heads
from dinov2cli.eval.metrics import Accuracy, MetricType
from dinov2cli.eval.protocol import labelled
from dinov2cli.requests.eval import LinearRequest

_IMAGENET_VAL = re.compile(r"ILSVRC2012_val_(\d{8})\.\w+$")


@dataclass(frozen=True)
class TestSet:
    """A dataset and how it is scored.

    Args:
        class_mapping: a `.npy` with the classifier's class for each class of the dataset (as for ImageNet-A and -R).
        labels: a file with the labels, in place of the dataset's: `.npy` int [N] or [N, L] padded with -1, or a JSON
            list of numbers or of lists (ImageNet-ReaL's `real.json`).
    """

    __test__ = False  # not a test case for pytest

    dataset: str
    metric: MetricType = MetricType.MEAN_ACCURACY
    class_mapping: Path | None = None
    labels: Path | None = None


def test_sets_of(request: LinearRequest) -> list[TestSet]:
    """The further test sets of a request; `None` among its mappings and labels leaves one out."""
    n = len(request.test_datasets)
    metrics = map(MetricType, request.test_metric_types or (request.val_metric_type,) * n)
    mappings, labels = (
        [None if word == "None" else Path(word) for word in words or ("None",) * n]
        for words in (request.test_class_mapping_fpaths, request.test_labels)
    )
    return list(map(TestSet, request.test_datasets, metrics, mappings, labels))


def accuracy_on(test: TestSet, extract: Extractor, head: nn.Linear, names: tuple[str, ...] = ()) -> Accuracy:
    """Accuracy of one head on a test set; its classes are numbered by name where both have `names`.

    Raises:
        DataError: labels are missing, or there is a class that the head does not have.
    """
    mapping = read_class_mapping(test.class_mapping, head.out_features) if test.class_mapping else None
    if test.labels is None and test.metric is MetricType.IMAGENET_REAL_ACCURACY:
        raise DataError(f"{test.dataset}: {test.metric} needs a file of labels (--test-labels).")
    images = make_dataset(test.dataset) if test.labels else labelled(test.dataset, "test", "a linear probe")
    features = extract(images, f"features of {test.dataset}")
    if test.labels is not None:
        features = replace(features, targets=read_labels(test.labels, images)[features.indices])
    elif mapping is None and names and set(images.class_names) < set(names):
        features = features.with_classes(torch.tensor([names.index(name) for name in images.class_names]))
    n_classes = head.out_features if mapping is None else len(mapping)
    if (largest := int(features.targets.max())) >= n_classes:
        raise DataError(
            f"{test.dataset} has a class {largest}, but the classifier has {n_classes} classes, 0 to {n_classes - 1}.",
            hint="Give a class mapping, or a head for these classes.",
        )
    return measure_heads(head, features, test.metric, mapping)[0]


def read_class_mapping(path: Path, n_classes: int) -> Tensor:
    """The classifier's class for each class of a dataset: int64 [C'].

    Raises:
        DataError: not such a file, or it names a class that the classifier does not have.
    """
    mapping = torch.as_tensor(_read_npy(path))
    if mapping.dim() != 1 or mapping.is_floating_point() or not len(mapping):
        raise DataError(f"{path}: a class mapping is a 1-dimensional .npy of integers; this is {tuple(mapping.shape)}.")
    if int(mapping.min()) < 0 or int(mapping.max()) >= n_classes:
        raise DataError(
            f"{path}: class {int(mapping.max())} is outside the classifier's {n_classes} classes, 0 to {n_classes - 1}."
        )
    return mapping.long()


def read_labels(path: Path, dataset: ImageDataset) -> Tensor:
    """Labels for the images of `dataset`, in its order: int64 [N] or [N, L] padded with -1.

    A file for all 50,000 ImageNet validation images is in the order of their numbers, as ReaL's is.

    Raises:
        DataError: not such a file, or of another length than the dataset.
    """
    labels = torch.as_tensor(_read_npy(path)).long() if path.suffix == ".npy" else _read_json_labels(path)
    if len(labels) != len(dataset):
        raise DataError(f"{path}: {len(labels)} labels, but {dataset.describe()} has {len(dataset)} images.")
    numbers = [_IMAGENET_VAL.search(dataset.path(i)) for i in range(len(dataset))]
    order = [int(number[1]) - 1 for number in numbers if number]
    return labels[torch.tensor(order)] if sorted(order) == list(range(len(dataset))) else labels


def _read_json_labels(path: Path) -> Tensor:
    try:
        content = json.loads(path.read_text())
        lists = [item if isinstance(item, list) else [item] for item in content]
        longest = max(map(len, lists), default=1)
        padded = torch.tensor([[*labels, *[-1] * (longest - len(labels))] for labels in lists], dtype=torch.int64)
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: not a JSON list of labels or of lists of labels ({error}).") from None
    single = bool(lists) and not isinstance(content[0], list)
    return padded[:, 0] if single else padded.reshape(len(lists), -1)


def _read_npy(path: Path) -> np.ndarray:
    try:
        return np.asarray(np.load(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as .npy ({error}).") from None
