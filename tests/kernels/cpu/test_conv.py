"""kernels/cpu/conv.py: values and gradients against torch's, whatever the shape and the machine."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from anode_fast.kernels import interface
from anode_fast.kernels.cpu import conv, library
from tests.helpers import assert_no_worse
from tests.kernels.activations import TORCH

pytestmark = pytest.mark.skipif(library.load() is None, reason=library.missing() or "loaded")

ACTIVATIONS = ("relu", "softplus", "tanh", "sigmoid", "silu", "gelu", "elu", "identity")
NAMES = ("dy/dt", "y", "t", "w1", "b1", "w2", "b2", "w3", "b3")


@dataclass
class Case:
    """A field with its weights, and where it is evaluated."""

    field: interface.ConvField
    t: torch.Tensor
    y: torch.Tensor
    parameters: list[torch.Tensor]
    cotangent: torch.Tensor

    def to(self, dtype):
        parameters = [p.to(dtype) for p in self.parameters]
        tensors = (self.t.to(dtype), self.y.to(dtype), parameters, self.cotangent.to(dtype))
        return Case(self.field, *tensors)


def make(channels, filters, size, activation="tanh", batch=3, per_image=True, time_dependent=True):
    field = interface.ConvField(channels, filters, ACTIVATIONS.index(activation), time_dependent)
    lead = int(time_dependent)
    shapes = [(filters, lead + channels, 1, 1), (filters, lead + filters, 3, 3)]
    shapes += [(channels, lead + filters, 1, 1)]
    parameters = []
    for shape in shapes:
        bound = 1 / math.sqrt(shape[1] * shape[2] * shape[3])
        parameters += [bound * (2 * torch.rand(s).double() - 1) for s in (shape, shape[:1])]
    t = torch.rand(batch, 1, 1, 1).double() if per_image else torch.tensor(0.7).double()
    y = torch.randn(batch, channels, *size).double()
    return Case(field, t, y, parameters, torch.randn_like(y))


def with_time(t, h):
    return torch.cat([t.expand(h.shape[0], 1, *h.shape[2:]), h], 1)


def by_torch(case):
    """dy/dt as the paper writes it, and the gradients."""
    t, y = case.t.clone().requires_grad_(), case.y.clone().requires_grad_()
    parameters = [p.clone().requires_grad_() for p in case.parameters]
    act = TORCH[ACTIVATIONS[case.field.activation]]
    h = y
    for i in range(3):
        x = with_time(t, h) if case.field.time_dependent else h
        h = F.conv2d(x, parameters[2 * i], parameters[2 * i + 1], padding=int(i == 1))
        h = act(h) if i < 2 else h
    inputs = [y, t, *parameters]
    return [h.detach(), *torch.autograd.grad(h, inputs, case.cotangent, materialize_grads=True)]


def by_kernels(case, loaded=None):
    kernels = conv.Conv(loaded or library.load(), case.field, case.y.dtype)
    packed = kernels.pack(case.parameters)
    out, record = kernels.evaluate(packed, case.t, case.y, True)
    without, none = kernels.evaluate(packed, case.t, case.y, False)
    assert none is None and same(out, without)
    y_grad, t_grad, grads = kernels.vjp(packed, record, case.t, case.y, case.cotangent)
    return [out, y_grad, t_grad, *grads]


def same(a, b):
    return torch.equal(a.nan_to_num(12345.0), b.nan_to_num(12345.0))


def check(case, loaded=None, single=True):
    exact = by_torch(case)
    for name, got, want in zip(NAMES, by_kernels(case, loaded), exact, strict=True):
        scale = want.abs().max().clamp_min(1) if want.numel() else 1
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12 * float(scale), msg=name)
    if single:
        case = case.to(torch.float32)
        for row in zip(by_kernels(case, loaded), by_torch(case), exact, NAMES, strict=True):
            assert_no_worse(*row)


SHAPES = [
    (3, 1, (7, 9)),
    (1, 5, (1, 5)),
    (6, 5, (8, 8)),
    (3, 16, (7, 9)),
    (13, 23, (7, 9)),
    (64, 16, (8, 8)),
    (6, 64, (28, 28)),
    (1, 92, (28, 28)),
    (13, 64, (8, 8)),
    (64, 92, (7, 9)),
    (1, 125, (5, 4)),
    (70, 33, (3, 2)),
    (2, 64, (3, 300)),  # a row of tiles that does not fit in a piece
    (2, 7, (41, 2)),
]


@pytest.mark.parametrize(("channels", "filters", "size"), SHAPES, ids=str)
def test_values_and_gradients(channels, filters, size):
    check(make(channels, filters, size))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("time_dependent", [True, False])
def test_every_activation(activation, time_dependent):
    check(make(4, 20, (7, 9), activation, time_dependent=time_dependent))


# One pixel: gradients of the weights are sums of a few numbers that may cancel, so that only many
# digits tell.
@pytest.mark.parametrize("filters", [1, 16, 64])
@pytest.mark.parametrize("channels", [1, 6])
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (2, 2), (3, 3)])
def test_small_images(channels, filters, size):
    check(make(channels, filters, size), single=False)


@pytest.mark.parametrize("isa", library.INSTRUCTION_SETS)
@pytest.mark.parametrize(
    ("channels", "filters", "size", "activation"),
    [(6, 64, (12, 12), "relu"), (13, 23, (7, 9), "softplus"), (1, 92, (5, 4), "tanh")],
    ids=str,
)
def test_every_instruction_set(isa, channels, filters, size, activation):
    if isa not in library.runnable_instruction_sets():
        pytest.skip(f"this CPU does not run {isa}")
    file = library._FOLDER / f"libanode_{isa}{library._SUFFIX}"
    if not file.exists():
        pytest.skip(f"{file} is not built")
    check(make(channels, filters, size, activation), library._open(isa, file).library)


@settings(max_examples=60)
@given(
    channels=st.integers(1, 20),
    filters=st.integers(1, 40),
    size=st.tuples(st.integers(1, 11), st.integers(1, 11)),
    batch=st.integers(1, 4),
    per_image=st.booleans(),
    time_dependent=st.booleans(),
    activation=st.sampled_from(ACTIVATIONS),
)
def test_any_shape(channels, filters, size, batch, per_image, time_dependent, activation):
    torch.manual_seed(0)
    case = make(channels, filters, size, activation, batch, per_image, time_dependent)
    check(case, single=False)


def test_one_time_is_the_same_time_for_each_image():
    case = make(3, 20, (6, 6), per_image=False).to(torch.float32)
    one = by_kernels(case)
    case.t = case.t.expand(3, 1, 1, 1).contiguous()
    each = by_kernels(case)
    for i in (0, 1, *range(3, 9)):
        assert same(one[i], each[i]), NAMES[i]
    torch.testing.assert_close(each[2].sum(), one[2])
    assert each[2].shape == (3, 1, 1, 1) and one[2].shape == ()


@pytest.mark.parametrize("per_image", [True, False])
def test_no_images(per_image):
    case = make(3, 20, (6, 6), batch=0, per_image=per_image)
    for got, want in zip(by_kernels(case), by_torch(case), strict=True):
        assert got.shape == want.shape and not got.any()


@pytest.mark.parametrize("batch", [1, 3, 17])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_the_same_bits_with_any_number_of_threads_and_each_time(batch, activation):
    case = make(6, 64, (28, 28), activation, batch).to(torch.float32)
    once = by_kernels(case)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for name, a, b in zip(NAMES, once, by_kernels(case), strict=True):
                assert same(a, b), f"{name} with {count} threads"
    finally:
        torch.set_num_threads(threads)


def test_images_do_not_depend_on_each_other():
    case = make(6, 64, (28, 28), batch=5).to(torch.float32)
    together = by_kernels(case)
    for i in range(5):
        part = slice(i, i + 1)
        alone = Case(case.field, case.t[part], case.y[part], case.parameters, case.cotangent[part])
        for j, got in enumerate(by_kernels(alone)[:3]):
            assert same(got, together[j][part])


def test_only_what_is_wanted():
    case = make(6, 20, (7, 9))
    kernels = conv.Conv(library.load(), case.field, torch.float64)
    packed = kernels.pack(case.parameters)
    _, record = kernels.evaluate(packed, case.t, case.y, True)
    arguments = packed, record, case.t, case.y, case.cotangent
    y_grad, t_grad, grads = kernels.vjp(*arguments)
    every = [y_grad, t_grad, *grads]
    for i in range(8):
        asked = [j == i for j in range(8)]
        y_grad, t_grad, grads = kernels.vjp(*arguments, asked[0], asked[1], asked[2:])
        for j, got in enumerate([y_grad, t_grad, *grads]):
            assert same(got, every[j]) if i == j else got is None


def test_the_weights_are_copied():
    case = make(6, 20, (7, 9))
    kernels = conv.Conv(library.load(), case.field, torch.float64)
    packed = kernels.pack(case.parameters, differentiable=False)
    before, record = kernels.evaluate(packed, case.t, case.y, True)
    with pytest.raises(ValueError, match="differentiable=True"):
        kernels.vjp(packed, record, case.t, case.y, case.cotangent)
    for p in case.parameters:
        p.zero_()
    assert same(before, kernels.evaluate(packed, case.t, case.y, False)[0])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_not_finite_stays_so(value, activation):
    """Where torch gives nan or inf. Beside it a tile may have some more, far from it none."""
    case = make(3, 20, (28, 28), activation).to(torch.float32)
    case.y[1, 2, 13, 8] = value
    out, *gradients = by_kernels(case)
    want, *torchs = by_torch(case)
    bad = ~want.isfinite()
    assert not out[bad].isfinite().any()
    far = torch.ones_like(bad)
    far[1, :, 11:17, 6:12] = False
    assert out[far].isfinite().all()
    torch.testing.assert_close(out[far], want[far])
    for name, got, by in zip(NAMES[1:], gradients, torchs, strict=True):
        assert not got[by.isnan()].isfinite().any(), name


def test_a_cotangent_that_is_nan():
    case = make(3, 20, (12, 12)).to(torch.float32)
    case.cotangent[2, 0, 5, 5] = math.nan
    _, y_grad, t_grad, *grads = by_kernels(case)
    assert y_grad[:2].isfinite().all() and not y_grad[2, :, 4:7, 4:7].isfinite().any()
    assert t_grad[:2].isfinite().all() and t_grad[2].isnan()
    assert all(g.isnan().any() for g in grads)
