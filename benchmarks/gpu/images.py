"""Fields for images on the card: solves, training steps, and the share of the card's peak.

Both sides make their products at the same precision, "high" (tf32 or better) or "highest" (as exact
as float32); cuDNN's convolutions follow it, see `AtPrecision`.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torchdiffeq

from benchmarks import roofline_conv
from benchmarks.gpu import pool
from benchmarks.gpu.bounds import DATA_SHEETS
from benchmarks.gpu.race import ON, by_turns, set_up
from benchmarks.gpu.report import (
    FAILED,
    NOT_A_MEASUREMENT,
    PASSED,
    Report,
    Row,
    folder,
    is_dry,
    table,
)
from benchmarks.roofline_conv import MODELS
from benchmarks.speed.conv_rivals import (
    ConvCase,
    training_steps,
    with_cheap_field,
    with_compiled_field,
    with_paper_field,
)
from benchmarks.speed.rivals import AtPrecision, with_anode_fast

OURS, THEIRS, COMPILED, CHEAP = "anode_fast", "torchdiffeq", "compiled field", "cheap field"
GOALS = {THEIRS: 4, COMPILED: 2}  # times as fast, in a training step at "high"
BATCH = 256
SOLVE, STEP, SHARE = "solve", "training step", "share"
RACES = (
    (STEP, "MNIST ANODE", True, "high"),
    (SOLVE, "MNIST ANODE", False, "high"),
    (SOLVE, "MNIST ANODE", True, "high"),
    (STEP, "CIFAR10 ANODE", True, "high"),
    (SOLVE, "MNIST ANODE", True, "highest"),
)
"""What comes first matters most, should time run out. `pytest -k "gpu and conv"` has more."""
SECONDS = 1.5  # of all turns of a case
SHARE_SECONDS = 0.3  # of a solver, for its share
DRY_MODEL = ConvCase(batch=1, width=4, augmented=1, size=2, method="euler")


def main() -> int:
    """Runs the step."""
    out = folder()
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # there are many warm-ups at once
    report = Report("images", out, markdown)
    for groups, workers in plan():
        pool.run(
            "benchmarks.gpu.images:case",
            groups,
            lambda asked, row: None if asked.get("warm") else report.add({**asked, **row}),
            workers=workers,
            seconds=60,
        )
    bad = [row for row in report.rows if row["verdict"] != PASSED]
    note = f"{len(report.rows) - len(bad)} of {len(report.rows)} cases"
    if is_dry():
        note += f"; {NOT_A_MEASUREMENT}"
    elif reached := goals(report.rows):
        note += f"; {sum(yes for *_, yes in reached)} of {len(reached)} goals reached"
    return report.finish(FAILED if bad else PASSED, note)


def plan() -> list[tuple[list[list[Row]], int]]:
    """Groups of cases and how many side by side: compilations, then the same one by one."""
    if is_dry():
        cases = [{"kind": SOLVE, "gradient": False}, {"kind": STEP, "gradient": True}]
        return [([[{**case, "model": "tiny", "precision": "high"} for case in cases]], 1)]
    raced = [_asked(*x) for x in RACES]
    shares = [_asked(SHARE, "MNIST ANODE", gradient, "high") for gradient in (False, True)]
    # As many at once as a card has memory for: torchdiffeq keeps every evaluation of a solve.
    warm = [[{**asked, "warm": True}] for asked in raced]
    return [(warm, pool.at_once(6)), ([[*raced, *shares]], 1)]


def _asked(kind: str, model: str, gradient: bool, precision: str) -> Row:
    return {"kind": kind, "model": model, "gradient": gradient, "precision": precision}


def case(asked: Row) -> Row:
    """Does what is asked.

    Args:
        asked: "kind", "model", "gradient" and "precision"; with "warm" it only compiles.

    Returns:
        "verdict", and what was measured.
    """
    model = DRY_MODEL if is_dry() else dataclasses.replace(MODELS[asked["model"]], batch=BATCH)
    case = dataclasses.replace(
        model, gradient=asked["gradient"], precision=asked["precision"], device=ON
    )
    with torch.set_grad_enabled(case.gradient):
        if asked["kind"] == SHARE:
            return _share(asked, case)
        return _race(asked, case)


def _race(asked: Row, case: ConvCase) -> Row:
    is_solve = asked["kind"] == SOLVE
    solvers, rivals = set_up(
        _solves(case) if is_solve else _steps(case), case.error if is_solve else None
    )
    if asked.get("warm"):
        return {"verdict": PASSED}
    for name, times in by_turns(rivals, SECONDS).items():
        solvers[name] |= times
    bad = [name for name in rivals if not solvers[name]["agrees"]]
    bad += [OURS] * (OURS not in rivals)
    note = f"{', '.join(bad)}: another answer, or none" if bad else ""
    return {"verdict": FAILED if bad else PASSED, "note": note, "solvers": solvers}


def _solves(case: ConvCase) -> dict[str, Callable[[], Any]]:
    """What makes those who solve, by name."""

    def compiled() -> AtPrecision | str:
        rival = with_compiled_field(case, **_compiling())
        return rival if isinstance(rival, str) else AtPrecision(rival, case.precision)

    def at(make: Callable[[], Any]) -> Callable[[], AtPrecision]:
        return lambda: AtPrecision(make(), case.precision)

    return {
        OURS: at(lambda: with_anode_fast(case, "triton")),
        THEIRS: at(lambda: with_paper_field(torchdiffeq.odeint, case)),
        COMPILED: compiled,
        CHEAP: at(lambda: with_cheap_field(torchdiffeq.odeint, case)),
    }


def _steps(case: ConvCase) -> dict[str, Callable[[], Any]]:
    """What makes those who train, by name."""
    # The interpreter takes too long for our gradient: a dry run has it from the reference path.
    steps = training_steps(case, "reference" if is_dry() else "triton", _compiling())
    return {
        name: lambda step=step: AtPrecision(step, case.precision)  # type: ignore[misc]
        for name, step in steps.items()
    }


def _compiling() -> dict[str, Any]:
    return {"backend": "eager"} if is_dry() else {}


def _share(asked: Row, case: ConvCase) -> Row:
    card = torch.cuda.get_device_name()
    if card not in DATA_SHEETS:
        return {"verdict": PASSED, "note": f"no data sheet of {card} to compare with"}
    euler = dataclasses.replace(case, method="euler")
    peak = DATA_SHEETS[card].rate(case.precision)
    found = roofline_conv.measure(asked["model"], euler, peak, SHARE_SECONDS)
    return {"verdict": PASSED, "peak": peak, "shares": [dataclasses.asdict(x) for x in found]}


# --- what follows from the times ------------------------------------------------------------------


def goals(rows: list[Row]) -> list[tuple[str, str, str, bool]]:
    """What was to be reached, the goal, what is, and whether that is enough."""
    found: list[tuple[str, str, str, bool]] = []
    if is_dry():
        return found
    for row in rows:
        if row["kind"] != STEP or row["precision"] != "high" or "solvers" not in row:
            continue
        for other, wanted in GOALS.items():
            if (ratio := _ratio(row, other, OURS)) is not None:
                name = f"{row['model']}, training step, {other}'s time to ours"
                found.append((name, f">= {wanted}", f"{ratio:.2f}", ratio >= wanted))
    return found


def _ratio(row: Row, slow: str, fast: str) -> float | None:
    """How many times as long one takes as the other, by the clock on the wall."""
    a, b = (row["solvers"].get(name, {}).get("wall_ms") for name in (slow, fast))
    return a / b if a and b else None


def markdown(rows: list[Row]) -> str:
    """The tables of all that is there so far."""
    parts = [f"**{NOT_A_MEASUREMENT}**\n"] if is_dry() else []
    if reached := goals(rows):
        lines = [(*line, "reached" if yes else "not reached") for *line, yes in reached]
        parts.append(table(("goal", "wanted", "measured", ""), lines))
    parts.append(_race_table([row for row in rows if row.get("solvers")]))
    parts.append(_share_table([row for row in rows if row.get("shares")]))
    for row in rows:
        if row.get("note"):
            parts.append(f"- {_title(row)}: {row['verdict']}: {row['note']}\n")
    return "\n".join(part for part in parts if part)


def _race_table(raced: list[Row]) -> str:
    lines = []
    for row in raced:
        for name, solver in row["solvers"].items():
            if "wall_ms" not in solver:
                lines.append([_title(row), name, solver.get("note"), *[None] * 4])
                continue
            event, error = solver.get("event_ms"), solver.get("error")
            ratio = _ratio(row, THEIRS, name)
            lines.append(
                [
                    *(_title(row), name, f"{solver['nfe']} + {solver['nfe_backward']}"),
                    f"{solver['wall_ms']:.3f}",
                    event and f"{event:.3f}",
                    ratio and f"{ratio:.2f}",
                    None if error is None else f"{float(error):.1e}",
                ]
            )
    header = ("case", "solver", "NFE", "wall ms", "event ms", "speed", "error")
    note = (
        f"Batch {BATCH}. wall: the call from Python until its results are there; event: between "
        "CUDA events around it; speed: torchdiffeq's wall time to this one's. Medians of "
        "alternating runs.\n\n"
    )
    return note + table(header, lines, left=2) if lines else ""


def _share_table(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        for one in row["shares"]:
            if one["seconds"]:
                time, share = f"{1e3 * one['seconds']:.3f}", f"{one['share']:.1%}"
                peak = f"{row['peak'] / 1e12:.0f}"
                lines.append([_title(row), one["solver"], time, share, peak])
    header = ("case", "solver", "ms per evaluation", "share of the peak", "peak TFLOP/s")
    return table(header, lines, left=2) if lines else ""


def _title(row: Row) -> str:
    work = " + gradient" if row["gradient"] and row["kind"] != STEP else ""
    kind = "evaluation" if row["kind"] == SHARE else row["kind"]
    return f"{row['model']}, {kind}{work}, {row['precision']}"


if __name__ == "__main__":
    sys.exit(main())
