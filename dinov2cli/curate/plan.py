"""What a curation would do, and what it would take: time by a short measurement on this machine, memory, disk."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from rich.filesize import decimal

from dinov2cli.console import clock
from dinov2cli.curate.collection import Stored, extractor_of, holds_features
from dinov2cli.curate.graph import ITERATIONS, TRAINED_ON, usual_probes
from dinov2cli.curate.hierarchy import usual_clusters
from dinov2cli.device import choose_device
from dinov2cli.eval.first_look import Plan as Lines
from dinov2cli.eval.images import dataset_of_words
from dinov2cli.files import user_path
from dinov2cli.requests.curate import CurateRequest

SECONDS = 0.3
"""What is measured runs for so long at least."""
EDGE_BYTES = 6
SEARCH_BUFFERS = 1 << 30


class Plan(Lines):
    """What would be done; as text a line each."""


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
