"""What a Runge-Kutta step computes beside the field, on the CPU: the calls.

States are contiguous, of one dtype, float32 or float64. See combine.hpp.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Numbers:
    """Constants where the library can read them."""

    __slots__ = ("_memory", "address", "count", "values")

    def __init__(self, values: Sequence[float], kind: Any = ctypes.c_double) -> None:
        self.values = values
        self.count = len(values)
        self._memory = (kind * max(self.count, 1))(*values)
        self.address = ctypes.addressof(self._memory)


@functools.lru_cache(maxsize=64)
def _packer(layout: str, addresses: int) -> Callable[..., bytes]:
    return struct.Struct(f"={layout}{addresses}q").pack


_COMBINE = "qqqqdqq"
MOST_STAGES = 16
_PACKERS = [_packer(_COMBINE, count) for count in range(MOST_STAGES + 1)]

_TIMES = _packer("qqqqqqddd", 0)


class Steps:
    """The calls, for states of one dtype.

    Args:
        library: From `library.load`.
        dtype: torch.float32 or torch.float64.
    """

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._is_double = dtype == torch.float64
        self._combine = library.anode_combine
        self._spread = library.anode_spread
        self._error_ratio = library.anode_error_ratio
        self._node_times = library.anode_node_times

    def combine(
        self, y: Tensor | None, stages: Sequence[int], weights: Numbers, h: float, out: Tensor
    ) -> None:
        """Puts y + h * sum_j weights[j] * stages[j] into `out`; y=None: the sum alone.

        Args:
            y: [...].
            stages: Addresses of tensors like `out`. Those of weight 0 are not read.
            weights: One for each stage, or more.
            h: Factor of all weights.
            out: [...].
        """
        count = len(stages)
        self._combine(
            _packer(_COMBINE, count)(
                *(self._is_double, out.numel(), 0 if y is None else y.data_ptr(), out.data_ptr()),
                *(h, weights.address, count),
                *stages,
            )
        )

    def stages(
        self,
        evaluate: Callable[[Tensor, Tensor], Tensor],
        times: Sequence[Tensor],
        rows: Sequence[Numbers],
        y: Tensor,
        h: float,
        ks: list[Tensor],
    ) -> Tensor:
        """Evaluates the stages of a step, one after the other.

        Args:
            evaluate: The field: a time and a state to its derivative.
            times: Of the stages.
            rows: Their rows in the tableau; one more for a sum after the last stage.
            y: State at the start of the step.
            h: Size of the step.
            ks: The stages so far, contiguous; gets the others.

        Returns:
            The last sum.
        """
        is_double, n, from_y, call, empty = (
            *(self._is_double, y.numel(), y.data_ptr()),
            *(self._combine, torch.empty_like),
        )
        addresses = [k.data_ptr() for k in ks]
        count, last, out = len(ks), len(times), y
        for i, row in enumerate(rows):
            if count:
                out = empty(y)
                call(
                    _PACKERS[count](
                        *(is_double, n, from_y, out.data_ptr(), h, row.address, count), *addresses
                    )
                )
            if i == last:
                break
            k = evaluate(times[i], out)
            if not k.is_contiguous() or k.is_neg():
                k = k.resolve_neg().contiguous()
            ks.append(k)
            addresses.append(k.data_ptr())
            count += 1
        return out

    def spread(self, grad: Tensor, weights: Numbers, h: float, count: int) -> Tensor:
        """Returns h * weights[j] * grad for the first `count` weights, [count, *grad.shape]."""
        out = grad.new_empty((count, *grad.shape))
        self._spread(
            _packer(_COMBINE, 0)(
                *(self._is_double, grad.numel(), grad.data_ptr(), out.data_ptr()),
                *(h, weights.address, count),
            )
        )
        return out

    def error_ratio(
        self,
        y0: Tensor,
        y1: Tensor,
        stages: Sequence[int],
        weights: Numbers,
        h: float,
        tolerances: tuple[float | Tensor, float | Tensor],
        ends: Numbers,
    ) -> float:
        """The largest norm of an error over parts of the state, relative to the tolerance.

        Args:
            y0, y1: States at both ends of the step: the tolerance is atol + rtol * max(|y0|, |y1|).
            stages, weights, h: The error: h * sum_j weights[j] * stages[j].
            tolerances: rtol and atol, numbers or contiguous tensors like y0.
            ends: Where the parts end, int64; the norm of each is its root mean square.

        Raises:
            MemoryError
        """
        count = len(stages)
        numbers = [0.0 if isinstance(x, Tensor) else x for x in tolerances]
        arrays = [x.data_ptr() if isinstance(x, Tensor) else 0 for x in tolerances]
        ratio: float = self._error_ratio(
            _packer("qqqddqqqqdqq", count)(
                *(self._is_double, y0.data_ptr(), y1.data_ptr(), *numbers, *arrays),
                *(ends.address, ends.count, h, weights.address, count),
                *stages,
            )
        )
        if ratio < 0:
            raise MemoryError("anode_fast: no memory for the error of a step")
        return ratio

    def node_times(
        self, c: Numbers, first: int, ends: tuple[float, float], sides: tuple[int, int], sign: float
    ) -> tuple[Tensor, ...]:
        """Times sign * (t0 + c * (t1 - t0)) for the nodes, each a 0-d tensor of the states' dtype.

        Args:
            c: Nodes.
            first: Number of the first one wanted.
            ends: t0 and t1, the ends of the step.
            sides: -1, 0 or 1 for each end: the number next to it on that side, if not 0.
            sign: 1 or -1.
        """
        count = c.count - first
        out = torch.empty(count, dtype=self._dtype)
        self._node_times(
            _TIMES(
                *(self._is_double, out.data_ptr(), c.address + 8 * first, count, *sides),
                *(*ends, sign),
            )
        )
        return out.unbind()
