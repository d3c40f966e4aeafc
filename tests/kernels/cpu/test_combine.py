"""What a step computes beside the field, against torch in float64."""

import ctypes
import math

import pytest
import torch

from anode_fast.kernels.cpu import library
from anode_fast.kernels.cpu.combine import Numbers, Steps

pytestmark = pytest.mark.skipif(bool(library.missing()), reason=f"no C++: {library.missing()}")

DTYPES = [torch.float32, torch.float64]
SIZES = [0, 1, 15, 16, 512, 513, 70_001]  # around a vector, a block, and where threads begin


def tensors(count, n, dtype):
    generator = torch.Generator().manual_seed(n)
    return torch.randn(count, n, generator=generator, dtype=torch.float64).to(dtype).unbind()


def addresses(ks):
    return [k.data_ptr() for k in ks]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_combine(n, dtype):
    native = Steps(library.load(), dtype)
    y, *ks = tensors(4, n, dtype)
    weights, h = [0.5, 0.0, -2.0], 0.25
    ks[1] = torch.full_like(y, math.nan)  # of weight 0: not read
    for start in (y, None):
        out = torch.full_like(y, math.nan)
        native.combine(start, addresses(ks), Numbers(weights), h, out)
        exact = h * (0.5 * ks[0].double() - 2.0 * ks[2].double())
        exact = exact if start is None else y.double() + exact
        torch.testing.assert_close(out.double(), exact, rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_combine_nothing():
    native = Steps(library.load(), torch.float64)
    out = torch.full((3,), math.nan, dtype=torch.float64)
    native.combine(None, addresses([out]), Numbers([0.0]), 1.0, out)
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_spread(n, dtype):
    native = Steps(library.load(), dtype)
    (grad,) = tensors(1, n, dtype)
    found = native.spread(grad, Numbers([0.5, 0.0, -2.0, 7.0]), 0.5, 3)
    assert torch.equal(found, torch.stack([0.25 * grad, 0.0 * grad, -grad]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("is_tensor", [False, True], ids=["numbers", "tensors"])
def test_error_ratio(n, dtype, is_tensor):
    native = Steps(library.load(), dtype)
    y0, y1, *ks = tensors(4, n, dtype)
    rtol, atol = 0.25, 0.5
    if is_tensor:
        rtol, atol = (x.abs() + 0.1 for x in tensors(2, n, dtype))
    found = native.error_ratio(
        *(y0, y1, addresses(ks), Numbers([1.0, -1.0]), 2.0),
        *((rtol, atol), Numbers([n], ctypes.c_int64)),
    )
    size = torch.maximum(y0.abs(), y1.abs()).double()
    scaled = 2.0 * (ks[0].double() - ks[1].double()) / (atol + rtol * size)
    exact = scaled.pow(2).mean().sqrt().item() if n else 0.0
    assert found == pytest.approx(exact, rel=100 * torch.finfo(dtype).eps)


def test_the_largest_of_parts_counts_and_nan_is_found_in_any():
    native = Steps(library.load(), torch.float64)
    k = torch.tensor([3.0, 4.0, 1.0, 100.0], dtype=torch.float64)
    zero = torch.zeros_like(k)

    def ratio(k, *ends, y0=zero, y1=zero):
        return native.error_ratio(
            *(y0, y1, addresses([k]), Numbers([1.0]), 1.0, (1.0, 1.0)),
            Numbers(ends, ctypes.c_int64),
        )

    assert ratio(k, 1) == 3.0
    assert ratio(k, 2, 3) == pytest.approx(math.sqrt(12.5))
    assert ratio(k, 1, 1, 2) == 4.0
    assert ratio(k, 2, 4) == pytest.approx(math.sqrt(10_001 / 2))
    for i in range(4):
        bad = k.clone()
        bad[i] = math.nan
        assert math.isnan(ratio(bad, 1, 3, 4))
        assert math.isnan(ratio(k, 1, 3, 4, y0=bad))
        assert math.isnan(ratio(k, 1, 3, 4, y1=bad))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_node_times(dtype):
    native = Steps(library.load(), dtype)
    nodes = Numbers([0.0, 0.3, 1.0])

    def times(first=0, sides=(0, 0), sign=1.0):
        found = native.node_times(nodes, first, (0.7, 1.9), sides, sign)
        assert all(t.shape == () and t.dtype == dtype for t in found)
        return torch.stack(found)

    exact = torch.tensor([0.7, 0.7 + 0.3 * (1.9 - 0.7), 1.9], dtype=torch.float64).to(dtype)
    torch.testing.assert_close(times(), exact, rtol=torch.finfo(dtype).eps, atol=0)
    assert torch.equal(times()[::2], exact[::2])
    assert torch.equal(times(sign=-1.0), -times())
    assert torch.equal(times(first=1), times()[1:])
    beside = times()
    beside[0] = torch.nextafter(exact[0], torch.tensor(math.inf, dtype=dtype))
    beside[2] = torch.nextafter(exact[2], torch.tensor(-math.inf, dtype=dtype))
    assert torch.equal(times(sides=(1, -1)), beside)
