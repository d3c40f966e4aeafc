"""Our solves and the others' on the card, by turns; goals; the share of what the card could do."""

from __future__ import annotations

import os
import sys

from benchmarks.gpu import pool
from benchmarks.gpu.bounds import Peak, differentiated, share, solve_flops
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

BATCHES = (64, 256, 3000, 65_536)
WIDTH, WIDER = 32, (64, 128)
LARGE = 65_536
OURS, THEIRS = "anode_fast, highest", "torchdiffeq"
# Of the device, in microseconds, at batch 64; ratio of wall times to torchdiffeq; share at LARGE.
GOAL_US = {False: 60, True: 150}
GOAL_RATIO, GOAL_SHARE = 50, 0.4


def main() -> int:
    """Runs the step."""
    out = folder()
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # there are many warm-ups at once
    report = Report("timings", out, markdown)
    for function, groups, workers in plan():
        pool.run(
            f"benchmarks.gpu.{function}",
            groups,
            lambda case, row: report.add({**case, **row}),
            workers=workers,
            seconds=100,
        )
    bad = [row for row in report.rows if row["verdict"] != PASSED]
    timed = [row for row in report.rows if row["kind"] != "warm"]
    note = f"{len(timed) - len([x for x in bad if x['kind'] != 'warm'])} of {len(timed)} cases"
    if is_dry():
        note += f"; {NOT_A_MEASUREMENT}"
    elif met := [reached for _, _, _, reached in goals(report.rows)]:
        note += f"; {sum(met)} of {len(met)} goals reached"
    return report.finish(FAILED if bad else PASSED, note)


def plan() -> list[tuple[str, list[list[Row]], int]]:
    """What runs it, the groups, and how many side by side: compilations, then one by one."""
    if is_dry():
        tiny = {"batch": 3, "width": 16}
        cases = [
            {"kind": "warm", "precision": "high", "gradient": False, **tiny},
            {"kind": "peak"},
            {"kind": "race", "gradient": True, **tiny},
        ]
        return [("launches:case", [[{"kind": "launch"}]], 1), ("race:case", [cases], 1)]
    sizes = [(batch, WIDTH) for batch in BATCHES] + [(LARGE, width) for width in WIDER]
    warm = [
        [
            {"kind": "warm", "precision": precision, "gradient": gradient, **_size(*size)}
            for gradient in (False, True)
        ]
        for size in sizes
        for precision in ("highest", "high", *(("compiled field",) if size[1] == WIDTH else ()))
    ]
    cases = [
        {"kind": "race" if size[1] == WIDTH else "alone", "gradient": gradient, **_size(*size)}
        for size in sizes
        for gradient in (False, True)
    ]
    return [
        ("race:case", warm, pool.at_once(12)),
        ("race:case", [[{"kind": "peak"}, *cases]], 1),
        ("launches:case", [[{"kind": "launch"}]], 1),
    ]


def _size(batch: int, width: int) -> Row:
    return {"batch": batch, "width": width}


# --- what follows from the times ------------------------------------------------------------------


def device_ms(solver: Row) -> float | None:
    """Milliseconds of our solve on the device alone."""
    return solver.get("graph_ms")


def share_of_bound(row: Row, precision: str, peak: Peak) -> float | None:
    """Of a case's solve at a precision; None if it was not captured."""
    solver = row["solvers"].get(f"anode_fast, {precision}", {})
    time = device_ms(solver)
    if not time:
        return None
    flops = solve_flops(
        row["batch"],
        row["width"],
        solver["nfe"],
        differentiated=differentiated(solver["accepted"]) if row["gradient"] else 0,
        nfe_backward=solver["nfe_backward"],
    )
    return share(flops, time / 1e3, peak.rate(precision))


def goals(rows: list[Row]) -> list[tuple[str, str, str, bool]]:
    """What was to be reached, the goal, what is, and whether that is enough."""
    found = []
    races = {(x["batch"], x["width"], x["gradient"]): x for x in rows if x.get("solvers")}
    for gradient, most in GOAL_US.items():
        row = races.get((64, WIDTH, gradient))
        if not row:
            continue
        work = _work(row)
        if (time := device_ms(row["solvers"].get(OURS, {}))) is not None:
            name = f"{work}, device"
            found.append((name, f"< {most} us", f"{1e3 * time:.1f} us", 1e3 * time < most))
        if (ratio := _ratio(row, OURS)) is not None:
            name = f"{work}, wall, torchdiffeq's time to ours"
            found.append((name, f">= {GOAL_RATIO}", f"{ratio:.1f}", ratio >= GOAL_RATIO))
    row, peak = races.get((LARGE, WIDTH, False)), _peak(rows)
    if row and peak and (reached := share_of_bound(row, "high", peak)) is not None:
        name = f"{_work(row)}, share of the tf32 bound"
        found.append((name, f">= {GOAL_SHARE:.0%}", f"{reached:.1%}", reached >= GOAL_SHARE))
    return found


def _peak(rows: list[Row]) -> Peak | None:
    return next((Peak(**x["peak"]) for x in rows if x.get("peak")), None)


def _ratio(row: Row, name: str) -> float | None:
    """How many times as long torchdiffeq takes, by the clock on the wall."""
    ours, theirs = (row["solvers"].get(x, {}).get("wall_ms") for x in (name, THEIRS))
    return theirs / ours if ours and theirs else None


def _work(row: Row) -> str:
    return f"batch {row['batch']}, forward{' + gradient' if row['gradient'] else ''}"


# --- tables ---------------------------------------------------------------------------------------


def markdown(rows: list[Row]) -> str:
    """The tables of all that is there so far."""
    solved = [row for row in rows if row.get("solvers")]
    solved.sort(key=lambda x: (x["width"], x["batch"], x["gradient"]))
    parts = [f"**{NOT_A_MEASUREMENT}**\n"] if is_dry() else []
    if reached := goals(rows):
        lines = [(*line, "reached" if yes else "not reached") for *line, yes in reached]
        parts.append(table(("goal", "wanted", "measured", ""), lines))
    parts += [_race_table(solved), _share_table(solved, _peak(rows)), _launch_table(rows)]
    for row in rows:
        if row["verdict"] != PASSED:
            what = ", ".join(str(row[x]) for x in ("kind", "precision", "batch") if x in row)
            parts.append(f"- {what}: {row.get('note')}\n")
    return "\n".join(part for part in parts if part)


def _race_table(solved: list[Row]) -> str:
    lines = []
    for row in solved:
        for name, solver in row["solvers"].items():
            if "wall_ms" not in solver:
                lines.append([_title(row), name, solver["note"], *[None] * 6])
                continue
            nfe = f"{solver['nfe']} + {solver['nfe_backward']}"
            ratio = _ratio(row, name)
            times = [_ms(solver.get(key)) for key in ("wall_ms", "event_ms", "graph_ms")]
            lines.append(
                [
                    _title(row),
                    *(name, nfe, *times),
                    ratio and f"{ratio:.1f}",
                    *(solver.get("launches"), f"{float(solver['error']):.1e}"),
                ]
            )
    header = (
        "case",
        "solver",
        "NFE",
        "wall ms",
        "event ms",
        "graph ms",
        "speed",
        "launches",
        "error",
    )
    note = (
        "wall: the call from Python until its results are there; event: between CUDA events around "
        "it; graph: replayed as a CUDA graph; speed: torchdiffeq's wall time to this one's. "
        "Medians of alternating runs.\n\n"
    )
    return note + table(header, lines, left=2) if lines else ""


def _title(row: Row) -> str:
    return _work(row) + ("" if row["width"] in (WIDTH, 16) else f", width {row['width']}")


def _share_table(solved: list[Row], peak: Peak | None) -> str:
    if not peak:
        return ""
    lines = []
    for row in solved:
        for precision in ("high", "highest"):
            if (reached := share_of_bound(row, precision, peak)) is not None:
                rate = f"{peak.rate(precision) / 1e12:.1f}"
                lines.append([_title(row), precision, rate, f"{reached:.1%}"])
    header = ("case", "precision", "bound TFLOP/s", "share by graph ms")
    text = f"Peak: {peak.source}.\n"
    return f"{text}\n{table(header, lines, left=2)}" if lines else text


def _launch_table(rows: list[Row]) -> str:
    found = next((x["launches"] for x in rows if x["kind"] == "launch" and "launches" in x), {})
    lines = [
        (name, *(cost[key] and f"{cost[key]:.2f}" for key in ("host_us", "device_us")))
        for name, cost in found.items()
    ]
    return table(("launch", "host us", "device us"), lines) if lines else ""


def _ms(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"


if __name__ == "__main__":
    sys.exit(main())
