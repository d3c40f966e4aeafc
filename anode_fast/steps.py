"""Steps of any field on the CPU: what they compute beside the field, in C++.

The solver, its rules and its order of evaluations are the reference's. Between two evaluations
there is one call instead of an operation for each stage, and one for the error of a step.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from anode_fast import fused
from anode_fast.kernels.cpu import library
from anode_fast.kernels.cpu.combine import Numbers, Steps
from anode_fast.problem import ADAPTIVE, FIXED, Norm, Problem, rms_norm
from anode_fast.reference.runge_kutta import PLAIN
from anode_fast.reference.step import Interval
from anode_fast.tableau import TABLEAUS, ButcherTableau
from anode_fast.vector_field import HERE, VectorField

_PLAIN = (Tensor, nn.Parameter)


def why_not(problem: Problem) -> str:
    """Why C++ cannot make the steps of this problem; "" if it can."""
    y0 = problem.y0
    if absent := library.missing():
        return str(absent)
    if problem.family not in (FIXED, ADAPTIVE):
        return f"{problem.method} is no explicit Runge-Kutta method"
    if y0.device.type != "cpu" or y0.dtype not in (torch.float32, torch.float64):
        return f"the state is {y0.dtype} on {y0.device}, want float32 or float64 on the CPU"
    if type(y0) not in _PLAIN or not y0.is_contiguous() or y0.is_neg():
        return "the state is no plain contiguous tensor"
    return fused.transform()


def arithmetic(problem: Problem) -> NativeArithmetic | None:
    """How to make the steps of this problem in C++; None if that cannot be."""
    return None if why_not(problem) else _of_dtype(problem.y0.dtype)


@functools.cache
def _of_dtype(dtype: torch.dtype) -> NativeArithmetic:
    found: Any = library.load()
    return NativeArithmetic(Steps(found, dtype), dtype)


@dataclass(frozen=True)
class _Rows:
    """A tableau where the library can read it: nodes, and the weights of every sum of a step.

    The sums are the stages' arguments and, unless the last of those is it, the solution.
    """

    nodes: Numbers
    sums: tuple[Numbers, ...]


@functools.cache
def _rows(method: str) -> _Rows:
    tableau = TABLEAUS[method]  # whose own hash takes long
    solution = () if tableau.solution_is_last_stage else (tableau.b_float,)
    return _Rows(Numbers(tableau.c_float), tuple(map(Numbers, (*tableau.a_float, *solution))))


@functools.lru_cache(maxsize=256)
def _numbers(values: tuple[float, ...]) -> Numbers:
    return Numbers(values)


@functools.lru_cache(maxsize=256)
def _ends(sizes: tuple[int, ...]) -> Numbers:
    return Numbers(list(itertools.accumulate(sizes)), ctypes.c_int64)


def _plain(x: Tensor) -> Tensor:
    """The same numbers where the library can read them."""
    return x if x.is_contiguous() and not x.is_neg() else x.resolve_neg().contiguous()


class NativeArithmetic:
    """As reference.runge_kutta.PLAIN, to which it leaves what it cannot do.

    Args:
        native: The calls.
        dtype: Of the states.
    """

    def __init__(self, native: Steps, dtype: torch.dtype) -> None:
        self.native = native
        self._dtype = dtype

    def stages(
        self,
        tableau: ButcherTableau,
        field: VectorField,
        interval: Interval,
        y: Tensor,
        f0: Tensor | None,
        sides: tuple[int, int],
    ) -> tuple[Tensor, list[Tensor]]:
        """The solution at the end of a step and its stage derivatives, the first unless given."""
        is_special = interval.shift0 is not None or interval.shift1 is not None
        if is_special or (f0 is not None and type(f0) not in _PLAIN):
            return PLAIN.stages(tableau, field, interval, y, f0, sides)
        t0, t1 = interval.t0, interval.t1
        h, rows, first = t1 - t0, _rows(tableau.name), 0 if f0 is None else 1
        ks = [] if f0 is None else [_plain(f0)]
        if torch.is_grad_enabled() or field.time_dtype is not self._dtype:
            # With a graph, each time has memory of its own: autograd notes writes to memory.
            times: Sequence[Tensor] = [
                field.time(t1 if c == 1 else t0 + c * h, None, _side(c, sides))
                for c in tableau.c_float[first:]
            ]
            return self._stages_with_graph(field, times, rows.sums[first:], y, h, ks), ks
        sign = -1.0 if field.backwards else 1.0
        times = self.native.node_times(rows.nodes, first, (t0, t1), sides, sign)
        return self.native.stages(field.at, times, rows.sums[first:], y, h, ks), ks

    def _stages_with_graph(
        self,
        field: VectorField,
        times: Sequence[Tensor],
        rows: Sequence[Numbers],
        y: Tensor,
        h: float,
        ks: list[Tensor],
    ) -> Tensor:
        """As `Steps.stages`, differentiable."""
        argument = y
        for row, time in itertools.zip_longest(rows, times):
            if ks:
                argument = self._combined(y, ks, row, h)
            if time is not None:
                ks.append(_plain(field.at(time, argument)))
        return argument

    def combine(
        self, y: Tensor | None, ks: Sequence[Tensor], weights: Sequence[Any], h: Any
    ) -> Tensor:
        """Returns y + h * sum_j weights[j] * ks[j]; y=None: the sum alone."""
        if y is None or isinstance(h, Tensor) or isinstance(weights[0], Tensor):
            return PLAIN.combine(y, ks, weights, h)
        return self._combined(y, [_plain(k) for k in ks], Numbers(weights), h)

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
        sizes = (y0.numel(),) if norm is rms_norm else getattr(norm, "sizes", None)
        if sizes is None or isinstance(h, Tensor) or type(ks[0]) not in _PLAIN:
            return PLAIN.scaled_norm(y0, y1, ks, weights, h, tolerances, norm)
        rtol, atol = (
            x.expand(y0.shape).contiguous() if isinstance(x, Tensor) else x for x in tolerances
        )
        ks = [_plain(k) for k in ks]
        addresses = [k.data_ptr() for k in ks]
        ratio: float = self.native.error_ratio(
            *(_plain(y0), _plain(y1), addresses, _numbers(tuple(weights)), h),
            *((rtol, atol), _ends(sizes)),
        )
        return ratio

    def _combined(self, y: Tensor, ks: Sequence[Tensor], weights: Numbers, h: float) -> Tensor:
        """Returns y + h * sum_j weights[j] * ks[j], differentiable if it has to be."""
        if not torch.is_grad_enabled() or not (y.requires_grad or any(k.requires_grad for k in ks)):
            return self.sum(y, ks, weights, h)
        if len(ks) > FEW:
            combined: Tensor = _Combined.apply(self, weights, h, y, *ks)
            return combined
        for k, w in zip(ks, weights.values, strict=False):
            if w:
                y = torch.add(y, k, alpha=h * w)
        return y

    def sum(self, y: Tensor, ks: Sequence[Tensor], weights: Numbers, h: float) -> Tensor:
        """Returns y + h * sum_j weights[j] * ks[j]."""
        out = torch.empty_like(y)
        self.native.combine(y, [k.data_ptr() for k in ks], weights, h, out)
        return out


def _side(c: float, sides: tuple[int, int]) -> int:
    """Of the node c."""
    return sides[0] if c == 0 else sides[1] if c == 1 else HERE


FEW = 2
"""Stages up to which autograd's own additions cost less than one function of all of them."""


class _Combined(torch.autograd.Function):
    """Returns y + h * sum_j weights[j] * ks[j]: one node of a graph."""

    @staticmethod
    def forward(
        ctx: Any, arithmetic: NativeArithmetic, weights: Numbers, h: float, y: Tensor, *ks: Tensor
    ) -> Tensor:
        ctx.arithmetic, ctx.weights, ctx.h, ctx.count = arithmetic, weights, h, len(ks)
        return arithmetic.sum(y, ks, weights, h)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        weights, h, count = ctx.weights, ctx.h, ctx.count
        if (
            torch.is_grad_enabled()
            or type(grad) is not Tensor
            or fused.is_batched(grad)
            or fused.transform()
            or not grad.is_contiguous()
            or grad.is_neg()
        ):
            parts = [grad * (h * w) if w else None for w in weights.values[:count]]
        else:
            parts = ctx.arithmetic.native.spread(grad, weights, h, count).unbind()
        return None, None, None, grad, *parts
