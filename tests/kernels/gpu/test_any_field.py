"""Solves on a GPU of fields that PyTorch evaluates, against the reference."""

import math

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

from anode_fast import explain, odeint, odeint_adjoint  # noqa: E402
from anode_fast.any_field import solve  # noqa: E402
from anode_fast.errors import (  # noqa: E402
    InvalidArgument,
    MaxStepsExceeded,
    NonDeterministicField,
    NonFiniteState,
    StepSizeUnderflow,
)
from anode_fast.kernels.gpu import any_field, host  # noqa: E402
from anode_fast.problem import FAMILIES, FIXED, make_problem  # noqa: E402
from anode_fast.stats import SolveStats  # noqa: E402
from anode_fast.tableau import TABLEAUS  # noqa: E402

pytestmark = pytest.mark.usefixtures("own_code")

f32, f64 = torch.float32, torch.float64
METHODS = [name for name, tableau in TABLEAUS.items() if not tableau.implicit]
TIMES = (0.0, 0.3, 0.35, 1.0)


class Spiral(nn.Module):
    """A field with parameters, time and a counter, of states of any shape with 3 at the end."""

    def __init__(self, device, dtype=f64):
        super().__init__()
        weight = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=f64)
        self.weight = nn.Parameter(weight.to(device, dtype))
        self.nfe = 0

    def forward(self, t, y):
        assert t.shape == () and t.dtype == y.dtype and t.device == y.device
        self.nfe += 1
        return torch.tanh(y @ self.weight) * torch.cos(3 * t) - y


def state(device, *shape, dtype=f64):
    shape = shape or (5, 3)
    y = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=f64)
    return y.to(device, dtype)


def options_of(method):
    return {"step_size": 0.09} if FAMILIES[method] == FIXED else {}


def solved(field, y0, backend, t=TIMES, *, method="dopri5", options=None, **given):
    """The solution, its counts, and what the field counted."""
    given = dict(rtol=1e-3, atol=1e-4, options=options or options_of(method)) | given
    before = getattr(field, "nfe", 0)
    with torch.no_grad():
        times = torch.tensor(t, dtype=f64)
        y, stats = odeint(
            field, y0, times, method=method, backend=backend, return_stats=True, **given
        )
    assert stats.backend == backend
    return y, (stats.nfe, stats.accepted, stats.rejected, getattr(field, "nfe", 0) - before)


def compare(field, y0, **given):
    got, counts = solved(field, y0, "triton", **given)
    wanted, expected = solved(field, y0, "reference", **given)
    tolerance = 1e-10 if y0.dtype == f64 else 1e-4
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
    assert counts == expected
    assert counts[3] in (0, counts[0])


@pytest.mark.parametrize("direction", [1, -1], ids=["forward", "backwards"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method(method, direction, device):
    tolerances = dict(rtol=1e-2, atol=1e-2) if TABLEAUS[method].order < 4 else {}
    t = [direction * t for t in TIMES]
    compare(Spiral(device), state(device), method=method, t=t, **tolerances)


@pytest.mark.parametrize("shape", [(3,), (0, 3), (2, 2, 1, 3), (350, 3)], ids=str)
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_states_of_any_shape(method, shape, device):
    """Of more entries than a program has, and of none."""
    compare(Spiral(device), state(device, *shape), method=method)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_float32(method, device):
    compare(Spiral(device, f32), state(device, dtype=f32), method=method, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "options",
    [
        {"first_step": 0.05},
        {"min_step": 0.2, "max_step": 0.3},
        {"safety": 0.7, "ifactor": 3.0, "dfactor": 0.5},
        {"dtype": f32},
    ],
    ids=str,
)
def test_options(options, device):
    compare(Spiral(device), state(device), options=options)


@pytest.mark.parametrize("interp", ["linear", "cubic"])
def test_outputs_between_fixed_steps(interp, device):
    options = {"step_size": 0.25, "interp": interp}
    compare(Spiral(device), state(device), method="rk4", options=options)


FIELDS = {
    "transposed value": lambda t, y: -y.t().contiguous().t(),
    "its own argument": lambda t, y: y,
    "expanded memory": lambda t, y: y.mean().expand(y.shape),
    "memory at an odd place": lambda t, y: torch.cat([y.flatten()[:1], -y.flatten()])[1:].view_as(
        y
    ),
    "writes its arguments": lambda t, y: y.mul_(-1.0) * t.add_(1.0),
}


@pytest.mark.filterwarnings("ignore:odeint. the field writes")
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@pytest.mark.parametrize("name", FIELDS)
def test_values_of_all_kinds(name, method, device):
    compare(FIELDS[name], state(device), method=method)


def test_a_field_that_returns_the_same_memory(device):
    buffer = torch.empty(5, 3, dtype=f64, device=device)
    compare(lambda t, y: torch.mul(y, -1.0, out=buffer), state(device))


@pytest.mark.parametrize("gradient", ["discrete", "continuous"])
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@pytest.mark.parametrize("times", [TIMES, tuple(i / 30 for i in range(31))], ids=["few", "many"])
def test_gradients(times, method, gradient, device):
    """With many output times inside a step, the adjoint ODE does not stop at each."""
    field, found = Spiral(device), []
    for backend in ("triton", "reference"):
        y, before = state(device).requires_grad_(), field.nfe
        solution, stats = odeint_adjoint(
            *(field, y, torch.tensor(times, dtype=f64)),
            **dict(rtol=1e-3, atol=1e-4, method=method, options=options_of(method)),
            **dict(gradient=gradient, backend=backend, return_stats=True),
        )
        assert stats.backend == backend
        grads = torch.autograd.grad(solution.pow(2).sum(), (y, field.weight))
        evaluations = stats.nfe + stats.nfe_backward
        found.append((grads, stats.nfe, stats.nfe_backward))
        assert field.nfe - before >= evaluations
    (ours, *counts), (theirs, *expected) = found
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert counts == expected


def test_room_for_more_checkpoints(device, monkeypatch):
    monkeypatch.setattr(host, "CHECKPOINT_BYTES", 1)
    field, found = Spiral(device), []
    for backend in ("triton", "reference"):
        y = state(device).requires_grad_()
        t = torch.tensor([0.0, 3.0], dtype=f64)
        solution, stats = odeint(
            *(field, y, t), gradient="discrete", backend=backend, return_stats=True, rtol=1e-4
        )
        found.append(torch.autograd.grad(solution.pow(2).sum(), (y, field.weight)))
        assert stats.accepted > 8  # what there is room for at first
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_a_second_derivative_goes_through_the_reference(device):
    y = state(device).requires_grad_()
    t = torch.tensor([0.0, 1.0], dtype=f64)
    found = []
    for backend in ("triton", "reference"):
        end = odeint_adjoint(
            Spiral(device), y, t, rtol=1e-5, atol=1e-6, gradient="discrete", backend=backend
        )[-1]
        (grad,) = torch.autograd.grad(end.pow(2).sum(), y, create_graph=True)
        found.append(torch.autograd.grad(grad.pow(2).sum(), y)[0])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("field", "options", "error"),
    [
        (lambda t, y: y * y, {}, StepSizeUnderflow),
        (lambda t, y: -y, {"max_num_steps": 2, "first_step": 1e-3}, MaxStepsExceeded),
        (lambda t, y: torch.where(t > 0.5, math.nan, 1.0) + 0 * y, {}, NonFiniteState),
        (lambda t, y: y + math.inf, {}, NonFiniteState),
    ],
    ids=["blow-up", "budget", "nan", "inf at once"],
)
def test_failures_read_like_the_reference(field, options, error, device):
    y0, messages = 1 + state(device).abs(), []
    for backend in ("triton", "reference"):
        with pytest.raises(error) as caught:
            solved(field, y0, backend, (0.0, 2.0), options=options, rtol=0.1, atol=0.1)
        messages.append(str(caught.value)[:18])
    assert messages[0] == messages[1]


class Watched(Spiral):
    def callback_step(self, t, y, dt):
        raise AssertionError("the kernels tell nobody of steps")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(method="implicit_adams", options={"step_size": 0.5}), "no explicit Runge-Kutta"),
        (dict(options={"norm": lambda x: x.abs().max()}), "the option norm"),
        (dict(options={"jump_t": [0.5]}), "the option jump_t"),
        (dict(rtol=torch.tensor([1e-3, 1e-3, 1e-3])), "rtol or atol is a tensor"),
        (dict(y0=lambda y: (y, y)), "the state is a tuple"),
        (dict(y0=lambda y: y.half()), "want float32 or float64"),
        (dict(field=Watched), "callbacks"),
        (dict(field=lambda device: nn.Sequential(nn.BatchNorm1d(3))), "buffers"),
        (dict(step_control="sample"), "every row takes its own steps"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_the_reference_has_to_do(change, reason, device):
    arguments = dict(change)
    field = arguments.pop("field", Spiral)(device)
    y0 = arguments.pop("y0", lambda y: y)(state(device))
    t = torch.tensor([0.0, 1.0])
    with torch.no_grad():
        with pytest.raises(InvalidArgument, match=reason):
            odeint(field, y0, t, backend="triton", **arguments)
        assert "backend: reference" in explain(field, y0, t, **arguments)


class Keeping(Spiral):
    """Writes down where it was evaluated, by `how`."""

    def __init__(self, device, how):
        super().__init__(device)
        self.how, self.seen = how, []

    def forward(self, t, y):
        self.seen.append((t, self.how(y)))
        return super().forward(t, y)


@pytest.mark.parametrize("how", [lambda y: y, torch.detach, lambda y: y[1:]], ids=["y", "", "part"])
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_a_field_may_keep_its_arguments(method, how, device):
    seen = []
    for backend in ("triton", "reference"):
        field = Keeping(device, how)
        _, (nfe, *_) = solved(field, state(device), backend, method=method)
        seen.append(field.seen[:nfe])
    for (t, y), (s, z) in zip(*seen, strict=True):
        torch.testing.assert_close((t, y), (s, z), rtol=1e-9, atol=1e-9)


def test_a_noisy_field_is_told(device, monkeypatch):
    """Which no step size helps."""
    monkeypatch.setattr(any_field, "REJECTIONS_BEFORE_DOUBT", 8)

    def field(t, y):
        return y + torch.randn_like(y)

    with pytest.raises(NonDeterministicField):
        solved(field, state(device), "triton", rtol=1e-8, atol=1e-8)


def test_a_graph_through_the_solve_has_to_be_the_references(device):
    t = torch.tensor([0.0, 1.0])
    with pytest.raises(InvalidArgument, match="torch.no_grad"):
        odeint(Spiral(device), state(device), t, backend="triton")
    with torch.no_grad():
        told = explain(Spiral(device), state(device), t, backend="triton")
    assert "PyTorch evaluates the field" in told


# --- what only a GPU can show ---------------------------------------------------------------------


class Endless(Spiral):
    """Many steps: the field turns fast."""

    def forward(self, t, y):
        return 20 * super().forward(t, y)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_rounds_in_a_graph(method, monkeypatch):
    """A long solve replays a captured round, and counts as if it did not."""
    device = torch.device("cuda")
    replayed = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(
        torch.cuda.CUDAGraph, "replay", lambda graph: replayed.append(1) or replay(graph)
    )
    options = {"step_size": 0.02} if method == "rk4" else {}
    compare(Endless(device), state(device), method=method, options=options)
    assert replayed


class Reading(Endless):
    """Waits for the device in each evaluation, which no graph can."""

    def forward(self, t, y):
        return super().forward(t, y) * (1.0 if float(t) > -1 else 2.0)


class Hooked(Endless):
    def __init__(self, device):
        super().__init__(device)
        self.seen = []
        self.register_forward_hook(lambda *_: self.seen.append(1))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [Reading, Hooked])
def test_fields_that_no_graph_can_stand_for(kind, monkeypatch):
    device = torch.device("cuda")

    def refuse(graph):
        raise AssertionError("replayed")

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", refuse)
    field = kind(device)
    compare(field, state(device))
    compare(field, state(device))


@pytest.mark.gpu
def test_no_wait_in_fixed_steps():
    """But for the look at y0, which every call takes."""
    device = torch.device("cuda")
    y0, t = state(device, dtype=f32), torch.tensor([0.0, 1.0])
    options = {"step_size": 0.05}
    problem = make_problem(Spiral(device, f32), y0, t, method="rk4", options=options)
    with torch.no_grad():
        first = solve(problem, SolveStats())
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = solve(problem, SolveStats())
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, again)


def test_counters_that_calls_do_not_advance_alike_are_left_alone(device):
    class Odd(Spiral):
        def __init__(self, device):
            super().__init__(device)
            self.level = 0

        def forward(self, t, y):
            self.level = max(self.level, self.nfe)
            return super().forward(t, y)

    field = Odd(device)
    _, (nfe, *_, counted) = solved(field, state(device), "triton")
    assert field.level >= nfe - 1
    assert counted >= nfe


def test_the_host_looks_a_round_late_on_a_gpu_only(device):
    control = torch.zeros(host.CONTROL, dtype=f64, device=device)
    looks = any_field._Looks(control)
    assert looks.status == host.RUNNING
    control[host.STATUS] = 1.0
    looks.take()
    assert looks.status == (host.RUNNING if control.is_cuda else 0)
    looks.take()
    assert looks.status == 0
