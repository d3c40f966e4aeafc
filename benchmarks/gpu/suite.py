"""The GPU tests, `pytest -m gpu`, by several processes: one that breaks CUDA spoils no other.

A file's tests are dealt out to processes, all of which share Triton's cache. What has not run when
the time is over is said to have not.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.gpu import pool, pytest_log
from benchmarks.gpu.report import (
    FAILED,
    PASSED,
    SKIPPED,
    Report,
    Row,
    folder,
    is_dry,
    seconds,
    table,
)

ROOT = Path(__file__).parents[2]
OF_GPU = re.compile(r"mark\.gpu|def \w+\([^)]*\bdevice\b")
NOTHING_COLLECTED = 5  # pytest's exit status
AT_ONCE = 14  # processes
TESTS = 12  # of a process
MARGIN = 5.0  # seconds that it takes to say what there was no time for
SHOWN = 20  # failures in the table; all are in the JSON
PYTEST = (sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider")


def main() -> int:
    """Runs the step."""
    end = time.monotonic() + seconds() - MARGIN
    out = folder()
    report = Report("tests", out, _markdown)
    files = test_files(ROOT / "tests")[: 1 if is_dry() else None]
    todo = shares(files)[: 1 if is_dry() else None]
    with ThreadPoolExecutor(pool.at_once(AT_ONCE)) as threads:
        list(threads.map(lambda share: report.add(run(*share, out, end)), todo))
    if not report.rows:
        return report.finish(SKIPPED, "skipped: no GPU tests found")
    counts = ("passed", "failed", "skipped", "not run")
    note = ", ".join(f"{sum(row[key] for row in report.rows)} {key}" for key in counts)
    if lacking := sorted({x for row in report.rows for x in row["lacking"]}):
        note += f"; not installed: {', '.join(lacking)}"
    bad = any(row["verdict"] == FAILED for row in report.rows)
    return report.finish(FAILED if bad else PASSED, note)


def test_files(folder: Path) -> list[Path]:
    """Those with GPU tests, the kernels' first."""
    files = [x for x in folder.rglob("test_*.py") if OF_GPU.search(x.read_text())]
    return sorted(files, key=lambda x: ("gpu" not in x.parts, x))


def shares(files: Sequence[Path]) -> list[tuple[str, list[str]]]:
    """What each process runs: a name, and tests, or a file whose tests cannot be told."""
    command = [*PYTEST, *map(str, files), "--collect-only"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    tests: dict[str, list[str]] = {str(file.relative_to(ROOT)): [] for file in files}
    for line in done.stdout.splitlines():
        file, is_test, _ = line.partition("::")
        if is_test and file in tests:
            tests[file].append(line)
    found = []
    for file, names in tests.items():
        count = -(-len(names) // TESTS)
        found += [(f"{file}, {i + 1} of {count}", names[i::count]) for i in range(count)]
        if not names:
            found.append((file, [file]))
    return sorted(found, key=lambda share: -len(share[1]))


def run(name: str, tests: Sequence[str], out: Path, end: float) -> Row:
    """Runs tests; each is a line of OUT/tests/<name>.jsonl.

    Args:
        name: Of the share.
        tests: Names of tests, or of one file.
        out: The folder to write into.
        end: When to end it, by time.monotonic.
    """
    path = re.sub(r"\W+", "-", name.removeprefix("tests/").replace(".py", ""))
    events = out / "tests" / f"{path}.jsonl"
    events.parent.mkdir(exist_ok=True)
    events.unlink(missing_ok=True)
    log = events.with_suffix(".log")
    status: int | None = None
    with log.open("w") as stream:
        try:
            status = subprocess.run(
                [*PYTEST, *tests, "--tb=short", "-p", "benchmarks.gpu.pytest_log"],
                cwd=ROOT,
                env=os.environ | {pytest_log.PLACE: str(events)},
                stdout=stream,
                stderr=subprocess.STDOUT,
                check=False,
                timeout=min(max(end - time.monotonic(), 0), threading.TIMEOUT_MAX),
            ).returncode
        except subprocess.TimeoutExpired:
            pass
    lines = events.read_text().splitlines() if events.exists() else []
    row = summed(name, status, [json.loads(x) for x in lines], tests)
    print(f"{row['file']}: {row['verdict']}, exit status {status}, {log}", flush=True)
    return row


def summed(file: str, status: int | None, events: list[Row], tests: Sequence[str] = ()) -> Row:
    """What became of tests, as `pytest_log` saw it.

    Args:
        file: Where they are.
        status: Of pytest, None if its time was over.
        events: What it noted.
        tests: Those that were to run, as far as they are known.
    """
    ended = [x for x in events if x["outcome"] != pytest_log.STARTED]
    failures = [x for x in ended if x["outcome"] in ("failed", "not collected")]
    lacking = [x["lacks"] for x in failures if x.get("lacks")]
    failures = [{k: x[k] for k in ("test", "note")} for x in failures if not x.get("lacks")]
    left = sorted(set(tests) - {x["test"] for x in ended}) if status is None else []
    if left:
        failures.append({"test": file, "note": f"no time for {len(left)} tests, from {left[0]} on"})
    elif status not in (None, 0, 1, 2, NOTHING_COLLECTED):
        last = events[-1] if events else {"test": "before the first test", "outcome": ""}
        during = last["test"] if last["outcome"] in ("", pytest_log.STARTED) else "after the last"
        failures.append({"test": during, "note": f"pytest ended with status {status}"})
    elif status in (1, 2) and not failures and not lacking:
        failures.append({"test": file, "note": f"pytest ended with status {status}"})
    return {
        "file": file,
        "verdict": FAILED if failures else SKIPPED if lacking else PASSED,
        "passed": sum(x["outcome"] == "passed" for x in ended),
        "failed": len(failures) - bool(left),
        "skipped": sum(x["outcome"] == "skipped" for x in ended),
        "not run": len(left),
        "lacking": lacking,
        "failures": failures,
        "slowest": sorted(ended, key=lambda x: -x.get("seconds", 0))[:3],
    }


def _markdown(rows: list[Row]) -> str:
    keys = ("file", "verdict", "passed", "failed", "skipped", "not run")
    header = (*keys, "not installed")
    lines = [[*(x[key] for key in keys), ", ".join(x["lacking"]) or None] for x in rows]
    failures = [failure for row in rows for failure in row["failures"]]
    text = table(header, lines, left=2)
    for failure in failures[:SHOWN]:
        text += f"\n- {failure['test']}: {failure['note']}"
    if len(failures) > SHOWN:
        text += f"\n- and {len(failures) - SHOWN} more, see tests.json"
    return text + "\n"


if __name__ == "__main__":
    sys.exit(main())
