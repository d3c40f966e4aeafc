"""Fields that no kernel knows, on the CPU, against torchdiffeq: what the solver itself costs.

Batch 64, float32, one thread; same field, tolerance and number of evaluations (asserted). A ratio
cannot exceed what the field's own cost leaves: the cheap fields show the solver's. Run:

    pytest benchmarks --benchmark-only -k generic
"""

from __future__ import annotations

import pytest
import torch
import torchdiffeq
from torch import Tensor, nn

import anode_fast
from benchmarks.speed.rivals import TorchRival

BATCH = 64
TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}
EFFORT = 2


class Cyclic(nn.Module):
    """A cheap field with a parameter. Each row takes the one before: no kernel knows that."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.linspace(-1.0, -0.5, dim))
        self.nfe = 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """dy/dt for y [batch, dim]."""
        self.nfe += 1
        return y.roll(1, 0) * self.rate


class Perceptron(Cyclic):
    """Two layers as users write them, and a term that keeps them from being recognised."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.net = nn.Sequential(nn.Linear(dim, 32), nn.Tanh(), nn.Linear(32, dim))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """dy/dt for y [batch, dim]."""
        self.nfe += 1
        return self.net(y) + y.sin().mean() * self.rate


FIELDS = {"cyclic": Cyclic, "perceptron": Perceptron}


def rival(solve, field: nn.Module, method: str, gradient: bool) -> TorchRival:
    """A solver with torchdiffeq's signature on this field, t in [0, 1]."""
    y0 = torch.randn(BATCH, field.rate.numel(), generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0.0, 1.0])
    options = {"step_size": 0.05} if method == "rk4" else {}

    def run() -> Tensor:
        return solve(field, y0, t, method=method, options=options, **TOLERANCE)[-1]

    return TorchRival(run, field, gradient=gradient)


class Evaluations:
    """So many evaluations of the field, one after the other: no solver takes less."""

    threads = 1

    def __init__(self, field: nn.Module, nfe: int, gradient: bool) -> None:
        self.field, self.nfe, self.gradient = field, nfe, gradient
        self.y, self.t = torch.ones(BATCH, field.rate.numel()), torch.tensor(0.0)

    def __call__(self) -> None:
        """Evaluates, and differentiates if that is wanted."""
        y = self.y
        for _ in range(self.nfe):
            y = self.field(self.t, y)
        if self.gradient:
            torch.autograd.grad(y.sum(), tuple(self.field.parameters()))


@pytest.mark.benchmark(group="any field on the CPU, batch 64, one thread")
@pytest.mark.parametrize("work", ["no grad", "graph", "graph + gradient", "adjoint + gradient"])
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@pytest.mark.parametrize("dim", [2, 8])
@pytest.mark.parametrize("name", FIELDS)
def test_generic(name, dim, method, work, versus):
    """One solve: without a graph, with one, with its gradient, with the adjoint's."""
    torch.manual_seed(0)
    field = FIELDS[name](dim)
    function = "odeint_adjoint" if work.startswith("adjoint") else "odeint"
    rivals = {
        module.__name__: rival(getattr(module, function), field, method, "gradient" in work)
        for module in (anode_fast, torchdiffeq)
    }
    with torch.set_grad_enabled(work != "no grad"):
        ours, theirs = (solver.observe() for solver in rivals.values())
        assert ours.nfe == theirs.nfe
        if function == "odeint":
            assert ours.nfe_backward == theirs.nfe_backward
            rivals["the evaluations alone"] = Evaluations(field, ours.nfe, "gradient" in work)
        versus(f"{name}, dim {dim}, {method}, {work}", rivals, effort=EFFORT)
