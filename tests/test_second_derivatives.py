"""Second derivatives in every gradient mode: right to finite differences."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from anode_fast import ConvField, MLPField, odeint, odeint_adjoint

f64 = torch.float64
# Steps that do not depend on the input: differences of the solution are smooth.
STEPS = dict(rtol=1e-3, atol=1e-3, options={"first_step": 0.125, "max_step": 0.125})
GRID = dict(method="rk4", options={"step_size": 0.25})
MODES = {
    "odeint": (odeint, STEPS),
    "discrete": (odeint, dict(gradient="discrete", **STEPS)),
    "autograd": (odeint, dict(gradient="autograd", **STEPS)),
    "by row": (odeint, dict(step_control="sample", **STEPS)),
    "odeint_adjoint": (odeint_adjoint, STEPS),
    "fixed": (odeint, GRID),
    "fixed, solved again": (odeint_adjoint, GRID),
    "fixed autograd": (odeint, dict(gradient="autograd", **GRID)),
}
# Its first derivative is that of the true solution, its second one that of the computed solution.
CONTINUOUS = {
    "continuous": (odeint, dict(gradient="continuous", rtol=1e-11, atol=1e-11)),
    "adjoint": (odeint_adjoint, dict(adjoint_rtol=1e-11, rtol=1e-11, atol=1e-11)),
}


class Own(nn.Module):
    """A user's field."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))

    def forward(self, t, y):
        return self.net(y)


def case(kind):
    if kind == "images":
        return ConvField(1, 2, activation="tanh").double(), torch.randn(1, 1, 2, 2, dtype=f64)
    field = MLPField(2, 3, activation="tanh") if kind == "rows" else Own()
    return field.double(), torch.randn(2, 2, dtype=f64)


@pytest.mark.parametrize("kind", ["rows", "images", "own"])
@pytest.mark.parametrize("mode", [*MODES, *CONTINUOUS])
@pytest.mark.parametrize("back", [False, True], ids=["forwards", "backwards"])
def test_gradgradcheck(kind, mode, back):
    solve, given = {**MODES, **CONTINUOUS}[mode]
    field, x = case(kind)
    t = torch.tensor([1.0, 0.4, 0.0] if back else [0.0, 0.4, 1.0], dtype=f64)
    weight, bias = list(field.parameters())[-2:]

    def f(x, weight, bias):
        return solve(field, x, t, **given)

    inputs = (x.requires_grad_(), weight, bias)
    tolerances = dict(atol=1e-5, rtol=1e-4) if mode in CONTINUOUS else {}
    assert gradcheck(f, inputs, fast_mode=True, **tolerances)
    assert gradgradcheck(f, inputs, fast_mode=True, **tolerances)
