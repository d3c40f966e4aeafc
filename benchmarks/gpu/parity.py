"""Every GPU kernel, forward and gradient, against the reference path in float64.

The rule is that of tests/helpers.py: an error may be three times as large as that of the reference
path in the same dtype on the same card, plus 32 eps. In float64, where the reference path on the
CPU is the truth, those errors are of the reference path on the card and of the C++ kernels. With
tf32 products ("high") the reference path has them too, and instead of 32 eps the bound has 2^-10,
the spacing of tf32's numbers. Steps are prescribed, so that rounding is all that differs; whether
chosen steps are the same is told beside, and has to be so in float64.
"""

from __future__ import annotations

import sys

from benchmarks.gpu import pool
from benchmarks.gpu.report import FAILED, PASSED, SKIPPED, Report, Row, folder, is_dry, table

KERNELS = (
    *("fixed", "one program", "many programs", "by row"),
    *("adjoint, fixed", "adjoint, one program", "adjoint, many programs"),
)
PRECISIONS = ("highest", "high", "float64")
WIDTHS = (32, 64, 16, 20, 50, 100, 128)
SECONDS = 60  # for a case, which compiles a few kernels

_TINY = (*(("many programs", "highest"), ("by row", "high"), ("adjoint, one program", "float64")),)


def groups() -> list[list[Row]]:
    """The cases by width and precision, the most used first; a group shares what it compiles."""
    if is_dry():
        return [[_case(kernel, precision, 16) for kernel, precision in _TINY]]
    return [
        [_case(kernel, precision, width) for kernel in KERNELS]
        for width in WIDTHS
        for precision in PRECISIONS
    ]


def _case(kernel: str, precision: str, width: int) -> Row:
    return {"kernel": kernel, "precision": precision, "width": width}


def main() -> int:
    """Runs the step."""
    report, cases = Report("parity", folder(), _markdown), groups()
    pool.run(
        "benchmarks.gpu.compare:case",
        cases,
        lambda case, row: report.add({**case, **row}),
        workers=pool.at_once(12),
        seconds=SECONDS,
    )
    count = {verdict: 0 for verdict in (PASSED, FAILED, SKIPPED)}
    for row in report.rows:
        count[row["verdict"]] += 1
    note = f"{count[PASSED]} of {len(report.rows)} within the bound"
    if count[SKIPPED]:
        note += f", {count[SKIPPED]} skipped"
    return report.finish(FAILED if count[FAILED] else PASSED, note)


def _markdown(rows: list[Row]) -> str:
    """The worst case of every kernel and precision, and whatever failed."""
    lines = []
    for kernel in KERNELS:
        for precision in PRECISIONS:
            of = [x for x in rows if (x["kernel"], x["precision"]) == (kernel, precision)]
            if of:
                lines.append(_line(kernel, precision, of))
    header = ("kernel", "precision", "widths", "passed", "value", "gradient", "chosen steps")
    text = "Largest error as a share of its bound, over the widths (1 is the bound).\n\n"
    text += table(header, lines, left=3)
    for x in rows:
        if x["verdict"] != PASSED:
            name = f"{x['kernel']}, {x['precision']}, width {x['width']}"
            text += f"\n- {name}: {x['verdict']}: {x.get('note') or 'beyond the bound'}"
    return text + "\n"


def _line(kernel: str, precision: str, rows: list[Row]) -> list[object]:
    compared = [x for x in rows if "value" in x]
    steps = [x["same_steps"] for x in compared if x.get("same_steps") is not None]
    return [
        kernel,
        precision,
        " ".join(str(w) for w in sorted(x["width"] for x in rows)),
        f"{sum(x['verdict'] == PASSED for x in rows)} of {len(rows)}",
        *(_worst(compared, name) for name in ("value", "gradient")),
        f"same in {sum(steps)} of {len(steps)}" if steps else None,
    ]


def _worst(rows: list[Row], name: str) -> str | None:
    shares = [float(x[name]["share"]) for x in rows]
    # A nan is larger than anything.
    return f"{max(shares, key=lambda x: (x != x, x)):.2f}" if shares else None


if __name__ == "__main__":
    sys.exit(main())
