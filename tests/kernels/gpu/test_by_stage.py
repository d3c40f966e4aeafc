"""Solves of convolutional fields on a GPU, and their discrete gradients, against the reference."""

import math
import re

import pytest
import torch

pytest.importorskip("triton")

from anode_fast import AugODEBlock, ConvField, odeint, odeint_adjoint  # noqa: E402
from anode_fast.errors import MaxStepsExceeded, NonFiniteState, StepSizeUnderflow  # noqa: E402
from anode_fast.kernels.gpu import by_stage, host  # noqa: E402
from tests.helpers import assert_no_worse  # noqa: E402

f32, f64 = torch.float32, torch.float64

FEW = {"method": "adaptive_heun"}
"""Where the method does not matter: few evaluations, for the interpreter is slow."""

SCALES = 1, 3, 5, 7
"""For solves of the reference that differ by rounding only."""


def made(dtype, device, channels=3, filters=8, activation="tanh", gain=1.5, scale=1):
    """A field for `scale` times the state."""
    generator = torch.Generator().manual_seed(0)
    field = ConvField(channels, filters, activation=activation).double()
    with torch.no_grad():
        for p in field.parameters():
            size = gain * (p[0].numel() if p.dim() > 1 else 4) ** -0.5
            p.copy_(size * torch.randn(p.shape, generator=generator, dtype=f64))
        field.conv1.weight[:, 1:] /= scale
        field.conv3.weight *= scale
        field.conv3.bias *= scale
    return field.to(device, dtype)


def state(dtype, device, images=2, channels=3, spread=1.0):
    x = torch.randn(images, channels, 5, 4, generator=torch.Generator().manual_seed(1), dtype=f64)
    sizes = torch.linspace(-1, 1, max(images, 1), dtype=f64)[:images].reshape(-1, 1, 1, 1)
    return (x * spread**sizes).to(device, dtype)


def solved(
    dtype, device, backend, t=(0.0, 0.3, 0.5), scale=1, call=odeint, images=2, spread=1.0,
    activation="tanh", gain=1.5, channels_last=False, **given,
):  # fmt: skip
    """Solution and gradients of a random functional of it, by name, and the stats."""
    field = made(dtype, device, activation=activation, gain=gain, scale=scale)
    x = scale * state(dtype, device, images, spread=spread)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    given = dict(rtol=1e-2, atol=1e-2) | given
    given["atol"] = scale * given["atol"]
    if backend == "reference":
        given = dict(gradient="autograd") | given
    t = torch.tensor(t, dtype=f64)
    y, stats = call(field, x, t, backend=backend, return_stats=True, **given)
    assert stats.backend == backend
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=f64)
    grads = torch.autograd.grad(y, [x, *field.parameters()], cotangent.to(y) / scale)
    found = dict(zip(["d_x", *(n for n, _ in field.named_parameters())], grads, strict=True))
    found["d_x"] = scale * found["d_x"]
    found["conv3.weight"] = scale * found["conv3.weight"]
    found["conv3.bias"] = scale * found["conv3.bias"]
    weight = found["conv1.weight"]
    found["conv1.weight"] = torch.cat([weight[:, :1], weight[:, 1:] / scale], 1)
    return {"y": y.detach() / scale} | found, stats


def compare(dtype, device, **given):
    got, stats = solved(dtype, device, "triton", **given)
    refs = [solved(dtype, device, "reference", scale=scale, **given) for scale in SCALES]
    exact, _ = solved(f64, device, "reference", scale=11, **given)
    for _, count in refs:
        assert (stats.accepted, stats.rejected) == (count.accepted, count.rejected)
        assert stats.nfe == count.nfe
    for name, value in exact.items():
        if value.numel():
            ref = max((x[name] for x, _ in refs), key=lambda x: (x - value).abs().max())
            assert_no_worse(got[name], ref, value, name)
    return got, stats


CASES = {
    "dopri5": {},
    "two tiles": dict(images=4),
    "float32": dict(dtype=f32, images=4),
    "relu": dict(activation="relu"),
    "backwards": dict(t=(1.0, 0.7, 0.4)),
    "many outputs": dict(t=(0.0, 0.05, 0.1, 0.15, 0.3, 0.31, 0.4)),
    "rejections": dict(options={"first_step": 1.0}, gain=4.0, t=(0.0, 0.5)),
    "bosh3": dict(method="bosh3"),
    "adaptive_heun": dict(method="adaptive_heun", t=(0.0, 0.3)),
    "max_step": dict(options={"max_step": 0.2}, t=(0.0, 0.5)),
    "channels last": dict(channels_last=True),
    "one image": dict(images=1, t=(0.0, 0.3)),
    "images alone": dict(step_control="sample", spread=30.0),
    "images alone, float32": FEW | dict(step_control="sample", spread=30.0, dtype=f32),
    "images alone, rejections": dict(
        **dict(step_control="sample", spread=10.0, method="bosh3"),
        **dict(options={"first_step": 1.0}, gain=3.0, t=(0.0, 0.3, 0.5)),
    ),
    "rk4": dict(method="rk4", options={"step_size": 0.3}),
    "rk4, float32": dict(method="rk4", options={"step_size": 0.5}, dtype=f32),
    "rk4, outputs are steps": dict(method="rk4", t=(0.0, 0.3, 0.5)),
    "midpoint, backwards": dict(method="midpoint", options={"step_size": 0.25}, t=(1.0, 0.4, 0.2)),
    "euler, linear": dict(method="euler", options={"step_size": 0.3, "interp": "linear"}),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_reference(name, device):
    given = dict(CASES[name])
    compare(given.pop("dtype", f64), device, **given)


def test_images_take_their_own_steps(device):
    given = dict(rtol=1e-2, atol=1e-2, backend="triton", return_stats=True, method="bosh3")
    field, x = made(f64, device), state(f64, device, spread=30.0)
    t = torch.tensor([0.0, 0.3, 0.5], dtype=f64)
    together, stats = odeint(field, x, t, step_control="sample", **given)
    each = [odeint(field, x[i : i + 1], t, **given) for i in range(2)]
    counts = [s.accepted for _, s in each]
    assert len(set(counts)) > 1 and stats.accepted == max(counts)
    torch.testing.assert_close(together, torch.cat([y for y, _ in each], 1), rtol=1e-12, atol=1e-12)


def test_augmented_channels(device):
    found = {}
    for backend in ("triton", "reference"):
        block = AugODEBlock(made(f64, device), 2, backend=backend)
        x = state(f64, device, channels=1).requires_grad_()
        y = block.trajectory(x, 2)
        grads = torch.autograd.grad(y.square().sum(), [x, *block.parameters()])
        assert block.stats.backend == backend
        found[backend] = [y.detach(), *grads]
    for got, ref in zip(found["triton"], found["reference"], strict=True):
        torch.testing.assert_close(got, ref, rtol=1e-10, atol=1e-10)


def test_nothing_but_what_is_wanted(device):
    field, x = made(f64, device), state(f64, device).requires_grad_()
    field.requires_grad_(False)
    t = torch.tensor([0.0, 1.0], dtype=f64)
    y = odeint(field, x, t, rtol=1e-2, atol=1e-2, backend="triton")
    (got,) = torch.autograd.grad(y.sum(), [x])
    ref = odeint(field, x, t, rtol=1e-2, atol=1e-2, backend="reference")
    torch.testing.assert_close(got, torch.autograd.grad(ref.sum(), [x])[0], rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        alone = odeint(field, x, t, rtol=1e-2, atol=1e-2, backend="triton")
    assert torch.equal(alone, y.detach())


def test_no_images(device):
    got, stats = solved(f64, device, "triton", images=0, t=(0.0, 1.0), options={"first_step": 1.0})
    assert got["y"].shape == (2, 0, 3, 5, 4) and got["d_x"].shape == (0, 3, 5, 4)
    assert all(not grad.any() for name, grad in got.items())
    field, x = made(f64, device), state(f64, device, images=0)
    t = torch.tensor([0.0, 1.0])
    for given in (
        dict(step_control="sample", options={"first_step": 1.0}),
        dict(method="euler", options={"step_size": 1.0}),
    ):
        assert odeint(field, x, t, backend="triton", **given).shape == (2, 0, 3, 5, 4)


def test_two_runs_are_equal_bitwise(device):
    once = FEW | dict(options={"first_step": 0.3}, t=(0.0, 0.3), images=4)
    for given in (once, once | dict(step_control="sample"), dict(method="midpoint")):
        (first, _), (second, _) = (solved(f32, device, "triton", **given) for _ in range(2))
        for name, value in first.items():
            assert torch.equal(value, second[name]), name


def test_checkpoints_that_are_full_get_more_room(device, monkeypatch):
    whole = [solved(f64, device, "triton", **given)[0] for given in ROOM]
    rooms, grow = [], host.grown
    monkeypatch.setattr(by_stage.Solve, "_capacity", lambda *args: 1)
    monkeypatch.setattr(host, "grown", lambda old, size: rooms.append(size) or grow(old, size))
    for given, wanted in zip(ROOM, whole, strict=True):
        rooms.clear()
        found, _ = solved(f64, device, "triton", **given)
        assert len(rooms) >= 2
        for name, value in wanted.items():
            assert torch.equal(found[name], value), name


ROOM = (
    FEW | dict(options={"first_step": 0.1, "max_step": 0.1}, t=(0.0, 0.3)),
    FEW | dict(options={"first_step": 0.1, "max_step": 0.1}, t=(0.0, 0.3), step_control="sample"),
)


SHORT = FEW | {"options": {"first_step": 0.15, "max_step": 0.15}}


def test_more_rounds_than_a_chunk(device, monkeypatch):
    whole, stats = solved(f64, device, "triton", **SHORT)
    monkeypatch.setattr(by_stage, "CHUNKS", (1, 2))
    found, again = solved(f64, device, "triton", **SHORT)
    assert (again.accepted, again.rejected) == (stats.accepted, stats.rejected)
    for name, value in whole.items():
        assert torch.equal(found[name], value), name
    given = dict(method="midpoint", options={"step_size": 0.1})
    fixed, _ = solved(f64, device, "triton", **given)
    monkeypatch.setattr(by_stage, "CHUNKS", (20, 4))
    again, _ = solved(f64, device, "triton", **given)
    for name, value in fixed.items():
        assert torch.equal(again[name], value), name


# --- the adjoint ODE ------------------------------------------------------------------------------

SEMINORM = {"norm": "seminorm"}

CONTINUOUS = {
    "two outputs": dict(t=(0.0, 1.0)),
    "backwards, three": dict(adjoint_method="bosh3", t=(1.0, 0.6, 0.4)),
    "float32": dict(dtype=f32, images=4, adjoint_method="bosh3", t=(0.0, 0.3)),
    "relu": dict(activation="relu", adjoint_method="bosh3", t=(0.0, 0.3)),
    "tolerances of its own": dict(t=(0.0, 0.5), adjoint_rtol=1e-3, adjoint_atol=1e-3),
    "rejections": dict(gain=3.0, t=(0.0, 0.3), adjoint_options=SEMINORM | {"first_step": 0.3}),
    "bosh3": dict(adjoint_method="bosh3", t=(0.0, 0.3)),
    "options": dict(adjoint_options=SEMINORM | {"first_step": 0.05, "max_step": 0.3}),
}


@pytest.mark.parametrize("name", CONTINUOUS)
def test_the_adjoint_ode_is_the_references(name, device):
    given = dict(call=odeint_adjoint, adjoint_options=SEMINORM) | CONTINUOUS[name]
    dtype = given.pop("dtype", f64)
    got, stats = solved(dtype, device, "triton", **given)
    ref, count = solved(dtype, device, "reference", gradient="continuous", **given)
    assert stats.nfe_backward == count.nfe_backward
    for key, value in ref.items():
        size = value.abs().max()
        error = ((got[key] - value).abs().max() / size).item()
        # Rounding of an error ratio is one of the next step's size.
        assert error < (1e-10 if dtype == f64 else 3e-4), (key, error)


def test_only_what_is_wanted_of_the_adjoint_ode(device):
    field, x = made(f64, device), state(f64, device).requires_grad_()
    t = torch.tensor([0.0, 0.4], dtype=f64)
    found = {}
    for backend in ("triton", "reference"):
        arguments = FEW | dict(rtol=1e-1, atol=1e-1, adjoint_options=SEMINORM, backend=backend)
        field.requires_grad_(False)
        y = odeint_adjoint(field, x, t, **arguments)
        found[backend] = list(torch.autograd.grad(y.sum(), [x]))
        field.conv2.weight.requires_grad_()
        y = odeint_adjoint(field, x.detach(), t, **arguments)
        found[backend] += torch.autograd.grad(y.sum(), [field.conv2.weight])
    for got, ref in zip(found["triton"], found["reference"], strict=True):
        torch.testing.assert_close(got, ref, rtol=1e-9, atol=1e-9)


def test_an_adjoint_ode_that_cannot_go_on(device):
    for backend in ("triton", "reference"):
        field, x = made(f64, device), state(f64, device).requires_grad_()
        options = SEMINORM | {"max_num_steps": 1, "max_step": 0.1}
        t = torch.tensor([0.0, 1.0], dtype=f64)
        y = odeint_adjoint(
            field, x, t, rtol=1e-2, atol=1e-2, adjoint_options=options, backend=backend
        )
        with pytest.raises(MaxStepsExceeded):
            y.sum().backward()


def test_other_adjoint_odes_go_to_the_reference(device):
    field, x = made(f64, device), state(f64, device)
    t = torch.tensor([0.0, 1.0], dtype=f64)
    for given, reason in (
        (dict(adjoint_rtol=1e-2), "norm includes the parameters"),
        (dict(adjoint_method="rk4", adjoint_options={}), "adaptive steps only"),
    ):
        with pytest.raises(ValueError, match=reason):
            odeint_adjoint(field, x, t, backend="triton", **given)


def test_a_captured_adjoint_ode(device, monkeypatch):
    given = dict(
        **dict(call=odeint_adjoint, adjoint_options=SEMINORM | {"max_num_steps": 3}),
        **dict(rtol=0.1, atol=0.1, options={"max_num_steps": 3}, t=(0.0, 0.5)),
    )
    whole, stats = solved(f64, device, "triton", **given)
    monkeypatch.setattr(host, "is_captured", lambda device: True)
    found, later = solved(f64, device, "triton", **given)
    assert later.nfe_backward == stats.nfe_backward
    for name, value in whole.items():
        assert torch.equal(found[name], value), name


# --- captured solves, and other things ------------------------------------------------------------


def test_odeint_adjoint_by_fixed_steps_solves_once_more(device):
    given = dict(method="rk4", options={"step_size": 0.5})
    plain, _ = solved(f64, device, "triton", **given)
    found, stats = solved(f64, device, "triton", call=odeint_adjoint, **given)
    for name, value in plain.items():
        assert torch.equal(found[name], value), name
    assert stats.nfe_backward == 2 * stats.nfe


@pytest.mark.parametrize("control", ["batch", "sample"])
@pytest.mark.parametrize(
    "kind, error, given",
    [
        ("budget", MaxStepsExceeded, dict(options={"max_num_steps": 2, "max_step": 0.1})),
        ("underflow", StepSizeUnderflow, FEW | dict(rtol=0.0, atol=1e-30)),
        ("input", NonFiniteState, dict(value=math.nan)),
        ("field", NonFiniteState, dict(gain=1e200)),
    ],
)
def test_what_cannot_go_on_fails_as_the_reference_does(kind, error, given, control, device):
    given = dict(given)
    field = made(f64, device, activation="identity", gain=given.pop("gain", 1.5))
    x = state(f64, device)
    if "value" in given:
        x[1, 1, 2, 3] = given.pop("value")
    t = torch.tensor([100.0, 101.0], dtype=f64)  # not 0, near which there are tiny steps
    messages = []
    for backend in ("triton", "reference"):
        arguments = dict(rtol=1e-3, atol=1e-3) | given
        with pytest.raises(error) as raised:
            odeint(field, x, t, backend=backend, step_control=control, **arguments)
        messages.append(str(raised.value))
    if kind == "underflow":  # when, and of which image first, is a matter of rounding
        messages = [re.sub(r"[\d.e-]+", "", text) for text in messages]
    if kind != "field":
        assert messages[0] == messages[1]


def test_fixed_steps_that_leave_the_numbers(device):
    field = made(f64, device, activation="identity", gain=1e60)
    t = torch.linspace(0, 1, 5, dtype=f64)
    found = []
    for backend in ("triton", "reference"):
        given = dict(backend=backend, method="rk4")
        if device.type == "cpu":
            with pytest.raises(NonFiniteState) as raised:
                odeint(field, state(f64, device), t, **given)
            found.append(str(raised.value))
        else:  # nobody waits for the device
            is_finite = odeint(field, state(f64, device), t, **given).isfinite().flatten(1).all(1)
            assert not is_finite[-1]
            found.append(is_finite.tolist())
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "given", [FEW, FEW | dict(step_control="sample"), dict(method="euler")], ids=str
)
def test_captured_solves_wait_for_nothing(given, device, monkeypatch):
    options = (
        {} if given["method"] == "euler" else dict(rtol=0.1, atol=0.1, options={"max_num_steps": 3})
    )
    whole, stats = solved(f64, device, "triton", **given, **options)
    monkeypatch.setattr(host, "is_captured", lambda device: True)
    found, later = solved(f64, device, "triton", **given, **options)
    assert (later.accepted, later.rejected, later.nfe) == (
        stats.accepted,
        stats.rejected,
        stats.nfe,
    )
    assert later.nfe_backward == stats.nfe_backward
    for name, value in whole.items():
        assert torch.equal(found[name], value), name


def test_a_captured_solve_that_failed_is_nan(device, monkeypatch):
    monkeypatch.setattr(host, "is_captured", lambda device: True)
    options = {"max_num_steps": 1, "max_step": 0.1}
    found, stats = solved(f64, device, "triton", options=options)
    assert all(value.isnan().all() for value in found.values())
    assert stats.status.name == "MAX_STEPS"


# --- users' own fields ----------------------------------------------------------------------------


class Hidden:
    """Holds what nobody sees."""

    __slots__ = ("activation",)


class Convolutions(torch.nn.Module):
    """A user's field."""

    def __init__(self, activation):
        super().__init__()
        self.a, self.b = torch.nn.Conv2d(3, 8, 1), torch.nn.Conv2d(8, 8, 3, padding=1)
        self.c = torch.nn.Conv2d(8, 3, 1)
        self.hidden = Hidden()
        self.hidden.activation = activation

    def forward(self, t, y):
        act = self.hidden.activation
        return self.c(act(self.b(act(self.a(y)))))


@pytest.mark.parametrize("given", [FEW, FEW | dict(step_control="sample"), dict(method="euler")])
@pytest.mark.parametrize("is_captured", [False, True])
def test_the_first_evaluation_is_compared(given, is_captured, device, monkeypatch):
    field, x = Convolutions(torch.relu).to(device, f64), state(f64, device)
    t = torch.tensor([0.0, 0.5], dtype=f64)
    budget = {"step_size": 0.25} if given["method"] == "euler" else {"max_num_steps": 3}
    given = dict(backend="triton", rtol=0.1, atol=0.1, options=budget) | given
    y, stats = odeint(field, x, t, return_stats=True, **given)
    assert stats.backend == "triton"
    torch.testing.assert_close(y, odeint(field, x, t, **given | dict(backend="reference")))
    field.hidden.activation = torch.tanh
    x.requires_grad_()
    if is_captured:  # there is no time to look
        monkeypatch.setattr(host, "is_captured", lambda device: True)
        y = odeint(field, x, t, **given)
        assert y.isnan().all()
        assert torch.autograd.grad(y.sum(), x)[0].isnan().all()
        return
    why = "not that of the operations in its trace"
    with pytest.warns(UserWarning, match=why), pytest.raises(ValueError, match=why):
        odeint(field, x, t, **given)


def test_a_first_evaluation_that_is_nowhere_finite(device):
    field, x = Convolutions(torch.relu).to(device, f64), state(f64, device)
    torch.nn.init.constant_(field.a.weight, math.nan)
    with pytest.raises(NonFiniteState):
        odeint(field, x, torch.tensor([0.0, 0.5], dtype=f64), backend="triton")
