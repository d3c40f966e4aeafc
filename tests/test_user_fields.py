"""Twenty fields as users write them: which are solved by kernels, which are not and why.

All must be right, by kernels or not: value, gradients and counts are compared with the reference
path in float64, and with torchdiffeq's counts.
"""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
import torchdiffeq
from torch import nn

import anode_fast

# --- fields ---------------------------------------------------------------------------------------


class TimeFirst(nn.Module):
    """The field of the paper's experiments."""

    def __init__(self):
        super().__init__()
        self.nfe = 0
        self.fc1, self.fc2, self.fc3 = nn.Linear(3, 16), nn.Linear(16, 16), nn.Linear(16, 2)
        self.act = nn.ReLU(inplace=True)

    def forward(self, t, x):
        self.nfe += 1
        time = torch.ones(x.shape[0], 1).to(x) * t
        h = self.act(self.fc1(torch.cat([time, x], 1)))
        return self.fc3(self.act(self.fc2(h)))


class TimeLast(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 12), nn.Softplus(), nn.Linear(12, 2))

    def forward(self, t, y):
        return self.net(torch.cat((y, t.expand(y.shape[0], 1)), dim=-1))


class Spiral(nn.Module):
    """The demo's: a cube before the layers, a state [batch, 1, 2]."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 50), nn.Tanh(), nn.Linear(50, 2))
        for m in self.net:
            if isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, std=0.1)
                nn.init.zeros_(m.bias)

    def forward(self, t, y):
        return self.net(y**3)


class ElementwiseTime(nn.Module):
    """Layers that are scaled and shifted by the time, as in FFJORD's concatsquash."""

    def __init__(self):
        super().__init__()
        self.layer, self.gate, self.shift = nn.Linear(2, 16), nn.Linear(1, 16), nn.Linear(1, 16)
        self.out = nn.Linear(16, 2)

    def forward(self, t, y):
        time = t.reshape(1, 1)
        h = self.layer(y) * torch.sigmoid(self.gate(time)) + self.shift(time)
        return self.out(F.elu(h))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.tensor(0.3))

    def forward(self, t, y):
        h = y + F.silu(self.a(y))
        return (h + F.leaky_relu(self.b(h), 0.2)) * self.scale - y


class TiedWeights(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3, bias=False)

    def forward(self, t, y):
        return torch.tanh(self.layer(torch.tanh(self.layer(y)))) - 0.1 * y


class Frozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 3))
        self.net[0].requires_grad_(False)

    def forward(self, t, y):
        return self.net(y)


class WeightNormed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))

    def forward(self, t, y):
        return -F.softsign(self.layer(y))


class BatchNormed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

    def forward(self, t, y):
        return -self.norm(self.layer(y))


class LotkaVolterra(nn.Module):
    def __init__(self):
        super().__init__()
        self.rates = nn.Parameter(torch.tensor([1.5, 1.0, 3.0, 1.0]))

    def forward(self, t, state):
        prey, predator = state[..., 0], state[..., 1]
        a, b, c, d = self.rates
        return torch.stack((a * prey - b * prey * predator, d * prey * predator - c * predator), -1)


class Antisymmetric(nn.Module):
    """A matrix made of parameters."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4) / 2)
        self.bias = nn.Parameter(torch.zeros(4))

    def forward(self, t, y):
        return torch.tanh(y @ (self.weight - self.weight.T - 0.1 * torch.eye(4).to(y)) + self.bias)


class Convolutional(nn.Module):
    """The convolutional field of the paper's experiments."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 1)
        self.conv2 = nn.Conv2d(7, 6, 3, padding=1)
        self.conv3 = nn.Conv2d(7, 2, 1)

    @staticmethod
    def with_time(t, x):
        return torch.cat((torch.ones_like(x[:, :1]) * t, x), 1)

    def forward(self, t, x):
        h = F.relu(self.conv1(self.with_time(t, x)))
        h = F.relu(self.conv2(self.with_time(t, h)))
        return self.conv3(self.with_time(t, h))


def damped_oscillator(t, y, damping=0.1):
    position, velocity = y.unbind(-1)
    return torch.stack((velocity, torch.sin(3 * t) - damping * velocity - position), -1)


def closure():
    matrix = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]])
    return lambda t, y: torch.mm(y**3, matrix.to(y))


class SwitchedByState(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, t, y):
        return self.layer(y) if y.norm() > 0.1 else -y


class SwitchedByTime(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, t, y):
        return self.layer(y) if t < 2.0 else -y


class Attention(nn.Module):
    """Rows that see each other."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, t, y):
        return torch.softmax(y @ y.T, -1) @ torch.tanh(self.layer(y)) - y


class Detached(nn.Module):
    """A part whose gradient the user stops."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, t, y):
        with torch.no_grad():
            gain = torch.sigmoid(self.layer(y))
        return -gain * y


class Hamiltonian(nn.Module):
    """A field that differentiates."""

    def __init__(self):
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, t, y):
        with torch.enable_grad():
            y = y if y.requires_grad else y.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.energy(y).sum(), y, create_graph=True)
        return torch.stack((slope[:, 1], -slope[:, 0]), 1)


class Recorded(nn.Module):
    """A field that keeps what it saw."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.times = []

    def forward(self, t, y):
        self.times.append(float(t.detach()))
        return torch.tanh(self.layer(y))


def hooked():
    field = Frozen()
    field.net[1].register_forward_hook(lambda module, inputs, value: 2 * value)
    return field


KERNELS, OWN = "kernels", "its own code"
FIELDS = {
    "time first": (TimeFirst, (5, 2), KERNELS),
    "time last": (TimeLast, (5, 2), KERNELS),
    "spiral": (Spiral, (4, 1, 2), KERNELS),
    "spiral without a batch": (Spiral, (2,), KERNELS),
    "gated by the time": (ElementwiseTime, (5, 2), KERNELS),
    "residual": (Residual, (5, 4), KERNELS),
    "tied weights, no bias": (TiedWeights, (5, 3), KERNELS),
    "frozen layer": (Frozen, (5, 3), KERNELS),
    "weight norm": (WeightNormed, (5, 3), KERNELS),
    "batch norm, evaluation": (lambda: BatchNormed().eval(), (5, 3), KERNELS),
    "Lotka-Volterra": (LotkaVolterra, (5, 2), KERNELS),
    "antisymmetric matrix": (Antisymmetric, (5, 4), KERNELS),
    "convolutions": (Convolutional, (2, 2, 5, 4), KERNELS),
    "plain function": (lambda: damped_oscillator, (5, 2), KERNELS),
    "partial": (lambda: functools.partial(damped_oscillator, damping=0.3), (5, 2), KERNELS),
    "closure": (closure, (5, 2), KERNELS),
    "switched by the state": (SwitchedByState, (5, 2), "cannot be traced"),
    "switched by the time": (SwitchedByTime, (5, 2), "cannot be traced"),
    "attention": (Attention, (5, 3), "no operation that the kernels know"),
    "detached part": (Detached, (5, 2), "its gradient is not that of the operations"),
    "Hamiltonian": (Hamiltonian, (5, 2), "cannot be traced"),
    "keeps times": (Recorded, (5, 2), "cannot be traced"),
    "batch norm, training": (BatchNormed, (5, 3), "writes into a tensor in place"),
    "hook": (hooked, (5, 3), "has hooks"),
}


def made(name, dtype):
    torch.manual_seed(1)
    make, shape, expected = FIELDS[name]
    field = make()
    y0 = torch.rand(shape, dtype=torch.float64) + 0.2
    if isinstance(field, nn.Module):
        field.to(dtype)
    return field, y0.to(dtype).requires_grad_(), expected


def solved(field, y0, solver=anode_fast.odeint, **options):
    """Solution, gradients of y0 and the parameters."""
    t = torch.tensor([0.0, 0.4, 1.0], dtype=y0.dtype)
    solution = solver(field, y0, t, **options)
    parameters = []
    if isinstance(field, nn.Module):
        parameters = [p for p in field.parameters() if p.requires_grad]
    weights = torch.linspace(0.5, 1.5, solution.numel(), dtype=y0.dtype, device=y0.device)
    weights = weights.reshape(solution.shape)
    grads = torch.autograd.grad((solution * weights).sum(), [y0, *parameters], allow_unused=True)
    return [solution.detach(), *[y0.new_zeros(()) if g is None else g for g in grads]]


METHODS = {
    "dopri5": dict(rtol=1e-6, atol=1e-6),
    "rk4": dict(method="rk4", options=dict(step_size=0.1)),
}


@pytest.mark.parametrize("name", FIELDS)
def test_which_fields_kernels_solve(name):
    field, y0, expected = made(name, torch.float32)
    said = anode_fast.explain(field, y0, torch.tensor([0.0, 1.0]))
    if expected == KERNELS:
        assert "backend: cpu" in said, said
    else:
        assert "backend: reference" in said and expected in said, said


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", FIELDS)
def test_they_are_right(name, dtype, method):
    field, y0, _ = made(name, torch.float64)
    own = copy.deepcopy(field)
    # The gradient of the computed solution, as the kernels'.
    want = solved(own, y0, backend="reference", gradient="discrete", **METHODS[method])
    field, y0, expected = made(name, dtype)
    gradient = {} if expected == KERNELS else {"gradient": "discrete"}
    got = solved(field, y0, **gradient, **METHODS[method])
    # float32: at most three times the error of PyTorch's operations in float32, and rounding.
    plain = want
    if dtype == torch.float32:
        own, start, _ = made(name, dtype)
        plain = solved(own, start, backend="reference", gradient="discrete", **METHODS[method])
    largest = max(float(x.abs().max()) for x in want)
    for a, b, c in zip(got, want, plain, strict=True):
        scale = float(b.abs().max())
        allowed = 3 * float((c.double() - b).abs().max()) + 32 * torch.finfo(dtype).eps * scale
        # Where steps are chosen, rounding may choose others.
        rounding = 1e-9 if dtype == torch.float64 else 5e-4 if method == "dopri5" else 1e-6
        torch.testing.assert_close(a.double(), b, rtol=0, atol=max(allowed, rounding * largest))


@pytest.mark.parametrize("name", FIELDS)
def test_they_make_torchdiffeqs_evaluations(name):
    if "batch norm, training" in name:
        pytest.skip("its value depends on the evaluations before")
    field, y0, _ = made(name, torch.float64)
    calls = {}
    for package in (anode_fast, torchdiffeq):
        count = Counted(copy.deepcopy(field))
        with torch.no_grad():
            package.odeint(count, y0, torch.tensor([0.0, 1.0]), rtol=1e-5, atol=1e-5)
        calls[package.__name__] = count.calls
    assert calls["anode_fast"] == calls["torchdiffeq"]


class Counted(nn.Module):
    """A field that counts its evaluations, under a name of its own."""

    def __init__(self, field):
        super().__init__()
        self.field = field
        self.calls = 0

    def forward(self, t, y):
        self.calls += 1
        return self.field(t, y)
