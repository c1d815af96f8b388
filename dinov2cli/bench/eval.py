"""The evaluations beside the plain way to compute the same, on random features: `dino2 bench knn|logreg|linear`."""

import time
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from dinov2cli.bench.clock import Clock, Measured
from dinov2cli.device import choose_device
from dinov2cli.errors import EnvironmentProblem
from dinov2cli.eval.features import Features
from dinov2cli.eval.linear_heads import HeadTrainer, LinearHeads, input_of_head
from dinov2cli.eval.logreg import C_VALUES, LogregSettings, sweep
from dinov2cli.eval.nearest import KeyBank
from dinov2cli.requests.bench import BenchKnnRequest, BenchLinearRequest, BenchLogregRequest


def knn(request: BenchKnnRequest) -> Measured:
    """Exact search of all queries beside the bare product with all keys.

    Both are timed block by block in turn, so that other load on the machine meets both.
    """
    keys, dim, device = request.keys, request.dim, choose_device(request.device)
    generator = torch.Generator().manual_seed(0)
    x = F.normalize(torch.randn(keys, dim, generator=generator), dim=1).to(device)
    q = F.normalize(torch.randn(request.queries, dim, generator=generator), dim=1).to(device)
    bank = KeyBank(x, torch.zeros(keys, dtype=torch.int64, device=device), torch.arange(keys, device=device), device)
    blocks, k, clock = q.split(bank.query_block()), min(request.k, keys), Clock(device)
    search, product = 0.0, 0.0
    bank.search(blocks[0], k)
    for block in blocks:
        product += clock.seconds(partial(torch.matmul, block, x.T))
        search += clock.seconds(partial(bank.search, block, k))
    facts = {"search_s": search, "bare_product_s": product, "ratio": search / product}
    text = "search takes {ratio:.2f} times the bare product ({search_s:.2f} s and {bare_product_s:.2f} s)"
    return measured(text, facts)


def logreg(request: BenchLogregRequest) -> Measured:
    """The sweep over all 45 C as `dino2 eval logreg` does it, beside scikit-learn on every `every`-th C.

    scikit-learn's times are interpolated to all C. Both are timed by the clock and in seconds of work of the cores,
    which other load on the machine changes less. What both find is compared in accuracy and in the objective that both
    minimise (relative; positive where scikit-learn's is lower). Fits take longer the larger C, so that the time of
    those left out at the limit is underestimated.

    Raises:
        EnvironmentProblem: scikit-learn is not installed.
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        remedy = "pip install 'dinov2cli[test]'"
        raise EnvironmentProblem("This benchmark compares with scikit-learn.", remedy) from None
    images, classes = request.images, request.classes
    features, targets = overlapping_classes(images, request.dim, classes)
    held_out = images // 10
    split = zip(features.tensor_split([held_out]), targets.tensor_split([held_out]), strict=True)
    test, train = (Features({"cls": cls}, of_cls, torch.arange(len(cls)), len(cls)) for cls, of_cls in split)
    start = _clocks()
    ours, accuracies = sweep(train, test, LogregSettings(), classes)
    seconds, work = _clocks() - start
    times: dict[int, np.ndarray] = {}
    differences, excess = [], []
    begun = time.perf_counter()
    x, y = train.cls.numpy(), train.targets.numpy()
    for i in range(request.every // 2, len(C_VALUES), request.every):
        if times and time.perf_counter() - begun > request.limit:
            break
        start = _clocks()
        oracle = LogisticRegression(C=C_VALUES[i], tol=1e-12, max_iter=1000).fit(x, y)
        times[i] = _clocks() - start
        differences.append(abs(100 * oracle.score(test.cls.numpy(), test.targets.numpy()) - accuracies[i].top1))
        theirs = _logreg_objective(torch.tensor(oracle.coef_), torch.tensor(oracle.intercept_), train, C_VALUES[i])
        excess.append(_logreg_objective(ours.weight[i], ours.bias[i], train, C_VALUES[i]) / theirs - 1)
    fitted, all_Cs = list(times), range(len(C_VALUES))
    by_clock, by_work = (float(np.interp(all_Cs, fitted, each).sum()) for each in zip(*times.values(), strict=True))
    facts = {
        "sweep_s": float(seconds),
        "scikit_learn_s": by_clock,
        "scikit_learn_fits": len(times),
        "ratio": by_clock / float(seconds),
        "ratio_of_work": by_work / float(work),
        "largest_accuracy_difference": max(differences),
        "largest_objective_excess": max(excess),
    }
    return measured(
        "45 values of C: {sweep_s:.1f} s, scikit-learn {scikit_learn_s:.1f} s (from {scikit_learn_fits} fits), "
        "{ratio:.1f} times as long and {ratio_of_work:.1f} times the work; "
        "accuracies differ by at most {largest_accuracy_difference:.2f} points, and the objective is at most "
        "{largest_objective_excess:.0e} of it higher",
        facts,
    )


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


def linear(request: BenchLinearRequest) -> Measured:
    """A step of all 52 heads together, beside 52 separate layers with their own SGD."""
    dim, classes, batch, steps = request.dim, request.classes, request.batch, request.steps
    device = choose_device(request.device)
    generator = torch.Generator().manual_seed(0)
    shapes = {"last_cls": (batch, 4, dim), "mean_patch": (batch, dim)}
    features = {name: torch.randn(shape, generator=generator).to(device) for name, shape in shapes.items()}
    targets = torch.randint(0, classes, (batch,), generator=generator).to(device)
    heads = LinearHeads(dim, classes, generator=generator).to(device)
    trainer = HeadTrainer(heads, 10**6)
    layers = [heads.head(name).requires_grad_() for name in heads.names]
    rates = heads.rates.tolist() * len(heads.inputs)
    optimizer = torch.optim.SGD(
        [{"params": layer.parameters(), "lr": rate} for layer, rate in zip(layers, rates, strict=True)], momentum=0.9
    )

    def separate() -> None:
        optimizer.zero_grad()
        scores = (layer(input_of_head(layer, dim, 4).of(features)) for layer in layers)
        torch.stack([F.cross_entropy(each, targets) for each in scores]).sum().backward()
        optimizer.step()

    clock, together_s, separate_s = Clock(device), 0.0, 0.0
    for step in range(steps + 1):
        first = clock.seconds(partial(trainer.step, step, features, targets))
        second = clock.seconds(separate)
        if step:  # the first allocates
            together_s, separate_s = together_s + first, separate_s + second
    facts = {"together_s": together_s / steps, "separate_s": separate_s / steps, "ratio": separate_s / together_s}
    text = "a step of 52 heads: {together_s:.4f} s, separately {separate_s:.4f} s, {ratio:.1f} times as long"
    return measured(text, facts)


def measured(text: str, facts: dict[str, Any]) -> Measured:
    """One sentence with the figures in it."""
    return Measured(facts, [text.format(**facts)])


def _clocks() -> np.ndarray:
    """Seconds by the clock, and seconds of work of this process on all cores."""
    return np.array([time.perf_counter(), time.process_time()])
