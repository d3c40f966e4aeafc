"""method="scipy_solver": SciPy's solve_ivp behind odeint's arguments."""

import sys

import numpy as np
import pytest
import scipy.integrate
import torch

from anode_fast import odeint, odeint_adjoint
from anode_fast.errors import NonFiniteState, SolverError

pytestmark = pytest.mark.usefixtures("own_code")

f64 = torch.float64
SOLVERS = ["RK45", "RK23", "DOP853", "Radau", "BDF", "LSODA"]
EVERY_SOLVER = pytest.mark.parametrize("solver", SOLVERS)
BOTH_WAYS = pytest.mark.parametrize("sign", [1, -1], ids=["forwards", "backwards"])


def tensor(*values, **kw):
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=f64, **kw)


def solve(func, y0, t, solver="RK45", interface=odeint, **kw):
    kw = {"rtol": 1e-8, "atol": 1e-10, **kw}
    options = {"solver": solver, **kw.pop("options", {})}
    return interface(func, y0, t, method="scipy_solver", options=options, **kw)


def close(got, want, rtol=1e-5):
    torch.testing.assert_close(got, want, rtol=rtol, atol=0.0)


# --- values ---------------------------------------------------------------------------------------


@EVERY_SOLVER
@BOTH_WAYS
def test_exponential(solver, sign):
    y0, t = tensor([[1.0, -2.0], [0.5, 3.0]]), sign * tensor([0.0, 0.4, 0.5, 1.3])
    got = solve(lambda t, y: -0.7 * y, y0, t, solver)
    assert got.dtype == f64
    close(got, y0 * torch.exp(-0.7 * t)[:, None, None])


@EVERY_SOLVER
@BOTH_WAYS
def test_the_field_gets_the_users_time(solver, sign):
    t = tensor([0.5, 1.0, 1.7]) if sign > 0 else tensor([1.7, 1.0, 0.5])
    got = solve(lambda t, y: 2 * t * y, tensor([1.0]), t, solver)
    close(got[:, 0], torch.exp(t**2 - t[0] ** 2))


def test_the_solver_and_its_arguments_are_scipys():
    t, y0 = np.array([0.0, 0.3, 1.0]), np.array([1.0, 2.0])
    atol = np.array([1e-3, 1e-9])

    def field(t, y):
        return np.array([y[1], -y[0] * 9 + np.sin(t)])

    def torch_field(t, y):
        return torch.stack([y[1], -y[0] * 9 + torch.sin(t)])

    for solver in SOLVERS:
        given = dict(rtol=1e-4, max_step=0.2)
        want = scipy.integrate.solve_ivp(
            field, (0.0, 1.0), y0, t_eval=t, method=solver, atol=atol, **given
        )
        got, stats = solve(
            torch_field,
            torch.from_numpy(y0),
            torch.from_numpy(t),
            solver,
            rtol=1e-4,
            atol=torch.from_numpy(atol),
            options={"max_step": 0.2},
            return_stats=True,
        )
        close(got, torch.from_numpy(want.y.T), 1e-10)
        if solver not in ("Radau", "BDF"):  # SciPy does not count those for their Jacobian
            assert stats.nfe == want.nfev


def test_lsoda_is_the_default():
    field, y0, t = (lambda t, y: torch.sin(3 * y) - t), tensor([1.0]), tensor([0.0, 0.3, 2.0])
    given = dict(method="scipy_solver", rtol=1e-4, atol=1e-5)
    got = odeint(field, y0, t, **given)
    assert torch.equal(got, odeint(field, y0, t, options={"solver": "LSODA"}, **given))
    assert not torch.equal(got, odeint(field, y0, t, options={"solver": "BDF"}, **given))


@BOTH_WAYS
@pytest.mark.parametrize("solver", ["RK45", "RK23", "DOP853", "BDF"])
def test_complex_state(solver, sign):
    y0 = torch.tensor([1.0 + 0.5j, -2.0j], dtype=torch.complex128)
    t = sign * tensor([0.0, 0.5, 1.2])
    got = solve(lambda t, y: (2j - 0.3) * y, y0, t, solver)
    assert got.dtype == torch.complex128
    close(got, y0 * torch.exp((2j - 0.3) * t)[:, None])


@BOTH_WAYS
@pytest.mark.parametrize("solver", ["RK45", "Radau"])
def test_tuple_state(solver, sign):
    y0 = (tensor([1.0, 2.0]), tensor([[3.0], [4.0], [5.0]]))
    t = sign * tensor([0.0, 0.5, 1.0])
    a, b = solve(lambda t, y: (-y[0], 0.5 * y[1]), y0, t, solver)
    assert a.shape == (3, 2) and b.shape == (3, 3, 1)
    close(a, y0[0] * torch.exp(-t)[:, None])
    close(b, y0[1] * torch.exp(0.5 * t)[:, None, None])


def test_float32_stays_float32():
    got = solve(lambda t, y: -y, torch.ones(2), torch.tensor([0.0, 1.0]), rtol=1e-5, atol=1e-6)
    assert got.dtype == torch.float32
    close(got[-1], torch.full((2,), 0.36787944), 1e-4)


# --- gradients ------------------------------------------------------------------------------------


@BOTH_WAYS
@pytest.mark.parametrize("solver", ["RK45", "DOP853", "LSODA"])
@pytest.mark.parametrize("interface", [odeint, odeint_adjoint])
def test_continuous_gradient(interface, solver, sign):
    y0, rate = tensor([1.0, -2.0], requires_grad=True), tensor(0.7, requires_grad=True)
    t = sign * tensor([0.0, 0.6, 1.3])
    kw = {} if interface is odeint else {"adjoint_params": (rate,)}
    got = solve(lambda t, y: -rate * y, y0, t, solver, interface, gradient="continuous", **kw)
    exact = y0 * torch.exp(-rate * t)[:, None]
    weights = torch.randn_like(exact)
    want = torch.autograd.grad((exact * weights).sum(), (y0, rate))
    for g, w in zip(torch.autograd.grad((got * weights).sum(), (y0, rate)), want, strict=True):
        close(g, w)


# --- refusals -------------------------------------------------------------------------------------


def test_unknown_solver():
    with pytest.raises(ValueError, match="'RK54'.*RK45"):
        solve(lambda t, y: -y, tensor([1.0]), tensor([0.0, 1.0]), "RK54")


def test_lsoda_takes_no_complex_state():
    y0 = torch.ones(1, dtype=torch.complex128)
    with pytest.raises(ValueError, match="LSODA.*RK45"):
        solve(lambda t, y: 1j * y, y0, tensor([0.0, 1.0]), "LSODA")


def test_without_scipy(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.integrate", None)
    with pytest.raises(ImportError, match="pip install scipy"):
        solve(lambda t, y: -y, tensor([1.0]), tensor([0.0, 1.0]))
    got = odeint(lambda t, y: -y, tensor([1.0]), tensor([0.0, 1.0]))  # needs none
    close(got[-1], torch.exp(tensor([-1.0])))


@pytest.mark.parametrize("error", [ValueError, KeyError])
def test_the_fields_own_errors_come_through(error):
    def field(t, y):
        raise error("mine")

    with pytest.raises(error, match="mine"):
        solve(field, tensor([1.0]), tensor([0.0, 1.0]))


def test_a_blow_up_is_a_solver_error():
    with pytest.raises(SolverError, match="RK45 gave up after t="):
        solve(lambda t, y: y * y, tensor([1.0]), tensor([0.0, 0.5, 2.0]))


@pytest.mark.parametrize("solver", ["Radau", "BDF"])
def test_nan_is_named(solver):
    with pytest.raises(NonFiniteState, match="non-finite values in state"):
        solve(lambda t, y: y * float("nan"), tensor([1.0]), tensor([0.0, 1.0]), solver)
