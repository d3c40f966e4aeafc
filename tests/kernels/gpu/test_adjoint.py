"""kernels/gpu/adjoint.py: the discrete gradient, where test_runge_kutta.py does not see it."""

import dataclasses

import pytest
import torch
import triton

from anode_fast import odeint, odeint_adjoint
from anode_fast.kernels.gpu import adjoint, host, solve
from tests.helpers import assert_no_worse
from tests.kernels.gpu.solves import MANY_SCALES, Case, compare, f32, f64, solved, times

CASE = Case(gain=2.0, t=(0.0, 0.3, 1.0), seed=3)
# Few steps, one of them refused; the output at 0.3 is inside one.
CHOSEN = dict(method="bosh3", options={"first_step": 0.7, "min_step": 0.2})
CONTROLS = {
    "fixed": dict(method="heun3", options={"step_size": 0.5}),
    "batch": CHOSEN,
    "sample": CHOSEN | dict(step_control="sample"),
}
every_control = pytest.mark.parametrize("control", CONTROLS)


@pytest.fixture
def kept(monkeypatch):
    """Whether each solve kept checkpoints."""
    forward, found = solve.Solve.forward, []

    def spy(self, *args):
        result = forward(self, *args)
        found.append(result[2] is not None)
        return result

    monkeypatch.setattr(solve.Solve, "forward", spy)
    return found


def assert_equal(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=0)


WANTED = {
    "all": None,
    "the state's": ["d_x"],
    "the first weight's": ["d_layers.0.weight"],
    "some": ["d_x", "d_layers.0.bias", "d_layers.1.weight"],
    "none": [],
}


@every_control
@pytest.mark.parametrize("wanted", WANTED)
def test_what_is_wanted(control, wanted, device, kept):
    given = dict(wanted=WANTED[wanted]) | CONTROLS[control]
    _, stats = compare(CASE, f64, device, MANY_SCALES, **given)
    assert kept == [wanted != "none"]
    assert bool(stats.nfe_backward) == kept[0]
    assert stats.rejected or control == "fixed"


@every_control
@pytest.mark.parametrize("output", range(3))
def test_gradient_of_one_output(control, output, device):
    given = dict(output=output) | CONTROLS[control]
    got, _ = compare(CASE, f64, device, MANY_SCALES, **given)
    if output == 0:
        assert_equal(got["d_x"], CASE.random(3, 5, 3)[0].to(device))
        assert not any(value.any() for name, value in got.items() if name not in ("y", "d_x"))


@every_control
def test_programs_with_several_tiles(control, device, monkeypatch):
    monkeypatch.setattr(host, "most_programs", lambda device, warps: 2)
    case = dataclasses.replace(CASE, rows=40)
    compare(case, f64, device, MANY_SCALES, **CONTROLS[control])


@every_control
def test_twice_the_same(control, device):
    case = dataclasses.replace(CASE, rows=17)
    first, again = (solved(case, f32, device, **CONTROLS[control])[0] for _ in range(2))
    assert_equal(again, first)


def call(control, device, **given):
    """Field, leaf and solution."""
    field, (leaf, x) = CASE.field(f64, device), CASE.state(f64, device)
    leaf.requires_grad_()
    given = dict(rtol=1e-3, atol=1e-3, backend="triton") | CONTROLS[control] | given
    return field, leaf, odeint(field, x(), times(*CASE.t), **given)


@every_control
def test_backward_twice(control, device):
    field, leaf, y = call(control, device)
    wanted = [leaf, *field.parameters()]
    first = torch.autograd.grad(y.sum(), wanted, retain_graph=True)
    evaluations = field.nfe
    assert_equal(torch.autograd.grad(y.sum(), wanted), first)
    assert field.nfe - evaluations == y.grad_fn.call.stats.nfe_backward


@every_control
def test_weights_changed_before_backward(control, device):
    field, _, y = call(control, device)
    with torch.no_grad():
        field.layers[1].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@every_control
def test_second_derivatives(control, device):
    def found(**given):
        field, leaf, y = call(control, device, **given)
        wanted = [leaf, *field.parameters()]
        cotangent = CASE.random(*y.shape).to(device)
        first = torch.autograd.grad(y, wanted, cotangent, create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        second = torch.autograd.grad(penalty, wanted, materialize_grads=True)
        return *(g.detach() for g in first), *second

    # The kernels leave them to the reference path.
    for got, want in zip(found(), found(backend="reference", gradient="autograd"), strict=True):
        if device.type == "cpu":
            assert_equal(got, want)
        else:  # cuBLAS rounds as it likes
            error = (got - want).abs().max()
            assert error <= 32 * torch.finfo(f64).eps * want.abs().max()


@pytest.mark.parametrize("method", ["heun3", "rk4"])
def test_odeint_adjoint_with_fixed_steps_solves_once_more(method, device, kept):
    options = {"step_size": 0.5}
    _, stats = compare(CASE, f64, device, call=odeint_adjoint, method=method, options=options)
    assert kept == [False, True]
    assert stats.nfe_backward == 2 * stats.nfe > 0


@pytest.mark.parametrize("control", ["batch", "sample"])
def test_odeint_adjoint_keeps_the_steps_it_chose(control, device, kept):
    compare(CASE, f64, device, MANY_SCALES, call=odeint_adjoint, **CONTROLS[control])
    assert kept == [True]


@pytest.mark.parametrize("programs", [0, 1, 31, 100])
def test_sums_of_programs(programs, device):
    count = 100
    sums = torch.randn(programs, count, device=device)
    out, again = (torch.full((count,), float("nan"), device=device) for _ in range(2))
    grid = (triton.cdiv(count, adjoint.BLOCK.value),)
    for found in (out, again):
        adjoint.reduce[grid](sums=sums, out=found, programs=programs, WEIGHTS=count)
    assert_no_worse(out, sums.sum(0), sums.double().sum(0), "sum")
    assert_equal(again, out)
