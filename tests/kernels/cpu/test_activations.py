"""kernels/cpu/activations.hpp, compiled for every instruction set that this machine runs."""

import ctypes
import math
import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from anode_fast.spec import ACTIVATIONS
from tests.kernels.activations import EXACT, LIMITS, TORCH, exact_in_mpmath, exact_silu, sweep, ulps

HEADERS = Path(__file__).parents[3] / "kernels" / "cpu"
# As in setup.py, but that any warning is an error.
FLAGS = (
    "-std=c++17 -O3 -fPIC -shared -ffp-contract=fast -fno-math-errno -fno-trapping-math "
    "-Wall -Wextra -Werror"
).split()
AVX512 = [f"avx512{part}" for part in ("f", "dq", "bw", "vl")]
NEEDED = {"baseline": [], "avx2": ["avx2", "fma"], "avx512": [*AVX512, "fma"]}
MAX_LANES = 16
DTYPES = (np.float32, np.float64)

SHIM = """
#include "activations.hpp"
using namespace anode;
extern "C" int from_value(int a) { return slope_from_value(Activation(a)); }
#define SHIM(T)                                                                          \\
  extern "C" void activate_##T(int a, T* z, std::size_t n) {                             \\
    activate<T>(Activation(a), z, n);                                                    \\
  }                                                                                      \\
  extern "C" void saving_##T(int a, T* z, T* slope, std::size_t n) {                     \\
    activate_saving<T>(Activation(a), z, slope, n);                                      \\
  }                                                                                      \\
  extern "C" void times_##T(int a, T* d, const T* value, const T* slope, std::size_t n) { \\
    times_slope<T>(Activation(a), d, value, slope, n);                                   \\
  }
SHIM(float)
SHIM(double)
"""

# Errors in units in the last place. gelu is a product of several approximations.
MAX_ULPS = {"relu": 0, "identity": 0, "elu": 2, "gelu": 8}


class Library:
    """The three functions, as functions of arrays that leave their arguments alone."""

    def __init__(self, path):
        self._lib = ctypes.CDLL(str(path))

    def slope_from_value(self, name):
        return bool(self._lib.from_value(ACTIVATIONS.index(name)))

    def activate(self, name, z):
        (value,) = self._call("activate", name, z)
        return value

    def activate_saving(self, name, z):
        return self._call("saving", name, z, np.full_like(z, np.nan))

    def times_slope(self, name, delta, value, slope):
        return self._call("times", name, delta, value, slope)[0]

    def _call(self, function, name, *arrays):
        """Runs on copies of the arrays, each with a guard before and after and off alignment."""
        kind = "float" if arrays[0].dtype == np.float32 else "double"
        count = -(-arrays[0].size // MAX_LANES) * MAX_LANES
        guard, buffers = 1 + MAX_LANES, []
        for array in arrays:
            buffer = np.full(count + 2 * guard, 17, array.dtype)
            buffer[guard : guard + array.size] = array
            buffers.append(buffer)
        pointers = [
            ctypes.c_void_p(buffer.ctypes.data + guard * buffer.itemsize) for buffer in buffers
        ]
        getattr(self._lib, f"{function}_{kind}")(
            ACTIVATIONS.index(name), *pointers, ctypes.c_size_t(count)
        )
        for buffer in buffers:
            assert (buffer[:guard] == 17).all() and (buffer[guard + count :] == 17).all()
        return [buffer[guard : guard + arrays[0].size] for buffer in buffers]


def cpu_flags():
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return set()
    lines = [line for line in info.read_text().splitlines() if line.startswith("flags")]
    return set(lines[0].split(":", 1)[1].split()) if lines else set()


def find_compiler():
    if command := shlex.split(os.environ.get("CXX", "")):
        return command if shutil.which(command[0]) else None
    return next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


@pytest.fixture(scope="session", params=NEEDED)
def library(request, tmp_path_factory):
    needed = NEEDED[request.param]
    compiler = find_compiler()
    if not compiler:
        pytest.skip("needs a C++ compiler")
    if needed and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip(f"{request.param} is an instruction set of x86")
    if missing := set(needed) - cpu_flags():
        pytest.skip(f"this CPU has no {', '.join(sorted(missing))}")
    folder = tmp_path_factory.mktemp(request.param)
    command = [*compiler, *FLAGS, *(f"-m{flag}" for flag in needed)]
    empty, source, path = folder / "empty.cpp", folder / "shim.cpp", folder / "shim.so"
    empty.write_text("")
    source.write_text(SHIM)
    if subprocess.run([*command, str(empty), "-o", str(path)], capture_output=True).returncode:
        pytest.skip(f"{compiler[0]} knows no {' '.join(command[len(compiler) :])}")
    build = [*command, f"-I{HEADERS}", str(source), "-o", str(path)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Library(path)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_float_is_accurate_to_a_few_ulps(library, name):
    z = sweep(name, np.float32, 100_000)
    exact = EXACT[name](torch.from_numpy(z).double()).numpy()
    for value in (library.activate(name, z), library.activate_saving(name, z)[0]):
        assert ulps(value, exact) <= MAX_ULPS.get(name, 4)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_double_is_accurate_to_a_few_ulps(library, name):
    z, high, low = exact_in_mpmath(name, 1500)
    for value in (library.activate(name, z), library.activate_saving(name, z)[0]):
        assert ulps(value, high, low) <= MAX_ULPS.get(name, 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_below_normal_numbers_the_absolute_error_is_tiny(library, name, dtype):
    lowest = 1.1 * math.log(np.finfo(dtype).tiny)
    z = np.linspace(lowest, 0.95 * lowest, 4096).astype(dtype)
    exact = EXACT[name](torch.from_numpy(z).double()).numpy()
    error = np.abs(library.activate(name, z) - exact)
    scale = np.maximum(np.abs(exact), np.finfo(dtype).tiny * np.abs(z))
    assert (error <= 8 * np.finfo(dtype).eps * scale).all()


INF, NAN = math.inf, math.nan


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_special_values(library, name, dtype):
    info = np.finfo(dtype)
    for value in (library.activate, lambda *args: library.activate_saving(*args)[0]):
        low, high, nan = value(name, np.array([-INF, INF, NAN], dtype))
        np.testing.assert_array_equal([low, high, nan], [*LIMITS[name], NAN])

        huge = np.array([-info.max, -1e30, 1e30, info.max], dtype)
        expected = TORCH[name](torch.from_numpy(huge)).numpy()
        if name == "gelu":  # torch's is inf at the largest number
            expected = F.relu(torch.from_numpy(huge)).numpy()
        np.testing.assert_array_equal(value(name, huge), expected)

        tiny = info.smallest_subnormal
        small = np.array([0.0, -0.0, tiny, -tiny, 5 * tiny, info.tiny, -info.tiny], dtype)
        expected = EXACT[name](torch.from_numpy(small)).numpy()
        got = value(name, small)
        assert (np.abs(got - expected) <= np.maximum(tiny, info.eps * np.abs(expected))).all()
        np.testing.assert_array_equal(np.signbit(got), np.signbit(expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_slopes_are_those_of_autograd(library, name, dtype):
    info = np.finfo(dtype)
    huge = np.array([-info.max, -1e30, 1e30, info.max, 0.0, -0.0], dtype)
    z = np.concatenate([sweep(name, dtype, 20_000), huge])
    exact = torch.from_numpy(z).double().requires_grad_()
    # torch loses 1 - sigmoid(z) to rounding, which silu's slope multiplies by z.
    function = exact_silu if name == "silu" else TORCH[name]
    (expected,) = torch.autograd.grad(function(exact).sum(), exact)
    value, slope = library.activate_saving(name, z)
    delta = np.random.default_rng(1).standard_normal(z.size).astype(dtype)
    got = library.times_slope(name, delta, value, slope)
    error = np.abs(got - delta.astype(np.float64) * expected.numpy())
    assert (error <= 5 * info.eps * np.maximum(np.abs(delta), info.tiny)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_slopes_at_infinity_and_nan(library, name, dtype):
    z = np.array([-INF, INF, NAN], dtype)
    got = library.times_slope(name, np.full(3, 2, dtype), *library.activate_saving(name, z))
    low = 2 if name == "identity" else 0
    high = 0 if name in ("tanh", "sigmoid") else 2
    nan = 2 if name == "identity" else NAN
    np.testing.assert_array_equal(got, [low, high, nan])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_slope_is_written_and_read_only_if_the_value_does_not_give_it(library, name, dtype):
    z = np.linspace(-3, 3, 48).astype(dtype)
    value, slope = library.activate_saving(name, z)
    from_value = library.slope_from_value(name)
    assert from_value == (name not in ("softplus", "silu", "gelu"))
    assert np.isnan(slope).all() if from_value else not np.isnan(slope).any()
    # What is not needed may be nan.
    unneeded = value if from_value else np.full_like(z, np.nan)
    got = library.times_slope(name, np.ones_like(z), unneeded, slope)
    assert not np.isnan(got).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_no_values_and_every_lane(library, name, dtype):
    assert library.activate(name, np.empty(0, dtype)).size == 0
    z = np.full(MAX_LANES, 0.5, dtype)
    together = library.activate(name, z)
    assert (together == together[0]).all()
    for lane in range(MAX_LANES):  # nan in one lane stays there
        poisoned = z.copy()
        poisoned[lane] = np.nan
        np.testing.assert_array_equal(
            np.isnan(library.activate(name, poisoned)), np.arange(MAX_LANES) == lane
        )
