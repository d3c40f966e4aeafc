"""elementwise.hpp: single functions, for every instruction set that this machine runs."""

import ctypes
import subprocess

import numpy as np
import pytest

from anode_fast.kernels.cpu.lowering import OPS
from tests.kernels.activations import ulps
from tests.kernels.cpu.test_activations import (
    FLAGS,
    HEADERS,
    NEEDED,
    cpu_flags,
    find_compiler,
)

INF, NAN = np.inf, np.nan
DTYPES = (np.float32, np.float64)
both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float", "double"])

SHIM = """
#include "elementwise.hpp"
using namespace anode;
#define SHIM(T)                                                                        \\
  extern "C" void apply_##T(int op, T* x, T* y, int vectors, double number) {          \\
    const View<T> in{x, vectors * kLanes<T>, kLanes<T>}, out{y, in.feature, in.vector}; \\
    apply<T>(Op(op), &in, &out, false, 1, vectors, T(number));                         \\
  }
SHIM(float)
SHIM(double)
"""
LANES = 16


@pytest.fixture(scope="module", params=NEEDED)
def apply(request, tmp_path_factory):
    """A function (op, array, number) for an instruction set."""
    compiler, needed = find_compiler(), NEEDED[request.param]
    if not compiler:
        pytest.skip("needs a C++ compiler")
    if missing := set(needed) - cpu_flags():
        pytest.skip(f"this CPU has no {', '.join(sorted(missing))}")
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "shim.cpp").write_text(SHIM)
    path = folder / "shim.so"
    command = [*compiler, *FLAGS, *(f"-m{flag}" for flag in needed), f"-I{HEADERS}"]
    subprocess.run([*command, str(folder / "shim.cpp"), "-o", str(path)], check=True)
    shim = ctypes.CDLL(str(path))
    lanes = {"baseline": 16, "avx2": 32, "avx512": 64}[request.param]

    def call(op, x, number=0.0):
        padded = np.concatenate([x, np.ones(-x.size % LANES, x.dtype)])
        out = np.full_like(padded, NAN)
        function = shim.apply_float if x.dtype == np.float32 else shim.apply_double
        function(
            OPS.index(op),
            ctypes.c_void_p(padded.ctypes.data),
            ctypes.c_void_p(out.ctypes.data),
            padded.nbytes // lanes,
            ctypes.c_double(number),
        )
        return out[: x.size]

    return call


def spread(dtype, low, high, count=3000):
    """Numbers of both signs, of all sizes between."""
    x = np.exp(np.random.default_rng(0).uniform(np.log(low), np.log(high), count))
    return np.concatenate([x, -x]).astype(dtype)


def arguments(op, dtype):
    info = np.finfo(dtype)
    log_max = float(np.log(info.max))
    if op in ("exp", "expm1"):
        # Results that are normal numbers.
        x = np.concatenate([spread(dtype, 1e-9, 1), np.linspace(-0.99 * log_max, log_max, 4000)])
        return x.astype(dtype)[:-1]
    if op == "log":
        near_1 = 1 + spread(dtype, 10 * info.eps, 0.4)
        return np.concatenate([np.abs(spread(dtype, info.smallest_subnormal, info.max)), near_1])
    if op == "log1p":
        return np.concatenate([spread(dtype, 1e-9, 0.99), np.abs(spread(dtype, 1, info.max))])
    if op in ("sqrt", "reciprocal"):
        return np.abs(spread(dtype, info.tiny, 1 / info.tiny / 2))
    return np.concatenate([spread(dtype, 1e-9, 100), spread(dtype, 1, 7000)])


EXACT = {
    "exp": "exp",
    "expm1": "expm1",
    "log": "log",
    "log1p": "log1p",
    "sin": "sin",
    "cos": "cos",
    "sqrt": "sqrt",
    "reciprocal": "mpf",
}


@both_dtypes
@pytest.mark.parametrize("op", EXACT)
def test_accurate_to_a_few_ulps(apply, op, dtype):
    mp = pytest.importorskip("mpmath")
    x = arguments(op, dtype)[:: 4 if dtype == np.float64 else 1]
    with mp.workdps(40):
        function = getattr(mp, EXACT[op])
        exact = [function(1 / mp.mpf(float(a)) if op == "reciprocal" else float(a)) for a in x]
        high = np.array([float(e) for e in exact])
        low = np.array([float(e - float(e)) for e in exact])
    assert ulps(apply(op, x), high, low) <= (0.51 if op in ("sqrt", "reciprocal") else 3)


@both_dtypes
@pytest.mark.parametrize("op", ["sin", "cos"])
def test_large_angles(apply, op, dtype):
    x = spread(dtype, 1e5, np.finfo(dtype).max / 2, 500)
    want = getattr(np, op)(x.astype(np.float64))
    np.testing.assert_allclose(apply(op, x), want, rtol=4 * np.finfo(dtype).eps, atol=1e-15)


SPECIAL = {
    "neg": [(0.0, -0.0), (INF, -INF)],
    "abs": [(-0.0, 0.0), (-INF, INF)],
    "sign": [(-3.0, -1.0), (2.0, 1.0), (0.0, 0.0), (INF, 1.0)],
    "reciprocal": [(0.0, INF), (-0.0, -INF), (INF, 0.0)],
    "sqrt": [(0.0, 0.0), (INF, INF), (-1.0, NAN)],
    "exp": [(0.0, 1.0), (-INF, 0.0), (INF, INF), (1e30, INF), (-1e30, 0.0)],
    "expm1": [(0.0, 0.0), (-0.0, -0.0), (-INF, -1.0), (INF, INF), (1e30, INF), (-1e30, -1.0)],
    "log": [(1.0, 0.0), (0.0, -INF), (-0.0, -INF), (-1.0, NAN), (INF, INF), (-INF, NAN)],
    "log1p": [(0.0, 0.0), (-0.0, -0.0), (-1.0, -INF), (-2.0, NAN), (INF, INF), (-INF, NAN)],
    "sin": [(0.0, 0.0), (-0.0, -0.0), (INF, NAN), (-INF, NAN)],
    "cos": [(0.0, 1.0), (INF, NAN)],
}


@both_dtypes
@pytest.mark.parametrize("op", SPECIAL)
def test_special_values(apply, op, dtype):
    cases = SPECIAL[op] if op == "sign" else [*SPECIAL[op], (NAN, NAN)]
    x, want = (np.array(column, dtype) for column in zip(*cases, strict=True))
    got = apply(op, x)
    np.testing.assert_array_equal(got, want)
    known = ~np.isnan(want)
    np.testing.assert_array_equal(np.signbit(got[known]), np.signbit(want[known]))


@both_dtypes
@pytest.mark.parametrize("power", [-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 1.7, -2.5])
def test_powers(apply, power, dtype):
    x = np.abs(spread(dtype, 0.01, 100, 500))
    want = x.astype(np.float64) ** power
    np.testing.assert_allclose(apply("pow", x, power), want, rtol=4 * np.finfo(dtype).eps)


@both_dtypes
@pytest.mark.parametrize("alpha", [0.5, 1.0, 3.0])
def test_elu(apply, alpha, dtype):
    x = spread(dtype, 1e-6, 50)
    wide = x.astype(np.float64)
    rtol = 6 * np.finfo(dtype).eps
    value = np.where(wide > 0, wide, alpha * np.expm1(np.minimum(wide, 0)))
    np.testing.assert_allclose(apply("elu", x, alpha), value, rtol=rtol)
    slope = np.where(wide > 0, 1, alpha * np.exp(np.minimum(wide, 0)))
    np.testing.assert_allclose(apply("d_elu", x, alpha), slope, rtol=rtol)
