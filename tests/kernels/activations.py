"""The activations as torch computes them and as they are, for tests of every kernel's."""

import functools
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

INF, NAN = math.inf, math.nan

TORCH = {
    "relu": F.relu,
    "softplus": F.softplus,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "elu": F.elu,
    "identity": lambda z: z,
}


def exact_silu(z):
    e = torch.exp(-z.abs())
    return z * torch.where(z < 0, e, 1) / (1 + e)


# Like torch's, but relatively accurate far below 0 too, which torch's are not in float64.
EXACT = TORCH | {
    "gelu": lambda z: z * torch.special.erfc(-z / math.sqrt(2)) / 2,
    "softplus": lambda z: torch.where(z > 20, z, z.clamp(min=0) + torch.log1p(torch.exp(-z.abs()))),
    "silu": exact_silu,
}
# act(-inf), act(inf): the limits, but where torch computes -inf * 0.
LIMITS = {
    "relu": (0, INF),
    "softplus": (0, INF),
    "tanh": (-1, 1),
    "sigmoid": (0, 1),
    "silu": (NAN, INF),
    "gelu": (NAN, INF),
    "elu": (-1, INF),
    "identity": (-INF, INF),
}


def sweep(name, dtype, count):
    """Arguments near 0, in the middle, and as far out as act(z) and its factors are normal."""
    rng = np.random.default_rng(0)
    lowest = math.log(np.finfo(dtype).tiny)  # of exp
    if name == "gelu":
        lowest = -math.sqrt(-2 * lowest) + 0.3
    sign = rng.choice([-1.0, 1.0], count)
    parts = [
        np.linspace(-6, 6, count),
        rng.uniform(0.999 * lowest, -5, count),
        rng.uniform(5, 45, count // 4),
        sign * np.exp(rng.uniform(math.log(np.finfo(dtype).tiny), 1, count)),
        sign * np.exp(rng.uniform(-12, 1, count)),
    ]
    return np.concatenate(parts).astype(dtype)


def ulps(got, high, low=0.0):
    """Largest error of `got` against high + low, in spacings of its dtype at the exact value."""
    unit = np.spacing(np.abs(high).astype(got.dtype)).astype(np.float64)
    error = np.abs((got.astype(np.float64) - high) - low) / unit
    return error.max()  # nan, should there be one, and no comparison holds


@functools.cache
def exact_in_mpmath(name, count):
    """A sweep in float64, and act of it as a float64 and what is missing from it."""
    mp = pytest.importorskip("mpmath")
    functions = {
        "softplus": lambda z: z if z > 20 else mp.log1p(mp.exp(z)),
        "tanh": mp.tanh,
        "sigmoid": lambda z: 1 / (1 + mp.exp(-z)),
        "silu": lambda z: z / (1 + mp.exp(-z)),
        "gelu": lambda z: z * mp.erfc(-z / mp.sqrt(2)) / 2,
        "elu": lambda z: z if z > 0 else mp.expm1(z),
        "relu": lambda z: max(z, 0),
        "identity": lambda z: z,
    }
    z = sweep(name, np.float64, count)
    with mp.workdps(40):
        exact = [functions[name](mp.mpf(float(x))) for x in z]
        high = np.array([float(x) for x in exact])
        low = np.array([float(x - float(x)) for x in exact])
    return z, high, low
