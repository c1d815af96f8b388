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

_MEMORY_BYTES = 2 << 30
_CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 1 << 30}


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
    dtype: torch.dtype = torch.float64,
    start: Classifiers | None = None,
) -> Classifiers:
    """Fit a classifier for every C, on the device of `features`.

    The way to the minimum is gone in float32 products with float64 sums; its end, if `dtype` says so, in float64,
    with the curvature that was learnt on the way.

    Args:
        features: float [N, D]; with several processes each passes its own part.
        targets: int64 [N].
        max_iter, tol: as in scikit-learn; `tol` bounds the largest component of the gradient of the mean loss.
        dtype: float64 solves to `tol`; float32 stops where a step lowers the mean loss by less than 1e-8, near the
            precision of its products: the accuracy is the same, the coefficients of weak regularisation are not yet.
        start: classifiers for the same Cs and classes to begin from.

    Raises:
        DataError: fewer than two classes.
    """
    classes = distributed.all_gather_rows(targets).unique()
    N, D, K = int(distributed.all_reduce_sum(torch.tensor(len(targets)))), features.shape[1], len(classes)
    if K < 2:
        raise DataError(f"logistic regression needs at least two classes; the train images have {K}.")
    features = features.double()
    rotation, mean, variance = _principal_axes(features, N)
    rotated = (features - mean) @ rotation
    labels = torch.searchsorted(classes, targets)
    # With two classes scikit-learn penalises one vector, the difference w of ours, which are w/2 and -w/2: |w|^2 / 2
    # there is twice our |w/2|^2 / 2 + |w/2|^2 / 2.
    penalty = 1 / (N * torch.tensor(Cs).to(features) * (0.5 if K == 2 else 1))

    def view(parameters: Tensor) -> tuple[Tensor, Tensor]:
        return parameters[:, : K * D].view(-1, K, D), parameters[:, K * D :]

    points = features.new_zeros(len(Cs), K * (D + 1))
    if start is not None:
        weight, bias = view(points)
        weight.copy_(start.weight @ rotation)
        bias.copy_(start.bias + start.weight @ mean)
    curvature = (1 - 1 / K) / K  # of the cross-entropy where all classes are equally likely
    hessian = torch.full_like(points, curvature)
    view(hessian)[0].copy_(curvature * variance + penalty[:, None, None])

    # Of more than 30 steps nothing is gained; all Cs of a large problem (1000 classes) get fewer.
    memory = max(5, min(30, _MEMORY_BYTES // (2 * points.nbytes)))
    rough = _objective(rotated.float(), labels, penalty, N, K)
    found = minimise(rough, points, 1 / hessian, max_iter=max_iter, tol=tol, ftol=1e-8, rounding=1e-9, memory=memory)
    iterations = found.iterations
    if dtype is torch.float64:
        exact = _objective(rotated, labels, penalty, N, K)
        left = (max_iter - iterations).clamp(min=1)
        found = minimise(exact, found.points, 1 / hessian, max_iter=left, tol=tol, memory=found.memory)
        iterations = iterations + found.iterations
    weight, bias = view(found.points)
    weight = weight @ rotation.T
    return Classifiers(tuple(Cs), weight, bias - weight @ mean, classes, iterations)


def _objective(features: Tensor, labels: Tensor, penalty: Tensor, N: int, K: int) -> Objective:
    """Mean cross-entropy + penalty |W|^2 / 2 of all problems, and gradients: one product each way for all of them.

    Products are in the precision of `features`, points and sums in float64.
    """
    n, D = features.shape

    def evaluate(parameters: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        P = len(which)
        totals = parameters.new_zeros(P, 1 + K * (D + 1))  # value, weight gradient, bias gradient
        weight = parameters[:, : K * D].reshape(P * K, D).to(features)
        bias = parameters[:, K * D :].reshape(P * K).to(features)
        rows = max(256, _CHUNK_BYTES.get(features.device.type, 32 << 20) // (P * K * features.element_size()))
        for begin in range(0, n, rows):
            x, y = features[begin : begin + rows], labels[begin : begin + rows]
            own = y[:, None, None].expand(-1, P, 1)
            log_probability = torch.addmm(bias, x, weight.T).view(-1, P, K).log_softmax(2)
            totals[:, 0] -= log_probability.gather(2, own)[:, :, 0].sum(0, dtype=totals.dtype)
            error = log_probability.exp_()
            error.scatter_add_(2, own, error.new_full((), -1.0).expand(own.shape))
            totals[:, 1 : 1 + K * D] += (error.view(-1, P * K).T @ x).view(P, K * D)
            totals[:, 1 + K * D :] += error.sum(0, dtype=totals.dtype)
        totals = distributed.all_reduce_sum(totals) / N
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
