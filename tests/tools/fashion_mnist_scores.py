"""The three evaluations of a run on Fashion-MNIST from the command line, beside scikit-learn on the same features.

Prints a table in Markdown. DATA holds the folders that fashion_mnist_folder.py writes; the linear probe is cut to
PROBE_STEPS of the protocol's 12,500 steps. `dino2 embed` extracts the features, and the rest finds them in the cache.

usage: python tests/tools/fashion_mnist_scores.py RUN DATA
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import normalize

TEMPERATURE = 0.07
PROBE_STEPS = 300
Labelled = tuple[np.ndarray, np.ndarray]


def dino2(*words: str) -> tuple[dict, float]:
    """What a command prints with `--json`, and its seconds."""
    start = time.perf_counter()
    print("$", "dino2", *words, file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "dinov2cli", *words, "--json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout), time.perf_counter() - start


def features_of(run: str, data: Path, ratio: str) -> Labelled:
    """cls features [N, D] and labels [N]."""
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/features.safetensors"
        dino2("embed", run, "--data", str(data), "--resize-ratio", ratio, "--output", file)
        stored = load_file(file)
    return stored["cls"].numpy(), stored["labels"].numpy()


def knn_of_scikit_learn(train: Labelled, test: Labelled, k: int) -> float:
    """KNeighborsClassifier: k nearest neighbours by cosine similarity, weighted as in the protocol."""

    def weights(distances: np.ndarray) -> np.ndarray:
        return np.exp(-(distances**2) / 2 / TEMPERATURE)  # similarity = 1 - distance^2 / 2, of unit vectors

    (x, y), (queries, labels) = train, test
    model = KNeighborsClassifier(k, weights=weights, algorithm="brute").fit(normalize(x), y)
    return 100 * float(model.score(normalize(queries), labels))


def logreg_of_scikit_learn(train: Labelled, test: Labelled, C: float) -> float:
    """LogisticRegression at the C that was chosen."""
    (x, y), (queries, labels) = train, test
    model = LogisticRegression(C=C, tol=1e-12, max_iter=5000).fit(x.astype(np.float64), y)
    return 100 * float(model.score(queries.astype(np.float64), labels))


def row(name: str, ours: float, theirs: str, seconds: float) -> None:
    print(f"| {name} | {ours:.2f} | {theirs} | {seconds:.0f} |", flush=True)


def main(run: str, data: str) -> None:
    sets = ["--train-dataset", f"{data}/train", "--val-dataset", f"{data}/test"]
    print("| evaluation | top-1 | scikit-learn on the same features | seconds |\n|---|---|---|---|", flush=True)
    features = [features_of(run, Path(data) / split, repr(256 / 224)) for split in ("train", "test")]
    knn, seconds = dino2("eval", "knn", run, *sets)
    for found, k in zip(knn["rows"], (10, 20, 100, 200), strict=True):
        row(f"k-NN, k = {k}", found["top1"], f"{knn_of_scikit_learn(*features, k):.2f}", seconds)
    short = ["--epochs", "1", "--epoch-length", str(PROBE_STEPS), "--no-resume"]
    linear, seconds = dino2("eval", "linear", run, *sets, *short)
    best = linear["rows"][0]
    row(f"linear probe, {PROBE_STEPS} steps, {best['name']}", best["top1"], "", seconds)
    features = [features_of(run, Path(data) / split, "1") for split in ("train", "test")]
    logreg, seconds = dino2("eval", "logreg", run, *sets)
    C = logreg["extra"]["best_C"]
    theirs = f"{logreg_of_scikit_learn(*features, C):.2f}"
    row(f"logistic regression, C = {C:.3g}", logreg["rows"][0]["top1"], theirs, seconds)


if __name__ == "__main__":
    main(*sys.argv[1:])
