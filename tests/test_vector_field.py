"""The field's wrapper: tuples in one flat tensor, fields with bad habits, counts and sides of t."""

import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from anode_fast import odeint, odeint_adjoint
from anode_fast.errors import InvalidArgument
from anode_fast.vector_field import HERE, NEXT, PREV, Layout, VectorField

pytestmark = pytest.mark.usefixtures("own_code")

T = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
RUNS = {
    "dopri5": dict(rtol=1e-9, atol=1e-9),
    "rk4": dict(method="rk4", options=dict(step_size=0.02)),
    "adams": dict(method="implicit_adams", options=dict(step_size=0.02), rtol=1e-9, atol=1e-9),
}
runs = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)

REAL = [torch.float32, torch.float64, torch.bfloat16]
COMPLEX = [torch.complex64, torch.complex128]
shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)


@given(st.lists(st.tuples(shapes, st.sampled_from(REAL + COMPLEX)), min_size=1, max_size=5))
def test_layout_roundtrip(parts):
    parts = tuple(torch.randn(shape, dtype=torch.float64).to(dtype) for shape, dtype in parts)
    parts = tuple(x + 1j * torch.randn_like(x) if x.is_complex() else x for x in parts)
    layout = Layout(parts)
    flat = layout.pack(parts)
    assert flat.shape == (sum(layout.sizes),) and flat.dtype == layout.dtype
    some, every = (f(x.is_complex() for x in parts) for f in (any, all))
    assert flat.is_complex() == (some and every)
    leads = torch.stack([flat, 2 * flat])
    for part, back, pair in zip(
        parts, layout.unpack(flat), layout.unpack(leads, (2,)), strict=True
    ):
        assert (back.dtype, back.shape, pair.shape) == (part.dtype, part.shape, (2, *part.shape))
        assert torch.equal(back, part) and torch.equal(pair[0], part)
        assert torch.equal(pair[1], 2 * part)


def test_layout_roundtrip_of_views():
    z = torch.randn(2, 3, dtype=torch.complex128)
    parts = (torch.randn(5, 7)[1:, ::2].t(), z.conj().t(), torch.randn(9)[3:4])
    for part, back in zip(parts, Layout(parts).unpack(Layout(parts).pack(parts)), strict=True):
        assert torch.equal(back, part)


def decay_in_place(t, y):
    return y.neg_()


def relu_in_place(t, y):
    return -torch.relu_(y)


@runs
@pytest.mark.parametrize("solve", [odeint, odeint_adjoint])
@pytest.mark.parametrize("field", [decay_in_place, relu_in_place])
def test_write_at_first_call(field, solve, run):
    y0 = torch.tensor([1.0, 2.0], dtype=torch.float64)
    params = {} if solve is odeint else dict(adjoint_params=())
    with pytest.warns(UserWarning, match="writes into its input state") as caught:
        y = solve(field, y0, T, **run, **params)
    assert len(caught) == 1
    assert y0.tolist() == [1.0, 2.0]
    torch.testing.assert_close(y, torch.exp(-T)[:, None] * y0, rtol=1e-6, atol=0)


@runs
def test_write_into_a_part(run):
    y0 = (torch.ones(2, dtype=torch.float64), torch.ones((), dtype=torch.float64))

    def field(t, y):
        y[1].mul_(0.5)
        return -y[0], 2 * y[1]

    with pytest.warns(UserWarning, match="writes into its input state"):
        y = odeint(field, y0, T, **run)
    assert y0[1].item() == 1.0
    torch.testing.assert_close(y[1], torch.exp(T), rtol=1e-6, atol=0)


@runs
def test_write_at_a_later_call(run):
    calls = []

    def field(t, y):
        calls.append(t)
        return y.neg_() if len(calls) == 3 else -y

    y0 = torch.ones(2, dtype=torch.float64)
    with pytest.raises(InvalidArgument, match="not at its first evaluation"):
        odeint(field, y0, T, **run)
    assert len(calls) == 3
    assert y0.tolist() == [1.0, 1.0]


def buffered():
    out = torch.empty(2, dtype=torch.float64)

    def field(t, y):
        return torch.neg(y, out=out)

    return field


def buffered_view():
    out = torch.empty(4, dtype=torch.float64)

    def field(t, y):
        return out[1:3].copy_(-y)

    return field


def time_in_place():
    def field(t, y):
        value = -y * t.cos()
        t.add_(5.0)
        return value

    return field


def identity():
    return lambda t, y: y


HABITS = {
    "buffer": (buffered, lambda t: torch.exp(-t)),
    "view of a buffer": (buffered_view, lambda t: torch.exp(-t)),
    "time": (time_in_place, lambda t: torch.exp(-torch.sin(t))),
    "input": (identity, torch.exp),
}


@runs
@pytest.mark.parametrize("back", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize("habit", HABITS)
def test_habit_does_no_harm(habit, back, run):
    make, exact = HABITS[habit]
    t = -T if back else T
    y0 = torch.tensor([1.0, 2.0], dtype=torch.float64)
    with torch.no_grad():
        y = odeint(make(), y0, t, **run)
    assert y0.tolist() == [1.0, 2.0] and t.abs().equal(T)
    torch.testing.assert_close(y, exact(t)[:, None] * y0, rtol=1e-6, atol=0)


@pytest.mark.parametrize("habit", HABITS)
def test_habit_by_row(habit):
    make, exact = HABITS[habit]

    def field(t, y):
        return inner(t, y[:, 0] if habit.endswith("buffer") else y).view(y.shape)

    inner = make()
    y0 = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    with torch.no_grad():
        y = odeint(field, y0, T, rtol=1e-9, atol=1e-9, step_control="sample")
    torch.testing.assert_close(y, exact(T)[:, None, None] * y0, rtol=1e-6, atol=0)


@pytest.mark.parametrize("gradient", ["autograd", "discrete", "continuous"])
def test_gradient_of_a_field_that_returns_its_input(gradient):
    y0 = torch.ones(2, dtype=torch.float64, requires_grad=True)
    y = odeint(identity(), y0, T, rtol=1e-9, atol=1e-9, gradient=gradient)
    y[-1].sum().backward()
    torch.testing.assert_close(y0.grad, torch.full_like(y0, math.e), rtol=1e-6, atol=0)


class Hamiltonian(nn.Module):
    """Oscillator of stiffness k: (dq/dt, dp/dt) = (dH/dp, -dH/dq)."""

    def __init__(self):
        super().__init__()
        self.k = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, t, y):
        keep = torch.is_grad_enabled()
        energy = 0.5 * (self.k * y[..., 0] ** 2 + y[..., 1] ** 2).sum()
        (slope,) = torch.autograd.grad(energy, y, create_graph=keep)
        return torch.stack([slope[..., 1], -slope[..., 0]], dim=-1)


def oscillation(k, t):
    w = k.sqrt()
    return torch.stack([torch.cos(w * t), -w * torch.sin(w * t)], dim=-1)


@runs
@pytest.mark.parametrize("solve", [odeint, odeint_adjoint])
def test_hamiltonian_field(solve, run):
    field, y0 = Hamiltonian(), torch.tensor([1.0, 0.0], dtype=torch.float64)
    exact = oscillation(field.k, T)
    (want,) = torch.autograd.grad(exact[-1].sum(), field.k)
    with torch.no_grad():
        y = solve(field, y0, T, **run)
    assert not y.requires_grad and not y0.requires_grad
    torch.testing.assert_close(y, exact.detach(), rtol=2e-6, atol=1e-6)
    y = solve(field, y0, T, **run)
    torch.testing.assert_close(y, exact, rtol=2e-6, atol=1e-6)
    y[-1].sum().backward()
    torch.testing.assert_close(field.k.grad, want, rtol=2e-6, atol=1e-6)


def test_other_runtime_errors_pass():
    def field(t, y):
        raise RuntimeError("of the user's own")

    with pytest.raises(RuntimeError, match="of the user's own"):
        odeint(field, torch.ones(2), T)


def count(solve, **run):
    calls = []

    def field(t, y):
        calls.append(t)
        return -y

    _, stats = solve(field, torch.ones(2, dtype=torch.float64), T, return_stats=True, **run)
    assert stats.nfe == len(calls)
    return stats


def test_evaluations():
    for method, stages in (("euler", 1), ("midpoint", 2), ("rk4", 4)):
        options = dict(step_size=0.1, interp="linear")
        stats = count(odeint, method=method, options=options)
        assert (stats.nfe, stats.accepted) == (10 * stages, 10)
    stats = count(odeint, options=dict(first_step=0.1))
    assert stats.nfe == 1 + 6 * (stats.accepted + stats.rejected)
    assert count(odeint).nfe == 2 + 6 * sum(
        getattr(count(odeint), name) for name in ("accepted", "rejected")
    )
    assert count(odeint_adjoint, adjoint_params=()).nfe == count(odeint).nfe


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("dtype", REAL)
def test_sides_and_sign_of_time(dtype, backwards):
    seen = []

    def func(t, y):
        seen.append(t)
        return y * t

    field = VectorField(func, state_dtype=dtype, device=torch.device("cpu"), backwards=backwards)
    y = torch.ones(2, dtype=dtype)
    sign = -1.0 if backwards else 1.0
    for t in (0.5, torch.tensor(0.5, dtype=torch.float64)):
        seen.clear()
        values = [field(t, y, None, side) for side in (PREV, HERE, NEXT)]
        assert [x.dtype for x in seen] == [dtype] * 3 and not any(x.dim() for x in seen)
        prev, here, after = (sign * x for x in seen)  # solver time
        assert here.item() == 0.5
        assert prev.item() == torch.nextafter(here, here - 1).item() < 0.5
        assert after.item() == torch.nextafter(here, here + 1).item() > 0.5
        # d/d(-t) of a state is minus the field: sign * y * sign * (solver time).
        for value, at in zip(values, (prev, here, after), strict=True):
            assert torch.equal(value, y * at)
    assert field.nfe == 6
    assert field.user_time(0.5) == sign * 0.5


@pytest.mark.parametrize("backwards", [False, True])
def test_shift_carries_the_gradient_of_time(backwards):
    field = VectorField(
        lambda t, y: y * t**2,
        state_dtype=torch.float64,
        device=torch.device("cpu"),
        backwards=backwards,
    )
    shift = torch.zeros((), dtype=torch.float64, requires_grad=True)
    value = field(0.5, torch.ones((), dtype=torch.float64), shift)
    (slope,) = torch.autograd.grad(value, shift)
    assert (value.item(), slope.item()) == ((-0.25, -1.0) if backwards else (0.25, 1.0))


@runs
def test_backwards_undoes_forwards(run):
    times = []

    def field(t, y):
        times.append(t.item())
        return y * torch.sin(3 * t)

    y0 = torch.tensor([1.0, -2.0], dtype=torch.float64)
    forth = odeint(field, y0, T, **run)
    back = odeint(field, forth[-1], T.flip(0), **run)
    torch.testing.assert_close(back.flip(0), forth, rtol=1e-6, atol=0)
    # An adaptive step may reach past the last output time, which is in between.
    assert -0.5 < min(times) and max(times) < 1.5


def test_module_is_no_trouble():
    layers = nn.Sequential(nn.Linear(2, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 2)).double()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = layers

        def forward(self, t, y):
            return self.layers(y)

    y0 = torch.randn(3, 2, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grads = []
        for solve in (odeint, odeint_adjoint):
            solve(Net(), y0, T, rtol=1e-9, atol=1e-9)[-1].square().sum().backward()
            grads.append(torch.cat([p.grad.flatten() for p in layers.parameters()]))
            layers.zero_grad()
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-8)


def test_layout_has_a_gradient_at_odd_offsets():
    parts = (
        torch.randn(3, dtype=torch.float64, requires_grad=True),
        torch.randn(2, dtype=torch.complex128, requires_grad=True),
    )
    layout = Layout(parts)
    weights = torch.randn(7, dtype=torch.float64)
    a, b = torch.autograd.grad((layout.pack(parts) * weights).sum(), parts)
    assert torch.equal(a, weights[:3])
    assert torch.equal(b, torch.complex(weights[3::2], weights[4::2]))


def test_write_under_inference_mode():
    """Inference tensors do not count writes, so they are copied at every evaluation."""
    y0, run = torch.tensor([-1.0, 2.0]), dict(method="rk4", options=dict(step_size=0.1))
    t = torch.tensor([0.0, 1.0])
    with torch.inference_mode():
        y = odeint(lambda t, y: 1 - y.relu_(), y0.clone(), t, **run)
        want = odeint(lambda t, y: 1 - y.relu(), y0.clone(), t, **run)
    assert torch.equal(y, want)
