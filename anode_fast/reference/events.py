"""A solve that ends where an event function changes its sign."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from anode_fast.errors import EventNotFound, MaxStepsExceeded
from anode_fast.problem import Problem
from anode_fast.reference.step import Step

Event = Callable[[float, Tensor], Tensor]


def solve_until_event(
    problem: Problem, event: Event, steps: Iterable[Step], max_steps: int
) -> tuple[float, Tensor]:
    """Solver time of the first sign change of `event`, and the states at the start and there.

    An event at the very start ends the solve there. Bisection on the step's interpolant locates the
    event within atol of time. A root that is touched, or passed twice within one step, is not seen.

    Returns:
        The event time, and [2, *state].

    Raises:
        EventNotFound: No sign change within `max_steps` steps.
    """
    t0, y0 = problem.times[0], problem.y0
    with torch.no_grad():
        positive = float(event(t0, y0))
    if positive == 0:
        return t0, torch.stack([y0, y0])
    sign, t, taken = math.copysign(1.0, positive), t0, 0
    try:
        for step in steps:
            taken += 1
            with torch.no_grad():
                value = float(event(step.interval.t1, step.y1))
            if value == 0 or math.copysign(1.0, value) != sign:
                t = _locate(event, step, sign, problem.atol)
                y = step.interpolate([t], [None])[0]
                return t, torch.stack([y0, y])
            t = step.interval.t1
            if taken >= max_steps:
                break
    except MaxStepsExceeded as error:
        raise _not_found(problem, t, taken) from error
    raise _not_found(problem, t, taken)


def _locate(event: Event, step: Step, sign: float, atol: float | Tensor) -> float:
    """Bisection on the step's interpolant, as torchdiffeq does it."""
    low, high = step.interval.t0, step.interval.t1
    tolerance = float(atol.min()) if isinstance(atol, Tensor) else atol
    tolerance = max(tolerance, math.ulp(max(abs(low), abs(high))))
    with torch.no_grad():
        for _ in range(max(math.ceil(math.log2((high - low) / tolerance)), 0)):
            middle = (low + high) / 2
            value = float(event(middle, step.interpolate([middle], [None])[0]))
            if value != 0 and math.copysign(1.0, value) == sign:
                low = middle
            else:
                high = middle
    return (low + high) / 2


def _not_found(problem: Problem, t: float, taken: int) -> EventNotFound:
    start, end = problem.field.user_time(problem.times[0]), problem.field.user_time(t)
    return EventNotFound(
        f"no event found between t={start:.9g} and t={end:.9g} in {taken} steps: event_fn did not "
        "change sign there. Check that this trajectory has the event, and the direction of time, "
        "or raise options['max_num_steps']."
    )
