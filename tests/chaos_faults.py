"""The faults of `chaos.py`: what each does to a training, and what must come of it."""

import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
from chaos_history import PATIENCE_S, TOTAL, History, Violation
from chaos_machine import alive, fake_clock, kill, mounted, state
from PIL import Image

LEFT_OUT = "left out, this machine does not allow it"


# ---- Processes that end or hang --------------------------------------------------------------------------------------


def kill_loader(history: History) -> str:
    kill(history.pick(history.loaders))
    return history.goes_on()


def kill_process(history: History) -> str:
    kill(history.pick(history.trainers))
    return history.goes_on()


def kill_agent(history: History) -> str:
    """The launcher alone: what it has started must end with it."""
    assert history.life is not None
    kill(history.life.pid)
    return history.ends({-signal.SIGKILL, 0}, within=20)


def power_loss(history: History) -> str:
    history.kill_all()
    return "all gone"


def tell_to_stop(history: History) -> str:
    """Ctrl-C, SIGTERM, or a scheduler's SIGUSR2, to the launcher or to one of its processes."""
    assert history.life is not None
    number = history.rng.choice((signal.SIGINT, signal.SIGTERM, signal.SIGUSR2))
    to_one = history.rng.random() < 0.3
    kill(history.pick(history.trainers) if to_one else history.life.pid, number)
    return f"{number.name}: {history.ends({130, 0, -number})}"


def tell_to_stop_early(history: History) -> str:
    """A signal while the training is starting."""
    history.kill_all()
    history.start()
    time.sleep(history.rng.random() * 12)
    assert history.life is not None
    number = history.rng.choice((signal.SIGINT, signal.SIGTERM, signal.SIGUSR2))
    kill(history.life.pid, number)
    return f"{number.name}: {history.ends({130, -number, 0})}"


def hang_briefly(history: History) -> str:
    """A process, loader or the launcher stands still, and goes on."""
    pid = history.pick(history.rng.choice((history.loaders, history.trainers, history.launchers)))
    kill(pid, signal.SIGSTOP)
    time.sleep(history.rng.uniform(0.5, 5))
    kill(pid, signal.SIGCONT)
    return history.goes_on()


def hang(history: History) -> str:
    """A process or a loader of a training stands still for good: the run must notice, and start again."""
    history.advance(1)
    pid = history.pick(history.trainers if history.rng.random() < 0.6 else history.loaders)
    at, loads = history.lines(), pid in history.loaders()
    kill(pid, signal.SIGSTOP)
    time.sleep(0.2)
    stands = state(pid) in "Tt"  # one that was ending has ended
    history.wait_for(lambda: not alive(pid) or history.ended(), f"the end of {pid}, which hangs", 1200)
    outcome = history.goes_on()
    needed = stands and (not loads or at < TOTAL - 10)  # the last batches may have been there already
    if needed and not re.search("hung|no iteration for|did not end within", history.said()):
        raise Violation(f"nothing says that it hung after {at}")
    return outcome


# ---- Disks and files -------------------------------------------------------------------------------------------------


def full_disk(history: History) -> str:
    """No space, or not enough for a checkpoint, until the training has ended of it."""
    if not history.has_own_disk:
        return LEFT_OUT
    free, filler = shutil.disk_usage(history.disk).free, history.disk / "filler"
    leave = history.rng.choice((0, 0, 20_000, 100_000))
    with suppress(OSError), filler.open("wb", buffering=0) as file:  # a checkpoint may take the space meanwhile
        file.write(b"\0" * (free - leave))
    try:
        return history.ends({2, 0}, r"No space left on device|disk space|finished|the weights are in")
    finally:
        filler.unlink()


def read_only(history: History) -> str:
    """The run folder, or its checkpoints, read-only while it trains, or before it starts."""
    folder = history.rng.choice((history.run, history.run / "checkpoints"))
    if before := history.rng.random() < 0.3:
        history.kill_all()
    if not folder.exists() or not mounted("--bind", folder, folder):
        return LEFT_OUT
    try:
        # Refused while a file is open for writing that was opened since.
        history.wait_for(lambda: mounted("-o", "remount,bind,ro", folder), "a read-only folder", 20)
        if before:
            history.start()
        return history.ends(
            {2, 0},
            r"(could not|cannot) be written|is not yours to write|Read-only file system|weights are in",
        )
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def damage(history: History) -> str:
    """The newest checkpoint, or the newest two, with a bit flipped, a piece cut off or a file gone."""
    history.wait_for(lambda: len(checkpoints(history)) > 2 or history.ended(), "three checkpoints")
    history.kill_all()
    newest = checkpoints(history)[: history.rng.choice((1, 1, 2))]
    for folder in newest:
        history.damaged.add((folder.name, folder.stat().st_ino))
        path = history.rng.choice(sorted(path for path in folder.iterdir() if path.stat().st_size))
        content, how = bytearray(path.read_bytes()), history.rng.choice(("bit", "cut", "gone"))
        if how == "bit":
            content[history.rng.randrange(len(content))] ^= 1 << history.rng.randrange(8)
        if how == "cut":
            del content[history.rng.randrange(len(content)) :]
        path.unlink() if how == "gone" else path.write_bytes(content)
    history.start()
    outcome = history.goes_on()
    passed_over = history.said().count("checkpoint passed over")
    if passed_over < len(newest):
        raise Violation(
            f"{len(newest)} checkpoints damaged (the last: {how} of {path.name}), {passed_over} passed over"
        )
    return f"{outcome}, {passed_over} passed over"


def checkpoints(history: History) -> list[Path]:
    """Newest first."""
    return sorted((history.run / "checkpoints").glob("iteration_*"), reverse=True)


def images_gone(history: History) -> str:
    """Some images, or all of them, vanish or are cut; at the end they are there again."""
    history.advance(1)  # one that is starting lists the images that are there
    kept = history.folder / "data-kept"
    shutil.copytree(history.data, kept)
    images = sorted(history.data.rglob("*.png"))
    how, count = history.rng.choice(("gone", "cut", "empty")), history.rng.choice((1, 6, len(images)))
    for path in history.rng.sample(images, count):
        content = path.read_bytes()
        path.unlink() if how == "gone" else path.write_bytes(content[: len(content) // 2 if how == "cut" else 0])
    try:
        if restarted := history.rng.random() < 0.3:
            history.kill_all()
            history.taint = min(
                history.taint or 10**9, int(next(iter(checkpoints(history)), Path("iteration_0")).name[10:])
            )
            history.start()
        target = history.lines() + 15
        history.wait_for(lambda: history.lines() >= target or history.ended(), "an end, or iterations")
        said = history.said()
        if not history.ended():
            if restarted and how == "gone" and checkpoints(history) and "the data has changed since" not in said:
                raise Violation(f"{count} images gone, and nothing says so")
            kill(history.life.pid, signal.SIGTERM) if history.life else None
            return f"{count} {how}, went on, {history.ends({130, 2, 0})}"
        return f"{count} {how}: " + history.ends({2, 0}, r"error: |finished|the weights are in")
    finally:
        shutil.rmtree(history.data)
        kept.rename(history.data)


def images_replaced(history: History) -> str:
    """Other pictures under the same names. Nothing tells them apart, so the numbers are others from here on."""
    history.taint_from_oldest()
    for path in history.rng.sample(sorted(history.data.rglob("*.png")), 6):
        pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(path.with_name("aside"), "png")
        path.with_name("aside").replace(path)
    return history.goes_on()


# ---- Surroundings ----------------------------------------------------------------------------------------------------


def clock_moved(history: History) -> str:
    """The clock of all its processes jumps."""
    if not fake_clock():
        return LEFT_OUT
    hours = history.rng.choice((-24 * 400, -24, -1, 1, 24, 24 * 400))
    with history.clock.open("r+b") as file:
        file.write(struct.pack("q", hours * 3600))
    return f"by {hours} h: {history.goes_on()}"


def no_memory(history: History) -> str:
    """A process or loader that is at work may have no more memory than it has: its next allocation fails."""
    history.advance(1)  # before that, it may end in the interpreter's own words, of which dino2 knows nothing
    pid = history.pick(history.trainers if history.rng.random() < 0.6 else history.loaders)
    with suppress(OSError, ProcessLookupError):
        used = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
        resource.prlimit(pid, resource.RLIMIT_AS, (used, resource.RLIM_INFINITY))
    time.sleep(2)
    return history.goes_on()


def killed_for_memory(history: History) -> str:
    """A training process in a control group with less memory than it uses: the kernel kills it."""
    pid = history.pick(history.trainers)
    group = next((parent / f"chaos-{os.getpid()}" for parent in MEMORY_GROUPS if parent.is_dir()), None)
    try:
        assert group is not None
        group.mkdir()
        limit = next(path for name in ("memory.max", "memory.limit_in_bytes") if (path := group / name).exists())
        (group / "cgroup.procs").write_text(str(pid))
        # What it uses does not move with it: allowed is less than what it will ask for.
        limit.write_text(str(1 << 20))
    except (OSError, AssertionError, StopIteration):
        if group is not None and group.is_dir():
            group.rmdir()
        return LEFT_OUT
    try:
        history.wait_for(lambda: not alive(pid), "the kernel to kill it", 60)
        return history.goes_on()
    finally:
        for _ in range(100):
            with suppress(OSError):
                group.rmdir()
                break
            time.sleep(0.1)


MEMORY_GROUPS = (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup"))


def second_training(history: History) -> str:
    """The same command again, while it trains: refused, and the first one goes on."""
    history.advance(1)
    if history.lines() >= TOTAL:  # one that has only its end to do may not have begun yet
        return LEFT_OUT
    more = history.rng.choice(([], ["--no-resume"], ["--gpus", "2"]))
    if history.lines() > TOTAL // 2:  # the first may be done before the second looks, which then may do as it was told
        more = []
    second = history.open(*more)
    code = second.wait(PATIENCE_S)
    said = history.logs.pop().read_text()
    refused = code == 2 and "is being trained by process" in said and "Traceback" not in said
    if not refused and not (history.ended() and code == 0):
        raise Violation(f"the second training ended with {code}: {said[-2000:]}")
    return history.goes_on() if not history.ended() else history.ends({0})


def two_at_once(history: History) -> str:
    """After a loss of power, two are started at the same moment: one trains, the other is refused."""
    history.kill_all()
    history.start()
    other = history.open("--gpus", "2")
    both = {history.life: history.logs[-2], other: history.logs[-1]}
    history.wait_for(lambda: any(each.poll() is not None for each in both) or history.lines() < 0, "one to be refused")
    refused = next(each for each in both if each.poll() is not None)
    said = both.pop(refused).read_text()
    if refused.returncode != 2 or "error:" not in said or "Traceback" in said:
        raise Violation(f"one of two ended with {refused.returncode}: {said[-2000:]}")
    ((history.life, log),) = both.items()
    history.logs.remove(log)
    history.logs.append(log)
    return history.goes_on()


def other_processes(history: History) -> str:
    """The next start has another number of processes: as many images an iteration, with other masks."""
    history.interrupt()
    processes = history.rng.choice((1, 4))
    history.start(processes)
    outcome = f"{processes} processes, {history.goes_on_from_resumed()}"
    history.interrupt()
    return outcome


FAULTS: dict[str, Callable[[History], str]] = {
    each.__name__: each
    for each in (kill_loader, kill_process, kill_agent, power_loss, tell_to_stop, tell_to_stop_early, hang_briefly,
                 hang, full_disk, read_only, damage, images_gone, images_replaced, clock_moved, no_memory,
                 killed_for_memory, second_training, two_at_once, other_processes)
}  # fmt: skip
