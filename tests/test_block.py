"""AugODEBlock against torchdiffeq on the augmented state, and its own rules."""

import copy
import dataclasses
import math
import pickle

import pytest
import torch
import torchdiffeq
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import anode_fast.block
from anode_fast.block import AugODEBlock
from anode_fast.errors import InvalidArgument, InvalidType, MaxStepsExceeded
from anode_fast.fields import ConvField, MLPField

INPUTS = {"rows": (4, 2), "images": (3, 2, 4, 3)}


def make_block(kind="rows", p=0, **kw):
    kw = {"activation": "tanh", **kw}
    if kind == "rows":
        return AugODEBlock.mlp(2, 8, p, **kw).double()
    return AugODEBlock.conv((2, 4, 3), 4, p, **kw).double()


def make_input(kind="rows"):
    return torch.randn(INPUTS[kind], dtype=torch.float64)


def augmented(x, p):
    return torch.cat([x, x.new_zeros(len(x), p, *x.shape[2:])], 1)


def times(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture
def seen(monkeypatch):
    """The keyword arguments and times of every solve that the block makes."""
    calls = []
    real = anode_fast.block.solve

    def spy(func, x, t, settings, columns):
        calls.append({"func": func, "t": t, **dataclasses.asdict(settings)})
        return real(func, x, t, settings, columns)

    monkeypatch.setattr(anode_fast.block, "solve", spy)
    return calls


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("p", [0, 3])
@pytest.mark.parametrize("t", [(0.0, 1.0), (1.0, -0.5)], ids=str)
def test_like_torchdiffeq(kind, p, t):
    # With a given first step: torchdiffeq differentiates the one it chooses for itself.
    options = {"first_step": 0.1}
    block = make_block(kind, p, t=t, options=options)
    x = make_input(kind).requires_grad_()
    params = list(block.parameters())
    out = block(x)
    got = torch.autograd.grad(out.square().sum(), [x, *params])
    nfe = block.stats.nfe

    block.field.nfe = 0
    tolerances = {"rtol": 1e-3, "atol": 1e-3}
    y0 = augmented(x, p)
    want = torchdiffeq.odeint(block.field, y0, times(*t), **tolerances, options=options)[-1]
    assert out.shape == (x.shape[0], x.shape[1] + p, *x.shape[2:])
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    assert nfe == block.field.nfe
    for a, b in zip(got, torch.autograd.grad(want.square().sum(), [x, *params]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", INPUTS)
def test_augmented_part_is_last_and_starts_at_zero(kind):
    block, x = make_block(kind, 3), make_input(kind)
    before = x.clone()
    start = block.trajectory(x, 2)[0]
    assert torch.equal(start[:, :2], x)
    assert start.shape[1] == 5 and not start[:, 2:].any()
    assert torch.equal(x, before)


class Lift(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(p, 2, dtype=torch.float64))

    def forward(self, x):
        return torch.einsum("pc,bc...->bp...", self.weight, x)


@pytest.mark.parametrize("kind", INPUTS)
def test_augmentation_by_a_module(kind):
    lift, x = Lift(3), make_input(kind)
    block = make_block(kind, 3, augmentation=lift)
    assert torch.equal(block.trajectory(x, 2)[0], torch.cat([x, lift(x)], 1))
    assert "augmentation.weight" in block.state_dict()
    block(x).square().sum().backward()
    assert lift.weight.grad.abs().sum() > 0


def test_augmentation_by_a_function():
    block = make_block(p=1, augmentation=lambda x: x.prod(1, keepdim=True))
    x = make_input()
    assert torch.equal(block.augment(x)[:, 2], x[:, 0] * x[:, 1])


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("p", [0, 2])
def test_zero_rows(kind, p):
    block, x = make_block(kind, p), make_input(kind)[:0].requires_grad_()
    out = block(x)
    assert out.shape == (0, 2 + p, *x.shape[2:])
    out.sum().backward()
    assert x.grad.shape == x.shape
    assert all(not param.grad.any() for param in block.parameters() if param.grad is not None)
    assert block(x, [0.25, 0.5]).shape == (2, *out.shape)
    assert block.trajectory(x, 3).shape == (3, *out.shape)


class Rotation(nn.Module):
    """A field that is not ours and has an exact answer: y(t) = R(t) y(0)."""

    def forward(self, t, y):
        return torch.stack([-y[:, 1], y[:, 0]], 1)


def rotated(x, angle):
    c, s = math.cos(angle), math.sin(angle)
    return torch.stack([c * x[:, 0] - s * x[:, 1], s * x[:, 0] + c * x[:, 1]], 1)


def rotation(**kw):
    return AugODEBlock(Rotation(), rtol=1e-10, atol=1e-10, **kw)


def assert_rotated(got, x, angles):
    want = torch.stack([rotated(x, angle) for angle in angles])
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("start", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, None], ids=str)
@pytest.mark.parametrize(
    "steps", [(0.0,), (0.5,), (0.0, 0.5, 2.0), (0.5, 2.0), (0.0, -0.5), (-0.5, -2.0)], ids=str
)
def test_eval_times(start, dtype, steps):
    """The input holds at t[0], and as many states come back as times were asked for."""
    block, x = rotation(t=(start, start + 1)), make_input()
    asked = [start + step for step in steps]
    got = block(x, asked if dtype is None else torch.tensor(asked, dtype=dtype))
    tolerance = 1e-6 if dtype == torch.float32 else 1e-8
    want = torch.stack([rotated(x, step) for step in steps])
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    if steps[0] == 0.0:
        assert torch.equal(got[0], x)


@given(
    start=st.floats(-3, 3),
    steps=st.lists(st.floats(0.01, 1), min_size=1, max_size=5),
    forwards=st.booleans(),
)
def test_any_eval_times(start, steps, forwards):
    block, x = rotation(t=(start, start + 1)), make_input()
    offsets = torch.tensor(steps, dtype=torch.float64).cumsum(0) * (1 if forwards else -1)
    assert_rotated(block(x, start + offsets), x, offsets.tolist())


def test_eval_times_of_integers():
    x = make_input()
    assert_rotated(rotation()(x, torch.arange(3)), x, [0, 1, 2])


def test_eval_times_get_gradients():
    block, x = rotation(gradient="autograd"), make_input()
    at = times(0.5, 1.5).requires_grad_()
    out = block(x, at)
    (grad,) = torch.autograd.grad(out[:, :, 0].sum(), at)
    torch.testing.assert_close(grad, -out[:, :, 1].sum(1).detach(), rtol=1e-6, atol=1e-6)


def test_trajectory():
    block, x = rotation(t=(1.0, 3.0)), make_input()
    assert_rotated(block.trajectory(x, 5), x, [0, 0.5, 1, 1.5, 2])
    torch.testing.assert_close(block(x), block.trajectory(x, 5)[-1], rtol=1e-8, atol=1e-8)


def test_t_may_be_set_anew():
    block, x = rotation(), make_input()
    block.t = (0, 2)
    assert block.t == (0.0, 2.0)
    assert_rotated(block(x)[None], x, [2])
    with pytest.raises(InvalidArgument, match="two different finite numbers"):
        block.t = (1, 1)
    assert block.t == (0.0, 2.0)


def test_stats():
    block, x = make_block(p=1), make_input()
    assert block.stats is None
    out = block(x)
    stats = block.stats
    assert (stats.method, stats.nfe) == ("dopri5", block.field.nfe)
    assert stats.accepted > 0 and stats.nfe_backward == 0
    out.sum().backward()
    assert stats is block.stats
    assert stats.nfe + stats.nfe_backward == block.field.nfe
    values = [getattr(stats, field.name) for field in dataclasses.fields(stats)]
    assert all(isinstance(value, (int, str)) for value in values)
    with torch.no_grad():
        block.trajectory(x, 3)
    assert block.stats is not stats


def test_options_reach_the_solver(seen):
    kw = {"rtol": 1e-4, "atol": 1e-5, "gradient": "autograd", "step_control": "sample"}
    block = make_block(**kw, backend="reference", method="bosh3", options={"first_step": 0.1})
    block(make_input())
    call = seen[0]
    assert {name: call[name] for name in kw} == kw
    assert (call["backend"], call["method"]) == ("reference", "bosh3")
    assert call["options"] == {"first_step": 0.1, "max_num_steps": 1000}
    assert call["func"] is block.field


def test_defaults(seen):
    AugODEBlock(MLPField(2, 4))(torch.randn(3, 2))
    call = seen[0]
    assert (call["rtol"], call["atol"], call["method"]) == (1e-3, 1e-3, "dopri5")
    assert (call["gradient"], call["step_control"]) == ("discrete", "batch")
    assert (call["backend"], call["options"]) == ("auto", {"max_num_steps": 1000})
    assert call["t"].tolist() == [0.0, 1.0]


def test_the_times_tensor_is_made_once(seen):
    block = make_block()
    block(make_input())
    block.float()(make_input().float())
    assert seen[0]["t"] is seen[1]["t"]
    assert seen[1]["t"].dtype == torch.float64


def test_step_budget():
    with pytest.raises(MaxStepsExceeded):
        make_block(max_num_steps=1, rtol=1e-9, atol=1e-9)(make_input())
    block = make_block(max_num_steps=1, rtol=1e-9, atol=1e-9, options={"max_num_steps": 500})
    assert block(make_input()).isfinite().all()


@pytest.mark.parametrize("method", ["rk4", "euler", "implicit_midpoint", "explicit_adams"])
def test_methods_without_step_budget_do_not_warn(method, seen):
    gradient = "autograd" if method == "explicit_adams" else "discrete"
    block = make_block(method=method, options={"step_size": 0.25}, gradient=gradient)
    block(make_input())  # a warning is an error here
    assert seen[0]["options"] == {"step_size": 0.25}


@pytest.mark.parametrize("gradient", ["discrete", "continuous", "autograd", "auto"])
def test_every_gradient(gradient):
    block, x = make_block(p=1, gradient=gradient, rtol=1e-9, atol=1e-9), make_input()
    exact = copy.deepcopy(block)
    exact.gradient = "autograd"
    for one in (block, exact):
        one(x).square().sum().backward()
    for a, b in zip(block.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", INPUTS)
def test_copies_and_dtypes(kind):
    """Case C43 of the public bug reports, for a block that has solved already."""
    block, x = make_block(kind, 1).float(), make_input(kind).float()
    out = block(x)
    out.sum().backward()
    other = make_block(kind, 1).float()
    other.load_state_dict(block.state_dict())
    for clone in (copy.deepcopy(block), pickle.loads(pickle.dumps(block)), other):
        assert torch.equal(clone(x), out)
        assert clone.t == block.t
    double = copy.deepcopy(block).double()(x.double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), out, rtol=1e-4, atol=1e-5)
    assert set(block.state_dict()) == {f"field.{name}" for name in block.field.state_dict()}


def test_weights_are_read_at_every_call():
    block, x = make_block(p=1), make_input()
    before = block(x).detach()
    with torch.no_grad():
        for param in block.parameters():
            param.mul_(1.5)
    fresh = make_block(p=1)
    fresh.load_state_dict(block.state_dict())
    assert torch.equal(block(x), fresh(x))
    assert not torch.allclose(block(x), before)


def test_constructors_split_their_arguments():
    block = AugODEBlock.mlp(
        2, 8, 3, num_hidden=1, activation="gelu", time_dependent=False, rtol=1e-5, t=(0, 2)
    )
    assert (
        block.field.spec()
        == MLPField(5, 8, num_hidden=1, activation="gelu", time_dependent=False).spec()
    )
    assert (block.rtol, block.t, block.augment_dim) == (1e-5, (0.0, 2.0), 3)
    block = AugODEBlock.conv((2, 4, 3), 8, 3, activation="elu", time_dependent=False, atol=1e-5)
    assert block.field.spec() == ConvField(5, 8, activation="elu", time_dependent=False).spec()
    assert (block.atol, block.augment_dim) == (1e-5, 3)
    with pytest.raises(TypeError, match="hidden_layers"):
        AugODEBlock.mlp(2, 8, hidden_layers=3)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: AugODEBlock(lambda t, y: y),
            InvalidType,
            "field is a function, want an nn.Module",
        ),
        (lambda: make_block(p=-1), InvalidArgument, "augment_dim is -1, want at least 0"),
        (lambda: make_block(p=1.0), InvalidType, "augment_dim is 1.0"),
        (lambda: make_block(t=(0.0,)), InvalidArgument, "want two numbers"),
        (lambda: make_block(t=1.0), InvalidArgument, "want two numbers"),
        (lambda: make_block(t=("a", "b")), InvalidArgument, "want two numbers"),
        (lambda: make_block(t=(0.0, math.inf)), InvalidArgument, "two different finite numbers"),
        (lambda: make_block(t=(1.0, 1.0)), InvalidArgument, "two different finite numbers"),
        (lambda: make_block(max_num_steps=0), InvalidArgument, "max_num_steps is 0"),
        (lambda: make_block(augmentation="ones"), InvalidArgument, "'ones', want 'zeros'"),
        (lambda: make_block(augmentation=None), InvalidArgument, "want 'zeros' or a module"),
        (lambda: make_block(augmentation=Lift(1)), InvalidArgument, "augment_dim is 0"),
        (lambda: AugODEBlock.mlp(0, 4, 2), InvalidArgument, "AugODEBlock.mlp: data_dim is 0"),
        (lambda: AugODEBlock.conv((1, 28), 4), InvalidArgument, "channels, height, width"),
        (
            lambda: AugODEBlock.conv((1, 0, 28), 4),
            InvalidArgument,
            r"img_size\[1\] \(height\) is 0",
        ),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("kind", "x", "error", "message"),
    [
        ("rows", [[0.0, 0.0]], InvalidType, "x is list, want a floating point tensor"),
        ("rows", torch.zeros(3, 2, dtype=torch.int64), InvalidType, "x is torch.int64"),
        ("rows", torch.zeros(3, 2, dtype=torch.complex64), InvalidType, "x is torch.complex64"),
        ("rows", torch.zeros(2), InvalidArgument, r"x has shape \(2,\), want \(batch, d\) or"),
        ("rows", torch.zeros(3, 4, 2), InvalidArgument, r"x has shape \(3, 4, 2\)"),
        ("rows", torch.zeros(3, 3), InvalidArgument, "augment_dim=1 and field.dim=3"),
        ("rows", torch.zeros(3, 2, 4, 3), InvalidArgument, r"want \(batch, d\) with"),
        ("images", torch.zeros(3, 3, 4, 3), InvalidArgument, "augment_dim=1 and field.channels=3"),
        ("images", torch.zeros(3, 2), InvalidArgument, r"want \(batch, d, height, width\) with"),
        (
            "rows",
            torch.zeros(3, 2),
            InvalidType,
            "torch.float32, but the weights are torch.float64",
        ),
    ],
)
def test_bad_inputs(kind, x, error, message):
    block = make_block(kind, 1)
    with pytest.raises(error, match=message):
        block(x)
    assert block.stats is None


@pytest.mark.parametrize(
    ("eval_times", "error", "message"),
    [
        ("now", InvalidType, "eval_times is 'now'"),
        (0.5, InvalidArgument, r"shape \(\), want one dim"),
        ([], InvalidArgument, "at least one time"),
        ([[0.5]], InvalidArgument, r"shape \(1, 1\)"),
        ([0.5, 0.5], InvalidArgument, "strictly increasing or decreasing"),
        ([0.5, 1.0, 0.7], InvalidArgument, "strictly increasing or decreasing"),
        ([-0.5, 0.5], InvalidArgument, r"on one side of the start self.t\[0\]=0.0"),
        ([0.5, math.nan], InvalidArgument, "strictly increasing or decreasing"),
        ([0.5, math.inf], InvalidArgument, "finite"),
        (torch.tensor([True]), InvalidType, "eval_times is"),
        (torch.tensor([1j]), InvalidType, "eval_times is"),
    ],
)
def test_bad_eval_times(eval_times, error, message):
    with pytest.raises(error, match=message):
        make_block()(make_input(), eval_times)


@pytest.mark.parametrize(("timesteps", "error"), [(1, InvalidArgument), (2.5, InvalidType)])
def test_bad_timesteps(timesteps, error):
    with pytest.raises(error, match="timesteps"):
        make_block().trajectory(make_input(), timesteps)


@pytest.mark.parametrize("extra", [lambda x: x, lambda x: x[:1, :1], lambda x: None])
def test_bad_augmentation_values(extra):
    block = make_block(p=1, augmentation=extra)
    with pytest.raises(InvalidArgument, match=r"augmentation made .* want \(4, 1\)"):
        block(make_input())


def test_a_field_of_another_kind_is_not_second_guessed():
    field = Rotation()
    field.dim = 99  # whatever it means there
    assert AugODEBlock(field)(make_input()).shape == (4, 2)


def test_repr_says_what_matters():
    text = repr(make_block(p=2, method="bosh3"))
    assert "augment_dim=2" in text and "'bosh3'" in text and "activation='tanh'" in text
