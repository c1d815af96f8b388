"""Many linear classifiers on the same frozen features, trained together in few products; and further images to test one
on, with other labels, other classes or another way of counting.

Shapes: B images, D width of the model, F inputs of a head, R learning rates, C classes, n blocks.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2cli import distributed
from dinov2cli.data.datasets import ImageDataset, make_dataset
from dinov2cli.errors import DataError
from dinov2cli.eval.extract import Extractor
from dinov2cli.eval.features import Features
from dinov2cli.eval.metrics import Accuracy, AccuracyMeter, MetricType
from dinov2cli.eval.protocol import labelled
from dinov2cli.models.classifier import head_input
from dinov2cli.requests.eval import LinearRequest

LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
N_BLOCKS = (1, 4)
MOMENTUM = 0.9


class HeadInput(NamedTuple):
    """What a head sees: the class tokens of the last blocks, earliest first, then the last mean patch token."""

    n_blocks: int
    avgpool: bool

    def of(self, features: Mapping[str, Tensor]) -> Tensor:
        """[B, F] of the features of `eval.features` (`last_cls` [B, n, D], `mean_patch` [B, D])."""
        tokens = features["last_cls"][:, -self.n_blocks :].flatten(1)
        return torch.cat((tokens, features["mean_patch"]), 1) if self.avgpool else tokens

    @property
    def key(self) -> str:
        """As in the names of the reference implementation's heads."""
        return f"{self.n_blocks}_blocks_avgpool_{self.avgpool}"


class LinearHeads(nn.Module):
    """R heads for each input, their weights stacked, so that one product serves all learning rates.

    Args:
        width, n_classes: D and C.
        learning_rates: base rates, for a batch of 256 images.
        batch: images in a step on all processes; rates are scaled by batch / 256.
        n_blocks: numbers of last blocks; each is tried with and without the mean patch token.
    """

    rates: Tensor
    """Learning rates, scaled for the batch: float32 [R]."""

    def __init__(
        self,
        width: int,
        n_classes: int,
        *,
        learning_rates: Sequence[float] = LEARNING_RATES,
        batch: int = 256,
        n_blocks: Sequence[int] = N_BLOCKS,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.inputs = [HeadInput(n, avgpool) for n in n_blocks for avgpool in (False, True)]
        self.n_classes = n_classes
        rates = [rate * batch / 256 for rate in learning_rates]
        self.names = [f"classifier_{i.key}_lr_{rate}" for i in self.inputs for rate in rate_names(rates)]
        self.register_buffer("rates", torch.tensor(rates), persistent=False)
        self.weights, self.biases = nn.ParameterDict(), nn.ParameterDict()
        for each in self.inputs:
            weight = torch.empty(len(rates), n_classes, (each.n_blocks + each.avgpool) * width)
            self.weights[each.key] = nn.Parameter(weight.normal_(std=0.01, generator=generator))
            self.biases[each.key] = nn.Parameter(torch.zeros(len(rates), n_classes))

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Logits of every head, in the order of `names`: float32 [H, B, C]."""
        return torch.cat(list(self._logits(features)))

    def loss(self, features: Mapping[str, Tensor], targets: Tensor) -> Tensor:
        """The heads' mean cross-entropies, each times the head's learning rate, summed.

        SGD with rate 1 on this is SGD with its own rate for each head: momentum is linear in the gradient.
        """
        labels = targets.repeat(len(self.rates))
        total = self.rates.new_zeros(())
        for logits in self._logits(features):  # [R, B, C]
            losses = F.cross_entropy(logits.flatten(0, 1), labels, reduction="none").view(len(self.rates), -1)
            total = total + self.rates @ losses.mean(1)
        return total

    def head(self, name: str) -> nn.Linear:
        """A copy of one head as a frozen layer of its own; ValueError if there is none of that name."""
        which, rate = divmod(self.names.index(name), len(self.rates))
        weight, bias = (tensors[self.inputs[which].key][rate].detach() for tensors in (self.weights, self.biases))
        layer = nn.Linear(weight.shape[1], weight.shape[0]).requires_grad_(False)
        layer.load_state_dict({"weight": weight, "bias": bias})
        return layer

    def _logits(self, features: Mapping[str, Tensor]) -> Iterator[Tensor]:
        for each in self.inputs:
            weight, bias = self.weights[each.key], self.biases[each.key]
            logits = F.linear(each.of(features), weight.flatten(0, 1), bias.flatten())
            yield logits.unflatten(1, bias.shape).transpose(0, 1)


class HeadTrainer:
    """SGD with momentum and a cosine to zero, as in the paper; no weight decay."""

    def __init__(self, heads: LinearHeads, iterations: int) -> None:
        self.heads = heads
        self.iterations = iterations
        self.optimizer = torch.optim.SGD(heads.parameters(), lr=1.0, momentum=MOMENTUM, fused=True)

    def step(self, iteration: int, features: Mapping[str, Tensor], targets: Tensor) -> Tensor:
        """One step on this process's part of a batch; gradients are averaged over processes. Returns the loss."""
        self.optimizer.param_groups[0]["lr"] = (1 + math.cos(math.pi * iteration / self.iterations)) / 2
        self.optimizer.zero_grad()
        loss = self.heads.loss(features, targets)
        loss.backward()
        for parameter in self.heads.parameters():
            assert parameter.grad is not None
            distributed.all_reduce_mean(parameter.grad)
        self.optimizer.step()
        return loss.detach()


def rate_names(rates: Sequence[float]) -> list[str]:
    """Learning rates as the reference implementation writes them in names, with more digits where two look alike."""
    digits = 5
    names = [f"{rate:.{digits}f}" for rate in rates]
    while len(set(names)) < len(set(rates)) and digits < 12:
        digits += 1
        counts = {name: names.count(name) for name in names}
        names = [f"{rate:.{digits}f}" if counts[name] > 1 else name for rate, name in zip(rates, names, strict=True)]
    return [name.replace(".", "_") for name in names]


def input_of_head(head: nn.Linear, width: int, depth: int) -> HeadInput:
    """What a head read from a file was made for, from its number of inputs; WeightsError if it fits nothing."""
    return HeadInput(*head_input(head.in_features, width, depth))


def best_head(heads: LinearHeads, accuracies: list[Accuracy]) -> tuple[str, Accuracy]:
    """Name and accuracy of the head with the highest top-1; the first of equals."""
    at = max(range(len(accuracies)), key=lambda i: (accuracies[i].top1, -i))
    return heads.names[at], accuracies[at]


@torch.no_grad()
def measure_heads(
    heads: LinearHeads | nn.Linear,
    features: Features,
    metric: MetricType = MetricType.MEAN_ACCURACY,
    class_mapping: Tensor | None = None,
) -> list[Accuracy]:
    """Accuracies on detailed features of every head, or of one layer.

    Args:
        class_mapping: the classifier's class for each class of the images, int64 [C']; other classes cannot win.
    """
    if isinstance(heads, LinearHeads):
        device, n_heads, n_classes = heads.rates.device, len(heads.names), heads.n_classes
    else:
        depth, width = features.tensors["last_cls"].shape[1:]
        device, n_heads, n_classes = heads.weight.device, 1, heads.out_features
        sees = input_of_head(heads, width, depth)
    meter = AccuracyMeter(n_classes if class_mapping is None else len(class_mapping), n_heads, metric, str(device))
    for rows in torch.arange(len(features.targets)).split(256):
        batch = {name: tensor[rows].to(device) for name, tensor in features.tensors.items()}
        scores = heads(batch) if isinstance(heads, LinearHeads) else heads(sees.of(batch))[None]
        if class_mapping is not None:
            scores = scores[:, :, class_mapping.to(device)]
        meter.update(scores, features.targets[rows])
    return meter.compute()


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
