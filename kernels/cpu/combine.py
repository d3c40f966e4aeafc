"""What a Runge-Kutta step computes beside the field, on the CPU: the calls.

States are contiguous, of one dtype, float32 or float64. See combine.hpp.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Numbers:
    """Constants where the library can read them."""

    __slots__ = ("_memory", "address", "count", "values")

    def __init__(self, values: Sequence[float], kind: type = ctypes.c_double) -> None:
        self.values = values
        self.count = len(values)
        self._memory = (kind * max(self.count, 1))(*values)
        self.address = ctypes.addressof(self._memory)


@functools.lru_cache(maxsize=64)
def _packer(layout: str, addresses: int) -> Callable[..., bytes]:
    return struct.Struct(f"={layout}{addresses}q").pack


class Steps:
    """The calls, for states of one dtype.

    Args:
        library: From `library.load`.
        dtype: torch.float32 or torch.float64.
    """

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        self._is_double = dtype == torch.float64
        self._combine = library.anode_combine
        self._spread = library.anode_spread
        self._error_ratio = library.anode_error_ratio
        self._node_times = library.anode_node_times

    def combine(self, y: Tensor | None, stages: Sequence[int], weights: Numbers, h: float,
                out: Tensor) -> None:  # fmt: skip
        """Puts y + h * sum_j weights[j] * stages[j] into `out`; y=None: the sum alone.

        Args:
            y: [...].
            stages: Addresses of tensors like `out`. Those of weight 0 are not read.
            weights: One for each stage, or more.
            out: [...].
        """
        count = len(stages)
        self._combine(
            _packer("qqqqdqq", count)(
                *(self._is_double, out.numel(), 0 if y is None else y.data_ptr(), out.data_ptr()),
                *(h, weights.address, count),
                *stages,
            )
        )

    def spread(self, grad: Tensor, weights: Numbers, h: float, count: int) -> Tensor:
        """h * weights[j] * grad for the first `count` weights, [count, *grad.shape]."""
        out = grad.new_empty((count, *grad.shape))
        self._spread(
            _packer("qqqqdqq", 0)(
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
        self, c: Numbers, t0: float, t1: float, side: int, sign: float, out: Tensor
    ) -> None:
        """Puts sign * (t0 + c * (t1 - t0)) into `out` for all nodes.

        Args:
            c: Nodes.
            t0, t1: Ends of the step.
            side: -1 or 1: the end of the step is the number next to it on that side.
            sign: 1 or -1.
            out: [nodes].
        """
        self._node_times(
            _packer("qqqqqddd", 0)(
                self._is_double, out.data_ptr(), c.address, c.count, side, t0, t1, sign
            )
        )
