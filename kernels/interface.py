"""What the backends share: a field, a method and an outcome in plain numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FIXED, BATCH, SAMPLE = 0, 1, 2
"""Kinds of step control."""

SUCCESS, MAX_STEPS, UNDERFLOW, NON_FINITE, NON_FINITE_INPUT, OUT_OF_MEMORY, FIELD_DIFFERS = range(7)
"""Outcomes of a solve. The last: the field is not what it was expected to be."""


@dataclass(frozen=True)
class Field:
    """A perceptron: width of the state, hidden widths, number of the activation, time input."""

    dim: int
    hidden: tuple[int, ...]
    activation: int
    time_dependent: bool


@dataclass(frozen=True)
class ConvField:
    """Convolutions 1x1, 3x3 and 1x1: channels of the state, filters, activation, time input."""

    channels: int
    filters: int
    activation: int
    time_dependent: bool


@dataclass(frozen=True)
class Method:
    """An explicit Runge-Kutta method in numbers; conventions of anode_fast.tableau.

    Attributes:
        order: Order of the solution, for the controller.
        c, a, b, b_err: Nodes, rows, weights, and weights of the error estimate.
        interpolant: For each stage the coefficients of x, x^2, x^3 and x^4 of its weight.
        last_at_solution: Whether the last stage is evaluated at the solution (b's last entry is 0).
        last_on_demand: Whether that stage serves interpolation only.
    """

    order: int
    c: Sequence[float]
    a: Sequence[Sequence[float]]
    b: Sequence[float]
    b_err: Sequence[float]
    interpolant: Sequence[Sequence[float]]
    last_at_solution: bool
    last_on_demand: bool = False
