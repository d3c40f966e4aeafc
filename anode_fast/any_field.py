"""Solves of any field on a GPU: PyTorch evaluates it, Triton does all between the evaluations.

A solver as reference.solve is one, without a graph through the solve. Step sizes are chosen on the
device, so the host queues evaluations that turn out not to be needed; their values have no effect,
and what a module counts is set right.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from anode_fast import fused, reference
from anode_fast.kernels import gpu
from anode_fast.problem import ADAPTIVE, FIXED, Problem
from anode_fast.reference.runge_kutta import AdaptiveRecipe, check_deterministic
from anode_fast.reference.step import Interval, Recipe, Step
from anode_fast.stats import SolveStats, Status
from anode_fast.tableau import TABLEAUS


def why_not(problem: Problem) -> str:
    """Why this cannot solve a problem without a graph; "" if it can."""
    func, y0 = problem.original, problem.y0
    if absent := gpu.missing() or gpu.why_not_on(y0.device):
        return str(absent)
    if problem.family not in (FIXED, ADAPTIVE):
        return f"{problem.method} is no explicit Runge-Kutta method"
    if problem.event_fn is not None:
        return "it searches for an event"
    if problem.layout is not None:
        return "the state is a tuple"
    if y0.dtype not in (torch.float32, torch.float64) or problem.state_dtype != y0.dtype:
        return f"the state is {problem.state_dtype}, want float32 or float64"
    if y0.is_cuda and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured"
    if type(y0) not in (Tensor, nn.Parameter) or y0.numel() >= 2**31:
        return "the state is no plain tensor of less than 2**31 entries"
    if len(problem.times) == 1:
        return "there is nothing to solve"
    if why := fused.why_not_steps(problem):
        return why
    if isinstance(func, nn.Module) and _notes_evaluations(func):
        return "the field has buffers and is in training mode: more evaluations would change them"
    return fused.why_not_now(y0.device.type)


def _notes_evaluations(func: nn.Module) -> bool:
    return any(
        module.training and next(module.buffers(recurse=False), None) is not None
        for module in func.modules()
    )


def solve(
    problem: Problem,
    stats: SolveStats,
    *,
    f0: Tensor | None = None,
    watch: Callable[[Any], None] | None = None,
) -> Tensor:
    """The solution at the output times, [times, *state].

    Leaves to the reference what it cannot do, and all that wants a graph: the other solves that a
    gradient takes.

    Args:
        problem: What to solve.
        stats: Gets the counts.
        f0: The derivative at the start, if it is known: it is not evaluated again.
        watch: Called with every accepted step, after the last one.

    Raises:
        SolverError: The solve cannot go on.

    One wait for the device at the end, and none for fixed steps (on a GPU, where a solution that is
    not finite is not an error).
    """
    if torch.is_grad_enabled() or why_not(problem):
        return reference.solve(problem, stats, f0=f0, watch=watch)
    made = _solver(problem)
    y0 = fused.dense(problem.y0.detach())
    grid = [point for point, _ in problem.grid()] if problem.family == FIXED else []
    counters = _Counters(problem)
    solution: Tensor
    solution, result, kept = made.forward(
        *(counters.evaluate, y0, problem.times, grid),
        keep=watch is not None,
        f0=f0,
        may_capture=counters.may_capture if counters.can_be_captured else None,
        doubt=counters.check_deterministic,
    )
    counters.settle(result.nfe - (f0 is not None))
    stats.nfe, stats.accepted, stats.rejected = result.nfe, result.accepted, result.rejected
    stats.launches += result.launches
    if problem.family == FIXED and solution.device.type == "cpu":
        _look_at(problem, solution)
    if result.status:
        stats.status = Status(min(result.status, Status.NON_FINITE))
        if stats.status == Status.UNDERFLOW:
            check_deterministic(problem.field, result.t, result.last[0])
        raise fused.failure(problem, False, result, solution)
    if watch is not None:
        for step in _steps(problem, kept):
            watch(step)
    return solution


_solvers: dict[tuple[Any, ...], Any] = {}
_MOST_SOLVERS = 64


def _solver(problem: Problem) -> Any:
    """What solves problems with this one's method and options: made once."""
    method, settings = fused.settings_of(problem)
    key = (problem.method, problem.options.get("interp"), problem.y0.dtype, *settings.items())
    if key not in _solvers:
        if len(_solvers) >= _MOST_SOLVERS:
            _solvers.clear()
        kernels: Any = gpu.load_any_field()
        _solvers[key] = kernels.Solve(method, problem.y0.dtype, **settings)
    return _solvers[key]


def _look_at(problem: Problem, solution: Tensor) -> None:
    """Raises if fixed steps led to nan or inf."""
    finite = torch.isfinite(solution).flatten(1).all(1)
    if not finite.all():
        raise problem.non_finite_output(int((~finite).nonzero()[0]))


# --- the field ------------------------------------------------------------------------------------

FIRST = 2
"""Evaluations that show whether the field keeps its arguments; if it does, each gets its own."""

_not_captured: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Fields of which a capture failed."""


class _Counters:
    """A problem's field, and the integers that its modules count evaluations in.

    Args:
        problem: The problem.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem, self._field, func = problem, problem.field, problem.original
        self._module = func if isinstance(func, nn.Module) else None
        self._before = self._counts()
        self._nfe = self._field.nfe
        self.calls = 0
        self._keeps = False

    @property
    def can_be_captured(self) -> bool:
        """Whether a graph may run in the place of the field's own code."""
        module = self._module
        return (
            module is not None
            and module not in _not_captured
            and not any(fused.has_hooks(part) for part in module.modules())
        )

    def evaluate(self, t: Tensor, y: Tensor) -> Tensor:
        """dy/dt in solver time; t is the user's. Both lie in memory that is written to later."""
        self.calls += 1
        if not self._keeps and self.calls > FIRST:
            return self._field.at(t, y)
        t, y = t.clone(), y.clone()
        before = _holders(t), _holders(y)
        value = self._field.at(t, y)
        self._keeps = self._keeps or (_holders(t), _holders(y)) != before
        return value

    def may_capture(self, capture: Callable[[], None]) -> bool:
        """Captures a round; whether the graph does all that the field's own code does."""
        if self._keeps:
            return False
        calls, before, others = self.calls, self._counts(), self._others()
        try:
            capture()
        except (RuntimeError, ValueError):  # it waits for the device, or depends on values
            torch.cuda.synchronize()
            fits = False
        else:
            advances = _advances(before, self._counts(), self.calls - calls)
            fits = advances is not None and others == self._others()
        # Nothing of the round has run.
        self._set(before)
        self.calls = calls
        if not fits and self._module is not None:
            _not_captured.add(self._module)
        return fits

    def settle(self, evaluations: int) -> None:
        """Makes the counts those of the evaluations that the solve took."""
        self._field.nfe = self._nfe + evaluations
        advances = _advances(self._before, self._counts(), self.calls)
        for key, advance in (advances or {}).items():
            module, name = key
            setattr(module, name, self._before[key] + advance * evaluations)

    def check_deterministic(self) -> None:
        """Raises if two evaluations of the field, at the start, differ."""
        self.calls += 2
        check_deterministic(self._field, self._problem.times[0], self._problem.y0)

    def _counts(self) -> dict[tuple[nn.Module, str], int]:
        if self._module is None:
            return {}
        return {
            (module, name): value
            for module in self._module.modules()
            for name, value in vars(module).items()
            if type(value) is int
        }

    def _others(self) -> list[tuple[int, int]]:
        """What would show that the field keeps something else: its attributes, and their sizes."""
        if self._module is None:
            return []
        return [
            (id(value), len(value) if isinstance(value, list | dict | set) else 0)
            for module in self._module.modules()
            for value in vars(module).values()
            if type(value) is not int
        ]

    @staticmethod
    def _set(counts: dict[tuple[nn.Module, str], int]) -> None:
        for (module, name), value in counts.items():
            if getattr(module, name) != value:
                setattr(module, name, value)


def _holders(x: Tensor) -> tuple[int, int]:
    """How many hold the tensor, and how many its memory."""
    return sys.getrefcount(x), torch._C._storage_Use_Count(x.untyped_storage()._cdata)


def _advances(
    before: dict[tuple[nn.Module, str], int], after: dict[tuple[nn.Module, str], int], calls: int
) -> dict[tuple[nn.Module, str], int] | None:
    """By how much each call advanced the integers that changed; None if not by the same."""
    found = {}
    for key, value in after.items():
        change = value - before.get(key, value)
        if change and calls:
            advance, rest = divmod(change, calls)
            if rest:
                return None
            found[key] = advance
    return found


# --- its steps, once more -------------------------------------------------------------------------


@dataclass
class _TakenStep:
    """A step that was taken on the device. What is not kept of it is made again when asked for."""

    interval: Interval
    y0: Tensor
    y1: Tensor
    f0: Tensor | None
    f1: Tensor | None
    recipe: Recipe

    def interpolate(self, times: Sequence[float], shifts: Sequence[Tensor | None]) -> Tensor:
        """The solution at `times` in the step, [len(times), *state]."""
        step: Step = self.recipe(self.interval, self.y0, self.f0)
        return step.interpolate(times, shifts)


def _steps(problem: Problem, kept: Any) -> list[_TakenStep]:
    """The accepted steps as the reference's solver has them."""
    recipe: Recipe
    if problem.family == FIXED:
        recipe = reference.grid_recipe(problem)
    else:
        recipe = AdaptiveRecipe(problem.field, TABLEAUS[problem.method])
    states, slopes = zip(*(pair.unbind() for pair in kept.states.unbind()), strict=True)
    known = [f if there else None for f, there in zip(slopes, kept.has_slope, strict=True)]
    y, f = kept.last
    after = [*known[1:], f if problem.family == ADAPTIVE else None]
    return [
        _TakenStep(Interval(t0, t1), y0, y1, f0, f1, recipe)
        for (t0, t1), y0, y1, f0, f1 in zip(
            kept.ends, states, (*states[1:], y), known, after, strict=True
        )
    ]
