"""How a run is doing, from the files in its folder, and from Slurm where it was submitted. Imports no torch."""

import json
import statistics
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from dinov2cli.console import counted
from dinov2cli.errors import ConfigError
from dinov2cli.files import last_json_lines
from dinov2cli.launch.restarts import newest_checkpoint, read_restarts
from dinov2cli.requests import tools
from dinov2cli.train.judgement import Judgement, judge
from dinov2cli.train.verdicts import Collapse, collapse_of

STALE_S = 90.0  # a process that trains gives a sign of life every few seconds; after this long it counts as gone
RECENT = 10  # lines of the metrics that the speed and the loss are taken from


class Status(NamedTuple):
    """A run at one moment.

    Attributes:
        state: "finished", "training", "saving", "interrupted", "failed", "hanging" (as its processes say), "dead" (they
            say nothing any more), "waiting" (a job in the queue) or "not started".
        iteration: done so far; of `total`.
        checkpoint: iteration of the newest checkpoint, 0 for none.
        seconds_left: to the end at the present speed; None if it does not train.
        loss: mean total loss of the last lines of the metrics.
        images_per_s: of all processes together.
        iter_time, data_time: seconds of an iteration, and of those spent waiting for data; medians.
        processes: the signs of life, by rank, each with its `age` in seconds.
        slowest: rank that is held up longest by its own data, and by how many seconds against the median.
        silent: ranks without a recent sign of life, while the run should be training.
        restarts, requeues: how often so far; last_restart says why.
        hangs: files with the stacks of processes that hung.
        collapse: what the monitors found against the run, as a `Collapse`; None if nothing.
        learning: whether it learns, as a `Judgement`: learns, summary and advice; None where there is nothing to judge.
        jobs: submitted jobs of the run, each with Slurm's `slurm_state`, None where it no longer knows.
        logs: where to read on.
    """

    run: str
    state: str
    iteration: int
    total: int | None
    checkpoint: int
    seconds_left: float | None
    loss: float | None
    images_per_s: float | None
    iter_time: float | None
    data_time: float | None
    processes: list[dict[str, Any]]
    slowest: int | None
    slowest_by: float | None
    silent: list[int]
    restarts: int
    requeues: int
    last_restart: str | None
    hangs: list[str]
    collapse: dict[str, Any] | None
    learning: dict[str, Any] | None
    jobs: list[dict[str, Any]]
    logs: list[str]

    def __str__(self) -> str:
        return "\n".join(f"{name:<12} {text}" for name, text in rows(self))


def run(request: tools.StatusRequest) -> Status:
    """Do what `dino2 status` asks."""
    return read_status(request.run)


def read_status(run: Path) -> Status:
    """The status of the run in this folder.

    Raises:
        ConfigError: there is no run in it.
    """
    if not any((run / name).exists() for name in ("config.yaml", "logs", "slurm", "checkpoints")):
        inside = [str(path.parent) for path in sorted(run.glob("*/config.yaml"))]
        hint = (
            f"There are runs in {', '.join(inside)}."
            if inside
            else "Name the folder given to dino2 train as --output-dir."
        )
        raise ConfigError(f"{run}: no run here", hint)
    processes, jobs = read_heartbeats(run), read_jobs(run)
    metrics = last_json_lines(run / "training_metrics.json", RECENT)
    total = processes[0]["total"] if processes else total_of(run)
    logged = int(metrics[-1]["iteration"]) + 1 if metrics else 0
    iteration = max([logged, newest_checkpoint(run), *(int(process["iteration"]) for process in processes)])
    # The last checkpoint is the last thing that a run writes, but for its sign of life: a kill may come between them.
    state = "finished" if total and newest_checkpoint(run) >= total else state_of(processes, jobs)
    silent = [process["rank"] for process in processes if process["age"] > STALE_S]
    iter_time, data_time = median_of(metrics, "iter_time"), median_of(metrics, "data_time")
    batch = metrics[-1].get("current_batch_size") if metrics else None
    losses = [line["total_loss"] for line in metrics if line.get("total_loss") is not None]
    restarts = read_restarts(run)
    waits = {process["rank"]: process["data_time"] for process in processes if process.get("data_time") is not None}
    slowest = max(waits, key=lambda rank: waits[rank]) if len(waits) > 1 else None
    left = (total - iteration) * iter_time if total and iter_time and state in ("training", "saving") else None
    return Status(
        run=str(run),
        state=state,
        iteration=iteration,
        total=total,
        checkpoint=newest_checkpoint(run),
        seconds_left=left,
        loss=statistics.fmean(losses) if losses else None,
        images_per_s=batch / iter_time if batch and iter_time else None,
        iter_time=iter_time,
        data_time=data_time,
        processes=processes,
        slowest=slowest,
        slowest_by=waits[slowest] - statistics.median(waits.values()) if slowest is not None else None,
        silent=silent if state in ("training", "saving", "hanging", "dead") else [],
        restarts=sum(each.kind != "requeue" for each in restarts),
        requeues=sum(each.kind == "requeue" for each in restarts),
        last_restart=restarts[-1].reason if restarts else None,
        hangs=[str(path) for path in sorted((run / "logs").glob("stacks*/rank_*.txt"))],
        collapse=found._asdict() if (found := collapse_of(run)) else None,
        learning=judged.as_dict() if (judged := judge(run)) else None,
        jobs=jobs,
        logs=[str(path) for path in [run / "logs" / "train.log"] if path.exists()] + [job["log"] for job in jobs[-1:]],
    )


def state_of(processes: list[dict[str, Any]], jobs: list[dict[str, Any]]) -> str:
    """One word for the run."""
    waiting = any(job["slurm_state"] in ("PENDING", "CONFIGURING", "REQUEUED") for job in jobs)
    if not processes:
        return "waiting" if waiting else "not started"
    said: set[str] = {process["state"] for process in processes}
    if said == {"finished"}:
        return "finished"
    ended = {"finished", "interrupted", "failed"}
    if all(process["age"] > STALE_S or process["state"] in ended for process in processes):
        if waiting:
            return "waiting"
        return next((word for word in ("hanging", "failed", "interrupted") if word in said), "dead")
    return next(word for word in ("hanging", "failed", "saving", "training", *sorted(said)) if word in said)


def read_heartbeats(run: Path) -> list[dict[str, Any]]:
    """The signs of life of the run's present processes, by rank; those of an earlier, larger group are left out."""
    found: list[dict[str, Any]] = []
    for path in sorted((run / "logs" / "heartbeat").glob("rank_*.json")):
        with suppress(OSError, ValueError):  # replaced or cut short at this very moment
            found.append(json.loads(path.read_text()))
    now, newest = time.time(), max(found, key=lambda beat: float(beat["time"]), default={})
    return [{**beat, "age": max(0.0, now - beat["time"])} for beat in found if beat["rank"] < newest["world_size"]]


def median_of(metrics: list[dict[str, Any]], key: str) -> float | None:
    values = [line[key] for line in metrics if line.get(key) is not None]
    return statistics.median(values) if values else None


def total_of(run: Path) -> int | None:
    """Iterations of the run by its config."""
    if not (run / "config.yaml").exists():
        return None
    from dinov2cli.config import load_config

    return load_config(config_file=run / "config.yaml").iterations()


def read_jobs(run: Path) -> list[dict[str, Any]]:
    """The training jobs submitted for the run, the newest last."""
    found = []
    for path in sorted((run / "slurm").glob("*/job.json")):
        facts = json.loads(path.read_text())
        if facts["command"][0] == "train":
            log = str(path.with_name(f"{facts['job_id']}_0_log.out"))
            found.append({**facts, "log": log, "slurm_state": None})
    if found:
        found[-1]["slurm_state"] = slurm_state(found[-1]["job_id"])
    return found


def slurm_state(job_id: str) -> str | None:
    """What Slurm says of a job, None if it (or its commands) cannot be asked."""
    asking = {"squeue": ["-h", "-j", job_id, "-o", "%T"], "sacct": ["-X", "-n", "-P", "-j", job_id, "-o", "State"]}
    for program, arguments in asking.items():
        with suppress(FileNotFoundError, subprocess.TimeoutExpired):
            answer = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=20)
            if answer.returncode == 0 and answer.stdout.strip():
                return answer.stdout.split()[0]
    return None


def rows(now: Status) -> list[tuple[str, str]]:
    """Lines to print, as (name, text); what is not known is left out."""
    of = f" of {now.total} ({now.iteration / now.total:.0%})" if now.total else ""
    newest = f"newest checkpoint at {now.checkpoint}" if now.checkpoint else "no checkpoint yet"
    learning = Judgement.of(now.learning).lines() if now.learning is not None else []
    share = (now.data_time or 0) / now.iter_time if now.iter_time else 0.0
    hosts = sorted({process["host"] for process in now.processes})
    where = ", ".join(hosts[:4]) + (f" and {len(hosts) - 4} more" if len(hosts) > 4 else "")
    age = max((process["age"] for process in now.processes), default=0.0)
    times = [process["iter_time"] for process in now.processes if process.get("iter_time")]
    host_of = {process["rank"]: process["host"] for process in now.processes}
    found: list[tuple[str, Any]] = [
        ("run", f"{now.run}: {now.state}"),
        ("iteration", f"{now.iteration}{of}, {newest}"),
        ("left", now.seconds_left is not None and _duration(now.seconds_left)),
        ("loss", now.loss is not None and f"{now.loss:.4f}"),
        ("collapse", now.collapse is not None and str(Collapse(**now.collapse))),
        *zip(("learning", *[""] * len(learning)), learning, strict=False),
        ("speed", now.images_per_s is not None and f"{now.images_per_s:.1f} images/s, {now.iter_time:.3g} s an "
                  f"iteration, {share:.0%} of it waiting for data"),
        ("processes", now.processes and f"{len(host_of)} on {where}; all heard from within {_duration(age)}"),
        ("step times", times[1:] and f"{min(times):.3g} to {max(times):.3g} s between the processes"),
        ("slowest", now.slowest_by is not None and f"process {now.slowest} on {host_of[now.slowest]}: waits "
                    f"{now.slowest_by:.3g} s longer for its data than the median"),
        ("silent", now.silent and f"processes {', '.join(map(str, now.silent))}: no sign of life for over 90 s"),
        ("restarts", (now.restarts or now.requeues)
                     and f"{now.restarts}, and {now.requeues} requeues; last: {now.last_restart}"),
        *(("hang", f"stacks of a process that hung: {path}") for path in now.hangs[:4]),
        *(("job", f"{job['job_id']} on {counted(job['nodes'], 'machine')}: {job['slurm_state'] or 'unknown to Slurm'}")
          for job in now.jobs[-1:]),
        *(("log", path) for path in now.logs),
    ]  # fmt: skip
    return [(name, text) for name, text in found if text]


def _duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds + 0.5), 3600)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s" if rest >= 60 else f"{rest} s"
