"""How much of what a core can multiply and add the solves use: their share of its peak.

FLOPs are those of the field's matrix products, two to a multiply-add, from the layers' widths and
the evaluations made. Time's weights go into the bias, once for the batch, and are not counted, nor
are activations and the sums of the Runge-Kutta method. A gradient takes, for each evaluation that
the solution depends on, as much again for the gradient of its input and for that of its weights.
"needed" counts these and the forward evaluations. The discrete gradient makes some or all of those
evaluations again, to save memory: "executed" counts that as well. Times are medians and include the
call from Python.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from statistics import median

import torch
from rich import box
from rich.console import Console
from rich.table import Table

import anode_fast
from anode_fast import MLPField
from anode_fast.spec import MLPSpec
from benchmarks import machine, roofline_conv
from benchmarks.peak import peak_flops

DIM = 7
TOLERANCE = {"rtol": 1e-3, "atol": 1e-3}
DTYPES = {"float32": torch.float32, "float64": torch.float64}
TARGETS = {False: 0.60, True: 0.45}  # share of the peak: forward, forward + gradient
TARGET_BATCH, TARGET_WIDTH = 1024, 64  # from these on
MIN_RUNS, MAX_RUNS = 3, 200


def add_command(commands: argparse._SubParsersAction) -> None:
    """Adds `roofline` to the subcommands of `python -m benchmarks`."""
    parser = commands.add_parser(
        "roofline",
        help="the share of a core's peak that the CPU solves reach",
        description=__doc__,
    )
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[64, 1024, 16384], help="default 64 1024 16384"
    )
    parser.add_argument(
        "--conv",
        action="store_true",
        help="instead: the paper's fields for images, on this CPU and as bounds of a GPU; of the "
        "other options it takes --seconds alone",
    )
    parser.add_argument(
        "--width", type=int, nargs="+", default=[32, 64, 128, 256], help="default 32 64 128 256"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, nargs="+", default=list(DTYPES), help="default both"
    )
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="per solve, and for the peak; default 0.5"
    )
    parser.set_defaults(run=main)


def main(args: argparse.Namespace) -> None:
    """Runs the benchmark as the command line says."""
    if args.conv:
        roofline_conv.run(args.seconds, Console())
        return
    run(args.batch, args.width, args.dtype, args.seconds, Console())


def run(
    batches: list[int], widths: list[int], dtypes: list[str], seconds: float, console: Console
) -> list[Measured]:
    """Measures and prints a table for each dtype."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    results = []
    try:
        for name in dtypes:
            try:
                peak = peak_flops(DTYPES[name], seconds)
            except OSError as error:
                raise SystemExit(f"roofline: no peak to compare with: {error}") from None
            of_dtype = [
                measure(batch, width, DTYPES[name], gradient, seconds)
                for gradient in (False, True)
                for width in widths
                for batch in batches
            ]
            console.print(table(name, peak, of_dtype))
            results += of_dtype
    finally:
        torch.set_num_threads(threads)
    console.print(
        f"{machine.summary('torch')}. dopri5 on MLPField({DIM}, width), tolerance 1e-3, one "
        "thread; median ms, the call from Python included; gradient: forward and gradient. "
        'Share of the peak: "needed" counts the forward evaluations, and for the gradient twice '
        'as much for each one that the solution depends on; "executed", to which the targets '
        "apply, also the evaluations that the backward pass makes again."
    )
    return results


# ---- counting


def field_flops(spec: MLPSpec) -> int:
    """FLOPs of the matrix products of one evaluation for one row."""
    widths = [spec.dim, *spec.hidden, spec.dim]
    return 2 * sum(n * m for n, m in zip(widths[:-1], widths[1:], strict=True))


@dataclass(frozen=True)
class Flops:
    """Of a solve.

    Attributes:
        needed: By any method that takes these steps.
        executed: By ours, which evaluates again in the backward pass.
    """

    needed: int
    executed: int


def solve_flops(
    spec: MLPSpec, batch: int, nfe: int, *, differentiated: int = 0, nfe_backward: int = 0
) -> Flops:
    """FLOPs of a solve, and of its gradient.

    Args:
        spec: The field.
        batch: Rows.
        nfe: Evaluations forward.
        differentiated: Evaluations that the solution depends on, if there is a gradient: each is
            differentiated with respect to its input and the weights.
        nfe_backward: Evaluations made again for that.
    """
    one = batch * field_flops(spec)
    needed = one * (nfe + 2 * differentiated)
    return Flops(needed, needed + one * nfe_backward)


# ---- measuring


@dataclass(frozen=True)
class Measured:
    """A solve that was timed.

    Attributes:
        batch, width, gradient: What was solved.
        backend: Which one solved it.
        nfe, nfe_backward: Its evaluations.
        seconds: Median of its runs.
        flops: What it computed.
    """

    batch: int
    width: int
    gradient: bool
    backend: str
    nfe: int
    nfe_backward: int
    seconds: float
    flops: Flops


def measure(batch: int, width: int, dtype: torch.dtype, gradient: bool, seconds: float) -> Measured:
    """Times dopri5 on MLPField(7, width) over t in [0, 1]."""
    torch.manual_seed(0)
    field = MLPField(DIM, width).to(dtype)
    y0, t = torch.randn(batch, DIM, dtype=dtype), torch.tensor([0.0, 1.0])
    parameters = tuple(field.parameters())

    def solve() -> anode_fast.SolveStats:
        solution, stats = anode_fast.odeint(
            field, y0, t, **TOLERANCE, gradient="discrete", return_stats=True
        )
        if gradient:
            torch.autograd.grad(solution[-1].sum(), parameters)
        return stats

    with torch.set_grad_enabled(gradient):
        stats = solve()  # warms up
        runs: list[float] = []
        end = time.perf_counter() + seconds
        while len(runs) < MIN_RUNS or (len(runs) < MAX_RUNS and time.perf_counter() < end):
            start = time.perf_counter()
            solve()
            runs.append(time.perf_counter() - start)
    counts = stats.nfe, stats.nfe_backward
    # Of dopri5: the first, and six of each accepted step; its last is the next step's first.
    differentiated = 1 + 6 * stats.accepted if gradient else 0
    flops = solve_flops(
        field.spec(),
        batch,
        stats.nfe,
        differentiated=differentiated,
        nfe_backward=stats.nfe_backward,
    )
    return Measured(batch, width, gradient, stats.backend, *counts, median(runs), flops)


# ---- table


def table(dtype: str, peak: float, results: list[Measured]) -> Table:
    """A row per solve."""
    result = Table(
        title=f"{dtype}: a core's peak is {peak / 1e9:.0f} GFLOP/s; backend "
        + ", ".join(sorted({one.backend for one in results})),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),  # fits into 80 columns
    )
    result.add_column("solve", no_wrap=True)
    for heading in ("width", "batch", "NFE", "ms", "needed", "executed", "target"):
        result.add_column(heading, justify="right", no_wrap=True)
    for one, following in zip(results, [*results[1:], results[-1]], strict=True):
        executed = one.flops.executed / one.seconds / peak
        result.add_row(
            "gradient" if one.gradient else "forward",
            str(one.width),
            str(one.batch),
            f"{one.nfe} + {one.nfe_backward}" if one.gradient else str(one.nfe),
            f"{1e3 * one.seconds:.3f}",
            f"{one.flops.needed / one.seconds / peak:.1%}",
            f"{executed:.1%}",
            _verdict(one, executed),
            end_section=one.gradient != following.gradient,
        )
    return result


def _verdict(one: Measured, share: float) -> str:
    if one.batch < TARGET_BATCH or one.width < TARGET_WIDTH:
        return "-"
    target = TARGETS[one.gradient]
    return f"{target:.0%} {'reached' if share >= target else 'missed'}"
