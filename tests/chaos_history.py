"""A history of `chaos.py`: one run in one folder, what is done to it, and what must hold."""

import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from chaos_machine import children, fake_clock, mounted
from tiny_run import TINY, metrics_of

TOTAL, PERIOD, IMAGES = 120, 5, 24
HANG_S = 30
LENGTH = [f"train.OFFICIAL_EPOCH_LENGTH={TOTAL}", "optim.epochs=1", "optim.warmup_epochs=0", "train.num_workers=1",
          "optim.freeze_last_layer_epochs=0", f"train.checkpoint_period={PERIOD}", "train.batch_size_per_gpu=4",
          "evaluation.eval_period_iterations=40", "evaluation.knn_period=40",
          f"train.hang_timeout={HANG_S}"]  # fmt: skip
MARK = "DINO2_CHAOS"  # in the environment of all that a history starts
PATIENCE_S = 600.0  # for a run to come further, on a machine that does other things, too
SCHEDULES = ("iteration", "lr", "wd", "mom", "last_layer_lr", "current_batch_size", "teacher_temp")
# Relative, of the mean total_loss over so many iterations: single ones differ with the masks and, in KoLeo, which each
# process takes over its own images, with their number.
BOUND, WINDOW = 0.25, 20


class Violation(Exception):
    """Something that must hold does not."""


class History:
    """One run in one folder, what is done to it, and what must hold."""

    def __init__(self, place: Path, name: str, whole: Path) -> None:
        self.name, self.rng, self.whole = name, random.Random(name), whole
        self.folder = place / f"history-{name.replace('/', '-')}"
        self.disk, self.data = self.folder / "disk", self.folder / "data"
        self.run = self.disk / "run"
        self.life: subprocess.Popen[bytes] | None = None
        self.logs: list[Path] = []
        self.token = f"{os.getpid()}-{name}"
        self.taint: int | None = None  # the iteration from which on numbers need not be those of the whole run
        self.damaged: set[tuple[str, int]] = set()  # checkpoints that we have damaged
        self.exact = self.bounded = 0  # lines that were compared at the end
        self.deviation = 0.0
        self.clock = self.folder / "clock"
        self.own_disk_wanted = self.own_clock_wanted = True

    def __enter__(self) -> "History":
        self.disk.mkdir(parents=True)
        (self.folder / "tmp").mkdir()
        shutil.copytree(self.whole.parent / "data", self.data)
        self.clock.write_bytes(bytes(8))
        self.has_own_disk = self.own_disk_wanted and mounted("-t", "tmpfs", "-o", "size=12m", "tmpfs", self.disk)
        return self

    def __exit__(self, *error: object) -> None:
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.life is not None:
            self.life.wait()
        if error[0] is not None and self.has_own_disk:  # keep what was found
            shutil.copytree(self.disk, self.folder / "disk-kept", symlinks=True, dirs_exist_ok=True)
        if self.has_own_disk:
            subprocess.run(["umount", "-l", str(self.disk)], check=False)
        if error[0] is None:
            shutil.rmtree(self.folder, ignore_errors=True)

    # ---- Starting and watching -------------------------------------------------------------------------------------

    def words(self, *more: str) -> list[str]:
        sets = [f"evaluation.knn_{part}_dataset={self.data}" for part in ("train", "val")]
        return [sys.executable, "-m", "dinov2cli", "train", "--cpu", "--data", str(self.data),
                "--output-dir", str(self.run), *TINY, *LENGTH, *sets, *more]  # fmt: skip

    def environment(self) -> dict[str, str]:
        given = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "250", MARK: self.token,
                 "TMPDIR": str(self.folder / "tmp"), "DINO2_CONFIG": str(self.folder / "none.yaml"),
                 "DINO2_CACHE": str(self.folder / "cache")}  # fmt: skip
        if self.own_clock_wanted and (library := fake_clock()):
            given |= {"LD_PRELOAD": library, "CHAOS_CLOCK": str(self.clock)}
        return given

    def open(self, *more: str) -> subprocess.Popen[bytes]:
        """A training, with a log of its own."""
        self.logs.append(self.folder / f"life-{len(self.logs)}.log")
        with self.logs[-1].open("wb") as log:
            return subprocess.Popen(self.words(*more), stdout=log, stderr=log, env=self.environment(),
                                    start_new_session=True)  # fmt: skip

    def start(self, processes: int = 2, *more: str) -> None:
        assert self.life is None
        self.life = self.open("--gpus", str(processes), *more)

    def ended(self) -> bool:
        return self.life is None or self.life.poll() is not None

    def lines(self) -> int:
        try:
            return (self.run / "training_metrics.json").read_bytes().count(b"\n")
        except OSError:
            return 0

    def said(self) -> str:
        """What the present life has said so far."""
        return self.logs[-1].read_text(errors="replace") if self.logs else ""

    def wait_for(self, condition: Callable[[], Any], what: str, seconds: float = PATIENCE_S) -> Any:
        until = time.monotonic() + seconds
        while not (found := condition()):
            if time.monotonic() > until:
                raise Violation(f"waited {seconds:.0f} s in vain for {what}")
            time.sleep(0.02)
        return found

    def advance(self, more: int) -> None:
        """Let the training come further by some iterations, or to its end."""
        if more:  # one that is starting has the lines of the one before
            self.wait_for(lambda: f"/{TOTAL}  loss" in self.said() or self.ended(), "its first iteration")
        target = min(self.lines() + more, TOTAL)
        self.wait_for(lambda: self.lines() >= target or self.ended(), f"iteration {target}")

    def goes_on(self) -> str:
        """The training must come further by itself, or to its end."""
        target = self.lines() + 2
        self.wait_for(lambda: self.lines() >= target or self.ended(), f"iteration {target} after the fault")
        if self.ended():
            self.ends({0})
            return "finished"
        return "goes on"

    def taint_from_oldest(self) -> None:
        """Whatever the training is resumed from, from there on its numbers are its own."""
        there = [int(path.name[10:]) for path in (self.run / "checkpoints").glob("iteration_*")]
        self.taint = min(TOTAL if self.taint is None else self.taint, min(there, default=0))

    def goes_on_from_resumed(self) -> str:
        """As `goes_on`; from the checkpoint that it resumed on, the numbers are its own."""
        resumed = self.wait_for(lambda: re.search(r"resumed after (\d+) iter", self.said()) or self.ended(), "resuming")
        at = int(resumed[1]) if isinstance(resumed, re.Match) else 0
        self.taint = min(at, TOTAL if self.taint is None else self.taint)
        return self.goes_on()

    def ends(self, codes: set[int], *says: str, within: float = PATIENCE_S) -> str:
        """The training must end, with one of these exit codes and with words that match."""
        assert self.life is not None
        self.wait_for(self.ended, f"an end with exit code {codes}", within)
        code, self.life = self.life.returncode, None
        text = self.said()
        if code not in codes:
            raise Violation(f"exit code {code} instead of {codes}")
        for words in says:
            if not re.search(words, text):
                raise Violation(f"exit code {code}, and nothing says {words!r}")
        self.check_down(left_cleanly=self.left_cleanly(code, text))
        return f"exit code {code}"

    def left_cleanly(self, code: int, text: str) -> bool:
        return code == 0 or (code == 130 and "interrupted: saved" in text)

    def kill_all(self) -> None:
        """As a loss of power: everything at once."""
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.life is not None:
            self.life.wait()
            self.life = None
        self.check_down(left_cleanly=False)

    def interrupt(self) -> None:
        if self.life is None:
            return
        self.life.terminate()
        self.ends({130, -signal.SIGTERM, 0})

    # ---- Processes -------------------------------------------------------------------------------------------------

    def processes(self) -> list[int]:
        """All that run and that this history has started, directly or not."""
        found, wanted = [], f"{MARK}={self.token}".encode()
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if wanted in (folder / "environ").read_bytes().split(b"\0") and int(folder.name) != os.getpid():
                    found.append(int(folder.name))
        return found

    def trainers(self) -> list[int]:
        """The training processes, children of the one that was started."""
        return children(self.life.pid) if self.life is not None else []

    def launchers(self) -> list[int]:
        return [self.life.pid] if self.life is not None else []

    def loaders(self) -> list[int]:
        return [loader for trainer in self.trainers() for loader in children(trainer)]

    def pick(self, which: Callable[[], list[int]]) -> int:
        """One of some processes, when there are any."""
        self.wait_for(lambda: which() or self.ended(), "processes to choose from")
        return self.rng.choice(which() or [0])

    # ---- What must hold --------------------------------------------------------------------------------------------

    def check(self) -> None:
        """At any time."""
        self.check_metrics()
        self.check_words(self.said())

    def check_words(self, text: str) -> None:
        if "Traceback (most recent" in text:
            raise Violation("a traceback")

    def check_down(self, *, left_cleanly: bool) -> None:
        """When the training has ended, however it did."""
        self.wait_for(lambda: not self.processes(), f"the end of {self.processes()}: orphans", 60)
        self.check()
        self.check_files()
        if left_cleanly and list(self.run.glob(".dino2-owner*")):
            raise Violation("the training has ended by itself, and the folder still has an owner")

    def check_metrics(self) -> None:
        path = self.run / "training_metrics.json"
        texts = path.read_text().splitlines(keepends=True) if path.exists() else []
        if texts and not texts[-1].endswith("\n"):
            texts.pop()  # being written, or cut by a kill: done again
        there, whole = [json.loads(text) for text in texts], metrics_of(self.whole)
        if [line["iteration"] for line in there] != list(range(len(there))):
            raise Violation(f"the metrics' iterations are {[line['iteration'] for line in there]}")
        checkpoints = [p for p in (self.run / "checkpoints").glob("iteration_*") if self.is_whole(p)]
        newest = max([int(p.name[10:]) for p in checkpoints], default=0)
        if len(there) < newest and self.ended():
            raise Violation(f"{len(there)} lines of metrics, and a checkpoint of iteration {newest}")
        self.exact = self.bounded = 0
        for line, expected in zip(there, whole, strict=False):
            line = {key: value for key, value in line.items() if key in expected}
            if line["bad_images"] and self.taint is None:
                self.taint = line["iteration"]
            if self.taint is None or line["iteration"] < self.taint:
                self.exact += 1
                if line != expected:
                    wrong = {key: (line.get(key), value) for key, value in expected.items() if line.get(key) != value}
                    raise Violation(f"iteration {line['iteration']} is not that of the undisturbed run: {wrong}")
            else:
                self.bounded += 1
                if any(line[key] != expected[key] for key in SCHEDULES):
                    raise Violation(f"iteration {line['iteration']}: another schedule: {line}, not {expected}")
        self.check_windows([line["total_loss"] for line in there], [line["total_loss"] for line in whole])

    def check_windows(self, there: list[float], whole: list[float]) -> None:
        start = TOTAL if self.taint is None else self.taint
        for first in range(start, len(there) - WINDOW + 1, WINDOW):
            mine, other = (statistics.fmean(losses[first : first + WINDOW]) for losses in (there, whole))
            self.deviation = max(self.deviation, abs(mine / other - 1))
            if not abs(mine / other - 1) <= BOUND:
                raise Violation(f"from iteration {first}: total_loss {mine:.4f}, {other:.4f} undisturbed")

    def is_whole(self, checkpoint: Path) -> bool:
        """Whether it is none that we have damaged; it may have been written again since."""
        with suppress(FileNotFoundError):
            return (checkpoint.name, checkpoint.stat().st_ino) not in self.damaged
        return False

    def check_files(self) -> None:
        import torch

        for folder in (self.run / "checkpoints").glob("iteration_*"):
            if not self.is_whole(folder):
                continue
            files = json.loads((folder / "manifest.json").read_text())["files"]
            for name, facts in files.items():
                if zlib.crc32((folder / name).read_bytes()) != facts["crc32"]:
                    raise Violation(f"{folder.name}/{name} is not what its manifest says")
            if {path.name for path in folder.iterdir()} - {"manifest.json"} != set(files):
                raise Violation(f"{folder.name} holds {sorted(path.name for path in folder.iterdir())}")
        for path in self.run.glob("eval/*/teacher_checkpoint.pth"):
            torch.load(path, weights_only=True)
        if (self.run / "config.yaml").exists() and not yaml.safe_load((self.run / "config.yaml").read_text())["train"]:
            raise Violation("config.yaml")
        for path in self.run.glob("logs/heartbeat/rank_*.json"):
            json.loads(path.read_text())

    def is_done(self) -> bool:
        return self.lines() >= TOTAL and (self.run / f"checkpoints/iteration_{TOTAL:08d}").exists()

    def finish(self) -> None:
        """Let the run come to its end, and compare it with the undisturbed one."""
        import torch

        if self.life is None:  # also where it is finished: it says so, and clears away what a kill has left
            self.start()
        self.ends({0})
        self.check_metrics()
        if self.lines() != TOTAL:
            raise Violation(f"finished with {self.lines()} lines")
        usual = (
            "**/.started-by",
            "**/.metadata",
            "slurm/*/.submission_file_*",
        )  # the last: submitit's link to a script
        left = [p.relative_to(self.run) for p in self.run.rglob(".*")]
        if aside := [str(path) for path in left if not any(Path("/", path).match(name) for name in usual)]:
            raise Violation(f"left aside at the end: {aside}")
        status = subprocess.run([sys.executable, "-m", "dinov2cli", "status", str(self.run), "--json"],
                                env=self.environment(), capture_output=True, text=True)  # fmt: skip
        if status.returncode or json.loads(status.stdout)["state"] != "finished":
            raise Violation(f"dino2 status: {status.stdout} {status.stderr}")
        if self.taint is None:
            if (self.run / "knn_metrics.json").read_text() != (self.whole / "knn_metrics.json").read_text():
                raise Violation("other scores of k-NN than the undisturbed run's")
            name = f"eval/training_{TOTAL - 1}/teacher_checkpoint.pth"
            mine, other = (torch.load(run / name, weights_only=True)["teacher"] for run in (self.run, self.whole))
            if mine.keys() != other.keys() or not all(torch.equal(mine[key], other[key]) for key in mine):
                raise Violation("another teacher than the undisturbed run's")
