"""The tables at the end of a run: once for the terminal, once as Markdown for a document."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.markup import escape
from rich.table import Table

NOTHING = "-"
MISSING = "not installed"


@dataclass
class Sheet:
    """A table of text.

    Attributes:
        title: Above it.
        header: Names of the columns.
        left: How many columns, the first ones, hold words; figures are aligned at the right.
        rows: The cells.
    """

    title: str
    header: list[str]
    left: int = 1
    rows: list[list[str]] = field(default_factory=list)

    def rich(self) -> Table:
        """For the terminal."""
        table = Table(title=escape(self.title), title_justify="left")
        for i, name in enumerate(self.header):
            table.add_column(escape(name), justify="left" if i < self.left else "right")
        for row in self.rows:
            table.add_row(*map(escape, row))
        return table

    def markdown(self) -> str:
        """For a document."""
        rule = ["---" if i < self.left else "---:" for i in range(len(self.header))]
        lines = [self.header, rule, *self.rows]
        return "\n".join([f"**{self.title}**", "", *(f"| {' | '.join(x)} |" for x in lines)]) + "\n"


Info = Mapping[str, Any]
"""What `versus` writes about a case: `case`; `ours` and `theirs`, the names of the measured side
and of the one that ratios are taken to unless `targets`, {name: wanted ratio}, has others; and
`rivals`, {name: {"ms", "nfe", "nfe_backward", maybe "error"}, or None if not installed, or why it
is not there}."""


def comparison(title: str, cases: Iterable[Info]) -> Sheet:
    """A row per case: the median of every solver, and the ratios."""
    cases = list(cases)
    ours = _merged([info["ours"]] for info in cases)
    names = [name for name in _merged(info["rivals"] for info in cases) if name not in ours]
    names += ours  # last, beside the ratios
    against = _merged(info["targets"] or [info["theirs"]] for info in cases)
    header = ["case", "NFE", *(f"{name} ms" for name in names)]
    sheet = Sheet(title, [*header, *(f"ratio to {name}" for name in against), "error"])
    for info in cases:
        rivals, mine = info["rivals"], info["rivals"][info["ours"]]
        sheet.rows.append(
            [
                info["case"],
                evaluations(mine),
                *(_milliseconds(rivals, name) for name in names),
                *(_ratio(info, name) for name in against),
                _error(mine),
            ]
        )
    return sheet


def details(title: str, cases: Iterable[Info]) -> Sheet:
    """A row per case and solver: what it did for its time."""
    sheet = Sheet(title, ["case", "solver", "NFE", "error", "ms"], left=2)
    for info in cases:
        for name, rival in info["rivals"].items():
            if rival and not isinstance(rival, str):
                cells = [evaluations(rival), _error(rival), _milliseconds(info["rivals"], name)]
                sheet.rows.append([info["case"], name, *cells])
    return sheet


def evaluations(rival: Info) -> str:
    """Of the field: forward, and backward if there were any."""
    return f"{rival['nfe']}" + (f" + {rival['nfe_backward']}" if rival["nfe_backward"] else "")


def _merged(lists: Iterable[Iterable[str]]) -> list[str]:
    """All names once, in the order of their first appearance."""
    return list(dict.fromkeys(name for names in lists for name in names))


def _milliseconds(rivals: Mapping[str, Info | str | None], name: str) -> str:
    rival = rivals.get(name, NOTHING)
    if isinstance(rival, str):
        return rival
    return f"{rival['ms']:.3f}" if rival else MISSING


def _ratio(info: Info, name: str) -> str:
    """How many times as long the other one takes, and whether that is what was wanted."""
    rival = info["rivals"].get(name)
    if not rival or isinstance(rival, str):
        return NOTHING
    ratio = rival["ms"] / info["rivals"][info["ours"]]["ms"]
    target = info["targets"].get(name)
    if target is None:
        return f"{ratio:.2f}"
    return f"{ratio:.2f} ({target:g}: {'reached' if ratio >= target else 'not reached'})"


def _error(rival: Info) -> str:
    return f"{rival['error']:.1e}" if "error" in rival else NOTHING
