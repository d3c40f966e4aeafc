"""The public solve functions: torchdiffeq's, with the same arguments and a few more."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from anode_fast import adjoint, any_field, fused, reference, steps
from anode_fast.adjoint import AdjointOptions
from anode_fast.convolution import NativeConvField
from anode_fast.errors import InvalidArgument, InvalidType
from anode_fast.fields import Known
from anode_fast.plan import FIELDS, Plan, choose, describe
from anode_fast.problem import (
    ADAPTIVE,
    FAMILIES,
    FIXED,
    OPTIONS,
    SCIPY,
    Problem,
    State,
    make_problem,
    pad,
)
from anode_fast.recognize import Recognized, for_graph, recognize, refuse
from anode_fast.spec import ConvSpec, described
from anode_fast.stats import GraphStats, SolveStats

Options = Mapping[str, Any]
Field = Callable[..., Any]


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


@dataclass(frozen=True)
class AdjointArguments:
    """What odeint_adjoint takes beside odeint's arguments."""

    rtol: Any = None
    atol: Any = None
    method: str | None = None
    options: Options | None = None
    params: list[Tensor] | None = None

    @property
    def has_options(self) -> bool:
        """Whether any of them is about the adjoint ODE."""
        return any(x is not None for x in (self.rtol, self.atol, self.method, self.options))


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


_SIMPLE = (float, int, str, bool, torch.dtype)


@dataclass(slots=True)
class Settings:
    """The arguments of a solve but for field, state and times. `adjoint`: of odeint_adjoint."""

    rtol: Any
    atol: Any
    method: str | None
    options: Options | None
    event_fn: Callable[..., Any] | None
    backend: str
    step_control: str
    gradient: str
    adjoint: AdjointArguments | None = None

    def problem(self, func: Field, y0: State, t: Tensor, warn: bool = False) -> Problem:
        """The call in normal form."""
        return make_problem(
            func,
            y0,
            t,
            rtol=self.rtol,
            atol=self.atol,
            method=self.method,
            options=self.options,
            event_fn=self.event_fn,
            warn=warn,
        )

    def key(self) -> tuple[Any, ...] | None:
        """What two calls have in common that are carried out alike; None for special arguments."""
        given = self.adjoint
        options = _frozen(self.options)
        if self.event_fn or options is None or not type(self.rtol) is type(self.atol) is float:
            return None
        names = (self.method or "", self.backend, self.step_control, self.gradient)
        if not all(type(name) is str for name in names):
            return None
        of_adjoint: tuple[Any, ...] = ()
        if given is not None:
            own = _frozen(given.options)
            tolerances = (given.rtol, given.atol)
            simple = all(x is None or type(x) is float for x in tolerances)
            simple = simple and (given.method is None or type(given.method) is str)
            if given.params is not None or own is None or not simple:
                return None
            of_adjoint = (*tolerances, given.method, given.options is None, own)
        return (
            *(self.rtol, self.atol, self.method, options),
            *(self.backend, self.step_control, self.gradient, of_adjoint),
        )

    def plan(
        self,
        problem: Problem,
        backward: AdjointOptions,
        field: Known | None,
        unknown: str,
    ) -> Plan:
        """How the call will be carried out.

        Args:
            problem: In normal form.
            backward: How the adjoint ODE would be solved.
            field, unknown: The field as the kernels know it, or why they do not.
        """
        given = self.adjoint or AdjointArguments()
        return choose(
            problem,
            backend=self.backend,
            gradient=self.gradient,
            step_control=self.step_control,
            backward=backward,
            is_adjoint=self.adjoint is not None,
            has_adjoint_options=given.has_options,
            params=given.params,
            field=field,
            unknown=unknown,
        )

    def backward(self, problem: Problem) -> AdjointOptions:
        """How the adjoint ODE is solved: as the forward one where nothing else is said."""
        given = self.adjoint or AdjointArguments()
        inherited = {k: v for k, v in (self.options or {}).items() if k != "norm"}
        return AdjointOptions(
            problem.rtol if given.rtol is None else given.rtol,
            problem.atol if given.atol is None else given.atol,
            given.method or problem.method,
            inherited if given.options is None else dict(given.options),
        )


def _frozen(options: Options | None) -> tuple[Any, ...] | None:
    """Options of simple values as a tuple; None if there are others."""
    if not options:
        return ()
    if not isinstance(options, Mapping) or not all(
        type(value) in _SIMPLE for value in options.values()
    ):
        return None
    return tuple(sorted(options.items()))


FEW = 32
"""Evaluations of a convolutional field that a short solve makes. If there is room for what so many
keep, the discrete gradient makes none of them again."""


def solve(
    func: Field, x: State, t: Tensor, settings: Settings, columns: int = 0
) -> tuple[Any, SolveStats]:
    """What `odeint` returns for the state x with `columns` zeros appended, and the counts.

    The zeros go along dim 1. The kernels append them on their own.
    """
    known = _of_ours(func)
    if known is not None and isinstance(x, Tensor) and fused.casts(known, x):
        with torch.autocast(x.device.type, enabled=False):
            return solve(known, fused.widened(x), t, settings, columns)
    if torch.compiler.is_compiling() or _is_abstract(x):
        if isinstance(x, Tensor) and _can_compile(func, x, t, settings):
            if known is not None and _takes(known, x, columns):
                return _compiled(
                    (described(known.spec()),), known.tensors(), x, t, settings, columns
                )
            if known is None and (found := _in_graph(func, x, columns)) is not None:
                return _compiled(*found, x, t, settings, columns)
        if torch.compiler.is_dynamo_compiling():
            outside: tuple[Any, SolveStats] = _uncompiled(func, x, t, settings, columns)
            return outside
    if known is not None:
        return _solve_known(known, "", func, x, t, settings, columns)
    field, why = _recognized(func, x, t, settings, columns)
    if field is None or not isinstance(x, Tensor):
        return _solve_known(None, why, func, x, t, settings, columns)
    try:
        if x.dim() in (2, 4):
            return _solve_known(field, "", func, x, t, settings, columns)
        # The kernels' state is [rows, dim].
        rows, on_rows = x.reshape(-1, x.shape[-1]), _OnRows(func, x.shape)
        solution, stats = _solve_known(field, "", on_rows, rows, t, settings, columns)
        return solution.reshape(-1, *x.shape), stats
    except fused.FieldDiffers:
        why = "the field's value is not that of the operations in its trace"
        refuse(func, why)
        return _solve_known(None, why, func, x, t, settings, columns)


def _of_ours(func: Field) -> Known | None:
    """A field that the kernels know as it is."""
    return func if isinstance(func, FIELDS) and type(func) in FIELDS else None


class _OnRows:
    """A field of [rows, dim] that is the user's of another shape."""

    def __init__(self, func: Field, shape: torch.Size) -> None:
        self.func, self.shape = func, shape

    def __call__(self, t: Tensor, y: Tensor) -> Any:
        few = (-1, *self.shape[1:]) if len(self.shape) > 1 else self.shape
        value = self.func(t, y.reshape(few))
        return value.reshape(y.shape) if isinstance(value, Tensor) else value


def _recognized(
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


def _is_abstract(x: State) -> bool:
    """Whether there are no numbers behind a state, but a shape alone."""
    return isinstance(x, FakeTensor) or (isinstance(x, Tensor) and x.is_meta)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _uncompiled(
    func: Field, x: State, t: Tensor, settings: Settings, columns: int
) -> tuple[Any, SolveStats]:
    """A solve outside the graph. Tracing a solver would compile anew for every step."""
    return solve(func, x, t, settings, columns)


def _in_graph(func: Field, x: Tensor, columns: int) -> tuple[Any, list[Tensor]] | None:
    """A user's module as a graph knows it, if the kernels do: its specs described, and tensors."""
    if not isinstance(func, nn.Module) or x.dim() not in (2, 4):
        return None
    shape = (x.shape[1] + columns, *x.shape[2:])
    specs, tensors, attributes = _for_graph(func, shape, x.dtype, str(x.device))
    if not specs:
        return None
    for path, name in attributes:  # so that the graph is made anew when they change
        getattr(_inside(func, path), name)
    return specs, [getattr(_inside(func, path), name) for path, name in tensors]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _for_graph(
    func: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> tuple[Any, tuple[tuple[str, str], ...], tuple[tuple[str, str], ...]]:
    """What `for_graph` finds: specs described, tensors and attributes as module and name."""
    found = for_graph(func, shape, dtype, torch.device(device))
    tensors = tuple((path, name) for path, _, name in (x.rpartition(".") for x in found.tensors))
    return tuple(map(described, found.specs)), tensors, found.attributes


def _inside(module: nn.Module, path: str) -> nn.Module:
    for name in path.split(".") if path else ():
        module = getattr(module, name)
    return module


def _can_compile(func: Field, x: Tensor, t: Tensor, settings: Settings) -> bool:
    """Whether an operator can carry out a call. All this is known when the graph is traced."""
    given = settings.adjoint or AdjointArguments()
    options = [*(settings.options or {}).values(), *(given.options or {}).values()]
    return (
        settings.key() is not None
        and all(type(v) is not torch.dtype and v != math.inf for v in options)
        and x.is_floating_point()
        and t.is_floating_point()
        and not t.requires_grad
        and not fused.has_callbacks(func)
        and not (isinstance(func, nn.Module) and fused.has_hooks(func))
    )


def _takes(known: Known, x: Tensor, columns: int) -> bool:
    """Whether a field fits a state, and has all its tensors."""
    spec = known.spec()
    dims, width = (4, spec.channels) if isinstance(spec, ConvSpec) else (2, spec.dim)
    fits = x.dim() == dims and x.shape[1] + columns == width
    return fits and all(isinstance(p, Tensor) for p in known.tensors())  # no bias: None


def _compiled(
    specs: tuple[Any, ...],
    tensors: Sequence[Tensor],
    x: Tensor,
    t: Tensor,
    settings: Settings,
    columns: int,
) -> tuple[Tensor, SolveStats]:
    """A solve as one node of a graph. See operators.py, which reads the string."""
    adjoint = None
    if (given := settings.adjoint) is not None:
        adjoint = (given.rtol, given.atol, given.method, _pairs(given.options))
    call = (
        specs,
        columns,
        (
            *(settings.rtol, settings.atol, settings.method, _pairs(settings.options)),
            *(settings.backend, settings.step_control, settings.gradient, adjoint),
        ),
    )
    solution, counts = torch.ops.anode_fast.solve(x, tensors, t, f"{call}")
    method = settings.method or "dopri5"
    return solution, SolveStats(method=method) if _is_abstract(solution) else GraphStats(
        method, counts
    )


def _pairs(options: Options | None) -> tuple[Any, ...] | None:
    return None if options is None else tuple(options.items())


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
    known = _of_ours(func)
    if known is not None and isinstance(y0, Tensor) and fused.casts(known, y0):
        with torch.autocast(y0.device.type, enabled=False):
            return _explained(known, "", func, fused.widened(y0), t, settings)
    if known is not None:
        return _explained(known, "", func, y0, t, settings)
    return _explained(*_recognized(func, y0, t, settings, 0), func, y0, t, settings)


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
        on_rows = settings.problem(_OnRows(func, y0.shape), rows, t)
    return describe(problem, settings.plan(on_rows, settings.backward(problem), known, unknown))


def _refuse_unknown(name: str, unknown: Mapping[str, Any]) -> None:
    if "args" in unknown:
        raise InvalidType(
            f"{name}: there is no args=; bind them with functools.partial or a closure: "
            "odeint(lambda t, y: func(t, y, *args), y0, t). Note the order (t, y)."
        )
    if unknown:
        raise InvalidType(f"{name}: unexpected arguments {', '.join(unknown)}")


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
