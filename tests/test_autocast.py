"""Autocast: a field that the kernels know is solved in its own precision, cast at the borders."""

import contextlib

import pytest
import torch
from torch import nn

from anode_fast import (
    AugODEBlock,
    ConvField,
    ConvODENet,
    MLPField,
    ODENet,
    explain,
    odeint,
    odeint_adjoint,
)

T = torch.tensor([0.0, 0.4, 1.0])
DEVICES = {
    "cpu": (torch.bfloat16,),
    "cuda": (torch.float16, torch.bfloat16),
}

every_kind = pytest.mark.parametrize("kind", ["rows", "images"])
half = pytest.mark.parametrize(
    ("device", "dtype"),
    [
        pytest.param(
            *(device, dtype),
            marks=pytest.mark.gpu if device == "cuda" else (),
            id=f"{device} {dtype}",
        )
        for device, dtypes in DEVICES.items()
        for dtype in dtypes
    ],
)


def case(kind, device="cpu"):
    """A field, a state and a cotangent of its solution."""
    if kind == "rows":
        field, x = MLPField(3, 16, activation="tanh"), torch.randn(6, 3)
    else:
        field, x = ConvField(2, 6, activation="tanh"), torch.randn(3, 2, 5, 4)
    return field.to(device), x.to(device), torch.randn(len(T), *x.shape).to(device)


def solved(solve, field, x, cotangent, cast=None, backward_inside=False, **given):
    """Solution, counts, and gradients of state and weights."""
    x = x.clone().requires_grad_()
    autocast = torch.autocast(x.device.type, cast or torch.bfloat16, enabled=cast is not None)
    with autocast:
        y, stats = solve(field, x, T, rtol=1e-4, atol=1e-5, return_stats=True, **given)
    with autocast if backward_inside else contextlib.nullcontext():
        grads = torch.autograd.grad(y, [x, *field.parameters()], cotangent)
    return y, stats, grads


GIVEN = {
    "discrete": dict(gradient="discrete"),
    "continuous": dict(gradient="continuous"),
    "autograd": dict(gradient="autograd"),
    "fixed": dict(method="rk4", options={"step_size": 0.25}),
    "reference": dict(backend="reference"),
    "implicit": dict(method="trapezoid", options={"step_size": 0.25}),
}


@half
@every_kind
@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
@pytest.mark.parametrize("solve", [odeint, odeint_adjoint])
@pytest.mark.parametrize("backward_inside", [False, True], ids=["outside", "inside"])
def test_as_without_autocast(solve, kind, given, device, dtype, backward_inside):
    field, x, cotangent = case(kind, device)
    want, stats, want_grads = solved(solve, field, x, cotangent, **given)
    if backward_inside and stats.launches == 0 and kind == "rows":
        pytest.skip("torch's own operations, whose backward pass autocast changes")
    y, cast_stats, grads = solved(solve, field, x, cotangent, dtype, backward_inside, **given)
    assert cast_stats == stats
    assert y.dtype == torch.float32
    assert torch.equal(y, want)
    for got, expected in zip(grads, want_grads, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@half
@every_kind
def test_half_precision_state_is_cast_up(kind, device, dtype):
    field, x, cotangent = case(kind, device)
    x = x.to(dtype)
    want, stats, (want_x, *want_grads) = solved(odeint, field, x.float(), cotangent)
    y, cast_stats, (x_grad, *grads) = solved(odeint, field, x, cotangent, dtype)
    assert (y.dtype, x_grad.dtype) == (torch.float32, dtype)
    assert cast_stats == stats
    assert torch.equal(y, want)
    assert torch.equal(x_grad, want_x.to(dtype))
    for got, expected in zip(grads, want_grads, strict=True):
        assert torch.equal(got, expected)


@half
@every_kind
def test_explain_says_what_runs(kind, device, dtype):
    field, x, cotangent = case(kind, device)
    want = explain(field, x, T)
    with torch.autocast(device, dtype):
        assert explain(field, x, T) == explain(field, x.to(dtype), T) == want
    assert f"backend: {solved(odeint, field, x, cotangent, dtype)[1].backend}\n" in want


MODELS = {
    "rows": (lambda: ODENet(3, 16, 2, augment_dim=2, activation="tanh"), (6, 3)),
    "images": (lambda: ConvODENet((2, 5, 4), 6, 3, 1, activation="tanh"), (3, 2, 5, 4)),
    "lifted": (
        lambda: nn.Sequential(
            nn.Linear(3, 4),  # gives half precision
            AugODEBlock.mlp(4, 16, 2, activation="tanh", augmentation=nn.Linear(4, 2)),
            nn.Linear(6, 2),
        ),
        (6, 3),
    ),
}


@half
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_training_step(kind, compiled, device, dtype):
    """Weights get float32 gradients that are right to the rounding of the layers around."""
    torch.compiler.reset()
    make, shape = MODELS[kind]
    net, x = make().to(device), torch.randn(shape, device=device)
    net(x).square().mean().backward()
    want = [p.grad for p in net.parameters()]
    call = torch.compile(net, fullgraph=True, backend="aot_eager") if compiled else net
    net.zero_grad()
    with torch.autocast(device, dtype):
        y = call(x)
        loss = y.float().square().mean()
    assert y.dtype == dtype  # the last layer's
    loss.backward()
    for p, expected in zip(net.parameters(), want, strict=True):
        assert p.grad.dtype == torch.float32
        scale = expected.abs().max().item()
        torch.testing.assert_close(p.grad, expected, rtol=0, atol=0.05 * scale)


@every_kind
def test_second_derivatives(kind):
    field, x, cotangent = case(kind)
    found = []
    for enabled in (False, True):
        x = x.detach().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = odeint(field, x, T, rtol=1e-4, atol=1e-5)
            (first,) = torch.autograd.grad(y, x, cotangent, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), x)[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


def test_fields_in_half_precision_stay_as_they_are():
    field, x, _ = case("rows")
    field, x = field.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = odeint(field, x, T, rtol=1e-2, atol=1e-2)
    assert y.dtype == torch.bfloat16


def test_other_fields_compute_as_autocast_says():
    net, x = nn.Linear(3, 3), torch.randn(5, 3)
    dtypes = []

    def field(t, y):
        value = net(y)
        dtypes.append(value.dtype)
        return value

    with torch.autocast("cpu", torch.bfloat16):
        y = odeint(field, x, T, rtol=1e-2, atol=1e-2)
    assert set(dtypes) == {torch.bfloat16}
    assert y.dtype == torch.float32


def test_wider_states_are_refused_as_without_autocast():
    field, x, _ = case("rows")
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="float64"):
        odeint(field, x.double(), T)
