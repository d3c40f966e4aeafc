"""A call of the solver, validated and brought to one normal form: `Problem`.

Solvers see increasing time on the host, one flat state tensor, one field, numbers for tolerances.
That the user's time ran backwards, that the state was a tuple or in half precision, is known only
here.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from anode_fast.distributed import SharedNorm
from anode_fast.errors import InvalidArgument, InvalidType, NonFiniteState
from anode_fast.tableau import TABLEAUS, ButcherTableau
from anode_fast.vector_field import HERE, NEXT, Layout, VectorField

State = Tensor | tuple[Tensor, ...]
Norm = Callable[[Any], Tensor | float]

ADAPTIVE, FIXED, ADAMS, IMPLICIT, SCIPY = "adaptive", "fixed", "adams", "implicit", "scipy"

FAMILIES: dict[str, str] = {
    **{
        name: ADAPTIVE if tableau.adaptive else IMPLICIT if tableau.implicit else FIXED
        for name, tableau in TABLEAUS.items()
    },
    "explicit_adams": ADAMS,
    "implicit_adams": ADAMS,
    "fixed_adams": ADAMS,
    "scipy_solver": SCIPY,
}
"""Every method and the family of its solver."""

_GRID_OPTIONS = {"step_size", "grid_constructor", "perturb", "interp", "jump_t", "norm"}
OPTIONS: dict[str, set[str]] = {
    ADAPTIVE: {
        *("first_step", "safety", "ifactor", "dfactor", "min_step", "max_step"),
        *("max_num_steps", "dtype", "step_t", "jump_t", "norm"),
    },
    FIXED: _GRID_OPTIONS,
    ADAMS: _GRID_OPTIONS | {"max_order", "max_iters", "implicit"},
    IMPLICIT: _GRID_OPTIONS | {"max_iters"},
    SCIPY: {"solver", "min_step", "max_step", "norm"},
}
"""The options that each family knows. Others get a warning that names them."""

_RIGHT_NAMES = {
    "stepsize": "step_size",
    "max_steps": "max_num_steps",
    "max_nfe": "max_num_steps",
    "grid_points": "step_t",
    "eps": "perturb",
}
_COUNTERPARTS = {(ADAPTIVE, "step_size"): "first_step", (ADAPTIVE, "grid_constructor"): "step_t"}

DEFAULT_MAX_STEPS = 100_000
"""Budget of an adaptive solve when the caller gives none. Attempts count, accepted or not."""

DEFAULT_MAX_STEPS_TO_EVENT = 4_000
"""The same for a search for an event, which need not exist."""

MAX_GRID = 10_000_000
"""Longest grid of a fixed-step method."""


class Arithmetic(Protocol):
    """What a step of an explicit Runge-Kutta method computes beside the field."""

    def stages(
        self,
        tableau: ButcherTableau,
        field: VectorField,
        interval: Any,
        y: Tensor,
        f0: Tensor | None,
        sides: tuple[int, int],
    ) -> tuple[Tensor, list[Tensor]]:
        """The solution at the end of a step and its stage derivatives, the first unless given.

        Stages at the very start and end of the step are evaluated on these sides of it, in case the
        field jumps there.
        """
        ...

    def combine(
        self, y: Tensor | None, ks: Sequence[Tensor], weights: Sequence[Any], h: Any
    ) -> Tensor:
        """Returns y + h * sum_j weights[j] * ks[j]; y=None: the sum alone."""
        ...

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
        ...


def rms_norm(x: Tensor) -> Tensor:
    """Root mean square of all entries; 0 for an empty tensor."""
    norm: Tensor = torch.linalg.vector_norm(x)
    return norm / math.sqrt(max(x.numel(), 1))


def mixed_norm(parts: Sequence[Tensor]) -> Tensor | float:
    """The largest `rms_norm` of the parts of a tuple state."""
    return torch.stack([rms_norm(part) for part in parts]).amax() if parts else 0.0


def underlying(x: Tensor) -> Tensor:
    """The tensor inside the wrappers of torch.func: under vmap that of all examples."""
    functorch: Any = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        x = functorch.get_unwrapped(x)
    return x


def number(x: Tensor | float) -> float:
    """A number on the host; under vmap the largest one of all examples, which share their steps."""
    if isinstance(x, Tensor) and (inside := underlying(x)) is not x:
        return float(inside.max())
    return float(x)


class NormOfParts:
    """A norm of a tuple state as one of the flat state.

    Args:
        norm: Of the tuple. May have the attribute `sizes`.
        layout: The tuple's.

    Attributes:
        sizes: Of the first parts of the state, if the norm is the largest `rms_norm` of those, else
            None.
    """

    def __init__(self, norm: Norm, layout: Layout) -> None:
        self._norm = norm
        self._unpack = layout.unpack
        known = layout.sizes if norm is mixed_norm else getattr(norm, "sizes", None)
        self.sizes: tuple[int, ...] | None = None if known is None else tuple(known)

    def __call__(self, x: Tensor) -> Tensor | float:
        """The norm of a flat state."""
        return self._norm(self._unpack(x))


@dataclass
class Problem:
    """One call in normal form.

    Attributes:
        field: The field, in solver time.
        y0: State at times[0], contiguous or not, in the solver's dtype; flat for a tuple state.
        times: Output times in solver time, strictly increasing.
        shifts: None, or one zero-valued 0-d tensor per output time that carries the gradient with
            respect to the user's t (solver time).
        rtol, atol: Numbers, or tensors that broadcast against y0.
        norm: Maps the scaled error to a number; gets what the user calls the state.
        method, family: Name of the method and of its family.
        options: The options the method knows, with times in solver time.
        event_fn: None, or a function (solver time, y) whose sign change ends the solve.
        t: The user's times.
        state_dtype: dtype of the user's state.
        layout: The user's tuple, or None for one tensor.
        original: The user's own callable.
        arithmetic: How steps compute; None: by PyTorch operations.
        shared: The norm by which several processes decide together, or None.
        suggested_step: The step an adaptive solve would take next; set by the solver.
    """

    field: VectorField
    y0: Tensor
    times: list[float]
    shifts: list[Tensor] | None
    rtol: float | Tensor
    atol: float | Tensor
    norm: Norm
    method: str
    family: str
    options: dict[str, Any]
    event_fn: Callable[[float, Tensor], Tensor] | None
    t: Tensor
    state_dtype: torch.dtype
    layout: Layout | None
    original: Callable[..., Any]
    arithmetic: Arithmetic | None = None
    shared: SharedNorm | None = None
    suggested_step: float | None = None

    @property
    def backwards(self) -> bool:
        """Whether the user's time decreases."""
        return self.field.backwards

    @property
    def perturb(self) -> bool:
        """Whether a fixed-step method evaluates next to its grid points, in case of jumps there."""
        return bool(self.options.get("perturb", "jump_t" in self.options))

    @property
    def start_side(self) -> int:
        """The side of times[0] on which the method evaluates the field first."""
        if self.family == ADAPTIVE:
            return NEXT if self.times[0] in self.options.get("jump_t", ()) else HERE
        return NEXT if self.family != SCIPY and self.perturb else HERE

    def restore(self, solution: Tensor) -> State:
        """What the user gets for `solution`, [times, *state] in the solver's form."""
        if self.layout:
            return self.layout.unpack(solution, (solution.shape[0],))
        return solution if solution.dtype == self.state_dtype else solution.to(self.state_dtype)

    def non_finite_output(self, index: int) -> NonFiniteState:
        """The error for a solution whose first nan or inf is at output time `index`."""
        before = self.t[max(index - 1, 0)].item()
        return NonFiniteState(
            f"non-finite values in state: nan or inf first seen at t={self.t[index].item():.9g} "
            f"(finite at t={before:.9g}) with the fixed-step method {self.method}. Use smaller "
            "steps (options['step_size']), an adaptive method, or look at the field's weights "
            "and inputs."
        )

    def callback(self, name: str) -> Callable[[float, Tensor, float], None] | None:
        """The user's `callback_...` attribute in solver form, or None if there is none."""
        call = getattr(self.original, name, None)
        if call is None:
            return None
        device, dtype = self.y0.device, torch.float64

        def in_user_terms(t0: float, y0: Tensor, dt: float) -> None:
            t = torch.scalar_tensor(self.field.user_time(t0), dtype=dtype, device=device)
            state = self.layout.unpack(y0) if self.layout else y0
            call(t, state, torch.scalar_tensor(dt, dtype=dtype, device=device))

        return in_user_terms

    def grid(self) -> list[tuple[float, Tensor | None]]:
        """Grid points of a fixed-step method, each with its shift (None: nothing flows to t).

        Raises:
            InvalidArgument: A grid that does not run from the first to the last output time.
        """
        step_size: float | None = self.options.get("step_size")
        constructor: Callable[..., Tensor] | None = self.options.get("grid_constructor")
        first, last = (self.shifts[0], self.shifts[-1]) if self.shifts else (None, None)
        if step_size is not None:
            is_short = self.times[-1] - self.times[0] < 10_000 * step_size
            make = known_grid if is_short else known_grid.__wrapped__
            grid = make(tuple(self.times), self.t.dtype, step_size)
        elif constructor is not None:
            state = self.layout.unpack(self.y0) if self.layout else self.y0
            # As torchdiffeq does it, the constructor sees the user's own time.
            points = constructor(self.original, state, self.t.detach())
            grid = (-points if self.backwards else points).detach().cpu().tolist()
        else:  # one step from each output time to the next
            shifts: Sequence[Tensor | None] = self.shifts or [None] * len(self.times)
            return self._with_jumps(list(zip(self.times, shifts, strict=True)))
        if not grid or grid[0] != self.times[0] or grid[-1] != self.times[-1]:
            raise InvalidArgument(
                f"odeint: grid_constructor must give times from t[0]={self.t[0].item():g} to "
                f"t[-1]={self.t[-1].item():g}, both included, got "
                f"{[self.field.user_time(point) for point in grid[:4]]}..."
            )
        if any(b <= a for a, b in zip(grid, grid[1:], strict=False)):
            raise InvalidArgument("odeint: the times of grid_constructor must be strictly monotone")
        inner: list[tuple[float, Tensor | None]] = [(point, first) for point in grid[:-1]]
        return self._with_jumps([*inner, (grid[-1], last)])

    def endless_grid(self) -> Iterator[tuple[float, Tensor | None]]:
        """Grid of a fixed-step search for an event: from times[0] on, step_size apart."""
        step_size = self.options.get("step_size")
        if step_size is None:
            raise InvalidArgument(
                f"odeint: an event with the fixed-step method {self.method} needs a step: "
                "options=dict(step_size=...)."
            )
        t, shift = self.times[0], self.shifts[0] if self.shifts else None
        jumps = [jump for jump in self.options.get("jump_t", ()) if jump > t]
        while True:
            yield t, shift
            t = t + step_size
            while jumps and jumps[0] <= t:
                jump = jumps.pop(0)
                if jump < t:
                    yield jump, None

    def _with_jumps(
        self, grid: list[tuple[float, Tensor | None]]
    ) -> list[tuple[float, Tensor | None]]:
        jumps = self.options.get("jump_t", ())
        known = {t for t, _ in grid}
        inside = [(t, None) for t in jumps if grid[0][0] < t < grid[-1][0] and t not in known]
        return sorted([*grid, *inside], key=lambda point: point[0]) if inside else grid


def all_finite(x: Tensor) -> bool:
    """Whether no entry is nan or infinite."""
    # One pass tells, unless a sum of finite numbers overflows.
    if not x.is_complex() and math.isfinite(x.sum().item()):
        return True
    return bool(torch.isfinite(x).all())


@functools.lru_cache(maxsize=64)
def known_grid(times: tuple[float, ...], dtype: torch.dtype, step_size: float) -> list[float]:
    """`step_grid` of times in that dtype. Not to be changed."""
    return step_grid(torch.tensor(times, dtype=dtype), step_size)


def step_grid(t: Tensor, step_size: float) -> list[float]:
    """Times from t[0] to t[-1] (solver time), step_size apart but for the last step.

    In t's own dtype, as torchdiffeq does it: rounding decides whether 0.3 / 0.1 is 3 steps.

    Raises:
        InvalidArgument: More than `MAX_GRID` steps.
    """
    steps = math.ceil(((t[-1] - t[0]) / step_size + 1).item())
    if steps > MAX_GRID:
        raise InvalidArgument(
            f"odeint: step_size={step_size} makes {steps - 1} steps over an interval of length "
            f"{(t[-1] - t[0]).item():g}; at most {MAX_GRID} are taken. Use a larger step_size."
        )
    end = float(t[-1])
    points = (torch.arange(0, steps - 1, dtype=t.dtype) * step_size + t[0]).tolist()
    # torchdiffeq keeps a point that rounding puts at the end or past it: a step of nothing.
    grid = [*(point for point in points if point < end), end]
    if any(b <= a for a, b in itertools.pairwise(grid)):
        raise InvalidArgument(
            f"odeint: step_size={step_size} is below the rounding of t in {t.dtype}. Use a larger "
            "step_size, or t.double()."
        )
    return grid


_AnyState = TypeVar("_AnyState", bound=State)


def pad(x: _AnyState, columns: int) -> _AnyState:
    """The state x with zeros appended along dim 1."""
    if not columns or not isinstance(x, Tensor):
        return x
    # F.pad counts from the last dim.
    return F.pad(x, (0, 0) * (x.dim() - 2) + (0, columns))  # type: ignore[return-value]


def make_problem(
    func: Callable[..., Any],
    y0: State,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    event_fn: Callable[..., Any] | None = None,
    warn: bool = True,
    shared: SharedNorm | None = None,
) -> Problem:
    """Checks the arguments of a solve and brings them to normal form. Evaluates nothing.

    Raises:
        InvalidArgument, InvalidType: With where, got, wanted and what to do.
        NonFiniteState: y0 holds nan or inf.

    `shared` as in `Problem`, if the option norm does not say so.
    """
    if not callable(func):
        raise InvalidType(f"odeint: func is a {type(func).__name__}, want a callable func(t, y)")
    if isinstance(options, Mapping) and isinstance(options.get("norm"), SharedNorm):
        shared = options["norm"]
    # One process must not stop alone: the others would wait for it. The norm will be nan for all.
    layout, state = _check_state(y0, is_finite=shared is None)
    method = "dopri5" if method is None else method
    if not isinstance(method, str) or method not in FAMILIES:
        close = difflib.get_close_matches(str(method), FAMILIES, n=1)
        hint = f' Did you mean "{close[0]}"?' if close else ""
        raise InvalidArgument(
            f'odeint: invalid method "{method}".{hint} Methods are: {", ".join(FAMILIES)}.'
        )
    family = FAMILIES[method]
    if event_fn is not None and not callable(event_fn):
        raise InvalidType(
            f"odeint: event_fn is a {type(event_fn).__name__}, want a callable event_fn(t, y)"
        )
    times, backwards = _check_times(t, event_fn is not None)
    state_dtype = state.dtype
    narrow = state_dtype in (torch.float16, torch.bfloat16)
    field = VectorField(
        func,
        state_dtype=state_dtype,
        device=state.device,
        layout=layout,
        backwards=backwards,
        accumulate_dtype=torch.float32 if narrow else None,
    )
    shifts = None
    if t.requires_grad:
        solver_t = -t if backwards else t
        shifts = list((solver_t - solver_t.detach()).unbind())
    kept = _check_options(method, family, options, len(times), backwards, event_fn, warn)
    norm = kept.pop("norm", None)
    if layout:
        norm = NormOfParts(norm or mixed_norm, layout)
    return Problem(
        field=field,
        y0=state.float() if narrow else state,
        times=times,
        shifts=shifts,
        rtol=_check_tolerance("rtol", rtol, state, layout),
        atol=_check_tolerance("atol", atol, state, layout),
        norm=norm or rms_norm,
        method=method,
        family=family,
        options=kept,
        event_fn=_normal_event(event_fn, field, state, times[0]) if event_fn else None,
        t=t,
        state_dtype=state_dtype,
        layout=layout,
        original=func,
        shared=shared,
    )


def _check_state(y0: State, is_finite: bool) -> tuple[Layout | None, Tensor]:
    if isinstance(y0, Tensor):
        parts: Sequence[Tensor] = (y0,)
    elif isinstance(y0, tuple) and y0 and all(isinstance(part, Tensor) for part in y0):
        parts = y0
    else:
        raise InvalidType(
            "odeint: y0 is a "
            f"{type(y0).__name__}{' (empty or not all tensors)' if isinstance(y0, tuple) else ''}, "
            "want a tensor or a tuple of tensors. A list or dict state goes in as tuple(y0) or "
            "tuple(y0.values()), and the field gets and returns that tuple."
        )
    for i, part in enumerate(parts):
        name = "y0" if len(parts) == 1 else f"y0[{i}]"
        if not (part.is_floating_point() or part.is_complex()):
            raise InvalidType(
                f"odeint: {name} has dtype {part.dtype}, want a floating point or complex dtype, "
                f"for example {name}.float()."
            )
        if part.device != parts[0].device:
            raise InvalidArgument(f"odeint: y0 lies on {parts[0].device} and {part.device}")
    layout = None if isinstance(y0, Tensor) else Layout(parts)
    state = layout.pack(parts) if layout else parts[0]
    values = underlying(state.detach())
    if is_finite and not all_finite(values):
        finite = torch.isfinite(values)
        bad = (~finite).sum().item()
        kind = "nan" if torch.isnan(values).any() else "inf"
        raise NonFiniteState(
            f"non-finite values in state y0: {kind} among {bad} of {values.numel()} entries before "
            "the first step. Look at what made y0."
        )
    return layout, state


def _check_times(t: Any, event: bool) -> tuple[list[float], bool]:
    if not isinstance(t, Tensor):
        raise InvalidType(
            f"odeint: t is a {type(t).__name__}, want a 1-D tensor of times, for example "
            "torch.tensor([0.0, 1.0])."
        )
    if not t.is_floating_point():
        raise InvalidType(
            f"odeint: t has dtype {t.dtype}, want a floating point dtype: t.float() or t.double()."
        )
    if t.dim() != 1:
        raise InvalidArgument(
            f"odeint: t has shape {tuple(t.shape)}, want one dim: a 1-D tensor of times."
        )
    times: list[float] = t.detach().double().tolist()  # the one host read of t
    if not times:
        raise InvalidArgument("odeint: t is empty, want at least one time")
    for i, time in enumerate(times):
        if not math.isfinite(time):
            raise InvalidArgument(f"odeint: t must be finite, got t[{i}]={time}")
    if event and len(times) != 2:
        raise InvalidArgument(
            f"odeint: with event_fn, t must have 2 entries (start and direction), got {len(times)}"
        )
    backwards = len(times) > 1 and times[0] > times[1]
    if backwards:
        times = [-time for time in times]
    for i in range(1, len(times)):
        if times[i] <= times[i - 1]:
            sign = -1 if backwards else 1
            raise InvalidArgument(
                "odeint: t must be strictly increasing or decreasing, got "
                f"t[{i - 1}]={sign * times[i - 1]} and t[{i}]={sign * times[i]}. Drop repeated "
                "times before the call, for example with torch.unique."
            )
    return times, backwards


def _check_tolerance(
    name: str, tolerance: Any, state: Tensor, layout: Layout | None
) -> float | Tensor:
    if layout and isinstance(tolerance, (tuple, list)):
        if len(tolerance) != len(layout.shapes):
            raise InvalidArgument(
                f"odeint: {name} has {len(tolerance)} entries for a state of {len(layout.shapes)} "
                "parts"
            )
        try:
            parts = [
                torch.as_tensor(part, dtype=torch.float64, device=state.device).expand(size)
                for part, size in zip(tolerance, layout.sizes, strict=True)
            ]
        except (TypeError, ValueError, RuntimeError):
            raise InvalidType(
                f"odeint: {name} is {tolerance!r}, want a number per part of the state, or one "
                "number for each of its entries"
            ) from None
        tolerance = torch.cat(parts)
    if not isinstance(tolerance, Tensor):
        try:
            value = float(tolerance)
        except (TypeError, ValueError):
            raise InvalidType(
                f"odeint: {name} is {tolerance!r}, want a number or a tensor"
            ) from None
        if not (math.isfinite(value) and value >= 0):
            raise InvalidArgument(f"odeint: {name} is {value}, want a finite number >= 0")
        return value
    if tolerance.requires_grad:
        raise InvalidArgument(f"odeint: {name} cannot require grad; pass {name}.detach()")
    if not (torch.isfinite(tolerance).all() and (tolerance >= 0).all()):
        raise InvalidArgument(f"odeint: {name} has entries that are negative or not finite")
    if tolerance.numel() == 1:
        return float(tolerance.item())
    try:
        tolerance.expand(state.shape)
    except RuntimeError:
        raise InvalidArgument(
            f"odeint: {name} of shape {tuple(tolerance.shape)} does not broadcast against the "
            f"state's shape {tuple(state.shape)}"
        ) from None
    real = state.dtype.to_real() if state.is_complex() else state.dtype
    return tolerance.to(device=state.device, dtype=real)


_POSITIVE = ("step_size", "first_step", "safety", "ifactor", "dfactor", "max_step")


def _check_options(
    method: str,
    family: str,
    options: Mapping[str, Any] | None,
    num_times: int,
    backwards: bool,
    event_fn: Callable[..., Any] | None,
    warn: bool,
) -> dict[str, Any]:
    if options is not None and not isinstance(options, Mapping):
        raise InvalidType(f"odeint: options is a {type(options).__name__}, want a dict")
    given = dict(options or {})
    known = OPTIONS[family]
    kept = {name: value for name, value in given.items() if name in known and value is not None}
    unknown = [name for name in given if name not in known]
    if unknown and warn:
        _warn(
            f"{method}: unexpected options are ignored: "
            + ", ".join(_describe_unknown(name, family) for name in unknown)
        )
    for name in _POSITIVE:
        if name in kept:
            kept[name] = _number(name, kept[name])
            if kept[name] <= 0:
                raise InvalidArgument(f"odeint: option {name} is {kept[name]}, want a number > 0")
    for name in ("step_size", "first_step"):
        if math.isinf(kept.get(name, 0.0)):
            raise InvalidArgument(f"odeint: option {name} is inf, want a finite number > 0")
    if "min_step" in kept:
        kept["min_step"] = _number("min_step", kept["min_step"])
    if "max_num_steps" in kept:
        budget = _number("max_num_steps", kept["max_num_steps"])
        if budget < 1 or math.isinf(budget):
            raise InvalidArgument(
                f"odeint: option max_num_steps is {budget:g}, want a finite number, at least 1"
            )
    if "max_iters" in kept:
        iters = _number("max_iters", kept["max_iters"])
        if iters < 1 or iters != int(iters):
            raise InvalidArgument(
                f"odeint: option max_iters is {kept['max_iters']!r}, want a positive integer"
            )
    for name in ("step_t", "jump_t"):
        if name in kept:
            kept[name] = _option_times(name, kept[name], backwards)
    if set(kept.get("step_t", ())) & set(kept.get("jump_t", ())):
        raise InvalidArgument("odeint: step_t and jump_t must not share times")
    if "dtype" in kept and kept["dtype"] not in (torch.float32, torch.float64):
        raise InvalidArgument(
            f"odeint: option dtype (of times) is {kept['dtype']}, want torch.float32 or "
            "torch.float64"
        )
    if kept.get("interp", "cubic") not in ("linear", "cubic"):
        raise InvalidArgument(
            f"odeint: option interp is {kept['interp']!r}, want 'linear' or 'cubic'"
        )
    if "step_size" in kept and "grid_constructor" in kept:
        raise InvalidArgument("odeint: step_size and grid_constructor exclude each other; give one")
    for name in ("norm", "grid_constructor"):
        if name in kept and not callable(kept[name]):
            raise InvalidType(f"odeint: option {name} is {kept[name]!r}, want a callable")
    on_output_times = family in (FIXED, ADAMS, IMPLICIT) and not (
        {"step_size", "grid_constructor"} & set(kept)
    )
    if on_output_times and num_times == 2 and not event_fn and warn:
        _warn(
            f"{method}: without the option step_size it takes one single step from t[0] to t[1]. "
            "Give options=dict(step_size=...) or more output times."
        )
    return kept


def _warn(message: str) -> None:
    """A warning that points at the line which called the package."""
    level, frame = 2, sys._getframe(1)
    ours = ("anode_fast.", "torch.nn.modules.")  # a block is called through nn.Module
    while frame.f_back and frame.f_globals.get("__name__", "").startswith(ours):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def _describe_unknown(name: str, family: str) -> str:
    right = _COUNTERPARTS.get((family, name)) or _RIGHT_NAMES.get(name)
    if right is None:
        if any(name in known for known in OPTIONS.values()):
            return f"{name} (known to other methods only)"
        close = difflib.get_close_matches(name, OPTIONS[family], n=1)
        right = close[0] if close else None
    return f"{name} (did you mean {right}?)" if right else name


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise InvalidType(f"odeint: option {name} is {value!r}, want a number") from None
    if math.isnan(number):
        raise InvalidArgument(f"odeint: option {name} is nan")
    return number


def _option_times(name: str, value: Any, backwards: bool) -> list[float]:
    if not isinstance(value, (Tensor, list, tuple)):
        raise InvalidType(f"odeint: option {name} is a {type(value).__name__}, want a 1-D tensor")
    times = torch.as_tensor(value, dtype=torch.float64).detach().reshape(-1).tolist()
    if not all(math.isfinite(time) for time in times):
        raise InvalidArgument(f"odeint: option {name} must be finite, got {times}")
    if len(set(times)) != len(times):
        raise InvalidArgument(f"odeint: option {name} has repeated times")
    return sorted(-time if backwards else time for time in times)


def _normal_event(
    event_fn: Callable[..., Any], field: VectorField, state: Tensor, t0: float
) -> Callable[[float, Tensor], Tensor]:
    """The user's event function in solver terms: one number, positive at the start."""
    dtype = state.dtype.to_real() if state.is_complex() else state.dtype
    layout, device = field.layout, state.device

    def raw(t: float | Tensor, y: Tensor) -> Tensor:
        if not isinstance(t, Tensor):
            t = torch.scalar_tensor(field.user_time(t), dtype=dtype, device=device)
        elif field.backwards:
            t = -t
        value = event_fn(t, layout.unpack(y) if layout else y)
        if not isinstance(value, Tensor) or value.is_complex():
            what = value.dtype if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise InvalidType(f"odeint: event_fn returned {what}, want a tensor of real numbers")
        return value

    with torch.no_grad():
        signs = torch.sign(raw(t0, state))

    def event(t: float | Tensor, y: Tensor) -> Tensor:
        return torch.min(raw(t, y) * signs)

    return event
