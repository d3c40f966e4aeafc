"""Times the candidates for the GPU's launch table, and prints the table.

    python -m benchmarks.tune [--quick] [--estimate ARCH]

Candidates are those that compile without spills. They are timed as CUDA graphs of whole solves, at
batches that one tile holds and at a large one. What is printed belongs in `TABLE` of
kernels/gpu/launch.py. Without a card nothing is timed, and the exit status is 2; --estimate ranks
the candidates for an architecture by benchmarks/latency.py instead. Compiling takes most of the
time, on all cores; --quick leaves out candidates and rare fields.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from unittest import mock

import torch
import triton

from anode_fast import MLPField, odeint, odeint_adjoint
from anode_fast.kernels.gpu import aot, launch
from anode_fast.kernels.gpu.launch import Launch
from benchmarks import latency

DIM = 7
MANY = 65_536
REPLAYS, ROUNDS = 10, 5
STEPS = 12
"""More than a solve takes. As a graph, a solve by several programs makes so many attempts; those
after its end return at once."""
Key = tuple[str, int, str]

# Of a kind of kernel, all that have to compile with its launch; the first one is estimated.
KERNELS = {
    "fixed": ("fixed",),
    "adaptive": ("adaptive",),
    "by_row": ("by_row",),
    "gradient": ("gradient_by_row", "gradient_fixed", "gradient_batch"),
    "continuous": ("continuous", "quadrature", "continuous_fixed"),
}
OUTER_LOOPS = {"fixed": 1, "adaptive": 1, "by_row": 1, "gradient": 2, "continuous": 1}
TILES = {"gradient": (16,), "continuous": (16, 32)}
"""Rows of tiles, where more than these were never without spills."""


@dataclass(frozen=True)
class Cost:
    """Of a candidate: of a batch that its tile holds, and of a row of a large batch."""

    one: float
    many: float


def candidates(kind: str, H: int, is_quick: bool) -> Iterator[Launch]:
    """Launches that may be good ones."""
    for rows, warps in itertools.product(TILES.get(kind, (16, 32, 64)), (2, 4, 8)):
        if warps == 2 and (rows > 16 or is_quick) or warps == 8 and rows == 16 and is_quick:
            continue
        for N, K in itertools.product((H, H // 2), (16, 32, 64)):
            if K <= N and N >= 16 and (N == H or H == 128):
                yield Launch(rows, warps, N, K)


def keys(is_quick: bool) -> list[Key]:
    """Of the table."""
    widths = (32, 64) if is_quick else launch.WIDTHS
    precisions = ("tf32x3",) if is_quick else launch.PRECISIONS
    return list(itertools.product(launch.KERNELS, widths, precisions))


# --- compiled candidates --------------------------------------------------------------------------


def compiled(case: aot.Case) -> tuple[aot.Report, float]:
    """What a candidate takes, and the cycles of a step: a guess."""
    report, text = aot.compiled(case)
    kernel = aot.KERNELS[case.kernel]
    if report.failure:
        return report, 0.0
    H = launch.padded(case.hidden)
    outer = OUTER_LOOPS[kernel.kind]
    return report, latency.cycles(text, outer, case.stages, H, report.N, report.K)


def usable(
    asked: Sequence[tuple[Key, Launch]], arch: int, processes: int
) -> dict[tuple[Key, Launch], Cost]:
    """The candidates that compile without spills, and their estimated costs, in cycles."""
    cases, owners = [], []
    for (kind, H, precision), candidate in asked:
        for kernel in KERNELS[kind]:
            batch = candidate.rows if kind in launch.ONE_STEP_SIZE else MANY
            cases.append(aot.Case(kernel, H, precision, batch, arch, launch=candidate))
            owners.append(((kind, H, precision), candidate))
    costs: dict[tuple[Key, Launch], Cost] = {}
    bad = set()
    for owner, (report, cycles) in zip(
        owners, aot.reports(cases, compiled, processes), strict=True
    ):
        print(aot.line(report), file=sys.stderr, flush=True)
        if report.failure or report.spill_bytes:
            bad.add(owner)
        elif owner not in costs:
            candidate = owner[1]
            registers = -(-max(report.registers, 24) // 8) * 8
            together = max(1, 65536 // (registers * 32 * candidate.warps))
            costs[owner] = Cost(cycles, cycles / candidate.rows / together)
    return {owner: cost for owner, cost in costs.items() if owner not in bad}


# --- time on the card -----------------------------------------------------------------------------


def solve_call(key: Key, batch: int) -> Callable[[], object]:
    """A solve, or a solve and its gradient, by the kernels of a kind."""
    kind, H, precision = key
    dtype = torch.float64 if precision == "ieee" else torch.float32
    torch.manual_seed(0)
    field = MLPField(DIM, H, num_hidden=2).to("cuda", dtype)
    y0 = torch.randn(batch, DIM, device="cuda", dtype=dtype)
    t = torch.tensor([0.0, 1.0])
    options = {"max_num_steps": STEPS}
    adaptive = {"rtol": 1e-3, "atol": 1e-3, "backend": "triton", "options": options}
    parameters = list(field.parameters())

    def differentiated(solve: Callable[[], torch.Tensor]) -> object:
        return torch.autograd.grad(solve()[-1].sum(), [y0, *parameters])

    if kind == "fixed":
        steps = {"method": "rk4", "options": {"step_size": 0.1}, "backend": "triton"}
        return torch.no_grad()(lambda: odeint(field, y0, t, **steps))
    if kind in ("adaptive", "by_row"):
        control = "batch" if kind == "adaptive" else "sample"
        return torch.no_grad()(lambda: odeint(field, y0, t, step_control=control, **adaptive))
    y0.requires_grad_()
    if kind == "gradient":
        return lambda: differentiated(lambda: odeint(field, y0, t, gradient="discrete", **adaptive))
    seminorm = {"norm": "seminorm", **options}
    return lambda: differentiated(
        lambda: odeint_adjoint(field, y0, t, adjoint_options=seminorm, **adaptive)
    )


def device_seconds(call: Callable[[], object]) -> float:
    """Of the device alone: the call as a CUDA graph, between events."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times = []
    for _ in range(1 + ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / REPLAYS / 1e3)
    return statistics.median(times[1:])


def timed(key: Key, candidate: Launch) -> Cost:
    """What a candidate costs on the card, in seconds."""
    high = "high" if key[2] == "tf32" else "highest"
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(high)
    try:
        with mock.patch.dict(launch.TABLE, only(key, candidate)):
            launch.configuration.cache_clear()
            one = device_seconds(solve_call(key, candidate.rows))
            many = device_seconds(solve_call(key, MANY)) / MANY
    finally:
        launch.configuration.cache_clear()
        torch.set_float32_matmul_precision(before)
    return Cost(one, many)


def only(key: Key, candidate: Launch) -> dict[tuple[object, ...], tuple[Launch, ...]]:
    """A table's entries, on every architecture, with this launch instead of the key's."""
    return {(*key, *arch): (candidate,) for arch in ((), *((x,) for x in launch.ARCHITECTURES))}


# --- the table ------------------------------------------------------------------------------------


def entry(kind: str, costs: Mapping[Launch, Cost]) -> tuple[Launch, ...]:
    """The table's entry: the best launch by rows of a tile; last, the best for many rows.

    Kernels whose programs have to agree on steps want a tile for every batch; of the others, a
    small batch takes the smallest tile, and a large one the last.
    """
    best = {}
    for rows in sorted({candidate.rows for candidate in costs}):
        best[rows] = min((x for x in costs if x.rows == rows), key=lambda x: costs[x].one)
    last = min(costs, key=lambda x: costs[x].many)
    if last.rows == min(best) and costs[last].one > 1.1 * costs[best[last.rows]].one:
        last = best[last.rows]  # one launch for each number of rows
    best[last.rows] = last
    if kind not in launch.ONE_STEP_SIZE:
        best = {rows: best[rows] for rows in (min(best), last.rows)}
    return tuple(sorted(best.values(), key=lambda x: (x is last, x)))


def printed(table: Mapping[Key, Sequence[Launch]], arch: int, source: str) -> str:
    """In the form of kernels/gpu/launch.py."""
    lines = [f"    # {source}"]
    for (kind, H, precision), launches in table.items():
        texts = ", ".join(str(tuple(x)) for x in launches)
        lines.append(f'    ("{kind}", {H}, "{precision}", {arch}): _entry({texts}),')
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="fewer candidates and fields")
    parser.add_argument("--estimate", type=int, choices=launch.ARCHITECTURES, metavar="ARCH")
    args = parser.parse_args(argv)
    if args.estimate:
        capability = args.estimate
    elif not torch.cuda.is_available():
        print("benchmarks.tune: there is no CUDA device, nothing was timed", file=sys.stderr)
        return 2
    else:
        major, minor = torch.cuda.get_device_capability()
        capability = 10 * major + minor
    asked = [(key, x) for key in keys(args.quick) for x in candidates(*key[:2], args.quick)]
    processes = aot.PROCESSES if args.estimate else max(2, (os.cpu_count() or 2) - 2)
    costs = usable(asked, capability, processes)
    if args.estimate:
        source = f"estimated for {args.estimate}"
    else:
        name = torch.cuda.get_device_name()
        source = f"timed on {name}"
        for i, (key, candidate) in enumerate(costs):
            costs[key, candidate] = cost = timed(key, candidate)
            print(f"{i + 1}/{len(costs)} {key} {candidate} {cost}", file=sys.stderr, flush=True)
    day = datetime.date.today().isoformat()
    source += f", {day}, torch {torch.__version__}, Triton {triton.__version__}"
    found: dict[Key, dict[Launch, Cost]] = {}
    for (key, candidate), cost in costs.items():
        found.setdefault(key, {})[candidate] = cost
    table = {key: entry(key[0], found[key]) for key in found}
    print(printed(table, launch.architecture(capability), source))
    return 0


if __name__ == "__main__":
    sys.exit(main())
