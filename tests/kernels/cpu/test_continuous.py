"""The native continuous gradient against the reference's: the same steps, the same values."""

import itertools
import math

import pytest
import torch

from anode_fast import MLPField, odeint_adjoint
from anode_fast.kernels import interface
from anode_fast.kernels.cpu import library, solve
from anode_fast.spec import ACTIVATIONS, program_of
from anode_fast.tableau import TABLEAUS
from tests.helpers import assert_no_worse

pytestmark = pytest.mark.skipif(library.load() is None, reason=library.missing() or "loaded")

FORWARDS, BACKWARDS = (0.0, 0.3, 0.4, 1.0), (0.7, 0.2, -0.5)
PINNED = {"min_step": 0.125, "max_step": 0.125}


class Case:
    """A solve in float64 whose gradient is wanted."""

    def __init__(self, rows=5, times=FORWARDS, dim=3, hidden=17, activation="tanh", **field):
        self.field = MLPField(dim, hidden, activation=activation, **field).double()
        self.times = times
        self.x = torch.randn(rows, dim, dtype=torch.float64)
        self.grad = torch.randn(len(times), rows, dim, dtype=torch.float64)
        self.unwanted = set()  # parameters, by number

    def to(self, dtype):
        other = Case.__new__(Case)
        vars(other).update(vars(self), x=self.x.to(dtype), grad=self.grad.to(dtype))
        other.field = MLPField(
            self.field.dim,
            self.field.hidden_dim,
            num_hidden=self.field.num_hidden,
            activation=self.field.activation,
            time_dependent=self.field.time_dependent,
        ).to(dtype)
        other.field.load_state_dict(self.field.state_dict())
        return other

    @property
    def parameters(self):
        return [p for layer in self.field.layers for p in (layer.weight, layer.bias)]

    def wanted(self):
        return [i not in self.unwanted for i in range(len(self.parameters))]


def reference(case, method="dopri5", options=None, **kw):
    """The solution, the gradients of x and the parameters, and (nfe, accepted, rejected)."""
    counts = {"accept": 0, "reject": 0}

    def count(name):
        def callback(t, state, dt):
            counts[name] += 1

        return callback

    for name in counts:
        setattr(case.field, f"callback_{name}_step_adjoint", count(name))
    x = case.x.clone().requires_grad_()
    for p, wanted in zip(case.parameters, case.wanted(), strict=True):
        p.requires_grad_(wanted)
    solution, stats = odeint_adjoint(
        case.field,
        x,
        torch.tensor(case.times, dtype=torch.float64),
        method=method,
        options=options or {},
        backend="reference",
        gradient="continuous",
        return_stats=True,
        **{"rtol": 1e-6, "atol": 1e-6, **kw},
    )
    inputs = [x, *(p for p in case.parameters if p.requires_grad)]
    grads = list(torch.autograd.grad(solution, inputs, case.grad))
    for i in sorted(case.unwanted):
        grads.insert(1 + i, None)
    if not TABLEAUS[method].adaptive:
        counts["accept"] = stats.nfe_backward // TABLEAUS[method].stages
    return solution.detach(), grads, (stats.nfe_backward, counts["accept"], counts["reject"])


def native(case, solution, method="dopri5", options=None, seminorm=False, **kw):
    """The gradients of x and the parameters, and what the call counted."""
    options = dict(options or {})
    tableau = TABLEAUS[method]
    none = [(0.0,) * 4] * tableau.stages
    step_size = options.pop("step_size", None)
    sign = -1 if case.times[0] > case.times[-1] else 1
    times = [sign * t for t in case.times]
    settings = {
        "safety": 0.9,
        "ifactor": 10.0,
        "dfactor": 0.2,
        "max_step": math.inf,
        "max_num_steps": 1000,
        "rtol": 1e-6,
        "atol": 1e-6,
        "data_dim": case.field.dim,
        **options,
        **kw,
    }
    gradient = solve.Solve(
        library.load(),
        program_of(case.field.spec()),
        interface.Method(
            tableau.order,
            tableau.c_float,
            tableau.a_float,
            tableau.b_float,
            tableau.b_err_float or (0.0,) * tableau.stages,
            tableau.interpolant_float if tableau.b_mid else none,
            tableau.solution_is_last_stage,
        ),
        case.x.dtype,
        control=interface.BATCH if tableau.adaptive else interface.FIXED,
        backwards=sign < 0,
        **settings,
    )
    x_grad, grads, result = gradient.continuous_gradient(
        solution,
        [p.detach() for p in case.parameters],
        times,
        case.grad,
        case.x,
        case.wanted(),
        [] if tableau.adaptive else grid(times, step_size),
        seminorm,
    )
    return [x_grad, *grads], result


def grid(times, step_size):
    """Of all intervals in negated time, one after the other."""
    points = []
    for t1, t0 in itertools.pairwise(reversed(times)):
        steps = math.ceil((t1 - t0) / step_size)
        points += [i * step_size - t1 for i in range(steps)] + [-t0]
    return points


def check(case, dtype, seminorm=False, options=None, **kw):
    """Counts equal; values to rounding in float64, in float32 as exact as the reference's.

    In float32 an adaptive method gets one step size: error estimates near roundoff would choose
    others, and the solution's error with them.
    """
    options = dict(options or {})
    if dtype == torch.float32 and "step_size" not in options:
        options.update(PINNED)
    kw["options"] = options
    norm = {"adjoint_options": {**options, "norm": "seminorm"}} if seminorm else {}
    _, exact, _ = reference(case, **kw, **norm)
    case = case.to(dtype)
    solution, ref, counts = reference(case, **kw, **norm)
    got, result = native(case, solution, seminorm=seminorm, **kw)
    assert result.status == interface.SUCCESS
    assert (result.nfe, result.accepted, result.rejected) == counts
    for i, (g, r, e) in enumerate(zip(got, ref, exact, strict=True)):
        if e is None or e.numel() == 0:
            assert g is e or g.shape == e.shape
        elif dtype == torch.float64:
            torch.testing.assert_close(g, r, rtol=0, atol=1e-10 * float(r.abs().max()))
        else:
            assert_no_worse(g, r, e, f"gradient {i}")
    return result


both_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
both_norms = pytest.mark.parametrize("seminorm", [False, True], ids=["all", "seminorm"])
all_times = pytest.mark.parametrize(
    "times", [(0.0, 1.0), FORWARDS, BACKWARDS], ids=["one", "three", "backwards"]
)


@both_dtypes
@both_norms
@all_times
@pytest.mark.parametrize("method", ["dopri5", "bosh3", "tsit5", "dopri8"])
def test_adaptive_methods(method, times, seminorm, dtype):
    # Its errors are nothing but roundoff, and its interpolant is far less exact than its steps.
    options = PINNED if method == "dopri8" else {}
    check(Case(times=times), dtype, seminorm, options, method=method)


@both_norms
@all_times
def test_counts_of_dopri8(times, seminorm):
    case = Case(times=times)
    norm = {"adjoint_options": {"norm": "seminorm"}} if seminorm else {}
    solution, ref, counts = reference(case, method="dopri8", **norm)
    got, result = native(case, solution, method="dopri8", seminorm=seminorm)
    assert (result.nfe, result.accepted, result.rejected) == counts
    for g, r in zip(got, ref, strict=True):
        torch.testing.assert_close(g, r, rtol=0, atol=1e-8 * float(r.abs().max()))


@both_dtypes
@both_norms
@pytest.mark.parametrize("method", ["adaptive_heun", "fehlberg2"])
def test_last_stage_away_from_the_solution(method, seminorm, dtype):
    check(Case(), dtype, seminorm, method=method, rtol=1e-3, atol=1e-3)


@both_dtypes
@all_times
@pytest.mark.parametrize("method", ["rk4", "euler", "midpoint"])
def test_fixed_steps(method, times, dtype):
    check(Case(times=times), dtype, method=method, options={"step_size": 0.13})


@both_dtypes
@both_norms
@pytest.mark.parametrize("rows", [0, 1, 70, 200])
def test_rows(rows, seminorm, dtype):
    check(Case(rows, hidden=32), dtype, seminorm)


@both_dtypes
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, dtype):
    # At kinks many steps fail, and the reference makes evaluations more to find out why.
    tolerance = 1e-3 if activation in ("relu", "elu") else 1e-6
    check(Case(activation=activation), dtype, rtol=tolerance, atol=tolerance)


@both_dtypes
@both_norms
@pytest.mark.parametrize("field", [{"time_dependent": False}, {"num_hidden": 1}, {"num_hidden": 3}])
def test_fields(field, seminorm, dtype):
    check(Case(dim=5, hidden=9, **field), dtype, seminorm)


@both_norms
def test_rejected_steps(seminorm):
    case = Case(rows=20)
    for p in case.parameters:
        p.data *= 3
    result = check(case, torch.float64, seminorm, rtol=1e-4, atol=1e-4)
    assert result.rejected > 0


@pytest.mark.parametrize(
    "options",
    [
        {"first_step": 0.01},
        {"safety": 0.7, "ifactor": 3.0, "dfactor": 0.5},
        {"min_step": 0.2},
        {"max_step": 0.1},
    ],
)
def test_options(options):
    check(Case(rows=20), torch.float64, options=options)


@both_norms
def test_steps_chosen_in_single_precision(seminorm):
    case = Case(rows=64, dim=7, hidden=32).to(torch.float32)
    kw = {"rtol": 1e-3, "atol": 1e-3}
    norm = {"adjoint_options": {"norm": "seminorm"}} if seminorm else {}
    solution, ref, counts = reference(case, **kw, **norm)
    got, result = native(case, solution, seminorm=seminorm, **kw)
    assert (result.nfe, result.accepted, result.rejected) == counts
    for g, r in zip(got, ref, strict=True):
        torch.testing.assert_close(g, r, rtol=0, atol=1e-3 * float(r.abs().max()))


@both_dtypes
@both_norms
@pytest.mark.parametrize("unwanted", [{0, 1}, {3}, {0, 1, 2, 3, 4, 5}])
def test_parameters_not_wanted_take_no_part(unwanted, seminorm, dtype):
    case = Case()
    case.unwanted = unwanted
    check(case, dtype, seminorm)


def test_step_of_the_float_dtype():
    case = Case(rows=20).to(torch.float32)
    kw = {"rtol": 1e-3, "atol": 1e-3}
    solution, ref, counts = reference(case, options={"dtype": torch.float32}, **kw)
    got, result = native(case, solution, options={"float_time": True}, **kw)
    assert (result.nfe, result.accepted, result.rejected) == counts
    for g, r in zip(got, ref, strict=True):
        torch.testing.assert_close(g, r)


def test_only_the_first_time():
    case = Case(times=(0.5,))
    got, result = native(case, case.x[None])
    assert result.nfe == 0
    assert torch.equal(got[0], case.grad[0])
    assert not any(g.any() for g in got[1:])


def test_x_may_have_fewer_columns():
    case = Case()
    solution, _, _ = reference(case)
    whole, _ = native(case, solution)
    case.x = case.x[:, :2]
    part, _ = native(case, solution, options={"data_dim": 2})
    assert torch.equal(part[0], whole[0][:, :2])


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_threads_do_not_change_a_bit(dtype, method):
    case = Case(rows=700, hidden=32).to(dtype)
    options = {"step_size": 0.2} if method == "rk4" else {}
    solution = torch.randn_like(case.grad)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            results.append(native(case, solution, method=method, options=options)[0])
        finally:
            torch.set_num_threads(1)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


# --- failures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [FORWARDS, BACKWARDS])
def test_max_num_steps_counts_each_interval(times):
    case = Case(times=times)
    solution, _, _ = reference(case)
    _, enough = native(case, solution)
    steps = enough.accepted + enough.rejected
    got, result = native(case, solution, options={"max_num_steps": steps - 1})
    assert result.status == interface.SUCCESS
    _, result = native(case, solution, options={"max_num_steps": 1})
    assert result.status == interface.MAX_STEPS
    assert (result.accepted, result.rejected) == (1, 0)
    sign = -1 if times[0] > times[-1] else 1
    assert sign * times[-2] < result.t < sign * times[-1]


def test_underflow():
    case = Case()
    solution, _, _ = reference(case)
    _, result = native(case, solution, rtol=0.0, atol=1e-40)
    assert result.status == interface.UNDERFLOW
    assert result.dt > 0


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_gradient_that_is_not_finite(method):
    case = Case()
    solution, _, _ = reference(case)
    case.grad[-1, 0, 0] = math.nan
    _, result = native(case, solution, method=method, options={"step_size": 0.1})
    assert result.status == interface.NON_FINITE_INPUT


def test_field_that_is_not_finite():
    case = Case(activation="identity")
    solution, _, _ = reference(case)
    case.parameters[0].data[0, 0] = math.inf
    _, result = native(case, solution)
    assert (result.status, result.field_failed) == (interface.NON_FINITE, 1)
    assert result.t == case.times[-1]
    _, result = native(case, solution, method="rk4", options={"step_size": 0.1})
    assert (result.status, result.output) == (interface.NON_FINITE, len(case.times) - 2)
    assert result.t == case.times[-2]
