"""torchdiffeq 0.2.5 is the oracle: same steps, same number of evaluations, values, gradients.

Deliberate differences (docs/differences-from-torchdiffeq.md) are not compared here.
"""

import math
from dataclasses import dataclass

import pytest
import torch
import torchdiffeq
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchdiffeq._impl.misc import _rms_norm, _select_initial_step
from torchdiffeq._impl.odeint import SOLVERS

import anode_fast
from anode_fast.problem import ADAPTIVE, FAMILIES
from anode_fast.tableau import TABLEAUS
from tests.helpers import assert_no_worse

METHODS = list(SOLVERS)
STEPS_OF_ITS_OWN = [name for name in METHODS if FAMILIES[name] == ADAPTIVE]
GIVEN_STEPS = [n for n in METHODS if n not in STEPS_OF_ITS_OWN and n != "scipy_solver"]

f32, f64 = torch.float32, torch.float64

pytestmark = [
    pytest.mark.usefixtures("own_code"),
    pytest.mark.filterwarnings("ignore:.*without the option step_size"),
    pytest.mark.filterwarnings("ignore:.*[Ff]unctional iteration did not converge"),
]


# --- fields ---------------------------------------------------------------------------------------


class Recorder(nn.Module):
    """A field that counts its evaluations and writes down the attempted steps, and their fate."""

    def __init__(self, func, watch_steps):
        super().__init__()
        self.func = func
        self.nfe = 0
        self.steps = []
        if watch_steps:
            for name in ("step", "accept_step", "reject_step"):
                setattr(self, f"callback_{name}", self.note(name))

    def note(self, name):
        def callback(t, y, dt):
            self.steps.append((name, t.item(), dt.item()))

        return callback

    def forward(self, t, y):
        self.nfe += 1
        return self.func(t, y)


class Perceptron(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)

    def forward(self, t, y):
        return 2 * self.net(y) + torch.sin(4 * t) * y


def oscillator(t, y):
    return torch.stack([3 * y[..., 1], -3 * y[..., 0]], -1)


def van_der_pol(t, y):
    x, v = y[..., 0], y[..., 1]
    return torch.stack([v, 5 * (1 - x * x) * v - x], -1)


def mlp_problem(dtype):
    torch.manual_seed(0)
    return Perceptron(dtype), torch.randn(4, 3, dtype=dtype)


def oscillator_problem(dtype):
    return oscillator, torch.tensor([[1.0, 0.0], [0.3, -2.0]], dtype=dtype)


def van_der_pol_problem(dtype):
    return van_der_pol, torch.tensor([2.0, 0.1], dtype=dtype)


PROBLEMS = {
    "mlp": mlp_problem,
    "oscillator": oscillator_problem,
    "van der pol": van_der_pol_problem,
}

TIMES = {
    "two": [0.0, 1.0],
    "many": [0.1 * i for i in range(11)],
    "uneven": [-0.3, -0.12, -0.11, 0.5, 0.77, 0.9],
    "descending": [0.8, 0.7, 0.2, 0.0, -0.2],
    "tiny gaps": [0.0, 1e-6, 0.5, 0.5 + 1e-6, 0.5 + 2e-6, 1.0],
    "many in one step": [0.0, *(0.4 + 1e-4 * i for i in range(40)), 0.9],
}


def times(name, dtype=f64):
    return torch.tensor(TIMES[name], dtype=dtype)


GIVEN = {"first_step": 0.1, "max_step": 0.1}
"""Options for steps that follow from no error."""


def settings_of(method, dtype=f64):
    """Settings for tens of steps, none of which follows from an error that is all rounding.

    Such is the error of short first steps, in float32 and in dopri8. There a longer first step or
    slower growth helps. In float32 all of dopri8's errors are such: its steps are given.
    """
    if dtype == f32:
        options = {"ifactor": 2.0} if method in STEPS_OF_ITS_OWN else {}
        if method == "dopri8":
            options = GIVEN
        return {"rtol": 1e-3, "atol": 1e-4, "options": options}
    if method == "dopri8":
        return {"rtol": 1e-7, "atol": 1e-9, "options": {"first_step": 0.2}}
    if method in TABLEAUS and TABLEAUS[method].order < 4:
        return {"rtol": 1e-4, "atol": 1e-5}
    return {"rtol": 1e-7, "atol": 1e-9}


@pytest.fixture
def scipy_in_float64(monkeypatch):
    """torchdiffeq's SciPy wrapper rounds times to the default dtype; ours does not."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(f64)
    yield
    torch.set_default_dtype(default)


# --- comparison -----------------------------------------------------------------------------------


@dataclass
class Solved:
    y: torch.Tensor
    nfe: int
    steps: list


def solve(package, func, y0, t, method, **kwargs):
    field = Recorder(func, watch_steps=method in STEPS_OF_ITS_OWN)
    y = package.odeint(field, y0, t, method=method, **kwargs)
    return Solved(y, field.nfe, field.steps)


def solve_both(func, y0, t, method, **kwargs):
    theirs = solve(torchdiffeq, func, y0, t, method, **kwargs)
    return theirs, solve(anode_fast, func, y0, t, method, **kwargs)


def assert_same_steps(theirs, ours):
    """Step sizes follow from error estimates, in which almost all digits cancel."""
    assert ours.nfe == theirs.nfe
    assert [name for name, _, _ in ours.steps] == [name for name, _, _ in theirs.steps]
    for (_, t, dt), (_, t_theirs, dt_theirs) in zip(ours.steps, theirs.steps, strict=True):
        assert dt == pytest.approx(dt_theirs, rel=1e-6, abs=0)
        assert t == pytest.approx(t_theirs, rel=0, abs=1e-6)


def assert_close(got, want, rtol=1e-12):
    """Relative to the largest entry."""
    assert got.shape == want.shape and got.dtype == want.dtype
    assert (got - want).abs().max() <= rtol * want.abs().max()


def assert_parity(func, y0, t, method, **kwargs):
    theirs, ours = solve_both(func, y0, t, method, **kwargs)
    assert_same_steps(theirs, ours)
    parts = [(ours.y, theirs.y)]
    if isinstance(y0, tuple):
        assert isinstance(ours.y, tuple)
        parts = list(zip(ours.y, theirs.y, strict=True))
    for got, want in parts:
        assert_close(got, want)
    return ours


# --- all methods ----------------------------------------------------------------------------------

LINES = {"step_size": 0.05, "interp": "linear"}
SMALL_LINES = {"step_size": 0.02, "interp": "linear", "max_order": 5}
"""For explicit_adams: with larger steps or a higher order it is unstable on two of the fields."""

CASES = [
    *((method, problem, {}) for method in STEPS_OF_ITS_OWN for problem in PROBLEMS),
    *((method, p, LINES) for method in GIVEN_STEPS for p in PROBLEMS if method != "explicit_adams"),
    *(("explicit_adams", problem, SMALL_LINES) for problem in PROBLEMS),
    # One step per output time, up to 1 long, on which the others are unstable.
    *((method, "mlp", {}) for method in GIVEN_STEPS),
]
cases = pytest.mark.parametrize(
    ("method", "problem", "options"),
    [pytest.param(*case, id="-".join([*case[:2], *case[2]])) for case in CASES],
)
grids = pytest.mark.parametrize("grid", TIMES)


def with_options(given, options):
    return {**given, "options": {**given.get("options", {}), **options}}


@grids
@cases
def test_methods(method, problem, options, grid):
    func, y0 = PROBLEMS[problem](f64)
    assert_parity(func, y0, times(grid), method, **with_options(settings_of(method), options))


@grids
@cases
def test_methods_in_float32(method, problem, options, grid):
    """Same evaluations, and as close to the float64 values as torchdiffeq's in float32."""
    t, given = times(grid), with_options(settings_of(method, f32), options)
    if problem == "van der pol" and grid == "descending":
        pytest.skip("backwards in time its flow expands, and rounding grows beyond comparison")
    exact = solve(torchdiffeq, *PROBLEMS[problem](f64), t, method, **given)
    theirs, ours = solve_both(*PROBLEMS[problem](f32), t, method, **given)
    assert ours.nfe == theirs.nfe
    assert_no_worse(ours.y, theirs.y, exact.y, f"{method} {problem}")


@grids
@pytest.mark.parametrize("problem", PROBLEMS)
def test_scipy(problem, grid, scipy_in_float64):
    func, y0 = PROBLEMS[problem](f64)
    assert_parity(func, y0, times(grid), "scipy_solver")


def test_rejected_steps_were_compared():
    func, y0 = van_der_pol_problem(f64)
    ours = assert_parity(func, y0, times("two"), "dopri5", options={"first_step": 0.5})
    names = [name for name, _, _ in ours.steps]
    assert names.count("reject_step") > 3 and names.count("accept_step") > 30


@pytest.mark.parametrize("dtypes", [(f32, f32), (f64, f32), (f32, f64)], ids=str)
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_dtype_of_t(method, dtypes):
    """Same steps whatever the dtype of t; state and t in float32 are compared as above."""
    state_dtype, t_dtype = dtypes
    t, given = times("many", t_dtype), settings_of(method, f32)
    exact = solve(torchdiffeq, *oscillator_problem(f64), t.double(), method, **given)
    theirs, ours = solve_both(*oscillator_problem(state_dtype), t, method, **given)
    assert ours.nfe == theirs.nfe
    assert_no_worse(ours.y, theirs.y, exact.y, method)


# --- options --------------------------------------------------------------------------------------


def jumping(t, y):
    return torch.where(t < 0.5, -y + t, 3 * y) + torch.where(t < 0.3, 0.0, 1.0)


def largest(x):
    return x.abs().max()


def tensor(*values):
    return torch.tensor(values, dtype=f64)


@pytest.mark.parametrize("grid", ["two", "uneven", "descending"])
@pytest.mark.parametrize("method", ["dopri5", "bosh3", "adaptive_heun"])
@pytest.mark.parametrize(
    "options",
    [
        {"first_step": 0.01},
        {"first_step": 5.0},
        {"safety": 0.5},
        {"ifactor": 1.5},
        {"dfactor": 0.5, "first_step": 0.2},
        {"min_step": 0.03},
        {"max_step": 0.02},
        {"min_step": 0.05, "max_step": 0.05},
        {"norm": largest},
        {"step_t": tensor(0.1, 0.6, 0.25, 7.0)},
        {"step_t": tensor(0.1, 0.6), "jump_t": tensor(0.3)},
        {
            "first_step": 0.02,
            "safety": 0.8,
            "max_step": 0.1,
            "step_t": tensor(0.3),
            "norm": largest,
        },
        {"max_num_steps": 5000, "dtype": f64},
        {"dtype": f32},  # that is float64 if the state is: the wider of the two
    ],
    ids=lambda options: "-".join(options),
)
def test_options_of_adaptive_methods(options, method, grid):
    func, y0 = mlp_problem(f64)
    given = {"rtol": 1e-5, "atol": 1e-6, "options": options}
    assert_parity(func, y0, times(grid), method, **given)


@pytest.mark.parametrize("grid", ["two", "uneven", "descending"])
@pytest.mark.parametrize("method", STEPS_OF_ITS_OWN)
def test_jumps(method, grid):
    """A field that jumps: both sides of it, at the cost of one evaluation a jump."""
    options = {"jump_t": tensor(0.5, 0.3), "step_t": tensor(0.1), "ifactor": 2.0}
    given = {"rtol": 1e-3, "atol": 1e-4, "options": options}
    assert_parity(jumping, tensor(1.0, -0.5), times(grid), method, **given)


def test_time_in_float32():
    """options["dtype"]: t and dt rounded to float32, so that the steps agree to that."""
    options = {"dtype": f32, "ifactor": 2.0}
    theirs, ours = solve_both(
        *oscillator_problem(f32), times("uneven", f32), "dopri5", rtol=1e-4, options=options
    )
    assert [step[0] for step in ours.steps] == [step[0] for step in theirs.steps]
    for _, t, dt in ours.steps:
        assert t == torch.tensor(t, dtype=f32).item() and dt == torch.tensor(dt, dtype=f32).item()


@pytest.mark.parametrize("grid", ["two", "uneven", "descending"])
@pytest.mark.parametrize("method", GIVEN_STEPS)
@pytest.mark.parametrize(
    "options",
    [
        {"step_size": 0.3, "interp": "linear"},
        {"step_size": 0.1, "interp": "linear", "perturb": True},
        {"step_size": 10.0, "interp": "linear"},
        {"grid_constructor": lambda f, y, t: torch.linspace(t[0], t[-1], 17, dtype=t.dtype)},
        {"perturb": True},
        {"perturb": False},
    ],
    ids=lambda options: "-".join(options),
)
def test_options_of_fixed_step_methods(options, method, grid):
    func, y0 = mlp_problem(f64)
    if "grid_constructor" in options:
        options = {**options, "interp": "linear"}
    assert_parity(func, y0, times(grid), method, options=options)


@pytest.mark.parametrize("grid", ["two", "uneven", "descending", "many in one step"])
@pytest.mark.parametrize("method", GIVEN_STEPS)
def test_cubic_interpolation(method, grid):
    """Its values. It costs torchdiffeq an evaluation per output time, us at most one per step."""
    options = {"step_size": 0.1, "interp": "cubic"}
    theirs, ours = solve_both(*mlp_problem(f64), times(grid), method, options=options)
    assert_close(ours.y, theirs.y)
    assert ours.nfe <= theirs.nfe


@pytest.mark.parametrize("implicit", [True, False])
@pytest.mark.parametrize("options", [{"max_order": 4}, {"max_order": 7, "max_iters": 2}])
def test_options_of_adams_methods(options, implicit):
    """And the rule when the iteration to the implicit solution converges, or does not."""
    options = {**options, "implicit": implicit, "step_size": 0.05, "interp": "linear"}
    for tolerance in (1e-2, 1e-9):
        given = {"rtol": tolerance, "atol": tolerance, "options": options}
        assert_parity(*mlp_problem(f64), times("uneven"), "fixed_adams", **given)


@pytest.mark.filterwarnings("ignore:The following arguments have no effect")
@pytest.mark.parametrize("solver", ["RK45", "RK23", "DOP853", "BDF", "LSODA"])
def test_options_of_scipy_solver(solver, scipy_in_float64):
    options = {"solver": solver, "max_step": 0.1}
    given = {"rtol": 1e-5, "atol": 1e-6, "options": options}
    assert_parity(*oscillator_problem(f64), times("uneven"), "scipy_solver", **given)


# --- states ---------------------------------------------------------------------------------------


def coupled(t, state):
    x, y, z = state
    return -y.mean() * x + t, torch.stack([y[1], -4 * y[0]]) * z, z * torch.cos(3 * t)


COUPLED = (
    torch.linspace(-1, 2, 6, dtype=f64).reshape(3, 2),
    tensor(1.0, 0.5),
    torch.tensor(0.7, dtype=f64),
)


def largest_of_parts(parts):
    assert isinstance(parts, tuple) and [p.shape for p in parts] == [p.shape for p in COUPLED]
    return max(part.abs().max() for part in parts)


@pytest.mark.parametrize("grid", ["two", "uneven", "descending"])
@pytest.mark.parametrize("method", METHODS)
def test_tuples(method, grid, scipy_in_float64):
    given = settings_of(method)
    if method in GIVEN_STEPS:
        given = with_options(given, SMALL_LINES if method == "explicit_adams" else LINES)
    assert_parity(coupled, COUPLED, times(grid), method, **given)


@pytest.mark.parametrize(
    "given",
    [
        {"options": {"norm": largest_of_parts}},
        {"rtol": (tensor(1e-3), tensor(1e-6, 1e-5), tensor(1e-4)), "atol": 1e-6},
        {"rtol": 1e-5, "atol": (tensor(1e-3), tensor(1e-6, 1e-5), tensor(1e-9))},
    ],
    ids=["norm", "rtol", "atol"],
)
def test_norms_and_tolerances_of_tuples(given):
    assert_parity(coupled, COUPLED, times("uneven"), "dopri5", **given)


def test_tolerances_by_entry():
    func, y0 = oscillator_problem(f64)
    rtol = torch.tensor([[1e-3, 1e-6], [1e-9, 1e-3]], dtype=f64)
    assert_parity(func, y0, times("uneven"), "dopri5", rtol=rtol, atol=1e-3 * rtol[0])


@pytest.mark.parametrize("grid", ["two", "uneven", "descending"])
@pytest.mark.parametrize("method", ["dopri5", "bosh3", "rk4", "midpoint"])
def test_complex_states(method, grid):
    def rotation(t, y):
        return (2j - 0.3) * y * torch.cos(t) + 0.1j * y.conj()

    y0 = torch.tensor([1.0 + 1j, 0.5, -2j], dtype=torch.complex128)
    assert_parity(rotation, y0, times(grid), method, rtol=1e-5, atol=1e-7)


SHAPES = [(), (3,), (1,), (4, 2), (2, 3, 2, 2)]
LAYOUTS = {
    "contiguous": lambda y: y,
    "transposed": lambda y: y.transpose(0, -1).contiguous().transpose(0, -1) if y.dim() else y,
    "expanded": lambda y: y[:1].expand(y.shape) if y.dim() else y.expand(()),
    "strided": lambda y: y.repeat_interleave(2, -1)[..., ::2] if y.dim() else y,
}


@settings(max_examples=60)
@given(
    shape=st.sampled_from(SHAPES),
    layout=st.sampled_from(sorted(LAYOUTS)),
    method=st.sampled_from(["dopri5", "bosh3", "rk4", "implicit_adams"]),
    gaps=st.lists(st.floats(1e-3, 0.5), min_size=1, max_size=6),
    start=st.floats(-2, 2),
    backwards=st.booleans(),
)
def test_any_shape_strides_and_times(shape, layout, method, gaps, start, backwards):
    y0 = LAYOUTS[layout](
        torch.linspace(-1, 1.5, max(math.prod(shape), 1), dtype=f64).reshape(shape)
    )
    before = y0.clone()
    sign = -1 if backwards else 1
    t = start + sign * torch.tensor([0.0, *gaps], dtype=f64).cumsum(0)

    def field(t, y):
        return torch.sin(3 * y + t) - 0.2 * y

    options = {} if method in STEPS_OF_ITS_OWN else {"step_size": 0.1, "interp": "linear"}
    ours = assert_parity(field, y0, t, method, rtol=1e-5, atol=1e-6, options=options)
    assert torch.equal(y0, before) and torch.equal(ours.y[0], before)


# --- gradients ------------------------------------------------------------------------------------


@dataclass
class Differentiated:
    nfe: int
    nfe_backward: int
    gradients: list
    steps: list


def differentiate(solver, func, y0, t, **kwargs):
    """Gradients with respect to y0, t and parameters of a sum of all outputs, unevenly weighted."""
    field = Recorder(func, watch_steps=False)
    parts = [y.clone().requires_grad_() for y in (y0 if isinstance(y0, tuple) else (y0,))]
    t = t.clone().requires_grad_()
    solution = solver(field, tuple(parts) if isinstance(y0, tuple) else parts[0], t, **kwargs)
    outputs = solution if isinstance(solution, tuple) else (solution,)
    loss = sum((y * torch.arange(1.0, y.numel() + 1).cos().reshape(y.shape)).sum() for y in outputs)
    nfe = field.nfe
    gradients = torch.autograd.grad(loss, [*parts, t, *field.parameters()])
    return Differentiated(nfe, field.nfe - nfe, list(gradients), field.steps)


def assert_gradient_parity(name, *args, **kwargs):
    """In "odeint" or "odeint_adjoint". Each part within 1e-10 of its largest entry."""
    theirs = differentiate(getattr(torchdiffeq, name), *args, **kwargs)
    ours = differentiate(getattr(anode_fast, name), *args, **kwargs)
    assert (ours.nfe, ours.nfe_backward) == (theirs.nfe, theirs.nfe_backward)
    for got, want in zip(ours.gradients, theirs.gradients, strict=True):
        assert_close(got, want, 1e-10)


@pytest.mark.parametrize("grid", TIMES)
@pytest.mark.parametrize("method", [name for name in METHODS if name != "scipy_solver"])
def test_gradients_of_odeint(method, grid):
    given = with_options(settings_of(method), GIVEN if method == "dopri8" else {"first_step": 0.1})
    if method in GIVEN_STEPS:
        # No output time but the last lies on this grid: torchdiffeq loses the gradient with respect
        # to one that does.
        given["options"] = {"step_size": 0.087, "interp": "linear"}
    assert_gradient_parity("odeint", *mlp_problem(f64), times(grid), method=method, **given)


@pytest.mark.parametrize("grid", ["two", "uneven", "descending"])
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_gradients_of_odeint_for_tuples(method, grid):
    options = {"first_step": 0.05} if method == "dopri5" else {"step_size": 0.1, "interp": "cubic"}
    theirs, ours = (
        differentiate(package.odeint, coupled, COUPLED, times(grid), method=method, options=options)
        for package in (torchdiffeq, anode_fast)
    )
    for got, want in zip(ours.gradients, theirs.gradients, strict=True):
        assert_close(got, want, 1e-10)


def test_choice_of_the_first_step_explains_the_other_difference():
    """torchdiffeq differentiates it too: what it adds is dy/dh dh/dy0, h the first step."""
    func, y0 = mlp_problem(f64)
    t = torch.tensor([0.0, 0.02], dtype=f64)  # inside the first step
    given = {"rtol": 1e-2, "atol": 1e-2, "method": "dopri5"}

    def loss(y0, package, **options):
        return package.odeint(func, y0, t, options=options, **given)[-1].square().sum()

    leaf = y0.clone().requires_grad_()
    step = _select_initial_step(func, t[0], leaf, 4, 1e-2, 1e-2, _rms_norm)
    assert step > t[1]
    (of_step,) = torch.autograd.grad(step, leaf)
    theirs, ours = (
        torch.autograd.grad(loss(leaf, package), leaf)[0] for package in (torchdiffeq, anode_fast)
    )
    h, nudge = step.item(), 1e-4 * step.item()
    slope = loss(y0, anode_fast, first_step=h + nudge) - loss(y0, anode_fast, first_step=h - nudge)
    added = slope / (2 * nudge) * of_step
    # The difference quotient is exact to nudge^2; its parts' rounding is divided by the nudge.
    assert_close(theirs - ours, added, 1e-6)


ADJOINT_GIVEN = [
    {},
    {"adjoint_rtol": 1e-3, "adjoint_atol": 1e-4},
    {"adjoint_method": "bosh3", "adjoint_options": {}},
    {"adjoint_method": "rk4", "adjoint_options": {"step_size": 0.1}},
    {"adjoint_options": {"norm": "seminorm"}},
    {"adjoint_options": {"norm": lambda parts: max(part.abs().max() for part in parts)}},
    {"adjoint_options": {"first_step": 0.01, "max_step": 0.1, "safety": 0.8}},
    {"options": {"first_step": 0.01, "norm": lambda y: y.abs().max()}},
    {"options": {"max_step": 0.1}, "adjoint_options": {}},
    {"options": {"max_step": 0.1}},
]


@pytest.mark.filterwarnings("ignore:rk4")
@pytest.mark.parametrize("t", [[0.0, 0.7], [0.7, -0.1]], ids=["ascending", "descending"])
@pytest.mark.parametrize("given", ADJOINT_GIVEN, ids=lambda given: "-".join(given) or "default")
@pytest.mark.parametrize("method", [name for name in STEPS_OF_ITS_OWN if name != "dopri8"])
def test_odeint_adjoint(method, given, t):
    given = {"method": method, **settings_of(method), **given}
    func, y0 = mlp_problem(f64)
    assert_gradient_parity("odeint_adjoint", func, y0, torch.tensor(t, dtype=f64), **given)


@pytest.mark.parametrize("norm", [{}, {"norm": "seminorm"}], ids=["default", "seminorm"])
def test_odeint_adjoint_with_dopri8(norm):
    given = {"method": "dopri8", "options": GIVEN, "adjoint_options": {**GIVEN, **norm}}
    assert_gradient_parity("odeint_adjoint", *mlp_problem(f64), times("two"), **given)


def largest_of_adjoint(parts):
    """t, three parts of the state, three of its adjoint; no parameters."""
    assert [part.shape for part in parts[1:4]] == [part.shape for part in COUPLED]
    assert len(parts) == 7
    return max(part.abs().max() for part in parts)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"adjoint_options": {"norm": "seminorm"}},
        {"adjoint_options": {"norm": largest_of_adjoint}},
    ],
    ids=["default", "seminorm", "norm"],
)
def test_odeint_adjoint_for_tuples(given):
    given = {"rtol": 1e-5, "atol": 1e-6, **given}
    assert_gradient_parity("odeint_adjoint", coupled, COUPLED, times("two"), **given)


@pytest.mark.parametrize("grid", ["two", "descending", "uneven"])
@pytest.mark.parametrize("method", GIVEN_STEPS)
def test_odeint_adjoint_with_fixed_steps(method, grid):
    """The adjoint ODE with one step per output interval, as `adjoint_options` ask for it."""
    given = {"method": method, "options": {"step_size": 0.1, "interp": "linear"}}
    given["adjoint_options"] = {}
    assert_gradient_parity("odeint_adjoint", *mlp_problem(f64), times(grid), **given)


def test_odeint_adjoint_with_scipy(scipy_in_float64):
    given = {"method": "scipy_solver", "rtol": 1e-6, "atol": 1e-7}
    given["options"] = {"solver": "LSODA"}
    func, y0 = mlp_problem(f64)
    # Unless it is told them, ours finds out the parameters by one evaluation.
    given["adjoint_params"] = tuple(func.parameters())
    assert_gradient_parity("odeint_adjoint", func, y0, times("two"), **given)
