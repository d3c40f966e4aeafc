"""Programs in the C++ solvers: one evaluation and its gradient, whole solves, the first stage."""

import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from anode_fast import SolverError, odeint, odeint_adjoint
from anode_fast.kernels import interface, program
from anode_fast.kernels.cpu import library, solve
from anode_fast.kernels.program import STATE, TIME
from anode_fast.spec import ACTIVATIONS, MLPSpec, program_of
from anode_fast.tableau import TABLEAUS
from tests.kernels.programs import KINDS, Builder, programs, tensors_of

pytestmark = pytest.mark.skipif(library.load() is None, reason=library.missing() or "loaded")

f32, f64 = torch.float32, torch.float64
both_dtypes = pytest.mark.parametrize("dtype", [f32, f64], ids=["float32", "float64"])
CONTROLS = {"fixed": interface.FIXED, "batch": interface.BATCH, "sample": interface.SAMPLE}


def solver(of, dtype, method="euler", control="fixed", backwards=False, **options):
    tableau = TABLEAUS[method]
    none = [(0.0,) * 4] * tableau.stages
    return solve.Solve(
        library.load(),
        of,
        interface.Method(
            tableau.order,
            tableau.c_float,
            tableau.a_float,
            tableau.b_float,
            tableau.b_err_float or (0.0,) * tableau.stages,
            tableau.interpolant_float if tableau.b_mid else none,
            tableau.solution_is_last_stage,
        ),
        dtype,
        control=CONTROLS[control],
        backwards=backwards,
        data_dim=of.dim,
        safety=0.9,
        ifactor=10.0,
        dfactor=0.2,
        max_step=math.inf,
        max_num_steps=1000,
        **options,
    )


# --- one evaluation -------------------------------------------------------------------------------

HUGE = 2.0**60
TIME_HERE = 0.75


def native(of, tensors, y, cotangent, backwards):
    """dy/dt, and its gradient by y and the tensors: one step, of which nothing else is left."""
    sign = -1 if backwards else 1
    solving = solver(of, y.dtype, backwards=backwards)
    times = [sign * TIME_HERE, sign * TIME_HERE + HUGE]
    out, result, kept = solving.forward(y, tensors, times, times, keep=True)
    assert result.status == interface.SUCCESS
    grad = torch.stack([torch.zeros_like(cotangent), sign * cotangent / HUGE])
    of_y, grads, _ = solving.discrete_gradient(kept, tensors, grad, y, True)
    value = sign * (out[1].double() - y.double()) / HUGE
    return [value, of_y.double() - grad[1].double(), *grads]


def by_torch(of, tensors, y, cotangent):
    t = torch.tensor(TIME_HERE, dtype=y.dtype)
    of_y, _, grads = program.vjp(of, tensors, t, y, cotangent)
    return [program.evaluate(of, tensors, t, y), of_y, *grads]


def check_evaluation(of, rows, backwards):
    """Errors like torch's, of several draws, as one may be small by chance.

    In float64 there is nothing more exact: torch's error is that in float32, scaled.
    """
    draws, errors = 3, {}
    for _ in range(draws):
        y = torch.randn(rows, of.dim).double()
        cotangent = torch.randn(rows, of.dim).double()
        tensors = [x.float().double() for x in tensors_of(of)]
        exact = by_torch(of, tensors, y, cotangent)
        single = [x.float() for x in tensors], y.float(), cotangent.float()
        found = {
            "torch": by_torch(of, *single),
            f32: native(of, *single, backwards),
            f64: native(of, tensors, y, cotangent, backwards),
        }
        for name, outcomes in found.items():
            for i, (got, want) in enumerate(zip(outcomes, exact, strict=True)):
                assert got.shape == want.shape
                scale = want.abs().max().clamp_min(1e-30)
                error = float((got.double() - want).abs().max() / scale)
                errors.setdefault((name, i), []).append(error)
    for i in range(len(exact)):
        of_torch = max(errors["torch", i])
        for dtype in (f32, f64):
            ratio = torch.finfo(dtype).eps / torch.finfo(f32).eps
            bound = 3 * of_torch * ratio + 32 * torch.finfo(dtype).eps
            assert max(errors[dtype, i]) <= bound, f"{dtype}, output {i}: {errors}"


@settings(max_examples=150)
@given(programs(most=25), st.sampled_from([1, 5, 16, 70]), st.booleans())
def test_random_programs(of, rows, backwards):
    check_evaluation(of, rows, backwards)


def chain(dim, hidden, activation, time):
    """A perceptron."""
    b = Builder(dim)
    x = b.emit("join", [TIME, STATE], 1 + dim) if time else STATE
    for width in hidden:
        x = b.emit(activation, [b.linear(x, width)], number=1.0)
    b.linear(x, dim)
    return b.build()


@pytest.mark.parametrize("activation", ["relu", "tanh", "softplus", "silu", "gelu", "elu", "sin"])
@pytest.mark.parametrize("time", [True, False])
def test_perceptrons(activation, time):
    check_evaluation(chain(5, (33, 70), activation, time), 70, False)


@pytest.mark.parametrize("hidden", [(9,), (17,) * 12], ids=len)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_shallow_and_deep_perceptrons(activation, hidden):
    check_evaluation(program_of(MLPSpec(3, hidden, activation)), 20, True)


def gated(b):
    """Time gates half of a map's outputs by the other half."""
    both = b.linear(STATE, 2 * b.dim)
    halves = [b.emit("slice", [both], b.dim, (), float(k * b.dim)) for k in (0, 1)]
    gate = b.emit("sigmoid", [b.emit("mul", [halves[1], TIME])])
    b.emit("mul", [halves[0], gate])


def residual(b):
    h = STATE
    for _ in range(2):
        inner = b.emit("tanh", [b.linear(h, b.dim)])
        h = b.emit("add", [h, inner])
    b.emit("sub", [h, b.emit("parameter", (), 1, [b.tensor()])])


def cubed(b):
    b.linear(b.emit("pow", [STATE], number=3.0), b.dim)


def layer_norm(b):
    n = b.constant(1 / b.dim)
    mean = b.emit("mul", [b.emit("total", [STATE], 1), n])
    away = b.emit("sub", [STATE, b.emit("spread", [mean], b.dim)])
    square = b.emit("mul", [away, away])
    variance = b.emit("mul", [b.emit("total", [square], 1), n])
    std = b.emit("sqrt", [b.emit("add", [variance, b.constant(0.01)])])
    b.emit("mul", [b.emit("div", [away, std]), b.emit("parameter", (), b.dim, [b.tensor(b.dim)])])


def negative_slope(b):
    x = b.linear(STATE, b.dim)
    small = b.emit("mul", [x, b.constant(0.01)])
    b.emit("select", [b.emit("gt", [x, b.constant(0.0)]), x, small])


def state_itself(b):
    b.emit("slice", [STATE], b.dim)


def parameter_without_part(b):
    b.tensor(3, 2)
    b.emit("neg", [STATE])


def parameter_alone(b):
    b.emit("parameter", (), b.dim, [b.tensor(b.dim)])


def time_alone(b):
    b.emit("spread", [TIME], b.dim)


def time_through_a_map(b):
    b.emit("mul", [b.linear(TIME, b.dim), b.linear(STATE, b.dim)])


def saved_slope_twice(b):
    x = b.linear(STATE, 7)
    both = b.emit("mul", [b.emit("softplus", [x]), b.emit("softplus", [x])])
    b.linear(b.emit("mul", [both, x]), b.dim)


FIELDS = (
    *(gated, residual, cubed, layer_norm, negative_slope, saved_slope_twice),
    *(state_itself, parameter_without_part, parameter_alone, time_alone, time_through_a_map),
)


def built(make, dim=6):
    b = Builder(dim)
    make(b)
    return b.build()


@pytest.mark.parametrize("make", FIELDS)
@pytest.mark.parametrize("backwards", [False, True])
def test_fields(make, backwards):
    check_evaluation(built(make), 70, backwards)
    if make is not layer_norm:
        check_evaluation(built(make, 1), 3, backwards)


# --- solves ---------------------------------------------------------------------------------------


class Oracle(torch.nn.Module):
    def __init__(self, of, tensors):
        super().__init__()
        self.of, self.tensors = of, torch.nn.ParameterList(tensors)
        self.accepted = self.rejected = 0

    def forward(self, t, y):
        return program.evaluate(self.of, list(self.tensors), t, y)

    def callback_accept_step_adjoint(self, t, state, dt):
        self.accepted += 1

    def callback_reject_step_adjoint(self, t, state, dt):
        self.rejected += 1


TOLERANCES = {"rtol": 1e-5, "atol": 1e-6}
METHODS = {"batch": "dopri5", "sample": "dopri5", "fixed": "rk4"}
STEP = 0.13
times_drawn = st.sampled_from([(0.0, 1.0), (0.25, 0.5, 0.6, 1.25), (1.0, 0.8, -0.25)])
# No jumps: a step that ends within rounding of one could go either way.
SMOOTH = [kind for kind in KINDS if kind not in ("sign", "gt", "ge", "select")]


def signed(times):
    sign = -1 if times[0] > times[-1] else 1
    return [sign * t for t in times], sign < 0


def grid(times):
    points = [times[0]]
    for t0, t1 in itertools.pairwise(times):
        steps = math.ceil((t1 - t0) / STEP)
        points += [t0 + i * STEP for i in range(1, steps)] + [t1]
    return points


def close(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9 * max(1.0, float(want.abs().max())))


def try_reference(call):
    """Its result, for a case that it can solve in not too many steps."""
    try:
        return call()
    except SolverError:
        assume(False)


@pytest.mark.filterwarnings("ignore:.*it takes one single step")
@settings(max_examples=60)
@given(
    programs(kinds=SMOOTH),
    st.sampled_from([1, 5, 70]),
    times_drawn,
    st.sampled_from(list(CONTROLS)),
)
def test_solves(of, rows, times, control):
    tensors, x = tensors_of(of), torch.randn(rows, of.dim, dtype=f64).requires_grad_()
    oracle = Oracle(of, tensors)
    options = {} if control == "fixed" else {"max_num_steps": 100}
    want, stats = try_reference(
        lambda: odeint(
            oracle,
            x,
            torch.tensor(times, dtype=f64),
            method=METHODS[control],
            options=options,
            step_control="batch" if control == "fixed" else control,
            backend="reference",
            return_stats=True,
            **TOLERANCES,
        )
    )
    assume(want.abs().max() < 1e3)
    own, backwards = signed(times)
    solving = solver(of, f64, METHODS[control], control, backwards, **TOLERANCES)
    steps = own if control == "fixed" else ()  # from each output to the next
    got, result, kept = solving.forward(x.detach(), tensors, own, steps, keep=True)
    assert result.status == interface.SUCCESS
    if control != "fixed":
        assert (result.accepted, result.rejected) == (stats.accepted, stats.rejected)
    assert result.nfe == stats.nfe
    close(got, want.detach())
    grad = torch.randn_like(got)
    x_grad, grads, _ = solving.discrete_gradient(kept, tensors, grad, x, True)
    leaves = [x, *oracle.tensors]
    if want.requires_grad:
        wanted = torch.autograd.grad(want, leaves, grad, allow_unused=True)
        for g, w, leaf in zip([x_grad, *grads], wanted, leaves, strict=True):
            close(g, torch.zeros_like(leaf) if w is None else w)


@settings(max_examples=40)
@given(
    programs(kinds=SMOOTH),
    st.sampled_from([1, 5, 70]),
    times_drawn,
    st.sampled_from(["batch", "fixed"]),
)
def test_continuous_gradients(of, rows, times, control):
    tensors, x = tensors_of(of), torch.randn(rows, of.dim, dtype=f64).requires_grad_()
    oracle = Oracle(of, tensors)
    fixed = control == "fixed"
    options = {"step_size": STEP} if fixed else {"max_num_steps": 100}
    grad = torch.randn(len(times), rows, of.dim, dtype=f64)

    def reference():
        solution = odeint_adjoint(
            oracle,
            x,
            torch.tensor(times, dtype=f64),
            method=METHODS[control],
            options=options,
            backend="reference",
            gradient="continuous",
            **TOLERANCES,
        )
        assume(solution.abs().max() < 1e3)
        inputs = [x, *oracle.tensors]
        return solution.detach(), torch.autograd.grad(solution, inputs, grad, allow_unused=True)

    solution, wanted = try_reference(reference)
    own, backwards = signed(times)
    solving = solver(of, f64, METHODS[control], control, backwards, **TOLERANCES)
    steps = []
    for t1, t0 in itertools.pairwise(reversed(own)) if fixed else ():
        steps += grid([-t1, -t0])
    x_grad, grads, result = solving.continuous_gradient(
        solution, tensors, own, grad, x, [True] * len(tensors), steps
    )
    assert result.status == interface.SUCCESS
    if not fixed:
        assert (result.accepted, result.rejected) == (oracle.accepted, oracle.rejected)
    for g, w, leaf in zip([x_grad, *grads], wanted, [x, *tensors], strict=True):
        close(g, torch.zeros_like(leaf) if w is None else w)


@both_dtypes
def test_threads_do_not_change_a_bit(dtype):
    of = chain(7, (33,), "silu", True)
    tensors, x = tensors_of(of, dtype), torch.randn(700, 7, dtype=dtype)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            solving = solver(of, dtype, "dopri5", "batch", **TOLERANCES)
            out, _, kept = solving.forward(x, tensors, [0.0, 1.0], keep=True)
            x_grad, grads, _ = solving.discrete_gradient(kept, tensors, out, x, True)
        finally:
            torch.set_num_threads(1)
        found.append([out, x_grad, *grads])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


# --- the first stage ------------------------------------------------------------------------------


def first_stage(of, tensors, y, expected, backwards=False, t=TIME_HERE):
    solving = solver(of, y.dtype, backwards=backwards)
    sign = -1 if backwards else 1
    times = [sign * t, sign * t + 0.125]
    return solving.forward(y, tensors, times, times, expected=expected)[1]


def values(of, tensors, y, t=TIME_HERE):
    return program.evaluate(of, tensors, torch.tensor(t, dtype=y.dtype), y)


@settings(max_examples=200)
@given(
    programs(most=25),
    st.sampled_from([1, 5, 70]),
    st.sampled_from([0.1, 1.0, 10.0]),
    st.sampled_from([f32, f64]),
    st.booleans(),
)
def test_rounding_is_let_pass(of, rows, scale, dtype, backwards):
    tensors = [scale * x for x in tensors_of(of, dtype)]
    y = torch.randn(rows, of.dim, dtype=dtype)
    result = first_stage(of, tensors, y, values(of, tensors, y).contiguous(), backwards)
    assert result.status == interface.SUCCESS or result.status == interface.NON_FINITE


SHAPES = [(8,), (64, 64), (300, 300, 300), (1000, 1000)]
OTHERS = {"relu": "elu", "tanh": "sin", "softplus": "relu", "gelu": "silu", "sigmoid": "tanh"}


@both_dtypes
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0, 100.0])  # the last: saturated
@pytest.mark.parametrize("hidden", SHAPES, ids=str)
@pytest.mark.parametrize("activation", OTHERS)
def test_rounding_of_wide_and_saturated_perceptrons(activation, hidden, scale, dtype):
    of = chain(3, hidden, activation, True)
    tensors = [scale * x for x in tensors_of(of, dtype)]
    for rows in (1, 7):
        y = torch.randn(rows, 3, dtype=dtype)
        result = first_stage(of, tensors, y, values(of, tensors, y))
        assert result.status == interface.SUCCESS


@both_dtypes
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("hidden", [(8,), (64, 64)], ids=str)
@pytest.mark.parametrize("activation", OTHERS)
def test_other_fields_are_told(activation, hidden, backwards, dtype):
    of = chain(3, hidden, activation, True)
    tensors, y = tensors_of(of, dtype), torch.randn(9, 3, dtype=dtype)
    right = values(of, tensors, y)
    assert first_stage(of, tensors, y, right, backwards).status == interface.SUCCESS
    wrong = {"activation": values(chain(3, hidden, OTHERS[activation], True), tensors, y)}
    wrong["time"] = values(of, tensors, y, TIME_HERE + 0.01)
    wrong["sign"] = -right
    for i, x in enumerate(tensors):
        changed = [*tensors]
        changed[i] = x * 1.01
        wrong[f"tensor {i}"] = values(of, changed, y)
    for name, expected in wrong.items():
        result = first_stage(of, tensors, y, expected, backwards)
        assert result.status == interface.FIELD_DIFFERS, name
        assert result.deviation == pytest.approx(float((expected - right).abs().max()), rel=1e-3)
        assert (result.row, result.nfe) == (0, 0)


def test_only_the_rows_that_are_expected():
    of, y = chain(3, (8,), "tanh", True), torch.randn(100, 3)
    tensors = tensors_of(of, f32)
    expected = values(of, tensors, y)[:80].contiguous()
    assert first_stage(of, tensors, y, expected).status == interface.SUCCESS
    expected[70, 1] += 1
    result = first_stage(of, tensors, y, expected)
    assert (result.status, result.row, result.rows) == (interface.FIELD_DIFFERS, 70, 1)


@both_dtypes
def test_what_is_not_finite_is_as_expected(dtype):
    of = built(lambda b: b.emit("log", [STATE]), 3)
    y = torch.tensor([[1.0, 0.0, -1.0]], dtype=dtype)
    right = torch.tensor([[0.0, -torch.inf, torch.nan]], dtype=dtype)
    assert first_stage(of, [], y, right).status == interface.NON_FINITE
    for wrong in ([0.0, torch.inf, torch.nan], [0.0, -torch.inf, 0.0], [torch.nan, 0.0, torch.nan]):
        result = first_stage(of, [], y, torch.tensor([wrong], dtype=dtype))
        assert result.status == interface.FIELD_DIFFERS
        assert result.deviation == torch.inf
