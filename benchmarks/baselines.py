"""The same model solved by torchdiffeq, to compare with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
import torchdiffeq
from torch import Tensor, nn

from anode_fast import AugODEBlock, ConvField, ConvODENet, ODENet, SolveStats

Net = TypeVar("Net", ODENet, ConvODENet)


class ConcatenatingConvField(nn.Module):
    """A convolutional field as the paper's code computes it, with a `ConvField`'s weights.

    Time becomes an image that is put before the channels of every convolution's input.

    Args:
        field: With relu and time_dependent=True, as in the paper. Its layers are used, not copied.
    """

    def __init__(self, field: ConvField) -> None:
        super().__init__()
        if field.activation != "relu" or not field.time_dependent:
            raise ValueError(f"ConcatenatingConvField: want relu and time, got {field}")
        self.conv1, self.conv2, self.conv3 = field.conv1, field.conv2, field.conv3
        self.nfe = 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """dy/dt for y [batch, channels, height, width] at a time that is 0-d."""
        self.__dict__["nfe"] += 1  # torch.compile takes an attribute for a constant
        h = torch.relu(self._with_time(self.conv1, t, y))
        h = torch.relu(self._with_time(self.conv2, t, h))
        return self._with_time(self.conv3, t, h)

    @staticmethod
    def _with_time(conv: nn.Conv2d, t: Tensor, x: Tensor) -> Tensor:
        image = torch.ones_like(x[:, :1]) * t
        found: Tensor = conv(torch.cat([image, x], 1))
        return found


class TorchdiffeqBlock(nn.Module):
    """Does what an `AugODEBlock` does, by way of torchdiffeq.

    It calls the very same field as the block it was made from, so the solver is all that differs,
    unless it is told to rewrite it. (The paper's code concatenates time and state at each
    evaluation; `MLPField`, which has the same parameters, adds time's share to the bias, which is
    faster. Both sides have that gain.)

    Args:
        block: Whose field, times, method and tolerances to use. Augmentation is with zeros.
        adjoint: Differentiate with odeint_adjoint, which solves an ODE backwards, rather than
            through the operations of the solver, as the paper did.
        rewrite: Makes of the block's field the one to call, with the same weights.
    """

    def __init__(
        self,
        block: AugODEBlock,
        *,
        adjoint: bool = False,
        rewrite: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.field = rewrite(block.field) if rewrite else block.field
        self.augment_dim = block.augment_dim
        self.adjoint = adjoint
        self.method = block.method
        self.tolerances = {"rtol": block.rtol, "atol": block.atol}
        self.options = {"max_num_steps": block.max_num_steps}
        device = next(self.field.parameters()).device
        self.register_buffer("t", torch.tensor(block.t, device=device), persistent=False)
        self._nfe = 0

    def forward(self, x: Tensor, eval_times: Tensor | None = None) -> Tensor:
        """The augmented state at the end, [batch, dim, ...], or at `eval_times`, [time, ...]."""
        y = torch.cat([x, x.new_zeros(len(x), self.augment_dim, *x.shape[2:])], dim=1)
        t = self.t if eval_times is None else eval_times
        solve = torchdiffeq.odeint_adjoint if self.adjoint else torchdiffeq.odeint
        self.field.nfe = 0
        solution = solve(
            self.field, y, t.to(y), method=self.method, options=self.options, **self.tolerances
        )
        self._nfe = self.field.nfe
        return solution[-1] if eval_times is None else solution

    def trajectory(self, x: Tensor, timesteps: int) -> Tensor:
        """The states at equally spaced times from start to end, [timesteps, batch, dim, ...]."""
        return self(x, torch.linspace(*self.t.tolist(), timesteps))

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


def with_torchdiffeq(
    net: Net, *, adjoint: bool = False, rewrite: Callable[..., nn.Module] | None = None
) -> Net:
    """A copy of the net, same weights and same state_dict keys, that torchdiffeq solves.

    Args:
        net: To copy.
        adjoint, rewrite: As in `TorchdiffeqBlock`.
    """
    twin = copy.deepcopy(net)
    twin.block = TorchdiffeqBlock(twin.block, adjoint=adjoint, rewrite=rewrite)
    return twin
