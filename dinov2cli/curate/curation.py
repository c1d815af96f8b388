"""`dino2 curate`: a collection becomes a list to train on, step by step, each image that is dropped for a reason."""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dinov2cli import distributed
from dinov2cli.console import counted, logger
from dinov2cli.curate.collection import Collection, check_source, collect, extractor_of, holds_features
from dinov2cli.curate.graph import Graph, graph, recall, usual_probes
from dinov2cli.curate.plan import Plan, plan
from dinov2cli.curate.results import Curated, write_results
from dinov2cli.curate.stage import Stage
from dinov2cli.curate.state import UNREADABLE, Curation, Step
from dinov2cli.curate.steps import draw, drop_duplicates, drop_near, keep_alike
from dinov2cli.device import choose_device
from dinov2cli.errors import DataError, EnvironmentProblem, check_all
from dinov2cli.eval.extract import Extractor
from dinov2cli.files import check_folder, locked_now
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
