"""Implicit Runge-Kutta methods: order, stability, Newton's method, gradients, and how they fail."""

import math

import pytest
import torch
from torch import nn

from anode_fast import odeint, odeint_adjoint
from anode_fast.errors import NonlinearSolveFailed
from anode_fast.reference import implicit
from anode_fast.reference.implicit import ImplicitRecipe
from anode_fast.reference.step import Interval
from anode_fast.tableau import TABLEAUS
from anode_fast.vector_field import VectorField

DOUBLE = torch.float64
METHODS = [name for name, tableau in TABLEAUS.items() if tableau.implicit]
STIFFLY_ACCURATE = ["implicit_euler", "radauIIA3", "radauIIA5", "sdirk2", "trbdf2"]
TIGHT = {"rtol": 1e-13, "atol": 1e-13}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*one single step"),
    pytest.mark.usefixtures("own_code"),
]


@pytest.fixture(params=["dense", "matrix-free"])
def linear_solver(request, monkeypatch):
    """Both ways to solve Newton's linear systems, whatever the size of the state."""
    if request.param == "matrix-free":
        monkeypatch.setattr(implicit, "MOST_DENSE_UNKNOWNS", 0)


class Perceptron(nn.Module):
    """A smooth non-autonomous field that moves fast enough to make Newton's method work."""

    def __init__(self, dim=3, gain=4.0, dtype=DOUBLE):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.inner = nn.Parameter(torch.randn(dim + 1, 8, dtype=DOUBLE, generator=generator))
        self.outer = nn.Parameter(torch.randn(8, dim, dtype=DOUBLE, generator=generator))
        self.gain = gain
        self.to(dtype)

    def forward(self, t, y):
        time = t.expand(*y.shape[:-1], 1)
        return self.gain * torch.tanh(torch.cat([y, time], -1) @ self.inner) @ self.outer - y**3


def states(*shape, dtype=DOUBLE):
    generator = torch.Generator().manual_seed(4)
    return torch.randn(*shape, dtype=DOUBLE, generator=generator).to(dtype)


def van_der_pol(t, y):
    """mu = 1000: relaxation within 1e-3, then slow motion for 800."""
    x, v = y[..., 0], y[..., 1]
    return torch.stack([v, 1000 * (1 - x * x) * v - x], -1)


# --- order ----------------------------------------------------------------------------------------


def linear_problem():
    matrix = torch.tensor([[-0.5, 1.0], [-1.0, -0.3]], dtype=DOUBLE)
    y0 = torch.tensor([1.0, 0.5], dtype=DOUBLE)
    return (lambda t, y: y @ matrix.T), y0, torch.linalg.matrix_exp(2 * matrix) @ y0


def nonautonomous_problem():
    exact = torch.tensor([math.exp(math.sin(2))], dtype=DOUBLE)
    return (lambda t, y: torch.cos(t) * y), torch.ones(1, dtype=DOUBLE), exact


@pytest.mark.parametrize("problem", [linear_problem, nonautonomous_problem])
@pytest.mark.parametrize("method", METHODS)
def test_order(method, problem):
    field, y0, exact = problem()
    errors = []
    for steps in (20, 40):
        t = torch.linspace(0, 2, steps + 1, dtype=DOUBLE)
        y = odeint(field, y0, t, method=method, **TIGHT)[-1]
        errors.append(float((y - exact).abs().max()))
    slope, order = math.log2(errors[0] / errors[1]), TABLEAUS[method].order
    assert abs(slope - order) < 0.25, f"order {slope:.2f}, want {order}; errors {errors}"


# --- stages ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
def test_a_step_satisfies_the_stage_equations(method, dtype, linear_solver):
    """The step equals the textbook formulas, iterated to a fixed point in float64."""
    tableau, h = TABLEAUS[method], 0.02
    field, y0 = Perceptron(gain=1.0), states(8, 3)
    a, b = (torch.tensor(x, dtype=DOUBLE) for x in (tableau.a_float, tableau.b_float))
    with torch.no_grad():
        k = torch.zeros(tableau.stages, 8, 3, dtype=DOUBLE)
        for _ in range(60):
            points = y0 + h * torch.einsum("ij,jbn->ibn", a, k)
            times = [torch.tensor(0.5 + h * c, dtype=DOUBLE) for c in tableau.c_float]
            k = torch.stack([field(t, y) for t, y in zip(times, points, strict=True)])
        want = y0 + h * torch.einsum("j,jbn->bn", b, k)
    t = torch.tensor([0.5, 0.5 + h], dtype=DOUBLE)
    rtol = {torch.float32: 1e-4, DOUBLE: 1e-7}[dtype]
    got = odeint(field.to(dtype), y0.to(dtype), t, method=method, rtol=rtol)[-1]
    assert got.dtype == dtype
    # A hundredth of the tolerance, which is what Newton's method may leave.
    torch.testing.assert_close(got.double(), want, rtol=rtol / 100, atol=rtol / 100)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_float32_ends_at_rounding(method, scale):
    """With tolerances out of reach Newton's method stops a few eps from the solution."""
    y0, t = scale * states(8, 3), torch.linspace(0, 1, 6, dtype=DOUBLE)

    def field(t, y):
        return -20 * y + y.roll(1, -1) * torch.cos(t)

    want = odeint(field, y0, t, method=method, **TIGHT)
    got = odeint(field, y0.float(), t, method=method, rtol=1e-12, atol=0.0)
    error = (got.double() - want).abs().max()
    assert error < 32 * torch.finfo(torch.float32).eps * scale * y0.div(scale).abs().max()


def test_evaluations_of_a_linear_field_are_two_a_stage():
    """One with its Jacobian, one that finds nothing left to do; explicit stages take one."""
    y0, t = torch.ones(2, dtype=DOUBLE), torch.tensor([0.0, 0.1], dtype=DOUBLE)
    for method in METHODS:
        with torch.no_grad():
            _, stats = odeint(lambda t, y: -3 * y, y0, t, method=method, return_stats=True)
        tableau = TABLEAUS[method]
        explicit = int(not any(tableau.a[0]))
        assert stats.nfe == 2 * tableau.stages - explicit, method


@pytest.mark.parametrize("method", METHODS)
def test_zero_rows(method):
    y0 = states(0, 3).requires_grad_()
    y = odeint(Perceptron(), y0, torch.linspace(0, 1, 5, dtype=DOUBLE), method=method)
    assert y.shape == (5, 0, 3)
    assert torch.autograd.grad(y.sum(), y0)[0].shape == (0, 3)


@pytest.mark.parametrize("method", METHODS)
def test_backwards_is_the_mirrored_problem(method):
    field, y0 = Perceptron(gain=1.0), 0.3 * states(4, 3)
    t = torch.linspace(0, 0.3, 7, dtype=DOUBLE)
    mirrored = odeint(lambda s, y: -field(-s, y), y0, t, method=method)
    torch.testing.assert_close(odeint(field, y0, -t, method=method), mirrored)


@pytest.mark.parametrize("method", METHODS)
def test_a_field_that_is_not_holomorphic(method, linear_solver):
    """A complex state takes the same steps as its real and imaginary part do."""

    def field(t, y):
        return 1j * y * y.abs() - 3 * y.conj() * t

    def in_reals(t, x):
        return torch.view_as_real(field(t, torch.view_as_complex(x)))

    y0, t = torch.tensor([1 + 0.5j, -0.3j], dtype=torch.complex128), torch.linspace(0, 1, 9)
    got = odeint(field, y0, t.double(), method=method, **TIGHT)
    want = odeint(in_reals, torch.view_as_real(y0), t.double(), method=method, **TIGHT)
    torch.testing.assert_close(torch.view_as_real(got), want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("method", ["trapezoid", "radauIIA5"])
def test_a_tuple_state(method):
    def field(t, y):
        a, b = y
        return b.sum(-1) - a, -5 * a[..., None] * b

    y0 = (states(2), states(2, 3))
    t = torch.linspace(0, 1, 5, dtype=DOUBLE)
    parts = odeint(field, y0, t, method=method, **TIGHT)
    flat = odeint(
        lambda t, y: torch.cat([part.flatten() for part in field(t, (y[:2], y[2:].reshape(2, 3)))]),
        torch.cat([y0[0], y0[1].flatten()]),
        t,
        method=method,
        **TIGHT,
    )
    torch.testing.assert_close(torch.cat([part.flatten(1) for part in parts], 1), flat)


@pytest.mark.parametrize("method", METHODS)
def test_sides_of_the_step(method):
    """With perturb, stages at the step's ends are evaluated inside of it."""
    seen = []

    def field(t, y):
        seen.append(float(t))
        return -y

    t = torch.tensor([1.0, 2.0], dtype=DOUBLE)
    odeint(field, torch.ones(1, dtype=DOUBLE), t, method=method, options={"perturb": True})
    assert min(seen) > 1 and max(seen) < 2


@pytest.mark.parametrize("method", METHODS)
def test_a_step_can_be_made_again(method):
    func = Perceptron()
    field = VectorField(func, state_dtype=DOUBLE, device=torch.device("cpu"))
    recipe = ImplicitRecipe(
        field, TABLEAUS[method], True, False, max_iters=50, tolerances=(1e-7, 1e-9)
    )
    y, interval = states(4, 3), Interval(0.1, 0.2)
    with torch.no_grad():
        first = recipe(interval, y, None)
        recipe(Interval(0.2, 0.3), first.y1, None)
        again = first.recipe(interval, y, None)
    assert torch.equal(first.y1, again.y1)
    # Neither does it matter whether a gradient is wanted.
    assert torch.equal(first.y1, recipe(interval, y, None).y1.detach())
    explicit = not any(TABLEAUS[method].a[0])
    assert (first.slope0 is not None) == explicit
    if explicit:
        torch.testing.assert_close(first.slope0, func(torch.tensor(0.1, dtype=DOUBLE), y).detach())
        counts = []
        for f0 in (None, first.slope0):
            before = field.nfe
            with torch.no_grad():
                assert torch.equal(recipe(interval, y, f0).y1, first.y1)
            counts.append(field.nfe - before)
        assert counts[0] == counts[1] + 1


# --- stiffness ------------------------------------------------------------------------------------


def prothero_robinson(rate):
    return lambda t, y: -rate * (y - torch.cos(t)) - torch.sin(t)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rate", [1e3, 1e6])
def test_prothero_robinson(method, rate):
    """y = cos t, approached at `rate`; rk4 explodes with these steps."""
    t = torch.linspace(0, 10, 101, dtype=DOUBLE)
    y0 = torch.ones(3, dtype=DOUBLE)
    y = odeint(prothero_robinson(rate), y0, t, method=method)
    assert (y - torch.cos(t)[:, None]).abs().max() < 5e-3
    with pytest.raises(RuntimeError, match="non-finite"):
        odeint(prothero_robinson(rate), y0, t, method="rk4")


@pytest.mark.parametrize("method", METHODS)
def test_stability_on_a_fast_transient(method):
    """From off the slow solution: A-stable methods do not grow, stiffly accurate ones forget."""
    t = torch.linspace(0, 5, 51, dtype=DOUBLE)
    y = odeint(
        lambda t, y: -1000 * (y - torch.cos(t)), torch.zeros(1, dtype=DOUBLE), t, method=method
    )
    off = (y[:, 0] - torch.cos(t)).abs()
    assert off.max() < 1.1
    if method in STIFFLY_ACCURATE:
        assert off[3:].max() < 5e-3


@pytest.mark.parametrize("method", [m for m in METHODS if m != "implicit_euler"])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
def test_van_der_pol(method, dtype):
    """Against scipy's Radau at 1e-9; 20 steps where an explicit method needs 1e6."""
    t = torch.linspace(0, 750, 21, dtype=DOUBLE)
    y, stats = odeint(
        van_der_pol, torch.tensor([2.0, 0.0], dtype=dtype), t, method=method, return_stats=True
    )
    assert abs(y[-1, 0].item() - 1.247203) < 5e-3
    assert stats.nfe < 700


def test_many_rows_of_a_stiff_problem():
    """600 unknowns together: the matrix-free way by its size, every row as if alone."""
    start = torch.stack([torch.linspace(1.5, 2.5, 100), torch.zeros(100)], -1).double()
    t = torch.linspace(0, 60, 4, dtype=DOUBLE)
    together = odeint(van_der_pol, start, t, method="radauIIA5")
    for row in (0, 57, 99):
        alone = odeint(van_der_pol, start[row], t, method="radauIIA5")
        torch.testing.assert_close(together[:, row], alone, rtol=1e-7, atol=1e-9)


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_gradient_with_respect_to_everything(method, linear_solver):
    weight = states(2, 2).requires_grad_()
    t = torch.tensor([1.0, 0.7, 0.2], dtype=DOUBLE, requires_grad=True)

    def solve(y0, weight, t):
        def field(t, y):
            return torch.tanh(y @ weight) * torch.sin(2 * t) - 0.2 * y**2

        return odeint(field, y0, t, method=method, rtol=1e-14, atol=1e-14)

    assert torch.autograd.gradcheck(solve, (0.5 * states(2, 2).requires_grad_(), weight, t))


@pytest.mark.parametrize("method", ["trapezoid", "gl4"])
def test_gradient_in_complex_numbers(method):
    t = torch.linspace(0, 1, 3, dtype=DOUBLE, requires_grad=True)
    y0 = torch.tensor([1 + 0.5j, -0.3j], dtype=torch.complex128, requires_grad=True)

    def solve(y0, t):
        y = odeint(lambda t, y: 1j * y * y.abs() + t * y.conj(), y0, t, method=method, **TIGHT)
        return torch.view_as_real(y)

    assert torch.autograd.gradcheck(solve, (y0, t))


@pytest.mark.parametrize("method", METHODS)
def test_gradient_of_the_parameters_alone(method, linear_solver):
    """The first step starts from a state without gradient."""
    field, t = Perceptron(), torch.linspace(0, 0.2, 3, dtype=DOUBLE)
    grads = []
    for y0 in (states(4, 3), states(4, 3).requires_grad_()):
        loss = odeint(field, y0, t, method=method)[-1].square().sum()
        grads.append(torch.autograd.grad(loss, list(field.parameters())))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("method", METHODS)
def test_continuous_gradient_tends_to_the_discrete_one(method):
    torch.manual_seed(0)
    linear = nn.Linear(2, 2).double()
    t, y0 = torch.tensor([0.0, 1.0], dtype=DOUBLE), torch.randn(3, 2, dtype=DOUBLE)

    def gradient(kind, steps):
        linear.zero_grad()
        options = {"step_size": 1 / steps}
        field = lambda t, y: torch.tanh(linear(y))  # noqa: E731
        odeint(field, y0, t, method=method, options=options, gradient=kind)[-1].sum().backward()
        return linear.weight.grad.clone()

    gaps = [(gradient("continuous", n) - gradient("discrete", n)).norm().item() for n in (8, 32)]
    assert gaps[1] < max(gaps[0] / 3, 1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_discrete_gradient_equals_autograd(method):
    field, t = Perceptron(), torch.linspace(0, 0.5, 6, dtype=DOUBLE)
    grads = []
    for solve, gradient in ((odeint, "autograd"), (odeint_adjoint, "discrete")):
        y0 = states(4, 3).requires_grad_()
        loss = solve(field, y0, t, method=method, gradient=gradient).square().sum()
        grads.append(torch.autograd.grad(loss, [y0, *field.parameters()]))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", ["implicit_euler", "gl4"])
def test_no_gradient_where_none_is_wanted(method):
    t = torch.linspace(0, 1, 3, dtype=DOUBLE)
    assert not odeint(lambda t, y: -(y**3), states(2), t, method=method).requires_grad
    with torch.no_grad():
        assert not odeint(Perceptron(), states(2, 3), t, method=method).requires_grad


@pytest.mark.parametrize("method", ["trapezoid", "gl4"])
def test_inference_mode(method, linear_solver):
    field, t = Perceptron(), torch.linspace(0, 0.5, 3, dtype=DOUBLE)
    with torch.inference_mode():
        got = odeint(field, states(2, 3), t, method=method)
    with torch.no_grad():
        assert torch.equal(got, odeint(field, states(2, 3), t, method=method))


@pytest.mark.parametrize("gradient", ["autograd", "discrete"])
def test_second_derivatives_are_refused_not_wrong(gradient):
    y0, t = torch.ones(1, dtype=DOUBLE, requires_grad=True), torch.linspace(0, 0.1, 3)
    y1 = odeint(lambda t, y: -(y**3), y0, t.double(), method="gl4", gradient=gradient)[-1]
    (first,) = torch.autograd.grad(y1.sum(), y0, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(first.sum(), y0)


# --- fields that are hard to differentiate --------------------------------------------------------


class Stubborn(torch.autograd.Function):
    """-y^3, in a form that autograd cannot batch, nor differentiate twice."""

    @staticmethod
    def forward(ctx, y):
        ctx.save_for_backward(y)
        return -(y**3)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return -3 * y**2 * grad if float(grad.abs().max()) else grad


def test_a_field_that_vmap_cannot_batch():
    y0, t = states(4, 2), torch.linspace(0, 1, 3, dtype=DOUBLE)
    got = odeint(lambda t, y: Stubborn.apply(y), y0, t, method="radauIIA5")
    torch.testing.assert_close(got, odeint(lambda t, y: -(y**3), y0, t, method="radauIIA5"))


def test_a_large_field_that_cannot_be_differentiated_twice_is_refused():
    t = torch.linspace(0, 1, 3, dtype=DOUBLE)
    with pytest.raises(ValueError, match="twice for systems of over 512"):
        odeint(lambda t, y: Stubborn.apply(y), states(600), t, method="implicit_euler")


def test_a_field_that_needs_no_state(linear_solver):
    t = torch.linspace(0, 1, 11, dtype=DOUBLE)
    y = odeint(lambda t, y: torch.cos(t).expand(2), torch.zeros(2).double(), t, method="gl6")
    torch.testing.assert_close(y, torch.sin(t)[:, None].expand(-1, 2), rtol=0, atol=1e-12)


def test_a_field_that_takes_a_gradient_itself():
    """Hamilton's equations of an energy."""

    def field(t, y):
        with torch.enable_grad():
            y = y if y.requires_grad else y.requires_grad_()
            energy = (y**2).sum() / 2 + (y[..., 0] ** 4).sum() / 4
            (dh,) = torch.autograd.grad(energy, y, create_graph=True)
        return torch.stack([dh[..., 1], -dh[..., 0]], -1)

    def written_out(t, y):
        return torch.stack([y[..., 1], -y[..., 0] - y[..., 0] ** 3], -1)

    y0, t = states(3, 2), torch.linspace(0, 1, 4, dtype=DOUBLE)
    got = odeint(field, y0, t, method="implicit_midpoint", **TIGHT)
    torch.testing.assert_close(got, odeint(written_out, y0, t, method="implicit_midpoint", **TIGHT))


# --- failure --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_no_solution_of_the_stage_equations(method):
    """y' = y^2 blows up within the step, where the equations have no real solution."""
    y0, t = torch.full((2,), 4.0, dtype=DOUBLE), torch.tensor([0.5, 3.5], dtype=DOUBLE)
    with pytest.raises(NonlinearSolveFailed, match="not solved at t=0.5 with dt=3") as caught:
        odeint(lambda t, y: y**2, y0, t, method=method)
    assert "Newton iterations" in str(caught.value) and "step_size" in str(caught.value)


def test_failure_names_the_users_time():
    t = torch.tensor([2.0, 1.5, -4.5], dtype=DOUBLE)
    with pytest.raises(NonlinearSolveFailed, match="at t=1.5 with dt=6"):
        odeint(lambda t, y: -(y**2) * (t < 1.5), torch.ones(1).double(), t, method="implicit_euler")


@pytest.mark.parametrize("method", METHODS)
def test_a_field_that_is_not_finite(method):
    y0, t = -torch.ones(2, dtype=DOUBLE), torch.tensor([0.0, 1.0], dtype=DOUBLE)
    with pytest.raises(NonlinearSolveFailed, match="not solved at t=0"):
        odeint(lambda t, y: torch.sqrt(y), y0, t, method=method)


def test_a_trial_that_leaves_the_fields_domain_is_damped():
    """The full first correction makes log y nan; half of it does not."""
    y0, t = torch.tensor([0.1], dtype=DOUBLE), torch.tensor([0.0, 3.0], dtype=DOUBLE)
    y1 = odeint(lambda t, y: -torch.log(y) - 4, y0, t, method="implicit_euler", **TIGHT)[-1]
    assert abs((y1 - y0 - 3 * (-torch.log(y1) - 4)).item()) < 1e-9


def test_max_iters():
    y0, t = states(2), torch.linspace(0, 1, 3, dtype=DOUBLE)
    with pytest.raises(NonlinearSolveFailed, match="after 1 Newton iterations"):
        odeint(lambda t, y: -(y**3), y0, t, method="gl4", options={"max_iters": 1})


def test_a_field_hidden_from_autograd():
    """Without a Jacobian Newton's method is a plain iteration: right where that converges."""

    def hidden(rate):
        return lambda t, y: torch.from_numpy(-rate * y.detach().numpy())

    y0, t = torch.ones(2, dtype=DOUBLE), torch.linspace(0, 1, 11, dtype=DOUBLE)
    got = odeint(hidden(1.0), y0, t, method="gl4")
    torch.testing.assert_close(got, odeint(lambda t, y: -y, y0, t, method="gl4"))
    with pytest.raises(NonlinearSolveFailed, match="autograd can differentiate"):
        odeint(hidden(1000.0), y0, t, method="gl4")
