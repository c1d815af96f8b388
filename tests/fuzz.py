"""Hostile input: mutated files and strings (`fuzz_cases.py`), read as dino2 reads them; a program.

    python tests/fuzz.py --count 10000 --seed 0         # all kinds in turn; counts by kind and outcome
    python tests/fuzz.py --kinds weights tar --count 500
    python tests/fuzz.py --only 1234                    # one case again, with its traceback

The n-th case is a function of (seed, n). A worker reads each in a folder of its own, with 2 GB of memory on top of
what it starts with and ten seconds of the processor, or a minute by the clock; the parent starts another one where it
dies or hangs. An audit hook sees what is executed and where files are written. Allowed are `read`, and `refused` by one
of dino2's own errors; all else is a fault.
"""

import argparse
import collections
import faulthandler
import json
import os
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from fuzz_cases import KINDS, Seeds

MEMORY = 2 << 30
SECONDS, BY_THE_CLOCK = 10.0, 60.0  # a hang: so much of the processor, or of time on a machine that does other things

# ---- The worker ------------------------------------------------------------------------------------------------------

RUNS = (
    "os.system",
    "subprocess.Popen",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "pty.spawn",
    "socket.connect",
)
CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "shutil.rmtree", "os.truncate")


def work(seed: int, root: Path) -> None:
    """Answer each line `number kind` with a line of JSON."""
    from dinov2cli.errors import Dino2Error

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    seeds = Seeds()
    if os.environ.get("FUZZ_UNGUARDED"):  # to see that the fuzz sees it
        import torch

        guarded = torch.load
        torch.load = lambda *given, **keys: guarded(*given, **{**keys, "weights_only": False})
    noted: list[str] = []
    watching = [False]

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if not watching[0]:
            return
        if event in RUNS:
            noted.append(f"{event} {arguments[:2]!r}"[:200])
        elif event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            writes = (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if writes and not path.startswith((str(root), "/dev/null", "/dev/shm")):
                noted.append(f"writes {path}")
        elif event in CHANGES and not os.path.realpath(os.fsdecode(arguments[0])).startswith(str(root)):
            noted.append(f"{event} {arguments[0]!r}")

    sys.addaudithook(watch)
    for kind in KINDS:  # what is imported and allocated once does not count
        with suppress(Exception):
            _reader(seeds, kind, f"warm/{kind}", root)()
    started_with = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (started_with + MEMORY, resource.RLIM_INFINITY))
    faulthandler.register(signal.SIGUSR1, file=(root / "stack").open("w"))
    answers.write("ready\n")
    for line in sys.stdin:
        number, kind = line.split()
        noted.clear()
        watching[0] = False
        began, trace = time.process_time(), ""
        try:
            read = _reader(seeds, kind, f"{seed}/{number}", root)
            watching[0] = True
            read()
            outcome = "read"
        except Dino2Error as error:
            outcome = "refused" if error.message.strip() and "Traceback" not in error.message else "an empty message"
        except BaseException as error:
            outcome, trace = f"fault {type(error).__name__}", traceback.format_exc()
        watching[0] = False
        if noted or (root / "canary").exists():
            outcome, trace = "fault: " + ("; ".join(noted) or "the canary"), trace
            (root / "canary").unlink(missing_ok=True)
        took = round(time.process_time() - began, 2)
        answer = {"outcome": outcome, "seconds": took, "trace": trace[:3000] + trace[3000:][-1000:]}
        answers.write(json.dumps(answer) + "\n")


def _reader(seeds: Seeds, kind: str, name: str, root: Path) -> Callable[[], Any]:
    """What reads a case, which lies in its folder by then."""
    folder = root / "case"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return KINDS[kind](seeds, random.Random(name), folder)


# ---- The parent ------------------------------------------------------------------------------------------------------


class Worker:
    """A process that reads cases, started anew when it dies or hangs."""

    def __init__(self, seed: int, root: Path) -> None:
        environment = {**os.environ, "DINO2_CACHE": str(root / "cache"), "OMP_NUM_THREADS": "1", "HOME": str(root)}
        environment |= {"DINO2_CONFIG": str(root / "none.yaml"), "TMPDIR": str(root)}
        command = [sys.executable, __file__, "--work", str(root), "--seed", str(seed)]
        self.root = root
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self.answer(1200) == "ready", "the worker does not start"

    def answer(self, seconds: float) -> str | None:
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            return None
        return self.process.stdout.readline().strip()

    def used(self) -> float:
        """Seconds of the processor so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def ask(self, number: int, kind: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(number, kind, file=self.process.stdin, flush=True)
        began, used = time.monotonic(), self.used()
        while (answer := self.answer(1)) is None:
            if self.used() - used > SECONDS or time.monotonic() - began > BY_THE_CLOCK:
                self.process.send_signal(signal.SIGUSR1)
                time.sleep(1)
                return {"outcome": f"fault: hangs for {SECONDS:.0f} s", "trace": (self.root / "stack").read_text()}
        if not answer:
            return {"outcome": f"fault: dies ({self.process.wait()})", "trace": ""}
        return dict(json.loads(answer))

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def fuzz(seed: int, numbers: Iterable[int], kinds: list[str], *, seconds: float | None = None) -> dict[str, Any]:
    """Counts by kind and outcome, and the faults: number, kind, outcome, trace."""
    counts: dict[str, collections.Counter[str]] = {kind: collections.Counter() for kind in kinds}
    faults: list[dict[str, Any]] = []
    slowest, began = 0.0, time.monotonic()
    root = Path(tempfile.mkdtemp(prefix="fuzz-")).resolve()
    worker = Worker(seed, root)
    try:
        for number in numbers:
            if seconds is not None and time.monotonic() - began > seconds:
                break
            kind = kinds[number % len(kinds)]
            answer = worker.ask(number, kind)
            slowest = max(slowest, answer.get("seconds", SECONDS))
            counts[kind][answer["outcome"] if answer["outcome"] in ("read", "refused") else "fault"] += 1
            if answer["outcome"] not in ("read", "refused"):
                faults.append({"number": number, "kind": kind, **answer})
                if "hangs" in answer["outcome"] or "dies" in answer["outcome"]:
                    worker.stop()
                    worker = Worker(seed, root)
    finally:
        worker.stop()
        shutil.rmtree(root, ignore_errors=True)
    return {"counts": {kind: dict(count) for kind, count in counts.items()}, "slowest": slowest, "faults": faults}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--only", type=int)
    parser.add_argument("--seconds", type=float, help="stop after so long")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work(given.seed, given.work)
        return 0
    numbers = range(given.count) if given.only is None else [given.only]
    found = fuzz(given.seed, numbers, given.kinds, seconds=given.seconds)
    shown = found["faults"] if given.only is not None else found["faults"][:40]
    for fault in shown:
        last = fault["trace"].strip().splitlines()[-1:] or [""]
        print(f"{fault['number']} {fault['kind']}: {fault['outcome']}: {last[0][:160]}")
        if given.only is not None:
            print(fault["trace"])
    for kind, count in found["counts"].items():
        print(f"{kind:12} " + "  ".join(f"{outcome} {number}" for outcome, number in sorted(count.items())))
    print(f"slowest {found['slowest']} s; {len(found['faults'])} faults")
    return 1 if found["faults"] else 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(main())
