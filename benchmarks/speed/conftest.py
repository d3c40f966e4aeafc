"""The fixture `versus`, which times solvers by turns, and the tables at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import machine
from benchmarks.speed.rivals import Case, Worker, is_installed
from benchmarks.speed.tables import Sheet, comparison, details
from benchmarks.speed.turns import Rival, Turns

PACKAGES = ("torch", "triton", "torchdiffeq", "torchode", "diffrax", "jax")


def pytest_collection_modifyitems(items) -> None:
    """Lets warnings pass: torch.compile takes one that is an error for a failure of its own."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture
def versus(benchmark, request) -> Iterator[Callable[..., None]]:
    """Times rivals by turns: the first through pytest-benchmark, the others between its rounds.

    Arguments of the function that it gives:
        case: What they all do, in words.
        rivals: By name; first ours, then the one to compare with, then any others. None stands for
            one that is not installed, words for one that is not there for the reason they say.
        targets: Ratios wanted, by name of the rival that is to be so many times slower.
        effort: Run this many times as long as pytest-benchmark's --benchmark-max-time.

    A rival that has `observe` is asked for its evaluations and, for a `Case`, for its error; what
    it computes must be what the first one computes. One without has `nfe` and does something else.
    """
    threads = torch.get_num_threads()

    def run(
        case: object,
        rivals: Mapping[str, Rival | str | None],
        *,
        targets: Mapping[str, float] | None = None,
        effort: float = 1,
    ) -> None:
        figures: dict[str, dict | str | None] = dict(rivals)
        present = {name: x for name, x in rivals.items() if x and not isinstance(x, str)}
        ours, theirs, *_ = rivals
        figures.update(_observe(case, present))
        config = request.config
        turns = Turns(
            present,
            seconds=effort * float(config.getoption("benchmark_max_time")),
            min_rounds=config.getoption("benchmark_min_rounds"),
        )
        benchmark.pedantic(present[ours], setup=turns.before_round, rounds=turns.rounds)
        if benchmark.disabled:
            return
        medians = {ours: benchmark.stats.stats.median} | turns.medians()
        for name, seconds in medians.items():
            figures[name]["ms"] = seconds * 1e3
        benchmark.extra_info.update(
            case=str(case), ours=ours, theirs=theirs, targets=dict(targets or {}), rivals=figures
        )

    yield run
    torch.set_num_threads(threads)


def _observe(case: object, rivals: Mapping[str, Rival]) -> dict[str, dict]:
    """Evaluations and errors by name."""
    outcomes, figures = {}, {}
    for name, rival in rivals.items():
        if not hasattr(rival, "observe"):
            figures[name] = {"nfe": rival.nfe, "nfe_backward": 0}
            continue
        torch.set_num_threads(rival.threads)
        outcomes[name] = rival.observe()
    first = next(iter(outcomes.values()))
    for name, outcome in outcomes.items():
        assert outcome.agrees_with(first), f"{name} computes something else on {case}"
        figures[name] = {"nfe": outcome.nfe, "nfe_backward": outcome.nfe_backward}
        if isinstance(case, Case):
            figures[name]["error"] = case.error(outcome.y1)
    return figures


@pytest.fixture(scope="session")
def diffrax_worker() -> Iterator[Callable[..., Worker | None]]:
    """The process that runs diffrax on so many threads, or on a card, None if it is not installed.

    Nor if a card is asked for, and jax is installed without what it needs for one.
    """
    workers: dict[tuple[int, str], Worker] = {}

    def get(threads: int, platform: str = "cpu") -> Worker | None:
        plugins = () if platform == "cpu" else ("jax_cuda12_plugin", "jax_cuda13_plugin")
        if not is_installed("diffrax") or (plugins and not any(map(is_installed, plugins))):
            return None
        if (threads, platform) not in workers:
            workers[threads, platform] = Worker(threads, platform)
        return workers[threads, platform]

    yield get
    for worker in workers.values():
        worker.close()


def pytest_terminal_summary(terminalreporter, exitstatus, config) -> None:
    """Prints the tables and writes them as Markdown, a file for each module of cases."""
    session = getattr(config, "_benchmarksession", None)
    compared = [b for b in session.benchmarks if "rivals" in b.extra_info] if session else []
    console = Console(width=max(terminalreporter._tw.fullwidth, 150))
    for module, of_module in groupby(compared, lambda b: Path(b.fullname.split("::")[0]).stem):
        sheets = _sheets(of_module)
        card = f"{torch.cuda.get_device_name()}; " if "gpu" in module else ""
        note = f"Medians of alternating runs. {card}{machine.summary(*PACKAGES)}."
        console.print(*(sheet.rich() for sheet in sheets), note, sep="\n")
        path = Path("results/speed", f"{module.removeprefix('test_')}.md")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join([*(sheet.markdown() for sheet in sheets), note]) + "\n")
        console.print(f"The same as Markdown: {path}", markup=False)


def _sheets(benchmarks) -> list[Sheet]:
    """A comparison for each group of benchmarks; details too where there are several solvers."""
    sheets = []
    for group, members in groupby(benchmarks, lambda b: b.group):
        cases = [b.extra_info for b in members]
        sheets.append(comparison(group, cases))
        if any(len(info["rivals"]) > 2 for info in cases):
            sheets.append(details(f"{group}: what each did", cases))
    return sheets
