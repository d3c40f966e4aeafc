"""torch.func: transforms of a solve give what loops and finite differences give."""

import functools

import pytest
import torch
from torch import nn
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)

from anode_fast import AugODEBlock, ConvField, MLPField, explain, odeint, odeint_adjoint

f64 = torch.float64
T = torch.tensor([0.0, 0.4, 1.0], dtype=f64)
TIGHT = dict(rtol=1e-9, atol=1e-9)

# torch itself, when forward-mode differentiation is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script")

GIVEN = {
    "odeint": (odeint, TIGHT),
    "discrete": (odeint, dict(gradient="discrete", **TIGHT)),
    "continuous": (odeint, dict(gradient="continuous", **TIGHT)),
    "odeint_adjoint": (odeint_adjoint, TIGHT),
    "fixed": (odeint, dict(method="rk4", options={"step_size": 0.1})),
    "fixed adjoint": (odeint_adjoint, dict(method="rk4", options={"step_size": 0.1})),
    "by row": (odeint, dict(step_control="sample", **TIGHT)),
}
BATCH = {name: given for name, given in GIVEN.items() if name != "by row"}

every_kind = pytest.mark.parametrize("kind", ["rows", "images", "own"])


class Own(nn.Module):
    """A user's field."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, t, y):
        return self.net(torch.cat([y, t.expand_as(y[..., :1])], -1))


def case(kind):
    """A field and a state."""
    if kind == "images":
        return ConvField(2, 4, activation="tanh").double(), torch.randn(2, 2, 3, 4, dtype=f64)
    field = Own() if kind == "own" else MLPField(3, 8, activation="tanh")
    return field.double(), torch.randn(3, 3, dtype=f64)


def last(field, given, x):
    solve, settings = given
    return solve(field, x, T, **settings)[-1]


def close(got, want, tolerance=1e-6):
    scale = want.abs().max().item()
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance * scale)


def by_differences(f, x, v, h=1e-4):
    """The derivative of f at x in the direction v."""
    return (8 * (f(x + h * v) - f(x - h * v)) - f(x + 2 * h * v) + f(x - 2 * h * v)) / (12 * h)


@every_kind
@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
def test_derivatives(kind, given):
    field, x = case(kind)
    f = functools.partial(last, field, given)
    v, w = torch.randn_like(x), torch.randn_like(x)
    with torch.no_grad():
        along = by_differences(f, x, v)
    value, tangent = jvp(f, (x,), (v,))
    close(value, f(x))
    close(tangent, along)
    close((vjp(f, x)[1](w)[0] * v).sum(), (w * along).sum(), 1e-5)
    close(grad(lambda x: (w * f(x)).sum())(x).mul(v).sum(), (w * along).sum(), 1e-5)
    dims = x.dim()
    for jacobian in (jacrev, jacfwd):
        close(torch.tensordot(jacobian(f)(x), v, dims), along)


@pytest.mark.parametrize("kind", ["rows", "own"])
def test_hessian(kind):
    field, x = case(kind)

    def loss(x):
        return last(field, GIVEN["discrete"], x).square().sum()

    v = torch.randn_like(x)
    close(torch.tensordot(hessian(loss)(x), v, 2), by_differences(grad(loss), x, v), 1e-5)


@every_kind
@pytest.mark.parametrize("given", BATCH.values(), ids=BATCH)
def test_vmap(kind, given):
    field, x = case(kind)
    f, batch = functools.partial(last, field, given), torch.stack([x, 2 * x, -x, 0 * x])
    close(vmap(f)(batch), torch.stack([f(x) for x in batch]))
    moved = batch.movedim(0, -1)
    close(vmap(f, in_dims=-1, out_dims=1)(moved), torch.stack([f(x) for x in batch], 1))
    nested = vmap(vmap(f))(torch.stack([batch, batch.flip(0)]))
    close(nested[1].flip(0), nested[0])


def test_vmap_takes_the_steps_of_the_most_demanding_example():
    field, x = case("own")
    evaluations = []

    def counted(t, y):
        evaluations.append(t)
        return field(t, y)

    counts = []
    examples = torch.stack([0 * x, 5 * x])
    solve = functools.partial(odeint, counted, t=T)
    for call in (lambda: solve(examples[1]), lambda: vmap(solve)(examples)):
        evaluations.clear()
        call()
        counts.append(len(evaluations))
    assert counts[1] >= counts[0] > 20


def test_vmap_over_a_tuple_state():
    a = torch.randn(5, 2, dtype=f64)

    def solve(x):
        y = odeint(lambda t, y: (-y[0], y[0] * y[1]), (x, x + 1), T, **TIGHT)
        return torch.cat([part[-1] for part in y])

    close(vmap(solve)(a), torch.stack([solve(x) for x in a]))


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_vmap_and_values_that_are_not_finite(method):
    options = dict(options={"step_size": 0.25}) if method == "rk4" else {}
    x = torch.ones(3, 2, dtype=f64)

    def solve(x):
        return odeint(lambda t, y: y * float("nan"), x, T, method=method, **options)

    with pytest.raises(RuntimeError, match="non-finite values in state"):
        vmap(solve)(x)
    with pytest.raises(RuntimeError, match="non-finite values in state y0: nan among 6 of 6"):
        vmap(solve)(x * float("nan"))


@every_kind
def test_gradients_per_sample(kind):
    field, x = case(kind)
    block = AugODEBlock(field, **TIGHT)  # discrete gradients, if it were to choose
    weights = dict(block.named_parameters())
    samples = torch.stack([x, 2 * x, -x])

    def loss(weights, x):
        return functional_call(block, weights, (x,)).square().sum()

    got = vmap(grad(loss), in_dims=(None, 0))(weights, samples)
    for i, sample in enumerate(samples):
        want = torch.autograd.grad(block(sample).square().sum(), list(weights.values()))
        for name, value in zip(weights, want, strict=True):
            close(got[name][i], value, 1e-5)


@every_kind
def test_an_ensemble(kind):
    blocks = [AugODEBlock(case(kind)[0], **TIGHT) for _ in range(3)]
    x = case(kind)[1]
    weights, buffers = stack_module_state(blocks)

    def solve(weights, buffers, x):
        return functional_call(blocks[0], (weights, buffers), (x,))

    got = vmap(solve, in_dims=(0, 0, None))(weights, buffers, x)
    close(got, torch.stack([block(x) for block in blocks]))


@pytest.mark.parametrize("kind", ["rows", "images"])
def test_functional_call_is_fused(kind):
    """Plain tensors in the place of the weights: the kernels read them."""
    field, x = case(kind)
    block = AugODEBlock(field, **TIGHT)
    block(x)
    others = {name: 0.5 * p.detach() for name, p in block.named_parameters()}
    for p in others.values():
        p.requires_grad_()
    y = functional_call(block, others, (x,))
    assert block.stats.backend == "cpu"
    got = torch.autograd.grad(y.square().sum(), list(others.values()))
    with torch.no_grad():
        for name, p in block.named_parameters():
            p.copy_(others[name])
    want = block(x)
    assert torch.equal(y, want)
    for g, w in zip(
        got, torch.autograd.grad(want.square().sum(), list(block.parameters())), strict=True
    ):
        assert torch.equal(g, w)


def test_functional_call_of_tensors_made_of_others():
    """A hypernetwork: the gradient goes on to what the weights are made of."""
    field, x = case("rows")
    block, scale = AugODEBlock(field, **TIGHT), torch.tensor(0.7, dtype=f64, requires_grad=True)

    def loss(scale):
        weights = {name: scale * p.detach() for name, p in block.named_parameters()}
        return functional_call(block, weights, (x,)).square().sum()

    (got,) = torch.autograd.grad(loss(scale), scale)
    assert block.stats.backend == "cpu"
    with torch.no_grad():
        close(got, by_differences(loss, scale, torch.ones_like(scale)), 1e-5)


def test_explain_says_why():
    field, x = case("rows")
    texts = []

    def look(x):
        texts.append(explain(field, x, T, gradient="discrete"))
        return x.sum()

    grad(look)(x)
    assert "backend: not cpu: it runs under a torch.func transform" in texts[0]
    assert "gradient: autograd" in texts[0]
    assert "takes the solver's operations one by one" in texts[0]
