"""Speed of the evaluations, each beside the plain way to compute the same, on random features."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dinov2cli.errors import EnvironmentProblem
from dinov2cli.eval.features import Features
from dinov2cli.eval.linear_heads import LEARNING_RATES, HeadTrainer, LinearHeads, input_of_head
from dinov2cli.eval.logreg import C_VALUES, LogregSettings, sweep
from dinov2cli.eval.nearest import KeyBank


def bench_knn(queries: int, keys: int, dim: int, k: int, device: str = "cpu") -> dict[str, Any]:
    """Exact search of all queries beside the bare product with all keys.

    Both are timed block by block in turn, so that other load on the machine meets both.
    """
    generator = torch.Generator().manual_seed(0)
    x = F.normalize(torch.randn(keys, dim, generator=generator), dim=1).to(device)
    q = F.normalize(torch.randn(queries, dim, generator=generator), dim=1).to(device)
    bank = KeyBank(x, torch.zeros(keys, dtype=torch.int64, device=device), torch.arange(keys, device=device), device)
    blocks = q.split(bank.query_block())
    search, product = 0.0, 0.0
    bank.search(blocks[0], k)
    for block in blocks:
        product += _seconds(partial(torch.matmul, block, x.T), device)
        search += _seconds(partial(bank.search, block, k), device)
    return {"search_s": search, "bare_product_s": product, "ratio": search / product}


def bench_logreg(images: int, dim: int, classes: int, every: int, limit_s: float = 300) -> dict[str, Any]:
    """The sweep over all 45 C as `dino2 eval logreg` does it, beside scikit-learn on every `every`-th C.

    scikit-learn's times are interpolated to all C. Both are timed by the clock and in seconds of work of the cores,
    which other load on the machine changes less. What both find is compared in accuracy and in the objective that both
    minimise (relative; positive where scikit-learn's is lower).

    Args:
        limit_s: no further fit of scikit-learn is begun after this many seconds. Fits take longer the larger C, so
            that the time of those left out is underestimated.

    Raises:
        EnvironmentProblem: scikit-learn is not installed.
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise EnvironmentProblem(
            "This benchmark compares with scikit-learn.", hint="pip install 'dinov2cli[test]'"
        ) from None
    features, targets = overlapping_classes(images, dim, classes)
    held_out = images // 10
    test, train = (
        Features({"cls": features[rows]}, targets[rows], torch.arange(len(targets[rows])), len(targets[rows]))
        for rows in (slice(held_out), slice(held_out, None))
    )
    start = _clocks()
    ours, accuracies = sweep(train, test, LogregSettings(), classes)
    seconds, work = _clocks() - start
    times: dict[int, np.ndarray] = {}
    differences, excess = [], []
    begun = time.perf_counter()
    x, y = train.cls.numpy(), train.targets.numpy()
    for i in range(every // 2, len(C_VALUES), every):
        if times and time.perf_counter() - begun > limit_s:
            break
        start = _clocks()
        oracle = LogisticRegression(C=C_VALUES[i], tol=1e-12, max_iter=1000).fit(x, y)
        times[i] = _clocks() - start
        differences.append(abs(100 * oracle.score(test.cls.numpy(), test.targets.numpy()) - accuracies[i].top1))
        theirs = _logreg_objective(torch.tensor(oracle.coef_), torch.tensor(oracle.intercept_), train, C_VALUES[i])
        excess.append(_logreg_objective(ours.weight[i], ours.bias[i], train, C_VALUES[i]) / theirs - 1)
    fitted, all_Cs = list(times), range(len(C_VALUES))
    by_clock, by_work = (float(np.interp(all_Cs, fitted, each).sum()) for each in zip(*times.values(), strict=True))
    return {
        "sweep_s": float(seconds),
        "scikit_learn_s": by_clock,
        "scikit_learn_fits": len(times),
        "ratio": by_clock / float(seconds),
        "ratio_of_work": by_work / float(work),
        "largest_accuracy_difference": max(differences),
        "largest_objective_excess": max(excess),
    }


def overlapping_classes(images: int, dim: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated random features float64 [images, dim] of classes that overlap a little, and their targets."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, classes, (images,), generator=generator)
    scales = torch.logspace(0, -1.5, dim)
    mixing = torch.randn(dim, dim, generator=generator) / dim**0.5 * scales[:, None]
    centres = 0.3 * torch.randn(classes, dim, generator=generator)
    return ((torch.randn(images, dim, generator=generator) + centres[targets]) @ mixing).double(), targets


def _logreg_objective(weight: torch.Tensor, bias: torch.Tensor, train: Features, C: float) -> float:
    logits = torch.addmm(bias.double(), train.cls.double(), weight.double().T)
    return float(F.cross_entropy(logits, train.targets) + weight.square().sum() / (2 * C * train.size))


def bench_linear(dim: int, classes: int, batch: int, steps: int, device: str = "cpu") -> dict[str, Any]:
    """A step of all 52 heads together, beside 52 separate layers with their own SGD."""
    generator = torch.Generator().manual_seed(0)
    features = {
        "last_cls": torch.randn(batch, 4, dim, generator=generator).to(device),
        "mean_patch": torch.randn(batch, dim, generator=generator).to(device),
    }
    targets = torch.randint(0, classes, (batch,), generator=generator).to(device)
    heads = LinearHeads(dim, classes, learning_rates=LEARNING_RATES, generator=generator).to(device)
    trainer = HeadTrainer(heads, 10**6)
    layers = [heads.head(name).requires_grad_() for name in heads.names]
    rates = heads.rates.tolist() * len(heads.inputs)
    optimizer = torch.optim.SGD(
        [{"params": layer.parameters(), "lr": rate} for layer, rate in zip(layers, rates, strict=True)], momentum=0.9
    )

    def separate() -> None:
        optimizer.zero_grad()
        losses = [_loss(layer, features, targets) for layer in layers]
        torch.stack(losses).sum().backward()
        optimizer.step()

    together_s, separate_s = 0.0, 0.0
    for step in range(steps + 1):
        first = _seconds(partial(trainer.step, step, features, targets), device)
        second = _seconds(separate, device)
        if step:  # the first allocates
            together_s, separate_s = together_s + first, separate_s + second
    return {"together_s": together_s / steps, "separate_s": separate_s / steps, "ratio": separate_s / together_s}


def _loss(layer: nn.Linear, features: dict[str, torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
    blocks, dim = features["last_cls"].shape[1:]
    return F.cross_entropy(layer(input_of_head(layer, dim, blocks).of(features)), targets)


def _clocks() -> np.ndarray:
    """Seconds by the clock, and seconds of work of this process on all cores."""
    return np.array([time.perf_counter(), time.process_time()])


def _seconds(work: Callable[[], Any], device: str) -> float:
    start = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start
