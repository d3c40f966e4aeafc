"""Native solves: binds a field, a tableau and a call's options to the kernels.

`why_not` says whether a backend's kernels can run a problem, `prepare` makes what runs it, `run`
runs it. A call that was prepared once is remembered by its settings, so that the next call like it
goes to the kernels without being taken apart again: that would cost more than the solve.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from anode_fast import failures, reference
from anode_fast.adjoint import AdjointOptions
from anode_fast.errors import NonFiniteState
from anode_fast.kernels import gpu, interface
from anode_fast.kernels.cpu import library
from anode_fast.kernels.cpu import solve as cpu
from anode_fast.kernels.program import Program
from anode_fast.problem import (
    ADAPTIVE,
    DEFAULT_MAX_STEPS,
    FAMILIES,
    FIXED,
    Problem,
    make_problem,
    rms_norm,
    step_grid,
)
from anode_fast.spec import ACTIVATIONS, ConvSpec, MLPSpec, Spec, program_of
from anode_fast.stats import DeviceStats, SolveStats, Status
from anode_fast.tableau import TABLEAUS, ButcherTableau

_PLAIN = (Tensor, nn.Parameter)
_CALLBACKS = frozenset(
    f"callback_{name}{of}"
    for name in ("step", "accept_step", "reject_step")
    for of in ("", "_adjoint")
)


class Field(Protocol):
    """What this module needs of an MLPField, a ConvField or a `Recognized` callable."""

    def tensors(self) -> list[Tensor]:
        """Its weights and biases, in the spec's order."""
        ...

    def signature(self) -> tuple[Any, ...]:
        """What two fields have in common that the kernels run alike, but for the tensors."""
        ...

    def count(self, evaluations: int) -> None:
        """Notes evaluations of it."""
        ...

    def evaluate(self, tensors: Sequence[Tensor], t: Tensor, y: Tensor) -> Tensor:
        """dy/dt with these tensors, differentiable."""


# --- what the kernels can run ---------------------------------------------------------------------


def why_not(backend: str, problem: Problem, spec: Spec, parameters: Sequence[Any]) -> str:
    """Why a backend's kernels cannot run this problem; "" if they can.

    Args:
        backend: "cpu" or "triton".
        problem: The call in normal form.
        spec: Of the field.
        parameters: The field's tensors.
    """
    func, y0 = problem.original, problem.y0
    absent = library.missing() if backend == "cpu" else gpu.missing()
    if absent:
        return str(absent)
    if problem.family not in (FIXED, ADAPTIVE):
        return f"{problem.method} is no explicit Runge-Kutta method"
    if problem.event_fn is not None:
        return "it searches for an event"
    if y0.dtype not in (torch.float32, torch.float64):
        return f"the state is {y0.dtype} on {y0.device}, want float32 or float64"
    is_conv = isinstance(spec, ConvSpec)
    if y0.dim() != (4 if is_conv else 2) or problem.layout is not None:
        wanted = "[batch, channels, height, width]" if is_conv else "[batch, dim]"
        return f"the state is not one tensor {wanted}"
    if y0.shape[1] != _width(spec):
        name = "channels" if is_conv else "columns"
        return f"the state has {y0.shape[1]} {name}, and the field {_width(spec)}"
    if is_conv and 0 in y0.shape[2:]:
        return "the images have no pixels"
    if len(problem.times) == 1:
        return "there is nothing to solve"
    if why := why_not_tensors(spec, y0, parameters):
        return why
    if why := why_not_steps(problem):
        return why
    if isinstance(func, nn.Module) and has_hooks(func):
        return "the field has hooks or a forward of its own, which would not run"
    return _why_not_field(backend, spec, y0) or why_not_now(y0.device.type)


def why_not_steps(problem: Problem) -> str:
    """Why no kernels can make a problem's steps, whoever evaluates its field; "" if they can."""
    if problem.shifts is not None:
        return "a gradient with respect to t is wanted"
    if isinstance(problem.rtol, Tensor) or isinstance(problem.atol, Tensor):
        return "rtol or atol is a tensor"
    if problem.family == ADAPTIVE and problem.norm is not rms_norm:
        return "it has the option norm"
    for name in ("step_t", "jump_t"):
        if name in problem.options:
            return f"it has the option {name}"
    if problem.family == FIXED and problem.perturb:
        return "it has the option perturb"
    if has_callbacks(problem.original):
        return "the field has callbacks"
    return ""


def _why_not_field(backend: str, spec: Spec, y0: Tensor) -> str:
    """The same of what one backend does not have."""
    if backend == "triton":
        kernels: Any = gpu.load(isinstance(spec, ConvSpec))
        return str(gpu.why_not_on(y0.device) or kernels.why_not(field_of(backend, spec), y0.dtype))
    if y0.device.type != "cpu":
        return f"the state is on {y0.device}, want the CPU"
    if isinstance(spec, ConvSpec):
        return "the C++ solver knows fields of rows only"
    return ""


def why_not_adjoint(backend: str, problem: Problem, backward: AdjointOptions) -> str:
    """Why the kernels cannot solve the adjoint ODE of a problem they can solve; "" if they can.

    Args:
        backend: "cpu" or "triton".
        problem: The call in normal form.
        backward: How the adjoint ODE is to be solved.
    """
    if FAMILIES.get(backward.method) not in (FIXED, ADAPTIVE):
        return f"the adjoint_method {backward.method} is no explicit Runge-Kutta method"
    if not all(isinstance(x, (int, float)) for x in (backward.rtol, backward.atol)):
        return "adjoint_rtol or adjoint_atol is a tensor"
    if backward.options.get("norm") not in (None, "seminorm"):
        return "the adjoint ODE has a norm of its own"
    for name in ("step_t", "jump_t", "grid_constructor", "perturb"):
        if name in backward.options:
            return f"the adjoint ODE has the option {name}"
    is_adaptive = FAMILIES[backward.method] == ADAPTIVE
    if backend == "triton" and problem.y0.dim() == 4 and not is_adaptive:
        return "of a convolutional field's adjoint ODE the kernels know adaptive steps only"
    if backend == "triton" and is_adaptive and backward.options.get("norm") != "seminorm":
        return (
            "the adjoint ODE's norm includes the parameters; "
            "adjoint_options={'norm': 'seminorm'} would do"
        )
    return ""


def why_not_tensors(spec: Spec, y0: Tensor, parameters: Sequence[Any]) -> str:
    """Why kernels cannot read the memory of a state and a field's weights; "" if they can."""
    if not all(type(x) in _PLAIN for x in (y0, *parameters)):
        return "the state or a weight is no plain tensor"
    if tuple(p.shape for p in parameters) != shapes_of(spec):
        return "the layers have other shapes than the field was made with"
    if any(p.dtype != y0.dtype or p.device != y0.device for p in parameters):
        return "the weights have another dtype or device than the state"
    return ""


def why_not_now(device_type: str) -> str:
    """What forbids native calls whatever the problem."""
    if torch.is_autocast_enabled(device_type):
        return "autocast is on"
    return transform()


def transform() -> str:
    """Which transform runs over the call, that takes operations one by one; "" if none."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "it runs under a torch.func transform"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is on"
    return ""


def casts(field: Field, x: Tensor) -> bool:
    """Whether a field that the kernels know is to be solved in its own precision despite autocast.

    Args:
        field: The field.
        x: The state, or its data columns.
    """
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return False
    return field.tensors()[0].dtype in (torch.float32, torch.float64)


def widened(x: Tensor) -> Tensor:
    """Half precision, which autocast makes, as float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _width(spec: Spec) -> int:
    """Columns, or channels, of the state."""
    return spec.channels if isinstance(spec, ConvSpec) else spec.dim


@functools.lru_cache(maxsize=256)
def shapes_of(spec: Spec) -> tuple[tuple[int, ...], ...]:
    """Of weight and bias of every layer."""
    if isinstance(spec, Program):
        shapes: tuple[tuple[int, ...], ...] = spec.shapes
        return shapes
    if isinstance(spec, ConvSpec):
        C, K, T = spec.channels, spec.num_filters, int(spec.time_dependent)
        layers = (K, T + C, 1, 1), (K, T + K, 3, 3), (C, T + K, 1, 1)
        return tuple(shape for weight in layers for shape in (weight, weight[:1]))
    widths = (spec.dim + spec.time_dependent, *spec.hidden, spec.dim)
    return tuple(shape for n, m in itertools.pairwise(widths) for shape in ((m, n), (m,)))


def has_hooks(func: Any) -> bool:
    """Whether something would run beside a module's own forward, or in its place."""
    members = func.__dict__
    return bool(
        "forward" in members
        or members["_forward_hooks"]
        or members["_forward_pre_hooks"]
        or members["_backward_hooks"]
        or members["_backward_pre_hooks"]
        or nn.modules.module._has_any_global_hook()
    )


def has_callbacks(func: Any) -> bool:
    """Whether the user's field wants to be told of steps."""
    # Not of the object by hasattr, which takes a module a microsecond for each name.
    kind = type(func)
    return not _CALLBACKS.isdisjoint(getattr(func, "__dict__", ())) or any(
        hasattr(kind, name) for name in _CALLBACKS
    )


# --- what runs a call -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Native:
    """A call prepared for the kernels: everything but the tensors and times.

    Attributes:
        backend: "cpu" or "triton".
        solve: The kernels' part, a kernels.cpu.solve.Solve or a kernels.gpu.solve.Solve.
        method: Name of the method.
        keep_steps: Whether checkpoints stay in memory until the backward pass; if not, it solves
            once more to get them.
        fixed: Whether it takes fixed steps.
        step_size: Their size, None for steps from each output time to the next.
        by_row: Whether every row takes its own steps.
        backwards: Whether the user's time is minus the solver's.
        columns: Zeros that the kernels append to a row of the input.
        adjoint: For the continuous gradient, what solves the adjoint ODE; None for the discrete.
        seminorm: Whether its norm leaves the parameters out.
    """

    backend: str
    solve: Any
    method: str
    keep_steps: bool
    fixed: bool
    step_size: float | None
    by_row: bool
    backwards: bool
    columns: int
    adjoint: Native | None = None
    seminorm: bool = False


def prepare(
    backend: str,
    problem: Problem,
    spec: Spec,
    data_dim: int,
    keep_steps: bool = True,
    by_row: bool = False,
    backward: AdjointOptions | None = None,
) -> Native:
    """What runs a problem that `why_not` (and `why_not_adjoint`) have nothing against.

    Args:
        backend: "cpu" or "triton".
        problem: The problem.
        spec: Of its field.
        data_dim: Columns (or channels) of the input; the others of the state start at zero.
        keep_steps, by_row: As in `Plan`.
        backward: How to solve the adjoint ODE for the continuous gradient; None: the discrete one.
    """
    options = problem.options
    fixed = problem.family == FIXED
    method, settings = settings_of(problem, by_row)
    solve = _maker(backend, spec)(
        *(field_of(backend, spec), method, problem.y0.dtype), data_dim=data_dim, **settings
    )
    native = Native(
        backend,
        solve,
        problem.method,
        keep_steps,
        fixed,
        options.get("step_size"),
        by_row,
        problem.backwards,
        _width(spec) - data_dim,
    )
    if backward is None:
        return native
    own = {name: value for name, value in backward.options.items() if name != "norm"}
    adjoint_problem = make_problem(
        problem.original,
        torch.zeros(1, *problem.y0.shape[1:], dtype=problem.y0.dtype),
        problem.t.detach(),  # of which only the direction counts
        rtol=backward.rtol,
        atol=backward.atol,
        method=backward.method,
        options=own,
        warn=False,
    )
    seminorm = backward.options.get("norm") == "seminorm"
    adjoint = prepare(backend, adjoint_problem, spec, data_dim)
    return dataclasses.replace(native, adjoint=adjoint, seminorm=seminorm)


def settings_of(problem: Problem, by_row: bool = False) -> tuple[interface.Method, dict[str, Any]]:
    """Method and options of a problem as kernels take them."""
    options = problem.options
    fixed = problem.family == FIXED
    tableau = TABLEAUS[problem.method]
    settings: dict[str, Any] = {"safety": 0.9, "ifactor": 10.0, "dfactor": 0.2}
    settings["max_step"] = float("inf")
    for name in ("first_step", "safety", "ifactor", "dfactor", "min_step", "max_step"):
        if name in options:
            settings[name] = options[name]
    method = _fixed_method(tableau, options.get("interp", "cubic")) if fixed else _method(tableau)
    return method, dict(
        control=interface.FIXED if fixed else interface.SAMPLE if by_row else interface.BATCH,
        backwards=problem.backwards,
        float_time=options.get("dtype") == torch.float32 and problem.y0.dtype == torch.float32,
        rtol=problem.rtol,
        atol=problem.atol,
        max_num_steps=min(int(options.get("max_num_steps", DEFAULT_MAX_STEPS)), 2**63 - 1),
        **settings,
    )


def described(problem: Problem, spec: Spec, by_row: bool) -> str:
    """How the Triton kernels would solve a problem that they can solve."""
    solve = prepare("triton", problem, spec, _width(spec), by_row=by_row).solve
    return str(solve.describe(problem.y0.shape, problem.y0.device))


def _maker(backend: str, spec: Spec) -> Callable[..., Any]:
    """What makes a backend's solves."""
    if backend == "cpu":
        loaded = library.load()
        if loaded is None:
            raise RuntimeError(library.missing())
        return functools.partial(cpu.Solve, loaded)
    kernels: Any = gpu.load(isinstance(spec, ConvSpec))
    if kernels is None:
        raise RuntimeError(gpu.missing())
    make: Callable[..., Any] = kernels.Solve
    return make


def field_of(backend: str, spec: Spec) -> interface.Field | interface.ConvField | Program:
    """The field as the kernels of a backend take it."""
    if isinstance(spec, Program):
        return spec
    if backend == "cpu" and isinstance(spec, MLPSpec):
        return program_of(spec)
    number = ACTIVATIONS.index(spec.activation)
    if isinstance(spec, ConvSpec):
        shape = spec.channels, spec.num_filters
        return interface.ConvField(*shape, number, spec.time_dependent)
    return interface.Field(spec.dim, spec.hidden, number, spec.time_dependent)


@functools.cache
def _method(tableau: ButcherTableau) -> interface.Method:
    return interface.Method(
        tableau.order,
        tableau.c_float,
        tableau.a_float,
        tableau.b_float,
        tableau.b_err_float,
        tableau.interpolant_float,
        tableau.solution_is_last_stage,
    )


@functools.cache
def _fixed_method(tableau: ButcherTableau, interp: str) -> interface.Method:
    """A fixed-step method with its interpolant in the form that adaptive ones have.

    The cubic one through both ends with their slopes (Hairer, Norsett, Wanner, Solving ODEs I, 2nd
    ed., II.6, equation (6.7)) takes the slope at the end as one stage more.
    """
    c, a, b = tableau.c_float, tableau.a_float, tableau.b_float
    none = (0.0,) * len(b)
    if interp == "linear":
        return interface.Method(
            tableau.order, c, a, b, none, [(w, 0.0, 0.0, 0.0) for w in b], False
        )
    last = len(b)
    rows = [[0.0, 3 * w, -2 * w, 0.0] for w in (*b, 0.0)]
    for stage, slope in ((0, (1.0, -2.0, 1.0)), (last, (0.0, -1.0, 1.0))):
        for power, weight in enumerate(slope):
            rows[stage][power] += weight
    return interface.Method(
        tableau.order, (*c, 1.0), (*a, b), (*b, 0.0), (*none, 0.0), rows, True, last_on_demand=True
    )


# --- remembered calls -----------------------------------------------------------------------------

_remembered: dict[tuple[Any, ...], Native] = {}
_MOST_REMEMBERED = 1024


@dataclass(slots=True)
class Memo:
    """Where a call is remembered, what runs it if it is, its solver times, the field's tensors."""

    settings: tuple[Any, ...]
    native: Native | None
    times: list[float]
    tensors: list[Tensor]


def look_up(field: Any, x: Tensor, t: Any, key: tuple[Any, ...]) -> Memo | None:
    """Whether a call like this one was remembered; None for a call that cannot be.

    Args:
        field: An MLPField or a ConvField, not of a subclass, or a `Recognized` callable.
        x: The state, or its data columns.
        t: Times.
        key: What else tells calls apart.
    """
    if type(x) is not Tensor or type(t) is not Tensor or t.requires_grad or t.dim() != 1:
        return None
    if x.dim() not in (2, 4) or why_not_now(x.device.type):
        return None
    if isinstance(field, nn.Module):
        if not _CALLBACKS.isdisjoint(field.__dict__) or has_hooks(field):
            return None
    times = t.tolist()
    backwards = times[0] > times[-1] if times else False
    if backwards:
        times = [-time for time in times]
    if len(times) < 2 or not all(map(operator.lt, times, times[1:])):
        return None
    if math.isinf(times[0]) or math.isinf(times[-1]):
        return None
    dtype, device, tensors = x.dtype, x.device, field.tensors()
    for tensor in tensors:
        if type(tensor) not in _PLAIN or tensor.dtype is not dtype or tensor.device != device:
            return None
    settings = (
        *key,
        *field.signature(),
        *(dtype, device, x.shape[1], x.dim(), t.dtype, backwards),
        *[tensor.shape for tensor in tensors],
    )
    return Memo(settings, _remembered.get(settings), times, tensors)


def remember(memo: Memo, native: Native) -> None:
    """Lets `look_up` find what runs the call."""
    if len(_remembered) >= _MOST_REMEMBERED:
        _remembered.clear()
    _remembered[memo.settings] = native


@functools.lru_cache(maxsize=64)
def _grid(times: tuple[float, ...], dtype: torch.dtype, step_size: float) -> list[float]:
    return step_grid(torch.tensor(times, dtype=dtype), step_size)


# --- running it -----------------------------------------------------------------------------------


@dataclass(slots=True)
class Call:
    """One call.

    Attributes:
        native: What runs it.
        field: The field, which counts its evaluations.
        times: Output times, increasing solver time.
        grid: Grid of fixed steps; if empty it is made from the times.
        problem: Makes the problem in normal form from x, for errors; for second derivatives from
            x, the field's tensors and the user's times as they were.
        expected: What the field's own code gives at the start, for some of the first rows; of
            images on a GPU, whether that differs from the field's value: a bool on the device.
        stats: The counts.
        checkpoints: Of the forward solve.
        later: Of a captured one: what finds its outcome.
    """

    native: Native
    field: Field
    times: list[float]
    grid: Sequence[float]
    problem: Callable[..., Problem]
    expected: Tensor | None = None
    stats: SolveStats = dataclasses.field(default_factory=SolveStats)
    checkpoints: Any = None
    later: Any = None

    def user_times(self) -> list[float]:
        """The times in the user's terms."""
        return [-time for time in self.times] if self.native.backwards else self.times

    def set_grid(self, dtype: torch.dtype) -> None:
        """Makes the grid, in the dtype of the user's t, if there is to be one and is none."""
        native = self.native
        if native.fixed and not self.grid:
            self.grid = self.times
            if native.step_size is not None:
                self.grid = _grid(tuple(self.times), dtype, native.step_size)

    def solve(self, x: Tensor, parameters: Sequence[Tensor], keep: bool) -> Tensor:
        """The solution, [times, *state]; sets `checkpoints` if `keep`."""
        solution: Tensor
        if x.stride(1) != 1 or x.dim() > 2 or x.is_neg():
            x = dense(x)
        parameters = [dense(p) for p in parameters]
        solution, result, checkpoints = self.native.solve.forward(
            x, parameters, self.times, self.grid, keep, self.expected
        )
        self.expected = None  # the gradient may solve once more
        self.field.count(result.nfe)
        stats = self.stats
        if result.later:  # in a CUDA graph, which may run any number of times
            stats = self.stats = DeviceStats(later=functools.partial(_counts, result.later))
            self.later = result.later
        stats.backend, stats.method = self.native.backend, self.native.method
        stats.nfe, stats.accepted, stats.rejected = result.nfe, result.accepted, result.rejected
        stats.launches += result.launches
        if result.status == interface.FIELD_DIFFERS:
            raise FieldDiffers
        if result.status:
            if result.status <= Status.NON_FINITE:
                stats.status = Status(result.status)
            raise failure(self.problem(x), self.native.by_row, result, solution)
        self.checkpoints = checkpoints
        return solution

    def gradient(
        self,
        grad: Tensor,
        solution: Tensor | None,
        x: Tensor,
        parameters: Sequence[Tensor],
        needs: Sequence[bool],
    ) -> list[Tensor | None]:
        """Gradients for x and the parameters, None where not needed."""
        native, (for_x, *wanted) = self.native, needs
        grad = dense(grad)
        parameters = [dense(p) for p in parameters]
        like_x = x if for_x else None
        grads: Sequence[Tensor | None]
        solved_again = 0
        if native.adjoint is not None and solution is not None:
            x_grad, grads, result = native.adjoint.solve.continuous_gradient(
                *(solution, parameters, self.times, grad, like_x, wanted),
                self._adjoint_grid(native.adjoint),
                native.seminorm,
            )
        else:
            once_more = self.checkpoints is None
            if once_more:
                self.solve(x, parameters, keep=True)
            x_grad, grads, result = native.solve.discrete_gradient(
                self.checkpoints, parameters, grad, like_x, any(wanted)
            )
            if once_more:
                solved_again = self.stats.nfe
                self.checkpoints = None
        self.stats.nfe_backward = result.nfe + solved_again
        self.stats.launches += result.launches
        if result.later and isinstance(self.stats, DeviceStats):
            self.stats.later = functools.partial(_counts, self.later, result.later)
        self.field.count(result.nfe)
        if result.status:
            raise _adjoint_failure(self.problem(x), result)
        found = [g if need else None for g, need in zip(grads, wanted, strict=False)]
        return [x_grad, *(found or [None] * len(wanted))]

    def _adjoint_grid(self, adjoint: Native) -> list[float]:
        """Fixed steps of the adjoint ODE in negated time, from each output time to the one before.

        Empty if it chooses its steps.
        """
        if not adjoint.fixed:
            return []
        ends = [-time for time in reversed(self.times)]
        if adjoint.step_size is None:
            return ends
        grid: list[float] = []
        for interval in itertools.pairwise(ends):
            grid += _grid(interval, torch.float64, adjoint.step_size)
        return grid


def _counts(
    forward: Callable[[], Any], backward: Callable[[], Any] | None = None
) -> dict[str, Any]:
    """What `SolveStats` says of a solve, and its gradient, whose outcomes are on the device."""
    result = forward()
    return dict(
        nfe=result.nfe,
        nfe_backward=backward().nfe if backward else 0,
        accepted=result.accepted,
        rejected=result.rejected,
        status=Status(min(result.status, Status.NON_FINITE)),  # that of the input too
    )


def dense(x: Tensor) -> Tensor:
    """The same numbers as the memory is to have them: contiguous, and no negated view."""
    return x if x.is_contiguous() and not x.is_neg() else x.contiguous().resolve_neg()


def failure(problem: Problem, by_row: bool, result: Any, solution: Tensor) -> Exception:
    """The error that the reference path raises where the kernels stopped."""
    status = result.status
    if status == interface.OUT_OF_MEMORY:
        return MemoryError("anode_fast: no memory for the solve")
    if problem.family == FIXED:
        return problem.non_finite_output(result.output)
    budget = int(problem.options.get("max_num_steps", DEFAULT_MAX_STEPS))
    if by_row:
        if status == Status.MAX_STEPS:
            return failures.max_steps_of_rows(problem, budget, result.rows, result.t)
        finite = status == Status.UNDERFLOW
        return failures.stuck_rows(
            problem, result.row, result.rows, result.t, result.dt, is_finite=finite
        )
    y, f = result.last or (solution[0], solution[1])
    t, dt, accepted, rejected = result.t, result.dt, result.accepted, result.rejected
    if status == Status.MAX_STEPS:
        return failures.max_steps(problem, budget, t, dt, accepted, rejected)
    if status == Status.UNDERFLOW:
        return failures.underflow(problem, t, dt, accepted, rejected, y)
    return failures.non_finite(problem, t, dt, accepted + rejected, f)


def _adjoint_failure(problem: Problem, result: Any) -> Exception:
    """The same for the adjoint ODE."""
    if result.status == interface.OUT_OF_MEMORY:
        return MemoryError("anode_fast: no memory for the gradient")
    if result.status == interface.NON_FINITE_INPUT:
        return NonFiniteState(
            "non-finite values in state: the gradient of the loss with respect to the solution "
            "holds nan or inf, and the adjoint ODE starts from it. Look at the loss."
        )
    t, dt, accepted, rejected = result.t, result.dt, result.accepted, result.rejected
    if result.status == Status.MAX_STEPS:
        return failures.max_steps(problem, accepted + rejected, t, dt, accepted, rejected)
    if result.status == Status.UNDERFLOW:
        return failures.underflow(problem, t, dt, accepted, rejected, problem.y0)
    return failures.non_finite(problem, t, dt, accepted + rejected, problem.y0)


class FieldDiffers(Exception):
    """The kernels' field is not the user's own code at the start of a solve."""


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, x: Tensor, *parameters: Tensor) -> Tensor:
        continuous = call.native.adjoint is not None
        solution = call.solve(x, parameters, call.native.keep_steps and not continuous)
        ctx.call = call
        ctx.save_for_backward(solution if continuous else None, x, *parameters)
        return solution

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        call: Call = ctx.call
        solution, x, *parameters = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled() or is_batched(grad):
            return None, *_differentiable_gradient(call, grad, x, parameters, needs)
        return None, *call.gradient(grad, solution, x, parameters, needs)


def is_batched(grad: Tensor) -> bool:
    """Whether vmap (is_grads_batched, vectorized Jacobians) runs over the backward pass."""
    functorch: Any = torch._C._functorch
    return bool(
        functorch.is_functorch_wrapped_tensor(grad) or functorch.is_legacy_batchedtensor(grad)
    )


def _differentiable_gradient(
    call: Call, grad: Tensor, x: Tensor, parameters: Sequence[Tensor], needs: Sequence[bool]
) -> list[Tensor | None]:
    """The gradient by autograd through the reference solver: it can be differentiated again."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        # Aliases: an input may be made of another one, or be the same tensor twice.
        x, *parameters = (p.view_as(p) for p in (x, *parameters))
        problem = call.problem(x, parameters, call.user_times())
        stats = SolveStats()
        solution = reference.solve(problem, stats, by_row=call.native.by_row)
        call.stats.nfe_backward = stats.nfe
        return gradients_of(solution, (x, *parameters), grad, needs, create_graph)


def gradients_of(
    value: Tensor,
    inputs: Sequence[Tensor],
    grad: Tensor,
    needs: Sequence[bool],
    create_graph: bool,
) -> list[Tensor | None]:
    """By autograd, from a cotangent of the value: of the inputs, None where not needed."""
    wanted = [x for x, need in zip(inputs, needs, strict=True) if need]
    grads = iter(
        torch.autograd.grad(
            [value], wanted, [grad], create_graph=create_graph, materialize_grads=True
        )
    )
    return [next(grads) if need else None for need in needs]


def run(call: Call, x: Tensor, parameters: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Solves; if a gradient is wanted, with a graph. [times, *state].

    Args:
        call: The call.
        x: Data columns (or channels) of the initial state.
        parameters: The field's tensors.
        dtype: Of the user's t: the grid is made in it.

    Raises:
        SolverError: The solve cannot go on.
    """
    call.set_grid(dtype)
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in parameters)):
        solution: Tensor = _Solve.apply(call, x, *parameters)
        return solution
    return call.solve(x, parameters, keep=False)
