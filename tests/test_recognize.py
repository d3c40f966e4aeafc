"""Users' fields as the kernels know them: what is traced, when anew, and what is never done."""

import functools
import gc
import itertools
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from anode_fast import AugODEBlock, MLPField, explain, odeint, odeint_adjoint
from anode_fast import recognize as recognition
from anode_fast.kernels.cpu import library
from anode_fast.kernels.program import Program
from anode_fast.recognize import Recognized, recognize
from anode_fast.spec import ConvSpec, MLPSpec

if library.load() is None:
    pytest.skip(library.missing(), allow_module_level=True)

T = torch.tensor([0.0, 1.0])


class Field(nn.Module):
    def __init__(self, dim=2, hidden=8):
        super().__init__()
        self.nfe = 0
        self.scale = 1.0
        self.net = nn.Sequential(nn.Linear(dim, hidden), nn.Tanh(), nn.Linear(hidden, dim))

    def forward(self, t, y):
        self.nfe += 1
        return self.scale * self.net(y)


def reference(field, y0, **options):
    return odeint(field, y0, T, backend="reference", **options)


def backend_of(field, y0, **options):
    lines = explain(field, y0, T, **options).splitlines()
    return next(line for line in lines if line.startswith("backend")).split(": ")[1]


# --- what a field is ------------------------------------------------------------------------------


def spec_of(func, *shape):
    found = recognize(func, torch.tensor([0.5]), torch.rand(shape))
    assert isinstance(found, Recognized), found
    return found.spec()


class WithTime(nn.Module):
    def __init__(self, hidden=(5, 7), last=False, activation=F.relu):
        super().__init__()
        widths = [3, *hidden, 2]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.last, self.activation = last, activation

    def forward(self, t, y):
        time = t.expand(y.shape[0], 1)
        h = torch.cat((y, time) if self.last else (time, y), 1)
        for layer in self.layers[:-1]:
            h = self.activation(layer(h))
        return self.layers[-1](h)


@pytest.mark.parametrize(
    "activation",
    [torch.relu, F.softplus, torch.tanh, torch.sigmoid, F.silu, F.gelu, F.elu],
    ids=lambda f: f.__name__,
)
def test_perceptrons_have_their_spec(activation):
    name = activation.__name__
    assert spec_of(WithTime(activation=activation), 4, 2) == MLPSpec(2, (5, 7), name, True)
    assert spec_of(Field(3, 6), 4, 3).__class__ is Program  # of the factor 1.0


def test_time_last_is_a_program():
    program = spec_of(WithTime(last=True), 4, 2)
    assert [x.op for x in program.code] == ["join", "linear", "relu", "linear", "relu", "linear"]
    assert program.code[0].inputs == (1, 0)


@pytest.mark.parametrize("time", [False, True])
def test_the_papers_convolutions_have_their_spec(time):
    class Convolutions(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(3 + time, 6, 1)
            self.b = nn.Conv2d(6 + time, 6, 3, padding=1)
            self.c = nn.Conv2d(6 + time, 3, 1)

        def forward(self, t, x):
            h = F.softplus(self.a(self.timed(t, x)))
            return self.c(self.timed(t, F.softplus(self.b(self.timed(t, h)))))

        def timed(self, t, x):
            return torch.cat((torch.ones_like(x[:, :1]) * t, x), 1) if time else x

    assert spec_of(Convolutions(), 2, 3, 4, 5) == ConvSpec(3, 6, "softplus", time)


class Images(nn.Module):
    """Convolutions like the paper's, with something to differ in."""

    def __init__(self, first=F.relu, second=F.relu, middle=3, timed="all", scale=None, **given):
        super().__init__()
        k = {"all": (1, 1, 1), "first": (1, 0, 0), "last channel": (1, 1, 1), "": (0, 0, 0)}[timed]
        given = dict(padding=middle // 2) | given
        self.a = nn.Conv2d(3 + k[0], 6 - k[1], 1)
        self.b = nn.Conv2d(6, 6 - k[2], middle, **given)
        self.c = nn.Conv2d(6, 3, 1)
        self.first, self.second, self.timed, self.scale = first, second, timed, scale

    def with_time(self, t, x, layer):
        if not self.timed or (self.timed == "first" and layer):
            return x
        time = torch.ones_like(x[:, :1]) * t
        return torch.cat((x, time) if self.timed == "last channel" else (time, x), 1)

    def forward(self, t, x):
        h = self.first(self.a(self.with_time(t, x, 0)))
        h = self.second(self.b(self.with_time(t, h, 1)))
        value = self.c(self.with_time(t, h, 2))
        return value if self.scale is None else self.scale * value


OTHER_IMAGES = {
    "two activations": dict(second=torch.tanh),
    "softplus of its own": dict.fromkeys(
        ("first", "second"), functools.partial(F.softplus, beta=2)
    ),
    "no activation": dict.fromkeys(("first", "second"), nn.Identity()),
    "5x5": dict(middle=5),
    "1x1": dict(middle=1),
    "groups": dict(timed="", groups=2),
    "dilation": dict(dilation=2, padding=2),
    "circular": dict(padding_mode="circular"),
    "no bias": dict(bias=False),
    "time at first only": dict(timed="first"),
    "time last": dict(timed="last channel"),
    "scaled": dict(scale=0.5),
}


@pytest.mark.parametrize("name", OTHER_IMAGES)
def test_other_fields_of_images_run_their_own_code(name):
    field = Images(**OTHER_IMAGES[name]).double()
    y0 = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    assert "convolutions 1x1, 3x3, 1x1" in explain(field, y0, T) or name == "circular"
    given = dict(method="rk4", options={"step_size": 0.5})
    got, stats = odeint(field, y0, T, return_stats=True, **given)
    assert stats.backend == "reference"
    torch.testing.assert_close(got, reference(field, y0, **given))


@pytest.mark.parametrize("timed", ["all", ""])
def test_fields_of_images_like_the_papers_do_not(timed):
    field, y0 = Images(timed=timed), torch.randn(2, 3, 4, 4)
    assert odeint(field, y0, T, return_stats=True)[1].backend == "cpu"


def test_a_field_of_ours_inside_another_module():
    inner = MLPField(2, 8)

    class Damped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, t, y):
            return self.inner(t, y) - 0.1 * y

    field, y0 = Damped(), torch.randn(4, 2)
    assert backend_of(field, y0) == "cpu"
    inner.nfe = 0
    got, stats = odeint(field, y0, T, return_stats=True)
    assert inner.nfe == stats.nfe > 0
    torch.testing.assert_close(got, reference(field, y0), rtol=1e-5, atol=1e-6)


# --- operations -----------------------------------------------------------------------------------

SQUARE, VECTOR = torch.linspace(-1, 1, 9).reshape(3, 3), torch.tensor([0.5, -1.0, 2.0])
SLOPES = torch.tensor([0.1, 0.2, -0.3])

KNOWN = {
    "neg, abs, sign": lambda t, y: -y.abs() * y.sign() + y.sgn(),
    "exp, expm1": lambda t, y: y.exp() - y.expm1(),
    "log, log1p": lambda t, y: (y.abs() + 0.5).log() + y.abs().log1p(),
    "sqrt, rsqrt": lambda t, y: (y * y + 1).sqrt() + (y * y + 1).rsqrt(),
    "sin, cos": lambda t, y: y.sin() * y.cos(),
    "reciprocal": lambda t, y: (y.abs() + 1).reciprocal(),
    "powers": lambda t, y: y**2 + y**3 + y**1 + (y * y + 1) ** 0.5 + (y * y + 1) ** -1 + y**0,
    "a power": lambda t, y: (y.abs() + 1) ** 1.7,
    "activations": lambda t, y: y.relu() + y.sigmoid() + y.tanh() + F.silu(y) + F.gelu(y),
    "softplus": lambda t, y: F.softplus(y) + F.softplus(y, beta=3.0),
    "elu": lambda t, y: F.elu(y) + F.elu(y, 0.3) + F.selu(y),
    "celu": lambda t, y: F.celu(y, 0.7),
    "hardsigmoid": lambda t, y: F.hardsigmoid(2 * y + 0.1) + F.hardswish(2 * y + 0.1),
    "leaky relu": lambda t, y: F.leaky_relu(y) + F.leaky_relu(y, 0.3),
    "prelu": lambda t, y: F.prelu(y, SLOPES) + F.prelu(y, SLOPES[:1]),
    "hardtanh at its bounds": lambda t, y: F.hardtanh(y) + F.relu6(8 * y),
    "clamp at its bounds": lambda t, y: y.clamp(-1, 1) + y.clamp(min=0.5) + y.clamp(max=0.5),
    "mish, softsign, tanhshrink": lambda t, y: F.mish(y) + F.softsign(y) + F.tanhshrink(y),
    "sums": lambda t, y: (y + VECTOR) + (2 - y) + torch.rsub(y, VECTOR) + (y - t) + (1 + y),
    "products": lambda t, y: y * VECTOR * t * 2.0 / 3.0 / (VECTOR + 3) + 1 / (y * y + 1),
    "comparisons": lambda t, y: torch.where(y > 0, y, 2 * y) + torch.where(y <= VECTOR, y, 1.0),
    "more comparisons": lambda t, y: torch.where(y < 0, 0.0, y) + torch.where(y >= t, y, t),
    "matrices": lambda t, y: y @ SQUARE + y @ SQUARE.T + F.linear(y, SQUARE, VECTOR),
    "addmm": lambda t, y: torch.addmm(VECTOR, y, SQUARE),
    "time through a layer": lambda t, y: y + F.linear(t.reshape(1, 1), VECTOR.reshape(3, 1)),
    "slices": lambda t, y: torch.cat((y[:, 1:], y[..., -3:-2]), -1),
    "select": lambda t, y: torch.stack((y[..., -1], y[:, 0] * y[:, 1], 0 * y[:, 0] + t), -1),
    "split": lambda t, y: torch.cat(y.split((1, 2), 1)[::-1], 1),
    "chunk, unbind": lambda t, y: torch.cat(y.chunk(3, 1), 1) + torch.stack(y.unbind(-1), -1),
    "sum, mean": lambda t, y: y.sum(1, keepdim=True) * y + y.mean(-1, keepdim=True),
    "norm of a row": lambda t, y: y / (1 + y.square().sum(-1)).unsqueeze(-1),
    "layer norm by hand": lambda t, y: (
        (y - y.mean(-1, True)) / ((y - y.mean(-1, True)) ** 2).mean(-1, True).add(0.1).sqrt()
    ),
    "expanded": lambda t, y: y[:, :1].expand(-1, 3) - y + t.expand_as(y),
    "views": lambda t, y: y.reshape(4, 1, 3).squeeze(1) + y.unsqueeze(0).view(4, 3),
    "filled": lambda t, y: torch.full_like(y, 0.3) + torch.zeros_like(y) + y.new_ones(4, 3) * t,
    "copies": lambda t, y: y.clone().contiguous().to(y.dtype),
}

STATES = torch.tensor([[-1.0, 0.0, 1.0], [0.5, -0.5, 2.0], [-1.5, 3.0, 0.25], [0.75, 6.0, -2.0]])


@pytest.mark.parametrize(
    "name, dtype",
    [
        (name, dtype)
        for name in KNOWN
        for dtype in (torch.float32, torch.float64)
        # Torch's gradients of the two have the precision of float32.
        if name not in ("celu", "hardsigmoid") or dtype == torch.float32
    ],
    ids=str,
)
def test_operations_that_kernels_know(name, dtype, monkeypatch):
    for weight in ("SQUARE", "VECTOR", "SLOPES"):
        monkeypatch.setitem(globals(), weight, globals()[weight].to(dtype))
    # What is recognised has been compared there, in value and gradient.
    y0 = STATES.to(dtype)
    found = recognize(KNOWN[name], torch.tensor([0.5]), y0)
    assert isinstance(found, Recognized), found
    t, given = torch.tensor([0.5, 0.6]), dict(method="rk4", options={"step_size": 0.1})
    want = odeint(KNOWN[name], y0, t, backend="reference", **given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got, stats = odeint(KNOWN[name], y0, t, return_stats=True, **given)
    assert stats.backend == "cpu"
    rtol = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(got, want, rtol=rtol, atol=rtol)


UNKNOWN = {
    "every second feature": (lambda t, y: y[:, ::2].repeat(1, 2)[:, :3], "by a step"),
    "some rows": (lambda t, y: torch.cat((y[1:], y[:1])), "some rows of a batch"),
    "one row": (lambda t, y: y - y[0], "one row of a batch"),
    "threshold": (lambda t, y: F.softplus(y, threshold=5), "threshold of its own"),
    "alpha": (lambda t, y: torch.add(y, y, alpha=2), "alpha"),
    "addmm with beta": (lambda t, y: torch.addmm(VECTOR, y, SQUARE, beta=2), "beta or alpha"),
    "tanh form of gelu": (lambda t, y: F.gelu(y, approximate="tanh"), "approximate"),
    "power by the state": (lambda t, y: y.abs() ** y, "pow"),
    "rows on features": (lambda t, y: y + torch.stack((y[0, 0], y[1, 0], y[2, 0])), "one row"),
    "a number for each row": (
        lambda t, y: y * (y[:, 0] * torch.arange(4.0)).unsqueeze(1),
        "across rows",
    ),
    "product of states": (lambda t, y: y @ y.T @ y, "permute"),
    "sum over rows": (lambda t, y: y - y.sum(0), "over the batch"),
    "transposed": (lambda t, y: y.reshape(3, 4).T, ""),
    "complex": (lambda t, y: (y + 0j).real, ""),
    "sorted": (lambda t, y: y.sort(-1).values, "int64"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_operations_that_kernels_do_not_know(name):
    field, why = UNKNOWN[name]
    found = recognize(field, torch.tensor([0.5]), STATES)
    assert isinstance(found, str) and why in found


def test_two_activations_make_a_program():
    layers = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    assert isinstance(spec_of(lambda t, y: layers(y), 4, 2), Program)


# --- counters -------------------------------------------------------------------------------------


def test_counters_count_the_evaluations_made():
    field, y0 = Field(), torch.randn(5, 2)
    for _ in range(3):
        field.nfe = 10
        _, stats = odeint(field, y0, T, rtol=1e-3, atol=1e-3, return_stats=True)
        assert stats.backend == "cpu" and field.nfe == 10 + stats.nfe
    solution, stats = odeint(field, y0, T, rtol=1e-3, atol=1e-3, return_stats=True)
    before = field.nfe
    solution.sum().backward()
    assert field.nfe == before + stats.nfe_backward


def test_counters_of_any_step_and_place():
    calls = 0
    inner = Field()

    def field(t, y):
        nonlocal calls
        calls += 2
        return inner(t, y)

    _, stats = odeint(field, torch.randn(5, 2), T, return_stats=True)
    assert stats.backend == "cpu" and calls == 2 * stats.nfe == 2 * inner.nfe


def test_explain_evaluates_nothing_that_counts():
    field = Field()
    assert backend_of(field, torch.randn(3, 2)) == "cpu"
    assert field.nfe == 0


# --- changes --------------------------------------------------------------------------------------


def changed_scale(field):
    field.scale = 3.0


def changed_parameter(field):
    field.net[0].weight = nn.Parameter(torch.full_like(field.net[0].weight, 0.3))


def changed_layer(field):
    field.net[1] = nn.Softplus()


def changed_values(field):
    with torch.no_grad():
        field.net[2].weight.mul_(2)


def changed_list(field):
    field.net.append(nn.Tanh())


@pytest.mark.parametrize(
    "change", [changed_scale, changed_parameter, changed_layer, changed_values, changed_list]
)
def test_a_change_is_seen(change):
    field, y0 = Field(), torch.randn(5, 2)
    first = odeint(field, y0, T)
    change(field)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # seen before the first evaluation
        got, stats = odeint(field, y0, T, return_stats=True)
    assert stats.backend == "cpu"
    torch.testing.assert_close(got, reference(field, y0), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got, first, rtol=1e-3)


class Containers(nn.Module):
    """Numbers in a list, in a set, and in a variable around a function."""

    def __init__(self):
        super().__init__()
        self.rates, self.signs = [1.0, 2.0], {1.0}
        offset = 0.5

        def shift(y):
            return y + offset

        def set_offset(value):
            nonlocal offset
            offset = value

        self.shift, self.set_offset = shift, set_offset

    def forward(self, t, y):
        (sign,) = self.signs
        return -sign * sum(self.rates) * self.shift(y)


@pytest.mark.parametrize(
    "change",
    [
        lambda field: field.rates.__setitem__(1, 0.5),
        lambda field: field.rates.append(0.7),
        lambda field: (field.signs.clear(), field.signs.add(-0.5)),
        lambda field: field.set_offset(-1.0),
    ],
    ids=["entry of a list", "longer list", "set", "variable"],
)
def test_a_change_in_a_container_is_seen(change):
    field, y0 = Containers(), torch.randn(5, 2)
    assert odeint(field, y0, T, return_stats=True)[1].backend == "cpu"
    change(field)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got, stats = odeint(field, y0, T, return_stats=True)
    assert stats.backend == "cpu"
    torch.testing.assert_close(got, reference(field, y0), rtol=1e-5, atol=1e-5)


def test_a_change_in_a_default_argument_is_seen():
    rates = [1.0]

    def field(t, y, rates=rates):
        return -rates[0] * y

    y0 = torch.ones(2, 2)
    for rate in (1.0, 2.0):
        rates[0] = rate
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            got, stats = odeint(field, y0, T, return_stats=True)
        assert stats.backend == "cpu"
        torch.testing.assert_close(got[-1], torch.exp(torch.tensor(-rate)).expand(2, 2))


def test_a_field_that_keeps_a_list_runs_its_own_code():
    times = []

    def field(t, y):
        times.append(t)
        return -y

    assert "stores values (a list)" in explain(field, torch.ones(2, 2), T)
    assert times == []
    _, stats = odeint(field, torch.ones(2, 2), T, return_stats=True)
    assert stats.backend == "reference" and len(times) == stats.nfe


@pytest.mark.parametrize("part, offset", [("value", 1.0), ("gradient", 0.0)])
def test_a_trace_that_is_not_the_field_is_refused(part, offset, monkeypatch):
    real = Recognized.evaluate

    def other(self, tensors, t, y):
        value = real(self, tensors, t, y)
        return value + offset if offset else value + t - t.detach()

    monkeypatch.setattr(Recognized, "evaluate", other)
    assert f"its {part} is not that of the operations" in explain(Field(), torch.ones(2, 2), T)


def test_a_mode_is_seen():
    field = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))

    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = field

        def forward(self, t, y):
            return self.net(y)

    dropping, y0 = Dropping(), torch.randn(4, 2)
    assert backend_of(dropping, y0) == "reference"
    assert "random" in explain(dropping, y0, T)
    dropping.eval()
    assert backend_of(dropping, y0) == "cpu"
    dropping.train()
    assert backend_of(dropping, y0) == "reference"


def test_hooks_come_and_go():
    field, y0 = Field(), torch.randn(4, 2)
    assert backend_of(field, y0) == "cpu"
    handle = field.net[1].register_forward_hook(lambda module, inputs, value: 2 * value)
    assert backend_of(field, y0) == "reference" and "hooks" in explain(field, y0, T)
    torch.testing.assert_close(odeint(field, y0, T), reference(field, y0))
    handle.remove()
    assert backend_of(field, y0) == "cpu"


def test_what_changes_all_the_time_is_left_alone(monkeypatch):
    traced = []
    real = recognition._trace
    monkeypatch.setattr(recognition, "_trace", lambda *a: traced.append(1) or real(*a))
    field, y0 = Field(), torch.randn(4, 2)
    for i in range(12):
        field.scale = 1.0 + i
        got = odeint(field, y0, T)
        torch.testing.assert_close(got, reference(field, y0), rtol=1e-4, atol=1e-5)
    assert "changes from call to call" in explain(field, y0, T)
    assert len(traced) == 1 + recognition.MOST_CHANGES


GAIN = 1.0


def by_a_global(t, y):
    return -GAIN * y


def test_globals_are_seen(monkeypatch):
    y0 = torch.ones(2, 2)
    for gain in (1.0, 2.0):
        monkeypatch.setitem(globals(), "GAIN", gain)
        got, stats = odeint(by_a_global, y0, T, return_stats=True)
        assert stats.backend == "cpu"
        torch.testing.assert_close(got[-1], torch.exp(torch.tensor(-gain)).expand(2, 2))


def test_functions_made_anew_share_a_trace(monkeypatch):
    traced = []
    real = recognition._trace
    monkeypatch.setattr(recognition, "_trace", lambda *a: traced.append(1) or real(*a))
    matrix = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]])
    y0 = torch.randn(3, 2)
    for _ in range(5):
        odeint(lambda t, y: y @ matrix, y0, T)
    assert len(traced) == 1
    for k in (1.0, 2.0):  # another number around it is another function
        got = odeint(functools.partial(lambda k, t, y: -k * y, k), y0, T)
        torch.testing.assert_close(got[-1], y0 * torch.exp(torch.tensor(-k)))


class Hidden:
    """Holds a number where nobody looks."""

    __slots__ = ("value",)


def test_the_first_evaluation_finds_what_was_not_seen():
    hidden = Hidden()
    hidden.value = 1.0

    def field(t, y):
        return -hidden.value * y

    y0 = torch.ones(3, 2)
    assert odeint(field, y0, T, return_stats=True)[1].backend == "cpu"
    hidden.value = 2.0
    with pytest.warns(UserWarning, match="its own code is used from now on") as caught:
        got, stats = odeint(field, y0, T, return_stats=True)
    assert len(caught) == 1 and stats.backend == "reference"
    torch.testing.assert_close(got[-1], torch.exp(torch.tensor(-2.0)).expand(3, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one warning is enough
        assert odeint(field, y0, T, return_stats=True)[1].backend == "reference"


def test_the_first_evaluation_of_images_is_looked_at_too():
    hidden = Hidden()
    hidden.value = F.relu

    class Convolutions(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
            self.c = nn.Conv2d(4, 2, 1)

        def forward(self, t, x):
            return self.c(hidden.value(self.b(hidden.value(self.a(x)))))

    field, y0 = Convolutions(), torch.randn(3, 2, 5, 5)
    assert odeint(field, y0, T, return_stats=True)[1].backend == "cpu"
    hidden.value = torch.tanh
    with pytest.warns(UserWarning, match="its own code is used from now on"):
        got, stats = odeint(field, y0, T, return_stats=True)
    assert stats.backend == "reference"
    torch.testing.assert_close(got, reference(field, y0), rtol=1e-5, atol=1e-6)


def test_a_function_made_anew_has_its_own_counter():
    def made(count):
        def field(t, y):
            nonlocal count
            count += 1
            return -y

        return field, lambda: count

    y0 = torch.ones(3, 2)
    first, count = made(0)
    odeint(first, y0, T)
    before = count()
    second, count_of_second = made(before)
    odeint(second, y0, T)
    assert before > 0 and count() == before and count_of_second() == 2 * before


def test_code_for_one_size_of_batch():
    layer = nn.Linear(2, 2)

    def field(t, y):
        return layer(y.reshape(20, 2))

    y0 = torch.randn(20, 2)
    for _ in range(3):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            got, stats = odeint(field, y0, T, return_stats=True)
        assert stats.backend == "cpu"
        torch.testing.assert_close(got, reference(field, y0), rtol=1e-5, atol=1e-5)


def test_code_that_looks_at_the_size_of_the_batch():
    def field(t, y):
        return -y if y.shape[0] < 20 else -2 * y

    for size, rate in ((30, 2.0), (30, 2.0), (10, 1.0), (40, 2.0)):
        y0 = torch.ones(size, 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = odeint(field, y0, T)
        torch.testing.assert_close(got[-1], torch.exp(torch.tensor(-rate)).expand(size, 2))


# --- what is never done ---------------------------------------------------------------------------


def test_a_trace_leaves_no_trace():
    class Remembering(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.seen = []
            self.last = None
            self.norm = nn.BatchNorm1d(2)

        def forward(self, t, y):
            self.calls += 1
            self.seen.append(1)
            self.last = y
            return self.norm(y)

    field, y0 = Remembering(), torch.randn(5, 2)
    state = torch.random.get_rng_state()
    assert backend_of(field, y0) == "reference"
    assert field.calls == 0 and field.seen == [] and field.last is None
    assert field.norm.num_batches_tracked == 0
    assert torch.equal(field.norm.running_mean, torch.zeros(2))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_module_is_not_kept_alive():
    field = Field()
    odeint(field, torch.randn(3, 2), T)
    gone = weakref.ref(field)
    del field
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    "name, field",
    {
        "no hash": type("NoHash", (), {"__hash__": None, "__call__": lambda self, t, y: -y})(),
        "raises": lambda t, y: 1 / 0,
        "item": lambda t, y: y * y.sum().item(),
        "another dtype": lambda t, y: -y * (torch.ones(len(y), 1, dtype=torch.float64) * t),
        "sum over the batch": lambda t, y: -y * y.sum(),
        "cumsum": lambda t, y: y.cumsum(0) - 2 * y,
        "other rows": lambda t, y: -y.flip(0),
        "broadcast across rows": lambda t, y: -y - 0 * y.mean(0, keepdim=True),
    }.items(),
)
def test_what_kernels_do_not_know(name, field):
    y0 = torch.rand(3, 2, requires_grad=True)
    found = recognize(field, T, y0)
    assert isinstance(found, str) and found


@pytest.mark.parametrize("solve", [odeint, odeint_adjoint])
def test_gradients_reach_what_a_tensor_was_made_of(solve):
    leaf = torch.tensor([0.5, -0.3], requires_grad=True)
    made = leaf * 2

    def field(t, y):
        return torch.tanh(y * made + leaf)

    y0 = torch.ones(3, 2, requires_grad=True)
    more = dict(adjoint_params=(made, leaf)) if solve is odeint_adjoint else {}
    grads = []
    for backend in ("auto", "reference"):
        solution = solve(field, y0, T, backend=backend, gradient="discrete", **more)
        grads.append(torch.autograd.grad(solution.sum(), (leaf, y0), retain_graph=True))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_block_recognises_its_field():
    class Augmented(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))

        def forward(self, t, y):
            return self.net(y)

    block = AugODEBlock(Augmented(), 2)
    for size in (16, 3):  # more rows than are looked at, and fewer
        x = torch.randn(size, 2)
        got = block(x)
        assert block.stats.backend == "cpu"
        want = AugODEBlock(block.field, 2, backend="reference")(x)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_row_of_several_parts_takes_its_steps_as_one():
    field, y0 = Field(), torch.randn(3, 4, 2)
    assert backend_of(field, y0) == "cpu"
    assert backend_of(field, y0, step_control="sample") == "reference"
    got = odeint(field, y0, T, step_control="sample")
    torch.testing.assert_close(got, reference(field, y0, step_control="sample"))
    assert backend_of(field, y0[:, 0], step_control="sample") == "cpu"


def test_users_modes_see_no_trace():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    field, y0 = Field(), torch.randn(4, 2)
    with Count() as count:
        odeint(field, y0, T)
    assert count.calls < 60
