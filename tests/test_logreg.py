"""Logistic regression: scikit-learn's solutions at every C, from one batched L-BFGS, on one process or two."""

import numpy as np
import pytest
import torch
from processes import run_in_processes
from sklearn.linear_model import LogisticRegression

from dinov2cli import distributed
from dinov2cli.errors import DataError
from dinov2cli.eval.features import Features
from dinov2cli.eval.lbfgs import minimise
from dinov2cli.eval.logreg import C_VALUES, LogregResult, LogregSettings, evaluate_logreg, hold_out_tenth, sweep
from dinov2cli.eval.metrics import MetricType
from dinov2cli.eval.softmax_regression import fit


def make_features(n: int, seed: int, n_classes: int = 4, dim: int = 12, spread: float = 0.5) -> Features:
    """Overlapping classes in correlated features away from the origin."""
    rng, shared = np.random.default_rng(seed), np.random.default_rng(0)
    targets = rng.permutation(np.arange(n) % n_classes)
    centres = spread * shared.normal(size=(n_classes, dim))
    mixing = shared.normal(size=(dim, dim)) * np.logspace(0, -1.5, dim)[:, None]
    cls = (centres[targets] + rng.normal(size=(n, dim))) @ mixing + 1.5
    tensors = {"cls": torch.tensor(cls, dtype=torch.float32)}
    return Features(tensors, torch.tensor(targets), torch.arange(n), n)


@pytest.mark.parametrize("n_classes", [2, 4])
def test_coefficients_of_scikit_learn_over_six_orders_of_C(n_classes: int) -> None:  # noqa: N802
    data, test = make_features(600, 1, n_classes), make_features(2000, 2, n_classes)
    Cs = [1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 1e3]
    ours = fit(data.cls, data.targets, Cs)
    x, y = data.cls.double().numpy(), data.targets.numpy()
    for i, C in enumerate(Cs):
        oracle = LogisticRegression(C=C, tol=1e-10, max_iter=20000).fit(x, y)
        weight, bias = ours.weight[i], ours.bias[i]
        if n_classes == 2:
            weight, bias = weight[1:] - weight[:1], bias[1:] - bias[:1]
        else:  # both are free to shift the scores of all classes
            bias = bias - bias.mean() + oracle.intercept_.mean()
        error = np.linalg.norm(weight.numpy() - oracle.coef_) / np.linalg.norm(oracle.coef_)
        assert error < 1e-3, (C, error)
        np.testing.assert_allclose(bias.numpy(), oracle.intercept_, rtol=1e-2, atol=1e-3)
        predicted = ours.scores(test.cls, n_classes)[i].argmax(1).numpy()
        theirs = oracle.score(test.cls.double().numpy(), test.targets.numpy())
        assert abs(100 * (predicted == test.targets.numpy()).mean() - 100 * theirs) < 0.1 + 1e-9


def test_solved_together_as_alone() -> None:
    data = make_features(300, 3)
    Cs = [1e-4, 1.0, 1e4]
    together = fit(data.cls, data.targets, Cs)
    for i, C in enumerate(Cs):
        torch.testing.assert_close(together.weight[i], fit(data.cls, data.targets, [C]).weight[0], rtol=1e-4, atol=1e-5)


def test_float32_is_near() -> None:
    data = make_features(600, 1)
    exact, rough = (fit(data.cls, data.targets, [1.0], dtype=dtype) for dtype in (torch.float64, torch.float32))
    assert (exact.weight - rough.weight).norm() < 0.02 * exact.weight.norm()


def test_a_start_at_the_solution_stays_there() -> None:
    data = make_features(300, 3)
    solved = fit(data.cls, data.targets, [1.0])
    again = fit(data.cls, data.targets, [1.0], start=solved)
    assert int(again.iterations) < int(solved.iterations) / 2
    torch.testing.assert_close(again.weight, solved.weight, rtol=1e-4, atol=1e-5)


def test_classes_without_images_score_nothing() -> None:
    data = make_features(200, 4)
    gaps = fit(data.cls, data.targets * 2, [1.0])
    scores = gaps.scores(data.cls, 9)
    assert scores[:, :, [1, 3, 5, 7, 8]].isneginf().all()
    torch.testing.assert_close(scores[:, :, :7:2], fit(data.cls, data.targets, [1.0]).scores(data.cls, 4))


def test_minimise_quadratics_of_very_different_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(-1, 1, 20, dtype=torch.float64) * torch.tensor([[1.0], [1e-4], [1e4]], dtype=torch.float64)
    targets = torch.randn(3, 20, generator=generator, dtype=torch.float64)

    def quadratic(points: torch.Tensor, which: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        away = points - targets[which]
        return (scales[which] * away**2).sum(1) / 2, scales[which] * away

    start = torch.zeros(3, 20, dtype=torch.float64)
    found = minimise(quadratic, start, torch.ones_like(start), tol=1e-10, ftol=0)
    torch.testing.assert_close(found.points, targets, rtol=1e-4, atol=1e-4)
    assert (found.iterations > 1).all() and (found.iterations < 400).all()
    assert not start.any()  # the caller's tensor is left alone


def test_protocol_step_by_step() -> None:
    train, val = make_features(400, 5), make_features(300, 6)
    settings = LogregSettings(Cs=C_VALUES[8:32:4], max_iter=2000)
    result = evaluate_logreg(train, val, settings=settings)
    rest, tenth = hold_out_tenth(train)
    assert (rest.size, tenth.size) == (360, 40)
    assert not set(rest.indices.tolist()) & set(tenth.indices.tolist())

    def sklearn(data: Features, C: float) -> LogisticRegression:
        return LogisticRegression(C=C, tol=1e-10, max_iter=20000).fit(data.cls.double(), data.targets)

    sweep = [100 * sklearn(rest, C).score(tenth.cls.double(), tenth.targets) for C in settings.Cs]
    np.testing.assert_allclose(list(result.sweep.values()), sweep, atol=1e-9)
    assert result.best_C == settings.Cs[int(np.argmax(sweep))]
    final = 100 * sklearn(train, result.best_C).score(val.cls.double(), val.targets)
    assert abs(result.accuracy.top1 - final) < 0.1 + 1e-9
    assert result.accuracy.images == 300


def test_finetune_set_and_finetune_on_val() -> None:
    train, val, extra = make_features(200, 5), make_features(100, 6), make_features(80, 7)
    Cs = C_VALUES[8:32:6]
    on_val = evaluate_logreg(train, val, settings=LogregSettings(Cs=Cs, finetune_on_val=True))
    torch.testing.assert_close(on_val.classifier.weight, fit(train.cls, train.targets, [on_val.best_C]).weight)
    with_set = evaluate_logreg(train, val, extra, LogregSettings(Cs=Cs))
    both = torch.cat((train.cls, extra.cls)), torch.cat((train.targets, extra.targets))
    torch.testing.assert_close(with_set.classifier.weight, fit(*both, [with_set.best_C]).weight)


def test_metric_types() -> None:
    train, val = make_features(200, 5), make_features(100, 6)
    settings = {metric: LogregSettings(Cs=(1.0,), metric=metric) for metric in MetricType}
    mean = evaluate_logreg(train, val, settings=settings[MetricType.MEAN_ACCURACY]).accuracy
    per_class = evaluate_logreg(train, val, settings=settings[MetricType.PER_CLASS_ACCURACY]).accuracy
    assert per_class.per_class is not None and len(per_class.per_class) == 4
    assert mean.top1 == pytest.approx(np.mean(per_class.per_class))  # 25 images of each class


def test_too_few_images() -> None:
    with pytest.raises(DataError, match="give at least 10"):
        evaluate_logreg(make_features(9, 1), make_features(20, 2))
    one_class = make_features(30, 1, n_classes=1)
    with pytest.raises(DataError, match="at least two classes; the train images have 1"):
        evaluate_logreg(one_class, one_class)


def logreg_of_part() -> LogregResult:
    parts = []
    for whole in (make_features(301, 8), make_features(99, 9)):
        here = torch.arange(whole.size).tensor_split(distributed.world_size())[distributed.rank()]
        parts.append(Features({"cls": whole.cls[here]}, whole.targets[here], here, whole.size))
    return evaluate_logreg(*parts, settings=LogregSettings(Cs=C_VALUES[8:32:6]))


def test_two_processes_equal_one() -> None:
    results = run_in_processes(2, logreg_of_part)
    alone = evaluate_logreg(make_features(301, 8), make_features(99, 9), settings=LogregSettings(Cs=C_VALUES[8:32:6]))
    for together in results:
        assert together.accuracy == alone.accuracy and together.best_C == alone.best_C
        assert together.sweep == alone.sweep
        torch.testing.assert_close(together.classifier.weight, alone.classifier.weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("spread", [0.15, 0.5, 1.5])
def test_the_C_chosen_is_that_of_float64(spread: float) -> None:  # noqa: N802
    train, held = make_features(1500, 1, 5, 16, spread), make_features(400, 2, 5, 16, spread)
    Cs = C_VALUES[4::2]
    exact = fit(train.cls, train.targets, Cs, max_iter=3000)
    (expected,) = (100 * (exact.scores(held.cls, 5).argmax(2) == held.targets).double().mean(1)).unsqueeze(0)
    chosen, accuracies = sweep(train, held, LogregSettings(Cs=Cs), 5)
    found = torch.tensor([accuracy.top1 for accuracy in accuracies])
    assert float((found - expected).abs().max()) <= 0.25 + 1e-6  # an image of 400
    assert float(expected[found.argmax()]) == pytest.approx(float(expected.max()))
    assert int(found.argmax()) == int(expected.argmax())
    assert chosen.Cs == Cs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_classes_that_come_apart(dtype: torch.dtype) -> None:
    """Weak regularisation of nearly separable classes: losses far below the rounding of probabilities near 1."""
    data = make_features(2000, 1, 6, 40, spread=1.2)
    Cs = [10.0, 1e3, 1e5]
    ours = fit(data.cls, data.targets, Cs, dtype=dtype)
    assert int(ours.iterations.max()) < 1000
    x, y = data.cls.double(), data.targets

    def objective(weight: torch.Tensor, bias: torch.Tensor, C: float) -> float:
        return float(
            torch.nn.functional.cross_entropy(x @ weight.T + bias, y) + weight.square().sum() / (2 * C * len(x))
        )

    for i, C in enumerate(Cs):
        oracle = LogisticRegression(C=C, tol=1e-10, max_iter=5000).fit(x.numpy(), y.numpy())
        theirs = objective(torch.tensor(oracle.coef_), torch.tensor(oracle.intercept_), C)
        assert objective(ours.weight[i], ours.bias[i], C) < (1 + (1e-4 if dtype is torch.float32 else 1e-7)) * theirs


def test_gaps_in_the_positions_change_nothing() -> None:
    train, val = make_features(301, 8), make_features(99, 9)
    with_gaps = Features(train.tensors, train.targets, torch.arange(301) * 2, 301)
    settings = LogregSettings(Cs=C_VALUES[8:32:6])
    alone, gappy = (evaluate_logreg(data, val, settings=settings) for data in (train, with_gaps))
    assert gappy.accuracy == alone.accuracy and gappy.sweep == alone.sweep
