"""The GPU tests, `pytest -m gpu`, a process for each file: one that breaks CUDA spoils no other."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.gpu import pool, pytest_log
from benchmarks.gpu.report import FAILED, PASSED, SKIPPED, Report, Row, folder, is_dry, table

ROOT = Path(__file__).parents[2]
OF_GPU = re.compile(r"mark\.gpu|def \w+\([^)]*\bdevice\b")
NOTHING_COLLECTED = 5  # pytest's exit status
SHOWN = 20  # failures in the table; all are in the JSON


def main() -> int:
    """Runs the step."""
    out = folder()
    report = Report("tests", out, _markdown)
    files = test_files(ROOT / "tests")[: 1 if is_dry() else None]
    with ThreadPoolExecutor(pool.at_once(6)) as threads:
        list(threads.map(lambda file: report.add(run(file, out)), files))
    if not report.rows:
        return report.finish(SKIPPED, "skipped: no GPU tests found")
    total = {key: sum(row[key] for row in report.rows) for key in ("passed", "failed", "skipped")}
    note = ", ".join(f"{number} {key}" for key, number in total.items())
    if lacking := sorted({x for row in report.rows for x in row["lacking"]}):
        note += f"; not installed: {', '.join(lacking)}"
    bad = any(row["verdict"] == FAILED for row in report.rows)
    return report.finish(FAILED if bad else PASSED, note)


def test_files(folder: Path) -> list[Path]:
    """Those with GPU tests, the kernels' first."""
    files = [x for x in folder.rglob("test_*.py") if OF_GPU.search(x.read_text())]
    return sorted(files, key=lambda x: ("gpu" not in x.parts, x))


def run(file: Path, out: Path) -> Row:
    """Runs the GPU tests of a file; each test is a line of OUT/tests/<file>.jsonl."""
    name = "-".join(file.relative_to(ROOT / "tests").with_suffix("").parts)
    events = out / "tests" / f"{name}.jsonl"
    events.parent.mkdir(exist_ok=True)
    events.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-m", "gpu", str(file), "-q", "--tb=short"]
    plugins = ["-p", "no:cacheprovider", "-p", "benchmarks.gpu.pytest_log"]
    log = events.with_suffix(".log")
    with log.open("w") as stream:
        done = subprocess.run(
            [*command, *plugins],
            cwd=ROOT,
            env=os.environ | {pytest_log.PLACE: str(events)},
            stdout=stream,
            stderr=subprocess.STDOUT,
            check=False,
        )
    lines = events.read_text().splitlines() if events.exists() else []
    row = summed(str(file.relative_to(ROOT)), done.returncode, [json.loads(x) for x in lines])
    print(f"{row['file']}: {row['verdict']}, exit status {done.returncode}, {log}", flush=True)
    return row


def summed(file: str, status: int, events: list[Row]) -> Row:
    """What became of a file's tests, as `pytest_log` saw it."""
    ended = [x for x in events if x["outcome"] != pytest_log.STARTED]
    failures = [x for x in ended if x["outcome"] in ("failed", "not collected")]
    lacking = [x["lacks"] for x in failures if x.get("lacks")]
    failures = [{k: x[k] for k in ("test", "note")} for x in failures if not x.get("lacks")]
    if status not in (0, 1, 2, NOTHING_COLLECTED):
        last = events[-1] if events else {"test": "before the first test", "outcome": ""}
        during = last["test"] if last["outcome"] in ("", pytest_log.STARTED) else "after the last"
        failures.append({"test": during, "note": f"pytest ended with status {status}"})
    elif status in (1, 2) and not failures and not lacking:
        failures.append({"test": file, "note": f"pytest ended with status {status}"})
    return {
        "file": file,
        "verdict": FAILED if failures else SKIPPED if lacking else PASSED,
        "passed": sum(x["outcome"] == "passed" for x in ended),
        "failed": len(failures),
        "skipped": sum(x["outcome"] == "skipped" for x in ended),
        "lacking": lacking,
        "failures": failures,
        "slowest": sorted(ended, key=lambda x: -x.get("seconds", 0))[:3],
    }


def _markdown(rows: list[Row]) -> str:
    header = ("file", "verdict", "passed", "failed", "skipped", "not installed")
    keys = ("file", "verdict", "passed", "failed", "skipped")
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
