"""The models of the paper: an ODE block and a linear layer (Dupont, Doucet, Teh, 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from anode_fast.block import AugODEBlock, check_img_size
from anode_fast.errors import InvalidArgument
from anode_fast.spec import size
from anode_fast.stats import SolveStats


class ODENet(nn.Module):
    """[batch, data_dim] -> ODE -> linear -> [batch, output_dim].

    Args:
        data_dim: Width of the input.
        hidden_dim: Width of the field's hidden layers.
        output_dim: Number of outputs.
        augment_dim: Number of augmented columns; 0 for a plain neural ODE.
        **kw: For `AugODEBlock.mlp`: the field's arguments and the block's.

    Attributes:
        block: The `AugODEBlock`.
        linear: The nn.Linear on its final state.

    Raises:
        InvalidArgument, InvalidType: As `AugODEBlock.mlp`.
    """

    def __init__(
        self, data_dim: int, hidden_dim: int, output_dim: int = 1, augment_dim: int = 0, **kw: Any
    ) -> None:
        super().__init__()
        output_dim = size("ODENet", "output_dim", output_dim)
        self.block = AugODEBlock.mlp(data_dim, hidden_dim, augment_dim, **kw)
        self.linear = nn.Linear(data_dim + augment_dim, output_dim)

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """The outputs.

        Args:
            x: Input, [batch, data_dim], floating point.
            return_features: Whether to return the final state too.

        Returns:
            [batch, output_dim]; with return_features the pair (features, outputs), the features
            being the final state, [batch, data_dim + augment_dim].

        Raises:
            InvalidArgument, InvalidType, SolverError: As `AugODEBlock.forward`.
        """
        features = self.block(x)
        output: Tensor = self.linear(features)
        return (features, output) if return_features else output

    @property
    def stats(self) -> SolveStats | None:
        """`SolveStats` of the block's last solve."""
        return self.block.stats


class ConvODENet(nn.Module):
    """Images -> ODE -> flatten -> linear -> [batch, output_dim].

    Args:
        img_size: Channels, height and width of the input.
        num_filters: Channels between the field's convolutions.
        output_dim: Number of outputs.
        augment_dim: Number of augmented channels; 0 for a plain neural ODE.
        **kw: For `AugODEBlock.conv`: the field's arguments and the block's.

    Attributes:
        block: The `AugODEBlock`.
        linear: The nn.Linear on its flattened final state.

    Raises:
        InvalidArgument, InvalidType: As `AugODEBlock.conv`.

    With time_dependent=False the numbers of parameters are the paper's: 84,395 for (1, 28, 28) and
    92 filters, 84,816 for 64 filters and 5 augmented channels (appendix E.2.2).
    """

    def __init__(
        self,
        img_size: Sequence[int],
        num_filters: int,
        output_dim: int = 10,
        augment_dim: int = 0,
        **kw: Any,
    ) -> None:
        super().__init__()
        channels, height, width = check_img_size("ConvODENet", img_size)
        output_dim = size("ConvODENet", "output_dim", output_dim)
        self.block = AugODEBlock.conv(img_size, num_filters, augment_dim, **kw)
        self.img_size = (channels, height, width)
        self.linear = nn.Linear((channels + augment_dim) * height * width, output_dim)

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """The outputs.

        Args:
            x: Images, [batch, channels, height, width], floating point.
            return_features: Whether to return the final state too.

        Returns:
            [batch, output_dim]; with return_features the pair (features, outputs), the features
            being the final state, [batch, channels + augment_dim, height, width].

        Raises:
            InvalidArgument, InvalidType, SolverError: As `AugODEBlock.forward`.
        """
        if isinstance(x, Tensor) and x.shape[1:] != self.img_size:
            channels, height, width = self.img_size
            raise InvalidArgument(
                f"ConvODENet: x has shape {tuple(x.shape)}, want (batch, {channels}, {height}, "
                f"{width}): its linear layer is made for one img_size"
            )
        features = self.block(x)
        output: Tensor = self.linear(features.flatten(1))
        return (features, output) if return_features else output

    @property
    def stats(self) -> SolveStats | None:
        """`SolveStats` of the block's last solve."""
        return self.block.stats
