"""The public solve functions: torchdiffeq's, with the same arguments and a few more."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from anode_fast import fused, reference
from anode_fast.errors import InvalidArgument, InvalidType
from anode_fast.execute import OnRows, of_ours, recognized, solve
from anode_fast.fields import Known
from anode_fast.plan import describe
from anode_fast.problem import Problem, State, make_problem
from anode_fast.recognize import Recognized
from anode_fast.settings import AdjointArguments, Field, Options, Settings
from anode_fast.stats import SolveStats


def odeint(
    func: Field,
    y0: State,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: Options | None = None,
    event_fn: Callable[..., Any] | None = None,
    backend: str = "auto",
    step_control: str = "batch",
    gradient: str = "auto",
    return_stats: bool = False,
    **unknown: Any,
) -> Any:
    """Solves dy/dt = func(t, y), y(t[0]) = y0, and returns y at every time of `t`.

    Args:
        func: Maps (t, y) to dy/dt. `t` is a 0-d tensor in the state's real dtype on its device
            ([batch, 1, ...] under step_control="sample"), `y` what y0 is.
        y0: State at t[0]: a floating point or complex tensor of any shape, or a tuple of tensors.
        t: Times, 1-D, floating point, strictly increasing or decreasing, on any device.
        rtol, atol: Tolerances of the error per step, atol + rtol * |y|: numbers, tensors that
            broadcast against y0, or for a tuple state one per part.
        method: Name of a method (docs/differences-from-torchdiffeq.md lists them); default
            "dopri5".
        options: Options of the method, torchdiffeq's names.
        event_fn: Maps (t, y) to a tensor; the solve ends where an entry changes sign. `t` then
            holds the start and any later (or earlier) time that tells the direction.
        backend: "auto", "reference", "cpu" or "triton". A named one that cannot run the call
            raises.
        step_control: "batch": one step size, the norm over the whole batch. "sample": every row of
            [batch, ...] takes its own steps (adaptive methods).
        gradient: "autograd" (through the solver's operations), "discrete" (exact, remakes each
            step, memory of the accepted steps' states), "continuous" (the adjoint ODE); "auto" is
            "autograd".
        return_stats: Also return the `SolveStats`.

    Returns:
        The solution, [len(t), *y0.shape] (a tuple of those for a tuple), y0 first. With event_fn:
        the event's time (0-d) and the states at start and event, [2, *y0.shape]. With return_stats:
        a pair of that and the SolveStats.

    Raises:
        InvalidArgument (a ValueError), InvalidType (a TypeError): A bad argument, before any work,
            or a field whose value does not fit the state, at its first evaluation.
        SolverError: The solve cannot go on: StepSizeUnderflow, MaxStepsExceeded, NonFiniteState
            and their kin.

    The step budget options["max_num_steps"] counts attempts over the whole solve; its default is
    100,000 (4,000 for an event).
    """
    _refuse_unknown("odeint", unknown)
    settings = Settings(rtol, atol, method, options, event_fn, backend, step_control, gradient)
    result, stats = solve(func, y0, t, settings)
    return (result, stats) if return_stats else result


def odeint_adjoint(
    func: Field,
    y0: State,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: Options | None = None,
    event_fn: Callable[..., Any] | None = None,
    adjoint_rtol: Any = None,
    adjoint_atol: Any = None,
    adjoint_method: str | None = None,
    adjoint_options: Options | None = None,
    adjoint_params: Iterable[Tensor] | Tensor | None = None,
    backend: str = "auto",
    step_control: str = "batch",
    gradient: str = "auto",
    return_stats: bool = False,
    **unknown: Any,
) -> Any:
    """`odeint` with memory that does not grow with the steps: gradients by an adjoint method.

    "auto" integrates the adjoint ODE for methods that choose their steps ("continuous"), and for
    fixed-step methods without adjoint_rtol, _atol, _method or _options solves once more in the
    backward pass and differentiates step by step ("discrete": the exact gradient of the computed
    answer).

    Args:
        func: As in `odeint`. An nn.Module unless adjoint_params is given.
        y0, t, rtol, atol, method, options, event_fn: As in `odeint`.
        adjoint_rtol, adjoint_atol, adjoint_method: Of the adjoint ODE; default: the forward ones.
        adjoint_options: Its options; default: `options` without "norm". Its "norm" may be
            "seminorm".
        adjoint_params: The tensors besides y0 and t that get gradients; one tensor means that one.
            Default: the module's parameters and every other tensor its first value depends on.
        backend, step_control, gradient, return_stats: As in `odeint`.

    Returns:
        As `odeint`.

    Raises:
        As `odeint`; InvalidArgument also for a plain function without adjoint_params, and for
        another adjoint_method with options but without adjoint_options.
    """
    _refuse_unknown("odeint_adjoint", unknown)
    if adjoint_params is None and not isinstance(func, nn.Module):
        raise InvalidArgument(
            f"odeint_adjoint: func is a {type(func).__name__}, not an nn.Module, so its "
            "parameters are not known. Pass adjoint_params=(...), or adjoint_params=() if there "
            "are none."
        )
    if adjoint_method not in (None, method) and options is not None and adjoint_options is None:
        raise InvalidArgument(
            "odeint_adjoint: with another adjoint_method, options cannot serve as "
            "adjoint_options too. Pass adjoint_options (perhaps {})."
        )
    if adjoint_options is not None and not isinstance(adjoint_options, Mapping):
        raise InvalidType(
            f"odeint_adjoint: adjoint_options is a {type(adjoint_options).__name__}, want a dict"
        )
    given = AdjointArguments(
        adjoint_rtol, adjoint_atol, adjoint_method, adjoint_options, _tensors(adjoint_params)
    )
    settings = Settings(
        rtol, atol, method, options, event_fn, backend, step_control, gradient, given
    )
    result, stats = solve(func, y0, t, settings)
    return (result, stats) if return_stats else result


def _tensors(params: Iterable[Tensor] | Tensor | None) -> list[Tensor] | None:
    """adjoint_params as a list; one tensor means that one."""
    if params is None:
        return None
    many = isinstance(params, Iterable) and not isinstance(params, Tensor)
    given: list[Any] = list(params) if many else [params]
    for x in given:
        if not isinstance(x, Tensor):
            raise InvalidType(
                f"odeint_adjoint: adjoint_params holds a {type(x).__name__}, want tensors, for "
                "example tuple(module.parameters())."
            )
    return given


def odeint_event(
    func: Field,
    y0: State,
    t0: Tensor,
    *,
    event_fn: Callable[..., Any],
    reverse_time: bool = False,
    odeint_interface: Callable[..., Any] = odeint,
    **kwargs: Any,
) -> Any:
    """Solves until event_fn(t, y) changes sign; the gradient flows through the event's time too.

    Args:
        func, y0: As in `odeint`.
        t0: Start, 0-d or 1-element tensor.
        event_fn: Maps (t, y) to a tensor; the first sign change of an entry is the event.
            Parameters in it get gradients.
        reverse_time: Whether to search backwards from t0.
        odeint_interface: `odeint` or `odeint_adjoint`.
        **kwargs: Passed to it.

    Returns:
        The event's time (0-d), and the states at start and event, [2, *y0.shape]. With
        return_stats: a pair of that and the SolveStats.

    Raises:
        EventNotFound (a SolverError): No sign change within the step budget.
    """
    if not isinstance(t0, Tensor) or t0.numel() != 1:
        raise InvalidType("odeint_event: t0 must be a tensor with one element")
    start = t0.reshape(-1)
    direction = -1.0 if reverse_time else 1.0
    t = torch.cat([start, start.detach() + direction])
    result = odeint_interface(func, y0, t, event_fn=event_fn, **kwargs)
    if kwargs.get("return_stats"):
        (event_t, solution), stats = result
        return _link_event(func, y0, t, event_fn, event_t, solution), stats
    return _link_event(func, y0, t, event_fn, *result)


def _link_event(
    func: Field, y0: State, t: Tensor, event_fn: Callable[..., Any], event_t: Tensor, solution: Any
) -> tuple[Tensor, Any]:
    """The event's time and states with the gradient that flows through the time."""
    # The solve above took the event's time as given. Now let it move with the state (and with what
    # the event function depends on): first-order terms whose value is zero.
    problem = make_problem(func, y0, t.detach(), event_fn=event_fn, warn=False)
    field, event = problem.field, problem.event_fn
    ends = [s[-1] for s in solution] if problem.layout else [solution[-1]]
    state = problem.layout.pack(ends) if problem.layout else ends[0]
    state = state.to(problem.y0.dtype)
    if event is None or not torch.is_grad_enabled():
        return event_t, solution
    sign = -1.0 if problem.backwards else 1.0
    time: Any = sign * event_t.detach()
    if state.requires_grad or event(time, state).requires_grad:
        slope = field(time, state.detach()).detach()
        t_leaf, y_leaf = time.clone().requires_grad_(), state.detach().requires_grad_()
        value = event(t_leaf, y_leaf)
        by_t, by_y = torch.autograd.grad(value, (t_leaf, y_leaf), allow_unused=True)
        rate = torch.zeros_like(time) if by_t is None else by_t
        if by_y is not None:
            rate = rate + torch.real((by_y.conj() * slope).sum())
        change = event(time, state)
        moved = -(change - change.detach()) / (rate + 1e-12)
        event_t = event_t.detach() + sign * moved.to(event_t.dtype)
        state = state + slope * moved.to(slope.dtype)
    if problem.layout:
        ends = list(problem.layout.unpack(state))
        joined = tuple(torch.cat([s[:-1], e[None]]) for s, e in zip(solution, ends, strict=True))
        return event_t, joined
    return event_t, torch.cat([solution[:-1], state[None].to(solution.dtype)])


def odeint_dense(
    func: Field,
    y0: State,
    t0: Tensor,
    t1: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: Options | None = None,
) -> DenseOutput:
    """Solves from t0 to t1 and returns the solution as a function of time.

    Args:
        func, y0, rtol, atol, method, options: As in `odeint`.
        t0, t1: Ends, 0-d floating point tensors, in either order.

    Returns:
        A `DenseOutput`: called with times between t0 and t1 (both included), it gives the states.

    Raises:
        As `odeint`.
    """
    ends = [torch.as_tensor(x) for x in (t0, t1)]
    if any(x.numel() != 1 for x in ends):
        raise InvalidArgument("odeint_dense: t0 and t1 must have one element each")
    t = torch.stack([x.reshape(()) for x in ends])
    problem = make_problem(func, y0, t, rtol=rtol, atol=atol, method=method, options=options)
    return DenseOutput(problem)


class DenseOutput:
    """A solution as a function of time. Differentiable with respect to y0, parameters and times."""

    def __init__(self, problem: Problem) -> None:
        self.stats = SolveStats(method=problem.method)
        self._problem = problem
        self._solution = reference.dense(problem, self.stats)

    def __call__(self, t: Tensor | float) -> State:
        """The states at `t`.

        Args:
            t: One time (a number or 0-d tensor), or a 1-D tensor of times in any order.

        Returns:
            For one time a state like y0, for [n] times [n, *y0.shape].

        Raises:
            InvalidArgument: A time outside the solved interval.
        """
        problem, solution = self._problem, self._solution
        times = torch.as_tensor(t, dtype=None if isinstance(t, Tensor) else torch.float64)
        flat = -times.reshape(-1) if problem.backwards else times.reshape(-1)
        for at in flat.tolist():
            if not solution.t0 <= at <= solution.t1:
                ends = [problem.field.user_time(end) for end in (solution.t0, solution.t1)]
                raise InvalidArgument(
                    f"odeint_dense: t={problem.field.user_time(at)} lies outside the solved "
                    f"interval from {ends[0]} to {ends[1]}"
                )
        shifts = list((flat - flat.detach()).unbind()) if flat.requires_grad else None
        states = problem.restore(solution(flat.tolist(), shifts))
        if times.dim():
            return states
        return tuple(s[0] for s in states) if isinstance(states, tuple) else states[0]


def explain(
    func: Field,
    y0: State,
    t: Tensor,
    *,
    method: str | None = None,
    options: Options | None = None,
    backend: str = "auto",
    step_control: str = "batch",
    gradient: str = "auto",
    **kwargs: Any,
) -> str:
    """Which path `odeint` would take with these arguments, and why not a faster one. No solve."""
    taken = {"rtol", "atol", "event_fn", "return_stats"}
    _refuse_unknown("explain", {name: x for name, x in kwargs.items() if name not in taken})
    settings = Settings(
        kwargs.get("rtol", 1e-7),
        kwargs.get("atol", 1e-9),
        method,
        options,
        kwargs.get("event_fn"),
        backend,
        step_control,
        gradient,
    )
    known = of_ours(func)
    if known is not None and isinstance(y0, Tensor) and fused.casts(known, y0):
        with torch.autocast(y0.device.type, enabled=False):
            return _explained(known, "", func, fused.widened(y0), t, settings)
    if known is not None:
        return _explained(known, "", func, y0, t, settings)
    return _explained(*recognized(func, y0, t, settings, 0), func, y0, t, settings)


def _explained(
    known: Known | None,
    unknown: str,
    func: Field,
    y0: State,
    t: Tensor,
    settings: Settings,
) -> str:
    problem = settings.problem(func, y0, t, warn=True)
    on_rows = problem
    if isinstance(known, Recognized) and isinstance(y0, Tensor) and y0.dim() not in (2, 4):
        rows = y0.reshape(-1, y0.shape[-1])
        on_rows = settings.problem(OnRows(func, y0.shape), rows, t)
    return describe(problem, settings.plan(on_rows, settings.backward(problem), known, unknown))


def _refuse_unknown(name: str, unknown: Mapping[str, Any]) -> None:
    if "args" in unknown:
        raise InvalidType(
            f"{name}: there is no args=; bind them with functools.partial or a closure: "
            "odeint(lambda t, y: func(t, y, *args), y0, t). Note the order (t, y)."
        )
    if unknown:
        raise InvalidType(f"{name}: unexpected arguments {', '.join(unknown)}")
