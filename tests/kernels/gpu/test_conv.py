"""Convolutional fields on a GPU: one evaluation and its gradients, against float64.

A single step of Euler's method from 0 to 1 adds the field's value at time 0 to the state; one back
from 2 to 1 takes that at time 2 away.
"""

import pytest
import torch

pytest.importorskip("triton")

from anode_fast import ConvField, explain, odeint  # noqa: E402
from anode_fast.kernels.gpu import launch  # noqa: E402
from anode_fast.kernels.interface import ConvField as Field  # noqa: E402
from anode_fast.spec import ACTIVATIONS  # noqa: E402
from tests.helpers import assert_no_worse  # noqa: E402

f32, f64 = torch.float32, torch.float64


def made(channels, filters, activation, time_dependent=True, gain=1.0):
    """A field in float64."""
    generator = torch.Generator().manual_seed(0)
    field = ConvField(channels, filters, activation=activation, time_dependent=time_dependent)
    with torch.no_grad():
        for p in field.double().parameters():
            scale = gain * (p[0].numel() if p.dim() > 1 else 4) ** -0.5
            p.copy_(scale * torch.randn(p.shape, generator=generator, dtype=f64))
    return field


def evaluated(field, x, backend, t=(2.0, 1.0), sizes=1.0):
    """The step's end, and the gradients of a random functional of it, by name."""
    field.zero_grad()
    x = x.detach().requires_grad_()
    options = dict(step_size=abs(t[1] - t[0]), interp="linear")
    t = torch.tensor(t, dtype=f64)
    y = odeint(field, x, t, method="euler", backend=backend, options=options)[-1]
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=f64)
    cotangent = (cotangent * sizes).to(y)
    grads = torch.autograd.grad(y, [x, *field.parameters()], cotangent)
    names = ["d_x", *(f"d_{name}" for name, _ in field.named_parameters())]
    return {"y": (y - x).detach()} | dict(zip(names, grads, strict=True))


def check(shape, filters, activation, device, dtype=f32, size=1.0, gain=1.0, **given):
    field = made(shape[1], filters, activation, gain=gain, **given)
    x = size * torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=f64)
    x = x.to(dtype).double()
    field.to(dtype).double()
    exact = evaluated(field, x, "reference")
    field, x = field.to(device, dtype), x.to(device, dtype)
    ref, got = evaluated(field, x, "reference"), evaluated(field, x, "triton")
    for name, value in exact.items():
        assert (got[name].dtype, got[name].shape) == (dtype, value.shape)
        if not value.numel():
            continue
        if name != "y" and activation == "relu" and dtype == f32:
            # Rounding may put a unit on the other side of the kink, where the slope jumps.
            far = ((got[name].cpu() - value).abs() > 1e-4 * value.abs().amax()).sum()
            assert far <= max(2, 0.02 * value.numel()), name
        else:
            assert_no_worse(got[name], ref[name], value, name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, device):
    check((3, 3, 5, 7), 16, activation, device)


@pytest.mark.parametrize(
    "shape", [(2, 3, 8, 8), (1, 2, 1, 1), (3, 1, 1, 9), (2, 2, 70, 1), (0, 3, 5, 4)], ids=str
)
def test_sizes(shape, device):
    check(shape, 16, "tanh", device)


@pytest.mark.slow
def test_images_of_mnist(device):
    check((2, 6, 28, 28), 16, "relu", device)


@pytest.mark.parametrize("channels, filters", [(1, 92), (6, 23), (13, 5), (64, 44)])
def test_widths(channels, filters, device):
    check((2, channels, 6, 5), filters, "softplus", device)


def test_filters_of_cifar10(device):
    check((1, 3, 4, 4), 125, "relu", device)


def test_no_time(device):
    check((2, 3, 6, 5), 16, "tanh", device, time_dependent=False)


@pytest.mark.parametrize("activation", ["relu", "softplus"])
def test_double(activation, device):
    check((2, 3, 6, 5), 20, activation, device, dtype=f64)


@pytest.mark.parametrize("size, gain", [(1e6, 1.0), (1e-6, 1.0), (1.0, 1e-4), (1.0, 1e4)])
def test_numbers_of_any_size_fit_into_16_bits(size, gain, device):
    check((2, 3, 6, 5), 16, "identity", device, size=size, gain=gain)


def test_images_of_very_different_size(device):
    field = made(3, 16, "identity").to(device, f32)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2)).to(device)
    x[1] *= 1e5
    found = evaluated(field, x, "triton")
    apart = evaluated(field, x[:1], "triton")
    ref = evaluated(field.double(), x.double(), "reference")
    for of_small in (found["y"][:1], apart["y"]):
        error = (of_small - ref["y"][:1]).abs().max()
        assert error < 1e-6 * ref["y"][0].abs().max()


@pytest.mark.parametrize("is_below", [True, False])
def test_a_tile_whose_neighbour_is_far_larger(is_below, device):
    # What scales a tile's numbers has to know its neighbours', in either direction; and what scales
    # those of a sum over tiles, all of them. Three tiles of 8 rows.
    rows = torch.arange(24) >= 16 if is_below else torch.arange(24) < 8
    columns = (torch.arange(8) // 2) % 3 > 0  # not those that follow one another in memory
    sizes = torch.where(rows[:, None] & columns, 1e7, 1.0).double()
    field = made(2, 16, "identity")
    x = torch.randn(1, 2, 24, 8, generator=torch.Generator().manual_seed(2), dtype=f64) * sizes
    x = x.float().double()
    exact = evaluated(field.float().double(), x, "reference", sizes=sizes)
    field, x = field.to(device, f32), x.to(device, f32)
    ref, got = (evaluated(field, x, name, sizes=sizes.cpu()) for name in ("reference", "triton"))
    for name, value in exact.items():
        assert_no_worse(got[name], ref[name], value, name)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_high_precision_is_that_of_tf32(activation, device):
    field = made(6, 32, activation)
    x = torch.randn(2, 6, 8, 8, generator=torch.Generator().manual_seed(2), dtype=f64)
    exact = evaluated(field, x, "reference")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        found = evaluated(field.to(device, f32), x.to(device, f32), "triton")
    finally:
        torch.set_float32_matmul_precision(before)
    for name, value in exact.items():
        if name == "y" or activation == "tanh":
            error = (found[name].cpu() - value).norm() / value.norm()
            assert error < 2e-3, name
    # And not more than that: it is used.
    assert (found["y"].cpu() - exact["y"]).norm() / exact["y"].norm() > 1e-6


@pytest.mark.parametrize("rtol, is_raised", [(1e-3, False), (1e-4, True)])
def test_an_error_below_the_noise_raises_the_precision(rtol, is_raised, device):
    field, x = made(3, 16, "relu").to(device, f32), torch.zeros(1, 3, 5, 5, device=device)
    t = torch.tensor([0.0, 1.0])
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        text = explain(field, x, t, backend="triton", rtol=rtol, atol=rtol)
        options = dict(step_size=0.5)
        fixed = explain(field, x, t, backend="triton", method="rk4", rtol=rtol, options=options)
    finally:
        torch.set_float32_matmul_precision(before)
    assert ("raised for rtol" in text) == ("of two 16-bit parts" in text) == is_raised
    assert "products of 16-bit numbers" in fixed


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so_where_it_is_seen(value, device):
    field = made(2, 16, "relu").to(device, f32)
    x = torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(2)).to(device)
    x[0, 1, 2, 2] = value
    t = torch.tensor([0.0, 1.0])
    given = dict(method="euler", backend="triton", options=dict(step_size=1.0))
    if device.type == "cpu":
        with pytest.raises(RuntimeError, match="non-finite values in state"):
            odeint(field, x, t, **given)
    else:  # nobody waits for the device
        y = odeint(field, x, t, **given)
        assert not y[0].isfinite().all() and not y[1].isfinite().all()


@pytest.mark.parametrize(
    "field, reason",
    [
        (Field(3, 129, 0, True), "129 filters, the GPU kernels take 128 at most"),
        (Field(65, 64, 0, True), "65 channels, the GPU kernels take 64 at most"),
        (Field(63, 65, 0, True), "and 62 with more than 64 filters"),
        (Field(62, 128, 0, True), ""),
        (Field(64, 64, 0, True), ""),
    ],
)
def test_fields_that_are_too_large(field, reason):
    assert reason in launch.why_not(field, f32)
    assert bool(launch.why_not(field, f32)) == bool(reason)
