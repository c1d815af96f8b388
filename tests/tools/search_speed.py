"""Seconds, memory and recall of searching an index of random clustered features; the figures in docs/search.md.

python tests/tools/search_speed.py FOLDER [--rows 1000000] [--dim 384] [--faiss ivf hnsw] [--faiss-rows 1000000]

Memory is what the process holds beside the file that is mapped (RssAnon), sampled 50 times a second.
"""

import argparse
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from dinov2cli.requests.base import run
from dinov2cli.requests.search import SearchRemoveRequest
from dinov2cli.search.index import IMAGE, Index, Recipe, create, locked
from dinov2cli.search.neighbours import Approximation, neighbours

CLUSTERS, SPREAD, NOISE, BLOCK = 5000, 32, 0.3, 1 << 16
TOP = 10


def features(rows: int, dim: int, seed: int) -> np.ndarray:
    """float16 [rows, dim] around random centres, spread along `SPREAD` directions and a little along all: the cosine
    within a cluster is about 0.75."""
    fixed = np.random.default_rng(0)
    centres = fixed.standard_normal((CLUSTERS, dim), np.float32)
    directions = fixed.standard_normal((SPREAD, dim), np.float32) * (2 * SPREAD**0.5) ** -1
    rng = np.random.default_rng(seed)
    drawn = centres[rng.integers(0, CLUSTERS, rows)]
    drawn += rng.standard_normal((rows, SPREAD), np.float32) @ directions
    return (drawn + NOISE * rng.standard_normal((rows, dim), np.float32)).astype(np.float16)


@contextmanager
def told(what: str, each: int = 0) -> Iterator[None]:
    """Print seconds, processor seconds and memory of a block."""
    most, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            status = Path("/proc/self/status").read_text()
            most[0] = max(most[0], int(status.partition("RssAnon:")[2].split()[0]) >> 10)

    watcher = threading.Thread(target=watch)
    watcher.start()
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    over.set()
    watcher.join()
    per = f", {1e3 * wall / each:.2f} ms a query" if each else ""
    print(f"{what}: {wall:.2f} s, {cpu:.2f} s of processors{per}, {most[0]} MiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--faiss", nargs="*", default=["ivf"])
    parser.add_argument("--faiss-rows", type=int)
    given = parser.parse_args()
    print(f"{given.rows} x {given.dim}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    shutil.rmtree(given.folder, ignore_errors=True)
    blocks = [range(start, min(start + BLOCK, given.rows)) for start in range(0, given.rows, BLOCK)]
    with told("features drawn and index written"), locked(given.folder):
        index = create(given.folder, Recipe("none", None, "none", "none", "float32"), given.dim, "float16")
        for number, block in enumerate(blocks):
            images = np.zeros(len(block), IMAGE)
            images["readable"] = True
            names = [f"/photos/{i // 1000:04d}/{i:07d}.jpg" for i in block]
            index = index.with_source("photos").with_images(features(len(block), given.dim, number + 1), images, names)
    with told("opened"):
        index = Index.open(given.folder)
    queries = features(1000, given.dim, 10**6)
    for count in (1, 100, 1000):
        with told(f"exact, {count} queries", count):
            exact = neighbours(index.features, queries[:count], TOP, alive=index.alive)
    some = index.features[: given.faiss_rows]
    if len(some) < given.rows:
        exact = neighbours(some, queries, TOP)
    for kind in given.faiss:
        with told(f"faiss {kind} made of {len(some)} rows"):
            approximation = Approximation(some, kind, given.folder / f"faiss-{kind}.index")
        print(f"faiss {kind}: {(given.folder / f'faiss-{kind}.index').stat().st_size >> 20} MiB on the disk")
        for effort in (8, 32, 128, 512):
            with told(f"faiss {kind}, {effort}, 1000 queries", 1000):
                found = approximation.search(queries, TOP, nprobe=effort, ef_search=effort)
            hits = sum(len({*a} & {*b}) for a, b in zip(found.rows.tolist(), exact.rows.tolist(), strict=True))
            print(f"faiss {kind}, {effort}: recall {hits / exact.rows.size:.4f}", flush=True)
        del approximation
    del index, some
    with told("a tenth removed by a pattern"):
        run(SearchRemoveRequest(index=given.folder, which=("/photos/???0/*",)))
    with told("two tenths more removed, files compacted"):
        run(SearchRemoveRequest(index=given.folder, which=("/photos/???[12]/*",)))
    with told("opened"):
        print(f"{len(Index.open(given.folder))} images")


if __name__ == "__main__":
    main()
