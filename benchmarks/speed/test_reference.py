"""The reference path against torchdiffeq on the paper's toy field, 7-32-32-7, batch 64.

Same weights, inputs, tolerance and number of evaluations (asserted), one thread: at this size a
second one only adds noise. Run:

    pytest benchmarks --benchmark-only -k reference
"""

from __future__ import annotations

import functools

import pytest
import torch
import torchdiffeq
from torch import Tensor, nn

import anode_fast
from benchmarks.speed.rivals import DIM, Case, like_torchdiffeq

CASE = Case(batch=64, width=32)
EFFORT = 4  # enough for the full number of rounds


class Concatenating(nn.Module):
    """The field as experiments write it: the time concatenated to the state."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(DIM + 1, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, DIM)
        )
        self.nfe = 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """dy/dt for y [batch, 7]."""
        self.nfe += 1
        return self.layers(torch.cat([t.expand(y.shape[0], 1), y], dim=1))


FIELDS = {"MLPField": lambda: CASE.field, "concatenating": Concatenating}


@pytest.fixture(params=FIELDS)
def field(request) -> tuple[str, nn.Module]:
    """Name of the field, and the field: the same weights for both sides."""
    torch.manual_seed(0)
    return request.param, FIELDS[request.param]()


@pytest.fixture
def race(field, versus):
    """Times one of our functions against torchdiffeq's function of the same name."""
    name, module = field

    def run(function: str, work: str, *, gradient: bool) -> None:
        solves = {
            "anode_fast": functools.partial(getattr(anode_fast, function), backend="reference"),
            "torchdiffeq": getattr(torchdiffeq, function),
        }
        rivals = {
            solver: like_torchdiffeq(solve, module, CASE.y0, gradient=gradient)
            for solver, solve in solves.items()
        }
        ours, theirs = (rival.observe() for rival in rivals.values())
        assert (ours.nfe, ours.nfe_backward) == (theirs.nfe, theirs.nfe_backward)
        versus(f"{name}, {work}", rivals, effort=EFFORT)

    return run


@pytest.mark.benchmark(group="reference path, batch 64, one thread")
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_reference_forward(grad, race):
    """One forward solve, with and without a graph."""
    with torch.set_grad_enabled(grad):
        race("odeint", "forward" if grad else "forward, no grad", gradient=False)


@pytest.mark.benchmark(group="reference path, batch 64, one thread")
@pytest.mark.parametrize("function", ["odeint", "odeint_adjoint"])
def test_reference_forward_backward(function, race):
    """A forward solve and the gradient of its weights."""
    race(function, f"{function}, forward + backward", gradient=True)
