"""A figure's summary: the runs it is made of, condensed to what its picture and the report need."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.paper.registry import Entry, Figure, Scale
from benchmarks.paper.runs import path_of

DIGITS = 4  # significant ones, of what is written
CURVES = {"loss": "losses", "nfe": "nfe", "nfe_backward": "nfe_backward"}  # and runs' lists


def summarise(
    figure: Figure, scale: Scale, folder: Path, solvers: Sequence[str], command: str
) -> dict[str, Any]:
    """The summary of a figure, of those of its runs that are in the folder.

    Args:
        figure: Of the registry.
        scale: At which it was made.
        folder: Of the results.
        solvers: Whose runs.
        command: That makes it.
    """
    groups, runs = [], []
    for entry in figure.entries(scale):
        for solver in entry.settings[0].solvers(tuple(solvers)):
            found = _read(entry, solver, folder)
            if found:
                groups.append(_group(entry, solver, found, figure))
                runs += found
    versions: dict[str, set[str]] = {}
    for run in runs:
        for name, version in run["versions"].items():
            versions.setdefault(name, set()).add(version)
    return {
        "figure": figure.number,
        "title": figure.title,
        "scale": scale.name,
        "command": command,
        "date": max((run["date"][:10] for run in runs), default=""),
        "machines": _distinct(run["machine"] for run in runs),
        "versions": {name: " and ".join(sorted(found)) for name, found in versions.items()},
        "commits": _distinct(run["commit"] for run in runs),
        "data": _distinct(run["data"] for run in runs),
        "synthetic": any(run["synthetic"] for run in runs),
        "notes": _distinct(run["note"] for run in runs if run["note"]),
        "groups": groups,
    }


def _read(entry: Entry, solver: str, folder: Path) -> list[dict[str, Any]]:
    paths = (path_of(folder, setting, solver) for setting in entry.settings)
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def _group(entry: Entry, solver: str, runs: list[dict[str, Any]], figure: Figure) -> dict[str, Any]:
    every = runs[0]["every"]

    def at(name: str, point: int) -> list[float | None]:
        """A point of each run's curve; a run that failed before has none."""
        curves = [_points(run[name], every) for run in runs]
        return [_round(curve[point]) if len(curve) else None for curve in curves]

    parity = [run["parity"] for run in runs if run["parity"]]
    pictures = runs[0]["pictures"]
    return {
        "panel": entry.panel,
        "label": entry.label,
        "solver": solver,
        "setting": asdict(entry.settings[0]),
        "parameters": runs[0]["parameters"],
        "data": _distinct(run["data"] for run in runs),
        "runs": len(runs),
        "every": every,
        "curves": _curves(runs, every) if figure.curves else {},
        "loss": at("losses", -1),
        "loss_at_start": at("losses", 0),
        "nfe": at("nfe", -1),
        "nfe_at_start": at("nfe", 0),
        "validation": _last(runs, "loss"),
        "accuracy": _last(runs, "accuracy"),
        "ms": [_round(median(run["ms"])) if run["ms"] else None for run in runs],
        "seconds": [_round(sum(run["ms"]) / 1e3) for run in runs],
        "failures": [
            {
                "repeat": run["setting"]["repeat"],
                "iteration": run["iterations"],
                "reason": run["failure"],
            }
            for run in runs
            if run["failure"]
        ],
        "parity": _total(parity),
        "pictures": {name: pictures[name] for name in figure.shows if name in pictures},
    }


def _curves(runs: list[dict[str, Any]], every: int) -> dict[str, Any]:
    """All curves of some repetitions, by name."""
    curves = {
        name: _curve([_points(run[key], every) for run in runs]) for name, key in CURVES.items()
    }
    curves["seconds"] = _curve([_at_ends(np.cumsum(run["ms"]) / 1e3, every) for run in runs])
    if any(run["validation"]["loss"] for run in runs):
        curves["validation"] = _curve([np.array(x["validation"]["loss"], float) for x in runs])
    return curves


def _points(values: Sequence[float], every: int) -> np.ndarray:
    """Means over each point's iterations; the last point may have fewer."""
    values = np.array(values, float)
    return np.array([values[i : i + every].mean() for i in range(0, len(values), every)])


def _at_ends(values: np.ndarray, every: int) -> np.ndarray:
    """The value at the end of each point."""
    return np.array([values[i : i + every][-1] for i in range(0, len(values), every)])


def _curve(curves: Sequence[np.ndarray]) -> dict[str, list[float]]:
    """Mean and standard deviation at each point, over the runs that got so far."""
    longest = max(map(len, curves))
    columns = [[curve[i] for curve in curves if i < len(curve)] for i in range(longest)]
    statistics: dict[str, Callable[..., Any]] = {"mean": np.mean, "std": np.std}
    return {name: [_round(of(x)) for x in columns] for name, of in statistics.items()}


def _last(runs: Sequence[dict[str, Any]], name: str) -> list[float | None]:
    """Last validation of each run; nothing if there is none at all."""
    found = [run["validation"][name] for run in runs]
    return [_round(x[-1]) if x else None for x in found] if any(found) else []


def _total(parity: Sequence[dict[str, int]]) -> dict[str, int] | None:
    if not parity:
        return None
    total = {name: sum(x[name] for x in parity) for name in ("batches", "equal")}
    return {**total, "largest_difference": max(x["largest_difference"] for x in parity)}


def _round(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _distinct(values: Iterable[str]) -> list[str]:
    return sorted(set(values))
