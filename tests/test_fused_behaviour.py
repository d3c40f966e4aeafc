"""Solves by the CPU kernels: what surrounds the numbers.

Which calls they take and which they leave, that a remembered call is carried out as its first one
was, errors, bookkeeping, autograd's corners, threads, forks and memory.
"""

import contextlib
import copy
import functools
import gc
import hashlib
import math
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad, functional
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize

from anode_fast import AugODEBlock, MLPField, explain, fused, odeint, odeint_adjoint
from anode_fast.errors import (
    InvalidArgument,
    MaxStepsExceeded,
    NonFiniteState,
    SolverError,
    StepSizeUnderflow,
)
from anode_fast.kernels.cpu import library
from anode_fast.stats import SolveStats, Status

if library.missing():
    pytest.skip(library.missing(), allow_module_level=True)

f32, f64 = torch.float32, torch.float64
ROOT = Path(__file__).parents[1]


def times(*values, dtype=f64):
    return torch.tensor(values, dtype=dtype)


T = times(0.0, 0.4, 1.0)
BATCH = dict(rtol=1e-5, atol=1e-5)
CONTROLS = {
    "batch": BATCH,
    "sample": BATCH | dict(step_control="sample"),
    "fixed": dict(method="rk4", options={"step_size": 0.25}),
}
GRADIENTS = CONTROLS | {
    "continuous": BATCH | dict(gradient="continuous"),
    "continuous, fixed": CONTROLS["fixed"] | dict(gradient="continuous"),
}

every_control = pytest.mark.parametrize("given", CONTROLS.values(), ids=CONTROLS)
every_gradient = pytest.mark.parametrize("given", GRADIENTS.values(), ids=GRADIENTS)
both_calls = pytest.mark.parametrize("remembered", [False, True], ids=["first call", "remembered"])
both_directions = pytest.mark.parametrize("t", [T, T.flip(0)], ids=["forwards", "backwards"])


@pytest.fixture(autouse=True)
def _nothing_remembered():
    fused._remembered.clear()


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def a_field(dim=3, hidden=8, dtype=f64, **given):
    return MLPField(dim, hidden, **{"activation": "tanh", **given}).to(dtype)


def a_state(rows=5, dim=3, dtype=f64):
    return torch.randn(rows, dim, dtype=f64).to(dtype).requires_grad_()


def solved(field, x, t=T, solve=odeint, backend="auto", **given):
    """Solution and stats. "auto" has to mean the kernels."""
    y, stats = solve(field, x, t, backend=backend, return_stats=True, **given)
    assert stats.backend == ("reference" if backend == "reference" else "cpu")
    return y, stats


def left_to_reference(field, x, t=T, solve=odeint, **given):
    """The solution of a call that the kernels leave to the reference path."""
    y, stats = solve(field, x, t, return_stats=True, **given)
    assert stats.backend == "reference"
    return y


def remember(field, x, t=T, **given):
    """Lets the next call like this one be a remembered one."""
    before = len(fused._remembered)
    odeint(field, x.detach(), t, **given)
    assert len(fused._remembered) == before + 1


def gradients(y, wanted, **given):
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=f64)
    return torch.autograd.grad(y, wanted, cotangent.to(y.dtype), **given)


def solution_and_gradients(field, x, t=T, **given):
    y, _ = solved(field, x, t, **given)
    return y.detach(), *gradients(y, [x, *field.parameters()])


def assert_close(got, want, rtol=1e-8):
    torch.testing.assert_close(got, want, rtol=rtol, atol=rtol)


def assert_equal(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def reference(field, x, t=T, **given):
    return odeint(field, x, t, backend="reference", gradient="autograd", **given)


def reference_gradients(field, x, t=T, **given):
    return gradients(reference(field, x, t, **given), [x, *field.parameters()])


# --- the field as it is now -----------------------------------------------------------------------


@both_calls
@pytest.mark.parametrize("columns", [3, 7])
def test_state_of_another_width(columns, remembered):
    field = MLPField(5, 8)
    if remembered:
        remember(field, torch.randn(4, 5))
    with pytest.raises(InvalidArgument, match=r"MLPField: the state has shape \(4, "):
        odeint(field, torch.randn(4, columns), T)


@both_calls
@pytest.mark.parametrize("columns", [1, 5])
def test_input_of_another_width(columns, remembered):
    block = AugODEBlock(MLPField(5, 8), augment_dim=2)
    if remembered:
        block(torch.randn(4, 3))
        assert fused._remembered
    with pytest.raises(InvalidArgument, match="AugODEBlock: x has shape"):
        block(torch.randn(4, columns))


def narrower(field):
    field.layers[1], field.layers[2] = nn.Linear(8, 6), nn.Linear(6, 3)


def shallower(field):
    field.layers = nn.ModuleList([field.layers[0], field.layers[2]])


@both_calls
@pytest.mark.parametrize("change", [narrower, shallower])
def test_layers_of_other_shapes(change, remembered):
    field, x = a_field(dtype=f32), a_state(dtype=f32)
    if remembered:
        remember(field, x)
    change(field)
    assert_close(left_to_reference(field, x), reference(field, x), 1e-4)


@both_calls
def test_forward_set_on_the_instance(remembered):
    field, x = a_field(), a_state()
    if remembered:
        remember(field, x)
    field.forward = lambda t, y: -y
    assert_close(left_to_reference(field, x)[-1], x * math.exp(-1), 1e-6)


def test_layer_without_bias():
    field, x = a_field(time_dependent=False), a_state()
    remember(field, x)
    field.layers[1].bias = None
    assert_equal(left_to_reference(field, x), reference(field, x))


@both_calls
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("everywhere", [False, True], ids=["of the field", "of every module"])
def test_hooks_run(register, everywhere, remembered):
    field, x = a_field(), a_state()
    if remembered:
        remember(field, x)
    calls = []
    if everywhere:
        register = getattr(nn.modules.module, register.replace("register", "register_module"))
    else:
        register = getattr(field, register)
    handle = register(lambda *args: calls.append(args[0]))
    try:
        left_to_reference(field, x)
    finally:
        handle.remove()
    assert calls and calls[0] is field
    solved(field, x)


@pytest.mark.parametrize("name", ["callback_step", "callback_accept_step", "callback_reject_step"])
def test_callbacks_fall_back(name):
    field, x = a_field(), a_state()
    remember(field, x)
    calls = []
    setattr(field, name, lambda *args: calls.append(args))
    left_to_reference(field, x, options={"first_step": 0.9})
    assert calls


def test_subclass_is_not_its_base():
    class Scaled(MLPField):
        def forward(self, t, y):
            return 2 * super().forward(t, y)

    x = a_state()
    twice, once = Scaled(3, 8).double(), MLPField(3, 8).double()
    once.load_state_dict(twice.state_dict())
    remember(once, x)
    y = odeint(twice, x, T)
    assert_close(y[-1], reference(lambda t, y: 2 * once(t, y), x)[-1])


def test_other_weights():
    field, x = a_field(), a_state()
    remember(field, x)
    before, _ = solved(field, x)
    with torch.no_grad():
        field.layers[0].weight.mul_(2)
    field.layers[1].weight = nn.Parameter(3 * field.layers[1].weight.detach())
    after, _ = solved(field, x)
    assert (after - before).abs().max() > 1e-3
    assert_close(after, reference(field, x))


def test_other_activation():
    field, x = a_field(), a_state()
    remember(field, x)
    field.activation = "relu"
    assert_close(solved(field, x)[0], reference(field, x))


@both_calls
def test_parametrization(remembered):
    field, x = a_field(), a_state()
    if remembered:
        remember(field, x)
    parametrizations.weight_norm(field.layers[1])
    y, _ = solved(field, x)
    assert_close(y, reference(field, x))
    assert_close(gradients(y, [x, *field.parameters()]), reference_gradients(field, x))


def test_other_dtype():
    field, x = a_field(dtype=f32), a_state(dtype=f32)
    remember(field, x)
    field.double()
    x = a_state()
    y, _ = solved(field, x)
    assert y.dtype == f64
    assert_close(y, reference(field, x))


class Solving(nn.Module):
    def __init__(self, field):
        super().__init__()
        self.field = field

    def forward(self, x, **given):
        return odeint(self.field, x, T, **given)


def other_parameters(field):
    return {f"field.{name}": torch.randn_like(p) for name, p in field.named_parameters()}


@both_calls
def test_functional_call(remembered):
    field, x = a_field(), a_state()
    if remembered:
        remember(field, x)
    parameters = {name: p.requires_grad_() for name, p in other_parameters(field).items()}

    def found(**given):
        y = functional_call(Solving(field), parameters, (x,), given)
        return y.detach(), *gradients(y, [x, *parameters.values()])

    assert_close(found(backend="cpu"), found(backend="reference"))


# --- what the stats and the field say -------------------------------------------------------------


@every_control
def test_stats(given):
    field, x = a_field(), a_state()
    for _ in range(2):  # the first call and a remembered one
        field.nfe = 0
        y, stats = solved(field, x, **given)
        _, ref = solved(copy.deepcopy(field), x, backend="reference", **given)
        assert field.nfe == stats.nfe == ref.nfe > 0
        assert (stats.accepted, stats.rejected) == (ref.accepted, ref.rejected)
        assert (stats.method, stats.status) == (given.get("method", "dopri5"), Status.SUCCESS)
        assert (stats.launches, stats.nfe_backward) == (1, 0)
        y.sum().backward()
        assert stats.launches == 2
        assert field.nfe == stats.nfe + stats.nfe_backward


@pytest.mark.parametrize("rows", [5, 500], ids=["with records", "made again"])
def test_evaluations_of_the_backward_pass(rows):
    field, x = a_field(hidden=40), a_state(rows)
    y, stats = solved(field, x, rtol=1e-9, atol=1e-9)
    before = field.nfe
    y.sum().backward()
    assert field.nfe == before + stats.nfe_backward
    assert (stats.nfe_backward > 0) == (rows == 500)


@both_calls
def test_fixed_steps_made_again_count(remembered):
    field, x = a_field(), a_state()
    for _ in range(1 + remembered):
        field.nfe = 0
        y, stats = solved(field, x, solve=odeint_adjoint, **CONTROLS["fixed"])
        assert field.nfe == stats.nfe == 16
        y.sum().backward()
        assert stats.nfe_backward >= stats.nfe
        assert field.nfe == stats.nfe + stats.nfe_backward


@pytest.mark.parametrize("create_graph", [False, True])
def test_one_output_time(create_graph):
    field, x = a_field(), a_state()
    y, stats = odeint(field, x, times(0.3), return_stats=True)
    assert stats == SolveStats("reference", "dopri5")
    assert_equal(y, x[None])
    grads = torch.autograd.grad(y.sum(), x, create_graph=create_graph)
    assert_equal(grads[0].detach(), torch.ones_like(x))
    assert field.nfe == 0


@every_control
def test_which_gradients_are_wanted(given):
    field, x = a_field(), a_state()
    want = reference_gradients(field, x, **given)
    field.layers[0].requires_grad_(False)
    field.layers[2].bias.requires_grad_(False)
    for _ in range(2):
        y, _ = solved(field, x, **given)
        grads = [x, *(p for p in field.parameters() if p.requires_grad)]
        assert_close(gradients(y, grads), [want[0], *want[3:6]])
        y, _ = solved(field, x.detach(), **given)
        assert_close(gradients(y, grads[1:]), want[3:6])
    y, _ = solved(field, x, **given)
    y.sum().backward()
    got = [p.grad is None for p in field.parameters()]
    assert got == [not p.requires_grad for p in field.parameters()]
    field.requires_grad_(False)
    y, _ = solved(field, x, **given)
    assert_close(gradients(y, [x]), want[:1])
    assert not solved(field, x.detach(), **given)[0].requires_grad


@every_gradient
def test_without_grad(given):
    field, x = a_field(), a_state()
    want = solved(field, x, **given)[0].detach()
    for _ in range(2):
        with torch.no_grad():
            y, _ = solved(field, x, **given)
        assert not y.requires_grad
        assert_equal(y, want)
        with torch.inference_mode():
            y, _ = solved(field, x, **given)
        assert y.is_inference()
        assert_equal(y, want)


first_use_of_forward_mode = pytest.mark.filterwarnings("ignore:.*torch.jit.script")


@first_use_of_forward_mode
@pytest.mark.parametrize("transform", ["grad", "jacrev", "jvp"])
def test_transforms_fall_back(transform):
    field, x = a_field(), a_state().detach()
    remember(field, x)

    def last(x, **given):
        return odeint(field, x, T, **given)[-1]

    def transformed(**given):
        solve = functools.partial(last, **given)
        if transform == "grad":
            return torch.func.grad(lambda x: solve(x).square().sum())(x)
        if transform == "jacrev":
            return torch.func.jacrev(solve)(x)
        return torch.func.jvp(solve, (x,), (torch.ones_like(x),))[1]

    assert_close(transformed(), transformed(backend="reference"), 1e-6)


@first_use_of_forward_mode
def test_forward_mode_falls_back():
    field, x = a_field(), a_state().detach()
    remember(field, x)
    with forward_ad.dual_level():
        y = left_to_reference(field, forward_ad.make_dual(x, torch.ones_like(x)))
        tangent = forward_ad.unpack_dual(y[-1]).tangent
    jacobian = functional.jacobian(lambda x: odeint(field, x, T)[-1], x)
    assert_close(tangent, jacobian.sum((2, 3)), 1e-6)


@pytest.mark.parametrize("name", ["method", "backend", "step_control", "gradient"])
def test_unhashable_arguments(name):
    with pytest.raises(InvalidArgument, match=f"{name}"):
        odeint(a_field(), a_state(), T, **{name: ["dopri5"]})


# --- warnings -------------------------------------------------------------------------------------


def test_unknown_options_warn_at_every_call():
    field, x = a_field(), a_state()
    for _ in range(3):
        with pytest.warns(UserWarning, match="unexpected options are ignored: stepsize") as record:
            solved(field, x, options={"stepsize": 0.1})
        assert len(record) == 1 and record[0].filename == __file__


def test_one_single_step_warns_at_every_call():
    field, x = a_field(), a_state()
    for _ in range(3):
        with pytest.warns(UserWarning, match="it takes one single step") as record:
            solved(field, x, times(0.0, 1.0), method="rk4")
        assert len(record) == 1 and record[0].filename == __file__


@pytest.mark.parametrize("augment_dim", [0, 1])
def test_warnings_of_a_block_point_at_its_caller(augment_dim):
    block = AugODEBlock(a_field(), augment_dim, options={"stepsize": 0.1})
    for _ in range(2):
        with pytest.warns(UserWarning, match="unexpected options") as record:
            block(a_state(dim=3 - augment_dim))
        assert [warning.filename for warning in record] == [__file__]


# --- bitwise --------------------------------------------------------------------------------------

both_dtypes = pytest.mark.parametrize("dtype", [f32, f64], ids=["float32", "float64"])


@both_dtypes
@every_gradient
def test_twice_the_same(given, dtype):
    field, x = a_field(hidden=20, dtype=dtype), a_state(100, dtype=dtype)
    first = solution_and_gradients(field, x, **given)
    assert_equal(solution_and_gradients(field, x, **given), first)


@both_dtypes
@every_gradient
def test_number_of_threads_does_not_matter(given, dtype, set_threads):
    field, x = a_field(hidden=20, dtype=dtype), a_state(1000, dtype=dtype)
    set_threads(1)
    want = solution_and_gradients(field, x, **given)
    set_threads(2)
    for _ in range(3):
        assert_equal(solution_and_gradients(field, x, **given), want)


@both_dtypes
def test_rows_do_not_depend_on_their_place(dtype):
    field, x = a_field(dtype=dtype), a_state(150, dtype=dtype)
    given = CONTROLS["sample"]
    y, _ = solved(field, x, **given)
    slope = torch.autograd.grad(y.sum(), x)[0]
    some = [torch.randperm(150), torch.tensor([149]), torch.arange(3, 92), torch.tensor([7] * 9)]
    for rows in some:
        moved = x.detach()[rows].requires_grad_()
        z, _ = solved(field, moved, **given)
        assert_equal(z, y[:, rows])
        assert_equal(torch.autograd.grad(z.sum(), moved)[0], slope[rows])


# --- stale memory ---------------------------------------------------------------------------------


def digests():
    """Of solution and gradients of each kind of solve."""
    torch.manual_seed(7)
    found = {}
    for name, given in GRADIENTS.items():
        field, x = a_field(hidden=20, dtype=f32), a_state(70, dtype=f32)
        tensors = solution_and_gradients(field, x, **given)
        data = b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)
        found[name] = hashlib.sha256(data).hexdigest()
    return found


def in_a_fresh_process(code, timeout=120):
    """What the code prints, run with this module's names."""
    head = "from tests.test_fused_behaviour import *\n"
    command = [sys.executable, "-W", "error", "-c", head + textwrap.dedent(code)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_earlier_solves_leave_no_trace():
    torch.manual_seed(3)
    for _, given in 3 * list(GRADIENTS.items()):
        field, x = a_field(hidden=20, dtype=f32), a_state(70, dtype=f32)
        y, _ = solved(field, x, **given)
        (y * math.nan).sum().backward() if "continuous" not in str(given) else None
        with torch.no_grad():
            field.layers[1].weight.fill_(math.nan)
        with pytest.raises(NonFiniteState):
            solved(field, x, **given)
    fresh = in_a_fresh_process("torch.set_num_threads(1); print(digests())")
    assert str(digests()) == fresh.strip()


# --- derivatives of gradients ---------------------------------------------------------------------


def second_derivatives(solve, wanted):
    """First derivatives of a functional of solve(), and those of a functional of them."""
    y = solve()
    first = gradients(y, wanted, create_graph=True)
    penalty = sum(g.square().sum() for g in first)
    return *first, *torch.autograd.grad(penalty, wanted, materialize_grads=True)


def compare_second_derivatives(field, make_state, wanted, **given):
    plain = {name: value for name, value in given.items() if name != "gradient"}
    got = second_derivatives(lambda: solved(field, make_state(), **given)[0], wanted)
    want = second_derivatives(lambda: reference(field, make_state(), **plain), wanted)
    assert_close(got, want)


@both_calls
@both_directions
@every_gradient
def test_second_derivatives(given, t, remembered):
    field, x = a_field(), a_state()
    if remembered:
        remember(field, x, t, **given)
    compare_second_derivatives(field, lambda: x, [x, *field.parameters()], t=t, **given)


@every_control
def test_second_derivatives_of_a_parametrized_layer(given):
    field, x = a_field(), a_state()
    parametrizations.weight_norm(field.layers[1])
    compare_second_derivatives(field, lambda: x, [x, *field.parameters()], **given)


@every_control
def test_second_derivatives_with_a_tied_layer(given):
    field, x = a_field(num_hidden=3), a_state()
    field.layers[2].weight = field.layers[1].weight
    y, _ = solved(field, x, **given)
    wanted = [x, *field.parameters()]
    assert_close(gradients(y, wanted), reference_gradients(field, x, **given))
    compare_second_derivatives(field, lambda: x, wanted, **given)


class Doubled(nn.Module):
    def __init__(self, other):
        super().__init__()
        self.other = [other]

    def forward(self, weight):
        return weight + 2 * self.other[0].weight


@pytest.mark.parametrize("of", ["the state", "a weight"])
@every_control
def test_second_derivatives_where_an_input_is_made_of_another(given, of):
    field, x = a_field(num_hidden=3), a_state()
    if of == "a weight":
        parametrize.register_parametrization(field.layers[2], "weight", Doubled(field.layers[1]))

    def make_state():
        return x * field.layers[1].weight[0, 0] if of == "the state" else x

    compare_second_derivatives(field, make_state, [x, *field.parameters()], **given)


@every_control
def test_second_derivatives_after_functional_call(given):
    field, x = a_field(), a_state()
    parameters = {name: p.requires_grad_() for name, p in other_parameters(field).items()}

    def solve(**more):
        return functional_call(Solving(field), parameters, (x,), {**given, **more})

    wanted = [x, *parameters.values()]
    got = second_derivatives(functools.partial(solve, backend="cpu"), wanted)
    want = second_derivatives(
        functools.partial(solve, backend="reference", gradient="autograd"), wanted
    )
    assert_close(got, want)


def test_second_derivatives_with_times_changed_since():
    field, x, t = a_field(), a_state(), T.clone()
    y, _ = solved(field, x, t)
    t.mul_(2)
    (got,) = gradients(y, [x], create_graph=True)
    assert_close(got, reference_gradients(field, x)[0], 1e-6)


@every_control
def test_products_with_hessian_and_jacobian(given):
    field, x = a_field(), a_state().detach()
    v = torch.randn_like(x)

    def found(**more):
        def solve(x):
            return odeint(field, x, T, **given, **more)[-1]

        def loss(x):
            return solve(x).square().sum()

        return functional.hvp(loss, x, v)[1], functional.jvp(solve, x, v)[1]

    assert_close(found(backend="cpu"), found(backend="reference", gradient="autograd"))


@every_control
def test_batched_gradients(given):
    field, x = a_field(), a_state()
    wanted = [x, *field.parameters()]
    y, _ = solved(field, x, **given)
    cotangents = torch.randn(4, *y.shape, dtype=f64)
    one_by_one = [torch.autograd.grad(y, wanted, v, retain_graph=True) for v in cotangents]
    got = torch.autograd.grad(y, wanted, cotangents, is_grads_batched=True)
    assert_close(got, tuple(torch.stack(grads) for grads in zip(*one_by_one, strict=True)))


@every_control
@pytest.mark.parametrize("create_graph", [False, True])
def test_vectorized_jacobian(given, create_graph):
    field, x = a_field(), a_state()

    def last(x, **more):
        return odeint(field, x, T, **given, **more)[-1]

    got = functional.jacobian(
        functools.partial(last, backend="cpu"), x, vectorize=True, create_graph=create_graph
    )
    assert_close(got, functional.jacobian(functools.partial(last, backend="reference"), x))


# --- the backward pass ----------------------------------------------------------------------------


@every_gradient
def test_backward_twice(given):
    field, x = a_field(), a_state()
    y, _ = solved(field, x, **given)
    wanted = [x, *field.parameters()]
    first = gradients(y, wanted, retain_graph=True)
    assert_equal(gradients(y, wanted, retain_graph=True), first)
    other = torch.autograd.grad(y[1].sum(), wanted, retain_graph=True)
    assert (other[0] - first[0]).abs().max() > 1e-3
    assert_equal(gradients(y, wanted), first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        gradients(y, wanted)


def test_solved_again_twice():
    field, x = a_field(), a_state()
    y, stats = solved(field, x, solve=odeint_adjoint, **CONTROLS["fixed"])
    wanted = [x, *field.parameters()]
    first, counted = gradients(y, wanted, retain_graph=True), stats.nfe_backward
    assert_equal(gradients(y, wanted), first)
    assert stats.nfe_backward == counted
    assert_close(first, reference_gradients(field, x, **CONTROLS["fixed"]))


@every_gradient
def test_weights_changed_before_backward(given):
    field, x = a_field(), a_state()
    y, _ = solved(field, x, **given)
    with torch.no_grad():
        field.layers[1].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


COTANGENTS = {
    "transposed": lambda g: g.permute(2, 1, 0).contiguous().permute(2, 1, 0),
    "expanded": lambda g: g[:, :, :1].clone().expand(g.shape),
    "every other": lambda g: g.repeat_interleave(2, 2)[:, :, ::2],
    "negated view": lambda g: torch._neg_view(-g),
}


@every_gradient
@pytest.mark.parametrize("layout", COTANGENTS)
def test_layouts_of_the_cotangent(layout, given):
    field, x = a_field(), a_state()
    y, _ = solved(field, x, **given)
    cotangent = COTANGENTS[layout](torch.randn_like(y))
    plain = torch.empty_like(y, memory_format=torch.contiguous_format).copy_(cotangent)
    wanted = [x, *field.parameters()]
    want = torch.autograd.grad(y, wanted, plain, retain_graph=True)
    assert_equal(torch.autograd.grad(y, wanted, cotangent), want)


def test_negated_views():
    field, x = a_field(), a_state().detach()
    want, _ = solved(field, x)
    for _ in range(2):
        y, _ = odeint(field, torch._neg_view(-x), T, return_stats=True)
        assert_close(y, want)
    weights = {
        f"field.{name}": torch._neg_view(-p.detach()) for name, p in field.named_parameters()
    }
    assert_close(functional_call(Solving(field), weights, (x,)), want)


@every_control
@pytest.mark.parametrize("output", range(3))
def test_gradient_of_one_output(output, given):
    field, x = a_field(), a_state()
    wanted = [x, *field.parameters()]
    y, _ = solved(field, x, **given)
    got = torch.autograd.grad(y[output].sum(), wanted)
    y = reference(field, x, **given)
    want = torch.autograd.grad(y[output].sum(), wanted, materialize_grads=True)
    assert_close(got, want)


# --- errors ---------------------------------------------------------------------------------------


def failure(call, *args, **given):
    """Class and message of the error."""
    with pytest.raises(SolverError) as caught:
        call(*args, **given)
    return type(caught.value), str(caught.value)


def growing(rate, dtype):
    """dy/dt = rate * y."""
    field = MLPField(3, 3, num_hidden=1, activation="identity", time_dependent=False).to(dtype)
    with torch.no_grad():
        for layer, factor in zip(field.layers, (1.0, rate), strict=True):
            layer.weight.copy_(factor * torch.eye(3))
            layer.bias.zero_()
    return field


def spoiled(value, dtype):
    field = a_field(dtype=dtype)
    with torch.no_grad():
        field.layers[2].weight[0, 0] = value if value else torch.finfo(dtype).max / 4
    return field


def same_field(dtype):
    return a_field(dtype=dtype)


SUDDEN = {"dfactor": 1e-18, "safety": 1e-30}
ALL_PASS = {"first_step": 0.05, "max_step": 0.05}  # with the tolerances below
FAILURES = {
    "budget": (same_field, {**ALL_PASS, "max_num_steps": 7}, MaxStepsExceeded),
    "budget of rejections": (
        same_field,
        {"max_num_steps": 3, "first_step": 0.5, "dfactor": 0.5, "safety": 1e-30},
        MaxStepsExceeded,
    ),
    # A rejected step is made so much smaller that it adds nothing to a time that is not 0.
    "underflow": (same_field, {"first_step": 0.5, **SUDDEN}, StepSizeUnderflow),
    "nan in a weight": (functools.partial(spoiled, math.nan), {}, NonFiniteState),
    "inf in a weight": (functools.partial(spoiled, math.inf), {}, NonFiniteState),
    "huge weight": (functools.partial(spoiled, None), {}, NonFiniteState),
    "overflow": (  # at once: what overflows first in a smaller step is a matter of rounding
        functools.partial(growing, 5e4),
        {**ALL_PASS, "min_step": 0.05},
        NonFiniteState,
    ),
}
TIGHT, LOOSE = dict(rtol=0.0, atol=1e-12), dict(rtol=1e6, atol=1e6)
STARTS_AT_1 = times(1.0, 1.4, 2.0)  # at 0 no step is too small to count


@both_dtypes
@both_calls
@pytest.mark.parametrize("control", ["batch", "sample"])
@pytest.mark.parametrize("kind", FAILURES)
def test_failures_of_adaptive_solves(kind, control, remembered, dtype):
    make, options, wanted = FAILURES[kind]
    tolerances = BATCH if "weight" in kind else LOOSE if kind in ("budget", "overflow") else TIGHT
    given = dict(options=options, step_control=control, **tolerances)
    for t in (STARTS_AT_1, STARTS_AT_1.flip(0)):
        field, x = make(dtype), a_state(100, dtype=dtype)
        if remembered:
            good = copy.deepcopy(field)
            with torch.no_grad():
                for p in good.parameters():
                    p.zero_()
            if kind == "budget":
                pytest.skip("every solve like it fails")
            remember(good, x, t, **given)
        want = failure(odeint, field, x.detach(), t, backend="reference", **given)
        counted, field.nfe = field.nfe, 0
        for with_graph in (False, True):
            start = time.perf_counter()
            got = failure(odeint, field, x.detach().requires_grad_(with_graph), t, **given)
            assert got == want and want[0] is wanted
            assert time.perf_counter() - start < 5
        # Looking whether the field is deterministic takes two more.
        assert counted - field.nfe / 2 in (0, 2)


@both_dtypes
@both_calls
@pytest.mark.parametrize("kind", ["nan in a weight", "inf in a weight", "overflow"])
def test_failures_of_fixed_steps(kind, remembered, dtype):
    field, x = FAILURES[kind][0](dtype), a_state(100, dtype=dtype)
    given = dict(method="rk4", options={"step_size": 0.02})
    if kind == "inf in a weight":
        with torch.no_grad():
            field.layers[2].weight.fill_(math.inf)
    for t in (STARTS_AT_1, STARTS_AT_1.flip(0)):
        if remembered:
            remember(growing(1, dtype) if kind == "overflow" else same_field(dtype), x, t, **given)
        want = failure(odeint, field, x, t, backend="reference", **given)
        assert failure(odeint, field, x, t, **given) == want
        assert failure(odeint, field, x.detach(), t, **given) == want
        assert want[0] is NonFiniteState


@both_calls
@every_control
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_state_that_is_not_finite(value, given, remembered):
    field, x = a_field(), a_state(100).detach()
    if remembered:
        remember(field, x, **given)
    x[77, 1] = value
    want = failure(odeint, field, x, T, backend="reference", **given)
    assert failure(odeint, field, x, T, **given) == want
    block = AugODEBlock(a_field(4), 1, backend="reference")
    want = failure(block, x)
    block.backend = "auto"
    assert failure(block, x) == want


@both_calls
@pytest.mark.parametrize("first", [5, 80])
@pytest.mark.parametrize("budget", [None, 1, 2, 1000])
def test_rows_fail_in_the_order_of_attempts(budget, first, remembered):
    field, x = growing(40.0, f64), torch.zeros(100, 3, dtype=f64)
    options = {"first_step": 0.5, "min_step": 0.5, "max_step": 0.5}
    options |= {} if budget is None else {"max_num_steps": budget}
    given = dict(step_control="sample", options=options, **LOOSE)
    t = times(0.0, 3.0)
    if remembered:
        if budget in (1, 2):
            pytest.skip("every solve like it fails")
        remember(field, x, t, **given)
    x[first] = 1e306  # fails at once
    x[85 - first] = 1e300  # one attempt later
    x[99] = 1e290
    want = failure(odeint, field, x, t, backend="reference", **given)
    assert failure(odeint, field, x, t, **given) == want


@pytest.mark.parametrize("budget", [5, 6])
@pytest.mark.parametrize("rows", [(5, 80), (80, 5), (5, 6)])
def test_rows_underflow_in_the_order_of_attempts(rows, budget):
    # dy/dt = relu(t + y): a row does not move until t = -y.
    field = MLPField(1, 1, num_hidden=1).double()
    with torch.no_grad():
        for p in field.parameters():
            p.fill_(float(p.dim() == 2))
    x = torch.full((100, 1), -9.0, dtype=f64)
    x[rows[0]], x[rows[1]] = -1.45, -1.75
    given = dict(step_control="sample", rtol=0.0, atol=1e-30)
    given["options"] = {"first_step": 0.1, "max_step": 0.1, "max_num_steps": budget, **SUDDEN}
    t = times(1.0, 3.0)
    want = failure(odeint, field, x, t, backend="reference", **given)
    assert failure(odeint, field, x, t, **given) == want
    assert want[0] is (MaxStepsExceeded if budget == 5 else StepSizeUnderflow)


@both_calls
def test_more_steps_than_a_number_holds(remembered):
    field, x = a_field(), a_state()
    for control in ("batch", "sample"):
        given = dict(options={"max_num_steps": 1e19}, step_control=control)
        for _ in range(1 + remembered):
            solved(field, x, **given)


@both_calls
@pytest.mark.parametrize(
    ("t", "message"),
    [
        (times(-math.inf, 1.0), "t must be finite"),
        (times(0.0, math.inf), "t must be finite"),
        (times(0.0, math.nan), "t must be finite"),
        (times(math.nan, 1.0), "t must be finite"),
        (times(0.5, 0.5), "strictly increasing or decreasing"),
        (times(0.0, 1.0, 1.0), "strictly increasing or decreasing"),
        (times(0.0, 2.0, 1.0), "strictly increasing or decreasing"),
        (times(1.0, 0.0, 2.0), "strictly increasing or decreasing"),
        (times(), "t is empty"),
        (torch.tensor([0, 1]), "want a floating point dtype"),
        (times(0.0, 1.0)[None], "want one dim"),
    ],
    ids=str,
)
@every_control
def test_bad_times(t, message, given, remembered):
    field, x = a_field(), a_state()
    if remembered:
        remember(field, x, times(0.0, 1.0), **given)
        remember(field, x, times(1.0, 0.0), **given)
    with pytest.raises((ValueError, TypeError), match=message):
        odeint(field, x, t, **given)


ADJOINT_FAILURES = {
    "budget": (dict(adjoint_options={"max_num_steps": 2}), MaxStepsExceeded, "max_num_steps exc"),
    "underflow": (
        dict(adjoint_rtol=0.0, adjoint_atol=1e-30, adjoint_options={"first_step": 0.5, **SUDDEN}),
        StepSizeUnderflow,
        "underflow in dt",
    ),
    "nan cotangent": (dict(adjoint_rtol=1e-3), NonFiniteState, "non-finite values in state"),
    "inf cotangent": (
        dict(adjoint_method="rk4", adjoint_options={"step_size": 0.1}),
        NonFiniteState,
        "non-finite values in state",
    ),
}


@both_calls
@both_directions
@pytest.mark.parametrize("kind", ADJOINT_FAILURES)
def test_failures_of_the_adjoint_ode(kind, t, remembered):
    given, wanted, message = ADJOINT_FAILURES[kind]
    field, x = a_field(), a_state(100)
    t = t + 1
    for _ in range(1 + remembered):
        errors = []
        for backend in ("reference", "auto"):
            y, _ = solved(field, x, t, solve=odeint_adjoint, backend=backend, **given)
            cotangent = torch.ones_like(y)
            if "cotangent" in kind:
                cotangent[1, 77] = float(kind.split()[0])
            with pytest.raises(SolverError) as caught:
                y.backward(cotangent)
            errors.append(caught.value)
        assert type(errors[1]) is type(errors[0]) is wanted
        assert str(errors[1]).startswith(message)
        assert "t=nan" not in str(errors[1]) and "dt=0," not in str(errors[1])


# --- what is left to the reference path -----------------------------------------------------------


def test_no_rows():
    for given in GRADIENTS.values():
        field, x = a_field(), a_state(0)
        y, *grads = solution_and_gradients(field, x, **given)
        assert y.shape == (3, 0, 3)
        assert [g.shape for g in grads] == [p.shape for p in (x, *field.parameters())]
        assert all((g == 0).all() for g in grads)
        block = AugODEBlock(a_field(4), 1)
        assert block(x).shape == (0, 4) and block.stats.backend == "cpu"


def test_gradient_for_times():
    field, x = a_field(), a_state()
    remember(field, x)
    t = T.clone().requires_grad_()
    y = left_to_reference(field, x, t)
    (got,) = torch.autograd.grad(y[-1].sum(), t)
    assert_close(got[-1], field(T[-1], y[-1]).sum(), 1e-6)


HAS_LIMITS = {"first_step": 0.1, "min_step": 0.02, "max_step": 0.15}
NATIVE_OPTIONS = {
    "first_step": {"first_step": 0.01},
    "min_step": {"min_step": 0.2, "first_step": 0.2},
    "max_step": {"max_step": 0.07},
    "all limits": HAS_LIMITS,
    "limits that cross": {"min_step": 0.2, "max_step": 0.1},
    "safety": {"safety": 0.5},
    "ifactor": {"ifactor": 1.5, "first_step": 1e-3},
    "dfactor": {"dfactor": 0.5, "first_step": 0.9},
    "dtype": {"dtype": f32},
    "integers": {"first_step": 1, "max_num_steps": 500, "ifactor": 5},
    "tensor": {"first_step": torch.tensor(0.125)},
}


@pytest.mark.parametrize("control", ["batch", "sample"])
@pytest.mark.parametrize("options", NATIVE_OPTIONS.values(), ids=NATIVE_OPTIONS)
def test_options_mean_the_same(options, control):
    field, x = a_field(), a_state()
    given = dict(options=options, step_control=control, rtol=1e-4, atol=1e-4)
    for t in (T, T.flip(0), T.float() + 2, T):
        y, stats = solved(field, x, t, **given)
        want, ref = solved(field, x, t, backend="reference", **given)
        assert (stats.nfe, stats.accepted, stats.rejected) == (ref.nfe, ref.accepted, ref.rejected)
        assert_close(y, want)


def test_times_in_single_precision_matter():
    # 1e5 + dt in float32 is off by up to 4e-3.
    field, x = a_field(dtype=f32), a_state(dtype=f32)
    t = times(1e5, 1e5 + 1)
    coarse, fine = ({"first_step": 0.013, "max_step": 0.013, "dtype": d} for d in (f32, f64))
    found = [solved(field, x, t, options=options)[1] for options in (coarse, fine)]
    refs = [
        solved(field, x, t, options=options, backend="reference")[1] for options in (coarse, fine)
    ]
    assert [s.nfe for s in found] == [s.nfe for s in refs]
    assert found[0].nfe != found[1].nfe


def test_grid_constructor():
    field, x = a_field(), a_state()
    calls = []

    def grid(func, y0, t):
        assert func is field and y0.shape == x.shape
        calls.append(t)
        return torch.linspace(t[0], t[-1], 6, dtype=t.dtype)

    given = dict(method="rk4", options={"grid_constructor": grid})
    for t in (T, T.flip(0)):
        for _ in range(2):
            got = solution_and_gradients(field, x, t, **given)
            assert_close(got[0], reference(field, x, t, **given).detach())
            assert_close(got[1:], reference_gradients(field, x, t, **given))
    assert len(calls) == 12  # every call asks for it


@both_calls
@pytest.mark.parametrize("solve", [odeint, odeint_adjoint])
@pytest.mark.parametrize("ends", [(1.4, 2.0), (2.0, 1.4), (-2.0, -1.95), (0.4, 0.7)], ids=str)
def test_steps_that_fill_the_interval_but_for_rounding(ends, solve, remembered):
    field, x = a_field(), a_state()
    t = times(*ends)
    step = abs(ends[1] - ends[0]) / 6
    given = dict(method="rk4", options={"step_size": round(step, 12)})
    if remembered:
        remember(field, x, times(0.0, ends[1] - ends[0]), **given)
    # The same with the steps given by number.
    y, _ = solved(field, x, torch.linspace(*ends, 7, dtype=f64), method="rk4")
    want = gradients(y[-1], [x, *field.parameters()])
    for backend in ("reference", "auto"):
        z, _ = solved(field, x, t, solve=solve, backend=backend, **given)
        assert_close(z[-1], y[-1])
        assert_close(gradients(z[-1], [x, *field.parameters()]), want)


# --- why not --------------------------------------------------------------------------------------


class Tagged(torch.Tensor):
    pass


def no_field(t, y):
    return -y.cumsum(0)


def tagged_state():
    return torch.randn(4, 3).as_subclass(Tagged)


def with_hook():
    field = MLPField(3, 8)
    field.register_forward_hook(lambda *args: None)
    return field


def with_forward():
    field = MLPField(3, 8)
    field.forward = no_field
    return field


def with_callback():
    field = MLPField(3, 8)
    field.callback_accept_step = lambda *args: None
    return field


def without_bias():
    field = MLPField(3, 8)
    field.layers[1].bias = None
    return field


def reshaped():
    field = MLPField(3, 8)
    field.layers[1], field.layers[2] = nn.Linear(8, 6), nn.Linear(6, 3)
    return field


def event(t, y):
    return y.sum()


def call(field=None, x=None, t=T, **given):
    """What a call of odeint gets."""
    return field or MLPField(3, 8), torch.randn(4, 3) if x is None else x, t, given


REASONS = {
    "function": (lambda: call(no_field), "the field is not known to the kernels"),
    "module": (lambda: call(nn.Linear(3, 3)), "the field is not known to the kernels"),
    "implicit": (lambda: call(method="implicit_adams"), "no explicit Runge-Kutta method"),
    "scipy": (lambda: call(method="scipy_solver"), "no explicit Runge-Kutta method"),
    "event": (lambda: call(t=times(0, 1), event_fn=event), "it searches for an event"),
    "complex": (lambda: call(x=torch.randn(4, 3, dtype=torch.cfloat)), "the state is torch.comple"),
    "one row": (lambda: call(x=torch.randn(3)), r"the state is not one tensor \[batch, dim\]"),
    "tuple": (lambda: call(x=(torch.randn(4, 3),)), r"the state is not one tensor \[batch, dim\]"),
    "width": (lambda: call(x=torch.randn(4, 7)), "the state has 7 columns, and the field 3"),
    "one time": (lambda: call(t=times(0.0)), "there is nothing to solve"),
    "subclass": (lambda: call(x=tagged_state()), "the state or a weight is no plain tensor"),
    "bias": (lambda: call(without_bias()), "the state or a weight is no plain tensor"),
    "shapes": (lambda: call(reshaped()), "the layers have other shapes"),
    "dtype": (lambda: call(x=torch.randn(4, 3, dtype=f64)), "the weights have another dtype"),
    "half": (lambda: call(MLPField(3, 8).half(), torch.randn(4, 3).half()), "another dtype"),
    "shifts": (lambda: call(t=T.clone().requires_grad_()), "a gradient with respect to t"),
    "rtol": (lambda: call(rtol=torch.full((3,), 1e-3)), "rtol or atol is a tensor"),
    "atol": (lambda: call(atol=torch.full((3,), 1e-3)), "rtol or atol is a tensor"),
    "norm": (lambda: call(options={"norm": torch.linalg.norm}), "norm"),
    "step_t": (lambda: call(options={"step_t": times(0.3)}), "it has the option step_t"),
    "jump_t": (lambda: call(options={"jump_t": times(0.3)}), "it has the option jump_t"),
    "grid jump_t": (
        lambda: call(method="rk4", options={"jump_t": times(0.3)}),
        "it has the option jump_t",
    ),
    "perturb": (lambda: call(method="rk4", options={"perturb": True}), "it has the option perturb"),
    "callback": (lambda: call(with_callback()), "the field has callbacks"),
    "hook": (lambda: call(with_hook()), "the field has hooks"),
    "forward": (lambda: call(with_forward()), "or a forward of its own"),
    "autograd": (lambda: call(gradient="autograd"), "goes through the reference solver"),
}


@pytest.mark.parametrize("name", REASONS)
def test_why_not(name):
    make, reason = REASONS[name]
    *args, given = make()
    text = explain(*args, **given)
    assert "backend: reference" in text
    assert [line for line in text.splitlines() if line.startswith("  backend: not cpu: ")]
    with pytest.raises(InvalidArgument, match=f'backend="cpu" cannot run this call: .*{reason}'):
        odeint(*args, backend="cpu", **given)
    with pytest.raises(InvalidArgument, match=reason):
        explain(*args, backend="cpu", **given)


RUNNABLE = {"rtol", "atol", "norm", "step_t", "jump_t", "grid jump_t", "perturb", "callback"}
RUNNABLE |= {"hook", "forward", "shapes", "event", "one row", "half"}


@pytest.mark.parametrize("name", sorted(RUNNABLE))
def test_fallbacks_equal_the_reference(name):
    *args, given = REASONS[name][0]()
    if name == "event":
        given["event_fn"] = lambda t, y: t - 0.5
    (got, stats), want = (
        odeint(*args, return_stats=True, **given),
        odeint(*args, backend="reference", **given),
    )
    assert stats.backend == "reference"
    # C++ or PyTorch between the evaluations: the last bits may differ.
    torch.testing.assert_close(got, want, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("state", ["torch.func", "forward-mode"])
def test_why_not_now(state):
    field, x = MLPField(3, 8), torch.randn(4, 3)
    texts = []

    def look(x):
        texts.append(explain(field, x, T))
        return x

    if state == "torch.func":
        torch.func.grad(lambda x: look(x).sum())(x)
    else:
        with forward_ad.dual_level():
            look(x)
    assert f"backend: not cpu: {'it runs under a ' if state == 'torch.func' else ''}" in texts[0]
    assert state in texts[0]


ADJOINT_REASONS = {
    "method": (
        dict(adjoint_method="implicit_adams"),
        "the adjoint_method implicit_adams is no explicit Runge-Kutta method",
    ),
    "rtol": (dict(adjoint_rtol=torch.tensor(1e-3)), "adjoint_rtol or adjoint_atol is a tensor"),
    "atol": (dict(adjoint_atol=torch.tensor(1e-3)), "adjoint_rtol or adjoint_atol is a tensor"),
    "norm": (
        dict(adjoint_options={"norm": lambda state: state[1].abs().max()}),
        "the adjoint ODE has a norm of its own",
    ),
    "step_t": (dict(adjoint_options={"step_t": times(0.3)}), "the adjoint ODE has the option st"),
    "jump_t": (dict(adjoint_options={"jump_t": times(0.3)}), "the adjoint ODE has the option ju"),
    "grid": (
        dict(
            adjoint_method="rk4",
            adjoint_options={
                "grid_constructor": lambda f, y, t: torch.stack([t[0], t.mean(), t[1]])
            },
        ),
        "the adjoint ODE has the option grid_constructor",
    ),
    "perturb": (
        dict(adjoint_method="rk4", adjoint_options={"perturb": True}),
        "the adjoint ODE has the option perturb",
    ),
    "params": (dict(adjoint_params=()), "adjoint_params are not the field's own parameters"),
    "callback": (dict(), "the field has callbacks"),
}


@pytest.mark.parametrize("name", ADJOINT_REASONS)
def test_why_not_the_adjoint_ode(name):
    given, reason = ADJOINT_REASONS[name]
    field, x = a_field(), a_state()
    calls = []
    if name == "callback":
        field.callback_step_adjoint = lambda *args: calls.append(args)
    with pytest.raises(InvalidArgument, match=f'backend="cpu" cannot run this call: {reason}'):
        odeint_adjoint(field, x, T, backend="cpu", **given)
    y = left_to_reference(field, x, solve=odeint_adjoint, **given)
    y.sum().backward()
    assert bool(calls) == (name == "callback")
    if name == "params":
        assert all(p.grad is None for p in field.parameters())


def test_without_the_library(monkeypatch):
    field, x = a_field(), a_state()
    remember(field, x)
    want = reference(field, x)
    monkeypatch.setattr(library, "load", lambda: None)
    monkeypatch.setattr(library, "missing", lambda: "no compiler")
    fused._remembered.clear()
    assert_equal(left_to_reference(field, x), want)
    assert "  backend: not cpu: no compiler" in explain(field, x, T).splitlines()
    with pytest.raises(InvalidArgument, match="no compiler"):
        odeint(field, x, T, backend="cpu")
    block = AugODEBlock(field)
    block(x).sum().backward()
    assert block.stats.backend == "reference"


# --- odeint_adjoint -------------------------------------------------------------------------------


def test_adjoint_is_discrete_without_arguments_for_it():
    field, x = a_field(), a_state()
    y, _ = solved(field, x, solve=odeint_adjoint, **BATCH)
    assert_close(gradients(y, [x, *field.parameters()]), reference_gradients(field, x, **BATCH))


def test_adjoint_params():
    field, x = a_field(), a_state()
    want = reference_gradients(field, x, **BATCH)
    solve = functools.partial(odeint_adjoint, adjoint_params=tuple(field.parameters()))
    y, _ = solved(field, x, solve=solve, **BATCH)
    assert_close(gradients(y, [x, *field.parameters()]), want)
    others = [(), tuple(field.parameters())[1:], (*field.parameters(), nn.Parameter(torch.ones(1)))]
    for params in others:
        y = left_to_reference(field, x, solve=odeint_adjoint, adjoint_params=params, **BATCH)
        grads = gradients(y, [x, *field.parameters()], allow_unused=True)
        own = {id(p) for p in params}
        assert [g is not None for g in grads[1:]] == [id(p) in own for p in field.parameters()]


def test_fixed_steps_are_not_kept():
    field, x = a_field(), a_state()
    for _ in range(2):
        y, _ = solved(field, x, solve=odeint_adjoint, **CONTROLS["fixed"])
        assert y.grad_fn.call.checkpoints is None
        gradients(y, [x], retain_graph=True)
        assert y.grad_fn.call.checkpoints is None
        y, _ = solved(field, x, **CONTROLS["fixed"])
        assert y.grad_fn.call.checkpoints is not None


CONTINUOUS = {
    "rtol": dict(adjoint_rtol=1e-4),
    "atol": dict(adjoint_atol=1e-4),
    "method": dict(adjoint_method="bosh3"),
    "fixed": dict(adjoint_method="rk4", adjoint_options={"step_size": 0.07}),
    "of output times": dict(adjoint_method="midpoint"),
    "options": dict(adjoint_options={"max_step": 0.05}),
    "seminorm": dict(adjoint_options={"norm": "seminorm"}),
    "no options": dict(adjoint_options={}),
    "all": dict(
        adjoint_rtol=1e-3,
        adjoint_atol=1e-5,
        adjoint_method="tsit5",
        adjoint_options={"norm": "seminorm", "safety": 0.7},
    ),
}


@both_directions
@pytest.mark.parametrize("given", CONTINUOUS.values(), ids=CONTINUOUS)
def test_continuous_gradient(given, t):
    field, x = a_field(), a_state()
    found = []
    for backend in ("reference", "auto", "auto"):
        y, stats = solved(field, x, t, solve=odeint_adjoint, backend=backend, **BATCH, **given)
        before = field.nfe
        grads = gradients(y, [x, *field.parameters()])
        assert field.nfe - before == stats.nfe_backward > 0
        found.append((stats.nfe, stats.nfe_backward, grads))
    for got in found[1:]:
        assert got[:2] == found[0][:2]
        assert_close(got[2], found[0][2])


@pytest.mark.parametrize("outputs", [2, 4, 40])
@pytest.mark.parametrize("augment_dim", [0, 2])
def test_continuous_gradient_of_a_block(outputs, augment_dim):
    field, x = a_field(5), a_state(dim=5 - augment_dim)

    def found(**given):
        block = AugODEBlock(field, augment_dim, **{"rtol": 1e-7, "atol": 1e-7, **given})
        y = block.trajectory(x, outputs)
        grads = gradients(y, [x, *field.parameters()])
        return grads, (block.stats.nfe, block.stats.nfe_backward)

    got, counts = found(gradient="continuous", backend="cpu")
    want, ref = found(gradient="continuous", backend="reference")
    if outputs < 40:  # where many outputs lie in one step, the reference does not stop at each
        assert counts == ref
        assert_close(got, want)
    assert_close(got, found(rtol=1e-12, atol=1e-12)[0], 1e-5)


# --- threads, processes, memory -------------------------------------------------------------------


def test_two_threads_at_once(set_threads):
    set_threads(1)
    cases = [(a_field(hidden=h), a_state(rows)) for h, rows in ((8, 100), (33, 70))]
    wanted = [
        [solution_and_gradients(*case, **given) for given in GRADIENTS.values()] for case in cases
    ]
    start, failures = threading.Barrier(2), []

    def work(case, want):
        try:
            start.wait(10)
            for _ in range(15):
                for given, expected in zip(GRADIENTS.values(), want, strict=True):
                    assert_equal(solution_and_gradients(*case, **given), expected)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=x) for x in zip(cases, wanted, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not failures


@pytest.mark.parametrize("part", ["forward", "discrete", "continuous"])
def test_other_python_threads_run_meanwhile(part):
    field, x = a_field(hidden=64), a_state(200)
    given = dict(method="rk4", options={"step_size": 1 / 400})
    y = odeint(field, x, T, gradient="continuous" if part == "continuous" else "auto", **given)
    work = {"forward": lambda: odeint(field, x.detach(), T, **given)}.get(part, y.sum().backward)
    running, spans = threading.Event(), []

    def timed():
        running.set()
        start = time.perf_counter()
        work()
        spans.append(time.perf_counter() - start)

    thread = threading.Thread(target=timed)
    thread.start()
    running.wait()
    ticks = 0
    while thread.is_alive():
        time.sleep(1e-3)
        ticks += 1
    thread.join()
    assert spans[0] > 0.05, "too short to tell"
    assert ticks > 10


FORK = """
    import signal

    torch.set_num_threads(2)
    field, x = a_field(hidden=20), a_state(1000)
    want = solution_and_gradients(field, x)
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        same = all(map(torch.equal, solution_and_gradients(field, x), want))
        os._exit(0 if same else 3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert all(map(torch.equal, solution_and_gradients(field, x), want))


    class Solved(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return odeint(field, x + index, T)[-1].detach()


    loader = torch.utils.data.DataLoader(
        Solved(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    for index, y in enumerate(loader):
        assert torch.equal(y, Solved()[index])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_fork_after_use_of_threads():
    in_a_fresh_process(FORK)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc/self/statm")
def test_memory_stays_where_it_was():
    field, x = a_field(dtype=f32), a_state(dtype=f32)
    # `failing` leaves by an exception with half of its work done.
    failing = {"max_num_steps": 2, "first_step": 1e-3, "ifactor": 2.0}

    def resident():
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def work(count):
        for i in range(count):
            given = list(GRADIENTS.values())[i % len(GRADIENTS)]
            odeint(field, x, T, **given).sum().backward()
            if i % 10 == 0:
                odeint(field, x, T)  # whose gradient nobody asks for
                with contextlib.suppress(MaxStepsExceeded):
                    odeint(field, x, T, options=failing)

    work(2000)
    before = resident()
    work(10000)
    assert resident() - before < 4e6
