"""The reference path against torchdiffeq on the paper's toy field, 7-32-32-7, batch 64.

Same weights, inputs, tolerance and number of evaluations (asserted). Run:

    pytest benchmarks --benchmark-only -k reference
"""

from __future__ import annotations

import pytest
import torch
import torchdiffeq
from torch import Tensor, nn

import anode_fast
from anode_fast import MLPField

TOLERANCE = {"rtol": 1e-3, "atol": 1e-3}


class Concatenating(nn.Module):
    """The field as experiments write it: the time concatenated to the state."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 7)
        )
        self.nfe = 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """dy/dt for y [batch, 7]."""
        self.nfe += 1
        return self.layers(torch.cat([t.expand(y.shape[0], 1), y], dim=1))


FIELDS = {"MLPField": lambda: MLPField(7, 32), "concatenating": Concatenating}
SOLVERS = {
    "odeint": (torchdiffeq.odeint, anode_fast.odeint),
    "odeint_adjoint": (torchdiffeq.odeint_adjoint, anode_fast.odeint_adjoint),
}


@pytest.fixture(params=FIELDS)
def field(request) -> nn.Module:
    """The same field, with the same weights, for both sides."""
    torch.manual_seed(0)
    return FIELDS[request.param]()


def cases(field: nn.Module, solver: str, backward: bool):
    """Two calls that do the same work, and their evaluations (forward, backward)."""
    y0, t = torch.randn(64, 7), torch.tensor([0.0, 1.0])
    runs, counts = [], []
    for solve in SOLVERS[solver][::-1]:

        def run(solve=solve) -> int:
            field.nfe = 0
            y1 = solve(field, y0, t, **TOLERANCE)[-1]
            forward = field.nfe
            if backward:
                y1.sum().backward()
            return forward

        forward = run()
        runs.append(run)
        counts.append((forward, field.nfe - forward))
    return runs, counts


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_reference_forward(field, grad, versus):
    """One forward solve, with and without a graph."""
    with torch.set_grad_enabled(grad):
        (ours, theirs), counts = cases(field, "odeint", backward=False)
        assert counts[0] == counts[1], f"evaluations differ: {counts}"
        versus(ours, theirs, nfe=counts[0][0], nfe_backward=0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_reference_forward_backward(field, solver, versus):
    """A forward solve and the gradient of its weights."""
    (ours, theirs), counts = cases(field, solver, backward=True)
    assert counts[0] == counts[1], f"evaluations differ: {counts}"
    versus(ours, theirs, nfe=counts[0][0], nfe_backward=counts[0][1])
