"""Chaos: a small training that is killed, stopped, starved and robbed of its files, and what must hold; a program.

    python tests/chaos.py --minutes 60 --seed 1          # one history after the other, on this machine
    python tests/chaos.py --seed 1 --history 7           # that history again
    python tests/chaos.py --slurm CLUSTER --minutes 20   # as jobs on the cluster of tests/slurm/cluster_up.sh CLUSTER

A history is one run in one folder, from its first start to its end, with faults on the way. Which faults, after how
many iterations, at which process and with what delay is a function of (seed, history); it is printed before it is
played. The step of the training in which a fault lands is the machine's. `chaos_faults.py` has the faults, each with
what must come of it, `chaos_slurm.py` those of jobs, and `chaos_history.py` what must hold after each:

- every line of the metrics equals that of the undisturbed run to the last bit, none is lost, none is there twice. From
  where images could not be read or were replaced, or the number of processes was another, the mean `total_loss` of 20
  iterations is within BOUND of it, and iteration, schedules and batch are equal;
- what has a final name is whole: checkpoints by their checksums, teachers, configuration, heartbeats, JSON lines;
- nothing runs any more that the training has started, and its last message is one that a person can read;
- at the end: the undisturbed run's teacher and scores, to the last bit, and nothing left aside.
"""

import argparse
import collections
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from chaos_faults import FAULTS, LEFT_OUT
from chaos_history import BOUND, IMAGES, History, Violation
from chaos_jobs import SlurmHistory
from chaos_slurm import SLURM_FAULTS
from tiny_run import write_images


def plan_of(seed: int, number: int, kinds: list[str], faults: int) -> list[tuple[str, int, str]]:
    """(kind, iterations before it, its own seed) of each fault of a history; all kinds come in turn, in any order."""
    rng, plan = random.Random(f"{seed}/{number}/plan"), []
    for fault in range(number * faults, (number + 1) * faults):
        turn, place = divmod(fault, len(kinds))
        kind = random.Random(f"{seed}/kinds/{turn}").sample(kinds, len(kinds))[place]
        plan.append((kind, rng.choice((0, 1, 3, 7, 12, 20)), f"{seed}/{number}/{fault}"))
    return plan


def play(
    history: History,
    plan: list[tuple[str, int, str]],
    faults: Mapping[str, Callable[[Any], str]],
    until: float,
    counts: dict[str, int],
) -> None:
    for number, (kind, advance, seed) in enumerate(plan):
        if time.monotonic() > until or history.is_done():
            break
        history.rng = random.Random(seed)
        if history.life is None:
            history.start()
        history.advance(advance)
        if history.ended() or history.is_done():
            break
        time.sleep(history.rng.random() * 0.1)
        at, began = history.lines(), time.monotonic()
        try:
            outcome = faults[kind](history)
        except Violation as violation:
            raise Violation(f"fault {number}, {kind} after iteration {at}: {violation}") from violation
        history.check()
        counts[kind] = counts.get(kind, 0) + (outcome != LEFT_OUT)
        print(f"    {number} {kind} after iteration {at}: {outcome} ({time.monotonic() - began:.0f} s)", flush=True)
    history.finish()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--faults", type=int, help="of a history; by default 10, of jobs, to which more happens a minute, 4"
    )
    parser.add_argument("--kinds", nargs="+", choices=[*{**FAULTS, **SLURM_FAULTS}])
    parser.add_argument("--history", type=int, help="play this one alone")
    parser.add_argument("--slurm", type=Path, metavar="CLUSTER", help="state folder of a cluster")
    parser.add_argument("--place", type=Path, help="where to work; what was found stays there")
    given = parser.parse_args()
    place = given.place or Path(tempfile.mkdtemp(prefix="dino2-chaos-"))
    place.mkdir(parents=True, exist_ok=True)
    faults: Mapping[str, Callable[[Any], str]] = SLURM_FAULTS if given.slurm else FAULTS
    kinds = given.kinds or list(faults)
    make = partial(SlurmHistory, cluster=given.slurm.resolve()) if given.slurm else History
    in_one = given.faults or (4 if given.slurm else 10)
    began = time.monotonic()
    until = began + given.minutes * 60
    write_images(place / "data", per_class=IMAGES // 2)
    with History(place, "whole", place / "run") as first:
        first.data, first.run = place / "data", place / "run"
        first.start()
        first.ends({0})
    counts: dict[str, int] = {}
    total: collections.Counter[str] = collections.Counter()
    violations: list[str] = []
    deviation = 0.0
    number = given.history or 0
    while time.monotonic() < until and (given.history is None or number == given.history):
        with suppress(Violation), make(place, f"{given.seed}/{number}", place / "run") as history:
            plan = plan_of(given.seed, number, kinds, in_one)
            shown = ", ".join(f"+{advance} {kind}" for kind, advance, _ in plan)
            print(f"seed {given.seed} history {number} ({time.monotonic() - began:.0f} s): {shown}", flush=True)
            try:
                play(history, plan, faults, until, counts)
            except Violation as violation:
                violations.append(f"history {number}: {violation} (see {history.folder})\n{history.said()[-3000:]}")
                print(f"VIOLATION {violations[-1]}", flush=True)
                raise
            done = {"histories": 1, "starts": len(history.logs), "exact": history.exact, "bounded": history.bounded}
            total += collections.Counter(done)
            deviation = max(deviation, history.deviation)
        number += 1
    print(f"\nseed {given.seed}: {total['histories']} histories in {(time.monotonic() - began) / 60:.0f} minutes, "
          f"{sum(counts.values())} faults, {total['starts']} starts; lines equal {total['exact']}, within "
          f"{BOUND:.0%} {total['bounded']} (most {deviation:.1%})")  # fmt: skip
    for kind in sorted(counts):
        print(f"{kind:24} {counts[kind]}")
    missing = [kind for kind in kinds if not counts.get(kind)]
    print(f"not played: {', '.join(missing) or 'none'}")
    print(f"{len(violations)} violations")
    for text in violations:
        print(f"  {text}")
    if not violations and given.place is None:
        shutil.rmtree(place, ignore_errors=True)
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
