"""Explicit Runge-Kutta methods: fixed steps, adaptive steps, and adaptive steps per row.

Sources: Hairer, Norsett, Wanner, Solving ODEs I, 2nd ed., II.1 and II.4. The rules for steps, jumps
and errors are torchdiffeq 0.2.5's, so that it takes the same steps.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anode_fast import failures
from anode_fast.controller import Controller, first_guess, initial_step
from anode_fast.errors import NonDeterministicField
from anode_fast.problem import DEFAULT_MAX_STEPS, Arithmetic, Norm, Problem, number, underlying
from anode_fast.reference.step import GridStep, Interval, Recipe, Step, combine, moved
from anode_fast.stats import SolveStats
from anode_fast.tableau import ButcherTableau
from anode_fast.vector_field import HERE, NEXT, PREV, VectorField

MOST_NON_FINITE_ATTEMPTS = 16
"""Attempts that gave nan or inf, none of them passed, after which the solve gives up."""

REJECTIONS_BEFORE_DOUBT = 8
"""Rejections in a row after which two evaluations tell whether the field is deterministic."""


class PlainArithmetic:
    """Steps by PyTorch operations: on any device, in any dtype, differentiable."""

    def stages(
        self,
        tableau: ButcherTableau,
        field: VectorField,
        interval: Interval,
        y: Tensor,
        f0: Tensor | None,
        sides: tuple[int, int],
    ) -> tuple[Tensor, list[Tensor]]:
        """The solution at the end of a step and its stage derivatives, the first unless given."""
        h = interval.h
        if f0 is None:
            f0 = field(interval.t0, y, interval.shift0, sides[0])
        ks = [f0]
        stage = y
        for c, row in zip(tableau.c_float[1:], tableau.a_float[1:], strict=True):
            stage = combine(y, ks, row, h)
            t, shift = interval.at(c)
            ks.append(field(t, stage, shift, sides[1] if c == 1 else HERE))
        if tableau.solution_is_last_stage:
            return stage, ks
        return combine(y, ks, tableau.b_float, h), ks

    def combine(
        self, y: Tensor | None, ks: Sequence[Tensor], weights: Sequence[Any], h: Any
    ) -> Tensor:
        """Returns y + h * sum_j weights[j] * ks[j]; y=None: the sum alone."""
        return combine(y, ks, weights, h)

    def scaled_norm(
        self,
        y0: Tensor,
        y1: Tensor,
        ks: Sequence[Tensor],
        weights: Sequence[float],
        h: Any,
        tolerances: tuple[float | Tensor, float | Tensor],
        norm: Norm,
    ) -> float:
        """Norm of h * sum_j weights[j] * ks[j] over the tolerance atol + rtol * max(|y0|, |y1|)."""
        return number(norm(scaled(combine(None, ks, weights, h), y0, y1, *tolerances)))


PLAIN = PlainArithmetic()


def scaled(x: Tensor, y0: Tensor, y1: Tensor, rtol: float | Tensor, atol: float | Tensor) -> Tensor:
    """Divides x by the tolerance atol + rtol * max(|y0|, |y1|), entry by entry."""
    size = y0.abs() if y0 is y1 else torch.maximum(y0.abs(), y1.abs())
    return x / size.mul_(rtol).add_(atol)


# --- fixed steps ----------------------------------------------------------------------------------


@dataclass
class FixedRecipe:
    """One step of a fixed-step method, evaluating its first stage unless it is given."""

    field: VectorField
    tableau: ButcherTableau
    linear: bool
    perturb: bool
    arithmetic: Arithmetic = PLAIN

    @property
    def sides(self) -> tuple[int, int]:
        """Sides of a step's ends on which its stages are evaluated."""
        return (NEXT, PREV) if self.perturb else (HERE, HERE)

    def __call__(self, interval: Interval, y: Tensor, f0: Tensor | None) -> GridStep:
        y1, ks = self.stages(interval, y, f0)
        return GridStep(
            self.field, interval, y, y1, f0, self.linear, self.perturb, self, slope0=ks[0]
        )

    def stages(
        self, interval: Interval, y: Tensor, f0: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """The solution at the end of the step and its stage derivatives."""
        return self.arithmetic.stages(self.tableau, self.field, interval, y, f0, self.sides)


def grid_steps(
    problem: Problem,
    recipe: Callable[[Interval, Tensor, Tensor | None], GridStep],
    grid: Iterable[tuple[float, Tensor | None]],
    stats: SolveStats,
    f0: Tensor | None = None,
) -> Iterator[GridStep]:
    """Steps from each grid point to the next. No host synchronisation."""
    on_step = problem.callback("callback_step")
    y = problem.y0
    for (t0, shift0), (t1, shift1) in pairwise(grid):
        if on_step:
            on_step(t0, y, t1 - t0)
        step = recipe(Interval(t0, t1, shift0, shift1), y, f0)
        stats.accepted += 1
        yield step
        y, f0 = step.y1, None if step.perturb else step.f1


def solution_on_grid(
    problem: Problem,
    recipe: FixedRecipe,
    grid: Iterable[tuple[float, Tensor | None]],
    stats: SolveStats,
    f0: Tensor | None = None,
) -> Tensor:
    """What `grid_steps` lead to if every output time is a grid point, and no shifts are."""
    on_step = problem.callback("callback_step")
    y, times = problem.y0, problem.times
    outputs = [y]
    for (t0, _), (t1, _) in pairwise(grid):
        if on_step:
            on_step(t0, y, t1 - t0)
        y, _ = recipe.stages(Interval(t0, t1), y, f0)
        f0 = None
        stats.accepted += 1
        if t1 == times[len(outputs)]:
            outputs.append(y)
    return torch.stack(outputs)


# --- adaptive steps -------------------------------------------------------------------------------


@dataclass
class AdaptiveStep:
    """A step of an adaptive method with the quartic interpolant of its tableau."""

    tableau: ButcherTableau
    interval: Interval
    y0: Tensor
    y1: Tensor
    f0: Tensor
    f1: Tensor
    ks: list[Tensor]
    recipe: Recipe
    arithmetic: Arithmetic = PLAIN

    def interpolate(self, times: Sequence[float], shifts: Sequence[Tensor | None]) -> Tensor:
        """The solution at `times`, [len(times), *state]. Many times cost one matrix product."""
        h = self.interval.h
        if len(times) <= 2 or isinstance(h, Tensor) or any(s is not None for s in shifts):
            points = [
                self.arithmetic.combine(
                    self.y0, self.ks, self._weights(self.interval.fraction(t, s)), h
                )
                for t, s in zip(times, shifts, strict=True)
            ]
            return torch.stack(points)
        rows = [
            [h * float(w) for w in self._weights(self.interval.fraction(t, None))] for t in times
        ]
        weights = torch.tensor(rows, dtype=self.y0.dtype, device=self.y0.device)
        changes: Tensor = torch.tensordot(weights, torch.stack(self.ks), dims=1)
        return self.y0 + changes

    def _weights(self, x: float | Tensor) -> list[float | Tensor]:
        return [
            x * (p + x * (q + x * (r + x * s))) for p, q, r, s in self.tableau.interpolant_float
        ]

    def error_ratio(self, tolerances: tuple[float | Tensor, float | Tensor], norm: Norm) -> float:
        """Norm of the estimate of the local error over the tolerance."""
        return self.arithmetic.scaled_norm(
            *(self.y0, self.y1, self.ks, self.tableau.b_err_float, self.interval.h),
            *(tolerances, norm),
        )


@dataclass
class AdaptiveRecipe:
    """One attempt of an adaptive method.

    As in torchdiffeq, the last stage is the next step's first, also for the two methods
    (adaptive_heun, fehlberg2) that do not evaluate it at the solution.
    """

    field: VectorField
    tableau: ButcherTableau
    arithmetic: Arithmetic = PLAIN
    ends_on_jump: bool = False

    def __call__(self, interval: Interval, y: Tensor, f0: Tensor | None) -> AdaptiveStep:
        arithmetic = self.arithmetic
        y1, ks = arithmetic.stages(self.tableau, self.field, interval, y, f0, (HERE, PREV))
        step = AdaptiveStep(self.tableau, interval, y, y1, ks[0], ks[-1], ks, self, arithmetic)
        return self.cross(step) if self.ends_on_jump else step

    def cross(self, step: AdaptiveStep) -> AdaptiveStep:
        """The same step, its end derivative taken from the far side of the jump at its end."""
        step.f1 = self.field(step.interval.t1, step.y1, step.interval.shift1, NEXT)
        step.recipe = replace(self, ends_on_jump=True)
        return step


def choose_initial_step(
    field: VectorField,
    t0: float,
    y0: Tensor,
    f0: Tensor,
    order: int,
    tolerances: tuple[float | Tensor, float | Tensor],
    norm: Norm,
    arithmetic: Arithmetic = PLAIN,
) -> float:
    """The first step to try; one evaluation of the field. Source: see `controller.first_guess`."""

    def size(*ks: Tensor) -> float:
        return arithmetic.scaled_norm(y0, y0, ks, (1.0, -1.0), 1.0, tolerances, norm)

    d1 = size(f0)
    h0 = first_guess(size(y0), d1)
    if not h0 > 0:  # f0 is not finite
        return math.nan
    f1 = field(t0 + h0, arithmetic.combine(y0, [f0], (1.0,), h0))
    return initial_step(h0, d1, size(f1, f0) / h0, order)


class Marks:
    """Times on which steps must end (`step_t`, `jump_t`), in increasing solver time."""

    def __init__(self, times: Sequence[float]) -> None:
        self._times = times
        self._next = 0

    def before(self, t0: float, t1: float) -> float | None:
        """The first mark in (t0, t1], if there is one."""
        while self._next < len(self._times) and self._times[self._next] <= t0:
            self._next += 1
        if self._next < len(self._times) and self._times[self._next] <= t1:
            return self._times[self._next]
        return None


def floor_tolerances(problem: Problem) -> tuple[float | Tensor, float | Tensor]:
    """The tolerances, raised to the roundoff of what the field computes in.

    Half precision states and autocast round every value of the field; asking for less than that
    makes the controller chase noise.
    """
    noise = problem.field.noise
    if not noise:
        return problem.rtol, problem.atol
    rtol, atol = (
        tolerance.clamp(min=noise) if isinstance(tolerance, Tensor) else max(tolerance, noise)
        for tolerance in (problem.rtol, problem.atol)
    )
    return rtol, atol


def controller_of(problem: Problem, tableau: ButcherTableau) -> Controller:
    """The controller with the problem's options."""
    names = ("safety", "ifactor", "dfactor", "min_step", "max_step")
    given = {name: problem.options[name] for name in names if name in problem.options}
    return Controller(tableau.order, **given)


def adaptive_steps(
    problem: Problem,
    tableau: ButcherTableau,
    t_end: float,
    stats: SolveStats,
    f0: Tensor | None = None,
    max_num_steps: int = DEFAULT_MAX_STEPS,
) -> Iterator[AdaptiveStep]:
    """Accepted steps from times[0] until one reaches t_end. One host synchronisation per attempt.

    Raises:
        StepSizeUnderflow, MaxStepsExceeded, NonFiniteState, NonDeterministicField.
    """
    options, field, norm = problem.options, problem.field, problem.norm
    controller = controller_of(problem, tableau)
    budget = int(options.get("max_num_steps", max_num_steps))
    rounded = _rounding(options.get("dtype", torch.float64), problem.y0.dtype)
    on_step, on_accept, on_reject = (
        problem.callback(f"callback_{name}") for name in ("step", "accept_step", "reject_step")
    )
    arithmetic = problem.arithmetic or PLAIN
    recipe = AdaptiveRecipe(field, tableau, arithmetic)
    t0, y = problem.times[0], problem.y0
    shift = problem.shifts[0] if problem.shifts else None
    if f0 is None:
        f0 = field(t0, y, shift, problem.start_side)
    tolerances = floor_tolerances(problem)
    with torch.no_grad():
        dt = options.get("first_step")
        if dt is None:
            dt = choose_initial_step(field, t0, y, f0, tableau.order, tolerances, norm, arithmetic)
    if not math.isfinite(dt):
        raise failures.non_finite(problem, t0, dt, 0, f0)
    dt = rounded(controller.clamp(dt))
    steps_end_on, jumps = Marks(options.get("step_t", ())), Marks(options.get("jump_t", ()))
    ratio, refused_in_a_row, doubted = 0.0, 0, False
    non_finite, non_finite_at = 0, t0
    while t0 < t_end:
        attempts = stats.accepted + stats.rejected
        if attempts >= budget:
            raise failures.max_steps(problem, budget, t0, dt, stats.accepted, stats.rejected)
        if on_step:
            on_step(t0, y, dt)
        t1 = rounded(t0 + dt)
        if not t1 > t0:
            if not math.isfinite(ratio):
                raise failures.non_finite(problem, t0, dt, attempts, f0)
            raise failures.underflow(problem, t0, dt, stats.accepted, stats.rejected, y)
        mark = steps_end_on.before(t0, t1)
        jump = jumps.before(t0, t1 if mark is None else mark)
        landing = mark if jump is None else jump
        if landing is not None:
            t1 = landing
            dt = rounded(t1 - t0)
        step = recipe(Interval(t0, t1, shift, None if landing is not None else shift), y, f0)
        with torch.no_grad():
            ratio = step.error_ratio(tolerances, norm)
        if controller.accepts(dt, ratio):
            stats.accepted += 1
            refused_in_a_row = 0
            if t1 >= non_finite_at:
                non_finite = 0
            if on_accept:
                on_accept(t0, y, dt)
            if jump is not None:
                step = recipe.cross(step)
            problem.suggested_step = dt = rounded(controller.next_step(dt, ratio))
            yield step
            t0, y, f0, shift = t1, step.y1, step.f1, step.interval.shift1
        else:
            stats.rejected += 1
            refused_in_a_row += 1
            if on_reject:
                on_reject(t0, y, dt)
            if not math.isfinite(ratio):
                non_finite, non_finite_at = non_finite + 1, t1
                if dt <= controller.min_step or non_finite == MOST_NON_FINITE_ATTEMPTS:
                    raise failures.non_finite(problem, t0, dt, attempts + 1, f0)
            dt = rounded(controller.next_step(dt, ratio))
            noisy = refused_in_a_row == REJECTIONS_BEFORE_DOUBT or stats.rejected == 64
            if noisy and not doubted and math.isfinite(ratio) and not problem.shared:
                doubted = True
                check_deterministic(field, t0, y)


def _rounding(dtype: torch.dtype, state_dtype: torch.dtype) -> Callable[[float], float]:
    if torch.float64 in (dtype, state_dtype.to_real()):
        return float
    return lambda t: float(np.float32(t))


def check_deterministic(field: VectorField, t: float, y: Tensor) -> None:
    """Two evaluations more, made only when many steps were refused."""
    with torch.no_grad():
        first, second = underlying(field(t, y)), underlying(field(t, y))
        scale = torch.maximum(first.abs(), second.abs()).max()
        # Threads may sum in another order; randomness (dropout) is far above that.
        if (first - second).abs().max() > 1e-4 * scale:
            raise NonDeterministicField(
                "the field is not deterministic: two evaluations at the same "
                f"t={field.user_time(t):.9g} and y differ, so no step meets the tolerance. "
                "Dropout or noise in the field? Put it in eval mode, or draw the noise once per "
                "solve."
            )


# --- adaptive steps, one step size per row --------------------------------------------------------


@dataclass(slots=True)
class RowInterval(Interval):
    """An interval per row, in float64. Rows that do not take this step have `accept` False.

    `low` and `high` bound the accepted rows' intervals on the host.
    """

    t0: Tensor  # type: ignore[assignment]
    t1: Tensor  # type: ignore[assignment]
    accept: Tensor | None = None
    low: float = math.inf
    high: float = -math.inf
    dtype: torch.dtype = torch.float32

    @property
    def h(self) -> Tensor:
        """Step sizes, [batch, 1, ...], in the state's real dtype."""
        return (self.t1 - self.t0).to(self.dtype)

    def inside(self, times: Sequence[float]) -> slice:
        """Which of the increasing `times` lie in some accepted row's interval."""
        return slice(max(bisect_right(times, self.low), 1), bisect_right(times, self.high))


@dataclass
class RowStep(AdaptiveStep):
    """A step that some rows take; the others stay where they are."""

    interval: RowInterval

    def interpolate(self, times: Sequence[float], shifts: Sequence[Tensor | None]) -> Tensor:
        """The solution at `times`, [len(times), *state], 0 for rows that lack the time."""
        return torch.stack([self._at(t, s) for t, s in zip(times, shifts, strict=True)])

    def _at(self, time: float, shift: Tensor | None) -> Tensor:
        at = self.interval
        here = at.accept & (at.t0 < time) & (time <= at.t1)  # type: ignore[operator]
        width = torch.where(here, at.t1 - at.t0, 1.0)
        x = torch.where(here, (time - at.t0) / width, 0.0)
        if shift is not None or at.shift0 is not None:
            x = x + moved(shift, at.shift0) / width
        value = combine(self.y0, self.ks, self._weights(x.to(at.dtype)), at.h)
        return torch.where(here, value, 0.0)


@dataclass
class RowRecipe:
    """One attempt of an adaptive method in which every row has its own interval."""

    field: VectorField
    tableau: ButcherTableau

    def __call__(self, interval: Interval, y: Tensor, f0: Tensor | None) -> RowStep:
        if f0 is None or not isinstance(interval, RowInterval):
            raise TypeError("a step by row needs intervals by row and the derivative at its start")
        y1, ks = PLAIN.stages(self.tableau, self.field, interval, y, f0, (HERE, PREV))
        step = RowStep(self.tableau, interval, y, y1, f0, ks[-1], ks, self)
        return step if interval.accept is None else self.keep(step, interval.accept)

    def keep(self, step: RowStep, accept: Tensor) -> RowStep:
        """The step taken by the rows in `accept` only."""
        step.y1 = torch.where(accept, step.y1, step.y0)
        step.f1 = torch.where(accept, step.f1, step.f0)
        return step


def row_times(t: float, y: Tensor) -> Tensor:
    """The time t for every row of y, [batch, 1, ...]."""
    return torch.full((y.shape[0],) + (1,) * (y.dim() - 1), t, dtype=torch.float64, device=y.device)


def solve_by_row(
    problem: Problem,
    tableau: ButcherTableau,
    stats: SolveStats,
    f0: Tensor | None = None,
    watch: Callable[[Step], None] | None = None,
) -> Tensor:
    """The solution at the output times, [times, batch, ...]; every row takes its own steps.

    The field gets t with one entry per row, [batch, 1, ...]. Rows that are done stay where they are
    and take part with a step of 0: as many evaluations as the row that needs most.

    Raises:
        StepSizeUnderflow, MaxStepsExceeded, NonFiniteState.
    """
    times = problem.times
    shifts: Sequence[Tensor | None] = problem.shifts or [None] * len(times)
    outputs = [torch.zeros_like(problem.y0)] * len(times)
    outputs[0] = problem.y0
    for step in row_steps(problem, tableau, stats, f0):
        if watch:
            watch(step)
        inside = step.interval.inside(times)
        if inside.start < inside.stop:
            block = step.interpolate(times[inside], shifts[inside])
            outputs[inside] = [a + b for a, b in zip(outputs[inside], block, strict=True)]
    return torch.stack(outputs)


def row_steps(
    problem: Problem, tableau: ButcherTableau, stats: SolveStats, f0: Tensor | None
) -> Iterator[RowStep]:
    """Steps that at least one row accepts, until every row has reached the last output time."""
    field, controller = problem.field, controller_of(problem, tableau)
    budget = int(problem.options.get("max_num_steps", DEFAULT_MAX_STEPS))
    recipe = RowRecipe(field, tableau)
    y, t_end = problem.y0, problem.times[-1]
    dtype = y.dtype.to_real() if y.is_complex() else y.dtype
    shift = problem.shifts[0] if problem.shifts else None
    t = row_times(problem.times[0], y)
    f = field(t, y, shift) if f0 is None else f0
    rtol, atol = floor_tolerances(problem)
    with torch.no_grad():
        if "first_step" in problem.options:
            dt = torch.full_like(t, problem.options["first_step"])
        else:
            dt = _initial_step_by_row(field, t, y, f, tableau.order, rtol, atol)
        dt = dt.clamp(controller.min_step, controller.max_step)
    accepted, rejected = (torch.zeros(t.shape, dtype=torch.int64, device=y.device) for _ in "ab")
    ratio, running = torch.zeros_like(t), t < t_end
    while running.any():
        if int((accepted + rejected).max()) >= budget:
            rows = int(running.sum())
            raise failures.max_steps_of_rows(problem, budget, rows, float(t.min()))
        stuck = ~(t + dt > t) | (~ratio.isfinite() & (dt <= controller.min_step))
        if (running & stuck).any():
            stuck = (running & stuck).flatten()
            row = int(stuck.nonzero()[0])
            size = float(dt.flatten()[row])
            finite = math.isfinite(size + float(ratio.flatten()[row]))
            finite = finite and bool(torch.isfinite(f[row].detach()).all())
            at = float(t.flatten()[row])
            raise failures.stuck_rows(problem, row, int(stuck.sum()), at, size, finite)
        t1 = torch.where(running, t + dt, t)
        step = recipe(RowInterval(t, t1, shift, shift, dtype=dtype), y, f)
        with torch.no_grad():
            error = combine(None, step.ks, tableau.b_err_float, step.interval.h)
            error = scaled(error, step.y0, step.y1, rtol, atol)
            ratio = _rms_by_row(error).reshape(t.shape).double()
            fits = (ratio <= 1) | ((dt <= controller.min_step) & ratio.isfinite())
            accept = running & fits
            accepted += accept
            rejected += running & ~fits
            dt = torch.where(running, controller.next_step_rows(dt, ratio), dt)
        if not accept.any():
            continue
        low = float(torch.where(accept, t, math.inf).min())
        high = float(torch.where(accept, t1, -math.inf).max())
        step.interval = replace(step.interval, accept=accept, low=low, high=high)
        step = recipe.keep(step, accept)
        stats.accepted, stats.rejected = int(accepted.max()), int(rejected.max())
        yield step
        y, f, t = step.y1, step.f1, torch.where(accept, t1, t)
        running = t < t_end


def _rms_by_row(x: Tensor) -> Tensor:
    x = x.detach()  # forward-mode derivatives too take step sizes as constants
    flat = x.flatten(1) if x.dim() > 1 else x[:, None]
    norms: Tensor = torch.linalg.vector_norm(flat, dim=1)
    return norms / math.sqrt(max(flat.shape[1], 1))


def _initial_step_by_row(
    field: VectorField,
    t: Tensor,
    y: Tensor,
    f: Tensor,
    order: int,
    rtol: float | Tensor,
    atol: float | Tensor,
) -> Tensor:
    """`choose_initial_step` for each row, [batch, 1, ...] in float64."""
    scale = y.abs().mul_(rtol).add_(atol)

    def norm(x: Tensor) -> Tensor:
        return _rms_by_row(x).reshape(t.shape).double()

    d0, d1 = norm(y / scale), norm(f / scale)
    h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1)
    f1 = field(t + h0, y + (h0 * f).to(y.dtype))
    d2 = norm((f1 - f) / scale) / h0
    largest = torch.maximum(d1, d2)
    h1 = torch.where(
        largest <= 1e-15, (h0 * 1e-3).clamp(min=1e-6), (0.01 / largest) ** (1.0 / order)
    )
    return torch.minimum(100 * h0, h1)
