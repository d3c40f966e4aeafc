"""kernels/gpu/activations.py, on a card or in Triton's interpreter, and compiled for a card."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from anode_fast.spec import ACTIVATIONS
from tests.kernels.activations import EXACT, LIMITS, TORCH, exact_in_mpmath, exact_silu, sweep, ulps

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from anode_fast.kernels.gpu import activations  # noqa: E402

ROOT = Path(__file__).parents[3]
DTYPES = (np.float32, np.float64)
INF, NAN = np.inf, np.nan


@triton.jit
def _kernel(x_ptr, out_ptr, n, ACT: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i = row[:, None] * 16 + tl.arange(0, 16)[None, :]
    x = tl.load(x_ptr + i, mask=i < n, other=0.0)
    kept = activations.keep(x, ACT)
    tl.store(out_ptr + i, activations.activate(x, ACT), mask=i < n)
    tl.store(out_ptr + n + i, kept, mask=i < n)
    tl.store(out_ptr + 2 * n + i, activations.value(kept, ACT), mask=i < n)
    tl.store(out_ptr + 3 * n + i, activations.derivative(kept, ACT), mask=i < n)


def run(device, name, x):
    """activate(x), keep(x), and value and derivative of the latter, as arrays."""
    if device.type == "cpu" and not triton.knobs.runtime.interpret:
        pytest.skip("needs TRITON_INTERPRET=1")
    rows = 256
    tile = torch.from_numpy(x).to(device)
    out = torch.full((4, x.size), NAN, dtype=tile.dtype, device=device)
    grid = (triton.cdiv(x.size, 16 * rows),)
    with np.errstate(all="ignore"):  # the interpreter's warnings where inf or nan is the answer
        _kernel[grid](tile, out, x.size, ACTIVATIONS.index(name), rows)
    return out.cpu().numpy()


def promised(name, dtype):
    """Units in the last place.

    Of 1, where a derivative comes from a value: that of tanh doubles the value's error, but below 1
    a unit is half as large.
    """
    return 16 if (name, dtype) == ("gelu", np.float64) else 8


def slopes(name, x):
    """act'(x) by autograd, in float64."""
    x = torch.from_numpy(x).double().requires_grad_()
    # torch loses 1 - sigmoid(x) to rounding, which silu's slope multiplies by x.
    function = exact_silu if name == "silu" else TORCH[name]
    return torch.autograd.grad(function(x).sum(), x)[0].numpy()


def test_numbers_are_places_in_the_list_of_names():
    assert [getattr(activations, name.upper()).value for name in ACTIVATIONS] == list(range(8))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_float_is_accurate(device, name):
    x = sweep(name, np.float32, 30_000)
    exact = EXACT[name](torch.from_numpy(x).double()).numpy()
    assert ulps(run(device, name, x)[0], exact) <= promised(name, np.float32)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_double_is_accurate(device, name):
    x, high, low = exact_in_mpmath(name, 1500)
    assert ulps(run(device, name, x)[0], high, low) <= promised(name, np.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_below_normal_numbers_the_value_may_be_0(device, name, dtype):
    lowest = 1.1 * np.log(np.finfo(dtype).tiny)
    x = np.linspace(lowest, 0.95 * lowest, 4096).astype(dtype)
    exact = EXACT[name](torch.from_numpy(x).double()).numpy()
    error = np.abs(run(device, name, x)[0] - exact)
    info = np.finfo(dtype)
    # silu and gelu multiply what is lost by x.
    assert (error <= promised(name, dtype) * info.eps * np.abs(exact) + info.tiny * np.abs(x)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_at_special_points(device, name, dtype):
    info = np.finfo(dtype)
    low, high, nan = run(device, name, np.array([-INF, INF, NAN], dtype))[0]
    np.testing.assert_array_equal([low, high, nan], [*LIMITS[name], NAN])

    huge = np.array([-info.max, -1e30, 1e30, info.max], dtype)
    if name in ("silu", "gelu"):  # torch's gelu is inf at the largest number
        expected = np.maximum(huge, 0)
    else:
        expected = TORCH[name](torch.from_numpy(huge)).numpy()
    np.testing.assert_array_equal(run(device, name, huge)[0], expected)

    small = np.array([0.0, -0.0, info.tiny, -info.tiny, 64 * info.tiny, -64 * info.tiny], dtype)
    expected = EXACT[name](torch.from_numpy(small).double()).numpy()
    error = np.abs(run(device, name, small)[0] - expected)
    assert (error <= promised(name, dtype) * info.eps * np.abs(expected)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_tanh_is_bounded_and_becomes_1(device, dtype):
    last = {np.float32: 9.0, np.float64: 19.0625}[dtype]
    x = np.linspace(last / 2, 2 * last, 4001).astype(dtype)
    value = run(device, "tanh", x)[0]
    assert (value <= 1).all() and (value[x >= last] == 1).all()
    np.testing.assert_array_equal(run(device, "tanh", -x)[0], -value)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_input_is_kept_where_the_value_does_not_give_the_derivative(device, name, dtype):
    x = np.concatenate([np.linspace(-3, 3, 1001), [-INF, INF, NAN]]).astype(dtype)
    activated, kept, value, _ = run(device, name, x)
    from_input = name in ("silu", "gelu")
    assert activations.keeps_input(ACTIVATIONS.index(name)) is from_input
    np.testing.assert_array_equal(kept, x if from_input else activated)
    np.testing.assert_array_equal(value, activated)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivatives_are_those_of_autograd(device, name, dtype):
    info = np.finfo(dtype)
    beside_20 = [np.nextafter(dtype(20), dtype(0)), 20, 20.000001]
    kinks = [0.0, -0.0, info.tiny, -info.tiny, *beside_20, -info.max, -1e30, 1e30, info.max]
    x = np.concatenate([sweep(name, dtype, 20_000), np.array(kinks, dtype)])
    error = np.abs(run(device, name, x)[3] - slopes(name, x))
    assert (error <= promised(name, dtype) * info.eps).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ("softplus", "sigmoid"))
def test_small_derivatives_keep_their_digits(device, name, dtype):
    x = sweep(name, dtype, 20_000)
    x = x[x <= 0]
    exact = slopes(name, x)
    error = np.abs(run(device, name, x)[3] - exact)
    assert (error <= promised(name, dtype) * np.finfo(dtype).eps * exact).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivatives_at_infinity_and_nan(device, name, dtype):
    got = run(device, name, np.array([-INF, INF, NAN], dtype))[3]
    low = 1 if name == "identity" else 0
    high = 0 if name in ("tanh", "sigmoid") else 1
    nan = 1 if name in ("relu", "identity") else NAN
    np.testing.assert_array_equal(got, [low, high, nan])


COMPILE = """
import subprocess
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from anode_fast.kernels.gpu import activations


@triton.jit
def both(x_ptr, out_ptr, ACT: tl.constexpr):
    i = tl.arange(0, 256)
    x = tl.load(x_ptr + i)
    slope = activations.derivative(activations.keep(x, ACT), ACT)
    tl.store(out_ptr + i, activations.activate(x, ACT))
    tl.store(out_ptr + 256 + i, slope)


@triton.jit
def kernel(x32_ptr, out32_ptr, x64_ptr, out64_ptr, ACT: tl.constexpr):
    both(x32_ptr, out32_ptr, ACT)
    both(x64_ptr, out64_ptr, ACT)


signature = {"x32_ptr": "*fp32", "out32_ptr": "*fp32", "x64_ptr": "*fp64", "out64_ptr": "*fp64"}
for number in range(8):
    source = ASTSource(kernel, signature | {"ACT": "constexpr"}, {"ACT": number})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    with open(sys.argv[1], "wb") as file:
        file.write(compiled.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    print(subprocess.check_output([tool, "--dump-resource-usage", sys.argv[1]], text=True))
"""


def test_compiles_for_a_card_without_spills(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(COMPILE)
    # In this process functions may be the interpreter's.
    env = {key: text for key, text in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), str(tmp_path / "cubin")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"STACK:(\d+) .*?LOCAL:(\d+)", done.stdout) == [("0", "0")] * 8
