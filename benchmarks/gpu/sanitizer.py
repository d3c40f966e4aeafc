"""NVIDIA's compute-sanitizer on small cases of every kernel, if it is there.

memcheck finds accesses out of bounds, racecheck races in shared memory, initcheck reads of memory
that nothing has written. PyTorch gets every tensor from the driver here, so that its allocator's
cache hides nothing.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.gpu.parity import KERNELS
from benchmarks.gpu.report import (
    FAILED,
    PASSED,
    SKIPPED,
    TIMED_OUT,
    Report,
    Row,
    folder,
    is_dry,
    table,
)

# What drivers refuse is no error of ours: libraries ask for what may not be there.
TOOLS = {"memcheck": ("--report-api-errors", "no"), "racecheck": (), "initcheck": ()}
USUAL_PLACE = "/usr/local/cuda/bin/compute-sanitizer"
FOUND = 99  # exit status for errors found
SECONDS = 50


def main() -> int:
    """Runs the step."""
    out = folder()
    report = Report("sanitizer", out, _markdown)
    program = shutil.which("compute-sanitizer") or shutil.which(USUAL_PLACE)
    if not program:
        return report.finish(SKIPPED, "skipped: compute-sanitizer is not installed")
    with ThreadPoolExecutor(len(TOOLS)) as threads:
        for row in threads.map(lambda tool: check(program, tool, out), TOOLS):
            report.add(row)
    bad = [row["tool"] for row in report.rows if row["verdict"] != PASSED]
    note = f"{', '.join(bad)}: see the log" if bad else f"{', '.join(TOOLS)} found nothing"
    return report.finish(FAILED if bad else PASSED, note)


def cases() -> list[Row]:
    """Width 32: `parity` has compiled these."""
    if is_dry():
        return [{"kernel": "fixed", "precision": "highest", "width": 16}]
    return [
        {"kernel": kernel, "precision": precision, "width": 32}
        for kernel in KERNELS
        for precision in ("highest", "high")
    ]


def check(program: str, tool: str, out: Path) -> Row:
    """Runs the cases under one tool; its report is OUT/sanitizer-<tool>.log."""
    log = out / f"sanitizer-{tool}.log"
    log.unlink(missing_ok=True)
    worker = (sys.executable, "-m", "benchmarks.gpu.worker", "benchmarks.gpu.compare:small")
    options = ("--tool", tool, "--error-exitcode", str(FOUND), "--log-file", str(log))
    options += TOOLS[tool]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    asked = cases()
    answers = log.with_suffix(".jsonl")  # a file: a pipe stays open while what it ran goes on
    try:
        with answers.open("w") as stream:
            status = subprocess.run(
                [program, *options, *worker],
                input=json.dumps(asked),
                stdout=stream,
                text=True,
                env=environment,
                timeout=SECONDS,
                check=False,
            ).returncode
    except subprocess.TimeoutExpired:
        return {"tool": tool, "verdict": TIMED_OUT, "note": f"not done within {SECONDS} s"}
    lines = [line for line in answers.read_text().splitlines() if line.startswith("{")]
    passed = sum(json.loads(line)["verdict"] == PASSED for line in lines)
    summary, first = _found(log.read_text(errors="replace") if log.exists() else "")
    is_good = status == 0 and passed == len(asked)
    return {
        "tool": tool,
        "verdict": PASSED if is_good else FAILED,
        "cases": f"{passed} of {len(asked)}",
        "status": status,
        "summary": summary,
        "note": first,
    }


def _found(text: str) -> tuple[str, str]:
    """A tool's summary, and the first thing it found."""
    lines = [line.lstrip("= ").strip() for line in text.splitlines()]
    summary = next((x for x in reversed(lines) if "SUMMARY" in x), "")
    words = re.compile(r"^(Invalid|Error|Warning|Uninitialized|Race|Program hit|Potential)")
    at = next((i for i, x in enumerate(lines) if words.match(x)), None)
    return summary, "; ".join(lines[at : at + 2]) if at is not None else ""


def _markdown(rows: list[Row]) -> str:
    if not rows:
        return ""
    header = ("tool", "verdict", "summary", "first finding", "cases run")
    keys = ("tool", "verdict", "summary", "note", "cases")
    return table(header, [[x.get(key) or None for key in keys] for x in rows], left=4)


if __name__ == "__main__":
    sys.exit(main())
