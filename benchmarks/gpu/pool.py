"""Cases shared out to processes, so that none that hangs or breaks CUDA takes others with it.

A kernel that reads where it may not leaves its process without a usable device. So each group of
cases has a process, which answers case by case; after one that broke it, another takes the rest.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from benchmarks.gpu.report import FAILED, Row

BROKEN = 70
"""Exit status of a worker that has answered, and can do no more."""

IMPORT_FAILED = 1
"""What Python itself ends with where it cannot even begin."""


def at_once(most: int) -> int:
    """How many processes to run side by side: as many as there are cores, less two."""
    return max(1, min(most, (os.cpu_count() or 1) - 2))


def run(
    function: str,
    groups: Iterable[Sequence[Row]],
    done: Callable[[Row, Row], None],
    *,
    workers: int,
    seconds: float,
) -> None:
    """Runs a function on every case, each group in a process of its own, one case after another.

    Args:
        function: "module:name" of what maps a case to a row.
        groups: The cases.
        done: Told of each case and its row, from any thread.
        workers: Processes side by side.
        seconds: That one case may take.
    """
    with ThreadPoolExecutor(workers) as threads:
        list(threads.map(lambda group: _run_group(function, group, done, seconds), groups))


def _run_group(
    function: str, cases: Sequence[Row], done: Callable[[Row, Row], None], seconds: float
) -> None:
    while cases:
        answered, status = _work(function, cases, done, seconds)
        if answered == 0 and status == IMPORT_FAILED:
            for case in cases:
                done(case, {"verdict": FAILED, "note": "its process did not start, see the log"})
            return
        if answered < len(cases) and status != BROKEN:
            how = f"ended with status {status}" if status is not None else "had to be ended"
            note = f"its process {how} (a case may take {seconds:.0f} s), see the log"
            done(cases[answered], {"verdict": FAILED, "note": note})
            answered += 1
        cases = cases[answered:]


def _work(
    function: str, cases: Sequence[Row], done: Callable[[Row, Row], None], seconds: float
) -> tuple[int, int | None]:
    """How many cases a worker answered, and its exit status, None if it was too slow."""
    command = [sys.executable, "-m", "benchmarks.gpu.worker", function]
    slow = threading.Event()
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin and process.stdout

        def end() -> None:
            slow.set()
            process.kill()

        answered = 0
        watch = _watch(seconds, end)
        try:
            json.dump(list(cases), process.stdin)
            process.stdin.close()
            for line in process.stdout:
                watch.cancel()
                done(cases[answered], json.loads(line))
                answered += 1
                watch = _watch(seconds, end)
        except BrokenPipeError:
            pass
        finally:
            watch.cancel()
    return answered, None if slow.is_set() else process.returncode


def _watch(seconds: float, end: Callable[[], None]) -> threading.Timer:
    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    return timer
