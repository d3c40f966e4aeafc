"""Reads summaries: groups, curves, spreads over repetitions, and what was trained on."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.paper.settings import OURS, RESNET, THEIRS, TORCH

SYNTHETIC = "synthetic"  # short name of the images that are made up
SMOOTH = 5  # points of an image's curve whose median is taken

Summary = Mapping[str, Any]
Summaries = Mapping[str, Summary]
"""By figure."""
Group = Mapping[str, Any]


class NotRun(Exception):
    """Why a claim cannot be judged."""


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation of some repetitions."""

    mean: float
    std: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of one value, the deviation is 0; as in the curves, it is that of the values alone."""
        return cls(statistics.fmean(values), statistics.pstdev(values), len(values))

    def __str__(self) -> str:
        deviation = f" ± {number(self.std, 2)}" if self.count > 1 else ""
        return f"{number(self.mean)}{deviation}"


def distinct(names: Iterable[str]) -> list[str]:
    """Each name once, in the order of first appearance."""
    return list(dict.fromkeys(names))


def number(value: float, digits: int = 3) -> str:
    """A number with about as many digits as can be trusted."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def values(group: Group, name: str) -> list[float]:
    """What the repetitions have of a list, without those that have nothing."""
    return [value for value in group[name] if value is not None and math.isfinite(value)]


def spread(group: Group, name: str) -> Spread:
    """Over the repetitions.

    Raises:
        NotRun: No repetition has a value.
    """
    found = values(group, name)
    if not found:
        raise NotRun(f"No run of {group['label']} ({group['panel']}) came to a first point")
    return Spread.of(found)


def curve(group: Group, name: str, part: str = "mean") -> list[float]:
    """The mean curve, nan where it has no value; empty if there is none."""
    points = group["curves"].get(name, {}).get(part, [])
    return [math.nan if point is None else point for point in points]


def reached(points: Sequence[float], target: float) -> int | None:
    """Index of the first point at or below a target."""
    return next((i for i, point in enumerate(points) if point <= target), None)


def lowest(points: Sequence[float]) -> float:
    """The least value of a curve; inf if it has none."""
    return min((point for point in points if math.isfinite(point)), default=math.inf)


def smooth(points: Sequence[float], width: int = SMOOTH) -> list[float]:
    """The median of each point and those around it, fewer at the ends.

    A curve that only falls stays as it is: a mean would mix the steep start into what follows, and
    put off the point at which a fast learner reaches a loss.
    """
    reach = [min(width // 2, i, len(points) - 1 - i) for i in range(len(points))]
    windows = (points[i - r : i + r + 1] for i, r in enumerate(reach))
    known = ([point for point in window if math.isfinite(point)] for window in windows)
    return [statistics.median(window) if window else math.nan for window in known]


def data_of(summary: Summary, panels: Sequence[str] = ()) -> tuple[list[str], bool]:
    """What a figure was trained on, in words, and whether some of that is synthetic.

    Args:
        summary: Of the figure.
        panels: Those that are meant, none for all. Words are the whole figure's unless the groups
            of these panels have their own.
    """
    groups = [group for group in summary["groups"] if group["panel"] in panels]
    if not groups:
        return list(summary["data"]), bool(summary["synthetic"])
    words = distinct(name for group in groups for name in group.get("data", summary["data"]))
    return words, any(group["setting"]["data"] == SYNTHETIC for group in groups)


def group_of(
    summaries: Summaries, figure: str, panel: str, label: str, solver: str = OURS
) -> Group:
    """The runs of one line of a figure.

    Raises:
        NotRun: There are none.
    """
    if figure not in summaries:
        raise NotRun(f"Figure {figure} has not been made")
    wanted = (panel, label, TORCH if label == RESNET else solver)
    groups: list[Group] = summaries[figure]["groups"]
    for group in groups:
        if (group["panel"], group["label"], group["solver"]) == wanted and group["runs"]:
            return group
    raise NotRun(f"Figure {figure} has no runs of {label} in its panel {panel!r}")


def pairs(summary: Summary) -> Iterator[tuple[Group, Group]]:
    """Groups of anode_fast and torchdiffeq that belong together."""
    theirs = {(x["panel"], x["label"]): x for x in summary["groups"] if x["solver"] == THEIRS}
    for group in summary["groups"]:
        key = (group["panel"], group["label"])
        if group["solver"] == OURS and group["runs"] and key in theirs and theirs[key]["runs"]:
            yield group, theirs[key]


def ratio(above: Group, below: Group, name: str) -> Spread | None:
    """Of two lists, repetition by repetition; None if no repetition has both."""
    both = zip(above[name], below[name], strict=False)
    found = [a / b for a, b in both if a is not None and b]
    return Spread.of(found) if found else None


def mean_nfe(group: Group) -> float:
    """Forward evaluations of an iteration, over the whole training; nan if there was none."""
    known = [point for point in curve(group, "nfe") if math.isfinite(point)]
    return statistics.fmean(known) if known else math.nan
