"""The paper's fields for images: their arithmetic, their traffic, and the share of a peak reached.

Counts are of one evaluation, and of one with its vector-Jacobian product. "needed" FLOPs are those
of the convolutions as the paper writes them, time's channel among their inputs, two to a
multiply-add; the product takes twice as much again. "executed" ones are those of our GPU kernels:
the first hidden layer is made again for each of nine taps, channels and filters are padded to
powers of two, and the backward pass makes both hidden layers again. Bytes of the unfused chain are
counted as PyTorch dispatches it, each operation reading and writing memory once, the bias of a
convolution an operation of its own. Those of the kernels are states and what their stages hand on.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
import torchdiffeq
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from anode_fast import ConvField
from benchmarks import machine
from benchmarks.baselines import ConcatenatingConvField
from benchmarks.gpu.bounds import DATA_SHEETS, DESIGN_CARD, Peak
from benchmarks.peak import peak_flops
from benchmarks.speed.conv_rivals import (
    ConvCase,
    with_cheap_field,
    with_compiled_field,
    with_paper_field,
)
from benchmarks.speed.rivals import AtPrecision, backend, with_anode_fast

MODELS = {
    "MNIST NODE": ConvCase(width=92, augmented=0),
    "MNIST ANODE": ConvCase(width=64, augmented=5),
    "CIFAR10 NODE": ConvCase(width=125, data_channels=3, augmented=0, size=32),
    "CIFAR10 ANODE": ConvCase(width=64, data_channels=3, augmented=10, size=32),
}
"""The paper's, from appendix E."""
GPU_BATCH, CPU_BATCH = 256, 16
TAPS = 9
TIME_ROWS = 16  # of the product that adds time's share: as many as a tensor core takes at least
FLOAT = 4  # bytes
MIN_RUNS = 3

RATES = {"float32": (67e12, 67e12), "tf32": (400e12, 495e12), "16-bit": (800e12, 990e12)}
"""FLOP/s of an H100 SXM: what large products reach about, and the data sheet's."""
BANDWIDTH = 3.0e12  # bytes/s; of the data sheet's 3.35e12 about what a copy reaches


# ---- counting


def needed_flops(case: ConvCase) -> int:
    """Of the convolutions of one evaluation."""
    C, K = case.channels, case.width
    return 2 * _pixels(case) * ((C + 1) * K + TAPS * (K + 1) * K + (K + 1) * C)


def _pixels(case: ConvCase) -> int:
    return case.batch * case.size**2


@dataclass(frozen=True)
class Fused:
    """What our GPU kernels do for one evaluation, or for one and its vector-Jacobian product.

    Attributes:
        wide: FLOPs of the 3x3 convolution's products, which are made of 16-bit parts.
        narrow: FLOPs of all other products.
        bytes: Read and written.
    """

    wide: int
    narrow: int
    bytes: int

    @property
    def flops(self) -> int:
        """All of them."""
        return self.wide + self.narrow

    def seconds(self, precision: str, peak: Peak) -> float:
        """Bound by arithmetic and memory, whichever is more, on a card.

        Args:
            precision: "high" (one 16-bit product, or one in tf32) or "highest" (three of them).
            peak: Of the card; its 16-bit products are twice as fast as those in tf32.
        """
        products = 1 if precision == "high" else 3
        arithmetic = products * (self.wide / (2 * peak.tf32) + self.narrow / peak.tf32)
        return max(arithmetic, self.bytes / peak.memory)


def fused(case: ConvCase, *, vjp: bool) -> Fused:
    """Counts of kernels/gpu/conv.py, for relu."""
    D = max(8, 1 << (case.channels + 1).bit_length())
    N = max(16, 1 << (case.width - 1).bit_length())
    square, state = TAPS * N * N, D * N
    wide, narrow = square, TAPS * state + TIME_ROWS * N + state
    traffic = 2 * D
    if vjp:
        # vjp_outer: both hidden layers, deltas from the cotangent, the last weight's gradient;
        # vjp_inner: the transposed convolution, the first layer, the product, the first weight's
        # gradient; vjp_weights: the first layer for each tap, and three sums over pixels.
        wide += 3 * square
        narrow += TAPS * state + TIME_ROWS * N + 2 * state
        narrow += 3 * state
        narrow += TAPS * state + 3 * TIME_ROWS * N
        traffic += (2 * D + N) + (N + 2 * D) + 3 * (N + D)
    per_pixel = 2 * _pixels(case)
    return Fused(per_pixel * wide, per_pixel * narrow, FLOAT * _pixels(case) * traffic)


@dataclass
class Chain:
    """Operations on memory, as they are dispatched one after another.

    Attributes:
        operations: How many.
        bytes: Read and written by them.
        names: How often each, by name.
    """

    operations: int = 0
    bytes: int = 0
    names: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, *tensors: Tensor | None) -> None:
        """Counts an operation that reads or writes these once."""
        self.operations += 1
        self.bytes += sum(x.numel() * x.element_size() for x in tensors if x is not None)
        self.names[name] = self.names.get(name, 0) + 1


class _Counting(TorchDispatchMode):
    """Counts what is dispatched; views cost nothing."""

    def __init__(self, chain: Chain) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.chain = chain

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: D105
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "convolution":
            x, weight, bias, *_ = args
            self.chain.add(name, x, weight, result)
            if bias is not None:
                self.chain.add("add_bias", result, bias, result)
        elif name == "convolution_backward":
            grad, x, weight, *_ = args
            of_x, of_weight, of_bias = result
            for part, tensors in (
                ("of_input", (of_x, weight)),
                ("of_weight", (of_weight, x)),
                ("of_bias", (of_bias,)),
            ):
                if tensors[0] is not None:
                    self.chain.add(f"{name}_{part}", grad, *tensors)
        elif name.endswith("_like"):  # of its argument it takes the shape alone
            self.chain.add(name, result)
        elif not func.is_view:
            self.chain.add(name, *_tensors([*args, *(kwargs or {}).values(), result]))
        return result


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


def chain(case: ConvCase, *, vjp: bool) -> Chain:
    """PyTorch's operations for the field as the paper writes it; nothing is computed."""
    with torch.device("meta"):
        module = ConcatenatingConvField(ConvField(case.channels, case.width))
        y = torch.empty(case.batch, case.channels, case.size, case.size, requires_grad=vjp)
        t, cotangent = torch.empty(()), torch.empty_like(y)
    found = Chain()
    with _Counting(found), torch.set_grad_enabled(vjp):
        dy = module(t, y)
        if vjp:
            torch.autograd.grad(dy, (y, *module.parameters()), cotangent)
    return found


# ---- measuring


@dataclass(frozen=True)
class Reached:
    """What a solver does of a field's arithmetic.

    Attributes:
        model, solver: Who, and on what.
        gradient: Whether a vector-Jacobian product goes with each evaluation.
        seconds: Of an evaluation, in a solve of a few Euler steps; None if it could not be run.
        share: Needed FLOPs in that time, of the peak.
        note: Why it could not.
    """

    model: str
    solver: str
    gradient: bool
    seconds: float | None
    share: float | None
    note: str = ""


def measure(model: str, case: ConvCase, peak: float, seconds: float) -> list[Reached]:
    """Times everybody by turns on Euler steps of a field.

    Args:
        model: Its name.
        case: With method "euler", and a precision if it is to be another than torch's.
        peak: FLOP/s to compare with.
        seconds: For each solver, about.
    """
    flops = needed_flops(case) * (3 if case.gradient else 1)
    with torch.set_grad_enabled(case.gradient):
        rivals: dict[str, Any] = {
            "torchdiffeq, the paper's field": with_paper_field(torchdiffeq.odeint, case),
            "torchdiffeq, a cheap field": with_cheap_field(torchdiffeq.odeint, case),
            f"anode_fast ({backend(case)})": with_anode_fast(case),
        }
        if case.device != "cpu":
            rivals["torchdiffeq, compiled field"] = with_compiled_field(case)
        runs = {name: x for name, x in rivals.items() if not isinstance(x, str)}
        if case.precision:
            runs = {name: AtPrecision(rival, case.precision) for name, rival in runs.items()}
        counts = {name: rival.observe().nfe for name, rival in runs.items()}  # warms up, too
        times = _by_turns(runs, seconds)
    found = []
    for name, rival in rivals.items():
        if name in times:
            each = times[name] / counts[name]
            found.append(Reached(model, name, case.gradient, each, flops / each / peak))
        else:
            found.append(Reached(model, name, case.gradient, None, None, str(rival)))
    return found


def _by_turns(rivals: Mapping[str, Any], seconds: float) -> dict[str, float]:
    """Median of each."""
    times: dict[str, list[float]] = {name: [] for name in rivals}
    end = time.perf_counter() + seconds * len(rivals)
    while time.perf_counter() < end or min(map(len, times.values())) < MIN_RUNS:
        for name, rival in rivals.items():
            start = time.perf_counter()
            rival()
            times[name].append(time.perf_counter() - start)
    return {name: median(runs) for name, runs in times.items()}


# ---- tables


def run(seconds: float, console: Console, models: Mapping[str, ConvCase] = MODELS) -> list[Reached]:
    """Prints the counts and bounds, then what is reached on this CPU and, if there is one, GPU."""
    on_gpu = {name: dataclasses.replace(x, batch=GPU_BATCH) for name, x in models.items()}
    console.print(bounds_table(on_gpu))
    console.print(
        f"Bounds, not measurements: {DATA_SHEETS[DESIGN_CARD].source}; bytes at "
        f"{BANDWIDTH / 1e12:g} TB/s, products at {_range('tf32')} (tf32) and {_range('16-bit')} "
        "TFLOP/s (16-bit), about what large ones reach and the data sheet's. our kernels: the more "
        "of arithmetic and memory at the data sheet's rates, the 3x3 convolution in 16-bit parts."
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        results = _on_cpu(seconds, console, models)
    finally:
        torch.set_num_threads(threads)
    if torch.cuda.is_available():
        results += _on_gpu(seconds, console, on_gpu)
    else:
        console.print("No GPU here: nothing was measured on one.")
    return results


def _range(kind: str) -> str:
    return "-".join(f"{rate / 1e12:g}" for rate in RATES[kind])


def bounds_table(models: Mapping[str, ConvCase]) -> Table:
    """A row for each model's evaluation, and for that with its vector-Jacobian product."""
    result = Table(
        title=f"Bounds of one H100 at batch {GPU_BATCH}, per evaluation",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    result.add_column("model", no_wrap=True)
    for heading in (
        *("GFLOP\nneeded", "exe-\ncuted", "unfused:\nops", "\nMB", "\nus"),
        *("fused:\nMB", "\nus", "tf32\nus", "16-bit\nus", "our kernels,\nhigh us", "\nhighest us"),
    ):
        result.add_column(heading, justify="right", no_wrap=True)
    sheet = DATA_SHEETS[DESIGN_CARD]
    for name, case in models.items():
        for vjp in (False, True):
            unfused, ours = chain(case, vjp=vjp), fused(case, vjp=vjp)
            result.add_row(
                name + (" + vjp" if vjp else ""),
                f"{needed_flops(case) * (3 if vjp else 1) / 1e9:.1f}",
                f"{ours.flops / 1e9:.1f}",
                str(unfused.operations),
                f"{unfused.bytes / 1e6:.0f}",
                f"{unfused.bytes / BANDWIDTH * 1e6:.0f}",
                f"{ours.bytes / 1e6:.0f}",
                f"{ours.bytes / BANDWIDTH * 1e6:.1f}",
                *(_microseconds(ours.flops, kind) for kind in ("tf32", "16-bit")),
                *(f"{ours.seconds(x, sheet) * 1e6:.0f}" for x in ("high", "highest")),
            )
    return result


def _microseconds(flops: float, kind: str) -> str:
    slow, fast = (f"{flops / rate * 1e6:.0f}" for rate in RATES[kind])
    return f"{fast}-{slow}"


def _on_cpu(seconds: float, console: Console, models: Mapping[str, ConvCase]) -> list[Reached]:
    try:
        peak = peak_flops(torch.float32, seconds)
    except OSError as error:
        raise SystemExit(f"roofline: no peak to compare with: {error}") from None
    results = []
    for name, model in models.items():
        for gradient in (False, True):
            case = dataclasses.replace(
                model, batch=CPU_BATCH, method="euler", gradient=gradient, threads=1
            )
            results += measure(name, case, peak, seconds)
    title = f"One core, batch {CPU_BATCH}, float32: its peak is {peak / 1e9:.0f} GFLOP/s"
    console.print(reached_table(title, results))
    console.print(
        f"{machine.summary('torch', 'torchdiffeq')}. Medians by turns, of Euler steps, the call "
        "from Python included. share: needed FLOPs in that time, of the peak; an algorithm that "
        "multiplies less (Winograd's) may come to more than 100%."
    )
    return results


def _on_gpu(seconds: float, console: Console, models: Mapping[str, ConvCase]) -> list[Reached]:
    card = torch.cuda.get_device_name()
    if card not in DATA_SHEETS:
        console.print(f"No data sheet of {card} here: nothing to compare with.", markup=False)
        return []
    results = []
    for precision in ("high", "highest"):
        peak = DATA_SHEETS[card].rate(precision)
        found = []
        for name, model in models.items():
            for gradient in (False, True):
                case = dataclasses.replace(
                    model, method="euler", gradient=gradient, device="cuda", precision=precision
                )
                found += measure(name, case, peak, seconds)
        title = f"{card}, batch {GPU_BATCH}, {precision}: its peak is {peak / 1e12:.0f} TFLOP/s"
        console.print(reached_table(title, found))
        results += found
    return results


def reached_table(title: str, results: Iterable[Reached]) -> Table:
    """A row for each model and solver."""
    result = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("model", "solver"):
        result.add_column(heading, no_wrap=True)
    for heading in ("ms per f", "share"):
        result.add_column(heading, justify="right", no_wrap=True)
    for one in results:
        figures = (
            (f"{one.seconds * 1e3:.3f}", f"{one.share:.1%}")
            if one.seconds is not None and one.share is not None
            else (one.note, "-")
        )
        result.add_row(one.model + (" + vjp" if one.gradient else ""), one.solver, *figures)
    return result
