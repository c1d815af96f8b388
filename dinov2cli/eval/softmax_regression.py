"""Multinomial logistic regression for many regularisation strengths C at once.

scikit-learn's objective: sum of cross-entropies + |W|^2 / (2 C), the intercept free. It is solved by L-BFGS, in the
eigenbasis of the features' covariance: there the problem's curvature is nearly diagonal for every C, so that weak
regularisation takes tens of steps instead of thousands. The solution is the same, since the penalty does not see a
rotation and the intercept absorbs the mean.

Shapes: N images (of this process), D features, K classes that occur, P values of C.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dinov2cli import distributed
from dinov2cli.errors import DataError
from dinov2cli.eval.lbfgs import Objective, minimise

_CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 1 << 30}


class Classifiers(NamedTuple):
    """One classifier for each C."""

    Cs: tuple[float, ...]
    weight: Tensor  # [P, K, D]
    bias: Tensor  # [P, K]
    classes: Tensor  # int64 [K], ascending: the class of each row
    iterations: Tensor  # int64 [P]

    def scores(self, features: Tensor, n_classes: int) -> Tensor:
        """Logits [P, B, n_classes] of features [B, D]; -inf for classes that were not trained on."""
        P, K, D = self.weight.shape
        logits = features.to(self.weight) @ self.weight.view(P * K, D).T + self.bias.flatten()
        scores = logits.new_full((P, len(features), n_classes), -torch.inf)
        scores[:, :, self.classes] = logits.view(-1, P, K).transpose(0, 1)
        return scores


def fit(
    features: Tensor,
    targets: Tensor,
    Cs: Sequence[float],
    *,
    max_iter: int = 1000,
    tol: float = 1e-12,
    start: Classifiers | None = None,
) -> Classifiers:
    """Fit a classifier for every C, in the precision and on the device of `features`.

    Args:
        features: [N, D], float64 or float32; with several processes each passes its own part.
        targets: int64 [N].
        max_iter, tol: as in scikit-learn, but the largest component of the mean gradient is what `tol` bounds.
        start: classifiers for the same Cs and classes to begin from.

    Raises:
        DataError: fewer than two classes.
    """
    classes = distributed.all_gather_rows(targets).unique()
    N, D, K = int(distributed.all_reduce_sum(torch.tensor(len(targets)))), features.shape[1], len(classes)
    if K < 2:
        raise DataError(f"logistic regression needs at least two classes; the train images have {K}.")
    rotation, mean, variance = _principal_axes(features, N)
    rotated = (features - mean) @ rotation
    strength = torch.tensor(Cs, dtype=features.dtype, device=features.device)
    # With two classes scikit-learn penalises one vector, the difference w of ours, which are w/2 and -w/2: |w|^2 / 2
    # there is twice our |w/2|^2 / 2 + |w/2|^2 / 2.
    penalty = 1 / (N * strength * (0.5 if K == 2 else 1))

    def view(parameters: Tensor) -> tuple[Tensor, Tensor]:
        return parameters[:, : K * D].view(-1, K, D), parameters[:, K * D :]

    begin = features.new_zeros(len(Cs), K * (D + 1))
    if start is not None:
        weight, bias = view(begin)
        weight.copy_(start.weight @ rotation)
        bias.copy_(start.bias + start.weight @ mean)
    curvature = (1 - 1 / K) / K  # of the cross-entropy where all classes are equally likely
    hessian = torch.ones_like(begin) * curvature
    view(hessian)[0].copy_(curvature * variance + penalty[:, None, None])
    objective = _objective(rotated, torch.searchsorted(classes, targets), penalty, N, K)
    eps = torch.finfo(features.dtype).eps
    found = minimise(objective, begin, 1 / hessian, max_iter=max_iter, tol=tol, ftol=64 * eps)
    weight, bias = view(found.points)
    weight = weight @ rotation.T
    return Classifiers(tuple(Cs), weight, bias - weight @ mean, classes, found.iterations)


def _objective(features: Tensor, labels: Tensor, penalty: Tensor, N: int, K: int) -> Objective:
    """Mean cross-entropy + penalty |W|^2 / 2 of all problems, and gradients: one product each way for all of them."""
    n, D = features.shape

    def evaluate(parameters: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        P = len(which)
        weight, bias = parameters[:, : K * D].reshape(P * K, D), parameters[:, K * D :].reshape(P * K)
        value, gradient = parameters.new_zeros(P), torch.zeros_like(parameters)
        weight_gradient, bias_gradient = parameters.new_zeros(P * K, D), parameters.new_zeros(P * K)
        rows = max(256, _CHUNK_BYTES.get(features.device.type, 16 << 20) // (P * K * features.element_size()))
        for begin in range(0, n, rows):
            x, y = features[begin : begin + rows], labels[begin : begin + rows]
            logits = torch.addmm(bias, x, weight.T).view(len(x), P, K)
            own = y[:, None, None].expand(-1, P, 1)
            log_probabilities = logits.log_softmax(2)
            value -= log_probabilities.gather(2, own)[:, :, 0].sum(0)
            error = log_probabilities.exp_()
            error.scatter_add_(2, own, error.new_full((), -1.0).expand_as(own))
            error = error.view(len(x), P * K)
            weight_gradient.addmm_(error.T, x)
            bias_gradient += error.sum(0)
        gradient[:, : K * D] = weight_gradient.view(P, K * D)
        gradient[:, K * D :] = bias_gradient.view(P, K)
        totals = distributed.all_reduce_sum(torch.cat((value[:, None], gradient), 1)) / N
        value, gradient = totals[:, 0], totals[:, 1:]
        squares = parameters[:, : K * D].square().sum(1)
        gradient[:, : K * D] += penalty[which, None] * parameters[:, : K * D]
        return value + penalty[which] * squares / 2, gradient

    return evaluate


def _principal_axes(features: Tensor, N: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rotation [D, D] into the eigenbasis of the covariance, mean [D] and variances [D], over all processes."""
    mean = distributed.all_reduce_sum(features.sum(0)) / N
    centred = features - mean
    covariance = distributed.all_reduce_sum(centred.T @ centred) / N
    variance, rotation = torch.linalg.eigh(covariance)
    # Eigenvectors have free signs: take those of one process.
    rotation = distributed.broadcast_object(rotation)
    return rotation, mean, variance.clamp(min=0)
