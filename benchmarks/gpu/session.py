"""The first minute on a card: builds, tests, compares and times, in under 10 minutes.

    bash benchmarks/gpu_session.sh [OUT [STEP...]]

Every step is a process of its own with a time limit; it may use what earlier ones left of theirs. A
step that fails stops no other. In OUT (default: $OUT, or results/gpu) each leaves <step>.log,
<step>.json and <step>.md as it goes; the end of it all is summary.json and summary.md. Exit status:
0, 1 if a step failed or ran out of time, 2 if there is no CUDA device.

ANODE_FAST_GPU_DRY_RUN=1 runs the code of every step without a card: tiny sizes, CPU tensors,
Triton's interpreter. Its timings are no measurements, and say so.
"""

from __future__ import annotations

import datetime
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from benchmarks.gpu import build
from benchmarks.gpu.report import (
    DRY_RUN,
    FAILED,
    PASSED,
    SECONDS,
    SKIPPED,
    TIMED_OUT,
    UNFINISHED,
    Row,
    is_dry,
    table,
    write,
)

ROOT = Path(__file__).parents[2]
NO_DEVICE = 2


@dataclass(frozen=True)
class Step:
    """A step: its name, what runs it, given the folder to write into, and its share of the time."""

    name: str
    command: Sequence[str]
    seconds: float


def _step(name: str, module: str, seconds: float) -> Step:
    return Step(name, (sys.executable, "-m", f"benchmarks.gpu.{module}"), seconds)


STEPS = (
    _step("build", "build", 85),
    _step("tests", "suite", 125),
    _step("parity", "parity", 115),
    _step("sanitizer", "sanitizer", 50),
    _step("timings", "timings", 115),
    _step("images", "images", 75),
    _step("profile", "profiles", 30),
)  # 595 seconds


def run(steps: Sequence[Step], out: Path) -> list[Row]:
    """Runs the steps, whatever happens to one, and writes the summary after each.

    Returns:
        Name, verdict, seconds and note of each.
    """
    out.mkdir(parents=True, exist_ok=True)
    results: list[Row] = []
    deadline = time.monotonic()
    for step in steps:
        deadline += step.seconds
        print(f"{step.name:10} ...", flush=True)
        results.append(_run(step, out, deadline - time.monotonic()))
        print(_line(results[-1]), flush=True)
        _summarize(results, out)
    return results


def _run(step: Step, out: Path, limit: float) -> Row:
    path, start = out / f"{step.name}.json", time.monotonic()
    for old in (path, path.with_suffix(".md")):
        old.unlink(missing_ok=True)
    environment = os.environ | {"PYTHONPATH": _first(ROOT, os.environ.get("PYTHONPATH"))}
    environment[SECONDS] = str(max(limit, 0))
    if is_dry():
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (out / f"{step.name}.log").open("w") as log:
        process = subprocess.Popen(
            [*step.command, str(out)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # to end it with all that it started
        )
        try:
            status: int | None = process.wait(max(limit, 0))
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end(process)
    verdict, note = _outcome(path, status, limit)
    return {
        "step": step.name,
        "verdict": verdict,
        "seconds": round(time.monotonic() - start, 1),
        "note": note,
    }


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a step and whatever it left running."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def _outcome(path: Path, status: int | None, limit: float) -> tuple[str, str]:
    """Verdict and note, also in the step's own file if it could not say so itself."""
    try:
        found = json.loads(path.read_text())
        verdict, note = found["verdict"], found["note"]
    except (OSError, ValueError, KeyError):
        found, verdict, note = {}, UNFINISHED, ""
    if status is None:
        verdict, note = TIMED_OUT, f"not done within {limit:.0f} s"
    elif verdict == UNFINISHED or (status == 0) != (verdict in (PASSED, SKIPPED)):
        verdict, note = FAILED, f"exit status {status}, see {path.with_suffix('.log').name}"
    if found:
        write(path, json.dumps({**found, "verdict": verdict, "note": note}, indent=1) + "\n")
    return verdict, note


def _summarize(results: Sequence[Row], out: Path) -> None:
    try:
        facts = json.loads((out / "build.json").read_text()).get("machine", {})
    except (OSError, ValueError):
        facts = {}
    day = datetime.date.today().isoformat()
    summary = {"date": day, "dry_run": is_dry(), "machine": facts, "steps": list(results)}
    summary["seconds"] = round(sum(x["seconds"] for x in results), 1)
    write(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    parts = [f"# GPU session, {day}, {summary['seconds']} s{', no card' * is_dry()}\n"]
    parts.append(
        table(
            ("step", "verdict", "note", "seconds"),
            [(x["step"], x["verdict"], x["note"], x["seconds"]) for x in results],
            left=3,
        )
    )
    for result in results:
        path = out / f"{result['step']}.md"
        if path.exists() and (text := path.read_text().strip()):
            parts.append(f"## {result['step']}\n\n{text}\n")
    write(out / "summary.md", "\n".join(parts))


def _line(result: Row) -> str:
    return (
        f"{result['step']:10} {result['verdict']:10} {result['seconds']:6.1f} s  {result['note']}"
    )


def _first(path: Path, others: str | None) -> str:
    return os.pathsep.join([str(path), *([others] if others else [])])


def _has_device() -> bool:
    code = "import torch; raise SystemExit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def _stop(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)


def main(argv: Sequence[str]) -> int:
    """Runs all steps, or those named; gives the exit status."""
    out = Path(argv[0] if argv else os.environ.get("OUT") or ROOT / "results" / "gpu").absolute()
    names = [step.name for step in STEPS]
    if out.is_file() or any(name not in names for name in argv[1:]):
        print(f"usage: gpu_session.sh [OUT [STEP...]], steps: {', '.join(names)}", file=sys.stderr)
        return NO_DEVICE
    if not is_dry() and not _has_device():
        print(
            f"gpu_session: torch finds no CUDA device (or there is no torch). {DRY_RUN}=1 tries "
            "the code of every step without one.",
            file=sys.stderr,
        )
        return NO_DEVICE
    signal.signal(signal.SIGTERM, _stop)
    try:
        results = run([step for step in STEPS if step.name in (argv[1:] or names)], out)
    finally:
        build.unlink()
    print("", *map(_line, results), f"\nThe same, and more: {out / 'summary.md'}", sep="\n")
    return int(any(result["verdict"] not in (PASSED, SKIPPED) for result in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
