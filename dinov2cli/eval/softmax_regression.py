"""Multinomial logistic regression for many regularisation strengths C at once.

scikit-learn's objective: sum of cross-entropies + |W|^2 / (2 C), the intercept free. It is solved by L-BFGS in the
eigenbasis of the features' covariance, where the problem's curvature is nearly diagonal; its diagonal is computed anew
now and then, because it falls by orders of magnitude, and unevenly, as the classes come apart. The solution is the same
as without, since the penalty does not see a rotation and the intercept absorbs the mean.

Shapes: N images (of this process), D features, K classes that occur, P values of C.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from dinov2cli import distributed
from dinov2cli.errors import DataError
from dinov2cli.eval.lbfgs import Memory, Solution, minimise

_MEMORY_BYTES = 2 << 30
_CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 1 << 30}
FIRST_STRETCH = 8  # steps before the curvature is looked at again


class Classifiers(NamedTuple):
    """One classifier for each C."""

    Cs: tuple[float, ...]
    weight: Tensor  # [P, K, D]
    bias: Tensor  # [P, K]
    classes: Tensor  # int64 [K], ascending: the class of each row
    iterations: Tensor  # int64 [P]

    def select(self, which: Sequence[int]) -> "Classifiers":
        """Those of some values of C."""
        rows = torch.as_tensor(which, dtype=torch.int64)
        Cs = tuple(self.Cs[i] for i in which)
        return Classifiers(Cs, self.weight[rows], self.bias[rows], self.classes, self.iterations[rows])

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
    ftol: float = 1e-13,
    dtype: torch.dtype = torch.float64,
    start: Classifiers | None = None,
    after_step: Callable[[], None] = lambda: None,
) -> Classifiers:
    """Fit a classifier for every C, on the device of `features`.

    The way to the minimum is gone in float32 products with float64 sums; its end, if `dtype` says so, in float64,
    with the curvature that was learnt on the way.

    Args:
        features: float [N, D]; with several processes each passes its own part.
        targets: int64 [N].
        max_iter: steps, in each precision.
        tol: as in scikit-learn, a bound on the largest component of the gradient of the mean loss.
        ftol: float64 also stops where a step lowers the objective by less than this, relative to it.
        dtype: float32 stops where a step lowers the objective by less than a ten-millionth of it, the precision of its
            products: accuracies are those of the minimum, but for an image or two.
        start: classifiers for the same Cs and classes to begin from.
        after_step: called after every step of all; may raise to stop.

    Raises:
        DataError: fewer than two classes.
    """
    classes = distributed.all_gather_rows(targets).unique()
    N, D, K = int(distributed.all_reduce_sum(torch.tensor(len(targets)))), features.shape[1], len(classes)
    if K < 2:
        raise DataError(f"logistic regression needs at least two classes; the train images have {K}.")
    features = features.double()
    rotation, mean = _principal_axes(features, N)
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
    # Of more than 30 steps nothing is gained; all Cs of a large problem (1000 classes) get fewer.
    memory = max(5, min(30, _MEMORY_BYTES // (2 * points.nbytes)))
    rough = _Problem(rotated.float(), labels, penalty, N, K, after_step)
    found = _minimise(rough, points, max_iter, tol, ftol=1e-7, rounding=1e-8, memory=memory)
    iterations = found.iterations
    if dtype is torch.float64:
        exact = _Problem(rotated, labels, penalty, N, K, after_step)
        found = _minimise(exact, found.points, max_iter, tol, ftol=ftol, rounding=1e-15, memory=found.memory)
        iterations = iterations + found.iterations
    weight, bias = view(found.points)
    weight = weight @ rotation.T
    return Classifiers(tuple(Cs), weight, bias - weight @ mean, classes, iterations)


def _minimise(
    problem: "_Problem", start: Tensor, max_iter: int, tol: float, *, ftol: float, rounding: float, memory: int | Memory
) -> Solution:
    """L-BFGS in stretches that double in length, each with the curvature where it begins."""
    which = torch.arange(len(start), device=start.device)
    found = Solution(start, start.new_zeros(len(start)), torch.zeros_like(which), Memory.of(start, memory))
    length = FIRST_STRETCH
    while len(which):
        points, remembered = found.points[which], Memory(*(tensor[which] for tensor in found.memory))
        stretch = minimise(
            partial(problem.evaluate, within=which),
            points,
            1 / problem.curvature(points, which),
            max_iter=(max_iter - found.iterations[which]).clamp(max=length),
            tol=tol,
            ftol=ftol,
            rounding=rounding,
            memory=remembered,
        )
        found.points[which], found.values[which] = stretch.points, stretch.values
        found.iterations[which] += stretch.iterations
        for kept, latest in zip(found.memory, stretch.memory, strict=True):
            kept[which] = latest
        which = which[(stretch.iterations == length) & (found.iterations[which] < max_iter)]
        length *= 2
    return found


class _Problem(NamedTuple):
    """Mean cross-entropy + penalty |W|^2 / 2 for all penalties: one product each way for all of them.

    Products are in the precision of `features`, points and sums in float64.
    """

    features: Tensor
    labels: Tensor
    penalty: Tensor
    N: int
    K: int
    after_step: Callable[[], None]

    def evaluate(self, points: Tensor, chosen: Tensor, within: Tensor) -> tuple[Tensor, Tensor]:
        """Values [P] and gradients [P, K * (D + 1)] of the problems `within[chosen]`."""
        P, K, D = len(points), self.K, self.features.shape[1]
        penalty = self.penalty[within[chosen]]
        totals = points.new_zeros(P, 1 + K * (D + 1))  # value, weight gradient, bias gradient
        for x, labels, logits in self._logits(points):
            own = labels[:, None, None].expand(-1, P, 1)
            log_probability = logits.log_softmax(2)
            error = log_probability.exp()
            # What the other classes get is summed, not taken from 1: where classes come apart it is below rounding.
            others = error.scatter_(2, own, 0.0).sum(2)
            loss = -log_probability.gather(2, own)[:, :, 0]
            totals[:, 0] += torch.where(others < 0.1, -torch.log1p(-others), loss).sum(0, dtype=totals.dtype)
            error.scatter_(2, own, -others[:, :, None])
            totals[:, 1 : 1 + K * D] += (error.view(-1, P * K).T @ x).view(P, K * D)
            totals[:, 1 + K * D :] += error.sum(0, dtype=totals.dtype).view(P, K)
        totals = distributed.all_reduce_sum(totals) / self.N
        self.after_step()
        value, gradient = totals[:, 0], totals[:, 1:]
        gradient[:, : K * D] += penalty[:, None] * points[:, : K * D]
        return value + penalty * points[:, : K * D].square().sum(1) / 2, gradient

    def curvature(self, points: Tensor, which: Tensor) -> Tensor:
        """The Hessian's diagonal [P, K * (D + 1)] of the problems `which`, at least a millionth of its largest."""
        P, K, D = len(points), self.K, self.features.shape[1]
        totals = points.new_zeros(P, K * (D + 1))
        for x, _, logits in self._logits(points):
            probability = logits.softmax(2)
            weight = probability * (1 - probability)
            totals[:, : K * D] += (weight.view(-1, P * K).T @ x.square()).view(P, K * D)
            totals[:, K * D :] += weight.sum(0, dtype=totals.dtype)
        totals = distributed.all_reduce_sum(totals) / self.N
        totals[:, : K * D] += self.penalty[which, None]
        return torch.maximum(totals, 1e-6 * totals.amax(1, keepdim=True))

    def _logits(self, points: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(features [B, D], labels [B], logits [B, P, K]) of chunks of the images."""
        P, K, D = len(points), self.K, self.features.shape[1]
        weight = points[:, : K * D].reshape(P * K, D).to(self.features)
        bias = points[:, K * D :].reshape(P * K).to(self.features)
        budget = _CHUNK_BYTES.get(self.features.device.type, 32 << 20)
        rows = max(256, budget // (P * K * self.features.element_size()))
        for x, labels in zip(self.features.split(rows), self.labels.split(rows), strict=True):
            yield x, labels, torch.addmm(bias, x, weight.T).view(-1, P, K)


def _principal_axes(features: Tensor, N: int) -> tuple[Tensor, Tensor]:
    """Rotation [D, D] into the eigenbasis of the covariance and mean [D], over all processes."""
    mean = distributed.all_reduce_sum(features.sum(0)) / N
    centred = features - mean
    covariance = distributed.all_reduce_sum(centred.T @ centred) / N
    # Eigenvectors have free signs: take those of one process.
    return distributed.broadcast_object(torch.linalg.eigh(covariance).eigenvectors), mean
