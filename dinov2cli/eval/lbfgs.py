"""L-BFGS for many independent problems at once: every step evaluates all of them in one call.

Shapes: P problems, n unknowns of each, m remembered steps.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

ARMIJO, WOLFE = 1e-4, 0.9  # Nocedal and Wright, "Numerical Optimization", section 3.1
MAX_TRIALS = 30

Objective = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(points [P', n], which problems int64 [P']) -> (values [P'], gradients [P', n])."""


class Memory(NamedTuple):
    """The last m steps of every problem: what is known of its curvature."""

    steps: Tensor  # [P, m, n] latest last
    changes: Tensor  # [P, m, n] of the gradient along `steps`
    rho: Tensor  # [P, m] 1 / (step . change); 0 where nothing is remembered yet

    @staticmethod
    def of(points: Tensor, memory: "int | Memory") -> "Memory":
        """An empty one of that many steps for the problems at `points` [P, n], or the given one."""
        if isinstance(memory, Memory):
            return memory
        nothing = points.new_zeros(len(points), memory, points.shape[1])
        return Memory(nothing, nothing.clone(), points.new_zeros(len(points), memory))


class Solution(NamedTuple):
    """Minima of all problems."""

    points: Tensor  # [P, n]
    values: Tensor  # [P]
    iterations: Tensor  # int64 [P], accepted steps
    memory: Memory


class _Run(NamedTuple):
    """The problems still being solved: a point and direction each, the bracket of its step, what it remembers."""

    which: Tensor  # int64 [P]
    point: Tensor  # [P, n]
    value: Tensor  # [P]
    gradient: Tensor  # [P, n]
    direction: Tensor  # [P, n]
    slope: Tensor  # [P] gradient . direction
    step: Tensor  # [P]
    low: Tensor  # [P] longest step known to be too short
    high: Tensor  # [P] shortest step known to be too long
    trials: Tensor  # int64 [P]
    iterations: Tensor  # int64 [P]
    steps: Tensor  # [P, m, n] latest last
    changes: Tensor  # [P, m, n] of the gradient along `steps`
    rho: Tensor  # [P, m] 1 / (step . change); 0 where nothing is remembered yet

    def keep(self, mask: Tensor) -> "_Run":
        return _Run(*(field[mask] for field in self))


@torch.no_grad()
def minimise(
    objective: Objective,
    start: Tensor,
    inverse_hessian: Tensor,
    *,
    max_iter: int | Tensor = 1000,
    tol: float = 1e-12,
    ftol: float = 1e-14,
    rounding: float = 1e-15,
    memory: int | Memory = 10,
) -> Solution:
    """Minimise P smooth convex functions side by side.

    Each problem has its own step length and its own memory, and none waits for another: in every call of `objective`
    one problem may try a shorter step while the next already goes in a new direction. Solved problems drop out.

    Args:
        start: [P, n].
        inverse_hessian: [P, n], positive: a rough diagonal of it, which is refined from the steps taken.
        max_iter: steps for each problem, or int64 [P].
        tol: a problem is solved once no component of its gradient is above this,
        ftol: or once a step lowers its value by less than this, relative to it.
        rounding: relative error of the objective's values. Differences below it decide nothing; slopes do.
        memory: steps to remember, or the memory of an earlier solution of nearly the same functions.
    """
    P = len(start)
    memory = Memory.of(start, memory)
    run = _begin(objective, start, inverse_hessian, memory)
    remembered = Memory(*(tensor.clone() for tensor in memory))
    answer = Solution(start.clone(), start.new_zeros(P), torch.zeros_like(run.which), remembered)
    budget = torch.as_tensor(max_iter, device=start.device).expand(P)
    while len(run.which):
        trial = run.point + run.step[:, None] * run.direction
        value, gradient = objective(trial, run.which)
        slope = (gradient * run.direction).sum(1)
        noise = rounding * run.value.abs()
        too_long = ~(value <= run.value + ARMIJO * run.step * run.slope + noise)  # also when the value is not finite
        too_short = ~too_long & (slope < WOLFE * run.slope)
        exhausted = run.trials + 1 >= MAX_TRIALS
        accepted = ~(too_long | too_short)
        lowered = run.value - value
        run = _narrow(run, too_long, too_short)
        run = _advance(run, accepted, trial, value, gradient, inverse_hessian)
        solved = accepted & (
            (gradient.abs().amax(1) <= tol)
            | (lowered <= ftol * run.value.abs())
            | (run.iterations >= budget[run.which])
        )
        done = solved | (exhausted & ~accepted)
        if done.any():
            found = answer.points, answer.values, answer.iterations, *answer.memory
            latest = run.point, run.value, run.iterations, run.steps, run.changes, run.rho
            for kept, tensor in zip(found, latest, strict=True):
                kept[run.which[done]] = tensor[done]
            run, inverse_hessian = run.keep(~done), inverse_hessian[~done]
    return answer


def _begin(objective: Objective, start: Tensor, inverse_hessian: Tensor, memory: Memory) -> _Run:
    which = torch.arange(len(start), device=start.device)
    value, gradient = objective(start, which)
    steps, changes, rho = (tensor.clone() for tensor in memory)
    direction = -_inverse_hessian_times(gradient, steps, changes, rho, inverse_hessian)
    slope = (gradient * direction).sum(1)
    zeros, count = torch.zeros_like(value), torch.zeros_like(which)
    return _Run(
        which, start.clone(), value, gradient, direction, slope, zeros + 1, zeros.clone(), zeros + torch.inf,
        count, count.clone(), steps, changes, rho,
    )  # fmt: skip


def _narrow(run: _Run, too_long: Tensor, too_short: Tensor) -> _Run:
    """Bracket the step of the problems whose trial was refused, and choose the next one inside."""
    low = torch.where(too_short, run.step, run.low)
    high = torch.where(too_long, run.step, run.high)
    inside = torch.where(high.isinf(), 2 * run.step, (low + high) / 2)
    refused = too_long | too_short
    return run._replace(
        low=low, high=high, step=torch.where(refused, inside, run.step), trials=run.trials + refused.long()
    )


def _advance(
    run: _Run, accepted: Tensor, point: Tensor, value: Tensor, gradient: Tensor, inverse_hessian: Tensor
) -> _Run:
    """Move the problems whose trial was accepted, remember their step, and give them a new direction."""
    if not accepted.any():
        return run
    at = accepted.nonzero()[:, 0]
    step, change = point[at] - run.point[at], gradient[at] - run.gradient[at]
    curvature = (step * change).sum(1)
    kept = curvature > 0  # rounding can hide the curvature of a convex function at its minimum
    remembered = at[kept]
    for history, newest in ((run.steps, step[kept]), (run.changes, change[kept]), (run.rho, 1 / curvature[kept])):
        history[remembered] = torch.cat((history[remembered, 1:], newest[:, None]), 1)
    run.point[at], run.value[at], run.gradient[at] = point[at], value[at], gradient[at]
    direction = -_inverse_hessian_times(gradient[at], run.steps[at], run.changes[at], run.rho[at], inverse_hessian[at])
    run.direction[at] = direction
    run.slope[at] = (gradient[at] * direction).sum(1)
    run.step[at], run.low[at], run.high[at], run.trials[at] = 1, 0, torch.inf, 0
    run.iterations[at] += 1
    return run


def _inverse_hessian_times(q: Tensor, steps: Tensor, changes: Tensor, rho: Tensor, diagonal: Tensor) -> Tensor:
    """The two-loop recursion (Nocedal and Wright, algorithm 7.4) for every problem. q: [P, n] -> [P, n]."""
    past = [(steps[:, i], changes[:, i], rho[:, i]) for i in range(steps.shape[1])]
    alphas = []
    for step, change, r in reversed(past):
        alpha = r * (step * q).sum(1)
        q = q - alpha[:, None] * change
        alphas.append(alpha)
    newest = changes[:, -1]
    scale = 1 / (rho[:, -1] * (newest * diagonal * newest).sum(1))
    q = torch.where(rho[:, -1] > 0, scale, 1.0)[:, None] * diagonal * q
    for (step, change, r), alpha in zip(past, reversed(alphas), strict=True):
        beta = r * (change * q).sum(1)
        q = q + (alpha - beta)[:, None] * step
    return q
