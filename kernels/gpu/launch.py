"""Launch configurations: how many rows a program takes, with how many warps, in what blocks.

One table, no tuning at run time: a solve runs the same way every time. What stands in it was chosen
by compiling candidates for each architecture, not by timing them: of those that spill no register,
the one whose instructions wait least on the path of a step; for many rows, the one that has most of
them under way on a multiprocessor meanwhile (`python -m benchmarks.tune --estimate 90`). Gradients
of many rows for 32 units, and of images for 64 filters, were timed on a card (docs/gpu-results.md):
the fastest spill. `python -m anode_fast.kernels.gpu.aot --check` compiles what the table holds;
`python -m benchmarks.tune` times the candidates on a card and prints it anew.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, TypeAlias

import torch
import triton

from anode_fast.kernels.gpu import activations, generate
from anode_fast.kernels.gpu.conv import Conv
from anode_fast.kernels.gpu.generate import Generated
from anode_fast.kernels.gpu.mlp import MLP
from anode_fast.kernels.interface import ConvField, Field
from anode_fast.kernels.program import Program

Compiled: TypeAlias = MLP | Generated
"""A field as the kernels of whole solves are compiled for it."""

MOST_DIM, MOST_HIDDEN, MOST_LAYERS = 64, 128, 4
MOST_WIDTH, MOST_INSTRUCTIONS, MOST_KEPT = 256, 256, 8192
"""Of a program: features of a value; instructions; numbers that a gradient keeps of a row."""

LOWEST_CAPABILITY = 80

KERNELS = ("fixed", "adaptive", "by_row", "gradient", "continuous")
"""Kinds of kernels: of a kind, all are launched alike."""

ONE_STEP_SIZE = ("adaptive", "continuous")
"""Kinds whose programs have to agree on each step, in a launch of its own unless there is one."""

WIDTHS = (16, 32, 64, 128)
"""Of hidden layers, padded."""

PRECISIONS = ("tf32x3", "tf32", "ieee")
"""Of matrix products; "ieee" is float64."""

ARCHITECTURES = (80, 90, 100)
"""Compute capabilities with entries of their own; see `architecture`."""

MANY_ROWS = 8192
"""From here on every multiprocessor has programs, even if each program takes many rows."""

MOST_NUMBERS = 1024
"""In a tile of the state, rows x padded width: registers hold several."""


INSTRUCTIONS = "sm80"
"""Whose matrix instructions kernels get, on every GPU: Ampere's, which all GPUs since have.

Those of Hopper's warp groups take a descriptor of an operand in shared memory. ptxas 12.8, which
comes with Triton 3.6, may make it of a register that nobody wrote: results are wrong, or the solve
ends with an illegal memory access. Whether it does depends on the field as well as on the tile, so
no choice of tiles is safe. `aot --check` refuses kernels that have such instructions."""


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

    @property
    def options(self) -> dict[str, int | str]:
        """What Triton is told at a launch, beside the kernel's arguments.

        Without `maxnreg` ptxas spills a few registers to have more programs on a multiprocessor; a
        small batch waits for the only one there is.
        """
        most = min(255, 65536 // (32 * self.warps))
        return _options(self.warps, most)


def _options(warps: int, registers: int) -> dict[str, int | str]:
    return {"num_warps": warps, "num_stages": 1, "maxnreg": registers, "arch": INSTRUCTIONS}


def _entry(*launches: tuple[int, int, int, int]) -> tuple[Launch, ...]:
    return tuple(Launch(*launch) for launch in launches)


# fmt: off
TABLE: dict[tuple[str, int, str] | tuple[str, int, str, int], tuple[Launch, ...]] = {
    ("fixed", 16, "tf32x3"): _entry((16, 4, 16, 16), (64, 4, 16, 16)),
    ("fixed", 32, "tf32x3"): _entry((16, 4, 32, 16), (64, 4, 32, 32)),
    ("fixed", 64, "tf32x3"): _entry((16, 4, 64, 32), (64, 4, 64, 16)),
    ("fixed", 128, "tf32x3"): _entry((16, 4, 128, 32), (32, 4, 128, 32)),
    ("fixed", 16, "tf32"): _entry((16, 4, 16, 16), (64, 4, 16, 16)),
    ("fixed", 32, "tf32"): _entry((16, 4, 32, 16), (64, 4, 32, 32)),
    ("fixed", 64, "tf32"): _entry((16, 4, 64, 32), (64, 4, 64, 16)),
    ("fixed", 128, "tf32"): _entry((16, 4, 128, 32), (32, 4, 128, 32)),
    ("fixed", 16, "ieee"): _entry((16, 4, 16, 16), (64, 4, 16, 16)),
    ("fixed", 32, "ieee"): _entry((16, 4, 32, 16), (64, 4, 32, 32)),
    ("fixed", 64, "ieee"): _entry((16, 4, 64, 32), (64, 4, 64, 16)),
    ("fixed", 128, "ieee"): _entry((16, 4, 128, 32), (32, 4, 128, 32)),
    ("adaptive", 16, "tf32x3"): _entry((16, 4, 16, 16), (32, 4, 16, 16), (64, 4, 16, 16)),
    ("adaptive", 32, "tf32x3"): _entry((16, 4, 32, 16), (32, 4, 32, 32), (64, 4, 32, 32)),
    ("adaptive", 64, "tf32x3"): _entry((16, 4, 64, 32), (32, 4, 64, 32), (64, 4, 64, 16)),
    ("adaptive", 128, "tf32x3"): _entry((16, 4, 128, 32), (32, 4, 128, 32)),
    ("adaptive", 16, "tf32"): _entry((16, 4, 16, 16), (32, 4, 16, 16), (64, 4, 16, 16)),
    ("adaptive", 32, "tf32"): _entry((16, 4, 32, 16), (32, 4, 32, 32), (64, 4, 32, 32)),
    ("adaptive", 64, "tf32"): _entry((16, 4, 64, 32), (32, 4, 64, 32), (64, 4, 64, 16)),
    ("adaptive", 128, "tf32"): _entry((16, 4, 128, 32), (32, 4, 128, 32)),
    ("adaptive", 16, "ieee"): _entry((16, 4, 16, 16), (32, 4, 16, 16), (64, 4, 16, 16)),
    ("adaptive", 32, "ieee"): _entry((16, 4, 32, 16), (32, 4, 32, 32), (64, 4, 32, 32)),
    ("adaptive", 64, "ieee"): _entry((16, 4, 64, 32), (32, 4, 64, 32), (64, 4, 64, 16)),
    ("adaptive", 128, "ieee"): _entry((16, 4, 128, 32), (32, 4, 128, 32)),
    ("by_row", 16, "tf32x3"): _entry((16, 4, 16, 16), (32, 4, 16, 16)),
    ("by_row", 32, "tf32x3"): _entry((16, 4, 32, 16), (32, 4, 32, 32)),
    ("by_row", 64, "tf32x3"): _entry((16, 4, 64, 32), (32, 4, 64, 32)),
    ("by_row", 128, "tf32x3"): _entry((16, 4, 128, 32)),
    ("by_row", 16, "tf32"): _entry((16, 4, 16, 16), (32, 4, 16, 16)),
    ("by_row", 32, "tf32"): _entry((16, 4, 32, 16), (32, 4, 32, 32)),
    ("by_row", 64, "tf32"): _entry((16, 4, 64, 32), (32, 4, 64, 32)),
    ("by_row", 128, "tf32"): _entry((16, 4, 128, 32)),
    ("by_row", 16, "ieee"): _entry((16, 4, 16, 16), (32, 4, 16, 16)),
    ("by_row", 32, "ieee"): _entry((16, 4, 32, 16), (64, 4, 32, 32)),
    ("by_row", 64, "ieee"): _entry((16, 4, 64, 32), (32, 4, 64, 32)),
    ("by_row", 128, "ieee"): _entry((16, 4, 128, 32)),
    ("gradient", 16, "tf32x3"): _entry((16, 4, 16, 16)),
    ("gradient", 32, "tf32x3"): _entry((16, 4, 32, 16), (32, 2, 32, 32)),
    ("gradient", 64, "tf32x3"): _entry((16, 4, 64, 32)),
    ("gradient", 128, "tf32x3"): _entry((16, 4, 64, 32)),
    ("gradient", 16, "tf32"): _entry((16, 4, 16, 16)),
    ("gradient", 32, "tf32"): _entry((16, 4, 32, 16), (32, 2, 32, 32)),
    ("gradient", 64, "tf32"): _entry((16, 4, 64, 32)),
    ("gradient", 128, "tf32"): _entry((16, 4, 64, 64)),
    ("gradient", 16, "ieee"): _entry((16, 4, 16, 16)),
    ("gradient", 32, "ieee"): _entry((16, 4, 32, 16)),
    ("gradient", 64, "ieee"): _entry((16, 4, 64, 32)),
    ("gradient", 128, "ieee"): _entry((16, 4, 64, 64)),
    ("continuous", 16, "tf32x3"): _entry((32, 8, 16, 16), (16, 4, 16, 16)),
    ("continuous", 32, "tf32x3"): _entry((32, 8, 32, 16), (16, 4, 32, 16)),
    ("continuous", 64, "tf32x3"): _entry((32, 8, 64, 32), (16, 4, 64, 32)),
    ("continuous", 128, "tf32x3"): _entry((32, 8, 64, 32), (16, 4, 64, 64)),
    ("continuous", 16, "tf32"): _entry((32, 8, 16, 16), (16, 4, 16, 16)),
    ("continuous", 32, "tf32"): _entry((32, 8, 32, 16), (16, 4, 32, 16)),
    ("continuous", 64, "tf32"): _entry((32, 8, 64, 32), (16, 4, 64, 32)),
    ("continuous", 128, "tf32"): _entry((32, 8, 64, 32), (16, 4, 64, 64)),
    ("continuous", 16, "ieee"): _entry((32, 8, 16, 16), (16, 4, 16, 16)),
    ("continuous", 32, "ieee"): _entry((32, 8, 32, 16), (16, 4, 32, 16)),
    ("continuous", 64, "ieee"): _entry((32, 8, 64, 32), (16, 4, 64, 32)),
    ("continuous", 128, "ieee"): _entry((32, 8, 64, 32), (16, 4, 64, 64)),
    # Where these would spill.
    ("adaptive", 16, "tf32x3", 100): _entry((16, 4, 16, 16), (32, 4, 16, 16), (64, 8, 16, 16)),
    ("adaptive", 32, "tf32x3", 100): _entry((16, 4, 32, 16), (32, 4, 32, 32), (64, 8, 32, 16)),
    ("adaptive", 16, "tf32", 100): _entry((16, 4, 16, 16), (32, 4, 16, 16), (64, 8, 16, 16)),
    ("adaptive", 32, "tf32", 100): _entry((16, 4, 32, 16), (32, 4, 32, 32), (64, 8, 32, 16)),
    ("gradient", 32, "tf32x3", 80): _entry((16, 4, 16, 16), (16, 1, 16, 16)),
    ("gradient", 64, "tf32x3", 80): _entry((16, 8, 32, 32)),
    ("gradient", 128, "tf32x3", 80): _entry((16, 8, 64, 32)),
}
# fmt: on
"""Launches of a kind of kernel, a padded hidden width, and a precision. The last one is for many
rows: of a gradient, whose tiles wait for memory, one that leaves room for more programs. Where a
key goes on with an architecture, that entry goes before the general one."""


MOST_CHANNELS, MOST_FILTERS = 64, 128

CONV_TABLE: dict[tuple[str, int, int] | tuple[str, int, int, int], tuple[int, int, int]] = {
    ("forward", 64, 0): (32, 4, 255),
    ("forward", 64, 1): (64, 4, 255),
    ("forward", 64, 2): (64, 4, 255),
    ("forward", 128, 0): (16, 8, 255),
    ("forward", 128, 1): (128, 8, 255),
    ("forward", 128, 2): (64, 8, 255),
    ("gradient", 64, 0): (32, 8, 255),
    ("gradient", 64, 1): (32, 4, 255),
    ("gradient", 64, 2): (32, 4, 255),
    ("gradient", 128, 0): (16, 8, 255),
    ("gradient", 128, 1): (32, 8, 255),
    ("gradient", 128, 2): (32, 8, 255),
    # Where these would spill.
    ("gradient", 128, 1, 80): (16, 8, 255),
}
"""Pixels of a tile, warps of a program, registers of a thread; for padded filters (up to that many)
and 16-bit parts. Where a key goes on with an architecture, that entry goes before the general
one."""

LEAST_WIDTH = 8 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8) else 16
"""Of padded channels. Products of older versions of Triton sum over 16 numbers at least."""

WIDE, CONV_WIDE = 64, (16, 8, 255)
"""Padded channels from which on tiles are small, whatever else; and their entry."""


def why_not(
    field: Field | ConvField | Program, dtype: torch.dtype, capability: int = LOWEST_CAPABILITY
) -> str:
    """Why the kernels cannot run a field; "" if they can.

    Args:
        field: The field, or its program.
        dtype: Of the state.
        capability: Of the GPU, 90 for 9.0.
    """
    if dtype not in (torch.float32, torch.float64):
        return f"the state is {dtype}, the GPU kernels take float32 and float64"
    if isinstance(field, ConvField):
        return _why_not_conv(field) or _why_not_capability(capability)
    if isinstance(field, Program):
        return _why_not_program(field) or _why_not_capability(capability)
    layers = len(field.hidden)
    if not 1 <= layers <= MOST_LAYERS:
        return f"the field has {layers} hidden layers, the GPU kernels take 1 to {MOST_LAYERS}"
    if len(set(field.hidden)) > 1:
        widths = ", ".join(map(str, field.hidden))
        return f"the field has hidden layers of widths {widths}, the GPU kernels take equal ones"
    if field.hidden[0] > MOST_HIDDEN:
        return (
            f"the field has hidden layers of width {field.hidden[0]}, "
            f"the GPU kernels take {MOST_HIDDEN} at most"
        )
    if field.dim > MOST_DIM:
        return f"the state has width {field.dim}, the GPU kernels take {MOST_DIM} at most"
    return _why_not_capability(capability)


def _why_not_conv(field: ConvField) -> str:
    if field.filters > MOST_FILTERS:
        return f"the field has {field.filters} filters, the GPU kernels take {MOST_FILTERS} at most"
    if field.channels > MOST_CHANNELS or (field.channels > WIDE - 2 and field.filters > WIDE):
        return (
            f"the state has {field.channels} channels, the GPU kernels take {MOST_CHANNELS} at "
            f"most, and {WIDE - 2} with more than {WIDE} filters"
        )
    return ""


def _why_not_program(program: Program) -> str:
    if program.dim > MOST_DIM:
        return f"the state has width {program.dim}, the GPU kernels take {MOST_DIM} at most"
    most = MOST_WIDTH if generate.has_products(program) else MOST_DIM  # else all is in registers
    if max(program.widths) > most:
        return (
            f"the field has a value of width {max(program.widths)}, the GPU kernels take "
            f"{most} at most" + ("" if most == MOST_WIDTH else " where there are no linear maps")
        )
    if len(program.code) > MOST_INSTRUCTIONS:
        return (
            f"the field has {len(program.code)} instructions, the GPU kernels take "
            f"{MOST_INSTRUCTIONS} at most"
        )
    _, numbers = generate.source(program, 16, 16)
    if numbers > MOST_KEPT:
        return (
            f"a gradient would keep {numbers} numbers of each row and evaluation, the GPU kernels "
            f"have room for {MOST_KEPT}"
        )
    return ""


def _why_not_capability(capability: int) -> str:
    if capability < LOWEST_CAPABILITY:
        return (
            f"the GPU has compute capability {capability / 10}, "
            f"the kernels need {LOWEST_CAPABILITY / 10}"
        )
    return ""


def padded(width: int) -> int:
    """Width of a tile: a power of two, as tiles have to have, and enough for tensor cores."""
    return max(16, 1 << (width - 1).bit_length())


def precision(dtype: torch.dtype) -> str:
    """Of matrix products in that dtype, as torch.set_float32_matmul_precision has it."""
    if dtype == torch.float64:
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def architecture(capability: int) -> int:
    """Whose entries serve a GPU.

    Hopper and the data center's Blackwell have matrix instructions of their own; all others, and
    the interpreter, have those of Ampere.
    """
    return 90 if capability == 90 else 100 if 100 <= capability < 110 else 80


@functools.lru_cache(maxsize=1024)
def configuration(
    kernel: str,
    rows: int,
    field: Field | Program,
    precision: str,
    is_double: bool,
    capability: int,
) -> tuple[Compiled, Launch]:
    """The field as the kernel is compiled for it, and the launch.

    Args:
        kernel: One of `KERNELS`.
        rows: Of the batch.
        field: The field, or its program.
        precision: Of matrix products.
        is_double: Whether in float64.
        capability: Of the device: 80, 90, 100; 0 for the interpreter.
    """
    kernel = "adaptive" if kernel == "forward" else kernel
    of_precision = "ieee" if is_double else precision
    if isinstance(field, Program):
        D = generate.padded(field.dim, field)
        entry = _entry_of(field, kernel, of_precision, capability)
        launch = _chosen(entry, kernel in ONE_STEP_SIZE, rows, D, capability)
        return generate.generated(field, precision, launch.N, launch.K), launch
    D, H = padded(field.dim), padded(field.hidden[0])
    entry = _table_entry(kernel, H, of_precision, capability)
    launch = _chosen(entry, kernel in ONE_STEP_SIZE, rows, D, capability)
    return (
        MLP(
            *(field.dim, field.hidden[0], len(field.hidden), field.activation),
            *(int(field.time_dependent), precision, D, H, launch.N, launch.K),
        ),
        launch,
    )


def _table_entry(kernel: str, H: int, precision: str, capability: int) -> tuple[Launch, ...]:
    key = (kernel, H, precision)
    return TABLE.get((*key, architecture(capability))) or TABLE[key]


def _entry_of(program: Program, kernel: str, precision: str, capability: int) -> tuple[Launch, ...]:
    """Launches for a program: those of a perceptron as wide as its widest value.

    Without matrix products all is in registers, and tiles are as high as leaves a thread 16 numbers
    of each value at most.
    """
    width = generate.padded(max(program.widths), program)
    if generate.has_products(program):
        return _table_entry(kernel, min(width, MOST_HIDDEN), precision, capability)
    shapes = ((32, 1), (32, 4), (64, 4), (128, 4), (256, 8))
    return _entry(*((*shape, 16, 16) for shape in shapes if shape[0] * width <= 512 * shape[1]))


def _chosen(
    entry: tuple[Launch, ...], is_one_step_size: bool, rows: int, D: int, capability: int
) -> Launch:
    """Of an entry the launch for a batch."""
    smallest, *larger = sorted(entry, key=lambda x: x.rows)
    fitting = [smallest, *(x for x in larger if x.rows * D <= MOST_NUMBERS)]
    holding = [x for x in fitting if x.rows >= rows]
    # The interpreter's programs run one after the other.
    if holding and (is_one_step_size or capability == 0):
        return holding[0]
    if rows >= MANY_ROWS or capability == 0:
        return entry[-1] if entry[-1] in fitting else fitting[-1]
    return smallest  # programs on as many multiprocessors as there are tiles


class ConvLaunch(NamedTuple):
    """How the kernels of a convolutional field are launched.

    Attributes:
        pixels: Of a tile.
        warps: Of a program.
        registers: Of a thread, at most.
        taps: Whose gradients a program of `vjp_weights` sums up, in its registers.
    """

    pixels: int
    warps: int
    registers: int
    taps: int

    @property
    def options(self) -> dict[str, int | str]:
        """What Triton is told at a launch, beside the kernel's arguments.

        One stage: with more, loads bypass the L1 cache, where nine taps find most of what they
        need.
        """
        return _options(self.warps, self.registers)


@functools.lru_cache(maxsize=1024)
def conv_configuration(
    kernel: str, field: ConvField, height: int, width: int, precision: str, capability: int
) -> tuple[Conv, ConvLaunch]:
    """The field as kernels are compiled for it, and the launch.

    Args:
        kernel: "forward" or "gradient".
        field: The field.
        height, width: Of the images.
        precision: Of matrix products, as `precision` has it.
        capability: Of the device; 0 for the interpreter.
    """
    D = max(LEAST_WIDTH, 1 << (field.channels + 1).bit_length())
    N = padded(field.filters)
    parts = {"ieee": 0, "tf32": 1, "tf32x3": 2}[precision]
    # The first hidden layer is made nine times where that costs no more than to get it nine times.
    through_memory = field.activation not in (
        activations.RELU.value,
        activations.IDENTITY.value,
    )
    entry = _conv_entry(kernel, N, parts, capability)
    if capability == 0:  # the interpreter is slow, and tests want several tiles
        entry = (64, 4, 255)
    elif D >= WIDE:
        entry = CONV_WIDE
    return (
        Conv(
            *(field.channels, field.filters, field.activation, int(field.time_dependent)),
            *(height, width, precision, parts, through_memory, D, N),
        ),
        ConvLaunch(*entry, 3 if N <= 64 and D < WIDE else 1),
    )


def _conv_entry(kernel: str, N: int, parts: int, capability: int) -> tuple[int, int, int]:
    width = 64 if N <= 64 else 128
    special = CONV_TABLE.get((kernel, width, parts, architecture(capability)))
    return special or CONV_TABLE[kernel, width, parts]
