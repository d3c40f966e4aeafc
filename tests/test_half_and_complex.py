"""Half precision, autocast and complex states."""

import math

import pytest
import torch
from torch import nn

from anode_fast import odeint, odeint_adjoint
from anode_fast.errors import InvalidType

pytestmark = pytest.mark.usefixtures("own_code")

T = torch.tensor([0.0, 0.5, 1.0])
RUNS = {
    "dopri5": (dict(rtol=1e-4, atol=1e-4), 0.0),
    "rk4": (dict(method="rk4", options=dict(step_size=0.1)), 0.0),
    "euler": (dict(method="euler", options=dict(step_size=0.005)), 1e-3),
}
runs = pytest.mark.parametrize(("run", "own"), RUNS.values(), ids=RUNS)
halves = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 0.02), (torch.float16, 5e-3)]
)


class Decay(nn.Module):
    """-k y, k = 1, which notes the dtypes it gets."""

    def __init__(self, dtype):
        super().__init__()
        self.k = nn.Parameter(torch.ones((), dtype=dtype))
        self.seen = set()

    def forward(self, t, y):
        self.seen.add((t.dtype, y.dtype))
        return -self.k * y


@runs
@halves
@pytest.mark.parametrize("solve", [odeint, odeint_adjoint])
def test_half_precision(solve, dtype, tolerance, run, own):
    field = Decay(dtype)
    y0 = torch.ones(4, dtype=dtype, requires_grad=True)
    y = solve(field, y0, T, **run)
    assert (y.dtype, y.shape) == (dtype, (3, 4))
    assert field.seen == {(dtype, dtype)}
    want = torch.exp(-T.double())[:, None].expand(3, 4)
    torch.testing.assert_close(y.double(), want, rtol=0, atol=tolerance + own)
    y[-1].sum().backward()
    assert y0.grad.dtype == field.k.grad.dtype == dtype
    # d exp(-k)/d y0 = exp(-1), d exp(-k)/dk = -exp(-1), for each of 4 entries.
    torch.testing.assert_close(
        y0.grad.double(), want[-1], rtol=0, atol=tolerance + own, msg="gradient of y0"
    )
    # Autograd sums k's gradient over all steps in its own dtype, which rounds once a step.
    assert abs(field.k.grad.item() / (4 * math.exp(-1)) + 1) < 4 * (tolerance + own)


@halves
def test_many_small_steps_do_not_stall(dtype, tolerance):
    # In bfloat16 arithmetic 1 - 0.001 rounds to 1, so that the state would never move.
    run = dict(method="euler", options=dict(step_size=0.001))
    y = odeint(lambda t, y: -y, torch.ones(1, dtype=dtype), T[::2], **run)
    assert abs(y[-1].item() - math.exp(-1)) < tolerance


@halves
def test_half_tuple(dtype, tolerance):
    y0 = (torch.ones(2, dtype=dtype), torch.zeros(3, dtype=dtype))
    run = dict(rtol=1e-3, atol=1e-3)
    a, b = odeint(lambda t, y: (-y[0], torch.ones_like(y[1])), y0, T, **run)
    assert (a.dtype, b.dtype, a.shape, b.shape) == (dtype, dtype, (3, 2), (3, 3))
    assert (a[-1] - math.exp(-1)).abs().max() < tolerance
    assert (b[-1] - 1).abs().max() < tolerance


def test_tolerances_below_roundoff_are_raised():
    # The default tolerances, 1e-7, mean nothing to a bfloat16 field: no storm of rejected steps.
    y0 = torch.ones(4, dtype=torch.bfloat16)
    net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 4)).bfloat16()
    with torch.no_grad():
        _, stats = odeint(lambda t, y: net(y), y0, T, return_stats=True)
    assert stats.nfe < 100


@pytest.mark.parametrize("solve", [odeint, odeint_adjoint])
def test_autocast(solve):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8))

        def forward(self, t, y):
            return self.net(y)

    field, y0 = Net(), 3 * torch.randn(16, 8)
    run = dict(rtol=1e-6, atol=1e-7, return_stats=True)
    plain, stats = solve(field, y0, T, **run)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, cast = solve(field, y0, T, **run)
    assert (y.dtype, plain.dtype) == (torch.float32, torch.float32)
    assert cast.nfe < 4 * stats.nfe
    assert 0 < (y - plain).abs().max() < 0.05  # it did compute in bfloat16
    grads = []
    for result in (plain, y):
        field.zero_grad()
        result[-1].square().mean().backward()
        grads.append(field.net[0].weight.grad.clone())
    torch.testing.assert_close(*grads, rtol=0, atol=0.05 * grads[0].abs().max().item())


def test_without_autocast_another_dtype_is_an_error():
    with pytest.raises(InvalidType, match=r"returned torch.bfloat16.*field\.to\(torch.float32\)"):
        odeint(lambda t, y: -y.bfloat16(), torch.ones(2), T)


class Rotor(nn.Module):
    """dz/dt = (i w - d) z with real parameters."""

    def __init__(self, dtype):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(3.0, dtype=dtype))
        self.d = nn.Parameter(torch.tensor(0.5, dtype=dtype))
        self.times = set()

    def forward(self, t, z):
        self.times.add((t.dtype, t.dim()))
        return torch.complex(-self.d, self.w) * z


WAYS = {
    "odeint": (odeint, {}),
    "discrete": (odeint, dict(gradient="discrete")),
    "continuous": (odeint, dict(gradient="continuous")),
    "adjoint": (odeint_adjoint, {}),
    "adjoint rk4": (odeint_adjoint, dict(method="rk4", options=dict(step_size=0.01))),
    "adjoint ode rk4": (
        odeint_adjoint,
        dict(method="rk4", options=dict(step_size=0.01), adjoint_rtol=1e-6),
    ),
}


@pytest.mark.parametrize("back", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize("way", WAYS)
def test_complex_oscillator(way, back):
    solve, extra = WAYS[way]
    t = (-T if back else T).double()
    field = Rotor(torch.float64)
    z0 = torch.tensor([1.0 + 0.5j, -2.0j], dtype=torch.complex128, requires_grad=True)
    weight = torch.tensor([0.3 - 0.7j, 1.1 + 0.2j], dtype=torch.complex128)

    def loss(z):
        return (weight * z[-1]).real.sum() + z[1].abs().square().sum()

    exact = torch.exp(torch.complex(-field.d, field.w) * t)[:, None] * z0
    leaves = (z0, field.w, field.d)
    want = torch.autograd.grad(loss(exact), leaves)
    z = solve(field, z0, t, rtol=1e-9, atol=1e-9, **extra)
    assert z.dtype == torch.complex128
    torch.testing.assert_close(z, exact, rtol=1e-6, atol=1e-7)
    got = torch.autograd.grad(loss(z), leaves)
    assert not got[1].is_complex()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert field.times == {(torch.float64, 0)}


def test_complex64_keeps_time_in_float32():
    field = Rotor(torch.float32)
    z = odeint(field, torch.ones(2, dtype=torch.complex64), T, rtol=1e-5, atol=1e-5)
    assert z.dtype == torch.complex64 and field.times == {(torch.float32, 0)}
    exact = torch.exp(torch.complex(torch.tensor(-0.5), torch.tensor(3.0)) * T)
    torch.testing.assert_close(z[:, 0], exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("solve", [odeint, odeint_adjoint])
def test_real_and_complex_parts(solve):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor(3.0, dtype=torch.float64))

        def forward(self, t, y):
            x, z = y
            return -x * self.w, torch.complex(torch.zeros_like(self.w), self.w) * z

    field, t = Both(), T.double()
    y0 = (torch.ones(3, dtype=torch.float64), torch.ones(2, dtype=torch.complex128))
    x, z = solve(field, y0, t, rtol=1e-9, atol=1e-9)
    want = (
        torch.exp(-field.w * t)[:, None].expand(3, 3),
        torch.exp(torch.complex(torch.zeros_like(field.w), field.w) * t)[:, None].expand(3, 2),
    )
    grads = []
    for a, b in ((x, z), want):
        grads += torch.autograd.grad(a[-1].sum() + b[-1].imag.sum(), field.w)
    torch.testing.assert_close(x, want[0], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(z, want[1], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("y0", [torch.ones(2), (torch.ones(2), torch.ones(1))], ids=["one", "two"])
def test_real_start_of_a_complex_field(y0):
    def field(t, y):
        return tuple(1j * part for part in y) if isinstance(y, tuple) else 1j * y

    with pytest.raises(TypeError, match="complex.*complex y0"):
        odeint(field, y0, T)


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_backward_outside_autocast_differentiates_what_ran_inside(method):
    """The discrete gradient remakes the steps in the precision that they were made in."""
    net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8))
    y0, grads = torch.randn(16, 8), {}
    options = dict(step_size=0.25) if method == "rk4" else dict(first_step=0.25, max_step=0.25)
    for gradient in ("autograd", "discrete"):
        y = y0.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            solution = odeint(
                lambda t, y: net(y), y, T, gradient=gradient, method=method, options=options
            )
        grads[gradient] = torch.autograd.grad(solution[-1].square().sum(), y)[0]
    # Equal but for the order of float32 sums: far below bfloat16's rounding.
    scale = grads["autograd"].abs().max().item()
    torch.testing.assert_close(
        grads["discrete"], grads["autograd"], rtol=0.0, atol=1e-3 * 2**-8 * scale
    )


@pytest.mark.parametrize("back", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize("method", ["implicit_euler", "gl4", "gl6", "radauIIA5", "rk4"])
def test_parts_of_different_precision(method, back):
    """Newton's method is content with the roundoff of the coarsest part."""
    t = (T.flip(0) if back else T).double()

    def solve(*y0):
        def field(t, y):
            return tuple(-x * torch.cos(t) for x in y)

        return odeint(field, y0, t, method=method, options=dict(step_size=0.11))

    y0 = (torch.randn(3), torch.randn(2, dtype=torch.complex128))
    got, want = solve(*y0), solve(y0[0].double(), y0[1])
    assert [x.dtype for x in got] == [x.dtype for x in y0]
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got[1], want[1], rtol=1e-6, atol=1e-6)
