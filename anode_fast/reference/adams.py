"""Adams methods: fixed steps that reuse the derivatives of earlier steps.

Source: Hairer, Norsett, Wanner, Solving ODEs I, 2nd ed., III.1. The rules for start-up, order and
iteration are torchdiffeq 0.2.5's, so that values and evaluations are the same.
"""

from __future__ import annotations

import functools
import warnings
from collections import deque
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from anode_fast.errors import InvalidArgument
from anode_fast.reference.runge_kutta import PLAIN
from anode_fast.reference.step import GridStep, Interval, combine
from anode_fast.tableau import RK4
from anode_fast.vector_field import HERE, NEXT, PREV, VectorField

MIN_ORDER, MAX_ORDER = 4, 12
"""Orders of the implicit method. The explicit one is one lower with the same derivatives."""


@functools.cache
def adams_weights(order: int, *, implicit: bool) -> tuple[Fraction, ...]:
    """Weights w of y1 = y0 + h * sum_j w_j f_j for constant steps h, newest derivative first.

    w_j is the integral over [0, 1] of the Lagrange polynomial of the node j. In units of h, from
    the start of the step, the nodes are 0, -1, ... (explicit: Adams-Bashforth) or 1, 0, -1, ...
    (implicit: Adams-Moulton); there are `order` of them.

    Source: Hairer, Norsett, Wanner, Solving ODEs I, 2nd ed., III.1, equations (1.4) to (1.9).
    """
    nodes = [int(implicit) - j for j in range(order)]
    weights = []
    for node in nodes:
        polynomial = [Fraction(1)]  # coefficients, the constant first
        for other in nodes:
            if other != node:
                raised = [Fraction(0), *polynomial]
                lowered = [other * p for p in polynomial] + [Fraction(0)]
                polynomial = [
                    (r - s) / (node - other) for r, s in zip(raised, lowered, strict=True)
                ]
        weights.append(sum((p / (i + 1) for i, p in enumerate(polynomial)), Fraction(0)))
    return tuple(weights)


@functools.cache
def _floats(order: int, implicit: bool) -> tuple[float, ...]:
    return tuple(map(float, adams_weights(order, implicit=implicit)))


class AdamsRecipe:
    """One step of an Adams method after those made before; it keeps their derivatives.

    The first steps, until there are 3 derivatives, are rk4's. From there on the order grows by one
    a step up to `max_order` (implicit) or `max_order` - 1 (explicit). The weights are those of
    constant steps, whatever the grid.

    Args:
        field: The field.
        linear, perturb: As in `GridStep`.
        implicit: Correct the prediction by the implicit method, iterating to a fixed point.
        max_iters: Most iterations a step. Each costs an evaluation, and its test a host
            synchronisation.
        max_order: Order of the implicit method; below 4 only rk4 is left.
        tolerances: rtol, atol: an iteration has converged when it changes every entry of the step
            by less than atol + rtol * (the entry of the step).

    Raises:
        InvalidArgument: `max_order` above 12, or one of the two numbers is not a positive integer.
    """

    def __init__(
        self,
        field: VectorField,
        linear: bool,
        perturb: bool,
        *,
        implicit: bool,
        max_iters: int,
        max_order: int,
        tolerances: tuple[float | Tensor, float | Tensor],
    ) -> None:
        self.field = field
        self.linear = linear
        self.perturb = perturb
        self.implicit = implicit
        self.max_iters = _positive("max_iters", max_iters)
        self.max_order = _positive("max_order", max_order)
        if self.max_order > MAX_ORDER:
            raise InvalidArgument(
                f"odeint: option max_order is {max_order}, want at most {MAX_ORDER}: the weights "
                "of higher orders alternate and grow, and amplify rounding."
            )
        if self.max_order < MIN_ORDER:
            warnings.warn(
                f"odeint: with max_order={max_order}, below {MIN_ORDER}, Adams methods are rk4.",
                stacklevel=2,
            )
        self.rtol, self.atol = tolerances
        self._history: deque[Tensor] = deque(maxlen=self.max_order - 1)
        self._warned = False

    def __call__(self, interval: Interval, y: Tensor, f0: Tensor | None) -> GridStep:
        k0 = f0
        if k0 is None:
            side = NEXT if self.perturb else HERE
            k0 = self.field(interval.t0, y, interval.shift0, side)
        self._history.appendleft(k0)
        if len(self._history) < MIN_ORDER - 1:
            end_side = PREV if self.perturb else HERE
            y1, _ = PLAIN.stages(RK4, self.field, interval, y, k0, (HERE, end_side))
        else:
            y1 = self._multistep(interval, y)
        return GridStep(self.field, interval, y, y1, f0, self.linear, self.perturb, slope0=k0)

    def _multistep(self, interval: Interval, y: Tensor) -> Tensor:
        h, order = interval.h, len(self._history)
        change = combine(None, self._history, _floats(order, False), h)
        if not self.implicit:
            return y + change
        newest, *older = _floats(order + 1, True)
        known = combine(None, self._history, older, h)
        side = PREV if self.perturb else HERE
        for _ in range(self.max_iters):
            f1 = self.field(interval.t1, y + change, interval.shift1, side)
            before, change = change, combine(known, [f1], [newest], h)
            if self._has_converged(before, change):
                return y + change
        self._note_failure(interval)
        return y + change

    def _has_converged(self, before: Tensor, change: Tensor) -> bool:
        with torch.no_grad():
            size = torch.maximum(before.abs(), change.abs())
            near = (change - before).abs() < self.atol + self.rtol * size
            return bool(near.all())

    def _note_failure(self, interval: Interval) -> None:
        """Lowers the next step's order, as torchdiffeq does, and warns at the first time."""
        self._history.pop()
        if self._warned:
            return
        self._warned = True
        warnings.warn(
            f"odeint: functional iteration did not converge: after {self.max_iters} iterations in "
            f"the step from t={self.field.user_time(interval.t0):.9g} to "
            f"{self.field.user_time(interval.t1):.9g} it still changed the step by more than atol "
            "+ rtol * |step|. The solution may be wrong. Use smaller steps "
            "(options['step_size']), more iterations (options['max_iters']), looser tolerances, "
            "or an implicit Runge-Kutta method if the problem is stiff.",
            stacklevel=2,
        )


def _positive(name: str, value: Any) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = 0
    if number < 1 or number != value:
        raise InvalidArgument(f"odeint: option {name} is {value!r}, want a positive integer")
    return number
