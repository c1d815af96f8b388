"""k-NN: equal to a plain numpy implementation of the protocol, whatever the chunking, and on two processes."""

from typing import Any

import numpy as np
import pytest
import torch
from processes import run_in_processes

from dinov2cli import distributed
from dinov2cli.errors import DataError
from dinov2cli.eval import nearest
from dinov2cli.eval.features import Features
from dinov2cli.eval.knn import KnnSettings, choose_images, evaluate_knn, knn_hits, knn_scores, short_classes, usable_ks
from dinov2cli.eval.metrics import rank_of
from dinov2cli.eval.nearest import KeyBank, Neighbours, grouped_topk


def make_features(n: int, *, clustered: bool, seed: int, n_classes: int = 7, dim: int = 24) -> Features:
    rng = np.random.default_rng(seed)
    targets = rng.permutation(np.arange(n) % n_classes)
    centres = np.random.default_rng(0).normal(size=(n_classes, dim))
    cls = rng.normal(size=(n, dim)) + (0.7 * centres[targets] if clustered else 0) + 0.5
    tensors = {"cls": torch.tensor(cls, dtype=torch.float32)}
    return Features(tensors, torch.tensor(targets), torch.arange(n), n)


def numpy_knn(train: Features, val: Features, ks: list[int], T: float, leave_one_out: bool = False) -> dict:
    """Scores [Q, C] for each k: full similarity matrix, full sort, one vote at a time, in float64."""
    x, q = train.cls.double().numpy(), val.cls.double().numpy()
    x, q = x / np.linalg.norm(x, axis=1, keepdims=True), q / np.linalg.norm(q, axis=1, keepdims=True)
    similarity = q @ x.T
    if leave_one_out:
        np.fill_diagonal(similarity, -np.inf)
    labels, n_classes = train.targets.numpy(), int(train.targets.max()) + 1
    scores = {k: np.zeros((len(q), n_classes)) for k in ks}
    for row, values in enumerate(similarity):
        nearest_first = np.argsort(-values)[: max(ks)]
        weights = np.exp(values[nearest_first] / T)
        weights /= weights.sum()
        for k in ks:
            for neighbour, weight in zip(nearest_first[:k], weights[:k], strict=True):
                scores[k][row, labels[neighbour]] += weight
    return scores


def numpy_accuracy(scores: np.ndarray, targets: np.ndarray, top: int) -> float:
    order = np.argsort(-scores, axis=1, kind="stable")[:, :top]
    return 100 * float((order == targets[:, None]).any(1).mean())


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks of keys and blocks of queries even for little data."""
    monkeypatch.setattr(nearest, "_MAX_KEYS_PER_CHUNK", 97)
    monkeypatch.setattr(nearest, "_CHUNK_BYTES", {"cpu": 4 * 97 * 13})


@pytest.mark.parametrize("clustered", [False, True])
@pytest.mark.parametrize("temperature", [0.02, 0.07, 1.0])
@pytest.mark.usefixtures("small_chunks")
def test_same_predictions_as_numpy(clustered: bool, temperature: float) -> None:
    train, val = make_features(640, clustered=clustered, seed=1), make_features(150, clustered=clustered, seed=2)
    ks = [1, 10, 20, 100, 200]
    expected = numpy_knn(train, val, ks, temperature)
    keys = torch.nn.functional.normalize(train.cls, dim=1)
    bank = KeyBank(keys, train.targets, train.indices)
    found = bank.search(torch.nn.functional.normalize(val.cls, dim=1), max(ks))
    scores = knn_scores(found, ks, temperature, 7).numpy()
    results = evaluate_knn(train, val, KnnSettings(tuple(ks), temperature))
    for ours, k in zip(scores, ks, strict=True):
        np.testing.assert_allclose(ours, expected[k], atol=2e-5)
        second, best = np.sort(expected[k], axis=1)[:, -2:].T
        decided = best - second > 1e-4  # a tie may fall either way
        np.testing.assert_array_equal(ours.argmax(1)[decided], expected[k].argmax(1)[decided])
        assert decided.mean() > 0.9
        ties = 100 * (~decided).mean()
        assert abs(results["full", k].top1 - numpy_accuracy(expected[k], val.targets.numpy(), 1)) <= ties + 1e-9
        five = torch.tensor(expected[k], dtype=torch.float32).topk(5).indices
        assert abs(results["full", k].top5 - 100 * (five == val.targets[:, None]).any(1).double().mean()) <= 2


def test_learns_clusters_and_not_noise() -> None:
    for clustered, low, high in ((True, 80, 100), (False, 5, 30)):
        train, val = make_features(600, clustered=clustered, seed=1), make_features(200, clustered=clustered, seed=2)
        assert low < evaluate_knn(train, val, KnnSettings((20,)))["full", 20].top1 < high


@pytest.mark.usefixtures("small_chunks")
def test_leave_one_out_never_finds_itself() -> None:
    features = make_features(300, clustered=True, seed=3)
    results = evaluate_knn(features, features, KnnSettings((1, 10)), leave_one_out=True)
    for k, scores in numpy_knn(features, features, [1, 10], 0.07, leave_one_out=True).items():
        assert results["full", k].top1 == pytest.approx(numpy_accuracy(scores, features.targets.numpy(), 1), abs=0.4)
    assert evaluate_knn(features, features, KnnSettings((1,)))["full", 1].top1 == 100  # finds itself


def test_few_shot_is_the_mean_over_tries() -> None:
    train, val = make_features(500, clustered=True, seed=4), make_features(120, clustered=True, seed=5)
    results = evaluate_knn(train, val, KnnSettings((3, 10), n_per_class=(5, -1), n_tries=3))
    assert set(results) == {("5 per class", 3), ("5 per class", 5), ("full", 3), ("full", 10)}
    tops = []
    for seed in range(3):
        chosen = choose_images(train.targets, 5, seed)
        assert train.targets[chosen].bincount().tolist() == [5] * 7
        subset = Features({"cls": train.cls[chosen]}, train.targets[chosen], torch.arange(35), 35)
        tops.append(numpy_accuracy(numpy_knn(subset, val, [5], 0.07)[5], val.targets.numpy(), 1))
    assert len(set(tops)) > 1
    assert results["5 per class", 5].top1 == pytest.approx(np.mean(tops), abs=0.5)


@pytest.mark.parametrize("n", [1, 7, 200, 1000, 3001])
@pytest.mark.parametrize("k", [1, 7, 200])
def test_grouped_topk_is_topk(n: int, k: int) -> None:
    k = min(k, n)
    values = torch.randn(5, n, generator=torch.Generator().manual_seed(n))
    best, columns = grouped_topk(values, k)
    torch.testing.assert_close(best, values.topk(k).values, rtol=0, atol=0)
    torch.testing.assert_close(values.gather(1, columns), best, rtol=0, atol=0)


def test_classes_without_votes_are_no_hits() -> None:
    scores = torch.tensor([[0.0, 0.0, 0.6, 0.4, 0.0, 0.0, 0.0]])
    assert [int(rank_of(scores, torch.tensor([label]))) for label in range(7)] == [2, 3, 0, 1, 4, 5, 6]


def test_k_above_the_train_set() -> None:
    assert usable_ks((10, 20, 200), -1, 50) == (10, 20)
    with pytest.raises(DataError, match="at least 100 train images, but there are 50"):
        usable_ks((100, 200), -1, 50)


def test_sets_without_common_class() -> None:
    train, val = make_features(50, clustered=True, seed=1), make_features(20, clustered=True, seed=2)
    strangers = Features(val.tensors, val.targets + 100, val.indices, val.size)
    with pytest.raises(DataError, match="no class in common"):
        evaluate_knn(train, strangers, KnnSettings((10,)))


def knn_of_part() -> tuple[Any, Any]:
    """In one of several processes, which holds its part of train and val: the results it sees."""
    settings = KnnSettings((10, 50), n_per_class=(-1, 4), n_tries=2)
    parts = []
    for whole in (make_features(401, clustered=True, seed=6), make_features(99, clustered=True, seed=7)):
        here = torch.arange(whole.size).tensor_split(distributed.world_size())[distributed.rank()]
        parts.append(Features({"cls": whole.cls[here]}, whole.targets[here], here, whole.size))
    loo = evaluate_knn(parts[0], parts[0], KnnSettings((10,)), leave_one_out=True)
    return evaluate_knn(parts[0], parts[1], settings), loo


def test_two_processes_equal_one() -> None:
    results = run_in_processes(2, knn_of_part)
    train, val = make_features(401, clustered=True, seed=6), make_features(99, clustered=True, seed=7)
    alone = (
        evaluate_knn(train, val, KnnSettings((10, 50), n_per_class=(-1, 4), n_tries=2)),
        evaluate_knn(train, train, KnnSettings((10,)), leave_one_out=True),
    )
    assert results == [alone, alone]


def test_gaps_in_the_positions_change_nothing() -> None:
    train, val = make_features(140, clustered=True, seed=1), make_features(60, clustered=True, seed=2)
    settings = KnnSettings(ks=(3, 5), n_per_class=(-1, 6), n_tries=2)
    gaps = torch.tensor([i for i in range(150) if i % 15 != 4])
    with_gaps = Features(train.tensors, train.targets, gaps, 140)
    assert evaluate_knn(with_gaps, val, settings) == evaluate_knn(train, val, settings)
    alone = evaluate_knn(train, train, settings, leave_one_out=True)
    assert evaluate_knn(with_gaps, with_gaps, settings, leave_one_out=True) == alone


def test_classes_with_fewer_images_than_asked_for_are_named() -> None:
    labels = torch.tensor([0] * 10 + [1] * 3)
    assert short_classes(labels, ("common", "rare"), (-1, 3)) == ()
    (note,) = short_classes(labels, ("common", "rare"), (-1, 5))
    assert note == "5 per class: 1 of 2 classes have fewer train images: rare (3)"


@pytest.mark.parametrize("n_classes", [3, 12, 1000])
@pytest.mark.parametrize("k", [1, 3, 10])
def test_top_k_is_that_of_the_reference(n_classes: int, k: int) -> None:
    """Its module, written anew: a one-hot vote of each neighbour, summed; `argmax`, and `topk` for the five."""
    torch.manual_seed(k)
    labels = torch.randint(n_classes, (300, 20))
    weights = (torch.rand(300, 20).sort(1, descending=True).values / 0.07).softmax(1)
    votes = (torch.nn.functional.one_hot(labels, n_classes) * weights[..., None])[:, :k].sum(1)
    targets = torch.randint(n_classes, (300,))
    ours = knn_hits(knn_scores(Neighbours((weights.log() * 0.07), labels), [k], 0.07, n_classes), targets)[:, 0]
    assert torch.equal(ours[0], votes.argmax(1) == targets)
    chosen = torch.zeros_like(votes).scatter(1, votes.topk(min(5, n_classes), dim=1).indices, 1.0)
    assert torch.equal(ours[1], chosen.gather(1, targets[:, None])[:, 0] > 0)


def test_share_of_images_whose_top_5_is_filled_up() -> None:
    train, val = make_features(640, clustered=True, seed=1), make_features(150, clustered=True, seed=2)
    results = evaluate_knn(train, val, KnnSettings((1, 4, 200)))
    assert [round(results["full", k].filled) for k in (1, 4, 200)] == [100, 100, 0]
