"""The models of the paper: a ResNet, and neural ODEs, each solved by anode_fast or torchdiffeq."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from anode_fast import AugODEBlock, ConvODENet, ODENet, SolveStats
from benchmarks.baselines import ConcatenatingConvField, with_torchdiffeq
from benchmarks.paper.settings import FLOWS, RESNET, THEIRS, TORCH, Setting


class ResidualBlocks(nn.Module):
    """h <- h + f(h), once per layer, each f a perceptron like a neural ODE's field, without time.

    Args:
        dim: Width of h.
        hidden: Width of the two hidden layers of each f.
        layers: Number of f.

    Attributes:
        stats: With one evaluation per layer, as if it had been a solve.

    Source: equation 1 of the paper.
    """

    def __init__(self, dim: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.residuals = nn.ModuleList(
            nn.Sequential(
                *(nn.Linear(dim, hidden), nn.ReLU()),
                *(nn.Linear(hidden, hidden), nn.ReLU()),
                nn.Linear(hidden, dim),
            )
            for _ in range(layers)
        )
        self.stats = SolveStats(backend=TORCH, method="resnet", nfe=layers)

    def forward(self, h: Tensor) -> Tensor:
        """The last h, [batch, dim]."""
        return self.trajectory(h)[-1]

    def trajectory(self, h: Tensor) -> Tensor:
        """All h: before the first layer and after each, [layers + 1, batch, dim]."""
        states = [h]
        for residual in self.residuals:
            states.append(states[-1] + residual(states[-1]))
        return torch.stack(states)


class ResNet(nn.Module):
    """Residual blocks and a linear layer.

    Args:
        data_dim: Width of the input.
        hidden: Of the blocks.
        layers: Number of blocks.
        output_dim: Number of outputs.
    """

    def __init__(self, data_dim: int, hidden: int, layers: int, output_dim: int = 1) -> None:
        super().__init__()
        self.block = ResidualBlocks(data_dim, hidden, layers)
        self.linear = nn.Linear(data_dim, output_dim)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, data_dim] -> [batch, output_dim]."""
        output: Tensor = self.linear(self.block(x))
        return output


class FlowNet(nn.Module):
    """A flow alone, with no linear layer after it.

    Args:
        block: Of the width of the data.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """[batch, dim] -> [batch, dim]."""
        output: Tensor = self.block(x)
        return output


def build(setting: Setting, solver: str, channels: int = 1, classes: int = 10) -> nn.Module:
    """The model of a setting. Its weights depend on the setting alone, not on the solver.

    Args:
        setting: What to build.
        solver: "anode_fast", "torchdiffeq", or "torch" for a ResNet.
        channels: Of the images.
        classes: Of the images.

    Returns:
        A net with a `block` that has `stats`, on the setting's device.
    """
    torch.manual_seed(setting.weights_seed)
    net = _net(setting, channels, classes).to(setting.device)
    return twin(net) if solver == THEIRS else net


def twin(net: nn.Module) -> nn.Module:
    """The same weights, solved by torchdiffeq, with the field as the paper's code computes it."""
    return with_torchdiffeq(
        net, rewrite=ConcatenatingConvField if isinstance(net, ConvODENet) else None
    )


def _net(setting: Setting, channels: int, classes: int) -> nn.Module:
    hidden, dim, flow = setting.hidden, setting.dim, setting.data in FLOWS
    if setting.model == RESNET:
        if flow:
            return FlowNet(ResidualBlocks(dim, hidden, setting.layers))
        return ResNet(dim, hidden, setting.layers)
    solve = {
        "rtol": setting.tolerance,
        "atol": setting.tolerance,
        "max_num_steps": setting.max_num_steps,
    }
    if setting.is_image:
        size = (channels, setting.size, setting.size)
        return ConvODENet(size, hidden, classes, setting.augment, **solve)
    if flow:
        return FlowNet(AugODEBlock.mlp(dim, hidden, **solve))
    return ODENet(dim, hidden, augment_dim=setting.augment, **solve)
