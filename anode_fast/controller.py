"""The step-size controller: pure functions of numbers, one formula for all backends.

Parity with torchdiffeq 0.2.5 rests on these few lines: the same initial step, error ratio and next
step give the same accepted and rejected steps. `dt` is a Python float under step_control="batch"
and a tensor with one entry per row under "sample".
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Controller:
    """An integral controller (Hairer, Norsett, Wanner, Solving ODEs I, II.4).

    Attributes:
        order: Order of the method; the step scales with ratio ** (-1 / order).
        safety: Share of the optimal step that is taken.
        ifactor: Largest growth of the step from one to the next.
        dfactor: Smallest factor by which a rejected step shrinks.
        min_step: Steps are not made smaller; an attempt of this size is accepted whatever its
            error.
        max_step: Steps are not made larger.
    """

    order: int
    safety: float = 0.9
    ifactor: float = 10.0
    dfactor: float = 0.2
    min_step: float = 0.0
    max_step: float = math.inf

    def clamp(self, dt: float) -> float:
        """dt, kept within min_step and max_step."""
        return min(max(dt, self.min_step), self.max_step)

    def accepts(self, dt: float, error_ratio: float) -> bool:
        """Whether an attempt of size dt stands. A ratio that is not finite never does."""
        return error_ratio <= 1 or (dt <= self.min_step and math.isfinite(error_ratio))

    def next_step(self, dt: float, error_ratio: float) -> float:
        """Size of the next attempt after one of size dt with this error ratio."""
        if error_ratio == 0:
            factor = self.ifactor
        elif not math.isfinite(error_ratio):
            factor = self.dfactor
        else:
            smallest = 1.0 if error_ratio < 1 else self.dfactor
            factor = max(self.safety / error_ratio ** (1.0 / self.order), smallest)
            factor = min(self.ifactor, factor)
        return self.clamp(dt * factor)

    def next_step_rows(self, dt: Tensor, error_ratio: Tensor) -> Tensor:
        """`next_step` for one step size and one error ratio per row."""
        smallest = torch.full_like(error_ratio, self.dfactor).masked_fill_(error_ratio < 1, 1.0)
        factor = self.safety * error_ratio ** (-1.0 / self.order)
        factor = torch.maximum(factor, smallest).clamp(max=self.ifactor)
        factor = torch.where(error_ratio.isfinite(), factor, self.dfactor)
        return (dt * factor).clamp(self.min_step, self.max_step)


def first_guess(d0: float, d1: float) -> float:
    """A step so short that an explicit Euler step of it is safe.

    d0, d1: norms of y0 and f(t0, y0) over the tolerance. Source: Hairer, Norsett, Wanner, Solving
    ODEs I, 2nd ed., II.4, "Starting step size".
    """
    return 1e-6 if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1


def initial_step(h0: float, d1: float, d2: float, order: int) -> float:
    """The first step, from the Euler step h0 and the norms of f (d1) and f' (d2). Source: above."""
    if d1 <= 1e-15 and d2 <= 1e-15:
        h1 = max(1e-6, h0 * 1e-3)
    else:
        h1 = (0.01 / max(d1, d2)) ** (1.0 / order)
    return min(100 * h0, h1)
