"""Activations and their derivatives, for tiles in float32 and float64, of any shape.

They mean torch.nn.functional's with default arguments and are accurate to 8 units in the last
place, gelu in float64 to 16, tails included; what is no normal number may be 0. They take a dozen
to forty instructions in float32, and need of the hardware nothing but a reciprocal root: on a GPU,
Triton's exp loses digits with the size of its argument, and its log near 1 has none, which rules
out the usual tricks for log(1 + x) and exp(x) - 1.

An activation's number is its index in anode_fast.spec.ACTIVATIONS. A gradient needs act'(x): `keep`
says what of a pre-activation x to keep for that, and `value` and `derivative` take that.

A table is a pair, for float32 and float64, of coefficients from the constant up: the best
approximation by Remez exchange in 50-digit arithmetic, rounded.
"""

from __future__ import annotations

import triton
import triton.language as tl

RELU = tl.constexpr(0)
SOFTPLUS = tl.constexpr(1)
TANH = tl.constexpr(2)
SIGMOID = tl.constexpr(3)
SILU = tl.constexpr(4)
GELU = tl.constexpr(5)
ELU = tl.constexpr(6)
IDENTITY = tl.constexpr(7)

# (exp(r) - 1) / r for |r| <= ln(2) / 2.
_EXPM1_RATIO = tl.constexpr(
    (
        (1.0, 0.49999998112, 0.166665436381, 0.0416672119857, 0.00836652128528, 0.00138818137341),
        (
            1.0,
            0.50000000000000051684,
            0.16666666666666589325,
            0.041666666666576848007,
            0.0083333333333895304162,
            0.0013888888931540479187,
            0.00019841269719037755244,
            0.000024801505298672726672,
            2.7557407527136888757e-6,
            2.7626029211309517448e-7,
            2.5053776725215421282e-8,
        ),
    )
)
# log(1 + e) / e for 0 <= e <= 1.
_LOG1P_RATIO = tl.constexpr(
    (
        (
            1.0,
            -0.4999964796,
            0.3332132262,
            -0.2485716357,
            0.191536543,
            -0.1375380073,
            0.0792045153,
            -0.03006577969,
            0.005364821241,
        ),
        (
            1.0,
            -0.4999999999999946,
            0.33333333333235043,
            -0.2499999999367649,
            0.19999999791319814,
            -0.16666662498437418,
            0.1428565889630365,
            -0.12499479604137735,
            0.11107505940154698,
            -0.09981014668757988,
            0.09013152836717804,
            -0.08081209673458077,
            0.07035539413528465,
            -0.05750199064731936,
            0.04230010406106866,
            -0.02674396220617914,
            0.01383859163191318,
            -0.005543110241170356,
            0.0015957416255629553,
            -0.00029176134628805425,
            2.532995443437942e-05,
        ),
    )
)
# sinh(x) / x as a polynomial in x^2, for |x| up to where tanh rounds to 1; see `_tanh`.
_SINH_RATIO = tl.constexpr(
    (
        (1.0, 0.1666672466, 0.008332056366, 0.0001991135637, 2.624248044e-6, 3.386238494e-8),
        (
            1.0,
            0.16666666666666713,
            0.008333333333331404,
            0.00019841269841507775,
            2.755731921132013e-06,
            2.505210872987248e-08,
            1.6059038574566814e-10,
            7.647211601179114e-13,
            2.811188772728349e-15,
            8.230080705978032e-18,
            1.9364425038676736e-20,
            4.151151101181364e-23,
            4.212244663994508e-26,
            1.8155786196675804e-28,
        ),
    )
)
# Phi(-a) exp(a^2 / 2) for 0 <= a <= 14.5 (float32), 39 (float64), Phi the standard normal
# distribution function: numerator and denominator.
_MILLS_ABOVE = tl.constexpr(
    (
        (0.500000002954, 0.438295211887, 0.183235272633, 0.0406332542290, 0.00411630820538),
        (
            0.49999999999999997435,
            0.77488162205127566844,
            0.59405776510582806517,
            0.28934107579124794301,
            0.097703241306206526493,
            0.0236236458159184361,
            0.0040895796467073822993,
            0.00049045688848587602139,
            0.000037257852263539200983,
            1.3858713678348020476e-6,
        ),
    )
)
_MILLS_BELOW = tl.constexpr(
    (
        (1.0, 1.67447540492, 1.20250382885, 0.469470970278, 0.101858910728, 0.0103179347978),
        (
            1.0,
            2.3476478049054065751,
            2.5612674679487404528,
            1.7144155381563343702,
            0.78206241660551703716,
            0.25496996826889227148,
            0.060438144352833651857,
            0.010344447548543660875,
            0.0012328669687210885146,
            0.000093391585933677916436,
            3.4738643556265609308e-6,
        ),
    )
)


# --- elementary functions ------------------------------------------------------------------------


# Bounds, as all numbers in comparisons, are rounded to float32.


@triton.jit
def _at_least(x, LOW: tl.constexpr):
    if x.dtype == tl.float64:
        return tl.where(x < LOW, LOW, x)  # there is no instruction for it; nan stays nan
    else:
        return tl.maximum(x, LOW, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _at_most(x, HIGH: tl.constexpr):
    if x.dtype == tl.float64:
        return tl.where(x > HIGH, HIGH, x)
    else:
        return tl.minimum(x, HIGH, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _polynomial(x, TABLE: tl.constexpr):
    C: tl.constexpr = TABLE[1 if x.dtype == tl.float64 else 0]
    y = x * C[len(C) - 1] + C[len(C) - 2]
    for i in tl.static_range(len(C) - 3, -1, -1):
        y = y * x + C[i]
    return y


@triton.jit
def _reciprocal(x):
    """1 / x for normal x > 0 whose reciprocal is normal. A division takes twice as long."""
    if x.dtype == tl.float64:
        return 1.0 / x
    else:
        root = tl.rsqrt(x)
        y = root * root
        return y + y * (1.0 - x * y)  # Newton's step: the hardware's root is an approximation


@triton.jit
def _reduce(x):
    """The r and 2^n of x = n ln 2 + r with an integer n and |r| <= ln(2) / 2.

    2^n is 0 for n one below the exponents of normal numbers; n must not lie below that.
    """
    # A number between 2^m and twice that has no fraction, where m is the number of bits of the
    # mantissa: the sum rounds. Its lowest bits are those of n plus the exponent's bias. n * (the
    # high part of ln 2) is exact, even without a fused multiply-add.
    if x.dtype == tl.float64:
        rounded = x * 1.4426950408889634 + (1.5 * 2.0**52 + 1023)
        n = rounded - (1.5 * 2.0**52 + 1023)
        scale = (rounded.to(tl.int64, bitcast=True) << 52).to(tl.float64, bitcast=True)
        return (x - n * 0.6931471805598903) - n * 5.497923018708371e-14, scale
    else:
        rounded = x * 1.4426950408889634 + (1.5 * 2.0**23 + 127)
        n = rounded - (1.5 * 2.0**23 + 127)
        scale = (rounded.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)
        return (x - n * 0.693145751953125) - n * 1.4286068203094173e-06, scale


@triton.jit
def _exp(x, rest=None):
    """exp(x + rest) for x <= 0 and a small rest; 0 below the smallest normal number."""
    LOW: tl.constexpr = -709.0 if x.dtype == tl.float64 else -88.0
    r, scale = _reduce(_at_least(x, LOW))
    if rest is not None:
        r += rest
    return (r * _polynomial(r, _EXPM1_RATIO) + 1.0) * scale


@triton.jit
def _expm1(x):
    """exp(x) - 1 for x <= 0."""
    r, scale = _reduce(_at_least(x, -40.0))  # below, exp(x) is lost beside 1
    return (r * scale) * _polynomial(r, _EXPM1_RATIO) - (1.0 - scale)


@triton.jit
def _from_below(x, below):
    """g(x) for a function with g(x) + g(-x) = 1, from below = g(-|x|), which keeps its digits."""
    return tl.where(x < 0.0, below, 1.0 - below)


# --- activations ---------------------------------------------------------------------------------


@triton.jit
def _softplus(x):
    # log(1 + exp(x)) = max(x, 0) + log(1 + exp(-|x|)), which does not overflow.
    e = _exp(-tl.abs(x))
    y = _at_least(x, 0.0) + e * _polynomial(e, _LOG1P_RATIO)
    if x.dtype == tl.float64:
        y = tl.where(x > 20.0, x, y)  # torch's threshold; in float32, y rounds to x there
    return y


@triton.jit
def _softplus_derivative(y):
    # sigmoid(x) = 1 - exp(-softplus(x)).
    slope = -_expm1(-y)
    if y.dtype == tl.float64:
        slope = tl.where(y - 20.0 > 2.0612e-9, 1.0, slope)  # softplus(20) - 20; see `_softplus`
    return slope


@triton.jit
def _tanh(x):
    # s / sqrt(1 + s^2) with s = sinh(x), whose relative error tanh(x) inherits divided by 1 + s^2:
    # a polynomial will do. Beyond its range tanh rounds to 1.
    HIGH: tl.constexpr = 19.0625 if x.dtype == tl.float64 else 9.0
    s = x * _polynomial(x * x, _SINH_RATIO)
    y = tl.where(tl.abs(x) < HIGH, s * tl.rsqrt(s * s + 1.0), x)
    return _at_least(_at_most(y, 1.0), -1.0)


@triton.jit
def _sigmoid(x):
    e = _exp(-tl.abs(x))
    return _from_below(x, e * _reciprocal(e + 1.0))


@triton.jit
def _silu_derivative(x):
    # With s = sigmoid(x), s (1 + x (1 - s)).
    low = _at_least(-tl.abs(x), -1000.0)  # beyond, exp is 0: no 0 * inf
    e = _exp(low)
    complement = _reciprocal(e + 1.0)
    return _from_below(x, e * complement * (low * complement + 1.0))


@triton.jit
def _normal_tail(x):
    """For a = |x|, bounded to where Phi(-a) is 0: a, exp(-a^2 / 2), and what times that is Phi(-a).

    Phi is the standard normal distribution function. As this product it keeps its digits.
    """
    # exp multiplies the rounding error of a^2 / 2 by it. The square of a's leading half is exact;
    # a^2 - leading^2 is small.
    if x.dtype == tl.float64:
        a = _at_most(tl.abs(x), 37.65625)
        leading = (a.to(tl.int64, bitcast=True) & -(2**27)).to(tl.float64, bitcast=True)
    else:
        a = _at_most(tl.abs(x), 13.25)
        leading = (a.to(tl.int32, bitcast=True) & -(2**12)).to(tl.float32, bitcast=True)
    gauss = _exp(leading * leading * -0.5, (a - leading) * (a + leading) * -0.5)
    return a, gauss, _polynomial(a, _MILLS_ABOVE) * _reciprocal(_polynomial(a, _MILLS_BELOW))


@triton.jit
def _gelu(x):
    _, gauss, ratio = _normal_tail(x)
    return x * _from_below(x, gauss * ratio)


@triton.jit
def _gelu_derivative(x):
    # Phi(x) + x phi(x), phi the standard normal density.
    a, gauss, ratio = _normal_tail(x)
    return _from_below(x, gauss * (ratio - a * 0.3989422804014327))


@triton.jit
def activate(x, ACT: tl.constexpr):
    """act(x).

    Args:
        x: Pre-activations, a tile in float32 or float64.
        ACT: Number of the activation.

    Returns:
        The activations, of x's shape and dtype. nan stays nan; silu and gelu of -inf are nan as
        torch's are.
    """
    if ACT == RELU:
        return _at_least(x, 0.0)
    elif ACT == SOFTPLUS:
        return _softplus(x)
    elif ACT == TANH:
        return _tanh(x)
    elif ACT == SIGMOID:
        return _sigmoid(x)
    elif ACT == SILU:
        return x * _sigmoid(x)
    elif ACT == GELU:
        return _gelu(x)
    elif ACT == ELU:
        return tl.where(x < 0.0, _expm1(_at_most(x, 0.0)), x)
    else:
        tl.static_assert(ACT == IDENTITY)
        return x


# --- what a gradient needs -----------------------------------------------------------------------


@triton.constexpr_function
def keeps_input(ACT):
    """Whether x is kept of a pre-activation x. For the others it is act(x), which gives act'(x).

    Args:
        ACT: Number of the activation. Also an int, outside of kernels.

    Returns:
        A compile-time constant.
    """
    return bool(ACT == SILU or ACT == GELU)


@triton.jit
def keep(x, ACT: tl.constexpr):
    """What `value` and `derivative` need of a pre-activation, one number each.

    Args:
        x: Pre-activations, a tile in float32 or float64.
        ACT: Number of the activation.

    Returns:
        x or act(x).
    """
    if keeps_input(ACT):
        return x
    else:
        return activate(x, ACT)


@triton.jit
def value(kept, ACT: tl.constexpr):
    """act(x).

    Args:
        kept: What `keep` gave for x.
        ACT: Number of the activation.

    Returns:
        The same as `activate`.
    """
    if keeps_input(ACT):
        return activate(kept, ACT)
    else:
        return kept


@triton.jit
def derivative(kept, ACT: tl.constexpr):
    """act'(x), where act has a kink that of torch's autograd.

    Args:
        kept: What `keep` gave for x.
        ACT: Number of the activation.

    Returns:
        The derivatives, of kept's shape and dtype. Their error is a few units in the last place of
        1, and of themselves for softplus and where sigmoid is small.
    """
    if ACT == RELU:
        return tl.where(kept <= 0.0, 0.0, 1.0).to(kept.dtype)
    elif ACT == SOFTPLUS:
        return _softplus_derivative(kept)
    elif ACT == TANH:
        return 1.0 - kept * kept
    elif ACT == SIGMOID:
        return kept - kept * kept
    elif ACT == SILU:
        return _silu_derivative(kept)
    elif ACT == GELU:
        return _gelu_derivative(kept)
    elif ACT == ELU:
        return _at_most(kept, 0.0) + 1.0
    else:
        tl.static_assert(ACT == IDENTITY)
        return tl.full(kept.shape, 1.0, kept.dtype)
