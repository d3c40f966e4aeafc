"""Adams methods: weights, parity with torchdiffeq, order, and what they refuse."""

import math
import warnings
from fractions import Fraction

import pytest
import torch
import torchdiffeq
from torch import nn
from torchdiffeq._impl import fixed_adams

from anode_fast import odeint
from anode_fast.reference.adams import adams_weights

DOUBLE = torch.float64
METHODS = ["explicit_adams", "implicit_adams", "fixed_adams"]
NOT_CONVERGED = "unctional iteration did not converge"


class Counted(nn.Module):
    """A small non-autonomous field that counts its evaluations."""

    def __init__(self, rate=1.0):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(rate * torch.randn(3, 3, dtype=DOUBLE, generator=generator))
        self.calls = 0

    def forward(self, t, y):
        self.calls += 1
        return torch.tanh(y @ self.weight) + torch.cos(3 * t) * y.roll(1, -1)


def state():
    return torch.linspace(-1, 1, 12, dtype=DOUBLE).reshape(4, 3)


def ours_and_theirs(method, t, options, y0=None, rate=1.0, **kwargs):
    """Solutions, evaluations, and gradients with respect to y0, t and the field's parameter."""
    results = []
    # Between grid points torchdiffeq interpolates linearly unless told otherwise.
    options = {"interp": "linear", **options}
    for solve in (odeint, torchdiffeq.odeint):
        field = Counted(rate)
        y = (state() if y0 is None else y0).clone().requires_grad_()
        time = t.clone().requires_grad_()
        solution = solve(field, y, time, method=method, options=options, **kwargs)
        calls = field.calls
        cotangent = torch.linspace(-1, 2, solution.numel(), dtype=DOUBLE).reshape(solution.shape)
        grads = torch.autograd.grad(solution, [y, time, field.weight], cotangent)
        results.append((calls, solution.detach(), *grads))
    return results


def assert_same(ours, theirs):
    assert ours[0] == theirs[0], f"{ours[0]} evaluations, torchdiffeq has {theirs[0]}"
    for name, got, want in zip(("y", "dy0", "dt", "dw"), ours[1:], theirs[1:], strict=True):
        scale = want.abs().max()
        torch.testing.assert_close(
            got, want, rtol=0, atol=1e-12 * float(scale), msg=lambda m, name=name: f"{name}: {m}"
        )


# --- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", range(1, 21))
def test_weights_equal_torchdiffeqs_tables(order):
    for implicit, table in (
        (False, fixed_adams._BASHFORTH_DIVISOR),
        (True, fixed_adams._MOULTON_DIVISOR),
    ):
        ours = [float(w) for w in adams_weights(order, implicit=implicit)]
        assert ours == table[order].tolist()


def test_weights_known_by_heart():
    assert adams_weights(2, implicit=False) == (Fraction(3, 2), Fraction(-1, 2))
    assert adams_weights(3, implicit=True) == (Fraction(5, 12), Fraction(8, 12), Fraction(-1, 12))


@pytest.mark.parametrize("implicit", [False, True])
@pytest.mark.parametrize("order", [1, 5, 12])
def test_weights_integrate_polynomials_exactly(order, implicit):
    weights = adams_weights(order, implicit=implicit)
    for power in range(order):
        total = sum(w * Fraction(int(implicit) - j) ** power for j, w in enumerate(weights))
        assert total == Fraction(1, power + 1)


# --- parity ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 25])
def test_parity_on_output_times(method, backwards, steps):
    t = torch.linspace(0.3, 0.3 + 0.03 * steps, steps + 1, dtype=DOUBLE)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*one single step")
        assert_same(*ours_and_theirs(method, t.flip(0) if backwards else t, {}, rtol=1e-6))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"step_size": 0.05},
        {"step_size": 0.05, "perturb": True},
        {"step_size": 0.1, "max_order": 5},
        {"step_size": 0.03, "max_order": 4, "max_iters": 9},
    ],
    ids=str,
)
def test_parity_with_a_step_size(method, backwards, options):
    t = torch.tensor([0.0, 0.33, 0.71, 1.0], dtype=DOUBLE)
    t = -t if backwards else t
    assert_same(*ours_and_theirs(method, t, options, rtol=1e-4, atol=1e-5))


@pytest.mark.parametrize("method", METHODS)
def test_parity_on_an_uneven_grid(method):
    t = torch.linspace(0, 1, 30, dtype=DOUBLE) ** 1.5
    assert_same(*ours_and_theirs(method, t, {}, rtol=1e-4, atol=1e-5))


@pytest.mark.parametrize("max_order", [2, 3])
@pytest.mark.filterwarnings("ignore:.*max_order.* below 4")
def test_parity_below_order_4_is_rk4(max_order):
    t = torch.linspace(0, 1, 11, dtype=DOUBLE)
    ours, theirs = ours_and_theirs("fixed_adams", t, {"max_order": max_order})
    assert_same(ours, theirs)
    rk4 = odeint(Counted(), state(), t, method="rk4")
    torch.testing.assert_close(ours[1], rk4, rtol=0, atol=1e-13)


@pytest.mark.filterwarnings(f"ignore:.*{NOT_CONVERGED}")
@pytest.mark.parametrize("max_iters", [1, 2])
def test_parity_where_iterations_do_not_converge(max_iters):
    """The oldest derivative is dropped then, so the order stays low."""
    t = torch.linspace(0, 1, 26, dtype=DOUBLE)
    assert_same(*ours_and_theirs("implicit_adams", t, {"max_iters": max_iters}, rate=2.0))


@pytest.mark.parametrize("method", METHODS)
def test_parity_with_a_tuple_state(method):
    def field(t, y):
        a, b = y
        return b.sum(-1) * torch.cos(t), -a[..., None] * b

    y0 = (torch.ones(2, dtype=DOUBLE), torch.linspace(0, 1, 6, dtype=DOUBLE).reshape(2, 3))
    t = torch.linspace(0, 1, 21, dtype=DOUBLE)
    ours = odeint(field, y0, t, method=method, rtol=1e-5)
    theirs = torchdiffeq.odeint(field, y0, t, method=method, rtol=1e-5)
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_parity_in_complex_numbers():
    y0 = torch.tensor([1.0, 1j], dtype=torch.complex128)
    t = torch.linspace(0, 1, 21, dtype=DOUBLE)
    ours = odeint(lambda t, y: 1j * t * y, y0, t, method="implicit_adams", rtol=1e-5)
    theirs = torchdiffeq.odeint(
        lambda t, y: 1j * t * y, y0, t, method="implicit_adams", rtol=1e-5
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


# --- order ----------------------------------------------------------------------------------------


def linear_problem():
    matrix = torch.tensor([[-0.5, 1.0], [-1.0, -0.3]], dtype=DOUBLE)
    y0 = torch.tensor([1.0, 0.5], dtype=DOUBLE)
    return (lambda t, y: y @ matrix.T), lambda t: torch.linalg.matrix_exp(t * matrix) @ y0


def nonautonomous_problem():
    return (lambda t, y: torch.cos(t) * y), lambda t: torch.full((1,), math.exp(math.sin(t))).to(
        DOUBLE
    )


@pytest.mark.parametrize("problem", [linear_problem, nonautonomous_problem])
@pytest.mark.parametrize("method", ["explicit_adams", "implicit_adams"])
@pytest.mark.parametrize("max_order", [4, 5, 6, 7])
def test_order_with_enough_history(problem, method, max_order):
    """Starting up with rk4 (local error 5) limits the order to 5 unless the start is exact."""
    field, exact = problem()
    order = max_order if method == "implicit_adams" else max_order - 1
    coarse, fine = (
        (run(field, exact, steps, method, max_order) - exact(2.0)).abs().max()
        for steps in (80, 160)
    )
    slope = math.log2(coarse / fine)
    assert abs(slope - order) < 0.25, f"order {slope:.2f}, want {order}"


def run(field, exact, steps, method, max_order):
    """The solution at t=2 by an Adams method that starts with exact derivatives."""
    raise NotImplementedError
