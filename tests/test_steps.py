"""Steps of any field in C++: the reference's, number for number, whatever the field does."""

import pytest
import torch
from torch import nn

from anode_fast import NonFiniteState, explain, odeint, odeint_adjoint, steps
from anode_fast.kernels.cpu import library
from anode_fast.problem import FAMILIES, FIXED, make_problem
from anode_fast.tableau import TABLEAUS

pytestmark = [
    pytest.mark.skipif(bool(library.missing()), reason=f"no C++: {library.missing()}"),
    pytest.mark.usefixtures("own_code"),
]

f32, f64 = torch.float32, torch.float64
METHODS = [name for name, tableau in TABLEAUS.items() if not tableau.implicit]


class Spiral(nn.Module):
    """A field with parameters, time and a counter."""

    def __init__(self, dim=3, dtype=f64):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(dim, dim, generator=generator, dtype=f64)
        self.weight = nn.Parameter(weight.to(dtype))
        self.nfe = 0

    def forward(self, t, y):
        self.nfe += 1
        return torch.tanh(y @ self.weight) * torch.cos(3 * t) - y


def state(rows=5, dim=3, dtype=f64):
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(1), dtype=f64).to(dtype)


def options_of(method):
    return {"step_size": 0.07} if FAMILIES[method] == FIXED else {}


@pytest.fixture(params=["forward", "backwards"])
def t(request):
    times = torch.tensor([0.0, 0.3, 0.35, 1.0], dtype=f64)
    return times if request.param == "forward" else -times


def both(solve, *arguments, **keywords):
    """With C++ steps and with PyTorch operations."""
    ours = solve(*arguments, return_stats=True, **keywords)
    return ours, solve(*arguments, return_stats=True, backend="reference", **keywords)


def assert_equal(got, wanted, dtype=f64):
    (x, counts), (y, expected) = got, wanted
    tolerance = 1e-12 if dtype == f64 else 5e-3
    torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)
    assert (counts.nfe, counts.accepted, counts.rejected) == (
        *(expected.nfe, expected.accepted, expected.rejected),
    )


@pytest.mark.parametrize("dtype", [f32, f64], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_the_reference_steps(method, dtype, t):
    field = Spiral(dtype=dtype)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            # Loose: in float32 the error ratio at a tight tolerance is noise, and so is the first
            # step, by a difference of two slopes, in the fourth digit.
            arguments = dict(method=method, options=options_of(method), rtol=1e-2, atol=1e-3)
            got, wanted = both(odeint, field, state(dtype=dtype), t, **arguments)
        assert_equal(got, wanted, dtype)
        assert got[0].requires_grad == grad


def test_they_are_used(monkeypatch):
    """The tests above compare two things."""
    made = []
    arithmetic = steps.NativeArithmetic.stages
    monkeypatch.setattr(
        steps.NativeArithmetic, "stages", lambda *args: made.append(1) or arithmetic(*args)
    )
    odeint(Spiral(), state(), torch.tensor([0.0, 1.0]))
    assert made
    made.clear()
    odeint(Spiral(), state(), torch.tensor([0.0, 1.0]), backend="reference")
    assert not made


@pytest.mark.parametrize("method", ["dopri5", "rk4", "bosh3", "midpoint"])
@pytest.mark.parametrize("gradient", ["autograd", "discrete", "continuous"])
def test_gradients_equal_the_reference(method, gradient, t):
    field, y0 = Spiral(), state()
    weights = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(2), dtype=f64)

    def gradients(backend):
        y = y0.clone().requires_grad_()
        arguments = dict(method=method, options=options_of(method), rtol=1e-6, atol=1e-7)
        solution, stats = odeint(
            field, y, t, gradient=gradient, backend=backend, return_stats=True, **arguments
        )
        found = torch.autograd.grad((solution * weights).sum(), (y, field.weight))
        return found, stats.nfe_backward

    (ours, nfe), (theirs, wanted) = gradients("auto"), gradients("reference")
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    assert nfe == wanted


@pytest.mark.parametrize("method", ["dopri5", "rk4", "dopri8"])
def test_first_and_second_derivatives(method):
    weight = Spiral().weight.detach().requires_grad_()
    t = torch.tensor([0.0, 0.5], dtype=f64)
    # Steps of one size whatever the state: finite differences would see them change.
    options = {"step_size": 0.25}
    if method != "rk4":
        options = dict.fromkeys(("first_step", "min_step", "max_step"), 0.25)
    arguments = dict(method=method, options=options)

    def solution(y, weight):
        return odeint(lambda t, y: torch.tanh(y @ weight), y, t, rtol=1e-3, atol=1e-3, **arguments)

    y0 = state(2).requires_grad_()
    assert torch.autograd.gradcheck(solution, (y0, weight))
    assert torch.autograd.gradgradcheck(solution, (y0, weight))


def test_batched_gradients():
    """autograd.grad under vmap hands over cotangents that have no memory of their own."""
    y0 = state(2).requires_grad_()
    solution = odeint(Spiral(), y0, torch.tensor([0.0, 1.0]), rtol=1e-4, atol=1e-4)[-1]
    basis = torch.eye(6, dtype=f64).reshape(6, 2, 3)
    (at_once,) = torch.autograd.grad(solution, y0, basis, is_grads_batched=True, retain_graph=True)
    for row, cotangent in zip(at_once, basis, strict=True):
        (single,) = torch.autograd.grad(solution, y0, cotangent, retain_graph=True)
        torch.testing.assert_close(row, single)


FIELDS = {
    "transposed value": lambda t, y: (y.t() * -1.0).contiguous().t(),
    "its own argument": lambda t, y: y,
    "an expanded value": lambda t, y: y.sum(0, keepdim=True).expand(y.shape) * 0.1 - 0.0 * y,
    "expanded memory": lambda t, y: y.mean().expand(y.shape),
    "a negated view": lambda t, y: torch.complex(y, y).conj().imag,
    "writes the time": lambda t, y: -y * t.add_(1.0),
    "a parameter": lambda t, y: nn.Parameter(-y.detach()),
    "an inner gradient": lambda t, y: _inner_gradient(y),
}


def _inner_gradient(y):
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        return torch.autograd.grad((y**3).sum(), y)[0] * -0.1


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@pytest.mark.parametrize("name", FIELDS)
def test_values_of_all_kinds(name, method, t):
    options = options_of(method)
    with torch.no_grad():
        got, wanted = both(odeint, FIELDS[name], state(), t, method=method, options=options)
    assert_equal(got, wanted)


def test_a_field_that_returns_the_same_memory():
    buffer = torch.empty(5, 3, dtype=f64)
    t = torch.tensor([0.0, 1.0])
    with torch.no_grad():
        got, wanted = both(odeint, lambda t, y: torch.mul(y, -1.0, out=buffer), state(), t)
    assert_equal(got, wanted)


def test_the_graph_stays_valid_if_the_field_writes_the_time():
    y0, t = state().requires_grad_(), torch.tensor([0.0, 1.0])
    odeint(FIELDS["writes the time"], y0, t, rtol=1e-4, atol=1e-4)[-1].sum().backward()
    assert y0.grad.isfinite().all()


@pytest.mark.parametrize(
    "options",
    [
        {"norm": lambda x: x.abs().max()},
        {"jump_t": [0.5]},
        {"step_t": [0.25, 0.5]},
        {"min_step": 0.3, "max_step": 0.4},
        {"first_step": 0.01, "dtype": f32},
    ],
    ids=" ".join,
)
def test_options(options):
    got, wanted = both(odeint, Spiral(), state(), torch.tensor([0.0, 1.0]), options=options)
    assert_equal(got, wanted)


def test_tolerances_of_entries_and_parts():
    t = torch.tensor([0.0, 1.0], dtype=f64)
    tolerances = dict(rtol=torch.tensor([1e-3, 1e-4, 1e-5]), atol=torch.tensor([[1e-5]] * 5))
    got, wanted = both(odeint, Spiral(), state(), t, **tolerances)
    assert_equal(got, wanted)

    def pair(t, parts):
        return -parts[0], parts[0].sum() * torch.ones_like(parts[1])

    parts = (state(), state(1, 4).flatten())
    got, wanted = both(odeint, pair, parts, t, rtol=(1e-3, 1e-6), atol=1e-6)
    for x, y in zip(got[0], wanted[0], strict=True):
        assert_equal((x, got[1]), (y, wanted[1]))


def test_a_gradient_with_respect_to_the_times():
    y0 = state()

    def gradient(backend):
        t = torch.tensor([0.0, 0.4, 1.0], dtype=f64, requires_grad=True)
        solution = odeint(Spiral(), y0, t, backend=backend)
        return torch.autograd.grad(solution.pow(2).sum(), t)[0]

    torch.testing.assert_close(gradient("auto"), gradient("reference"), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("norm", [None, "seminorm"])
def test_the_adjoint_takes_the_reference_steps(norm):
    field, t = Spiral(), torch.tensor([0.0, 0.5, 1.0], dtype=f64)

    def backward(backend):
        y = state().requires_grad_()
        options = {} if norm is None else {"adjoint_options": {"norm": norm}}
        solution, stats = odeint_adjoint(
            field, y, t, rtol=1e-5, atol=1e-6, backend=backend, return_stats=True, **options
        )
        found = torch.autograd.grad(solution.pow(2).sum(), (y, field.weight))
        return found, stats.nfe_backward

    (ours, nfe), (theirs, wanted) = backward("auto"), backward("reference")
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert nfe == wanted > 0


def test_large_states_on_any_number_of_threads():
    """Over the size at which threads take part, the same steps and numbers."""
    y0 = torch.randn(3, 50_001, generator=torch.Generator().manual_seed(0))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with torch.no_grad():
                found.append(odeint(lambda t, y: -y, y0, torch.tensor([0.0, 1.0]), rtol=1e-4))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
    torch.testing.assert_close(found[0][-1], y0 * torch.tensor(-1.0).exp(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_ends_the_solve(value):
    def field(t, y):
        return torch.where(t > 0.5, value, 1.0) * torch.ones_like(y)

    with pytest.raises(NonFiniteState):
        odeint(field, state(), torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize(
    ("y0", "method", "reason"),
    [
        (state(3).t(), "dopri5", "no plain contiguous"),
        (state().to(torch.complex128), "dopri5", "float32 or float64"),
        (state(), "implicit_adams", "no explicit Runge-Kutta"),
        (state(), "rk4", ""),
    ],
)
def test_why_not(y0, method, reason):
    t = torch.tensor([0.0, 1.0])
    options = {"step_size": 0.5} if method != "dopri5" else None
    problem = make_problem(lambda t, y: -y, y0, t, method=method, options=options)
    why = steps.why_not(problem)
    assert (reason in why) if reason else why == ""
    told = explain(lambda t, y: -y, y0, t, method=method, options=options)
    assert (why or "C++ between the field's evaluations") in told


def test_torch_func_takes_the_plain_path():
    t = torch.tensor([0.0, 1.0])

    def end(y):
        return odeint(lambda t, y: torch.sin(y), y, t, rtol=1e-5, atol=1e-5)[-1]

    y0 = state(1).flatten()
    by_rows = torch.autograd.functional.jacobian(end, y0)
    torch.testing.assert_close(torch.func.jacrev(end)(y0), by_rows, rtol=1e-4, atol=1e-5)
