"""Checks of the machines: versions, device, arithmetic, kernels, communication, clocks and limits."""

import os
import platform
import re
import resource
import shutil
import socket
import time
from pathlib import Path

import torch

from dinov2cli import __version__, distributed
from dinov2cli.config import Config
from dinov2cli.data.workers import available_cores, choose_workers
from dinov2cli.device import main_memory
from dinov2cli.doctor.finding import Check, Finding, Situation, failure, ok, warning
from dinov2cli.errors import ConfigError
from dinov2cli.site import read_site, shown, user_file
from dinov2cli.train.choices import choose_attention

PREFETCHED = 2  # batches that each loader process prepares ahead, torch's default
TENSORS_OF_A_BATCH = 6
SLOW_LINK_GB_S = {"cuda": 1.0, "cpu": 0.05}
MAX_SKEW_SECONDS = 2.0


def versions(situation: Situation) -> Finding:
    """Python, torch and dino2, the same everywhere."""
    here = {"python": platform.python_version(), "torch": torch.__version__, "dino2": __version__}
    everywhere = distributed.all_gather_objects((socket.gethostname(), here))
    for name, remedy in (("torch", "Install one version of PyTorch on all nodes."),
                         ("dino2", "Install one version of dinov2cli on all nodes.")):  # fmt: skip
        if len({versions[name] for _, versions in everywhere}) > 1:
            seen = dict.fromkeys(f"{versions[name]} on {host}" for host, versions in everywhere)
            return failure(f"the processes run different versions of {name}: {', '.join(seen)}", remedy)
    return ok(f"dino2 {__version__}, PyTorch {torch.__version__}, Python {here['python']}", **here)


def device(situation: Situation) -> Finding:
    """The GPU, its driver and CUDA, and that it computes; one process a GPU."""
    on_gpu = situation.device.type == "cuda"
    uuid = str(torch.cuda.get_device_properties(situation.device).uuid) if on_gpu else ""
    places = distributed.all_gather_objects((socket.gethostname(), uuid))
    if without := [host for host, gpu in places if not gpu]:
        if len(without) < len(places):
            return failure(
                f"{len(without)} of {len(places)} processes have no GPU ({', '.join(dict.fromkeys(without))})",
                "Give each process a GPU, or train all on the CPU (--cpu).",
            )
        return _cpu()
    if len(set(places)) < len(places):
        return failure(
            f"{len(places)} processes share {len(set(places))} GPUs",
            "Start one process for each GPU (torchrun --nproc-per-node, --gpus, or srun --gpus-per-task=1).",
        )
    properties = torch.cuda.get_device_properties(situation.device)
    text = (
        f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, compute capability {properties.major}."
        f"{properties.minor}; CUDA {torch.version.cuda}, driver {driver_version() or 'unknown'}"
    )
    try:
        ones = torch.ones(64, 64, device=situation.device)
        computes = bool((ones @ ones == 64).all())
    except RuntimeError as error:
        return failure(
            f"{text}: it does not compute ({str(error).splitlines()[0]}); this PyTorch is built for "
            f"{', '.join(torch.cuda.get_arch_list())}",
            f"Install a PyTorch built for sm_{properties.major}{properties.minor}, or a newer driver.",
        )
    if not computes:
        return failure(f"{text}: a product of ones is wrong", "The GPU or its memory is faulty; use another one.")
    return ok(text, name=properties.name, capability=f"{properties.major}.{properties.minor}", cuda=torch.version.cuda)


def _cpu() -> Finding:
    text = f"CPU, {available_cores()} cores, {main_memory() / 1e9:.0f} GB of main memory"
    if (driver := driver_version()) and not torch.cuda.is_available():
        why = "is built without CUDA" if torch.version.cuda is None else f"(CUDA {torch.version.cuda}) cannot use it"
        return warning(
            f"{text}; there is an NVIDIA driver {driver}, but this PyTorch {why}",
            "Install a PyTorch for this driver (https://pytorch.org/get-started), or a newer driver.",
        )
    return ok(text)


def precision(situation: Situation) -> Finding:
    """The arithmetic of the run on this device."""
    found = situation.precision
    return ok(f"{found.name} ({found.reason})", precision=found.name)


def attention(situation: Situation) -> Finding:
    """The attention kernels that the run would use, really run forward and backward, beside plain float32."""
    try:
        backend, reason = choose_attention(situation.config, situation.device, situation.precision)
    except ConfigError as error:
        return failure(error.message, "Set student.attention_backend=auto.")
    return ok(f"{backend} ({reason}); run forward and backward", backend=backend)


def communication(situation: Situation) -> Finding:
    """A sum over all processes: that it is right, and how fast."""
    world = distributed.world_size()
    if world == 1:
        return ok("one process: nothing to exchange", processes=1)
    where = situation.device
    megabytes = (256 if where.type == "cuda" else 64) if situation.thorough else 8
    numbers = torch.empty(megabytes * 250_000, dtype=torch.float32, device=where)
    seconds, right = [], True
    for _ in range(4):
        numbers.fill_(distributed.rank() + 1)
        distributed.barrier()
        start = time.perf_counter()
        distributed.all_reduce_sum(numbers)
        if where.type == "cuda":
            torch.cuda.synchronize(where)
        seconds.append(time.perf_counter() - start)
        right &= bool((numbers == world * (world + 1) // 2).all())
    slowest = max(distributed.all_gather_objects(min(seconds[1:])))  # the first one connects
    hosts = len(set(distributed.all_gather_objects(socket.gethostname())))
    if not right:
        return failure(
            f"the sum over {world} processes is wrong",
            "Network or driver are faulty; with GPUs, NCCL_P2P_DISABLE=1 and NCCL_IB_DISABLE=1 tell which.",
        )
    # The bandwidth of the busiest link, as nccl-tests count it: comparable whatever the number of processes.
    bandwidth = 2 * (world - 1) / world * numbers.nbytes / slowest / 1e9
    library = "NCCL" if where.type == "cuda" else "gloo"
    text = (
        f"{library}: {megabytes} MB summed over {world} processes on {hosts} host{'s' if hosts > 1 else ''} in "
        f"{1000 * slowest:.3g} ms, {bandwidth:.3g} GB/s"
    )
    facts = {"processes": world, "hosts": hosts, "bandwidth_gb_s": bandwidth, "megabytes": megabytes}
    if situation.thorough and bandwidth < SLOW_LINK_GB_S[where.type]:
        return warning(
            f"{text}: slow for training",
            "NCCL_DEBUG=INFO (GLOO_SOCKET_IFNAME with gloo) shows the network in use; NCCL_SOCKET_IFNAME and "
            "NCCL_IB_HCA choose it.",
            **facts,
        )
    return ok(text, **facts)


def clocks(situation: Situation) -> Finding:
    """How far apart the nodes' clocks are; times in logs and of files are compared across nodes."""
    if distributed.world_size() == 1:
        return ok("one process: one clock")
    spreads = []
    for _ in range(3):
        distributed.barrier()
        now = distributed.all_gather_objects(time.time())
        spreads.append(max(now) - min(now))
    if (skew := min(spreads)) > MAX_SKEW_SECONDS:  # the rest is waiting
        return warning(
            f"the nodes' clocks are {skew:.1f} s apart",
            "Let NTP or chrony set them; heartbeats and log times are misleading until then.",
            skew_s=skew,
        )
    return ok(f"within {skew:.2g} s of each other", skew_s=skew)


def open_files(situation: Situation) -> Finding:
    """Room for the handles by which loader processes pass their batches."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    workers = choose_workers(situation.config.train.num_workers)
    needed = 256 + workers * PREFETCHED * TENSORS_OF_A_BATCH
    if soft != resource.RLIM_INFINITY and soft < needed:
        return warning(
            f"{soft} files may be open at once; {workers} loader processes may need {needed}",
            f"Raise the limit (ulimit -n {max(4096, needed)}), or lower train.num_workers.",
            limit=soft,
        )
    return ok("any number may be open" if soft == resource.RLIM_INFINITY else f"{soft} may be open at once", limit=soft)


def shared_memory(situation: Situation) -> Finding:
    """Room in /dev/shm for the batches on their way from loader processes."""
    workers, place = choose_workers(situation.config.train.num_workers), Path("/dev/shm")
    if workers == 0 or not place.is_dir():
        return ok("not needed here")
    batch = batch_bytes(situation.config)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    needed = batch * workers * PREFETCHED * processes
    free = shutil.disk_usage(place).free
    loaders = f"{workers * processes} loader process{'es' if workers * processes > 1 else ''}"
    text = f"{place} has {free / 1e6:,.0f} MB free; {loaders} may fill {needed / 1e6:,.0f} MB"
    remedy = "Give the container more (--shm-size=8g or --ipc=host), or lower train.num_workers."
    if free < batch * processes:
        return failure(f"{text}, and not one batch fits", remedy)
    return warning(text, remedy) if free < needed else ok(text)


def batch_bytes(config: Config) -> int:
    """Size of one process's batch on its way from the loader."""
    crops, batch = config.crops.largest(), config.train.batch_size_per_gpu
    pixels = 2 * crops.global_size**2 + config.crops.local_crops_number * crops.local_size**2
    pixels += 2 * (crops.gram_teacher_size or 0) ** 2
    as_bytes = config.data.normalize_on_device or config.data.device_augment
    return batch * pixels * config.images().in_chans * (1 if as_bytes else 4)


def driver_version() -> str | None:
    """Version of the NVIDIA driver, or None where there is no way to tell."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", text)
    return found[0] if found else None


def site(situation: Situation) -> Finding:
    """What is known of this site without being typed, and which file says it."""
    try:
        rows = read_site().rows()
    except ConfigError as error:
        return failure(error.message, "Mend this file, or move it away.")
    if not rows:
        return ok(f"nothing is said of it; {shown(user_file())} may name datasets and defaults")
    facts = {key: {"value": value, "file": str(file)} for key, value, file in rows}
    return ok("\n".join(f"{key}: {value} ({shown(file)})" for key, value, file in rows), **facts)


MACHINE = {
    "versions": Check(versions),
    "site": Check(site),
    "device": Check(device),
    "precision": Check(precision, after=("device",)),
    "attention": Check(attention, after=("precision",)),
    "communication": Check(communication, after=("device",)),
    "clocks": Check(clocks),
    "open files": Check(open_files),
}
"""With or without a run in mind."""
