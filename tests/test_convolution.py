"""A ConvField on the CPU kernels: the field's values, gradients, second derivatives and counts."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils import parametrize

from anode_fast import AugODEBlock, ConvField, MLPField, convolution, execute, explain
from anode_fast.convolution import NativeConvField, why_not
from anode_fast.errors import InvalidArgument, InvalidType
from anode_fast.kernels.cpu import library
from tests.helpers import assert_no_worse

needs_library = pytest.mark.skipif(library.load() is None, reason=library.missing() or "loaded")


def make(channels=3, filters=6, activation="tanh", time_dependent=True, dtype=torch.float64):
    options = dict(activation=activation, time_dependent=time_dependent)
    return ConvField(channels, filters, **options).to(dtype)


def inputs(batch=2, channels=3, size=(5, 4), per_image=True, dtype=torch.float64):
    t = torch.rand(batch, 1, 1, 1, dtype=dtype) if per_image else torch.tensor(0.4, dtype=dtype)
    return t.requires_grad_(), torch.randn(batch, channels, *size, dtype=dtype).requires_grad_()


def outputs_and_gradients(f, field, t, y, cotangent):
    out = f(t, y)
    tensors = [y, t, *field.parameters()]
    return [out, *torch.autograd.grad(out, tensors, cotangent, materialize_grads=True)]


@needs_library
@pytest.mark.parametrize("per_image", [True, False])
@pytest.mark.parametrize("time_dependent", [True, False])
def test_the_fields_values_and_gradients(per_image, time_dependent):
    field = make(6, 40, time_dependent=time_dependent)
    t, y = inputs(3, 6, (9, 7), per_image)
    cotangent = torch.randn_like(y)
    exact = outputs_and_gradients(field, field, t, y, cotangent)
    got = outputs_and_gradients(NativeConvField(field), field, t, y, cotangent)
    for a, b in zip(got, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)

    single = copy.deepcopy(field).float()
    t, y = (x.detach().float().requires_grad_() for x in (t, y))
    reference = outputs_and_gradients(single, single, t, y, cotangent.float())
    got = outputs_and_gradients(NativeConvField(single), single, t, y, cotangent.float())
    for i, row in enumerate(zip(got, reference, exact, strict=True)):
        assert_no_worse(*row, f"number {i}")


@needs_library
@pytest.mark.parametrize("activation", ["tanh", "softplus"])
def test_gradcheck_in_t_and_y(activation):
    field = make(activation=activation)
    native = NativeConvField(field)
    assert gradcheck(native, inputs(), fast_mode=False)
    assert gradcheck(native, inputs(per_image=False), check_batched_grad=True)
    assert gradgradcheck(native, inputs(size=(3, 2)))


@needs_library
def test_gradcheck_in_the_weights():
    """Packs anew for each set of weights, as each solve does."""
    field = make(2, 3)
    t, y = inputs(channels=2, size=(3, 4))
    names = [name for name, _ in field.named_parameters()]

    def f(*tensors):
        other = make(2, 3)
        other.tensors = lambda: list(tensors)
        return NativeConvField(other)(t.detach(), y.detach())

    tensors = [field.get_parameter(name) for name in names]
    assert gradcheck(f, tensors)
    assert gradgradcheck(f, tensors)


@needs_library
def test_counts():
    field = make()
    native = NativeConvField(field)
    t, y = inputs()
    field.nfe = 0
    out = native(t, y)
    native(t.detach(), y.detach())
    with torch.no_grad():
        native(t, y)
    assert field.nfe == 3
    (grad,) = torch.autograd.grad(out.sum(), y, create_graph=True)
    torch.autograd.grad(grad.square().sum(), y)
    assert field.nfe == 3


@needs_library
def test_no_record_where_no_gradient_is_wanted(monkeypatch):
    field = make()
    native = NativeConvField(field)
    t, y = inputs()
    kept = []
    evaluate = native.evaluate
    monkeypatch.setattr(
        native, "evaluate", lambda t, y, keep: (kept.append(keep), evaluate(t, y, keep))[1]
    )
    with torch.no_grad():
        assert not native(t, y).requires_grad
    assert native(t, y).requires_grad and native(t.detach(), y.detach()).requires_grad
    field.requires_grad_(False)
    assert not NativeConvField(field)(t.detach(), y.detach()).requires_grad
    assert kept == [False, True, True]


@needs_library
def test_only_what_needs_a_gradient_gets_one():
    field = make()
    field.conv2.weight.requires_grad_(False)
    field.conv3.bias.requires_grad_(False)
    t, y = inputs()
    NativeConvField(field)(t.detach(), y).sum().backward()
    assert t.grad is None and y.grad is not None
    assert field.conv2.weight.grad is None and field.conv3.bias.grad is None
    assert field.conv1.weight.grad is not None and field.conv2.bias.grad is not None


@needs_library
def test_any_memory_layout():
    field = make()
    native = NativeConvField(field)
    t, y = inputs()
    want = field(t, y)
    for other in (
        y.contiguous(memory_format=torch.channels_last),
        y.transpose(2, 3).contiguous().transpose(2, 3),
        torch.randn(2, 7, 5, 4).double()[:, 2:5].copy_(y),
    ):
        torch.testing.assert_close(native(t, other), want, rtol=1e-12, atol=1e-12)
    native(t, y).sum().backward()  # the cotangent is one number with strides of 0
    got, y.grad = y.grad, None
    field(t, y).sum().backward()
    torch.testing.assert_close(got, y.grad, rtol=1e-11, atol=1e-12)
    alike = t.detach()[:1].expand(2, 1, 1, 1)
    torch.testing.assert_close(native(alike, y), field(alike, y), rtol=1e-12, atol=1e-12)


@needs_library
def test_vmap_over_the_backward_pass():
    field = make()
    t, y = inputs()
    cotangents = torch.randn(3, *y.shape, dtype=torch.float64)
    out, want = NativeConvField(field)(t, y), field(t, y)
    (got,) = torch.autograd.grad(out, y, cotangents, is_grads_batched=True)
    (by_field,) = torch.autograd.grad(want, y, cotangents, is_grads_batched=True)
    torch.testing.assert_close(got, by_field, rtol=1e-11, atol=1e-12)


@needs_library
def test_weights_changed_before_the_backward_pass():
    field = make()
    t, y = inputs()
    out = NativeConvField(field)(t, y).sum()
    with torch.no_grad():
        field.conv2.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@needs_library
def test_a_parametrized_layer():
    class Doubled(nn.Module):
        def forward(self, x):
            return 2 * x

    field = make()
    parametrize.register_parametrization(field.conv2, "weight", Doubled())
    t, y = inputs()
    native = NativeConvField(field)
    torch.testing.assert_close(native(t, y), field(t, y), rtol=1e-12, atol=1e-12)
    original = field.conv2.parametrizations.weight.original
    (got,) = torch.autograd.grad(native(t, y).sum(), original)
    (want,) = torch.autograd.grad(field(t, y).sum(), original)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@needs_library
def test_what_does_not_fit_is_refused_as_by_the_field():
    native = NativeConvField(make())
    t, y = (x.detach() for x in inputs())
    with pytest.raises(InvalidArgument, match="channels|state"):
        native(t, y[:, :2])
    with pytest.raises(InvalidArgument, match="state"):
        native(t, y[0])
    with pytest.raises(InvalidArgument, match="t has shape"):
        native(t.expand(2, 1, 5, 4), y)
    with pytest.raises(InvalidType, match="float32"):
        native(t.float(), y.float())
    with pytest.raises(InvalidType, match="0-d tensor"):
        native(0.5, y)


@needs_library
def test_why_not():
    y = torch.zeros(2, 3, 5, 4)
    field = make(dtype=torch.float32)
    assert why_not(field, y) == ""

    hooked = make(dtype=torch.float32)
    hooked.register_forward_hook(lambda *_: None)
    reshaped = make(dtype=torch.float32)
    reshaped.conv2 = nn.Conv2d(7, 6, 1)

    class Other(torch.Tensor):
        pass

    for reason, other, state in (
        ("no convolutional one", MLPField(3, 4), y),
        ("another dtype", field, y.double()),
        ("bfloat16", field, y.bfloat16()),
        ("on meta", field, y.to("meta")),
        ("is not [batch, 3, height, width]", field, y[:, :2]),
        ("is not [batch, 3, height, width]", field, y[0]),
        ("no pixels", field, y[..., :0]),
        ("plain tensor", field, y.as_subclass(Other)),
        ("hooks", hooked, y),
        ("shapes", reshaped, y),
    ):
        assert reason in why_not(other, state)
    with torch.autocast("cpu"):
        assert "autocast" in why_not(field, y)


def test_why_not_without_the_library(monkeypatch):
    monkeypatch.setattr(library, "missing", lambda: "there is none")
    assert why_not(make(), torch.zeros(2, 3, 5, 4)) == "there is none"


# --- solves ---------------------------------------------------------------------------------------


def solved(gradient="discrete", **given):
    """Solution, gradients and stats of a block; and how its field's nfe went on."""
    torch.manual_seed(0)
    block = AugODEBlock.conv((1, 6, 5), 8, 2, gradient=gradient, **given).double()
    x = torch.randn(3, 1, 6, 5, dtype=torch.float64, requires_grad=True)
    y = block(x)
    grads = torch.autograd.grad(y.square().sum(), [x, *block.parameters()])
    return [y.detach(), *grads], block.stats, block.field.nfe


@needs_library
@pytest.mark.parametrize("gradient", ["discrete", "autograd", "continuous", "auto"])
@pytest.mark.parametrize("given", [{}, dict(method="rk4", options={"step_size": 0.5})], ids=str)
def test_solves_are_the_references(gradient, given):
    got, stats, _ = solved(gradient, backend="cpu", **given)
    ref, count, _ = solved(gradient, backend="reference", **given)
    assert (stats.backend, count.backend) == ("cpu", "reference")
    assert (stats.nfe, stats.accepted, stats.rejected) == (
        count.nfe,
        count.accepted,
        count.rejected,
    )
    for a, b in zip(got, ref, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@needs_library
def test_every_image_its_own_steps():
    got, stats, _ = solved(backend="cpu", step_control="sample")
    ref, count, _ = solved(backend="reference", step_control="sample")
    assert stats.backend == "cpu" and stats.nfe == count.nfe
    for a, b in zip(got, ref, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@needs_library
def test_evaluations_that_find_no_room_are_made_again(monkeypatch):
    kept, stats, nfe = solved()
    assert stats.nfe_backward == 0 and nfe == stats.nfe
    monkeypatch.setattr(execute, "FEW", 10**9)  # step by step, from the states
    by_step, again, nfe = solved()
    assert again.nfe_backward > 0 and nfe == again.nfe + again.nfe_backward
    monkeypatch.setattr(execute, "FEW", 0)
    monkeypatch.setattr(convolution, "KEPT_BYTES", 0)
    alone, _, nfe = solved()
    assert nfe > stats.nfe  # those that the gradient needs, once more
    for a, b, c in zip(kept, by_step, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        assert torch.equal(a, c)


@needs_library
def test_room_is_given_back_with_the_graph(monkeypatch):
    field = ConvField(3, 8)
    native, y = NativeConvField(field), torch.randn(2, 3, 6, 5)
    whole = native._room
    values = [native(torch.tensor(0.0), y) for _ in range(3)]
    assert native._room < whole and native.has_room(y, 3)
    sum(value.sum() for value in values).backward()
    del values
    assert native._room == whole
    with torch.no_grad():
        native(torch.tensor(0.0), y)
    assert native._room == whole


@needs_library
def test_explain_says_who_evaluates():
    field, y = ConvField(3, 8), torch.zeros(2, 3, 4, 4)
    text = explain(field, y, torch.tensor([0.0, 1.0]))
    assert "backend: cpu" in text and "the C++ kernels evaluate the field" in text
    text = explain(field.half(), y.half(), torch.tensor([0.0, 1.0]))
    assert "backend: reference" in text and "weights have another dtype" in text
