"""Gradients of a solve without a graph through all of it. The solver is an argument.

*Discrete* is the exact gradient of the computed solution: the accepted steps are made again one by
one from the last to the first, each differentiated by itself, so memory holds the states at the
steps and the graph of one step. Step sizes count as constants.

*Continuous* integrates the adjoint ODE backwards (Chen et al., Neural Ordinary Differential
Equations, 2018, algorithm 1; Pontryagin). It keeps the states at the output times only, and is the
gradient of the true solution up to the tolerance of both solves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from anode_fast.distributed import SharedNorm
from anode_fast.problem import (
    ADAPTIVE,
    FAMILIES,
    FIXED,
    Problem,
    make_problem,
    mixed_norm,
    rms_norm,
)
from anode_fast.stats import SolveStats
from anode_fast.tableau import QUARTIC
from anode_fast.vector_field import HERE, NEXT, PREV, Layout, VectorField

MOST_DIRECT_OUTPUTS = 3
"""Output times inside one forward step up to which the backward solve stops at each of them."""


class Solver(Protocol):
    """`reference.solve` as this module needs it."""

    def __call__(
        self,
        problem: Problem,
        stats: SolveStats,
        *,
        f0: Tensor | None = None,
        watch: Callable[[Any], None] | None = None,
    ) -> Tensor:
        """The solution at the output times, [times, *state]; `watch` gets every accepted step."""
        ...


# --- which tensors a field's value depends on -----------------------------------------------------


def gradient_sources(func: Callable[..., Any], y0: Tensor, f0: Tensor) -> list[Tensor]:
    """Tensors that require grad and that the field depends on, the state excepted.

    A module's parameters and tensor attributes, what a function closes over, and every leaf that
    the graph of `f0`, the field's value under grad for the state `y0`, leads to.
    """
    sources = independent([x for x in _held_tensors(func) if x.requires_grad])
    while True:
        known = {id(x) for x in (y0, *sources)}
        found = [leaf for leaf in _leaves(f0, sources) if id(leaf) not in known]
        if not found:
            return sources
        sources = independent([*sources, *found])


def independent(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors none of which is made of another, and on which the same values depend.

    The gradient with respect to a tensor contains what reaches it by way of those made of it: to
    ask for both would count that part twice.
    """
    unique = list({id(x): x for x in tensors}.values())
    leaves, inner = {id(x) for x in unique if x.is_leaf}, {_edge(x) for x in unique}
    made = [
        x
        for x in unique
        if any(edge in inner or id(leaf) in leaves for edge, leaf in _edges_above(x))
    ]
    if not made:
        return unique
    kept = [x for x in unique if not any(x is other for other in made)]
    return independent([*kept, *(leaf for x in made for leaf in _leaves(x, kept))])


def _held_tensors(func: Callable[..., Any]) -> Iterator[Tensor]:
    if isinstance(func, nn.Module):
        yield from func.parameters()
        for module in func.modules():
            # A DataParallel replica holds its parameters as plain attributes.
            yield from (value for value in vars(module).values() if isinstance(value, Tensor))
    elif isinstance(func, functools.partial):
        yield from _held_tensors(func.func)
        yield from (x for x in (*func.args, *func.keywords.values()) if isinstance(x, Tensor))
    else:
        owner = getattr(func, "__self__", None)
        if isinstance(owner, nn.Module):
            yield from _held_tensors(owner)
        yield from (x for x in _cell_contents(func) if isinstance(x, Tensor))


def _cell_contents(func: Callable[..., Any]) -> Iterator[Any]:
    for cell in getattr(func, "__closure__", None) or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a variable that has no value yet
            continue


def _edge(x: Tensor) -> tuple[Any, int]:
    return x.grad_fn, x.output_nr


def _edges_above(
    x: Tensor, stop: Sequence[Tensor] = ()
) -> Iterator[tuple[tuple[Any, int], Tensor | None]]:
    """The edges of the graph that `x` is made by, without what made `stop`; with their leaves."""
    seen = {_edge(other) for other in stop}
    todo = list(x.grad_fn.next_functions) if x.grad_fn and _edge(x) not in seen else []
    while todo:
        edge = todo.pop()
        if edge[0] is None or edge in seen:
            continue
        seen.add(edge)
        yield edge, getattr(edge[0], "variable", None)
        todo.extend(edge[0].next_functions)


def _leaves(value: Tensor, stop: Sequence[Tensor]) -> list[Tensor]:
    if value.is_leaf:
        return [value] if value.requires_grad else []
    return [leaf for _, leaf in _edges_above(value, stop) if leaf is not None]


def _held_modules(func: Callable[..., Any]) -> list[nn.Module]:
    held: list[Any] = [func, getattr(func, "__self__", None)]
    if isinstance(func, functools.partial):
        held = [*_held_modules(func.func), *func.args, *func.keywords.values()]
    return [x for x in (*held, *_cell_contents(func)) if isinstance(x, nn.Module)]


@contextmanager
def frozen_buffers(func: Callable[..., Any]) -> Iterator[None]:
    """Evaluations inside leave the buffers (BatchNorm statistics) of the field as they were.

    The field's: those of modules that it is, binds or closes over.
    """
    modules = {module for held in _held_modules(func) for module in held.modules()}
    held = [x for module in modules if module.training for x in module.buffers(recurse=False)]
    copies = [buffer.clone() for buffer in held]
    try:
        yield
    finally:
        for buffer, copy in zip(held, copies, strict=True):
            # Through .data: a graph that has saved the buffer stays valid.
            buffer.data.copy_(copy)


# --- what both gradients share --------------------------------------------------------------------


@dataclass(kw_only=True)
class Call:
    """One solve whose gradient is wanted.

    Attributes:
        problem: The problem; its y0 and shifts are inputs of the gradient.
        solve: The solver.
        start: Evaluates the field as the solver does first.
        stats: Gets the counts of the backward pass too.
        f0: The derivative at the start, detached, if it is known.
        params: The tensors besides y0 and t that want a gradient.
        event_times: For a solve that an event ended, its time (solver time), put there by the
            solver.
    """

    problem: Problem
    solve: Solver
    start: Callable[[Problem], Tensor]
    stats: SolveStats
    f0: Tensor | None
    params: list[Tensor]
    event_times: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        device = self.problem.y0.device.type
        self._autocast = functools.partial(
            torch.autocast,
            device,
            dtype=torch.get_autocast_dtype(device),
            enabled=torch.is_autocast_enabled(device),
            cache_enabled=False,  # a copy of a weight cached under no_grad would get no gradient
        )

    @contextmanager
    def same_field(self) -> Iterator[None]:
        """The field computes inside what it computed in the forward pass, and changes nothing."""
        with self._autocast(), frozen_buffers(self.problem.original):
            yield

    def times(self) -> list[float]:
        """Times at which the solution was returned."""
        if not self.event_times:
            return self.problem.times
        return [self.problem.times[0], self.event_times[-1]]

    def inputs(self) -> tuple[Tensor, Tensor | None]:
        """y0, and the zero-valued tensor [times] through which the gradient flows to t."""
        shifts = self.problem.shifts
        return self.problem.y0, None if shifts is None else torch.stack(shifts)

    def plain(self, y0: Tensor, shift: Tensor | None) -> Problem:
        """The problem with these tensors in the place of its inputs."""
        shifts = None if shift is None else list(shift.unbind())
        return replace(self.problem, y0=y0, shifts=shifts)

    def differentiable_gradient(
        self, grad: Tensor, y0: Tensor, shift: Tensor | None, params: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """The gradient by autograd through the solver: it can be differentiated again."""
        evaluations = self.problem.field.nfe
        with torch.enable_grad():
            y = y0.view_as(y0)
            solution = self.solve(self.plain(y, shift), SolveStats())
            self.stats.nfe_backward = self.problem.field.nfe - evaluations
            if y.grad_fn is None:
                return _grad([solution], [y, shift, *params], [grad], create_graph=True)
            # y0 may be made of the parameters: what reaches it must not go on to them here, or it
            # would count twice. The graph of the gradients themselves does go on.
            stop = y.grad_fn.register_prehook(lambda grads: (None,) * len(grads))
            try:
                return _grad([solution], [y, shift, *params], [grad], create_graph=True)
            finally:
                stop.remove()


def _grad(
    outputs: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
    cotangents: Sequence[Tensor | None],
    create_graph: bool = False,
) -> list[Tensor | None]:
    """Vector-Jacobian product; None where nothing flows or nothing is asked."""
    pairs = [
        (out, cotangent)
        for out, cotangent in zip(outputs, cotangents, strict=True)
        if out is not None and cotangent is not None and out.requires_grad
    ]
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    if not pairs or not wanted:
        return [None] * len(inputs)
    # The field may use a graph that is older than this step (an encoder's output): keep it.
    grads = iter(
        torch.autograd.grad(
            [out for out, _ in pairs],
            wanted,
            [cotangent for _, cotangent in pairs],
            allow_unused=True,
            retain_graph=True,
            create_graph=create_graph,
        )
    )
    return [next(grads) if x is not None and x.requires_grad else None for x in inputs]


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


# --- discrete -------------------------------------------------------------------------------------


@dataclass
class Checkpoint:
    """The start of an accepted step, and how to make it again."""

    recipe: Callable[..., Any]
    interval: Any
    y0: Tensor
    f0: Tensor | None


@dataclass(kw_only=True)
class DiscreteCall(Call):
    """A call with the discrete gradient.

    Attributes:
        keep_steps: Whether the steps' states stay in memory until the backward pass; if not, it
            solves once more to get them.
    """

    keep_steps: bool = True
    checkpoints: list[Checkpoint] = field(default_factory=list)
    shifts: list[Tensor] | None = None

    def trace(
        self, y0: Tensor, shift: Tensor | None, f0: Tensor | None, stats: SolveStats
    ) -> Tensor:
        """Solves and fills `checkpoints`."""
        self.checkpoints = []

        def watch(step: Any) -> None:
            self.checkpoints.append(Checkpoint(step.recipe, step.interval, step.y0, step.f0))

        problem = self.plain(y0, shift)
        self.shifts = problem.shifts
        return self.solve(problem, stats, f0=f0, watch=watch)


class _Discrete(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: DiscreteCall, y0: Tensor, shift: Tensor | None, *params: Tensor
    ) -> Tensor:
        detached = None if shift is None else shift.detach()
        solution = call.trace(y0.detach(), detached, call.f0, call.stats)
        if not call.keep_steps:
            call.checkpoints = []
        ctx.call = call
        ctx.save_for_backward(y0, shift, *params)
        return solution

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        call: DiscreteCall = ctx.call
        y0, shift, *params = ctx.saved_tensors
        with call.same_field():
            if torch.is_grad_enabled():
                return None, *call.differentiable_gradient(grad, y0, shift, params)
            return None, *_discrete_gradient(call, grad, y0, shift, params)


def _discrete_gradient(
    call: DiscreteCall, grad: Tensor, y0: Tensor, shift: Tensor | None, params: Sequence[Tensor]
) -> list[Tensor | None]:
    vector_field, times = call.problem.field, call.times()
    evaluations = vector_field.nfe
    if not call.keep_steps:
        # The counts of the forward solve stand; only the evaluations are new.
        detached = None if shift is None else shift.detach()
        call.trace(y0.detach(), detached, None, SolveStats())
    leaves = [x.detach().requires_grad_() for x in call.shifts] if call.shifts else []
    by_id = {id(x): leaf for x, leaf in zip(call.shifts or [], leaves, strict=True)}
    shifts: list[Tensor | None] = list(leaves) if leaves else [None] * len(times)
    if call.event_times:
        shifts[1] = None  # the event's time is its own; odeint_event links its gradient
    totals: list[Tensor | None] = [None] * (len(leaves) + len(params))
    sources = [*leaves, *params]
    adj_y: Tensor | None = None
    adj_f: Tensor | None = None
    for point in reversed(call.checkpoints):
        inside = point.interval.inside(times)
        with torch.enable_grad():
            y = point.y0.detach().requires_grad_()
            f = None if point.f0 is None else point.f0.detach().requires_grad_()
            interval = replace(
                point.interval,
                shift0=by_id.get(id(point.interval.shift0)),
                shift1=by_id.get(id(point.interval.shift1)),
            )
            step = point.recipe(interval, y, f)
            block = None
            if inside.start < inside.stop:
                block = step.interpolate(times[inside], shifts[inside])
            adj_y, adj_f, *parts = _grad(
                [block, step.y1, step.f1], [y, f, *sources], [grad[inside], adj_y, adj_f]
            )
        totals = [_plus(total, part) for total, part in zip(totals, parts, strict=True)]
    if adj_f is not None:
        with torch.enable_grad():
            y = y0.detach().requires_grad_()
            start = call.start(call.plain(y, torch.stack(leaves) if leaves else None))
            part_y, *parts = _grad([start], [y, *sources], [adj_f])
        adj_y = _plus(adj_y, part_y)
        totals = [_plus(total, part) for total, part in zip(totals, parts, strict=True)]
    adj_y = _plus(adj_y, grad[0])
    if not call.keep_steps:
        call.checkpoints = []
    call.stats.nfe_backward = vector_field.nfe - evaluations
    adj_shift = None
    if leaves:
        zero = torch.zeros_like(leaves[0])
        adj_shift = torch.stack([zero if x is None else x for x in totals[: len(leaves)]])
    return [adj_y, adj_shift, *totals[len(leaves) :]]


def discrete(call: DiscreteCall) -> Tensor:
    """Solves; the result's backward pass makes the steps again. [times, *state]."""
    y0, shift = call.inputs()
    solution: Tensor = _Discrete.apply(call, y0, shift, *call.params)
    return solution


# --- continuous -----------------------------------------------------------------------------------


@dataclass
class AdjointOptions:
    """How the adjoint ODE is solved: torchdiffeq's adjoint_* arguments, resolved."""

    rtol: Any
    atol: Any
    method: str
    options: Mapping[str, Any]


@dataclass
class Spread:
    """A forward step with many output times inside.

    The backward solve does not stop at them: their gradients go through the quartic interpolant to
    its five data, which lie at the step's ends and middle.
    """

    t0: float
    t1: float
    states: Tensor
    outputs: slice


@dataclass(kw_only=True)
class ContinuousCall(Call):
    """A call with the continuous gradient.

    Attributes:
        adjoint: How the adjoint ODE is solved.
        spreads: The steps that `trace` found to have many output times inside.
    """

    adjoint: AdjointOptions
    spreads: list[Spread] = field(default_factory=list)

    def trace(self, y0: Tensor) -> Tensor:
        """Solves, and notes the steps with many output times inside."""
        self.spreads = []

        def watch(step: Any) -> None:
            t0, t1 = step.interval.t0, step.interval.t1
            inside = step.interval.inside(self.problem.times)
            if inside.stop - inside.start > MOST_DIRECT_OUTPUTS:
                middle = step.interpolate([(t0 + t1) / 2], [None])[0]
                states = torch.stack([step.y0, middle, step.y1])
                self.spreads.append(Spread(t0, t1, states, inside))

        problem = self.problem
        adaptive = problem.family == FAMILIES[self.adjoint.method] == ADAPTIVE
        may_spread = adaptive and problem.shifts is None and problem.event_fn is None
        return self.solve(
            self.plain(y0, None), self.stats, f0=self.f0, watch=watch if may_spread else None
        )


class _Continuous(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: ContinuousCall, y0: Tensor, shift: Tensor | None, *params: Tensor
    ) -> Tensor:
        solution = call.trace(y0.detach())
        ctx.call = call
        ctx.save_for_backward(y0, shift, solution, *params)
        return solution

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        call: ContinuousCall = ctx.call
        y0, shift, solution, *params = ctx.saved_tensors
        with call.same_field():
            if torch.is_grad_enabled():
                return None, *call.differentiable_gradient(grad, y0, shift, params)
            return None, *_continuous_gradient(call, grad, solution, shift, params)


def continuous(call: ContinuousCall) -> Tensor:
    """Solves; the result's backward pass integrates the adjoint ODE. [times, *state]."""
    y0, shift = call.inputs()
    solution: Tensor = _Continuous.apply(call, y0, shift, *call.params)
    return solution


class _AugmentedField:
    """The adjoint ODE of (t's gradient, y, a, parameters' gradients), in solver time.

    a' = -a df/dy, and likewise the gradients with respect to t and the parameters. The one with
    respect to t is integrated even if nobody asks for it, because torchdiffeq does: its error takes
    part in the choice of steps.
    """

    def __init__(self, vector_field: VectorField, params: Sequence[Tensor], original: Any) -> None:
        self.field = vector_field
        self.params = params
        for name in ("step", "accept_step", "reject_step"):
            call = getattr(original, f"callback_{name}_adjoint", None)
            if call is not None:
                setattr(self, f"callback_{name}", self._in_user_time(call))

    def _in_user_time(self, call: Callable[..., None]) -> Callable[..., None]:
        def callback(t: Tensor, state: tuple[Tensor, ...], dt: Tensor) -> None:
            call(-t if self.field.backwards else t, state, dt)

        return callback

    def __call__(self, t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        _, y, adj_y, *adj_params = state
        # An implicit method asks for this field's own Jacobian, under grad.
        wants_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            if not (wants_graph and y.requires_grad):
                y = y.detach().requires_grad_()
            t = t.detach().requires_grad_()
            value = self.field(t, y)
            grads = _grad([value], [t, y, *self.params], [-adj_y], create_graph=wants_graph)
        parts = [
            torch.zeros_like(like) if part is None else part
            for part, like in zip(grads, [t, y, *adj_params], strict=True)
        ]
        return (parts[0], value if wants_graph else value.detach(), *parts[1:])

    def of_flat(self, layout: Layout) -> Callable[[Tensor, Tensor], Tensor]:
        """The same for a flat state, of which it takes out what it needs. Without a graph."""
        shape, n = layout.shapes[1], layout.sizes[1]
        zeros: list[Tensor] = []

        def evaluate(t: Tensor, state: Tensor) -> Tensor:
            if not zeros:
                zeros.extend(state.new_zeros(size) for size in layout.sizes)
            y, adj_y = (state[i : i + n].view(shape) for i in (1, 1 + n))
            with torch.enable_grad():
                y = y.detach().requires_grad_()
                t = t.detach().requires_grad_()
                value = self.field(t, y)
                by_t, *by_others = _grad([value], [t, y, *self.params], [-adj_y])
            parts = [by_t, value.detach(), *by_others]
            return torch.cat(
                [
                    zero if part is None else part.reshape(-1)
                    for part, zero in zip(parts, zeros, strict=True)
                ]
            )

        return evaluate


class _AdjointNorm:
    """torchdiffeq's norm of the augmented state, or its seminorm, without the parameters.

    Kidger, Chen, Lyons, Hey, that's not an ODE: faster ODE adjoints via seminorms, 2021.

    Attributes:
        sizes: Of the parts, in order, if it is the largest `rms_norm` of those, else None.
    """

    def __init__(self, problem: Problem, params: Sequence[Tensor], with_params: bool) -> None:
        self._norm = problem.norm
        self._with_params = with_params
        n = problem.y0.numel()
        of_state = (n,) if problem.norm is rms_norm else getattr(problem.norm, "sizes", None)
        self.sizes: tuple[int, ...] | None = None
        if of_state is not None and not any(x.is_complex() for x in (problem.y0, *params)):
            of_params = [x.numel() for x in params] if with_params else []
            self.sizes = (1, *of_state, *of_state, *of_params)

    def __call__(self, parts: tuple[Tensor, ...]) -> Tensor | float:
        """The norm of (t's gradient, y, a, parameters' gradients)."""
        t, y, adj_y, *adj_params = parts
        norms = [t.abs(), self._norm(y), self._norm(adj_y)]
        return max([*norms, mixed_norm(adj_params)] if self._with_params else norms)


def _adjoint_norm(
    options: dict[str, Any], problem: Problem, params: Sequence[Tensor]
) -> Callable[[tuple[Tensor, ...]], Tensor | float]:
    """The norm of the augmented state: torchdiffeq's default, its seminorm, or the user's own."""
    user = options.pop("norm", None)
    if problem.shared and user in (None, "seminorm"):
        states = 1 + 2 * (len(problem.layout.shapes) if problem.layout else 1)
        user = functools.partial(_shared_norm, problem.shared, states if user else None)
    if user is None or user == "seminorm":
        return _AdjointNorm(problem, params, with_params=user is None)
    if problem.layout is None:
        return user  # type: ignore[no-any-return]
    unpack = problem.layout.unpack

    def unpacked(parts: tuple[Tensor, ...]) -> Tensor | float:
        t, y, adj_y, *adj_params = parts
        return user((t, *unpack(y), *unpack(adj_y), *adj_params))  # type: ignore[no-any-return]

    return unpacked


def _shared_norm(shared: SharedNorm, count: int | None, parts: tuple[Tensor, ...]) -> Tensor:
    """The norm of the first parts (None: of all) over all processes."""
    return shared(parts[:count])


@dataclass
class _Stop:
    """A time at which the backward solve takes in gradients of outputs.

    Attributes:
        t, y: The time and the forward solution there.
        adj_y: Gradient with respect to y.
        output: Number of the output time, or None.
        slopes: Gradients with respect to the derivative, by the side of t on which it is taken.
    """

    t: float
    y: Tensor
    adj_y: Tensor
    output: int | None = None
    slopes: dict[int, Tensor] = field(default_factory=dict)


def _continuous_gradient(
    call: ContinuousCall,
    grad: Tensor,
    solution: Tensor,
    shift: Tensor | None,
    params: Sequence[Tensor],
) -> list[Tensor | None]:
    problem, adjoint = call.problem, call.adjoint
    vector_field, want_time = problem.field, shift is not None
    evaluations = vector_field.nfe
    options = dict(adjoint.options)
    norm = _adjoint_norm(options, problem, params)
    if problem.backwards:  # the backward solve runs in solver time
        for name in {"step_t", "jump_t"} & set(options):
            options[name] = [-time for time in torch.as_tensor(options[name]).tolist()]
    augmented = _AugmentedField(vector_field, params, problem.original)
    stops = _stops(call, grad, solution)
    y = stops[0].y
    real = y.real if y.is_complex() else y
    state: list[Tensor] = [
        torch.zeros((), dtype=real.dtype, device=y.device),
        y,
        torch.zeros_like(y),
        *(torch.zeros_like(param) for param in params),
    ]
    adj_times: list[Tensor | None] = [None] * len(call.times())
    suggested: float | None = None
    for i, stop in enumerate(stops):
        state[1] = stop.y
        state[2] = state[2] + stop.adj_y
        for side, adj_f in stop.slopes.items():
            _add_through_field(vector_field, stop, side, adj_f, state, params)
        if want_time and stop.output:
            with torch.no_grad():
                slope = vector_field(stop.t, stop.y)
            adj_times[stop.output] = moved = torch.real((slope.conj() * stop.adj_y).sum())
            state[0] = state[0] - moved
        if i + 1 == len(stops):
            break
        end = stops[i + 1].t
        state, suggested = _solve_back(
            call, augmented, state, (stop.t, end), options, norm, suggested, i + 2 == len(stops)
        )
    adj_shift = None
    if want_time:
        adj_times[0] = state[0]
        adj_shift = torch.stack([state[0] * 0 if x is None else x for x in adj_times])
        if call.event_times:
            adj_shift[1:] = 0  # the event's time is its own; odeint_event links its gradient
    call.stats.nfe_backward = vector_field.nfe - evaluations
    return [state[2], adj_shift, *state[3:]]


def _stops(call: ContinuousCall, grad: Tensor, solution: Tensor) -> list[_Stop]:
    """Where the backward solve stops, from the last time to the first."""
    times = call.times()
    spread = {i for s in call.spreads for i in range(*s.outputs.indices(len(times)))}
    jumps = set(call.problem.options.get("jump_t", ()))
    stops: dict[float, _Stop] = {}

    def add(t: float, y: Tensor, adj_y: Tensor, output: int | None = None) -> _Stop:
        stop = stops.setdefault(t, _Stop(t, y, torch.zeros_like(y), output))
        stop.adj_y = stop.adj_y + adj_y
        return stop

    def add_slope(stop: _Stop, side: int, adj_f: Tensor) -> None:
        side = side if stop.t in jumps else HERE
        before = stop.slopes.get(side)
        stop.slopes[side] = adj_f if before is None else before + adj_f

    for i, t in enumerate(times):
        if i not in spread:
            add(t, solution[i], grad[i], i)
    for s in call.spreads:
        g, dt = grad[s.outputs], s.t1 - s.t0
        x = torch.tensor([(t - s.t0) / dt for t in times[s.outputs]], dtype=torch.float64)
        powers = torch.stack([x**0, x, x**2, x**3, x**4])
        weights = torch.tensor(QUARTIC, dtype=torch.float64) @ powers
        weights = weights.to(device=g.device, dtype=g.dtype)
        y0, middle, y1, f0, f1 = torch.tensordot(weights, g, dims=1).unbind()
        add_slope(add(s.t0, s.states[0], y0), NEXT, f0 * dt)
        add((s.t0 + s.t1) / 2, s.states[1], middle)
        add_slope(add(s.t1, s.states[2], y1), PREV, f1 * dt)
    return sorted(stops.values(), key=lambda stop: -stop.t)


def _add_through_field(
    vector_field: VectorField,
    stop: _Stop,
    side: int,
    adj_f: Tensor,
    state: list[Tensor],
    params: Sequence[Tensor],
) -> None:
    """Adds the gradient that reaches y and the parameters through f(t, y) at a stop."""
    with torch.enable_grad():
        y = stop.y.detach().requires_grad_()
        grads = _grad([vector_field(stop.t, y, None, side)], [y, *params], [adj_f])
    for i, part in enumerate(grads):
        if part is not None:
            state[2 + i] = state[2 + i] + part


def _solve_back(
    call: ContinuousCall,
    augmented: _AugmentedField,
    state: list[Tensor],
    interval: tuple[float, float],
    options: Mapping[str, Any],
    norm: Callable[[tuple[Tensor, ...]], Tensor | float],
    suggested: float | None,
    is_last: bool,
) -> tuple[list[Tensor], float | None]:
    """The augmented state at the interval's other end, and the step to go on with."""
    adjoint = call.adjoint
    start, end = interval
    t = torch.tensor([start, end], dtype=torch.float64)
    backward = make_problem(
        augmented,
        tuple(state),
        t,
        rtol=adjoint.rtol,
        atol=adjoint.atol,
        method=adjoint.method,
        options={**options, "norm": norm},
        warn=False,
        shared=call.problem.shared,
    )
    backward.field.noise = call.problem.field.noise
    if backward.y0.dtype == call.problem.y0.dtype:
        backward.arithmetic = call.problem.arithmetic
    if backward.family in (ADAPTIVE, FIXED) and backward.layout and backward.layout.is_uniform:
        backward.field.flatten(augmented.of_flat(backward.layout))
    if backward.family == ADAPTIVE:
        # One solve in pieces: it goes on with the step it has, and ends exactly on each stop.
        if suggested is not None:
            backward.options["first_step"] = suggested
        if not is_last:
            backward.options["step_t"] = sorted({*backward.options.get("step_t", ()), -end})
    with torch.no_grad():
        solution = call.solve(backward, SolveStats())
    parts = backward.restore(solution)
    return [part[1] for part in parts], backward.suggested_step
