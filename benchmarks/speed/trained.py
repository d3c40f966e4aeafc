"""The paper's models after some training, when a solve takes more evaluations than at first."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from anode_fast import ConvODENet, ODENet
from benchmarks import image_data
from benchmarks.data import ConcentricSpheres, batches
from benchmarks.paper.models import twin
from benchmarks.speed.conv_rivals import CLASSES
from benchmarks.speed.rivals import TOLERANCE, Outcome, TorchRival
from benchmarks.train import Loss, Run

Net = ODENet | ConvODENet

BATCH = 64  # of what is timed
DIGITS_SIZE, FILTERS = 8, 8


@dataclass(frozen=True)
class Model:
    """A model of the paper, its data and its training, all from fixed seeds.

    Attributes:
        dim: Of the concentric spheres; 0 for scikit-learn's digits.
        augmented: Columns or channels of zeros; without any it is a NODE.
    """

    dim: int
    augmented: int = 0

    def __str__(self) -> str:
        name = "ANODE" if self.augmented else "NODE"
        return f"{name}, spheres, d={self.dim}" if self.dim else f"{name}, digits"

    @property
    def data(self) -> TensorDataset:
        """What it is trained on, float32."""
        return ConcentricSpheres(self.dim) if self.dim else _digits()

    def in_dtype(self, dtype: torch.dtype) -> TensorDataset:
        """The same in another floating point type; labels stay what they are."""
        return TensorDataset(
            *(x.to(dtype) if x.is_floating_point() else x for x in self.data.tensors)
        )

    @property
    def loss_function(self) -> Loss:
        """What the training makes small."""
        return nn.functional.mse_loss if self.dim else nn.functional.cross_entropy

    @property
    def batch(self) -> int:
        """Of the training."""
        return 64 if self.dim else 16

    @property
    def iterations(self) -> int:
        """Of the training: enough for a NODE's evaluations to have grown, in a few seconds."""
        return 940 if self.dim else 200  # 20 epochs of the spheres; about 2 of the digits

    @property
    def timed(self) -> int:
        """How many batches of an epoch are timed: all of them would leave few rounds to each."""
        return 4 if self.dim else 1

    def batches(self) -> list[tuple[Tensor, ...]]:
        """Those of an epoch, an input and a target each."""
        return list(batches(self.data, BATCH, 1, seed=0))

    def net(self, *, trained: bool) -> Net:
        """One that anode_fast solves, float32, of its own; it is trained once in a process."""
        return copy.deepcopy(_net(self, trained))

    def twin(self, net: Net) -> Net:
        """The same weights by way of torchdiffeq and, for images, of the paper's form of field."""
        return twin(net)

    def loss(self, net: Net) -> float:
        """Over all data."""
        inputs, targets = self.data.tensors
        with torch.no_grad():
            return self.loss_function(net(inputs), targets).item()


@functools.cache
def _net(model: Model, trained: bool) -> Net:
    """Trained in float64: a change of rounding, between commits say, leaves the weights alone."""
    torch.manual_seed(0)
    if model.dim:
        net: Net = ODENet(model.dim, 32, augment_dim=model.augmented, **TOLERANCE)
    else:
        shape = 1, DIGITS_SIZE, DIGITS_SIZE
        net = ConvODENet(shape, FILTERS, CLASSES, model.augmented, **TOLERANCE)
    if trained:
        net.double()
        data = model.in_dtype(torch.float64)
        order = islice(batches(data, model.batch, model.iterations, seed=0), model.iterations)
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
        run = Run()
        with torch.enable_grad():
            list(run.train(net, order, optimizer, model.loss_function))
        assert run.failure is None, run.failure
    return net.float()


@functools.cache
def _digits() -> TensorDataset:
    return image_data.load([], DIGITS_SIZE).data


def ours(net: Net, x: Tensor) -> str:
    """Our name in the tables: it says which backend solves for x, should it not be the C++ one."""
    with torch.no_grad():
        net(x)
    return "anode_fast" if net.stats.backend == "cpu" else f"anode_fast ({net.stats.backend})"


class Solves(TorchRival):
    """Solves for several batches in a row on t in [0, 1], and maybe the gradient of their sum.

    Args:
        odeint: With torchdiffeq's signature.
        field: With an `nfe`.
        states: At t = 0.
        gradient: Whether it is part of a run.
    """

    def __init__(
        self,
        odeint: Callable[..., Tensor],
        field: nn.Module,
        states: Sequence[Tensor],
        *,
        gradient: bool = False,
    ) -> None:
        t = torch.tensor([0.0, 1.0])

        def solve(y0: Tensor) -> Tensor:
            return odeint(field, y0, t, **TOLERANCE)[-1]

        super().__init__(lambda: torch.cat([*map(solve, states)]), field, gradient=gradient)
        self._solve_one = solve
        self.states = states

    def evaluations(self) -> list[int]:
        """Of the field, in each solve."""
        found = []
        for y0 in self.states:
            self.field.nfe = 0
            self._solve_one(y0)
            found.append(self.field.nfe)
        return found

    def observe(self) -> Outcome:
        """Runs once and tells what came out; evaluations are the mean of the solves."""
        found = super().observe()
        mean, mean_backward = (n / len(self.states) for n in (found.nfe, found.nfe_backward))
        return dataclasses.replace(found, nfe=mean, nfe_backward=mean_backward)
