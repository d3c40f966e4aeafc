"""Several solvers timed by turns, so that noise of the machine hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Protocol

import torch

MAX_ROUNDS, WARMUP = 150, 15
IN_A_ROW = 5  # timed runs per turn
# Untimed runs before them, until so many or so many seconds: then a solver's own code and data are
# in the caches, as in a training loop, be it a fast or a slow one.
READY, READY_SECONDS = 20, 5e-3
BREATH = 1e-3  # seconds before a turn: the last solver's threads may spin a while before they sleep


class Rival(Protocol):
    """One of the solvers compared, bound to its work.

    Attributes:
        threads: Of torch while it runs.
    """

    threads: int

    def __call__(self) -> float | None:
        """Runs once. Seconds if it timed itself, as one in another process does."""


class Turns:
    """Warms all up, decides how often each runs, and gives all but the first their turns.

    The first is timed by somebody else, pytest-benchmark, who calls `before_round` before each of
    its runs.

    Args:
        rivals: By name.
        seconds: All runs together take about so long, warm-up aside.
        min_rounds: Runs of each at least, however long they take.

    Attributes:
        rounds: Runs of the first, between min_rounds and MAX_ROUNDS (or equal to min_rounds).
        seconds: What each run of the others took.
    """

    def __init__(self, rivals: Mapping[str, Rival], *, seconds: float, min_rounds: int) -> None:
        (_, self._first), *others = rivals.items()
        self._others = dict(others)
        self.seconds: dict[str, list[float]] = {name: [] for name in self._others}
        each = sum(self._warm_up(rival, seconds / len(rivals)) for rival in rivals.values())
        self.rounds = max(min_rounds, min(MAX_ROUNDS, int(seconds / each)))
        self._in_a_row = min(IN_A_ROW, self.rounds)
        self._done = 0

    def before_round(self) -> None:
        """Once in as many rounds as a turn has runs: the others' turns."""
        if self._done % self._in_a_row == 0:
            for name, rival in self._others.items():
                _get_ready(rival)
                self.seconds[name] += [timed(rival) for _ in range(self._in_a_row)]
            _get_ready(self._first)
        self._done += 1

    def medians(self) -> dict[str, float]:
        """Median seconds of the others."""
        return {name: statistics.median(seconds) for name, seconds in self.seconds.items()}

    @staticmethod
    def _warm_up(rival: Rival, seconds: float) -> float:
        """Mean seconds of a few runs, after the first ones, which load and allocate.

        The mean: on a machine that is busy some runs take far longer, and so will later ones.
        """
        _get_ready(rival)
        end = time.perf_counter() + seconds / 4
        runs = [timed(rival)]
        while len(runs) < WARMUP and time.perf_counter() < end:
            runs.append(timed(rival))
        return statistics.fmean(runs)


def timed(rival: Rival) -> float:
    """Seconds of one run."""
    start = time.perf_counter()
    own = rival()
    return time.perf_counter() - start if own is None else own


def _get_ready(rival: Rival) -> None:
    if torch.get_num_threads() != rival.threads:
        torch.set_num_threads(rival.threads)
    time.sleep(BREATH)
    end = time.perf_counter() + READY_SECONDS
    for _ in range(READY):
        rival()
        if time.perf_counter() > end:
            break
