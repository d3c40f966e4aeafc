"""Compiles the kernels for GPUs that need not be here, and shows what each one takes.

    python -m anode_fast.kernels.gpu.aot [--check] [--full] [--arch 80,90,100] [--json FILE]

What is compiled is what is launched: solves run on the CPU with the launches noted instead of made,
and Triton binds and specialises their arguments as for a GPU. Neither a kernel's parameter nor an
entry of the launch table can be forgotten here. A line is a kernel, for a field and a number of
rows, on an architecture:

    tile       rows (or pixels) of a program x its warps; N,K: its blocks, as in launch.py; of a
               convolutional field, padded filters and channels
    registers  of a thread
    spill      bytes of a thread's registers that go to memory, and the instructions that move them
    shared     bytes of a program
    matrix     matrix instructions in the code; code: all instructions; kB: their size
    compile    seconds of a processor, ptxas included
    bound      (not of programs) us that a step of one tile takes at least: its matrix products, by
               one multiprocessor at the peak of the GPU's data sheet. A step takes far longer:
               its products wait for one another

With --check the exit status is 1 if a line exceeds its budget, and it is said what to do. --full
compiles every entry of the launch table, and more activations, depths, widths and methods.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import re
import resource
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from anode_fast.kernels.gpu import (
    adjoint,
    by_stage,
    combine,
    continuous,
    controller,
    conv,
    host,
    launch,
    reverse,
    runge_kutta,
    solve,
    unwind,
)
from anode_fast.kernels.gpu.launch import ARCHITECTURES, ONE_STEP_SIZE, WIDTHS, Launch, architecture
from anode_fast.kernels.interface import BATCH, FIXED, SAMPLE, ConvField, Field, Method
from anode_fast.kernels.program import STATE, TIME, Instruction, Program

MODULE = "anode_fast.kernels.gpu.aot"
PROCESSES = 2

MOST_REGISTERS = 255
MOST_SECONDS = 15.0
MOST_SHARED = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}
"""Bytes that a program may have. Of 80, what 86 and 89 have: its entries are theirs."""

MOST_SPILLED, MOST_SPILLED_WIDE = 184, 3072
"""Bytes of a thread's registers that may go to memory for fields and GPUs that the launch table was
not made for first: what the feasibility study had to accept at worst (152), and a little more for
the gradients of 128 filters in float64, whose sums alone take half of the registers. For fields of
two hidden layers with a state of up to 16 columns, and for convolutional ones of up to 64 filters,
in float32 on a Hopper GPU, none may. The second number is for convolutional fields of 64 padded
channels and more, which spill in whatever tile."""

MOST_SPILLED_TIMED = {"gradient": 704, "conv": 32}
"""Where launch.py has what was fastest on a card although it spills: gradients of perceptrons of 32
units and many rows, and of convolutional fields of up to 64 filters."""

REGISTERS, SHARED = 1 << 16, 227 << 10
"""Of a multiprocessor of a Hopper GPU: registers, and bytes of shared memory."""


@dataclass(frozen=True)
class Peak:
    """A GPU's, from its data sheet.

    Attributes:
        multiprocessors: How many.
        tf32, float64: Matrix products, TFLOP/s.
    """

    multiprocessors: int
    tf32: float
    float64: float


PEAKS = {
    80: Peak(108, 156, 19.5),  # A100 SXM
    90: Peak(132, 494, 67),  # H100 SXM
    100: Peak(148, 1100, 37),  # B200
}


@dataclass(frozen=True)
class Case:
    """A kernel, what it is compiled for, and for which GPU.

    Attributes:
        kernel: A key of `KERNELS`.
        hidden, dim, layers, activation: The field's; of a convolutional one `hidden` are filters,
            `dim` channels.
        precision: Of matrix products; "ieee" is float64.
        rows: Of the batch, or images, of 28 x 28 pixels.
        arch: Compute capability, 90 for 9.0.
        stages: Of the method.
        launch: Instead of the table's.
        program: Of `PROGRAMS`, instead of a perceptron; "" for that.
    """

    kernel: str
    hidden: int = 32
    precision: str = "tf32x3"
    rows: int = 64
    arch: int = 90
    dim: int = 7
    layers: int = 2
    activation: int = 1
    stages: int = 7
    launch: Launch | None = None
    program: str = ""

    @property
    def dtype(self) -> torch.dtype:
        """Of the state."""
        return torch.float64 if self.precision == "ieee" else torch.float32

    @property
    def is_conv(self) -> bool:
        """Whether the field is a convolutional one."""
        return KERNELS[self.kernel].module in (conv, combine, unwind, reverse)

    @property
    def field(self) -> Field | ConvField | Program:
        """The field."""
        if self.program:
            return PROGRAMS[self.program]
        if self.is_conv:
            return ConvField(self.dim, self.hidden, self.activation, True)
        return Field(self.dim, (self.hidden,) * self.layers, self.activation, True)


def _programs() -> dict[str, Program]:
    """Fields as users write them: what recognition makes of them."""

    def step(op: str, *inputs: int, width: int = 1, parameters: Sequence[int] = ()) -> Instruction:
        return Instruction(op, inputs, width, tuple(parameters))

    H = 32
    layers = ((H, 8), (H,), (H, H), (H,), (7, H), (7,))
    joined = step("join", STATE, TIME, width=8)
    perceptron = (
        joined,
        step("linear", 2, width=H, parameters=(0, 1)),
        step("softplus", 3, width=H),
        step("linear", 4, width=H, parameters=(2, 3)),
        step("softplus", 5, width=H),
        step("linear", 6, width=7, parameters=(4, 5)),
    )
    gated = (
        *perceptron[:4],
        step("sigmoid", TIME),
        step("mul", 5, 6, width=H),
        step("tanh", 7, width=H),
        step("add", 4, 8, width=H),
        step("linear", 9, width=7, parameters=(4, 5)),
        step("sub", 10, STATE, width=7),
    )
    spiral = (
        Instruction("pow", (STATE,), 2, (), 3.0),
        step("linear_t", 2, width=2, parameters=(0,)),
    )
    predators = (
        Instruction("slice", (STATE,), 1, (), 0.0),
        Instruction("slice", (STATE,), 1, (), 1.0),
        step("mul", 2, 3),
        step("parameter", parameters=(0,)),
        step("parameter", parameters=(1,)),
        step("mul", 5, 2),
        step("sub", 7, 4),
        step("mul", 6, 3),
        step("sub", 4, 9),
        step("join", 8, 10, width=2),
    )
    return {
        "perceptron": Program(7, layers, perceptron),
        "gated": Program(7, layers, gated),
        "spiral": Program(2, ((2, 2),), spiral),
        "predators": Program(2, ((1,), (1,)), predators),
    }


PROGRAMS = _programs()

# --- launches -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """A kernel, and which call of a `Solve` launches it.

    Attributes:
        module, name: Where it is.
        kind: In the launch table; "" if it is not there.
        control: Of the steps.
        call: "forward"; or "discrete" or "continuous", for a gradient.
        products: Matrix products it makes for an evaluation, as multiples of the field's own: the
            evaluation, its vector-Jacobian product, its weights' gradients.
    """

    module: ModuleType
    name: str
    kind: str
    control: int
    call: str
    products: int


KERNELS = {
    "fixed": Kernel(runge_kutta, "fixed", "fixed", FIXED, "forward", 1),
    "adaptive": Kernel(runge_kutta, "adaptive", "adaptive", BATCH, "forward", 1),
    "by_row": Kernel(runge_kutta, "adaptive_by_row", "by_row", SAMPLE, "forward", 1),
    "gradient_fixed": Kernel(adjoint, "discrete_gradient", "gradient", FIXED, "discrete", 3),
    "gradient_batch": Kernel(adjoint, "discrete_gradient", "gradient", BATCH, "discrete", 3),
    "gradient_by_row": Kernel(adjoint, "discrete_gradient", "gradient", SAMPLE, "discrete", 3),
    "continuous_fixed": Kernel(continuous, "fixed", "continuous", FIXED, "continuous", 3),
    "continuous": Kernel(continuous, "adaptive", "continuous", BATCH, "continuous", 2),
    "quadrature": Kernel(continuous, "quadrature", "continuous", BATCH, "continuous", 3),
    "reduce": Kernel(adjoint, "reduce", "", BATCH, "discrete", 0),
    "conv_pack": Kernel(conv, "pack", "conv", BATCH, "forward", 0),
    "conv_begin": Kernel(combine, "begin", "conv", BATCH, "forward", 0),
    "conv_begin_fixed": Kernel(combine, "begin", "conv", FIXED, "forward", 0),
    "conv_first_layer": Kernel(conv, "first_layer", "conv", BATCH, "forward", 0),
    "conv_stage": Kernel(combine, "stage", "conv", BATCH, "forward", 1),
    "conv_finish": Kernel(combine, "finish", "conv", SAMPLE, "forward", 0),
    "conv_finish_fixed": Kernel(combine, "finish", "conv", FIXED, "forward", 0),
    "conv_rewind": Kernel(unwind, "rewind", "conv", SAMPLE, "discrete", 0),
    "conv_rewind_fixed": Kernel(unwind, "rewind", "conv", FIXED, "discrete", 0),
    "conv_cotangent": Kernel(unwind, "cotangent", "conv", BATCH, "discrete", 0),
    "conv_outer": Kernel(conv, "vjp_outer", "conv", BATCH, "discrete", 1),
    "conv_inner": Kernel(conv, "vjp_inner", "conv", BATCH, "discrete", 1),
    "conv_weights": Kernel(conv, "vjp_weights", "conv", BATCH, "discrete", 1),
    "conv_gather": Kernel(unwind, "gather", "conv", BATCH, "discrete", 0),
    "conv_back_begin": Kernel(reverse, "begin", "conv", BATCH, "continuous", 0),
    "conv_back_advance": Kernel(reverse, "advance", "conv", BATCH, "continuous", 0),
    "conv_back_finish": Kernel(reverse, "finish", "conv", BATCH, "continuous", 0),
    "conv_commit": Kernel(reverse, "commit", "conv", BATCH, "continuous", 0),
}

IMAGE = 28, 28
"""Height and width of images."""


@dataclass
class Noted:
    """A launch that was not made: of which kernel, how many programs, with what arguments."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]


class _Notes:
    """Stands in a module for a kernel, and notes its launches."""

    def __init__(self, kernel: Any, launches: list[Noted]) -> None:
        self._kernel = kernel
        self._launches = launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def note(**arguments: Any) -> None:
            self._launches.append(Noted(self._kernel, grid, arguments))
            if "control" in arguments:  # or the solve would go on
                state = arguments["control"]
                state[..., controller.STATUS.value] = controller.SUCCESS.value
                state[..., controller.ACCEPTED.value] = 1
                state[..., controller.OUTPUT.value] = arguments.get("num_times", 0)

        return note


def _method(stages: int) -> Method:
    """Kernels know of a method how many stages it has; the rest is data."""
    zeros = [0.0] * stages
    rows = [zeros[:i] for i in range(stages)]
    return Method(5, zeros, rows, zeros, zeros, [[0.0] * 4] * stages, True)


def _parameters(field: Field | ConvField | Program, dtype: torch.dtype) -> list[Tensor]:
    """Weights and biases, which nobody reads."""
    shapes: list[tuple[int, ...]] = []
    if isinstance(field, Program):
        return [torch.empty(shape, dtype=dtype) for shape in field.shapes]
    if isinstance(field, ConvField):
        C, K = field.channels, field.filters
        for weight in ((K, 1 + C, 1, 1), (K, 1 + K, 3, 3), (C, 1 + K, 1, 1)):
            shapes += [weight, weight[:1]]
        return [torch.empty(shape, dtype=dtype) for shape in shapes]
    inputs = field.dim + field.time_dependent
    for outputs in (*field.hidden, field.dim):
        shapes += [(outputs, inputs), (outputs,)]
        inputs = outputs
    return [torch.empty(shape, dtype=dtype) for shape in shapes]


@contextlib.contextmanager
def _assumed(case: Case) -> Iterator[list[Noted]]:
    """The case's GPU, precision and launch; and instead of launches, notes of them."""
    launches: list[Noted] = []
    before = torch.get_float32_matmul_precision()
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_float32_matmul_precision, before)
        torch.set_float32_matmul_precision("high" if case.precision == "tf32" else "highest")
        stack.enter_context(mock.patch.object(host, "capability", lambda device: case.arch))
        stack.enter_context(mock.patch.object(host, "never_waits", lambda device: True))
        if case.launch:
            stack.callback(launch.configuration.cache_clear)
            launch.configuration.cache_clear()
            stack.enter_context(mock.patch.object(launch, "_chosen", lambda *_: case.launch))
        for module, name in {(kernel.module, kernel.name) for kernel in KERNELS.values()}:
            notes = _Notes(getattr(module, name), launches)
            stack.enter_context(mock.patch.object(module, name, notes))
        yield launches


def noted_launches(case: Case) -> list[Noted]:
    """All launches of the solve, or of its gradient, that the case's kernel is part of."""
    kernel, dtype, times = KERNELS[case.kernel], case.dtype, (0.0, 0.5, 1.0)
    parameters = _parameters(case.field, dtype)
    shape = (
        case.rows,
        min(2, case.field.dim if case.program else case.dim),
        *(IMAGE if case.is_conv else ()),
    )
    x = torch.empty(shape, dtype=dtype)
    is_fixed = kernel.control == FIXED
    options: dict[str, float] = dict(
        **dict(control=kernel.control, data_dim=x.shape[1], backwards=False, float_time=False),
        **dict(rtol=1e-3, atol=1e-3, max_num_steps=100, max_step=1.0),
        **dict(safety=0.9, ifactor=10.0, dfactor=0.2),
    )
    with _assumed(case) as launches:
        make = by_stage.Solve if case.is_conv else solve.Solve
        made = make(case.field, _method(case.stages), dtype, **options)
        out, _, kept = made.forward(x, parameters, times, times if is_fixed else (), keep=True)
        grad = torch.empty_like(out)
        if kernel.call == "discrete":
            made.discrete_gradient(kept, parameters, grad, x, True)
        elif kernel.call == "continuous":
            grid = tuple(-time for time in reversed(times)) if is_fixed else ()
            wanted = [True] * len(parameters)
            made.continuous_gradient(out, parameters, times, grad, x, wanted, grid, True)
    return launches


def noted_launch(case: Case) -> Noted:
    """The first launch of the case's kernel."""
    kernel = KERNELS[case.kernel]
    wanted = getattr(kernel.module, kernel.name)
    return next(noted for noted in noted_launches(case) if noted.kernel is wanted)


# --- compiled code --------------------------------------------------------------------------------


class _NotHere:
    """A driver for a GPU of which no more is known than its architecture."""

    def __init__(self, arch: int) -> None:
        self._arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._arch, 32)

    def get_current_device(self) -> int:
        return self._arch  # what Triton keeps of a device is kept of an architecture

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass
class Report:
    """What a compiled kernel takes: the table's columns."""

    case: Case
    rows: int = 0
    warps: int = 0
    N: int = 0
    K: int = 0
    registers: int = 0
    spill_bytes: int = 0
    spills: int = 0
    shared: int = 0
    matrix: int = 0
    asynchronous: int = 0
    instructions: int = 0
    code_bytes: int = 0
    seconds: float = 0.0
    bound: float = 0.0
    failure: str = ""


def _seconds() -> float:
    """Processor time so far, of this process and of those that it has waited for."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,6}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)")
ASYNCHRONOUS = re.compile(r"[A-Z]GMMA|UTC[A-Z]*MMA")
RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+)")


def parsed(text: str) -> dict[str, int]:
    """What cuobjdump's resource usage and disassembly tell of a kernel."""
    found = RESOURCES.search(text)
    opcodes = Counter(INSTRUCTION.findall(text))
    count = sum(opcodes.values())
    if not found or not count:
        raise RuntimeError(f"cuobjdump shows no kernel: {text[:200]!r}")
    return dict(
        registers=int(found[1]),
        spill_bytes=int(found[2]),
        spills=opcodes["STL"] + opcodes["LDL"],
        matrix=sum(n for name, n in opcodes.items() if name.endswith("MMA")),
        asynchronous=sum(n for name, n in opcodes.items() if ASYNCHRONOUS.fullmatch(name)),
        instructions=count,
        code_bytes=16 * count,
    )


def _disassembled(cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        tool = triton.knobs.nvidia.cuobjdump.path
        command = [tool, "--dump-resource-usage", "--dump-sass", str(file)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _bound(case: Case, rows: int) -> float:
    """The column `bound`, in us."""
    peak = PEAKS[architecture(case.arch)]
    inputs, H = case.dim + 1, case.hidden
    madds = rows * H * (inputs + case.dim + (9 if case.is_conv else case.layers - 1) * H)
    madds *= KERNELS[case.kernel].products * (1 if case.is_conv else case.stages - 1)
    madds *= 3 if case.precision == "tf32x3" else 1
    rate = peak.float64 if case.precision == "ieee" else peak.tf32
    return 2 * madds / (rate / peak.multiprocessors) / 1e6


def compiled(case: Case) -> tuple[Report, str]:
    """Compiles a kernel; what it takes, and its disassembly."""
    torch.set_num_threads(1)
    report, text = Report(case), ""
    try:
        noted = noted_launch(case)
        driver.set_active(_NotHere(case.arch))
        begin = _seconds()
        kernel = noted.kernel.warmup(grid=noted.grid, **noted.arguments)
        report.seconds = _seconds() - begin
        report.shared = kernel.metadata.shared
        report.warps = kernel.metadata.num_warps
        if {"F", "B"} <= set(noted.arguments):
            F, report.rows = noted.arguments["F"], noted.arguments["B"]
            report.bound = 0.0 if case.program else _bound(case, report.rows)
            report.N, report.K = F.N, F.D if case.is_conv else F.K
        text = _disassembled(kernel.asm["cubin"])
        for name, value in parsed(text).items():
            setattr(report, name, value)
    except Exception as error:  # what the compiler says belongs on the line
        cause: BaseException = error
        while cause.__cause__:  # the innermost device function
            cause = cause.__cause__
        report.failure = f"{type(cause).__name__}: {cause}".strip()
    return report, text


def report(case: Case) -> Report:
    """Compiles a kernel; what it takes."""
    return compiled(case)[0]


# --- which cases ----------------------------------------------------------------------------------

LARGE = 1 << 16
"""Rows of a batch that is large."""

ROWS = (16, 32, 64, LARGE)


def cases(full: bool, archs: Sequence[int] = ARCHITECTURES) -> list[Case]:
    """What is compiled."""
    return [
        case for case in _distinct(_everything() if full else _selection()) if case.arch in archs
    ]


def _selection() -> Iterator[Case]:
    """A little of everything: kernels of a kind differ little, and architectures seldom do."""
    for arch, H in itertools.product(ARCHITECTURES, WIDTHS):
        if arch == 90 or H in (32, 128):
            yield Case("adaptive", H, "tf32x3", 64, arch)
            yield Case("gradient_by_row", H, "tf32x3", 64, arch)
    for arch, H in itertools.product(ARCHITECTURES, (32, 128)):
        yield Case("by_row", H, "tf32x3", LARGE, arch)
    for H in (32, 64):
        yield Case("adaptive", H, "tf32")
        yield Case("gradient_by_row", H, "tf32")
    for arch, kernel in itertools.product(ARCHITECTURES, _kernels(conv=False)):
        # Those that are not above, once on each architecture.
        yield Case(kernel, {80: 16, 90: 32, 100: 64}[arch], "tf32x3", LARGE, arch)
    yield from _images()
    for kernel in ("adaptive", "gradient_by_row", "continuous"):
        yield Case(kernel, 64, dim=64)
        yield Case(kernel, 32, layers=4)
        yield Case(kernel, 100)
        yield Case(kernel, 32, "ieee")
    yield Case("by_row", stages=14)
    yield Case("gradient_by_row", stages=14)
    for activation in (2, 5):
        yield Case("gradient_batch", activation=activation)
    for program in PROGRAMS:
        yield Case("adaptive", program=program)
    for arch, program in itertools.product(ARCHITECTURES, ("gated", "predators")):
        yield Case("gradient_by_row", arch=arch, program=program)
    yield Case("continuous", program="gated")


def _kernels(conv: bool) -> list[str]:
    """Those of convolutional fields, or the others."""
    return [name for name in KERNELS if Case(name).is_conv == conv]


def _images() -> Iterator[Case]:
    """The paper's models of MNIST, and one of CIFAR10; other activations; float64."""
    for arch in ARCHITECTURES:
        for kernel in _kernels(conv=True):
            yield Case(kernel, 64, "tf32x3", 256, arch, dim=6)
        for kernel in ("conv_stage", "conv_outer", "conv_inner", "conv_weights"):
            yield Case(kernel, 64, "tf32x3", 256, arch, dim=6, activation=0)
    for kernel in ("conv_stage", "conv_outer", "conv_inner", "conv_weights"):
        yield Case(kernel, 64, "tf32", 256, dim=6, activation=0)
        yield Case(kernel, 92, "tf32x3", 256, dim=1, activation=0)
        yield Case(kernel, 64, "tf32", 256, dim=13, activation=0)
        yield Case(kernel, 125, "tf32", 256, dim=3, activation=0)
        yield Case(kernel, 64, "tf32x3", 256, dim=64, activation=0)
        yield Case(kernel, 92, "tf32x3", 256, dim=62, activation=0)
        yield Case(kernel, 64, "ieee", 256, dim=6, activation=0)
        yield Case(kernel, 92, "ieee", 256, dim=1, activation=0)


def _everything() -> Iterator[Case]:
    """Every entry of the table; every activation, depth and padding; few stages and many."""
    yield from _images()
    for kernel, K, precision in itertools.product(
        _kernels(conv=True), (16, 32, 64, 128), launch.PRECISIONS
    ):
        for arch, activation in itertools.product(ARCHITECTURES, (0, 1, 2)):
            yield Case(kernel, K, precision, 256, arch, dim=6, activation=activation)
    for arch, kernel, H in itertools.product(ARCHITECTURES, _kernels(conv=False), WIDTHS):
        for precision, rows in itertools.product(launch.PRECISIONS, ROWS):
            yield Case(kernel, H, precision, rows, arch)
        for rows in (32, LARGE):
            for activation in range(8):
                yield Case(kernel, H, "tf32x3", rows, arch, activation=activation)
            for layers in (1, 3, 4):
                yield Case(kernel, H, "tf32x3", rows, arch, layers=layers)
            for dim in (1, 32, 64):
                yield Case(kernel, H, "tf32x3", rows, arch, dim=dim)
            for stages in (2, 14):
                yield Case(kernel, H, "tf32x3", rows, arch, stages=stages)
    for arch, kernel, H in itertools.product(ARCHITECTURES, _kernels(conv=False), (20, 50, 100)):
        yield Case(kernel, H, "tf32x3", LARGE, arch)


def _distinct(found: Iterable[Case]) -> list[Case]:
    """One case of those that compile the same code: numbers of rows may share a launch."""
    first: dict[object, Case] = {}
    for case in found:
        kind = KERNELS[case.kernel].kind
        key: tuple[object, ...] = (case.kernel, case.arch, case.stages)
        if case.is_conv:
            part = "forward" if KERNELS[case.kernel].call == "forward" else "gradient"
            key += launch.conv_configuration(*(part, case.field, *IMAGE, case.precision, case.arch))
        elif kind:
            is_double = case.precision == "ieee"
            key += (case.program,)
            arguments = (kind, case.rows, case.field, case.precision, is_double, case.arch)
            configuration = launch.configuration(*arguments)
            is_one_program = kind in ONE_STEP_SIZE and case.rows <= configuration[1].rows
            key += (*configuration, is_one_program)
        first.setdefault(key, case)
    return list(first.values())


# --- budgets --------------------------------------------------------------------------------------


def _allotted(registers: int) -> int:
    """Registers that a thread gets that needs so many."""
    return max(1, -(-registers // 8) * 8)


def breaches(report: Report) -> list[str]:
    """What of a report exceeds its budget, and what to do; nothing if nothing does."""
    case = report.case
    if report.failure:
        return [f"does not compile: {report.failure}"]
    shared = MOST_SHARED[architecture(case.arch)]
    is_first = case.arch == 90 and case.layers == 2 and case.dim <= 16 and case.stages <= 7
    is_first &= case.hidden <= 64 or not case.is_conv
    spilled = 0 if is_first and case.precision != "ieee" else MOST_SPILLED
    if case.is_conv and report.K >= launch.WIDE:
        spilled = MOST_SPILLED_WIDE
    elif KERNELS[case.kernel].call == "discrete" and case.is_conv:
        spilled = max(spilled, MOST_SPILLED_TIMED["conv"])
    elif (
        KERNELS[case.kernel].kind == "gradient"
        and case.hidden <= 32
        and case.rows >= launch.MANY_ROWS
    ):
        spilled = MOST_SPILLED_TIMED["gradient"]
    smaller = "give its entry in launch.py fewer rows or smaller blocks"
    found = []
    if report.asynchronous:
        found.append(
            f"has {report.asynchronous} matrix instructions of Hopper's or Blackwell's own, budget "
            "0: launch it with options of launch.py, whose INSTRUCTIONS says why"
        )
    if report.spill_bytes > spilled:
        found.append(
            f"spills {report.spill_bytes} bytes a thread, budget {spilled}: {smaller}, or have the "
            "kernel keep less at a time"
        )
    if report.registers > MOST_REGISTERS:
        found.append(f"takes {report.registers} registers, budget {MOST_REGISTERS}: {smaller}")
    if report.shared > shared:
        found.append(f"takes {report.shared} bytes of shared memory, budget {shared}: {smaller}")
    if case.kernel == "conv_stage" and is_first and case.precision != "ieee":
        fitting = REGISTERS // (32 * report.warps * _allotted(report.registers))
        fitting = min(fitting, SHARED // (report.shared + 1024))
        if fitting < 2:
            found.append(
                f"leaves room for {fitting} programs on a multiprocessor, budget 2: {smaller}"
            )
    if report.seconds > MOST_SECONDS:
        found.append(
            f"takes {report.seconds:.1f} s to compile, budget {MOST_SECONDS:.0f} s: make loops of "
            "what is unrolled, or give its entry in launch.py smaller blocks"
        )
    return found


# --- command line ---------------------------------------------------------------------------------

COLUMNS = (
    *(("kernel", -16), ("sm", 3), ("width", 5), ("precision", -9), ("rows", 5), ("", -13)),
    *(("tile", 5), ("N,K", 6), ("registers", 9), ("spill", 9), ("shared", 6), ("matrix", 6)),
    *(("code", 5), ("kB", 3), ("compile", 7), ("bound", 6)),
)
"""Names and widths of the table's columns, these negative where text stands on the left."""


def _line(cells: Sequence[object]) -> str:
    texts = [
        f"{cell!s:<{-width}}" if width < 0 else f"{cell!s:>{width}}"
        for cell, (_, width) in zip(cells, COLUMNS, strict=False)
    ]
    return " ".join(texts).rstrip()


def line(report: Report) -> str:
    """A report as a line of the table."""
    case, usual = report.case, Case(report.case.kernel)
    differing = ("dim", "layers", "activation", "stages", "program")
    special = [
        f"{x} {getattr(case, x)}" for x in differing if getattr(case, x) != getattr(usual, x)
    ]
    start = (case.kernel, case.arch, case.hidden, case.precision, case.rows, ", ".join(special))
    if report.failure:
        return f"{_line(start)} {report.failure.splitlines()[-1]}"
    return _line(
        (
            *start,
            f"{report.rows or ''}x{report.warps}",
            f"{report.N},{report.K}" if report.N else "",
            *(report.registers, f"{report.spill_bytes} ({report.spills})", report.shared),
            *(report.matrix, report.instructions, round(report.code_bytes / 1000)),
            *(f"{report.seconds:.1f}", f"{report.bound:.2f}"),
        )
    )


def reports(
    chosen: Sequence[Case], compile_case: Callable[[Case], Any] = report, processes: int = PROCESSES
) -> Iterator[Any]:
    """Compiles, several at a time; in order.

    Args:
        chosen: What to compile.
        compile_case: What does it, and makes of it what is returned.
        processes: How many.
    """
    # New processes: in this one the kernels may be the interpreter's, or a GPU's.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        yield from pool.map(compile_case, chosen)


def main(argv: Sequence[str] | None = None) -> int:
    """Compiles and prints the table; the exit status."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="fail if a budget is exceeded")
    parser.add_argument("--full", action="store_true", help="everything, not a selection")
    parser.add_argument(
        "--arch",
        type=lambda text: [int(part) for part in text.split(",")],
        default=list(ARCHITECTURES),
        metavar="80,90,100",
        help="which architectures; all",
    )
    parser.add_argument("--kernel", choices=KERNELS, nargs="+", help="which kernels; all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the table, too")
    args = parser.parse_args(argv)
    if unknown := set(args.arch) - set(ARCHITECTURES):
        parser.error(f"--arch: {sorted(unknown)} not in {list(ARCHITECTURES)}")
    kernels = args.kernel or KERNELS
    chosen = [case for case in cases(args.full, args.arch) if case.kernel in kernels]
    print(f"Triton {triton.__version__}; {len(chosen)} kernels, {PROCESSES} at a time")
    print(_line([name for name, _ in COLUMNS]), flush=True)
    done: list[Report] = []
    with tempfile.TemporaryDirectory() as cache:  # empty: everything is compiled anew
        with mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache):
            for found in reports(chosen):
                print(line(found), flush=True)
                done.append(found)
    if args.json:
        rows = [asdict(found) | {"breaches": breaches(found)} for found in done]
        table = {"triton": triton.__version__, "torch": torch.__version__, "rows": rows}
        args.json.write_text(json.dumps(table, indent=1) + "\n")
    spilling = sum(found.spill_bytes > 0 for found in done)
    slowest = max((found.seconds for found in done), default=0.0)
    print(f"{len(done)} compiled, {spilling} spill; the slowest took {slowest:.1f} s")
    wrong = [f"{line(found)}\n    {what}" for found in done for what in breaches(found)]
    if args.check and wrong:
        print("\nover budget:", *wrong, sep="\n", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    if "TRITON_INTERPRET" in os.environ:  # its kernels cannot be compiled: once more, without it
        rest = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        os.execve(sys.executable, [sys.executable, "-m", MODULE, *sys.argv[1:]], rest)
    sys.exit(main())
