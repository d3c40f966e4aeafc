"""Fields against the form that concatenates time, in float64: values and every gradient."""

import copy
import dataclasses
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from anode_fast.errors import InvalidArgument, InvalidType
from anode_fast.fields import _FUNCTIONS, ConvField, MLPField
from anode_fast.spec import ACTIVATIONS, ConvSpec, MLPSpec
from tests.helpers import assert_no_worse

ACTS = {
    "relu": F.relu,
    "softplus": F.softplus,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "elu": F.elu,
    "identity": nn.Identity(),
}


def naive(field, t, y):
    """The field with [t, y] built by concatenation, from the same weights."""
    mlp = isinstance(field, MLPField)
    layers = list(field.layers) if mlp else [field.conv1, field.conv2, field.conv3]
    for i, layer in enumerate(layers):
        if i:
            y = ACTS[field.activation](y)
        if field.time_dependent and (i == 0 or not mlp):
            shape = (*y.shape[:-1], 1) if mlp else (len(y), 1, *y.shape[2:])
            y = torch.cat([t.expand(shape), y], -1 if mlp else 1)
        y = layer(y)
    return y


def values_and_gradients(f, field, t, y, cotangent):
    t, y = (x.detach().clone().requires_grad_() for x in (t, y))
    value = f(t, y)
    params = dict(field.named_parameters())
    grads = torch.autograd.grad(value, (t, y, *params.values()), cotangent, allow_unused=True)
    return {"value": value.detach(), **dict(zip(["t", "y", *params], grads, strict=True))}


def assert_like_naive(field, t, y):
    cotangent = torch.randn_like(y)
    got = values_and_gradients(field, field, t, y, cotangent)
    want = values_and_gradients(lambda t, y: naive(field, t, y), field, t, y, cotangent)
    if not field.time_dependent:
        assert got.pop("t") is None and want.pop("t") is None
    for name, tensor in want.items():
        torch.testing.assert_close(
            got[name], tensor, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}"
        )


def a_time(kind, batch, dims, dtype=torch.float64):
    return torch.tensor(0.7, dtype=dtype) if kind == "0-d" else torch.rand(batch, *[1] * (dims - 1))


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "make", [lambda **kw: MLPField(3, 8, **kw), lambda **kw: ConvField(2, 4, **kw)]
)
def test_every_activation(make, activation):
    field = make(activation=activation)
    y = 3 * (torch.randn(5, 3) if isinstance(field, MLPField) else torch.randn(3, 2, 5, 4))
    assert_like_naive(field, torch.tensor(-1.3), y)


def test_activations_are_torchs():
    assert list(_FUNCTIONS) == list(ACTIVATIONS) == list(ACTS)
    x = torch.tensor([-30.0, -1.0, -0.0, 0.0, 1e-9, 2.0, 21.0, torch.nan])
    for name, function in _FUNCTIONS.items():
        torch.testing.assert_close(function(x), ACTS[name](x), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("time_dependent", [True, False])
@pytest.mark.parametrize("kind", ["0-d", "per row"])
@pytest.mark.parametrize("num_hidden", [1, 2, 4])
@pytest.mark.parametrize("batch", [0, 1, 6])
def test_mlp_like_concatenation(time_dependent, kind, num_hidden, batch):
    field = MLPField(3, 7, num_hidden=num_hidden, time_dependent=time_dependent, activation="tanh")
    assert_like_naive(field, a_time(kind, batch, 2), torch.randn(batch, 3))


@pytest.mark.parametrize("shape", [(), (1,)])
def test_mlp_of_one_state(shape):
    field = MLPField(4, 5)
    t, y = torch.full(shape, 0.3), torch.randn(4)
    assert field(t, y).shape == (4,)
    assert_like_naive(field, t, y)


@pytest.mark.parametrize("time_dependent", [True, False])
@pytest.mark.parametrize("kind", ["0-d", "per row"])
@pytest.mark.parametrize("size", [(1, 1), (1, 4), (2, 1), (2, 2), (5, 3), (7, 7)], ids=str)
@pytest.mark.parametrize("batch", [0, 3])
def test_conv_like_concatenation(time_dependent, kind, size, batch):
    field = ConvField(2, 5, time_dependent=time_dependent, activation="softplus")
    assert_like_naive(field, a_time(kind, batch, 4), torch.randn(batch, 2, *size))


@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 4),
    filters=st.integers(1, 6),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    t=st.floats(-5, 5),
    last=st.booleans(),
)
def test_conv_like_concatenation_at_any_size(batch, channels, filters, height, width, t, last):
    y = torch.randn(batch, channels, height, width)
    if last:
        y = y.to(memory_format=torch.channels_last)
    assert_like_naive(ConvField(channels, filters, activation="tanh"), torch.tensor(t), y)


@pytest.mark.parametrize(
    ("field", "shape"), [(MLPField, (37, 5)), (ConvField, (3, 5, 9, 6))], ids=["mlp", "conv"]
)
def test_float32_is_no_worse_than_concatenation(field, shape, device):
    field, t, y = field(5, 32).to(device), torch.tensor(0.9, device=device), torch.randn(shape)
    y = y.to(device)
    exact = values_and_gradients(lambda t, y: naive(field, t, y), field, t, y, y)
    field, t, y = field.float(), t.float(), y.float()
    ref = values_and_gradients(lambda t, y: naive(field, t, y), field, t, y, y)
    got = values_and_gradients(field, field, t, y, y)
    for name in exact:
        assert_no_worse(got[name], ref[name], exact[name], name)


@pytest.mark.parametrize("make", [lambda: MLPField(2, 3, activation="tanh"),
                                  lambda: ConvField(1, 2, activation="tanh")])  # fmt: skip
def test_gradients_twice(make):
    field = make()
    y = torch.randn(2, 2) if isinstance(field, MLPField) else torch.randn(2, 1, 3, 2)
    names, params = zip(*field.named_parameters(), strict=True)

    def value(t, y, *params):
        return torch.func.functional_call(field, dict(zip(names, params, strict=True)), (t, y))

    inputs = [torch.tensor(0.4), y, *params]
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(value, inputs)
    assert torch.autograd.gradgradcheck(value, inputs)


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["0-d", "per row"])
@pytest.mark.parametrize(
    "f", [lambda f: f, lambda f: lambda t, y: naive(f, t, y)], ids=["ours", "naive"]
)
def test_nothing_is_concatenated(f, kind):
    with torch.no_grad(), Calls() as calls:
        f(MLPField(3, 4))(a_time(kind, 5, 2), torch.randn(5, 3))
        f(ConvField(3, 4))(a_time(kind, 5, 4), torch.randn(5, 3, 4, 4))
    copies = {"cat", "expand", "constant_pad_nd"} & set(calls.names)
    assert copies == (set() if isinstance(f(MLPField(1, 1)), MLPField) else {"cat", "expand"})


@pytest.mark.parametrize(
    ("field", "shape", "time"),
    [(MLPField, (6, 3), (6, 1)), (ConvField, (6, 3, 3, 2), (6, 1, 1, 1))],
    ids=["mlp", "conv"],
)
def test_one_time_per_row_means_row_by_row(field, shape, time):
    field, t, y = field(3, 4), torch.randn(time), torch.randn(shape)
    rows = torch.cat([field(t[i].reshape(()), y[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(field(t, y), rows, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:FutureWarning")  # torch's own, in jvp
def test_vmap_over_times_and_forward_mode():
    for field, y in (
        (MLPField(3, 4), torch.randn(5, 3)),
        (ConvField(2, 4), torch.randn(2, 2, 3, 3)),
    ):
        times = torch.linspace(0, 1, 4)
        many = torch.func.vmap(field, (0, None))(times, y)
        torch.testing.assert_close(many, torch.stack([field(t, y) for t in times]))
        _, slope = torch.func.jvp(
            lambda t, f=field, y=y: f(t, y), (times[1],), (torch.tensor(1.0),)
        )
        h = torch.tensor(1e-6)
        difference = (field(times[1] + h, y) - field(times[1] - h, y)) / (2 * h)
        torch.testing.assert_close(slope, difference, rtol=1e-6, atol=1e-8)


FIELDS = [lambda **kw: (MLPField(3, 4, **kw), torch.randn(5, 3)),
          lambda **kw: (ConvField(3, 4, **kw), torch.randn(5, 3, 2, 2))]  # fmt: skip


@pytest.mark.parametrize("make", FIELDS)
def test_evaluations_are_counted_and_the_state_is_left_alone(make):
    field, y = make()
    assert field.nfe == 0
    before, t = y.clone(), torch.tensor(0.5)
    for _ in range(3):
        field(t, y)
    assert field.nfe == 3 and type(field.nfe) is int
    assert torch.equal(y, before)
    field.nfe = 0
    field(t, y)
    assert field.nfe == 1
    assert "nfe" not in field.state_dict()


@pytest.mark.parametrize("make", FIELDS)
def test_copies_and_dtypes(make):
    field, y = make()
    t = torch.tensor(0.5)
    value = field(t, y)
    other, _ = make()
    other.load_state_dict(field.state_dict())
    for clone in (copy.deepcopy(field), pickle.loads(pickle.dumps(field)), other):
        assert torch.equal(clone(t, y), value)
        assert clone.spec() == field.spec()
    assert field.float()(t.float(), y.float()).dtype == torch.float32


def test_weights_are_read_at_every_call():
    field, t, y = MLPField(3, 4), torch.tensor(0.5), torch.randn(5, 3)
    nn.utils.parametrizations.weight_norm(field.layers[0])
    field.layers[0].parametrizations.weight.original0.data.mul_(2)
    torch.testing.assert_close(field(t, y), naive(field, t, y))
    assert not torch.allclose(field(t, y), MLPField(3, 4)(t, y))


@pytest.mark.parametrize("make", FIELDS)
def test_autocast_mixes_dtypes(make):
    field, y = make()
    field, y = field.float(), y.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for state in (y, y.bfloat16()):
            value = field(torch.tensor(0.5, dtype=state.dtype), state)
            assert value.dtype == torch.bfloat16
    torch.testing.assert_close(
        value.float(), field(torch.tensor(0.5).float(), y), rtol=0.1, atol=0.1
    )


def test_specs_are_plain_data():
    spec = MLPField(3, 4, num_hidden=3, activation="gelu", time_dependent=False).spec()
    assert spec == MLPSpec(3, (4, 4, 4), "gelu", False)
    assert ConvField(3, 4).spec() == ConvSpec(3, 4, "relu", True)
    assert hash(spec) == hash(copy.deepcopy(spec))
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.dim = 5


def test_layer_sizes():
    shapes = [tuple(layer.weight.shape) for layer in MLPField(3, 8).layers]
    assert shapes == [(8, 4), (8, 8), (3, 8)]
    field = ConvField(3, 8)
    shapes = [tuple(c.weight.shape) for c in (field.conv1, field.conv2, field.conv3)]
    assert shapes == [(8, 4, 1, 1), (8, 9, 3, 3), (3, 9, 1, 1)]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MLPField(0, 4), InvalidArgument, "MLPField: dim is 0, want at least 1"),
        (lambda: MLPField(3, -1), InvalidArgument, "hidden_dim is -1"),
        (lambda: MLPField(3, 4.0), InvalidType, r"hidden_dim is 4.0 \(float\), want an int"),
        (lambda: MLPField(3, True), InvalidType, "hidden_dim is True"),
        (lambda: MLPField(3, 4, num_hidden=0), InvalidArgument, "num_hidden is 0"),
        (lambda: MLPField(3, 4, activation="swish"), InvalidArgument, "'swish', want one of relu"),
        (lambda: ConvField(0, 4), InvalidArgument, "ConvField: channels is 0"),
        (lambda: ConvField(3, "4"), InvalidType, "num_filters is '4'"),
        (lambda: ConvField(3, 4, activation=None), InvalidArgument, "activation is None"),
        (lambda: MLPSpec(3, ()), InvalidArgument, "number of hidden layers is 0"),
        (lambda: MLPSpec(3, (4, 0)), InvalidArgument, r"hidden\[1\] is 0"),
        (lambda: MLPSpec(3, (4,), "sin"), InvalidArgument, "MLPSpec: activation"),
        (lambda: ConvSpec(3, 0), InvalidArgument, "ConvSpec: num_filters is 0"),
    ],
)
def test_bad_sizes(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("field", "t", "y", "error", "message"),
    [
        (MLPField, (), (5, 4), InvalidArgument, r"MLPField: .*\(5, 4\), want \(batch, 3\)"),
        (MLPField, (), (2, 5, 3), InvalidArgument, r"\(2, 5, 3\), want \(batch, 3\)"),
        (MLPField, (), (), InvalidArgument, r"state has shape \(\)"),
        (MLPField, (5,), (5, 3), InvalidArgument, r"t has shape \(5,\), want \(\) .* \(5, 1\)"),
        (MLPField, (4, 1), (5, 3), InvalidArgument, r"t has shape \(4, 1\)"),
        (MLPField, (3,), (3,), InvalidArgument, r"t has shape \(3,\), want .* \(1,\)"),
        (ConvField, (), (5, 4, 2, 2), InvalidArgument, r"ConvField: .*want \(batch, 3, height"),
        (ConvField, (), (3, 2, 2), InvalidArgument, r"\(3, 2, 2\), want \(batch, 3, height"),
        (ConvField, (5,), (5, 3, 2, 2), InvalidArgument, r"want \(\) .* \(5, 1, 1, 1\)"),
    ],
)
def test_states_and_times_that_do_not_fit(field, t, y, error, message):
    with pytest.raises(error, match=message):
        field(3, 4)(torch.zeros(t), torch.zeros(y))


@pytest.mark.parametrize("make", FIELDS)
def test_wrong_types(make):
    field, y = make()
    with pytest.raises(InvalidType, match="t is a float, want a 0-d tensor"):
        field(0.5, y)
    with pytest.raises(
        InvalidType, match="state is torch.float32, but the weights are torch.float64"
    ):
        field(torch.tensor(0.5), y.float())


def test_compile_makes_one_graph():
    """A count would be another graph each time: in a graph the field does not count."""
    field, t, y = MLPField(3, 4), torch.tensor(0.5), torch.randn(5, 3)
    graphs = []
    compiled = torch.compile(field, backend=lambda g, _: graphs.append(g) or g, fullgraph=True)
    values = [compiled(t, y) for _ in range(10)]
    assert len(graphs) == 1 and field.nfe == 0
    torch.testing.assert_close(values[-1], field(t, y), rtol=0, atol=0)
