"""The same model solved by torchdiffeq, to compare with."""

from __future__ import annotations

import copy

import torch
import torchdiffeq
from torch import Tensor, nn

from anode_fast import AugODEBlock, ODENet, SolveStats


class TorchdiffeqBlock(nn.Module):
    """Does what an `AugODEBlock` does, by way of torchdiffeq.

    It calls the very same field as the block it was made from, so the solver is all that differs.
    (The paper's code concatenates time and state at each evaluation; `MLPField`, which has the same
    parameters, adds time's share to the bias, which is faster. Both sides have that gain.)

    Args:
        block: Whose field, times, method and tolerances to use. Augmentation is with zeros.
        adjoint: Differentiate with odeint_adjoint, which solves an ODE backwards, rather than
            through the operations of the solver, as the paper did.
    """

    def __init__(self, block: AugODEBlock, *, adjoint: bool = False) -> None:
        super().__init__()
        self.field = block.field
        self.augment_dim = block.augment_dim
        self.adjoint = adjoint
        self.method = block.method
        self.tolerances = {"rtol": block.rtol, "atol": block.atol}
        self.options = {"max_num_steps": block.max_num_steps}
        device = next(self.field.parameters()).device
        self.register_buffer("t", torch.tensor(block.t, device=device), persistent=False)
        self._nfe = 0

    def forward(self, x: Tensor, eval_times: Tensor | None = None) -> Tensor:
        """The augmented state at the end, [batch, dim], or at `eval_times`, [time, batch, dim]."""
        y = torch.cat([x, x.new_zeros(len(x), self.augment_dim)], dim=1)
        t = self.t if eval_times is None else eval_times
        solve = torchdiffeq.odeint_adjoint if self.adjoint else torchdiffeq.odeint
        self.field.nfe = 0
        solution = solve(
            self.field, y, t.to(y), method=self.method, options=self.options, **self.tolerances
        )
        self._nfe = self.field.nfe
        return solution[-1] if eval_times is None else solution

    @property
    def stats(self) -> SolveStats:
        """Evaluations of the last solve and, once it is done, of its backward pass.

        Backpropagation through the solver evaluates nothing anew: nfe_backward is 0 then. Steps are
        not counted.
        """
        return SolveStats(
            backend="torchdiffeq",
            method=self.method,
            nfe=self._nfe,
            nfe_backward=self.field.nfe - self._nfe,
        )


def with_torchdiffeq(net: ODENet, *, adjoint: bool = False) -> ODENet:
    """A copy of the net, same weights and same state_dict keys, that torchdiffeq solves."""
    twin = copy.deepcopy(net)
    twin.block = TorchdiffeqBlock(twin.block, adjoint=adjoint)
    return twin
