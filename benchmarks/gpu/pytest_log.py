"""A plugin for pytest: every test as a line of JSON when it begins and ends, whatever comes after.

It also stands in for hypothesis where that is not installed, which tests/conftest.py imports: tests
that need it are skipped, all others run.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import re
import sys
import types
from typing import Any

import pytest

PLACE = "ANODE_FAST_PYTEST_LOG"
STARTED = "started"
OURS = ("anode_fast", "benchmarks", "tests", "kernels")


def pytest_runtest_logstart(nodeid: str) -> None:
    """Notes a test that begins."""
    _note(test=nodeid, outcome=STARTED)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Notes how it ended; of set-up and tear-down, failures and skips only."""
    if report.when == "call" or report.outcome != "passed":
        seconds = round(report.duration, 3)
        note = _last_line(report)
        _note(test=report.nodeid, outcome=report.outcome, seconds=seconds, note=note)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Notes a file that cannot be read."""
    if report.outcome == "failed":
        text = str(report.longrepr)
        lack = re.search(r"ModuleNotFoundError: No module named '(\w+)", text)
        lacks = lack[1] if lack and lack[1] not in OURS else ""
        note = _last_line(report)
        _note(test=report.nodeid, outcome="not collected", lacks=lacks, note=note)


def _last_line(report: Any) -> str:
    """What went wrong, in a line."""
    if isinstance(report.longrepr, tuple):  # of a skip: file, line, reason
        return str(report.longrepr[2])
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else str(report.longrepr or "")
    lines = [line for line in text.splitlines() if line.strip()]
    return (lines[0] if crash else lines[-1])[:300] if lines else ""


def _note(**event: Any) -> None:
    if place := os.environ.get(PLACE):
        with open(place, "a") as file:
            file.write(json.dumps(event) + "\n")


class _Anything:
    """What a strategy is where there are none."""

    def __call__(self, *args: Any, **kwargs: Any) -> _Anything:
        return self

    def __getattr__(self, name: str) -> _Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        return self


class _Settings(_Anything):
    """As hypothesis.settings: a decorator, with profiles."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if args and callable(args[0]) else self


def _without_hypothesis() -> dict[str, types.ModuleType]:
    """Modules that let tests be collected, and skip those that would draw examples."""
    found = {name: types.ModuleType(name) for name in ("hypothesis", "hypothesis.strategies")}
    for name, module in found.items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(module)["__getattr__"] = _Anything().__getattr__
    top, strategies = found.values()
    skip = pytest.mark.skip(reason="hypothesis is not installed")
    given = {"given": lambda *args, **kwargs: skip, "settings": _Settings()}
    vars(top).update(given, strategies=strategies, __path__=[])
    return found


if "hypothesis" not in sys.modules and importlib.util.find_spec("hypothesis") is None:
    sys.modules.update(_without_hypothesis())
