"""step_control="sample": every row is solved as if it were alone."""

import math

import pytest
import torch

from anode_fast import (
    ConvField,
    MaxStepsExceeded,
    MLPField,
    NonFiniteState,
    StepSizeUnderflow,
    odeint,
    odeint_adjoint,
)
from anode_fast.errors import InvalidArgument
from anode_fast.tableau import TABLEAUS
from tests.helpers import assert_no_worse

pytestmark = pytest.mark.usefixtures("own_code")

f32, f64 = torch.float32, torch.float64
ADAPTIVE = [name for name, tableau in TABLEAUS.items() if tableau.adaptive]
FREQUENCIES = torch.tensor([1.0, 20.0, 0.0, 5.0], dtype=f64)[:, None]


def times(*values):
    return torch.tensor(values, dtype=f64)


class Oscillators:
    """Rows of different frequencies, driven. `only` makes the field of one of them."""

    def __init__(self, only=slice(None)):
        self.w = FREQUENCIES[only]
        self.nfe = 0

    def __call__(self, t, y):
        self.nfe += 1
        x, v = y.split(1, 1)
        return torch.cat([v, -self.w * self.w * x + torch.cos(3 * t)], 1)


def start(batch=4):
    return torch.linspace(-1, 2, 2 * batch, dtype=f64).reshape(batch, 2)


SETTINGS = {"rtol": 1e-6, "atol": 1e-7}


def assert_close(got, want, rtol=1e-12):
    """Relative to the largest entry."""
    assert got.shape == want.shape and got.dtype == want.dtype
    assert (got - want).abs().max() <= rtol * want.abs().max()


def solo(make_field, y0, t, rows=None, **kwargs):
    """The rows' solutions, each a solve of a batch of one, [times, rows, ...], and their stats."""
    solved = [
        odeint(make_field(slice(i, i + 1)), y0[i : i + 1], t, return_stats=True, **kwargs)
        for i in range(len(y0))
    ]
    return torch.cat([y for y, _ in solved], 1), [stats for _, stats in solved]


# --- values and steps -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "t",
    [
        times(0, 1),
        times(1.0, 0.3, -0.5),
        torch.linspace(0, 1, 101, dtype=f64),
        times(0, 1e-6, 2e-6, 0.5, 0.5 + 1e-7, 1),
    ],
    ids=["two", "descending", "many", "tiny gaps"],
)
@pytest.mark.parametrize("method", ADAPTIVE)
def test_each_row_is_its_own_solve(method, t):
    given = {"method": method, "rtol": 1e-4, "atol": 1e-5}
    if method == "dopri8":  # its errors are near rounding, and would choose the next step
        given["options"] = {"first_step": 0.05, "max_step": 0.05}
    want, alone = solo(Oscillators, start(), t, **given)
    field = Oscillators()
    got, stats = odeint(field, start(), t, step_control="sample", return_stats=True, **given)
    assert_close(got, want)
    assert torch.equal(got[0], start())
    assert stats.accepted == max(s.accepted for s in alone)
    assert stats.rejected == max(s.rejected for s in alone)
    attempts = max(s.accepted + s.rejected for s in alone)
    assert (
        stats.nfe
        == field.nfe
        == 2 - ("options" in given) + attempts * (TABLEAUS[method].stages - 1)
    )
    if method != "dopri8":
        assert len({s.accepted for s in alone}) > 2, "the rows are to differ"


@pytest.mark.parametrize(
    "options",
    [
        {"first_step": 0.5},
        {"safety": 0.5, "ifactor": 2.0},
        {"dfactor": 0.7, "first_step": 0.5},
        {"max_step": 0.02},
        {"min_step": 0.1},
    ],
    ids=lambda options: "-".join(options),
)
def test_options(options):
    given = {"options": options, **SETTINGS}
    want, alone = solo(Oscillators, start(), times(0, 0.7, 1), **given)
    got, stats = odeint(
        Oscillators(), start(), times(0, 0.7, 1), step_control="sample", return_stats=True, **given
    )
    assert_close(got, want)
    assert stats.accepted == max(s.accepted for s in alone)
    assert stats.rejected == max(s.rejected for s in alone)


def test_tolerances_by_row():
    rtol = times(1e-3, 1e-9, 1e-6, 1e-4)[:, None]
    got = odeint(Oscillators(), start(), times(0, 1), rtol=rtol, atol=1e-9, step_control="sample")
    for i in range(4):
        field, y0 = Oscillators(slice(i, i + 1)), start()[i : i + 1]
        want = odeint(field, y0, times(0, 1), rtol=rtol[i].item(), atol=1e-9)
        assert_close(got[:, i : i + 1], want)


@pytest.mark.parametrize("shape", [(4,), (4, 2, 3), (4, 3, 5, 2)], ids=str)
def test_shapes(shape):
    """Vectors of numbers, and rows that are matrices or images; t has an entry per row."""
    y0 = torch.linspace(-1, 2, math.prod(shape), dtype=f64).reshape(shape)
    rates = torch.tensor([1.0, 7.0, 0.1, 3.0], dtype=f64).reshape(4, *[1] * (len(shape) - 1))
    seen = set()

    def make(rows):
        def field(t, y):
            seen.add(tuple(t.shape))
            return -rates[rows] * torch.sin(y + t)

        return field

    t = times(0, 0.4, 1)
    want, _ = solo(make, y0, t, **SETTINGS)
    assert seen == {()}
    seen.clear()
    got = odeint(make(slice(None)), y0, t, step_control="sample", **SETTINGS)
    assert seen == {(4, *[1] * (len(shape) - 1))}
    assert_close(got, want)


def test_complex_rows():
    y0 = torch.tensor([[1.0 + 1j], [0.3j]], dtype=torch.complex128)
    rates = torch.tensor([[1j], [-2 + 10j]], dtype=torch.complex128)
    t = times(0, 0.4, 1)
    want, _ = solo(lambda rows: lambda t, y: rates[rows] * y, y0, t, **SETTINGS)
    got = odeint(lambda t, y: rates * y, y0, t, step_control="sample", **SETTINGS)
    assert_close(got, want)


@pytest.mark.parametrize("dtype", [f32, torch.bfloat16], ids=str)
def test_coarse_dtypes(dtype):
    """As close to the solution as solves of the single rows."""

    def make(rows):
        field = Oscillators(rows)
        field.w = field.w.to(dtype)
        return field

    y0, given = start().to(dtype), {"rtol": 1e-3, "atol": 1e-3}
    want, _ = solo(make, y0, times(0, 1), **given)
    got = odeint(make(slice(None)), y0, times(0, 1), step_control="sample", **given)
    exact = odeint(Oscillators(), y0.double(), times(0, 1), step_control="sample")
    assert_no_worse(got, want, exact, str(dtype))


@pytest.mark.parametrize("t", [times(0, 1), times(0), times(2, 1, 0)], ids=["two", "one", "down"])
def test_no_rows(t):
    y0 = torch.zeros(0, 3, dtype=f64)
    solution = odeint(lambda t, y: -y * t, y0, t, step_control="sample")
    assert solution.shape == (len(t), 0, 3)


def test_one_time():
    y0 = start()
    assert torch.equal(odeint(Oscillators(), y0, times(1), step_control="sample"), y0[None])


def test_the_start_is_untouched():
    y0 = start()
    odeint(Oscillators(), y0, times(0, 1), step_control="sample")
    assert torch.equal(y0, start())


def test_a_hard_row_among_easy_ones():
    """10,000 oscillators, one of them 50 times as fast (case C06): as accurate as alone, and the
    others take their own few steps."""
    hard = 50.0

    def solve(easy, control):
        w = torch.cat([torch.ones(easy, dtype=f64), times(hard)])[:, None]
        y0 = torch.cat([torch.ones_like(w), torch.zeros_like(w)], 1)
        y, stats = odeint(
            lambda t, y: torch.cat([y[:, 1:], -w * w * y[:, :1]], 1),
            y0,
            times(0, 1),
            rtol=1e-5,
            atol=1e-5,
            step_control=control,
            return_stats=True,
        )
        return y[-1], stats

    alone, stats_alone = solve(0, "batch")
    many, stats = solve(9999, "sample")
    diluted, _ = solve(9999, "batch")
    assert_close(many[-1], alone[0])
    assert (stats.accepted, stats.rejected) == (stats_alone.accepted, stats_alone.rejected)
    error = [(y[-1, 0] - math.cos(hard)).abs() for y in (alone, many, diluted)]
    assert error[1] < 1.001 * error[0] < error[2] / 50
    easy, _ = solve(1, "sample")
    assert_close(many[:1], easy[:1])


# --- fields of the package ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: MLPField(3, 16, activation="tanh"), (5, 3)),
        (lambda: ConvField(2, 4, activation="softplus"), (5, 2, 4, 3)),
    ],
    ids=["MLPField", "ConvField"],
)
def test_fields_take_one_time_per_row(make, shape):
    field = make().double()
    for param in field.parameters():
        param.data.mul_(3)  # so that it changes over time, and the rows differ
    y0 = torch.randn(shape, dtype=f64) * torch.arange(1.0, 6).reshape(5, *[1] * (len(shape) - 1))
    t = times(0, 0.6, 1)
    with torch.no_grad():
        want, alone = solo(lambda _: field, y0, t, **SETTINGS)
        got = odeint(field, y0, t, step_control="sample", **SETTINGS)
    assert_close(got, want)
    assert len({(s.accepted, s.rejected) for s in alone}) > 1, "the rows are to differ"


# --- gradients ------------------------------------------------------------------------------------


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = MLPField(2, 8, activation="tanh").double()
        self.rates = torch.nn.Parameter(torch.tensor([1.0, 15.0, 4.0], dtype=f64)[:, None])

    def row(self, rows):
        return lambda t, y: self.net(t, y) - self.rates[rows] * y

    def forward(self, t, y):
        return self.row(slice(None))(t, y)


@pytest.mark.parametrize("t", [times(0, 1), times(1, 0.9, 0.2)], ids=["two", "descending"])
@pytest.mark.parametrize("gradient", ["autograd", "discrete", "adjoint"])
def test_gradients_are_the_sum_of_the_rows(gradient, t):
    """With respect to the start, the times, and parameters, shared or of one row."""
    torch.manual_seed(0)
    net = Net()
    leaves = [start(3).requires_grad_(), t.clone().requires_grad_()]
    inputs = [*leaves, *net.parameters()]
    cotangent = torch.arange(1.0, 1 + 6 * len(t), dtype=f64).cos().reshape(len(t), 3, 2)

    def gradients(solution):
        return torch.autograd.grad((solution * cotangent).sum(), inputs)

    want = gradients(solo(net.row, *leaves, **SETTINGS)[0])
    given = {"step_control": "sample", **SETTINGS}
    if gradient == "adjoint":
        solution = odeint_adjoint(net, *leaves, **given)
    else:
        solution = odeint(net, *leaves, gradient=gradient, **given)
    for got, wanted in zip(gradients(solution), want, strict=True):
        assert_close(got, wanted, 1e-10)


def test_gradients_pass_gradcheck():
    """Against difference quotients, with steps that do not depend on the inputs."""
    field = Oscillators()

    def solve(y0, t, w):
        field.w = w
        options = {"first_step": 0.1, "min_step": 0.1, "max_step": 0.1}
        return odeint(field, y0, t, step_control="sample", options=options)

    inputs = (start(), times(0, 0.25, 0.55), FREQUENCIES.clone())
    assert torch.autograd.gradcheck(solve, [x.requires_grad_() for x in inputs])


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("y0", "given", "got"),
    [
        ((start(), start()), {}, r"of shape \(16,\) \(a tuple\)"),
        (start(), {"method": "rk4"}, "method rk4"),
        (start(), {"method": "implicit_adams"}, "method implicit_adams"),
        (torch.tensor(1.0), {}, r"of shape \(\)"),
    ],
    ids=["tuple", "fixed steps", "adams", "0-d"],
)
def test_what_has_no_rows_is_refused(y0, given, got):
    with pytest.raises(InvalidArgument, match=f'step_control="sample" needs an adaptive.*{got}'):
        odeint(Oscillators(), y0, times(0, 0.5, 1), step_control="sample", **given)


def test_the_continuous_gradient_is_refused():
    with pytest.raises(InvalidArgument, match='Use gradient="discrete"'):
        odeint(Oscillators(), start(), times(0, 1), step_control="sample", gradient="continuous")


def test_a_row_that_blows_up_is_named():
    y0 = torch.tensor([[0.1], [0.2], [1.0], [0.3]], dtype=f64)
    with pytest.raises(
        StepSizeUnderflow, match=r"^underflow in dt \S+ at t=1\S* in 1 of 4 rows, f"
    ):
        odeint(lambda t, y: y * y, y0, times(0, 2), step_control="sample")
    with pytest.raises(StepSizeUnderflow, match="first in row 2"):
        odeint(lambda t, y: -y * y, y0, times(0, -2), step_control="sample")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("since", [-1.0, 0.5])
def test_rows_that_are_not_finite_are_named(value, since):
    def field(t, y):
        bad = (torch.arange(5)[:, None] % 2 == 1) & (t > since)
        return torch.where(bad, value, -y)

    match = "^non-finite values in state: .* in 2 of 5 rows, first in row 1, at t="
    for options in ({}, {"min_step": 0.01}):
        with pytest.raises(NonFiniteState, match=match):
            given = {"options": options, "step_control": "sample"}
            odeint(field, torch.ones(5, 2, dtype=f64), times(0, 1), **given)


def test_the_step_budget_is_each_rows():
    def solve(budget):
        given = {"options": {"max_num_steps": budget}, "step_control": "sample", **SETTINGS}
        return odeint(Oscillators(), start(), times(0, 0.5, 1), return_stats=True, **given)[1]

    _, alone = solo(Oscillators, start(), times(0, 1), **SETTINGS)
    attempts = [s.accepted + s.rejected for s in alone]
    hardest = max(attempts)
    assert attempts.count(hardest) == 1
    solve(hardest)
    with pytest.raises(
        MaxStepsExceeded, match=rf"^max_num_steps exceeded .{hardest - 1}. in 1 of 4"
    ):
        solve(hardest - 1)
