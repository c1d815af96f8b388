"""`dino2 curate`: a collection becomes a list to train on, step by step, each image that is dropped for a reason."""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.filesize import decimal

from dinov2cli import distributed
from dinov2cli.console import clock, counted, logger
from dinov2cli.curate.collection import Collection, Stored, check_source, collect, extractor_of, holds_features
from dinov2cli.curate.graph import ITERATIONS, TRAINED_ON, Graph, graph, recall, usual_probes
from dinov2cli.curate.hierarchy import usual_clusters
from dinov2cli.curate.results import Curated, write_results
from dinov2cli.curate.stage import Stage
from dinov2cli.curate.steps import UNREADABLE, Curation, Step, draw, drop_duplicates, drop_near, keep_alike
from dinov2cli.device import choose_device
from dinov2cli.errors import DataError, EnvironmentProblem, check_all
from dinov2cli.eval.extract import Extractor
from dinov2cli.eval.first_look import Plan
from dinov2cli.eval.images import dataset_of_words
from dinov2cli.files import check_folder, locked_now, user_path
from dinov2cli.models.load.locate import check_there
from dinov2cli.requests.curate import CurateRequest


def run(request: CurateRequest) -> Curated | Plan | None:
    """Curate a collection, or say what it would take.

    Raises:
        Dino2Error: what is wrong with the sets, the weights, the disk; nothing is left of the collection.
    """
    if request.dry_run:
        return plan(request)
    taken = EnvironmentProblem(f"{request.output}: another curation is writing there; wait for it, or name another.")
    lock = partial(locked_now, request.output / ".work", taken)
    with distributed.process_group(), lock() if distributed.is_main() else nullcontext():
        return _curate(request)


def look(request: CurateRequest) -> None:
    """Check what takes no time; nothing is listed, downloaded or written.

    Raises:
        Dino2Error: all that is wrong, in the order in which to mend it.
    """
    has_model = request.model is not None

    def images_fit() -> None:
        if request.images is not None and not holds_features(request.data):
            raise DataError(f"--images {request.images} goes with features as --data; {request.data[0]} are images.")

    sets = [("--against", word) for word in request.against] + [("--like", word) for word in request.like]
    check_all(
        *([partial(check_there, request.model)] if request.model is not None else []),
        lambda: check_source(request.data, "--data", has_model=has_model, images=request.images),
        images_fit,
        *(partial(check_source, (word,), option, has_model=has_model) for option, word in sets),
        lambda: _check_place(request.output),
        lambda: choose_device(request.device),
    )


def _check_place(folder: Path) -> None:
    check_folder(folder, "OUT")
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    others = sorted(name for name in names if not name.startswith("."))
    if others and not names & {"list.txt", "report.json", "work"}:
        raise EnvironmentProblem(f"OUT {folder}: a folder of other things, such as {others[0]}; name a new one.")


def _curate(request: CurateRequest) -> Curated | None:
    started, work = time.monotonic(), request.output / "work"
    extract = extractor_of(request)
    pool = collect(request.data, work / "images", extract, request.images)
    n = len(pool)
    state = Curation(
        request, pool, choose_device(request.device),
        np.zeros(n, np.uint8), np.full(n, -1, np.int64), np.full(n, np.nan, np.float32),
    )  # fmt: skip
    state.drop(np.flatnonzero(~pool.readable), UNREADABLE)
    state.steps.append(Step("features", n, int(state.alive.sum()), time.monotonic() - started))
    against = _sets(state, request.against, "against", extract)
    like = _sets(state, request.like, "like", extract)
    found = None if request.keep_duplicates and not against else _neighbours(state)
    if found is not None and not request.keep_duplicates:
        _timed(state, "near-duplicates", lambda: drop_duplicates(state, found))
    if found is not None and against:
        _timed(state, "near evaluation sets", lambda: drop_near(state, found, against))
    if like:
        _timed(state, "like the given sets", lambda: keep_alike(state, like))
    if request.sample is not None:
        _timed(state, "balanced sample", lambda: draw(state))
    result = write_results(state) if distributed.is_main() else None
    distributed.barrier()
    return result


def _timed(state: Curation, name: str, step: Callable[[], dict[str, Any]]) -> None:
    before, started = int(state.alive.sum()), time.monotonic()
    said = step()
    after = int(state.alive.sum())
    state.steps.append(Step(name, before, after, time.monotonic() - started, said))
    if distributed.is_main():
        logger.info("%s: %d of %s kept", name, after, counted(before, "image"))
    if after == 0:
        raise DataError(f"{name}: none of {before} images is left", f"{state.warnings[-1]}" if state.warnings else None)


def _sets(state: Curation, words: Sequence[str], name: str, extract: Extractor | None) -> list[Collection]:
    """The sets that are compared with, their features of the model that the pool's are of."""
    found = []
    for number, word in enumerate(words):
        each = collect((word,), state.work / f"{name}-{number}", extract)
        pool = state.pool
        if each.features.shape[1] != pool.features.shape[1] or (
            each.weights and pool.weights and each.weights != pool.weights
        ):
            raise DataError(f"--{name} {word}: its features are of another model than those of {pool.name}; "
                            "make both with one --model.")  # fmt: skip
        found.append(each)
    return found


def _neighbours(state: Curation) -> Graph:
    request, pool, started = state.request, state.pool, time.monotonic()
    probes = usual_probes(int(state.alive.sum())) if request.probes is None else request.probes
    depends = {"images": pool.key, "neighbours": request.neighbours, "probes": probes}
    work = Stage(state.work / "neighbours", **depends, **({"seed": request.seed} if probes else {}))
    found = graph(
        pool.features, pool.readable, request.neighbours, probes, work, seed=request.seed, device=state.device
    )
    said: dict[str, Any] = {"neighbours": request.neighbours, "probes": probes}
    if probes and distributed.is_main():
        threshold = request.against_threshold if request.keep_duplicates else request.duplicates
        said["recall"] = recall(pool.features, pool.readable, found, request.neighbours, threshold, state.device)
    n = int(state.alive.sum())
    state.nearest = found.nearest().scores
    state.steps.append(Step("neighbours", n, n, time.monotonic() - started, said))
    return found


SECONDS = 0.3
"""What is measured runs for so long at least."""
EDGE_BYTES = 6
SEARCH_BUFFERS = 1 << 30


class Need(NamedTuple):
    """What the work on N images takes: floating-point operations of each step, bytes on the disk, bytes of memory."""

    features_disk: int
    search: float
    search_disk: int
    sample: float
    memory: int


def need(n: int, dim: int, k: int, probes: int = 0, iterations: int = 20, resamplings: int = 2) -> Need:
    """What n images of `dim` features take.

    Args:
        k: neighbours.
        probes: cells that are looked into; 0: all images.
    """
    cells = 4 * n**0.5
    trained = min(n, TRAINED_ON * cells) * ITERATIONS
    search = 2.0 * n * n * dim if not probes else 2.0 * dim * ((trained + n) * cells + n * probes * n / cells)
    sizes = usual_clusters(n)
    sample = 2.0 * n * sizes[0] * dim * (iterations + 1) * (1 + resamplings * 0.5)
    # Components, fates, scores and rows; labels, similarities and their order.
    memory = n * (8 + 1 + 8 + 4 + 4 + 8 + 8 + 8 + 4 + 8) + SEARCH_BUFFERS
    return Need(2 * n * dim, search, n * k * EDGE_BYTES, sample, memory)


def plan(request: CurateRequest) -> Plan:
    """What the request would do, once its images have been listed; the weights are read, no image is.

    Raises:
        Dino2Error: sets or weights that cannot be read.
    """
    device, extract = choose_device(request.device), extractor_of(request)
    rows = Plan({"curate": " ".join(request.data)})
    if holds_features(request.data):
        stored = Stored(user_path(request.data[0]), request.images)
        n, dim = stored.shape
        rows["images"] = f"{n:,} features of {dim} numbers"
    else:
        images = dataset_of_words(request.data)
        assert extract is not None
        n, dim = len(images), extract.dim
        rows["images"] = images.describe()
        side = extract.image_size
        batch = torch.zeros(extract.at_once(side, side), extract.images.in_chans, side, side)
        each = seconds_of(lambda: extract.features_of(batch)) / len(batch)
        rows["features"] = (
            f"about {clock(n * each)}, reading the images apart; {decimal(need(n, dim, 1).features_disk)}"
        )
    processes = request.gpus or 1
    probes = usual_probes(n) if request.probes is None else request.probes
    found = need(n, dim, request.neighbours, probes, request.iterations, request.resamplings)
    speed = flops(device) * processes
    if not request.keep_duplicates or request.against:
        how = f"{probes} of {round(4 * n**0.5):,} cells" if probes else "exact"
        rows["neighbours"] = (
            f"{request.neighbours} of each, {how}: about {clock(found.search / speed)}; {decimal(found.search_disk)}"
        )
    if not request.keep_duplicates:
        rows["duplicates"] = f"cosine above {request.duplicates:g}; the {request.keep} is kept"
    if request.against:
        rows["against"] = f"{', '.join(request.against)}: cosine above {request.against_threshold:g}"
    if request.like:
        rows["like"] = f"{', '.join(request.like)}: {request.retrieval}"
    if request.sample is not None:
        clusters = " / ".join(map(str, request.clusters or usual_clusters(n)))
        rows["sample"] = f"{request.sample:,} from {clusters} clusters: at most about {clock(found.sample / speed)}"
    rows["memory"] = f"about {decimal(found.memory)} beside PyTorch's and the model's"
    rows["disk"] = f"{decimal(found.features_disk + found.search_disk)} in {request.output / 'work'}"
    rows["device"] = f"{device}, {processes} process{'es' if processes > 1 else ''}"
    return rows


def flops(device: torch.device) -> float:
    """Floating-point operations a second of products of matrices in float32, as the search does them."""
    a, b = torch.randn(2048, 512, device=device), torch.randn(8192, 512, device=device)
    return 2 * 2048 * 512 * 8192 / seconds_of(lambda: (a @ b.T).amax(1).cpu())


def seconds_of(work: Callable[[], object]) -> float:
    """Of one call, the quickest of as many as `SECONDS` hold, the first one left out."""
    work()
    quickest, end = float("inf"), time.perf_counter() + SECONDS
    while quickest == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        quickest = min(quickest, time.perf_counter() - start)
    return quickest
