"""odeint_dense: the solution as a function of time is what odeint returns at those times."""

import math

import pytest
import torch
from torch import nn

from anode_fast import odeint, odeint_dense

pytestmark = pytest.mark.usefixtures("own_code")

f64 = torch.float64
# Out of order, with a repeated time and both ends.
TIMES = [0.9, 0.0, 0.35, 1.5, 0.35, 0.7, 1.2]

METHODS = {
    "dopri5": {},
    "dopri8": {},
    "bosh3": {"rtol": 1e-6, "atol": 1e-8},
    "rk4": {"options": {"step_size": 0.1}},
    "gl4": {"options": {"step_size": 0.1}},
    # Higher orders are unstable at this step.
    "explicit_adams": {"options": {"step_size": 0.1, "max_order": 4}},
}
EVERY_METHOD = pytest.mark.parametrize("method", METHODS)
BOTH_WAYS = pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])


def tensor(*values, **kw):
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=f64, **kw)


def swing(t, y):
    """Nonlinear, and depends on time."""
    return torch.stack([y[..., 1], -torch.sin(y[..., 0]) + 0.3 * torch.cos(t)], -1)


def start():
    return tensor([[1.0, 0.2], [-0.4, 0.9], [0.3, 0.0]])


def ends(backwards=False):
    return (tensor(1.5), tensor(0.0)) if backwards else (tensor(0.0), tensor(1.5))


def solve(method="dopri5", func=swing, y0=None, backwards=False, **kw):
    y0 = start() if y0 is None else y0
    return odeint_dense(func, y0, *ends(backwards), method=method, **METHODS[method], **kw)


def same(got, want, tol=1e-13):
    torch.testing.assert_close(got, want, rtol=tol, atol=tol)


# --- values ---------------------------------------------------------------------------------------


@EVERY_METHOD
@BOTH_WAYS
def test_equals_odeint_at_the_same_times(method, backwards):
    dense = solve(method, backwards=backwards)
    order = sorted(set(TIMES), reverse=backwards)
    want = odeint(swing, start(), tensor(order), method=method, **METHODS[method])
    same(dense(tensor(TIMES)), torch.stack([want[order.index(t)] for t in TIMES]))


@EVERY_METHOD
@BOTH_WAYS
def test_every_time_is_near_the_exact_solution(method, backwards):
    dense = solve(method, lambda t, y: -y, tensor([2.0]), backwards)
    t = torch.linspace(0, 1.5, 41, dtype=f64)
    exact = 2 * torch.exp((1.5 if backwards else 0.0) - t)
    # Between steps dopri8 and bosh3 have torchdiffeq's interpolants, far coarser than the methods.
    tol = {"dopri5": 2e-7, "dopri8": 2e-4, "bosh3": 3e-4, "explicit_adams": 2e-3}.get(method, 2e-5)
    torch.testing.assert_close(dense(t)[:, 0], exact, rtol=tol, atol=0.0)


@EVERY_METHOD
@BOTH_WAYS
def test_both_ends_belong(method, backwards):
    dense, (t0, t1) = solve(method, backwards=backwards), ends(backwards)
    end = odeint(swing, start(), torch.stack([t0, t1]), method=method, **METHODS[method])[-1]
    same(dense(t0), start())
    same(dense(t1), end)


def test_many_times_are_each_of_them_alone():
    dense = solve()
    many = dense(tensor(TIMES))
    assert many.shape == (len(TIMES), 3, 2)
    for i, t in enumerate(TIMES):
        for one in (t, tensor(t)):
            assert dense(one).shape == (3, 2)
            same(dense(one), many[i], 0.0)
    assert dense(tensor([0.4])).shape == (1, 3, 2)
    assert dense(tensor([])).shape == (0, 3, 2)


@pytest.mark.parametrize("y0", [tensor(2.0), tensor([2.0])], ids=["0-d", "1-d"])
def test_small_states_keep_their_shape(y0):
    dense = solve(func=lambda t, y: -y, y0=y0)
    assert dense(0.5).shape == y0.shape
    assert dense(tensor([0.5, 0.1])).shape == (2, *y0.shape)


@BOTH_WAYS
@pytest.mark.parametrize("method", ["dopri5", "rk4", "gl4"])
def test_tuple(method, backwards):
    y0 = (tensor([1.0, 2.0]), tensor([[0.5], [0.1], [0.2]]))
    dense = solve(method, lambda t, y: (-y[0] * t, y[1] + y[0].sum()), y0, backwards)
    one, many = dense(0.35), dense(tensor(TIMES))
    assert [x.shape for x in one] == [(2,), (3, 1)]
    assert [x.shape for x in many] == [(len(TIMES), 2), (len(TIMES), 3, 1)]
    for x, xs in zip(one, many, strict=True):
        same(x, xs[2], 0.0)
    # a' = -a t
    begin = 1.5 if backwards else 0.0
    exact = y0[0] * torch.exp((begin**2 - tensor(TIMES)[:, None] ** 2) / 2)
    torch.testing.assert_close(many[0], exact, rtol=1e-5, atol=0.0)


def test_complex_state():
    dense = solve(func=lambda t, y: 1j * y, y0=torch.ones(1, dtype=torch.complex128))
    exact = torch.exp(1j * tensor(TIMES))[:, None]
    torch.testing.assert_close(dense(tensor(TIMES)), exact, rtol=1e-6, atol=0.0)


def test_a_call_evaluates_nothing():
    calls = []

    def field(t, y):
        calls.append(float(t))
        return -y

    dense = solve(func=field)
    solved = len(calls)
    assert dense.stats.nfe in (0, solved)
    dense(tensor(TIMES))
    assert len(calls) == solved > 0


# --- refusals -------------------------------------------------------------------------------------


@BOTH_WAYS
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@pytest.mark.parametrize("outside", [-0.25, 1.75, math.nan])
def test_outside_is_an_error_that_names_the_time(method, backwards, outside):
    dense = solve(method, backwards=backwards)
    interval = "from 1.5 to 0.0" if backwards else "from 0.0 to 1.5"
    for t in (outside, tensor(outside), tensor([0.5, outside])):
        with pytest.raises(ValueError, match=f"t={outside} .*{interval}"):
            dense(t)


def test_an_adaptive_last_step_that_goes_on_does_not_widen_the_interval():
    dense = solve(func=lambda t, y: 0 * y)
    for t in (math.nextafter(1.5, 2), math.nextafter(0.0, -1)):
        with pytest.raises(ValueError, match="outside"):
            dense(t)


def test_ends_with_several_entries_and_scipy_are_refused():
    with pytest.raises(ValueError, match="one element"):
        odeint_dense(swing, start(), tensor([0.0, 1.0]), tensor(2.0))
    with pytest.raises(ValueError, match="scipy_solver"):
        odeint_dense(swing, start(), *ends(), method="scipy_solver")


# --- gradients ------------------------------------------------------------------------------------


# bosh3 aside: loose tolerances make its choice of steps coarse, and steps are constants.
@pytest.mark.parametrize("method", ["dopri5", "rk4", "gl4", "explicit_adams"])
@BOTH_WAYS
def test_gradcheck_wrt_state_parameter_and_times(method, backwards):
    # Fixed steps make the computed answer a smooth function of all three.
    options = METHODS[method].get("options") or {"first_step": 0.1, "max_step": 0.1}

    def states(y0, rate, t):
        def field(time, y):
            return -rate * y * y + torch.sin(time)

        given = dict(method=method, options=options, rtol=1e-6, atol=1e-6)
        return odeint_dense(field, y0, *ends(backwards), **given)(t)

    y0, rate = tensor([1.0, 0.6], requires_grad=True), tensor(0.4, requires_grad=True)
    t = tensor([0.87, 0.13, 0.55], requires_grad=True)
    assert torch.autograd.gradcheck(states, (y0, rate, t))
    assert torch.autograd.gradcheck(lambda *x: states(x[0], x[1], x[2][0]), (y0, rate, t))


@BOTH_WAYS
def test_gradients_are_the_analytic_ones(backwards):
    (t0, t1), t = ends(backwards), tensor([0.2, 1.1, 0.6], requires_grad=True)
    begin = t0.clone().requires_grad_()
    y0, rate = tensor([1.0, -0.6], requires_grad=True), tensor(0.4, requires_grad=True)

    def field(time, y):
        return rate * y

    got = odeint_dense(field, y0, begin, t1, rtol=1e-10, atol=1e-12)(t)
    exact = y0 * torch.exp(rate * (t - begin))[:, None]
    weights = torch.randn_like(exact)
    inputs = (y0, rate, t, begin)
    want = torch.autograd.grad((exact * weights).sum(), inputs)
    for g, w in zip(torch.autograd.grad((got * weights).sum(), inputs), want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-6, atol=1e-8)


def test_gradients_equal_those_of_odeint():
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    y0, t = start().requires_grad_(), tensor([0.0, 0.35, 0.7, 1.5])

    def field(time, y):
        return net(y)

    inputs = [y0, *net.parameters()]
    got = torch.autograd.grad(odeint_dense(field, y0, *ends())(t).square().sum(), inputs)
    want = torch.autograd.grad(odeint(field, y0, t).square().sum(), inputs)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("method", ["dopri5", "rk4", "implicit_midpoint"])
def test_a_first_call_without_grad_does_not_cut_the_graph_of_the_next(method):
    """Fixed-step methods evaluate their interpolant's slopes at the first call and keep them."""
    y0, options = start().requires_grad_(), {} if method == "dopri5" else dict(step_size=0.4)

    def gradient(ask_first):
        dense = odeint_dense(swing, y0, *ends(), method=method, options=options)
        if ask_first:
            with torch.no_grad():
                dense(0.55)
        return torch.autograd.grad(dense(0.55).sum(), y0)[0]

    assert torch.equal(gradient(True), gradient(False))


@pytest.mark.parametrize("method", ["rk4", "implicit_midpoint", "gl4"])
@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["forwards", "backwards"])
@pytest.mark.parametrize("before", [torch.lt, torch.le], ids=["<", "<="])
def test_slopes_at_a_jump_are_those_of_the_steps_own_side(method, sign, before):
    """y' is 1 before 0.5 and -3 after it: on either side every interpolant is exact."""

    def field(t, y):
        early = before(sign * t, 0.5)
        return sign * torch.where(early, torch.ones_like(y), -3 * torch.ones_like(y))

    options = dict(step_size=0.4, jump_t=tensor([sign * 0.5]))
    dense = odeint_dense(
        field, tensor(0.0), tensor(0.0), tensor(sign), method=method, options=options
    )
    t = tensor([0.1, 0.45, 0.55, 0.7, 0.95])
    same(dense(sign * t), torch.where(t < 0.5, t, 0.5 - 3 * (t - 0.5)))
