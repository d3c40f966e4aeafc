"""Solvers by turns on a card, and our solves as CUDA graphs: the work behind `timings`.

Times are of three kinds. "wall": a call from Python until its results are there. "event": the same
call between two CUDA events, which for a solver that waits for the device is nearly the same.
"graph": our solve, captured in a CUDA graph and replayed, between events: the device alone. Sizes
and tolerance are those of the paper's toy field, weights and inputs the same for all.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torchdiffeq
from torch import Tensor

import anode_fast
from anode_fast import SolveStats
from anode_fast.kernels.cpu import library
from benchmarks.gpu.bounds import DATA_SHEETS, Peak
from benchmarks.gpu.report import FAILED, PASSED, Row, is_dry
from benchmarks.speed.rivals import (
    TOLERANCE,
    AtPrecision,
    Case,
    Compiled,
    TorchRival,
    like_torchdiffeq,
    with_anode_fast,
    with_odeint,
    with_torchode,
)
from benchmarks.speed.turns import timed

THEIRS, OURS, CPP = "torchdiffeq", "anode_fast", "anode_fast, C++ on the CPU"
PRECISIONS = ("highest", "high")
TIMED = PRECISIONS[:1] if is_dry() else PRECISIONS
IN_A_ROW, READY, MOST_TURNS = (1, 0, 1) if is_dry() else (5, 3, 12)
SECONDS = 0.0 if is_dry() else 4.0  # of all turns of a case
REPLAYS = 20  # of a graph, between two events
ON = "cpu" if is_dry() else "cuda"
THREADS = torch.get_num_threads()  # of the C++ kernels: what a user gets


def case(asked: Row) -> Row:
    """Does what is asked.

    Args:
        asked: "kind" is "warm", "race", "alone" (our solves only) or "peak". The others but
            "peak" have "batch", "width" and "gradient"; "warm" has "precision" too, which may be
            "compiled field".

    Returns:
        "verdict", and what was measured.
    """
    done = {"warm": warm, "race": race, "alone": race, "peak": peak}[asked["kind"]](asked)
    return {"verdict": PASSED, **done}


def _case(asked: Row) -> Case:
    return Case(asked["batch"], asked["width"], gradient=asked["gradient"], device=ON)


def _ours(case: Case, precision: str) -> AtPrecision:
    return AtPrecision(with_anode_fast(case, "triton"), precision)


# --- solvers by turns -----------------------------------------------------------------------------


def race(asked: Row) -> Row:
    """Times everybody on a case: by name milliseconds, evaluations and error, or what is wrong."""
    case = _case(asked)
    with torch.set_grad_enabled(case.gradient):
        ours = {f"{OURS}, {precision}": precision for precision in TIMED}
        makers: dict[str, Callable[[], Any]] = {
            name: functools.partial(_ours, case, precision) for name, precision in ours.items()
        }
        if asked["kind"] == "race":
            makers |= _others(case)
        solvers, rivals = set_up(makers, case.error)
        for name, times in by_turns(rivals).items():
            solvers[name] |= times
        for name in ours.keys() & rivals.keys():
            solvers[name] |= counts(case, ours[name])
            solvers[name] |= graph(case, ours[name], solvers[name])
    bad = [name for name in rivals if not solvers[name]["agrees"]]
    bad += [name for name in ours if name not in rivals]
    note = f"{', '.join(bad)}: another answer, or none" if bad else ""
    return {"verdict": FAILED if bad else PASSED, "note": note, "solvers": solvers}


def _others(case: Case) -> dict[str, Callable[[], Any]]:
    """What makes the others, by name."""
    options = {"backend": "eager"} if is_dry() else {}

    def compiled() -> AtPrecision:
        field = Compiled(case.field, **options)
        return AtPrecision(with_odeint(torchdiffeq.odeint, case, field=field), "highest")

    def eager(precision: str) -> AtPrecision:
        return AtPrecision(with_odeint(torchdiffeq.odeint, case), precision)

    def cpp() -> TorchRival | None:
        on_cpu = dataclasses.replace(case, device="cpu", threads=THREADS)
        return None if library.missing() else with_anode_fast(on_cpu, "cpu")

    return {
        THEIRS: lambda: eager("highest"),
        f"{THEIRS}, high": lambda: eager("high"),
        f"{THEIRS}, compiled field": compiled,
        "torchode": lambda: with_torchode(case),
        CPP: cpp,
    }


def set_up(
    makers: Mapping[str, Callable[[], Any]], error: Callable[[Tensor], float] | None = None
) -> tuple[dict[str, Row], dict[str, Any]]:
    """Makes everybody and lets them solve once: what came out, and those that can.

    Args:
        makers: By name what makes a rival, None if it is not installed, or why there is none.
        error: Of a solution.
    """
    solvers: dict[str, Row] = {}
    rivals: dict[str, Any] = {}
    first = None
    for name, make in makers.items():
        try:
            rival = make()
            if rival is None or isinstance(rival, str):
                solvers[name] = {"note": rival or "not installed"}
                continue
            torch.set_num_threads(rival.threads)
            outcome = rival.observe()
        except Exception as error:
            solvers[name] = {"note": f"{type(error).__name__}: {str(error)[:300]}"}
            continue
        first = first or outcome
        rivals[name] = rival
        solvers[name] = {
            "nfe": outcome.nfe,
            "nfe_backward": outcome.nfe_backward,
            "error": error(outcome.y1) if error else None,
            "agrees": outcome.agrees_with(first),
        }
    return solvers, rivals


def counts(case: Case, precision: str) -> Row:
    """Steps and launches of our solve, its gradient included if the case has one."""
    kept: list[SolveStats] = []

    def odeint(*args: Any, **arguments: Any) -> Tensor:
        solution, stats = anode_fast.odeint(*args, return_stats=True, **arguments)
        kept.append(stats)
        return solution

    given = {"gradient": case.gradient, "times_on": "cpu", "backend": "triton"}
    AtPrecision(like_torchdiffeq(odeint, case.field, case.y0, **given), precision).run()
    return {name: getattr(kept[0], name) for name in ("accepted", "rejected", "launches")}


def by_turns(rivals: Mapping[str, Any], seconds: float = SECONDS) -> dict[str, Row]:
    """Median milliseconds of each: some runs of one, then of the next, over and over."""
    wall: dict[str, list[float]] = {name: [] for name in rivals}
    event: dict[str, list[float]] = {name: [] for name in rivals}
    end = time.perf_counter() + seconds
    for turn in range(MOST_TURNS):
        for name, rival in rivals.items():
            torch.set_num_threads(rival.threads)
            for _ in range(READY):
                rival()
            wall[name] += [timed(rival) for _ in range(IN_A_ROW)]
            if ON == "cuda" and name != CPP:
                event[name] += [by_events(rival.run) for _ in range(IN_A_ROW)]
        if time.perf_counter() > end and turn:
            break
    return {
        name: {
            "wall_ms": 1e3 * statistics.median(wall[name]),
            "event_ms": 1e3 * statistics.median(event[name]) if event[name] else None,
            "runs": len(wall[name]),
        }
        for name in rivals
    }


def by_events(call: Callable[[], object]) -> float:
    """Seconds on the device from before a call to after it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


# --- our solves as CUDA graphs --------------------------------------------------------------------


def graph(case: Case, precision: str, counted: Row) -> Row:
    """Milliseconds of a replay, and whether it gives the eager call's bits.

    A captured solve makes all the attempts that it may take: here those that it does take.
    """
    if ON != "cuda":
        return {"graph_ms": None, "graph_note": "no CUDA graphs without a card"}
    attempts = counted["accepted"] + counted["rejected"]
    ours = functools.partial(anode_fast.odeint, backend="triton")
    rival = AtPrecision(
        like_torchdiffeq(
            *(ours, case.field, case.y0),
            gradient=case.gradient,
            times_on="cpu",
            options={"max_num_steps": attempts},
        ),
        precision,
    )
    try:
        expected = rival.run()
        replay, kept = captured(rival.run)
        replay()
        torch.cuda.synchronize()
        same = all(torch.equal(a, b) for a, b in zip(kept, expected, strict=True))
        runs = [by_events(lambda: [replay() for _ in range(REPLAYS)]) / REPLAYS for _ in range(9)]
    except Exception as error:  # the times of the eager calls are worth keeping
        return {"graph_ms": None, "graph_note": f"{type(error).__name__}: {str(error)[:300]}"}
    return {"graph_ms": 1e3 * statistics.median(runs), "graph_same_bits": same}


def captured(
    run: Callable[[], tuple[Tensor, ...]],
) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
    """A call as a CUDA graph: what replays it, and where its results then are."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        kept = run()
    return recorded.replay, kept


# --- before, and beside ---------------------------------------------------------------------------


def warm(asked: Row) -> Row:
    """Compiles what a case needs, into the caches on disk."""
    case = _case(asked)
    with torch.set_grad_enabled(case.gradient):
        if asked["precision"] == "compiled field":
            _others(case)[f"{THEIRS}, compiled field"]()()
        else:
            _ours(case, asked["precision"])()
    return {}


def count(asked: Row) -> Row:
    """Evaluations and accepted steps of a case, on the CPU, by whatever backend is there."""
    case = Case(asked["batch"], asked["width"])
    t = torch.tensor([0.0, 1.0])
    with torch.no_grad():
        _, stats = anode_fast.odeint(case.field, case.y0, t, return_stats=True, **TOLERANCE)
    return {"nfe": stats.nfe, "accepted": stats.accepted}


def peak(asked: Row) -> Row:
    """The card's peak by its data sheet, and what a large product of matrices reaches."""
    name = torch.cuda.get_device_name() if ON == "cuda" else "no card"
    measured = {precision: _matmul(precision) for precision in PRECISIONS}
    sheet = DATA_SHEETS.get(name)
    used = sheet or Peak(
        *(measured["high"], measured["highest"], 0.0, 0.0),
        source=f"torch.matmul as measured here ({name} is not in the table of data sheets)",
    )
    return {"device": name, "peak": dataclasses.asdict(used), "matmul": measured}


def _matmul(precision: str) -> float:
    """FLOP/s of a float32 product of square matrices."""
    size = 64 if is_dry() else 8192
    a, b = (torch.randn(size, size, device=ON) for _ in range(2))

    class Product:
        threads = THREADS

        def __call__(self) -> None:
            self.run()

        def run(self) -> Tensor:
            return a @ b

    product: Any = AtPrecision(Product(), precision)
    product()
    runs = [by_events(product.run) if ON == "cuda" else timed(product) for _ in range(5)]
    return 2 * size**3 / statistics.median(runs)
