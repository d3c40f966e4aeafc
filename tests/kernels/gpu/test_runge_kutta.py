"""kernels/gpu/runge_kutta.py and controller.py: values, gradients and counts of the reference path.

Float64 or not, results may be no further from the float64 answer than the reference path's: see
solves.compare. Without a card Triton's interpreter runs the kernels.
"""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from anode_fast import MLPField, odeint
from anode_fast.kernels.gpu import runge_kutta, solve
from anode_fast.problem import ADAPTIVE, FAMILIES, FIXED
from tests.helpers import assert_no_worse
from tests.kernels.gpu.solves import LAYOUTS, MANY_SCALES, Case, compare, f32, f64, times

ADAPTIVE_METHODS = [name for name, family in FAMILIES.items() if family == ADAPTIVE]
FIXED_METHODS = [name for name, family in FAMILIES.items() if family == FIXED]

both_dtypes = pytest.mark.parametrize("dtype", [f32, f64], ids=["float32", "float64"])

# --- given steps ----------------------------------------------------------------------------------


def grid(step, method="heun3", interp="cubic"):
    return dict(method=method, options={"step_size": step, "interp": interp})


def given(step, method="bosh3", control="batch"):
    limits = {"first_step": step, "min_step": step, "max_step": step}
    return dict(method=method, options=limits, step_control=control)


SPREAD, INSIDE = (0.0, 0.4, 1.0), (0.0, 0.1, 0.2, 0.25, 0.5, 0.6)
BACK, BACK_INSIDE = SPREAD[::-1], (1.0, 0.9, 0.875, 0.75, 0.7, 0.5)

# Widths 16 to 128, 1 to 4 layers, every activation; states 1 to 64; rows below, at and above tiles.
SHAPES = {
    "16": (Case(1, 16, 1, "relu", False, 1, t=INSIDE), grid(0.25)),
    "20, 20": (Case(2, 20, 2, "softplus", True, 15, t=BACK_INSIDE), grid(0.25)),
    "32, 32, 32": (Case(7, 32, 3, "sigmoid", True, 17, 5, "every other row"), grid(0.5)),
    "50, 50, 50, 50": (Case(16, 50, 4, "tanh", False, 33, t=(1.0, 0.3)), grid(0.4, "midpoint")),
    "64, 64": (Case(33, 64, 2, "silu", True, 16, 1, "transposed"), grid(0.5, "midpoint")),
    "100": (Case(64, 100, 1, "gelu", True, 33, t=BACK), grid(0.6, "midpoint", "linear")),
    "128, 128": (Case(5, 128, 2, "elu", True, 15, t=INSIDE), grid(0.5, "euler", "linear")),
    "32": (Case(2, 32, 1, "identity", False, 70, 1, t=INSIDE), grid(0.5, "rk4", "linear")),
    "of the output times": (Case(4, 18, 2, "silu", False, 31, t=BACK_INSIDE), dict(method="rk4")),
    "no rows": (Case(rows=0), grid(0.5)),
    "batch": (Case(6, 24, 2, "gelu", True, 33, 2, t=BACK_INSIDE), given(0.3)),
    "batch of several tiles": (Case(3, 16, 1, "softplus", False, 70, t=INSIDE), given(0.4)),
    "batch without rows": (Case(rows=0), given(0.5)),
    "sample": (Case(17, 16, 2, "elu", True, 17, 9, t=INSIDE), given(0.3, control="sample")),
    "sample of several tiles": (Case(2, 20, t=BACK, rows=66), given(0.7, control="sample")),
    "sample without rows": (Case(rows=0), given(0.5, control="sample")),
}


@both_dtypes
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name, dtype, device):
    case, steps = SHAPES[name]
    compare(case, dtype, device, **steps)


@pytest.mark.parametrize("interp", ["cubic", "linear"])
@pytest.mark.parametrize("method", FIXED_METHODS)
def test_fixed_methods(method, interp, device):
    compare(Case(t=INSIDE), f64, device, **grid(0.25, method, interp))


@pytest.mark.parametrize("control", ["batch", "sample"])
@pytest.mark.parametrize("method", ADAPTIVE_METHODS)
def test_adaptive_methods_with_given_steps(method, control, device):
    dtype = {"batch": f64, "sample": f32}[control]
    compare(Case(t=(0.0, 0.1, 0.4, 0.7)), dtype, device, **given(0.4, method, control))


@st.composite
def cases(draw):
    dim = draw(st.integers(1, 20))
    ticks = st.integers(0, 16)
    t = sorted(draw(st.lists(ticks, min_size=2, max_size=6, unique=True)))
    start = draw(st.sampled_from([0, -7]))
    t = tuple((start + tick) / 16 for tick in t)
    return Case(
        dim=dim,
        hidden=draw(st.integers(1, 32)),
        layers=draw(st.integers(1, 2)),
        activation=draw(st.sampled_from(["relu", "tanh", "silu", "identity"])),
        time_dependent=draw(st.booleans()),
        rows=draw(st.sampled_from([1, 2, 15, 16, 17, 33])),
        columns=draw(st.integers(0, min(5, dim - 1))),
        layout=draw(st.sampled_from(list(LAYOUTS))),
        t=t[::-1] if draw(st.booleans()) else t,
        seed=draw(st.integers(0, 1000)),
    )


@st.composite
def steps(draw):
    size = draw(st.sampled_from([0.25, 0.5]))
    if draw(st.booleans()):
        method = draw(st.sampled_from(FIXED_METHODS))
        return grid(size, method, draw(st.sampled_from(["cubic", "linear"])))
    cheaper = sorted(set(ADAPTIVE_METHODS) - {"dopri8"})
    method = draw(st.sampled_from(cheaper))
    return given(size, method, draw(st.sampled_from(["batch", "sample"])))


@pytest.mark.parametrize("dtype", [f32, f64], ids=["float32", "float64"])
@hypothesis.given(case=cases(), steps=steps())
@hypothesis.settings(
    max_examples=6,
    phases=[hypothesis.Phase.generate],
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
def test_random_cases(dtype, device, case, steps):
    compare(case, dtype, device, **steps)


# --- chosen steps ---------------------------------------------------------------------------------

TOL = dict(rtol=1e-4, atol=1e-4)
CHOSEN = {
    "default": (Case(gain=4.0), {}),
    "backwards": (Case(gain=4.0, t=(1.0, 0.75, 0.2), seed=1), {}),
    "first step given, refused": (Case(gain=3.0), TOL | dict(options={"first_step": 0.9})),
    "many outputs": (Case(t=tuple(i / 24 for i in range(25))), dict(rtol=1e-2)),
    "from far away": (Case(t=(-700.0, -699.9, -699.0), time_dependent=False), dict(rtol=1e-2)),
    "field of 0": (Case(gain=0.0, activation="identity"), {}),
    "state near 0": (Case(spread=1e-9), dict(rtol=1e-2)),
    "no atol": (Case(), dict(atol=0.0)),
    "bosh3": (Case(), dict(rtol=1e-2, method="bosh3")),
    "adaptive_heun": (Case(t=(0.0, 0.2)), dict(rtol=1e-2, method="adaptive_heun")),
    "max_step": (Case(t=(0.0, 0.3)), dict(options={"max_step": 0.1})),
    "min_step": (Case(gain=3.0), TOL | dict(options={"first_step": 0.3, "min_step": 0.3})),
    "limits that cross": (Case(), dict(options={"min_step": 0.5, "max_step": 0.3})),
    "safety": (Case(), dict(options={"safety": 0.5})),
    "ifactor": (Case(t=(0.0, 0.4)), dict(options={"first_step": 0.05, "ifactor": 1.5})),
    "dfactor": (Case(gain=3.0), TOL | dict(options={"first_step": 0.9, "dfactor": 0.7})),
    "integers": (Case(), dict(options={"first_step": 1, "max_num_steps": 500, "ifactor": 5})),
}
WITH_GRADIENT = {"default", "many outputs"}
REFUSED = {"default", "backwards", "first step given, refused", "dfactor"}
BY_ROW = sorted(set(CHOSEN) - {"from far away", "bosh3", "adaptive_heun", "safety", "integers"})
LARGER = Case(gain=2.0, rows=70)
IN_SEVERAL_PROGRAMS = {
    "default": (LARGER, dict(rtol=1e-2)),
    "first step given, refused": (LARGER, dict(options={"first_step": 0.9})),
    "backwards": (dataclasses.replace(LARGER, t=(1.0, 0.75, 0.2)), {}),
    "many outputs": (dataclasses.replace(LARGER, t=CHOSEN["many outputs"][0].t), dict(rtol=1e-2)),
    "field of 0": (dataclasses.replace(LARGER, gain=0.0), {}),
}


@pytest.mark.parametrize("name", CHOSEN)
def test_chosen_steps(name, device, control="batch"):
    case, given = CHOSEN[name]
    given = dict(step_control=control, wanted=None if name in WITH_GRADIENT else []) | given
    _, stats = compare(case, f64, device, MANY_SCALES, **given)
    assert stats.rejected or name not in REFUSED


@pytest.mark.parametrize("name", BY_ROW)
def test_chosen_steps_by_row(name, device):
    test_chosen_steps(name, device, "sample")


@pytest.mark.parametrize("name", IN_SEVERAL_PROGRAMS)
def test_chosen_steps_of_several_programs(name, device):
    case, given = IN_SEVERAL_PROGRAMS[name]
    _, stats = compare(case, f64, device, MANY_SCALES, method="bosh3", **given)
    assert stats.rejected or name != "first step given, refused"


@pytest.mark.parametrize("control", ["batch", "sample"])
def test_chosen_steps_in_float(control, device):
    case = Case(7, 32, 2, rows=17, columns=5)
    compare(case, f32, device, MANY_SCALES, step_control=control)


def test_every_row_takes_its_own_steps(device, monkeypatch):
    case = Case(gain=3.0, rows=66, spread=10.0)
    counts = []

    def merged(self, state, of_rows):
        counts.append(of_rows.t().int().tolist())
        return merge(self, state, of_rows)

    merge = solve.Solve._merged
    monkeypatch.setattr(solve.Solve, "_merged", merged)
    compare(case, f64, device, MANY_SCALES, wanted=["d_x"], step_control="sample")
    field, (x, _) = case.field(f64, "cpu"), case.state(f64, "cpu")
    given = dict(rtol=1e-3, atol=1e-3, backend="reference", return_stats=True)
    alone = [odeint(field, row[None], times(*case.t), **given)[1] for row in x]
    want = [[stats.accepted, stats.rejected] for stats in alone]
    assert len(set(map(tuple, want))) > 8  # of all sorts
    assert counts == [want]


def test_times_in_single_precision(device):
    # 1e5 + dt in float32 is off by up to 4e-3.
    case = Case(time_dependent=False, t=(1e5, 1e5 + 0.0547))
    options = {"first_step": 0.013, "max_step": 0.013}
    evaluations = [
        compare(case, f32, device, wanted=[], options={**options, "dtype": dtype})[1].nfe
        for dtype in (f32, f64)
    ]
    assert evaluations[0] != evaluations[1]


@pytest.mark.parametrize("control", ["batch", "sample"])
@pytest.mark.parametrize("end", [2.0**20, -(2.0**20)])
def test_the_end_of_a_step_is_evaluated_just_before_it(end, control, device):
    # dy/dt = t - end, in float32, which has few numbers there; one step from either side.
    field = MLPField(1, 1, num_hidden=1, activation="identity").to(device)
    with torch.no_grad():
        for p, value in zip(
            field.parameters(), ([[1.0, 0.0]], [-end], [[1.0]], [0.0]), strict=True
        ):
            p.copy_(torch.tensor(value))
    for start in (end - 1, end + 1):
        found = []
        for backend, gradient in (("triton", "auto"), ("reference", "autograd")):
            options = dict(gradient=gradient, backend=backend) | given(1.0, "dopri5", control)
            y = odeint(field, torch.zeros(3, 1, device=device), times(start, end), **options)
            found.append((y[1].detach(), *torch.autograd.grad(y[1].sum(), field.parameters())))
        assert abs(abs(found[1][0][0].item()) - 0.5) > 1e-3  # and that can be seen
        for got, want in zip(*found, strict=True):
            assert_no_worse(got, want, want.double(), "just before")


@pytest.mark.parametrize("steps", [grid(0.5), given(0.5), given(0.5, control="sample")])
def test_rows_that_pad_a_tile_stay_at_0(steps, device):
    # A row at 1 stays there. One at 0 would become nan, if it moved, and with it the sums of all.
    field = MLPField(2, 2, num_hidden=1, activation="relu", time_dependent=False).to(device, f64)
    with torch.no_grad():
        for layer, shift in zip(field.layers, (0.5e100, 0.0), strict=True):
            layer.weight.copy_(-1e100 * torch.eye(2, dtype=f64))
            layer.bias.fill_(shift)
    x = torch.ones(3, 2, dtype=f64, device=device)
    y = odeint(field, x, times(0.0, 1.0), backend="triton", **steps)
    assert torch.equal(y, x.expand(2, 3, 2))
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), field.parameters()))


# --- parts ----------------------------------------------------------------------------------------


@triton.jit
def _before(x_ptr, out_ptr):
    i = tl.program_id(0)
    tl.store(out_ptr + i, runge_kutta.before(tl.load(x_ptr + i)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_number_before(dtype, device):
    info = np.finfo(dtype)
    edges = [0.0, 1.0, 2.0, 3.0, 0.1, info.tiny, info.smallest_subnormal, info.max]
    x = np.array([*edges, *(-edge for edge in edges)], dtype)
    out = torch.full((x.size,), np.nan, dtype=torch.from_numpy(x).dtype, device=device)
    _before[(x.size,)](torch.from_numpy(x).to(device), out)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(out.cpu().numpy(), np.nextafter(x, dtype(-np.inf)))


@triton.jit
def _sum(sums_ptr, out_ptr, programs):
    tl.store(out_ptr, runge_kutta.sum_of(sums_ptr + 1, programs, runge_kutta.SUMS))


@pytest.mark.parametrize("programs", [1, 128, 129, 300])
def test_sum_of_programs(programs, device):
    sums = torch.randn(programs, runge_kutta.SUMS.value, dtype=f64, device=device)
    out = torch.zeros((), dtype=f64, device=device)
    _sum[(1,)](sums, out, programs)
    assert_no_worse(out, sums[:, 1].sum(), sums[:, 1].sum(), "sum")
