"""What `chaos.py` asks of the machine: which processes there are, a disk and a clock of a history's own."""

import os
import signal
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Signal a process, if it is still there."""
    with suppress(ProcessLookupError):
        os.kill(pid, number) if pid else None


def alive(pid: int) -> bool:
    return state(pid) not in "ZX"


def state(pid: int) -> str:
    """The kernel's letter for a process: T stands still, Z and X have ended, as one has that is not there."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def children(pid: int) -> list[int]:
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += [int(child) for child in path.read_text().split()]
    return sorted(found)


def variables(pid: int) -> dict[bytes, bytes]:
    with suppress(OSError):
        pairs = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return {name: value for name, _, value in (pair.partition(b"=") for pair in pairs)}
    return {}


def leads(pid: int) -> bool:
    with suppress(OSError):
        return os.getpgid(pid) == pid and alive(pid)
    return False


def parent(pid: int) -> int:
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def comm(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def mounted(*words: str | Path) -> bool:
    return subprocess.run(["mount", *map(str, words)], capture_output=True).returncode == 0


@cache
def fake_clock() -> str:
    """The library by which processes get another clock; nothing where there is no compiler for it."""
    library = Path(tempfile.mkdtemp(prefix="dino2-chaos-clock-")) / "clock.so"
    words = ["cc", "-shared", "-fPIC", "-o", str(library), str(Path(__file__).with_name("chaos_clock.c")), "-ldl"]
    try:
        subprocess.run(words, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return str(library)
