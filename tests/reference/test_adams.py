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
from anode_fast.reference.adams import AdamsRecipe, adams_weights
from anode_fast.reference.step import Interval
from anode_fast.vector_field import VectorField

pytestmark = pytest.mark.usefixtures("own_code")

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
@pytest.mark.parametrize("implicit", [False, True])
def test_weights_equal_torchdiffeqs_tables(order, implicit):
    tables = fixed_adams._MOULTON_DIVISOR if implicit else fixed_adams._BASHFORTH_DIVISOR
    theirs = tables[order].tolist()
    if implicit and order == 1:
        assert theirs == [1 / 11]  # a slip of its divisors, in a row that it never uses
        theirs = [1.0]
    assert [float(w) for w in adams_weights(order, implicit=implicit)] == theirs


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
# Explicit methods of high order are unstable for all but tiny steps and amplify rounding, so the
# highest order is compared over few steps only.


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
        {"step_size": 0.05, "max_order": 7},
        {"step_size": 0.05, "max_order": 7, "perturb": True},
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
    t = torch.linspace(0, 1, 31, dtype=DOUBLE) ** 1.5
    options = {"max_order": 6}
    assert_same(*ours_and_theirs(method, t, options, rtol=1e-4, atol=1e-5))


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
    how = {"method": method, "rtol": 1e-5, "options": {"max_order": 6}}
    ours = odeint(field, y0, t, **how)
    theirs = torchdiffeq.odeint(field, y0, t, **how)
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_parity_in_complex_numbers():
    y0 = torch.tensor([1.0, 1j], dtype=torch.complex128)
    t = torch.linspace(0, 1, 21, dtype=DOUBLE)
    ours = odeint(lambda t, y: 1j * t * y, y0, t, method="implicit_adams", rtol=1e-5)
    theirs = torchdiffeq.odeint(lambda t, y: 1j * t * y, y0, t, method="implicit_adams", rtol=1e-5)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


# --- order ----------------------------------------------------------------------------------------


def linear_problem():
    matrix = torch.tensor([[-0.5, 1.0], [-1.0, -0.3]], dtype=DOUBLE)
    y0 = torch.tensor([1.0, 0.5], dtype=DOUBLE)
    return (lambda t, y: y @ matrix.T), lambda t: torch.linalg.matrix_exp(t * matrix) @ y0


def nonautonomous_problem():
    return (
        lambda t, y: torch.cos(t) * y,
        lambda t: torch.tensor([math.exp(math.sin(t))], dtype=DOUBLE),
    )


def error_from_exact_start(problem, steps, *, implicit, max_order):
    """Largest error up to t=2, started along the exact solution until there is enough history.

    Its own start, by rk4, would limit the order to 5.
    """
    func, exact = problem()
    recipe = AdamsRecipe(
        VectorField(func, state_dtype=DOUBLE, device=torch.device("cpu")),
        linear=True,
        perturb=False,
        implicit=implicit,
        max_iters=50,
        max_order=max_order,
        tolerances=(1e-14, 1e-14),
    )
    times = [2 * i / steps for i in range(steps + 1)]
    y, largest = exact(0.0), 0.0
    for i, t in enumerate(times[1:]):
        step = recipe(Interval(times[i], t), y, None)
        y = exact(t) if i < max_order - 2 else step.y1
        largest = max(largest, float((y - exact(t)).abs().max()))
    return largest


@pytest.mark.parametrize("problem", [linear_problem, nonautonomous_problem])
@pytest.mark.parametrize("implicit", [False, True])
@pytest.mark.parametrize("max_order", [4, 5, 6, 7])
def test_order_with_enough_history(problem, implicit, max_order):
    errors = [
        error_from_exact_start(problem, steps, implicit=implicit, max_order=max_order)
        for steps in (32, 64)
    ]
    order = max_order if implicit else max_order - 1
    slope = math.log2(errors[0] / errors[1])
    assert abs(slope - order) < 0.25, f"order {slope:.2f}, want {order}; errors {errors}"


@pytest.mark.parametrize("problem", [linear_problem, nonautonomous_problem])
@pytest.mark.parametrize(("method", "order"), [("explicit_adams", 3), ("implicit_adams", 4)])
def test_order_with_its_own_start(problem, method, order):
    func, exact = problem()
    errors = []
    for steps in (80, 160):
        t = torch.linspace(0, 2, steps + 1, dtype=DOUBLE)
        options = {"max_order": 4, "max_iters": 50}
        y = odeint(func, exact(0.0), t, method=method, options=options, rtol=1e-13, atol=1e-13)
        errors.append(float((y[-1] - exact(2.0)).abs().max()))
    slope = math.log2(errors[0] / errors[1])
    assert abs(slope - order) < 0.25, f"order {slope:.2f}, want {order}; errors {errors}"


# --- what it says and refuses ---------------------------------------------------------------------


def decay(t, y):
    return -30 * y


def test_no_convergence_warns_once_with_the_time():
    y0, t = torch.ones(1, dtype=DOUBLE), torch.linspace(0, 1, 11, dtype=DOUBLE)
    with pytest.warns(UserWarning, match="in the step from t=0.2 to 0.3") as caught:
        odeint(decay, y0, t, method="implicit_adams")
    assert len(caught) == 1


@pytest.mark.parametrize("method", METHODS)
def test_max_order_above_12_is_refused(method):
    t = torch.linspace(0, 1, 11)
    with pytest.raises(ValueError, match="max_order is 13, want at most 12"):
        odeint(decay, torch.ones(1), t, method=method, options={"max_order": 13})


@pytest.mark.parametrize("options", [{"max_order": 0}, {"max_iters": 0}, {"max_order": 4.5}])
def test_options_must_be_positive_integers(options):
    with pytest.raises(ValueError, match="want a positive integer"):
        odeint(
            decay, torch.ones(1), torch.linspace(0, 1, 11), method="fixed_adams", options=options
        )


@pytest.mark.parametrize("max_order", [1, 3])
def test_max_order_below_4_warns(max_order):
    t = torch.linspace(0, 1, 5)
    options = {"max_order": max_order}
    with pytest.warns(UserWarning, match="below 4"):
        odeint(lambda t, y: -y, torch.ones(1), t, method="fixed_adams", options=options)


@pytest.mark.parametrize("method", METHODS)
def test_sides_of_the_steps(method):
    """With perturb every evaluation is made inside a step, none on a grid point."""
    seen = []

    def field(t, y):
        seen.append(float(t))
        return -y

    t = torch.linspace(1, 2, 9, dtype=DOUBLE)
    odeint(field, torch.ones(1, dtype=DOUBLE), t, method=method, options={"perturb": True})
    assert not set(seen) & set(t.tolist())


def test_every_solve_starts_with_an_empty_history():
    t = torch.linspace(0, 1, 11, dtype=DOUBLE)
    first, again = (
        odeint(Counted(), state(), t, method="fixed_adams", rtol=1e-3) for _ in range(2)
    )
    assert torch.equal(first, again)


@pytest.mark.parametrize("method", METHODS)
def test_zero_rows(method):
    y = odeint(Counted(), state()[:0], torch.linspace(0, 1, 9, dtype=DOUBLE), method=method)
    assert y.shape == (9, 0, 3)
