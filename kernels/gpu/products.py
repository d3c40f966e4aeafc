"""Matrix products of a tile, as exact as they are to be.

"ieee" and "tf32x3" are as exact as the operands' dtype. For "tf32" the hardware takes the first
11 bits of float32 numbers and drops the others: errors of one sign, which add up over the rows of a
batch. So the operands are rounded first.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Of the 13 bits of a float32 that tf32 does not have: half of the next one's value, and a mask.
HALF = tl.constexpr(1 << 12)
KEPT = tl.constexpr(-(1 << 13))


@triton.jit
def nearest_tf32(x):
    """The nearest tf32 number, of two equally near the larger one; nan and inf stay. float32."""
    bits = (x.to(tl.int32, bitcast=True) + HALF) & KEPT
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@triton.jit
def product(a, b, total, F: tl.constexpr):
    """Sum of `total` and a @ b.

    Args:
        a, b: [M, K] and [K, N], of one dtype.
        total: [M, N] in that dtype, or None for 0.
        F: The field, whose `precision` it is: "ieee", "tf32x3" or "tf32", these of float32.
    """
    if F.precision == "tf32":
        a = nearest_tf32(a)
        b = nearest_tf32(b)
    return tl.dot(a, b, total, input_precision=F.precision, out_dtype=a.dtype)


@triton.jit
def product_in(a, b, total, PRECISION: tl.constexpr):
    """The same for a field that has no constants: PRECISION is "ieee", "tf32x3" or "tf32"."""
    if PRECISION == "tf32":
        a = nearest_tf32(a)
        b = nearest_tf32(b)
    return tl.dot(a, b, total, input_precision=PRECISION, out_dtype=a.dtype)
