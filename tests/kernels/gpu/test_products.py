"""kernels/gpu/products.py: tf32, with and without hardware that drops what it does not take."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from anode_fast.kernels.gpu.products import KEPT, nearest_tf32, product
from tests.kernels.gpu.solves import Case, f32, f64, solved
from tests.kernels.gpu.test_conv import evaluated, made


class Precision(NamedTuple):
    """What a product wants of a field."""

    precision: str


@triton.jit
def _rounded(x, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, nearest_tf32(tl.load(x + i)))


@triton.jit
def _product(a, b, out, M: tl.constexpr, K: tl.constexpr, F: tl.constexpr):
    m, k = tl.arange(0, M), tl.arange(0, K)
    at_a, at_b = m[:, None] * K + k[None, :], k[:, None] * M + m[None, :]
    found = product(tl.load(a + at_a), tl.load(b + at_b), None, F)
    tl.store(out + m[:, None] * M + m[None, :], found)


def rounded(x):
    """The same by numpy, of finite numbers: float64 has a tf32's neighbours exactly."""
    bits = x.float().numpy().view(np.int32)
    below, above = ((bits & KEPT.value) + shift for shift in (0, -KEPT.value))
    below, above = (n.view(np.float32).astype(np.float64) for n in (below, above))
    is_nearer = np.abs(above - x.double().numpy()) <= np.abs(x.double().numpy() - below)
    return torch.from_numpy(np.where(is_nearer, above, below)).float()


def test_nearest_tf32(device):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1024, generator=generator) * torch.logspace(-30, 30, 1024)
    x[:4] = torch.tensor([0.0, 1 + 2**-11, 1 + 3 * 2**-11, -(1 + 2**-11)])  # halfway
    want = rounded(x)
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    x[-4:], want[-4:] = special, special
    x[-5:-4] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(f32)  # what a GPU makes
    want[-5] = float("nan")
    out = torch.empty_like(x, device=device)
    _rounded[(1,)](x.to(device), out, 1024)
    torch.testing.assert_close(out.cpu(), want, rtol=0, atol=0, equal_nan=True)


def test_operands_are_rounded(device):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(shape, generator=generator) for shape in ((16, 512), (512, 16)))
    out = torch.empty(16, 16, device=device)
    _product[(1,)](a.to(device), b.to(device), out, 16, 512, Precision("tf32"))
    want = rounded(a).double() @ rounded(b).double()
    torch.testing.assert_close(out.cpu().double(), want, rtol=1e-5, atol=0)
    assert ((out.cpu().double() - a.double() @ b.double()) / want).mean().abs() < 1e-5


@pytest.fixture
def dropping(monkeypatch):
    """The interpreter's tf32 products as the hardware makes them: of operands cut short."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    builder = interpreter.InterpreterBuilder
    made = []
    dot = builder.create_dot

    def cut(handle):
        bits = handle.data.view(np.int32) & KEPT.value
        return interpreter.TensorHandle(bits.view(np.float32), handle.dtype)

    def create_dot(self, a, b, d, precision, *args):
        if str(precision).lower().endswith("tf32") and a.data.dtype == np.float32:
            made.append(a.data.shape)
            a, b = cut(a), cut(b)
        return dot(self, a, b, d, precision, *args)

    return lambda: monkeypatch.setattr(builder, "create_dot", create_dot) or made


@pytest.fixture
def _high():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def assert_alike(got, want):
    for name, value in want.items():
        assert torch.equal(got[name], value), name


@pytest.mark.usefixtures("_high")
def test_perceptrons_do_not_depend_on_what_is_dropped(dropping):
    case, given = Case(layers=2, t=(0.0, 0.5)), dict(method="heun3", options={"step_size": 0.5})
    want, _ = solved(case, f32, torch.device("cpu"), **given)
    exact, _ = solved(case, f64, torch.device("cpu"), **given)
    made = dropping()
    got, _ = solved(case, f32, torch.device("cpu"), **given)
    assert made
    assert_alike(got, want)
    assert not torch.equal(got["y"], exact["y"].float())


@pytest.mark.usefixtures("_high")
def test_images_do_not_depend_on_what_is_dropped(dropping):
    field = made(3, 16, "tanh").float()
    x = torch.randn(1, 3, 5, 4, generator=torch.Generator().manual_seed(2))
    want = evaluated(field, x, "triton")
    found = dropping()
    got = evaluated(field, x, "triton")
    assert found
    assert_alike(got, want)
