"""Reference solvers in pure PyTorch: any callable, every method. Oracle and general path."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from anode_fast.errors import InvalidArgument
from anode_fast.problem import (
    ADAPTIVE,
    DEFAULT_MAX_STEPS_TO_EVENT,
    FIXED,
    IMPLICIT,
    SCIPY,
    Problem,
    all_finite,
    underlying,
)
from anode_fast.reference.adams import AdamsRecipe
from anode_fast.reference.dense import DenseSolution, solution_at
from anode_fast.reference.events import solve_until_event
from anode_fast.reference.implicit import ImplicitRecipe
from anode_fast.reference.runge_kutta import (
    PLAIN,
    FixedRecipe,
    adaptive_steps,
    grid_steps,
    row_times,
    solution_on_grid,
    solve_by_row,
)
from anode_fast.reference.scipy import solve_with_scipy
from anode_fast.reference.step import GridStep, Interval, Step
from anode_fast.stats import SolveStats
from anode_fast.tableau import TABLEAUS

MAX_GRID_STEPS_TO_EVENT = 20_000
"""Steps after which a fixed-step search for an event gives up (torchdiffeq's number)."""

Watch = Callable[[Step], None]


def steps(
    problem: Problem, stats: SolveStats, f0: Tensor | None = None, *, to_event: bool = False
) -> Iterator[Step]:
    """The accepted steps of any method but SciPy's, until the last output time (or endlessly)."""
    if problem.family == ADAPTIVE:
        tableau = TABLEAUS[problem.method]
        if to_event:
            return adaptive_steps(
                problem, tableau, float("inf"), stats, f0, DEFAULT_MAX_STEPS_TO_EVENT
            )
        return adaptive_steps(problem, tableau, problem.times[-1], stats, f0)
    grid = problem.endless_grid() if to_event else problem.grid()
    return grid_steps(problem, grid_recipe(problem), grid, stats, f0)


def grid_recipe(problem: Problem) -> Callable[[Interval, Tensor, Tensor | None], GridStep]:
    """How the problem's fixed-step method makes one step."""
    options, field, perturb = problem.options, problem.field, problem.perturb
    linear = options.get("interp", "cubic") == "linear"
    if problem.family == FIXED:
        return _fixed_recipe(problem)
    if problem.family == IMPLICIT:
        return ImplicitRecipe(
            field,
            TABLEAUS[problem.method],
            linear,
            perturb,
            max_iters=options.get("max_iters", 50),
            tolerances=(problem.rtol, problem.atol),
        )
    return AdamsRecipe(
        field,
        linear,
        perturb,
        implicit=options.get("implicit", problem.method != "explicit_adams"),
        max_iters=options.get("max_iters", 4),
        max_order=options.get("max_order", 12),
        tolerances=(problem.rtol, problem.atol),
    )


def _fixed_recipe(problem: Problem) -> FixedRecipe:
    linear = problem.options.get("interp", "cubic") == "linear"
    return FixedRecipe(
        *(problem.field, TABLEAUS[problem.method], linear, problem.perturb),
        problem.arithmetic or PLAIN,
    )


def _grid_of_outputs(problem: Problem) -> list[tuple[float, Tensor | None]]:
    """The grid, if all output times are on it and no gradient flows to them; else []."""
    if problem.shifts is not None:
        return []
    grid = problem.grid()
    return grid if {t for t, _ in grid}.issuperset(problem.times) else []


def first_derivative(problem: Problem, *, by_row: bool = False) -> Tensor:
    """The field at the first output time, exactly as the problem's method evaluates it first."""
    shift = problem.shifts[0] if problem.shifts else None
    if by_row:
        return problem.field(row_times(problem.times[0], problem.y0), problem.y0, shift)
    return problem.field(problem.times[0], problem.y0, shift, problem.start_side)


def solve(
    problem: Problem,
    stats: SolveStats,
    *,
    f0: Tensor | None = None,
    by_row: bool = False,
    watch: Watch | None = None,
) -> Tensor:
    """The solution at the problem's output times, [times, *state].

    Args:
        problem: What to solve.
        stats: Gets the counts.
        f0: The derivative at the start, if it is known: it is not evaluated again.
        by_row: step_control="sample": every row takes its own steps (adaptive methods).
        watch: Called with every accepted step, for checkpoints.

    Raises:
        SolverError: The solve cannot go on.
    """
    before = problem.field.nfe - (f0 is not None)
    if len(problem.times) == 1:
        solution = problem.y0.unsqueeze(0).clone()
    elif by_row:
        solution = solve_by_row(problem, TABLEAUS[problem.method], stats, f0, watch)
    elif problem.family == SCIPY:
        solution = solve_with_scipy(problem)
    elif problem.family == FIXED and watch is None and (grid := _grid_of_outputs(problem)):
        solution = solution_on_grid(problem, _fixed_recipe(problem), grid, stats, f0)
    else:
        watched = _watched(steps(problem, stats, f0), watch)
        solution = solution_at(problem.times, problem.shifts, problem.y0, watched)
    if problem.family != ADAPTIVE and solution.device.type == "cpu":
        _check_finite(problem, solution)
    stats.nfe = problem.field.nfe - before
    return solution


def solve_event(
    problem: Problem, stats: SolveStats, *, f0: Tensor | None = None, watch: Watch | None = None
) -> tuple[float, Tensor]:
    """Solver time of the problem's event, and the states at the start and there, [2, *state]."""
    if problem.family == SCIPY or problem.event_fn is None:
        raise InvalidArgument("odeint: method scipy_solver does not search for events")
    before = problem.field.nfe - (f0 is not None)
    watched = _watched(steps(problem, stats, f0, to_event=True), watch)
    limit = MAX_GRID_STEPS_TO_EVENT
    if problem.family == ADAPTIVE:
        limit = int(problem.options.get("max_num_steps", DEFAULT_MAX_STEPS_TO_EVENT))
    found = solve_until_event(problem, problem.event_fn, watched, limit)
    stats.nfe = problem.field.nfe - before
    return found


def dense(problem: Problem, stats: SolveStats) -> DenseSolution:
    """The solution between the first and the last time as a function."""
    if problem.family == SCIPY:
        raise InvalidArgument("odeint_dense: method scipy_solver has no dense output here")
    t0, t1 = problem.times[0], problem.times[-1]
    return DenseSolution(problem.y0, t0, t1, steps(problem, stats))


def _watched(stream: Iterable[Step], watch: Watch | None) -> Iterator[Step]:
    for step in stream:
        if watch:
            watch(step)
        yield step


def _check_finite(problem: Problem, solution: Tensor) -> None:
    """Raises if a fixed-step solution holds nan or inf: fixed steps judge no error on their way.

    Not called on a GPU, where it would be the only synchronisation of a fixed-step solve.
    """
    values = underlying(solution.detach())
    if all_finite(values):
        return
    finite = torch.isfinite(values.unsqueeze(-1).flatten(1)).all(1)
    raise problem.non_finite_output(int((~finite).nonzero()[0][-1]))


__all__ = [
    "DenseSolution",
    "dense",
    "first_derivative",
    "grid_recipe",
    "solve",
    "solve_event",
]
