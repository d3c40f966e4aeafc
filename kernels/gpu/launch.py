"""Launch configurations: how many rows a program takes, with how many warps, in what blocks.

One table, no tuning at run time: a solve runs the same way every time. The entries come from
compiling every candidate (`python -m anode_fast.kernels.gpu.aot`) and, on a card, from
`python -m benchmarks.tune`, which prints this table anew.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from anode_fast.kernels.gpu.mlp import MLP
from anode_fast.kernels.interface import Field

MOST_DIM, MOST_HIDDEN, MOST_LAYERS = 64, 128, 4


class Launch(NamedTuple):
    """How a kernel is launched.

    Attributes:
        rows: Rows of a program's tile.
        warps: Of a program.
        N, K: Units of a hidden layer computed, and summed over, at a time.
    """

    rows: int
    warps: int
    N: int
    K: int


def padded(width: int) -> int:
    """Width of a tile: a power of two, as tiles have to have, and enough for tensor cores."""
    return max(16, 1 << (width - 1).bit_length())


def precision(dtype: torch.dtype) -> str:
    """Of matrix products in that dtype, as torch.set_float32_matmul_precision has it."""
    if dtype == torch.float64:
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@functools.lru_cache(maxsize=1024)
def configuration(
    kernel: str, rows: int, field: Field, precision: str, is_double: bool, capability: int
) -> tuple[MLP, Launch]:
    """The field as the kernel is compiled for it, and the launch.

    Args:
        kernel: "forward" or "gradient".
        rows: Of the batch.
        field: The field.
        precision: Of matrix products.
        is_double: Whether in float64.
        capability: Of the device: 80, 90, 100; 0 for the interpreter.
    """
    D, H = padded(field.dim), padded(field.hidden[0])
    tile = min(64 if kernel == "forward" else 32, padded(rows))
    launch = Launch(tile, 8, min(H, 64), 16)
    return (
        MLP(
            *(field.dim, field.hidden[0], len(field.hidden), field.activation),
            *(int(field.time_dependent), precision, D, H, launch.N, launch.K),
        ),
        launch,
    )
