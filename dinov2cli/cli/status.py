"""`dino2 status`: how a run is doing."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dinov2cli.launch.status import Status


def status(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Show how far a run is, how fast, and whether all its processes are well.

    It reads the run folder, from any machine that sees it, and asks Slurm where the run was submitted. "Slowest" is the
    process that waits longest for its own data: the others wait for it in every iteration.

    Example:

        dino2 status runs/demo
    """
    from dinov2cli.console import out, print_json
    from dinov2cli.launch.status import read_status

    now = read_status(run)
    if as_json:
        print_json(now.as_dict())
        return
    for name, text in rows(now):
        out.print(f"{name:<12} {text}", markup=False, highlight=False, soft_wrap=True)


def rows(now: "Status") -> list[tuple[str, str]]:
    """Lines to print, as (name, text); what is not known is left out."""
    of = f" of {now.total}" if now.total else ""
    done = f" ({now.iteration / now.total:.0%})" if now.total else ""
    found = [
        ("run", f"{now.run}: {now.state}"),
        ("iteration", f"{now.iteration}{of}{done}, newest checkpoint at {now.checkpoint or 'none yet'}"),
    ]
    if now.seconds_left is not None:
        found.append(("left", _duration(now.seconds_left)))
    if now.loss is not None:
        found.append(("loss", f"{now.loss:.4f}"))
    if now.images_per_s is not None and now.iter_time:
        share = (now.data_time or 0) / now.iter_time
        speed = f"{now.images_per_s:.1f} images/s, {now.iter_time:.3g} s an iteration"
        found.append(("speed", f"{speed}, {share:.0%} of it waiting for data"))
    if now.processes:
        hosts = sorted({process["host"] for process in now.processes})
        where = ", ".join(hosts[:4]) + (f" and {len(hosts) - 4} more" if len(hosts) > 4 else "")
        age = max(process["age"] for process in now.processes)
        found.append(("processes", f"{len(now.processes)} on {where}; all heard from within {_duration(age)}"))
    times = [process["iter_time"] for process in now.processes if process.get("iter_time")]
    if len(times) > 1:
        found.append(("step times", f"{min(times):.3g} to {max(times):.3g} s between the processes"))
    if now.slowest is not None and now.slowest_by is not None:
        host = next(process["host"] for process in now.processes if process["rank"] == now.slowest)
        much = f"waits {now.slowest_by:.3g} s longer for its data than the median"
        found.append(("slowest", f"process {now.slowest} on {host}: {much}"))
    if now.silent:
        found.append(("silent", "processes " + ", ".join(map(str, now.silent)) + ": no sign of life for over 90 s"))
    if now.restarts or now.requeues:
        found.append(("restarts", f"{now.restarts}, and {now.requeues} requeues; last: {now.last_restart}"))
    found += [("hang", f"stacks of a process that hung: {path}") for path in now.hangs[:4]]
    for job in now.jobs[-1:]:
        found.append(("job", f"{job['job_id']} on {job['nodes']} machines: {job['slurm_state'] or 'unknown to Slurm'}"))
    found += [("log", path) for path in now.logs]
    return found


def _duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds + 0.5), 3600)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s" if rest >= 60 else f"{rest} s"
