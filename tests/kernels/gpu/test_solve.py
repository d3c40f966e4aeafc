"""kernels/gpu/solve.py: failures, memory that runs out, captured solves, what `explain` says."""

import dataclasses
import functools
import math
import re

import pytest
import torch

from anode_fast import MLPField, explain, fused, odeint
from anode_fast.errors import (
    InvalidArgument,
    MaxStepsExceeded,
    NonFiniteState,
    SolverError,
    StepSizeUnderflow,
)
from anode_fast.kernels.gpu import host, solve
from anode_fast.stats import DeviceStats, SolveStats, Status
from tests.kernels.gpu.solves import Case, f32, f64, programs, solved, times

CASE = Case(gain=2.0, seed=3)
CHOSEN = dict(method="bosh3", rtol=1e-2, options={"first_step": 0.7})
CONTROLS = {
    "fixed": (CASE, dict(method="heun3", options={"step_size": 0.5})),
    "batch": (CASE, CHOSEN),
    "batch of several programs": (dataclasses.replace(CASE, rows=66), CHOSEN),
    "sample": (
        dataclasses.replace(CASE, rows=66, spread=10.0, gain=1.3),
        CHOSEN | dict(step_control="sample"),
    ),
}
ADAPTIVE = [name for name in CONTROLS if name != "fixed"]
every_control = pytest.mark.parametrize("control", CONTROLS)
every_adaptive = pytest.mark.parametrize("control", ADAPTIVE)


@pytest.fixture(autouse=True)
def _nothing_remembered():
    fused._remembered.clear()


def assert_equal(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@every_adaptive
def test_programs(control, device):
    case, given = CONTROLS[control]
    assert (programs(case, f64, device, **given) > 1) == (control != "batch")


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("control", ["fixed", "batch", "sample"])
def test_what_memory_held_does_not_matter(control, device, monkeypatch):
    case, given = CONTROLS[control]
    nan = solved(case, f64, device, **given)
    monkeypatch.undo()  # _poisoned
    zeros = lambda like, shape, dtype=None: like.new_zeros(shape, dtype=dtype or like.dtype)  # noqa: E731
    monkeypatch.setattr(host, "empty", zeros)
    (got, stats), (want, same_stats) = solved(case, f64, device, **given), nan
    assert_equal(got, want)
    assert stats == same_stats


@every_adaptive
def test_checkpoints_get_more_room(control, device, monkeypatch):
    case, given = CONTROLS[control]
    want, stats = solved(case, f64, device, **given)
    assert stats.accepted >= 4 and stats.rejected
    rooms, grow = [], host.grown
    monkeypatch.setattr(solve.Solve, "_capacity", lambda *args: 1)
    monkeypatch.setattr(host, "grown", lambda old, size: rooms.append(size) or grow(old, size))
    got, again = solved(case, f64, device, **given)
    assert_equal(got, want)
    assert rooms[:4] == [3, 2, 5, 4]
    counts = [dataclasses.replace(s, launches=0) for s in (stats, again)]
    assert counts[0] == counts[1] and again.launches > stats.launches


def test_room_for_checkpoints(monkeypatch):
    def capacity(rows, **given):
        options = dict(safety=0.9, ifactor=10.0, dfactor=0.2, max_step=math.inf, float_time=False)
        options |= dict(rtol=1e-3, atol=1e-3, backwards=False, max_num_steps=1000) | given
        made = solve.Solve(
            fused.field_of("triton", MLPField(4, 16).spec()),
            fused._method(fused.TABLEAUS["dopri5"]),
            f32,
            control=solve.BATCH,
            data_dim=4,
            **options,
        )
        return made._room(torch.zeros(0), rows, False)

    assert capacity(5) == 128
    assert capacity(1 << 15) == 32
    assert capacity(1 << 20) == 8
    assert capacity(1 << 20, max_num_steps=3) == 3
    monkeypatch.setattr(host, "CHECKPOINT_BYTES", 1 << 10)
    assert capacity(2) == 16


# --- failures -------------------------------------------------------------------------------------


def growing(rate, dtype):
    """dy/dt = rate * y."""
    field = MLPField(3, 3, num_hidden=1, activation="identity", time_dependent=False).to(dtype)
    with torch.no_grad():
        for layer, factor in zip(field.layers, (1.0, rate), strict=True):
            layer.weight.copy_(factor * torch.eye(3))
            layer.bias.zero_()
    return field


def spoiled(value, dtype):
    field = MLPField(3, 8, activation="tanh").to(dtype)
    with torch.no_grad():
        field.layers[2].weight[0, 0] = value if value else torch.finfo(dtype).max / 4
    return field


def same_field(dtype):
    return MLPField(3, 8, num_hidden=1, activation="tanh").to(dtype)


USUAL, TIGHT, LOOSE = (
    dict(rtol=1e-5, atol=1e-5),
    dict(rtol=0.0, atol=1e-12),
    dict(rtol=1e6, atol=1e6),
)
SUDDEN = {"dfactor": 1e-18, "safety": 1e-30}
ALL_PASS = {"first_step": 0.05, "max_step": 0.05}  # with loose tolerances
FAILURES = {
    "budget": (same_field, LOOSE, {**ALL_PASS, "max_num_steps": 4}, MaxStepsExceeded),
    "budget of rejections": (
        same_field,
        TIGHT,
        {"max_num_steps": 3, "first_step": 0.5, "dfactor": 0.5, "safety": 1e-30},
        MaxStepsExceeded,
    ),
    # A rejected step is made so much smaller that it adds nothing to a time that is not 0.
    "underflow": (same_field, TIGHT, {"first_step": 0.5, **SUDDEN}, StepSizeUnderflow),
    "nan in a weight": (functools.partial(spoiled, math.nan), USUAL, {}, NonFiniteState),
    "inf in a weight": (functools.partial(spoiled, math.inf), USUAL, {}, NonFiniteState),
    "huge weight": (functools.partial(spoiled, None), USUAL, {}, NonFiniteState),
    "overflow": (  # at once: what overflows first in a smaller step is a matter of rounding
        functools.partial(growing, 5e4),
        LOOSE,
        {**ALL_PASS, "min_step": 0.05},
        NonFiniteState,
    ),
}
STARTS_AT_1 = times(1.0, 1.4, 2.0)  # at 0 no step is too small to count


def failure(*args, **given):
    """Class and message of the error."""
    with pytest.raises(SolverError) as caught:
        odeint(*args, **given)
    return type(caught.value), str(caught.value)


@pytest.mark.parametrize(
    ("control", "rows", "with_graph"),
    [("batch", 5, False), ("batch", 5, True), ("batch", 70, True), ("sample", 66, False)],
)
@pytest.mark.parametrize("kind", FAILURES)
def test_failures_of_adaptive_solves(kind, control, rows, with_graph, device):
    make, tolerances, options, wanted = FAILURES[kind]
    given = dict(options=options, step_control=control, **tolerances)
    dtype, t = (f64, STARTS_AT_1) if with_graph else (f32, STARTS_AT_1.flip(0))
    field, x = make(dtype).to(device), Case(rows=rows).state(dtype, device)[0]
    want = failure(field, x, t, backend="reference", **given)
    counted, field.nfe = field.nfe, 0
    x.requires_grad_(with_graph)
    assert failure(field, x, t, backend="triton", **given) == want
    assert want[0] is wanted
    # Looking whether the field is deterministic takes two more.
    assert counted - field.nfe in (0, 2)


@pytest.mark.parametrize("kind", ["nan in a weight", "inf in a weight", "overflow"])
@pytest.mark.parametrize("rows", [5, 70])
def test_failures_of_fixed_steps(kind, rows, device):
    field, x = FAILURES[kind][0](f32).to(device), Case(rows=rows).state(f32, device)[0]
    if kind == "inf in a weight":
        with torch.no_grad():
            field.layers[2].weight.fill_(math.inf)
    given = dict(method="midpoint", options={"step_size": 0.1})
    for t in (STARTS_AT_1, STARTS_AT_1.flip(0)):
        if device.type == "cpu":
            want = failure(field, x, t, backend="reference", **given)
            assert want[0] is NonFiniteState
            assert failure(field, x, t, backend="triton", **given) == want
        else:  # nobody waits for the device
            want, got = (
                odeint(field, x, t, backend=backend, **given).isfinite().all(2).all(1).tolist()
                for backend in ("reference", "triton")
            )
            assert got == want and not want[-1]


@every_control
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_state_that_is_not_finite(value, control, device):
    case, given = CONTROLS[control]
    field, x = case.field(f64, device), case.state(f64, device)[0]
    t = times(*case.t)
    given = dict(rtol=1e-3, atol=1e-3) | given
    odeint(field, 0 * x, t, backend="triton", **given)
    assert fused._remembered  # the next call goes to the kernels unseen
    x[case.rows - 2, 1] = value
    want = failure(field, x, t, backend="reference", **given)
    if control == "fixed" and device.type != "cpu":
        assert not odeint(field, x, t, backend="triton", **given).isfinite().all()
    else:
        assert failure(field, x, t, backend="triton", **given) == want


@pytest.mark.parametrize("first", [5, 60])
@pytest.mark.parametrize("budget", [None, 1, 2])
def test_rows_fail_in_the_order_of_attempts(budget, first, device):
    field, x = growing(40.0, f64).to(device), torch.zeros(66, 3, dtype=f64, device=device)
    options = {"first_step": 0.5, "min_step": 0.5, "max_step": 0.5}
    options |= {} if budget is None else {"max_num_steps": budget}
    given = dict(step_control="sample", options=options, **LOOSE)
    x[first] = 1e306  # fails at once
    x[65 - first] = 1e300  # one attempt later
    x[65] = 1e290
    t = times(0.0, 3.0)
    want = failure(field, x, t, backend="reference", **given)
    assert failure(field, x, t, backend="triton", **given) == want


@pytest.mark.parametrize("budget", [5, 6])
@pytest.mark.parametrize("rows", [(5, 65), (65, 5), (5, 6)])
def test_rows_underflow_in_the_order_of_attempts(rows, budget, device):
    # dy/dt = relu(t + y): a row does not move until t = -y.
    field = MLPField(1, 1, num_hidden=1).to(device, f64)
    with torch.no_grad():
        for p in field.parameters():
            p.fill_(float(p.dim() == 2))
    x = torch.full((66, 1), -9.0, dtype=f64, device=device)
    x[rows[0]], x[rows[1]] = -1.45, -1.75
    given = dict(step_control="sample", rtol=0.0, atol=1e-30)
    given["options"] = {"first_step": 0.1, "max_step": 0.1, "max_num_steps": budget, **SUDDEN}
    t = times(1.0, 3.0)
    want = failure(field, x, t, backend="reference", **given)
    assert failure(field, x, t, backend="triton", **given) == want
    assert want[0] is (MaxStepsExceeded if budget == 5 else StepSizeUnderflow)


# --- captured solves ------------------------------------------------------------------------------

BUDGET = 12
LOOKS = "tolist item __bool__ __int__ __float__ __index__ cpu numpy nonzero".split()
"""Methods of a tensor that wait for the device."""


def with_budget(control):
    case, given = CONTROLS[control]
    budget = {} if control == "fixed" else {"max_num_steps": BUDGET}
    return case, given | dict(options=given["options"] | budget)


def capture(monkeypatch):
    """Solves as if a graph were captured: what looks at the device fails."""

    def blind(method):
        def refuse(*args, **kwargs):
            raise AssertionError("it waits for the device")

        @functools.wraps(method)
        def call(*args, **kwargs):
            with pytest.MonkeyPatch.context() as patch:
                for name in LOOKS:
                    patch.setattr(torch.Tensor, name, refuse)
                return method(*args, **kwargs)

        return call

    monkeypatch.setattr(host, "is_captured", lambda device: True)
    for name in ("forward", "discrete_gradient"):
        monkeypatch.setattr(solve.Solve, name, blind(getattr(solve.Solve, name)))


@every_control
def test_captured_solves(control, device, monkeypatch):
    case, given = with_budget(control)
    want, stats = solved(case, f64, device, **given)
    capture(monkeypatch)
    got, later = solved(case, f64, device, **given)
    assert_equal(got, want)
    assert isinstance(later, DeviceStats) == (control != "fixed")  # whose counts are known
    assert later.launches == (BUDGET + 2 if control == "batch of several programs" else 1) + 2
    names = [field.name for field in dataclasses.fields(SolveStats) if field.name != "launches"]
    assert [getattr(later, name) for name in names] == [getattr(stats, name) for name in names]
    assert later.nfe_backward > 0


@every_adaptive
@pytest.mark.parametrize("kind", ["budget", "underflow", "state"])
def test_captured_solves_that_fail(kind, control, device, monkeypatch):
    case, given = with_budget(control)
    case = dataclasses.replace(case, t=(1.0, 1.4, 2.0))
    given["options"] |= {"budget": {"max_num_steps": 2}, "underflow": SUDDEN}.get(kind, {})
    given |= TIGHT
    field, x = case.field(f64, device), case.state(f64, device)[0]
    t = times(*case.t)
    if kind == "state":
        x[-1, 0] = math.inf
    capture(monkeypatch)
    native = prepared(field, x, t, **given)  # odeint looks at the state when it first sees it
    call = fused.Call(native, field, list(case.t), (), lambda *args: None)
    y = fused.run(call, x.requires_grad_(), field.tensors(), t.dtype)
    assert y.isnan().all()
    want = dict(budget=Status.MAX_STEPS, underflow=Status.UNDERFLOW, state=Status.NON_FINITE)
    assert call.stats.status == want[kind]


@every_adaptive
def test_captured_solves_that_fail_have_no_gradient(control, device, monkeypatch):
    case, given = with_budget(control)
    given["options"] |= {"max_num_steps": 2}
    capture(monkeypatch)
    got, stats = solved(case, f64, device, **given)
    assert stats.status == Status.MAX_STEPS
    assert all(value.isnan().all() for value in got.values())


def prepared(field, x, t, step_control="batch", **given):
    problem = fused.make_problem(field, torch.zeros_like(x), t, **given)
    by_row = step_control == "sample"
    return fused.prepare("triton", problem, field.spec(), x.shape[1], by_row=by_row)


def test_captured_solves_have_a_limit(device, monkeypatch):
    case, given = CONTROLS["batch of several programs"]
    capture(monkeypatch)
    more = given | dict(options={"max_num_steps": host.MOST_CAPTURED + 1})
    with pytest.raises(ValueError, match="makes all attempts that it may need, here 257. Set opti"):
        solved(case, f64, device, **more)
    monkeypatch.setattr(host, "MOST_CAPTURED_BYTES", 20 * 2 * 66 * 3 * 8)
    for control in ("batch", "sample"):
        more = given | dict(options={"max_num_steps": 21}, step_control=control)
        with pytest.raises(ValueError, match=r"21 of 3168 bytes. Set .*'max_num_steps'\] to 20 at"):
            solved(case, f64, device, **more)


@pytest.mark.gpu
@every_control
def test_cuda_graphs(control):
    device = torch.device("cuda")
    case, given = with_budget(control)
    field, x = case.field(f32, device), case.state(f32, device)[0].requires_grad_()
    t, given = times(*case.t), dict(rtol=1e-3, atol=1e-3, backend="triton") | given
    wanted = [x, *field.parameters()]
    cotangent = case.random(len(t), *x.shape).to(x)

    def solve_once():
        y, stats = odeint(field, x, t, return_stats=True, **given)
        grads = torch.autograd.grad(y, wanted, cotangent)
        # A graph that lived on would tie the leaves to the stream on which it was made.
        return y.detach(), grads, stats

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            solve_once()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, grads, later = solve_once()
    for factor in (1.0, 0.7, -1.3):
        with torch.no_grad():
            x.copy_(factor * case.state(f32, device)[0])
        graph.replay()
        want, want_grads, stats = solve_once()
        assert_equal((y, *grads), (want, *want_grads))
        names = ("nfe", "nfe_backward", "accepted", "rejected", "status")
        assert [getattr(later, name) for name in names] == [getattr(stats, name) for name in names]


# --- explain --------------------------------------------------------------------------------------

IN_FLOAT, IN_DOUBLE = "float32 (products of three tf32 parts)", "float64"
AGAIN = "1 launch for each attempted step, and 2"
TOY = MLPField(7, 32)


def no_field(t, y):
    return -y


EXPLAINED = {
    "toy": (TOY, 64, {}, ("adaptive", "1 launch", IN_FLOAT)),
    "batch of 1000": (TOY, 1000, {}, ("adaptive", AGAIN, IN_FLOAT)),
    "by row": (TOY, 1000, {"step_control": "sample"}, ("by_row", "1 launch", IN_FLOAT)),
    "fixed steps": (TOY, 1000, {"method": "rk4"}, ("fixed", "1 launch", IN_FLOAT)),
    "float64": (MLPField(7, 32).double(), 20, {}, ("adaptive", "1 launch", IN_DOUBLE)),
}
NOT = {
    "width": (MLPField(7, 200), "layers of width 200, the GPU kernels take 128 at most"),
    "layers": (MLPField(7, 32, num_hidden=5), "5 hidden layers, the GPU kernels take 1 to 4"),
    "state": (MLPField(65, 32), "the state has width 65, the GPU kernels take 64 at most"),
    "function": (no_field, 'gradient="autograd" goes through the reference solver'),
    "continuous": (TOY, "norm includes the parameters; adjoint_options={'norm': 'seminorm'} would"),
}


def explained(field, rows, device, **given):
    dim, dtype = 7, f32
    if isinstance(field, MLPField):
        dim, dtype = field.dim, field.layers[0].weight.dtype
        field = field.to(device)
    state = torch.zeros(rows, dim, dtype=dtype, device=device)
    return explain(field, state, times(0.0, 0.5, 1.0), backend="triton", **given).splitlines()


@pytest.mark.parametrize("name", EXPLAINED)
def test_explain(name, device):
    field, rows, given, (kernel, launches, arithmetic) = EXPLAINED[name]
    lines = explained(field, rows, device, **given)
    assert "backend: triton" in lines and "gradient: discrete" in lines
    told = [line for line in lines if line.startswith("  backend: ")]
    start = re.escape(f"  backend: the Triton kernels run the whole solve: {kernel}, ")
    pattern = rf"{start}(\d+) x (\d+) rows, {re.escape(f'{launches}, {arithmetic}')}"
    (tiles, height) = map(int, re.fullmatch(pattern, told[0]).groups())
    assert tiles == -(-rows // height) and len(told) == 1


@pytest.mark.usefixtures("own_code")
@pytest.mark.parametrize("name", NOT)
def test_why_not(name, device):
    field, reason = NOT[name]
    given = {"gradient": "continuous"} if name == "continuous" else {}
    with pytest.raises(InvalidArgument, match=re.escape(reason)):
        explained(field, 64, device, **given)


def test_precision_of_products_is_torchs(device):
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("high", "medium"):
            torch.set_float32_matmul_precision(precision)
            text = "tf32 products, float32 sums (torch's float32_matmul_precision)"
            assert explained(TOY, 64, device)[-2].endswith(text)
            assert explained(MLPField(7, 32).double(), 64, device)[-2].endswith(IN_DOUBLE)
    finally:
        torch.set_float32_matmul_precision(before)
    assert explained(TOY, 64, device)[-2].endswith(IN_FLOAT)
