"""Two solvers timed by turns in one process, and a table of their ratios at the end."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

ROUNDS, WARMUP = 150, 15


@pytest.fixture(autouse=True)
def one_thread():
    """One thread: at this size a second one only adds noise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def versus(benchmark) -> Callable[..., None]:
    """Times `ours` through pytest-benchmark with `theirs` in every pause between two rounds.

    So both see the same machine at the same time. The medians' ratio goes into extra_info.
    """

    def run(ours: Callable[[], None], theirs: Callable[[], None], **extra: object) -> None:
        seconds: list[float] = []

        def pause() -> None:
            start = time.perf_counter()
            theirs()
            seconds.append(time.perf_counter() - start)

        for _ in range(WARMUP):
            ours()
            theirs()
        benchmark.pedantic(ours, setup=pause, rounds=ROUNDS, iterations=1)
        theirs_ms = statistics.median(seconds) * 1e3
        ours_ms = benchmark.stats.stats.median * 1e3
        benchmark.extra_info.update(
            extra, torchdiffeq_ms=theirs_ms, anode_fast_ms=ours_ms, ratio=theirs_ms / ours_ms
        )

    return run


def pytest_terminal_summary(terminalreporter, exitstatus, config) -> None:
    """The table of ratios."""
    session = getattr(config, "_benchmarksession", None)
    rows = [b for b in session.benchmarks if "ratio" in b.extra_info] if session else []
    if not rows:
        return
    table = Table(title="median ms, alternating runs, one thread", title_justify="left")
    for name in ("case", "NFE forward", "NFE backward", "torchdiffeq", "anode_fast", "ratio"):
        table.add_column(name, justify="left" if name == "case" else "right")
    for b in rows:
        info = b.extra_info
        table.add_row(
            escape(b.name.removeprefix("test_reference_")),
            str(info["nfe"]),
            str(info["nfe_backward"]),
            f"{info['torchdiffeq_ms']:.3f}",
            f"{info['anode_fast_ms']:.3f}",
            f"{info['ratio']:.2f}",
        )
    Console(width=110).print(table)
