"""The three evaluations of a run on Fashion-MNIST from the command line, beside scikit-learn on the same features.

Prints a table in Markdown. DATA holds the folders that fashion_mnist_folder.py writes; the linear probe is cut to one
epoch of 1250 steps instead of the protocol's ten.

usage: python tests/tools/fashion_mnist_scores.py RUN DATA
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import normalize

TEMPERATURE = 0.07


def dino2(*words: str) -> tuple[dict, float]:
    """What a command prints with `--json`, and its seconds."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "dinov2cli", *words, "--json"]
    print("$", "dino2", *words, file=sys.stderr, flush=True)
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout), time.perf_counter() - start


def features_of(run: str, data: Path, ratio: str) -> tuple[np.ndarray, np.ndarray]:
    """cls features [N, D] and labels [N]."""
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/features.safetensors"
        dino2("embed", run, "--data", str(data), "--resize-ratio", ratio, "--output", file)
        stored = load_file(file)
    return stored["cls"].numpy(), stored["labels"].numpy()


def knn_of_scikit_learn(run: str, data: Path, k: int) -> float:
    """k nearest neighbours by cosine similarity, weighted as in the protocol."""
    (x, y), (queries, labels) = (features_of(run, data / split, repr(256 / 224)) for split in ("train", "test"))

    def weights(distances: np.ndarray) -> np.ndarray:
        return np.exp(-(distances**2) / 2 / TEMPERATURE)  # similarity = 1 - distance^2 / 2, of unit vectors

    model = KNeighborsClassifier(k, weights=weights, algorithm="brute").fit(normalize(x), y)
    return 100 * float(model.score(normalize(queries), labels))


def logreg_of_scikit_learn(run: str, data: Path, C: float) -> float:
    (x, y), (queries, labels) = (features_of(run, data / split, "1") for split in ("train", "test"))
    model = LogisticRegression(C=C, tol=1e-12, max_iter=5000).fit(x.astype(np.float64), y)
    return 100 * float(model.score(queries.astype(np.float64), labels))


def main(run: str, data: str) -> None:
    torch.set_num_threads(2)
    sets = ["--train-dataset", f"{data}/train", "--val-dataset", f"{data}/test"]
    knn, knn_s = dino2("eval", "knn", run, *sets)
    logreg, logreg_s = dino2("eval", "logreg", run, *sets)
    linear, linear_s = dino2("eval", "linear", run, *sets, "--epochs", "1", "--no-resume")
    best_C = logreg["extra"]["best_C"]
    print("| evaluation | top-1 | scikit-learn on the same features | seconds |\n|---|---|---|---|")
    for row, k in zip(knn["rows"], (10, 20, 100, 200), strict=True):
        theirs = f"{knn_of_scikit_learn(run, Path(data), k):.2f} (KNeighborsClassifier)" if k <= 20 else ""
        print(f"| k-NN, k = {k} | {row['top1']:.2f} | {theirs} | {knn_s:.0f} |")
    theirs = f"{logreg_of_scikit_learn(run, Path(data), best_C):.2f} (LogisticRegression)"
    print(f"| logistic regression, C = {best_C:.3g} | {logreg['rows'][0]['top1']:.2f} | {theirs} | {logreg_s:.0f} |")
    print(
        f"| linear probe, 1 epoch, {linear['rows'][0]['name']} | {linear['rows'][0]['top1']:.2f} | | {linear_s:.0f} |"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
