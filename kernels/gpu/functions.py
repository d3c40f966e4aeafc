"""Elementary functions beside the activations, for tiles in float32 and float64, of any shape.

They mean torch's and are accurate to a few units in the last place; see activations.py for why
Triton's own do not serve. What is rare is made in float64, whose functions on a GPU are exact but
for the last bit or two; sines of float32 are not, whose reduction spills registers there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from anode_fast.kernels.gpu import activations

# (sin(r) - r) / r^3 and (cos(r) - 1) / r^2 as polynomials in r^2, for |r| <= pi / 4: Taylor's.
_SIN_RATIO = tl.constexpr((-1 / 6, 1 / 120, -1 / 5040, 1 / 362880))
_COS_RATIO = tl.constexpr((-1 / 2, 1 / 24, -1 / 720, 1 / 40320, -1 / 3628800))


@triton.jit
def exp(x):
    """The exponential function."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        # The square of exp(x / 2), whose power of two is a normal number wherever exp(x) is one.
        half = activations._at_most(activations._at_least(x * 0.5, -60.0), 60.0)
        r, scale = activations._reduce(half)
        root = (r * activations._polynomial(r, activations._EXPM1_RATIO) + 1.0) * scale
        return root * root


@triton.jit
def expm1(x):
    """The exponential function less 1."""
    near = activations._expm1(activations._at_most(x, 40.0))
    return tl.where(x > 40.0, exp(x), near)


@triton.jit
def log(x):
    """The natural logarithm."""
    return tl.log(x.to(tl.float64)).to(x.dtype)


@triton.jit
def log1p(x):
    """The logarithm of 1 + x."""
    wide = x.to(tl.float64)
    near = 1.0 + wide
    change = near - 1.0
    # What rounding near lost is as small beside change as near's distance from 1 is beside x.
    y = tl.log(near) * (wide / tl.where(change == 0.0, 1.0, change))
    y = tl.where(change == 0.0, wide, y)
    return tl.where(near == float("inf"), near, y).to(x.dtype)


@triton.jit
def _sine(x, QUARTERS: tl.constexpr):
    """sin(x + QUARTERS * pi / 2), in float32."""
    wide = x.to(tl.float64)
    rounded = wide * 0.6366197723675814 + 1.5 * 2.0**52  # see activations._reduce
    n = rounded - 1.5 * 2.0**52
    rest = tl.fma(n, tl.full([], -1.5707963267948966, tl.float64) + 0.0 * n, wide)
    r = (rest - n * 6.123233995736766e-17).to(tl.float32)
    quarter = rounded.to(tl.int64, bitcast=True) + QUARTERS
    z = r * r
    s: tl.constexpr = _SIN_RATIO
    c: tl.constexpr = _COS_RATIO
    of_sin = r + r * z * (s[0] + z * (s[1] + z * (s[2] + z * s[3])))
    of_cos = 1.0 + z * (c[0] + z * (c[1] + z * (c[2] + z * (c[3] + z * c[4]))))
    y = tl.where(quarter & 1 == 0, of_sin, of_cos)
    return tl.where(quarter & 2 == 0, y, -y)


@triton.jit
def sin(x):
    """The sine; in float32 for |x| up to 1e9."""
    if x.dtype == tl.float64:
        return tl.sin(x)
    else:
        return _sine(x, 0)


@triton.jit
def cos(x):
    """The cosine; in float32 for |x| up to 1e9."""
    if x.dtype == tl.float64:
        return tl.cos(x)
    else:
        return _sine(x, 1)


@triton.jit
def sign(x):
    """1, -1, or 0."""
    return (x > 0.0).to(x.dtype) - (x < 0.0).to(x.dtype)


@triton.jit
def elu(x, ALPHA: tl.constexpr):
    """What is positive as it is, else ALPHA * (exp(x) - 1)."""
    below = activations._expm1(activations._at_most(x, 0.0)) * ALPHA
    return tl.where(x > 0.0, x, below)


@triton.jit
def elu_slope(x, ALPHA: tl.constexpr):
    """The derivative of `elu`."""
    return tl.where(x > 0.0, 1.0, activations._exp(activations._at_most(x, 0.0)) * ALPHA)


@triton.jit
def integer_power(x, N: tl.constexpr, BITS: tl.constexpr):
    """The power of x for an integer N > 0 of so many bits."""
    wide = x
    if N > 3:  # each product rounds
        wide = x.to(tl.float64)
    y = wide
    for i in tl.static_range(BITS - 2, -1, -1):
        y = y * y
        if (N >> i) & 1 == 1:
            y = y * wide
    return y.to(x.dtype)


@triton.jit
def power(x, exponent):
    """The power of x for an exponent, float64, that is no integer."""
    return tl.exp(tl.log(x.to(tl.float64)) * exponent).to(x.dtype)
