"""Whether a field is the user's: its values where a solve begins, beside those of the user's code.

One program, in a launch before the solve, leaves what it found in the solve's `control`, which the
host reads anyway when the solve has ended.
"""

from __future__ import annotations

import triton
import triton.language as tl

from anode_fast.kernels.gpu.controller import DIFFERS, SIGN, finite


@triton.jit(do_not_specialize=["x_stride", "rows"])
def compare(
    x, weights, settings, times, expected, values, control, bound, scratch,
    x_stride, rows,
    EVALUATE: tl.constexpr, F: tl.constexpr, DIM: tl.constexpr, DATA: tl.constexpr,
    B: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Evaluates the field at the first output time and compares.

    Args:
        x: Data columns of the states, [rows, DATA].
        weights, settings, times: The solve's.
        expected: dy/dt in the user's time, [rows, DIM].
        values: Gets the field's own.
        control: Gets 1 as DIFFERS if they differ by more than the bound.
        bound: Of a difference, as a part of the largest finite number expected, float64 [1].
        scratch: Memory for a record.
    """
    r = tl.arange(0, B)[:, None]
    c = tl.arange(0, D)[None, :]
    DTYPE: tl.constexpr = x.dtype.element_ty
    size = tl.zeros([], tl.float64)
    for first in range(0, rows, B):
        inside = (first + r < rows) & (c < DIM)
        e = tl.load(expected + (first + r) * DIM + c, mask=inside, other=0.0)
        size = tl.maximum(size, tl.max(tl.max(tl.where(finite(e), tl.abs(e), 0.0), 1), 0))
    most = (tl.load(bound) * size).to(DTYPE)
    time = (tl.load(settings + SIGN) * tl.load(times)).to(DTYPE)
    count = tl.zeros([], tl.int32)
    for first in range(0, rows, B):
        inside = (first + r < rows) & (c < DIM)
        place = (first + r) * DIM + c
        from_x = (first + r < rows) & (c < DATA)
        y = tl.load(x + (first + r).to(tl.int64) * x_stride + c, mask=from_x, other=0.0)
        k = EVALUATE(weights, scratch, time, y, F, B, False)
        tl.store(values + place, k, mask=inside)
        e = tl.load(expected + place, mask=inside, other=0.0)
        alike = (tl.abs(k - e) <= most) | (k == e) | ((k != k) & (e != e))
        count += tl.sum(tl.sum((inside & (alike == 0)).to(tl.int32), 1), 0)
        tl.debug_barrier()
    tl.store(control + DIFFERS, tl.where(count > 0, 1.0, 0.0))
