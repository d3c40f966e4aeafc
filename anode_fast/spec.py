"""What a field is, as plain data that a kernel can run: `MLPSpec`, `ConvSpec`."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TypeAlias

from anode_fast.errors import InvalidArgument, InvalidType
from anode_fast.kernels.program import Program

ACTIVATIONS = ("relu", "softplus", "tanh", "sigmoid", "silu", "gelu", "elu", "identity")
"""Names of the activations. They mean torch.nn.functional's with default arguments: softplus with
beta 1 and threshold 20, gelu with erf, elu with alpha 1."""


def size(where: str, name: str, value: object, least: int = 1) -> int:
    """`value` as an int.

    Args:
        where: Who asks, for the message.
        name: Of the argument.
        value: What the user gave.
        least: Smallest value that will do.

    Raises:
        InvalidType: Not an integer.
        InvalidArgument: Below `least`.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise InvalidType(
            f"{where}: {name} is {value!r} ({type(value).__name__}), want an int >= {least}"
        ) from None
    if number < least:
        raise InvalidArgument(f"{where}: {name} is {number}, want at least {least}")
    return number


def check_activation(where: str, value: str) -> None:
    """Refuses a name that is not in `ACTIVATIONS`.

    Raises:
        InvalidArgument: The name is unknown.
    """
    if value not in ACTIVATIONS:
        raise InvalidArgument(
            f"{where}: activation is {value!r}, want one of {', '.join(ACTIVATIONS)}. For another "
            "one, write the field as an nn.Module with forward(t, y)."
        )


@dataclass(frozen=True)
class MLPSpec:
    """A perceptron dy/dt = L_n(act(... act(L_1([t, y])))), every L affine.

    Attributes:
        dim: Width of the state, data and augmented.
        hidden: Widths of the hidden layers, first to last, at least one.
        activation: One of `ACTIVATIONS`, after every layer but the last.
        time_dependent: Whether the first layer's first input is t. Its weight then is
            [hidden[0], 1 + dim], else [hidden[0], dim].

    Raises:
        InvalidArgument, InvalidType: A width that is no positive int, or an unknown activation.
    """

    dim: int
    hidden: tuple[int, ...]
    activation: str = "relu"
    time_dependent: bool = True

    def __post_init__(self) -> None:
        size("MLPSpec", "dim", self.dim)
        size("MLPSpec", "number of hidden layers", len(self.hidden))
        for i, width in enumerate(self.hidden):
            size("MLPSpec", f"hidden[{i}]", width)
        check_activation("MLPSpec", self.activation)


@dataclass(frozen=True)
class ConvSpec:
    """dy/dt = C_3(act(C_2(act(C_1(y))))): convolutions 1x1, 3x3 (zero padding 1) and 1x1.

    Attributes:
        channels: Of the state, data and augmented.
        num_filters: Channels between the convolutions.
        activation: One of `ACTIVATIONS`, after the first two.
        time_dependent: Whether the first input channel of every convolution is t at each pixel,
            zero outside the image as any channel is. Weights then are [out, 1 + in, k, k], else
            [out, in, k, k].

    Raises:
        InvalidArgument, InvalidType: A size that is no positive int, or an unknown activation.
    """

    channels: int
    num_filters: int
    activation: str = "relu"
    time_dependent: bool = True

    def __post_init__(self) -> None:
        size("ConvSpec", "channels", self.channels)
        size("ConvSpec", "num_filters", self.num_filters)
        check_activation("ConvSpec", self.activation)


Spec: TypeAlias = MLPSpec | ConvSpec | Program
"""Any field that a kernel can run."""
