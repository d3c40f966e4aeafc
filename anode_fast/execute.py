"""Carries out a solve: which field the kernels see, what is planned, and who does it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from anode_fast import adjoint, any_field, fused, graphs, reference, steps
from anode_fast.adjoint import AdjointOptions
from anode_fast.convolution import NativeConvField
from anode_fast.fields import Known
from anode_fast.plan import FIELDS, Plan
from anode_fast.problem import ADAPTIVE, FAMILIES, FIXED, OPTIONS, SCIPY, Problem, State, pad
from anode_fast.recognize import Recognized, recognize, refuse
from anode_fast.settings import Field, Options, Settings
from anode_fast.spec import ConvSpec
from anode_fast.stats import SolveStats

FEW = 32
"""Evaluations of a convolutional field that a short solve makes. If there is room for what so many
keep, the discrete gradient makes none of them again."""


def solve(
    func: Field, x: State, t: Tensor, settings: Settings, columns: int = 0
) -> tuple[Any, SolveStats]:
    """What `odeint` returns for the state x with `columns` zeros appended, and the counts.

    The zeros go along dim 1. The kernels append them on their own.
    """
    known = of_ours(func)
    if known is not None and isinstance(x, Tensor) and fused.casts(known, x):
        with torch.autocast(x.device.type, enabled=False):
            return solve(known, fused.widened(x), t, settings, columns)
    if torch.compiler.is_compiling() or graphs.is_abstract(x):
        if (node := graphs.solve(func, known, x, t, settings, columns)) is not None:
            return node
        if torch.compiler.is_dynamo_compiling():
            outside: tuple[Any, SolveStats] = _uncompiled(func, x, t, settings, columns)
            return outside
    if known is not None:
        return _solve_known(known, "", func, x, t, settings, columns)
    field, why = recognized(func, x, t, settings, columns)
    if field is None or not isinstance(x, Tensor):
        return _solve_known(None, why, func, x, t, settings, columns)
    try:
        if x.dim() in (2, 4):
            return _solve_known(field, "", func, x, t, settings, columns)
        # The kernels' state is [rows, dim].
        rows, on_rows = x.reshape(-1, x.shape[-1]), OnRows(func, x.shape)
        solution, stats = _solve_known(field, "", on_rows, rows, t, settings, columns)
        return solution.reshape(-1, *x.shape), stats
    except fused.FieldDiffers:
        why = "the field's value is not that of the operations in its trace"
        refuse(func, why)
        return _solve_known(None, why, func, x, t, settings, columns)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _uncompiled(
    func: Field, x: State, t: Tensor, settings: Settings, columns: int
) -> tuple[Any, SolveStats]:
    """A solve outside the graph. Tracing a solver would compile anew for every step."""
    return solve(func, x, t, settings, columns)


def of_ours(func: Field) -> Known | None:
    """A field that the kernels know as it is."""
    return func if isinstance(func, FIELDS) and type(func) in FIELDS else None


def recognized(
    func: Field, x: State, t: Tensor, settings: Settings, columns: int
) -> tuple[Recognized | None, str]:
    """The user's own field as the kernels know it, or why they do not."""
    if not isinstance(x, Tensor) or type(x) is not Tensor and type(x) is not nn.Parameter:
        return None, "the state is not one plain tensor"
    if settings.backend == "reference" or settings.gradient == "autograd":
        return None, "it is not to be run by kernels"
    method = settings.method or "dopri5"
    if not isinstance(method, str) or FAMILIES.get(method) not in (FIXED, ADAPTIVE):
        return None, f"{method} is no explicit Runge-Kutta method"
    if settings.event_fn:
        return None, "it searches for an event"
    if x.dtype not in (torch.float32, torch.float64):
        return None, f"the state is {x.dtype}, want float32 or float64"
    if x.dim() < 1 or x.numel() == 0 or not callable(func):
        return None, "the state has no features"
    if settings.step_control == "sample" and x.dim() not in (2, 4):
        return (
            None,
            "every row of [batch, ...] takes its own steps, the kernels' rows are [batch, dim]",
        )
    if why := fused.why_not_now(x.device.type):
        return None, why
    if fused.has_callbacks(func):
        return None, "the field has callbacks"
    if not isinstance(t, Tensor) or t.requires_grad or t.dim() != 1 or not len(t):
        return None, "a gradient with respect to t is wanted"
    found = recognize(func, t, x, columns)
    return (None, found) if isinstance(found, str) else (found, "")


class OnRows:
    """A field of [rows, dim] that is the user's of another shape."""

    def __init__(self, func: Field, shape: torch.Size) -> None:
        self.func, self.shape = func, shape

    def __call__(self, t: Tensor, y: Tensor) -> Any:
        few = (-1, *self.shape[1:]) if len(self.shape) > 1 else self.shape
        value = self.func(t, y.reshape(few))
        return value.reshape(y.shape) if isinstance(value, Tensor) else value


# --- by kernels -----------------------------------------------------------------------------------


def _solve_known(
    known: Known | None,
    unknown: str,
    func: Field,
    x: State,
    t: Tensor,
    settings: Settings,
    columns: int,
) -> tuple[Any, SolveStats]:
    """The same for a field that the kernels know, or do not.

    Args:
        known: The field as they know it.
        unknown: Why they do not.
        func: The user's own.
        x, t, settings, columns: As in `solve`; x [batch, dim] or an image if the field is known.
    """
    key = settings.key() if known is not None and isinstance(x, Tensor) else None
    memo = None
    if known is not None and isinstance(x, Tensor) and key:
        memo = fused.look_up(known, x, t, (columns, *key))

    def problem_from(
        x: Tensor, tensors: Sequence[Tensor] | None = None, times: Sequence[float] = ()
    ) -> Problem:
        if tensors is None or known is None:
            return settings.problem(func, pad(x, columns), t)
        then = torch.tensor(times, dtype=t.dtype)
        return settings.problem(functools.partial(known.evaluate, tensors), pad(x, columns), then)

    if memo and memo.native and known is not None and isinstance(x, Tensor):
        expected = _expected(known, func, x, t, columns, memo.native.backend)
        call = fused.Call(memo.native, known, memo.times, (), problem_from, expected)
        return fused.run(call, x, memo.tensors, t.dtype), call.stats
    problem = settings.problem(func, pad(x, columns), t, warn=True)
    backward = settings.backward(problem)
    plan = settings.plan(problem, backward, known, unknown)
    if plan.backend == "cpu" and isinstance(plan.spec, ConvSpec) and isinstance(x, Tensor):
        native = NativeConvField(known)
        expected = _expected(known, func, x, t, columns, plan.backend)
        if expected is not None and not native.agrees(problem.t[:1], problem.y0, expected):
            raise fused.FieldDiffers
        problem.field.func = native
        if plan.gradient == "discrete" and plan.keep_steps and native.has_room(problem.y0, FEW):
            # The same gradient, without evaluating everything once more.
            plan = replace(plan, gradient="autograd")
    elif plan.spec is not None and known is not None and isinstance(x, Tensor):
        prepared = fused.prepare(
            plan.backend,
            problem,
            plan.spec,
            x.shape[1],
            keep_steps=plan.keep_steps,
            by_row=plan.by_row,
            backward=backward if plan.gradient == "continuous" else None,
        )
        if memo and _says_nothing(problem, settings.options):
            fused.remember(memo, prepared)
        grid = [point for point, _ in problem.grid()] if prepared.fixed else []
        expected = _expected(known, func, x, t, columns, plan.backend)
        call = fused.Call(prepared, known, problem.times, grid, problem_from, expected)
        return fused.run(call, x, known.tensors(), t.dtype), call.stats
    if plan.backend == "reference" and settings.backend != "reference" and not plan.by_row:
        problem.arithmetic = steps.arithmetic(problem)
    params = settings.adjoint.params if settings.adjoint else None
    return _run(problem, plan, params, backward)


def _expected(
    known: Known | None,
    func: Field,
    x: Tensor,
    t: Tensor,
    columns: int,
    backend: str,
) -> Tensor | None:
    """What a user's own code gives at the start, for the kernels to compare.

    Of images on a GPU, whose kernels evaluate whole batches only, the outcome of the comparison.
    """
    if not isinstance(known, Recognized):
        return None
    expected = known.expected(func, t, x, columns)
    if expected is None:
        raise fused.FieldDiffers
    is_compared = backend != "triton" or x.dim() == 2
    return expected if is_compared else known.differs(expected, t, x, columns)


def _says_nothing(problem: Problem, options: Options | None) -> bool:
    """Whether `make_problem` had nothing to warn of."""
    known = set(options or ()) <= OPTIONS[problem.family]
    one_step = problem.family == FIXED and len(problem.times) == 2
    return known and not (one_step and "step_size" not in problem.options)


# --- by PyTorch's operations ----------------------------------------------------------------------


def _run(
    problem: Problem,
    plan: Plan,
    params: list[Tensor] | None,
    backward: AdjointOptions,
) -> tuple[Any, SolveStats]:
    """Carries out a plan for a field that no kernel evaluates."""
    stats = SolveStats(backend=plan.backend, method=problem.method)
    event_time: float | None = None
    if plan.gradient == "autograd" or not torch.is_grad_enabled():
        solution, event_time = _solve(problem, stats, plan)
    else:
        solution, event_time = _solve_with_gradient(problem, stats, plan, params, backward)
    state = problem.restore(solution)
    result: Any = state
    if event_time is not None:
        at = problem.field.user_time(event_time)
        result = (torch.as_tensor(at, dtype=problem.t.dtype, device=problem.t.device), state)
    return result, stats


def _solve(
    problem: Problem, stats: SolveStats, plan: Plan, f0: Tensor | None = None
) -> tuple[Tensor, float | None]:
    if problem.event_fn is not None:
        event_time, solution = reference.solve_event(problem, stats, f0=f0)
        return solution, event_time
    return _solver(plan)(problem, stats, f0=f0), None


def _solver(plan: Plan) -> adjoint.Solver:
    """What solves a problem of the plan's."""
    if plan.backend == "triton":
        return any_field.solve
    return functools.partial(reference.solve, by_row=True) if plan.by_row else reference.solve


def _solve_with_gradient(
    problem: Problem,
    stats: SolveStats,
    plan: Plan,
    params: list[Tensor] | None,
    backward: AdjointOptions,
) -> tuple[Tensor, float | None]:
    """A solve without a graph through it, whose backward pass is the plan's gradient."""
    f0 = None
    first_derivative = functools.partial(reference.first_derivative, by_row=plan.by_row)
    y0 = problem.y0.detach().requires_grad_()
    if len(problem.times) > 1 and (problem.family != SCIPY or params is None):
        # The solve's own first evaluation, under grad: it shows what the field depends on. (SciPy
        # makes its own once more.)
        value = first_derivative(replace(problem, y0=y0, shifts=None))
        if params is None:
            params = adjoint.gradient_sources(problem.original, y0, value)
        f0 = value.detach()
    elif params is None:
        params = adjoint.gradient_sources(problem.original, y0, y0)
    params = adjoint.independent([x for x in params if x.requires_grad])
    if not (params or problem.y0.requires_grad or problem.shifts):
        with torch.no_grad():
            return _solve(problem, stats, plan, f0)
    call: adjoint.DiscreteCall | adjoint.ContinuousCall
    shared = dict(
        problem=problem,
        solve=_solver(plan),
        start=first_derivative,
        stats=stats,
        f0=f0,
        params=params,
    )
    if plan.gradient == "discrete":
        call = adjoint.DiscreteCall(**shared, keep_steps=plan.keep_steps)  # type: ignore[arg-type]
    else:
        call = adjoint.ContinuousCall(**shared, adjoint=backward)  # type: ignore[arg-type]
    if problem.event_fn is not None:
        call.solve = _until_event(call.event_times)
    solve = adjoint.discrete if isinstance(call, adjoint.DiscreteCall) else adjoint.continuous
    solution = solve(call)  # type: ignore[arg-type]
    return solution, call.event_times[-1] if call.event_times else None


def _until_event(event_times: list[float]) -> adjoint.Solver:
    """A solver of the problem up to its event, whose time it appends to `event_times`."""

    def solve(
        problem: Problem,
        stats: SolveStats,
        *,
        f0: Tensor | None = None,
        watch: Callable[[Any], None] | None = None,
    ) -> Tensor:
        if problem.event_fn is None:  # the adjoint ODE
            return reference.solve(problem, stats, f0=f0, watch=watch)
        event_time, solution = reference.solve_event(problem, stats, f0=f0, watch=watch)
        event_times.append(event_time)
        return solution

    return solve
