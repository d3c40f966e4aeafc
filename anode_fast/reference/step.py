"""What all solvers yield: accepted steps. And the arithmetic that steps share.

Every method yields `Step`s in increasing time. Output times, dense output, events and checkpoints
are written once, over steps, and know no method. A one-step method is a *recipe*: called with an
interval, the state and (if it carries one from step to step) the derivative at its start, it makes
the step. The discrete gradient calls the same recipe again.
"""

from __future__ import annotations

import dataclasses
import functools
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from anode_fast.vector_field import HERE, NEXT, PREV, VectorField

Factor = float | Tensor


@dataclass(slots=True)
class Interval:
    """[t0, t1] of one step, in solver time.

    `shift0` and `shift1` are zero-valued 0-d tensors through which the gradient with respect to the
    user's t flows, or None where none does. Under step_control="sample", t0 and t1 are tensors with
    one entry per row that broadcast against the state.
    """

    t0: float
    t1: float
    shift0: Tensor | None = None
    shift1: Tensor | None = None

    @property
    def h(self) -> Factor:
        """The step size: a float, or a tensor if a gradient flows through it."""
        dt = self.t1 - self.t0
        if self.shift0 is self.shift1:
            return dt
        return dt + moved(self.shift1, self.shift0)

    def at(self, c: float) -> tuple[float, Tensor | None]:
        """Time and shift at the node c in [0, 1]."""
        if c == 1:
            return self.t1, self.shift1
        t = self.t0 + c * (self.t1 - self.t0)
        if c == 0 or self.shift0 is self.shift1:
            return t, self.shift0
        part = c * moved(self.shift1, self.shift0)
        return t, part if self.shift0 is None else self.shift0 + part

    def inside(self, times: Sequence[float]) -> slice:
        """Which of the increasing `times`, the first one excepted, lie in (t0, t1]."""
        return slice(max(bisect_right(times, self.t0), 1), bisect_right(times, self.t1))

    def fraction(self, t: float, shift: Tensor | None) -> Factor:
        """(t - t0) / (t1 - t0), a tensor if a gradient flows through it."""
        if self.shift0 is None and self.shift1 is None and shift is None:
            return (t - self.t0) / (self.t1 - self.t0)
        return (t - self.t0 + moved(shift, self.shift0)) / self.h


def moved(a: Tensor | None, b: Tensor | None) -> Tensor:
    """The shift a - b, None standing for no shift."""
    if b is None:
        return torch.zeros(()) if a is None else a
    return -b if a is None else a - b


class Step(Protocol):
    """An accepted step.

    `f0` and `f1` are the derivatives that the step took over from the one before and hands to the
    next; None where a method evaluates anew. `recipe` makes the step again from (interval, y0, f0);
    None where nothing can, because the step depends on those before.
    """

    @property
    def interval(self) -> Interval:
        """Where the step leads from and to."""

    @property
    def y0(self) -> Tensor:
        """State at its start."""

    @property
    def y1(self) -> Tensor:
        """State at its end."""

    @property
    def f0(self) -> Tensor | None:
        """Derivative at its start, if taken over."""

    @property
    def f1(self) -> Tensor | None:
        """Derivative at its end, if handed on."""

    @property
    def recipe(self) -> Recipe | None:
        """What makes the step again."""

    def interpolate(self, times: Sequence[float], shifts: Sequence[Tensor | None]) -> Tensor:
        """The solution at `times` in [t0, t1], [len(times), *state]."""


Recipe = Callable[[Interval, Tensor, Tensor | None], Step]


def combine(y: Tensor | None, ks: Sequence[Tensor], weights: Sequence[Factor], h: Factor) -> Tensor:
    """Returns y + h * sum_j weights[j] * ks[j] without stacking the ks; y=None: the sum alone.

    With numbers this is one fused multiply-add per nonzero weight. Tensors (a gradient flows
    through time, or one step size per row; then all weights or h are tensors) take the general
    form.
    """
    if isinstance(h, Tensor) or isinstance(weights[0], Tensor):
        terms = [k * w for k, w in zip(ks, weights, strict=False) if isinstance(w, Tensor) or w]
        if not terms:
            return torch.zeros_like(ks[0]) if y is None else y
        change = functools.reduce(torch.add, terms) * h
        return (change if y is None else y + change).to(ks[0].dtype)
    out = None
    for k, w in zip(ks, weights, strict=False):
        if not w:
            continue
        hw: float = h * w  # type: ignore[assignment]  # no tensors here: see above
        if out is None:
            out = k * hw if y is None else torch.add(y, k, alpha=hw)
        elif out.requires_grad:  # autograd makes writing in place the slower way
            out = torch.add(out, k, alpha=hw)
        else:
            out.add_(k, alpha=hw)
    if out is None:
        return torch.zeros_like(ks[0]) if y is None else y
    return out


def hermite(step: Step, f0: Tensor, f1: Tensor, x: Factor) -> Tensor:
    """The cubic through y0 and y1 with slopes f0 and f1 at the fraction x of the step.

    Source: Hairer, Norsett, Wanner, Solving ODEs I, 2nd ed., II.6, equation (6.7).
    """
    rest = 1 - x
    return combine(
        step.y0,
        [step.y1 - step.y0, f0, f1],
        [x * x * (3 - 2 * x), step.interval.h * x * rest * rest, -step.interval.h * x * x * rest],
        1.0,
    )


@dataclass
class GridStep:
    """A step of a fixed-step method.

    Interpolates linearly or by a cubic, whose slopes it evaluates when asked for a time inside.
    """

    field: VectorField
    interval: Interval
    y0: Tensor
    y1: Tensor
    f0: Tensor | None
    linear: bool = False
    perturb: bool = False
    recipe: Recipe | None = None
    slope0: Tensor | None = None
    f1: Tensor | None = None
    has_graph: bool = dataclasses.field(default_factory=torch.is_grad_enabled)

    def interpolate(self, times: Sequence[float], shifts: Sequence[Tensor | None]) -> Tensor:
        """The solution at `times`, [len(times), *state]; exact at the step's end."""
        return torch.stack([self._at(t, s) for t, s in zip(times, shifts, strict=True)])

    def _at(self, t: float, shift: Tensor | None) -> Tensor:
        if t == self.interval.t1 and shift is self.interval.shift1:
            return self.y1
        x = self.interval.fraction(t, shift)
        if self.linear:
            return combine(self.y0, [self.y1 - self.y0], [x], 1.0)
        # The slopes stay: with a graph if the step has one, even for a time asked under no_grad.
        with torch.set_grad_enabled(self.has_graph):
            if self.slope0 is None:
                side = NEXT if self.perturb else HERE
                self.slope0 = self.field(self.interval.t0, self.y0, self.interval.shift0, side)
            if self.f1 is None:
                # Also the next step's first stage, so that a time inside costs no evaluation.
                side = PREV if self.perturb else HERE
                self.f1 = self.field(self.interval.t1, self.y1, self.interval.shift1, side)
        return hermite(self, self.slope0, self.f1, x)
