"""`dino2 bench knn|logreg|linear` measure what they say, and both ways to compute it agree."""

from dinov2cli.bench.eval import knn, linear, logreg
from dinov2cli.requests.bench import BenchKnnRequest, BenchLinearRequest, BenchLogregRequest


def test_benches_measure() -> None:
    few = BenchLogregRequest(images=300, dim=6, classes=3, every=20)
    for measured in (
        knn(BenchKnnRequest(queries=50, keys=500, dim=8, k=10)),
        logreg(few),
        linear(BenchLinearRequest(dim=8, classes=3, batch=16, steps=2)),
    ):
        assert measured.figures["ratio"] > 0
        (sentence,) = measured.shown
        assert "times" in str(sentence) and "{" not in str(sentence)
    assert logreg(few).figures["largest_accuracy_difference"] < 4  # of 30 images, one may differ
