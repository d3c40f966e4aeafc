"""The reproduction of the paper in one page: its claims, our numbers, and all figures.

Reads the summaries that `python -m benchmarks paper` has left in FOLDER, and writes
OUT/report.html, which needs no other file and no network, and OUT/report.md, which shows the
pictures where they are.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from benchmarks.paper.claims import (
    CLAIMS,
    HELD,
    IMAGES,
    NOT_HELD,
    NOT_RUN,
    SOLVER,
    TOY,
    Claim,
    Finding,
)
from benchmarks.paper.reading import (
    SYNTHETIC,
    Group,
    Spread,
    Summaries,
    Summary,
    curve,
    distinct,
    lowest,
    mean_nfe,
    number,
    pairs,
    ratio,
    reached,
    values,
)
from benchmarks.paper.settings import FLOWS, OURS, THEIRS, TORCH, TOYS

FOLDER = Path("results/paper")
TEMPLATES = Path(__file__).parent / "templates"
PAGES = {"report.html": "report.html.j2", "report.md": "report.md.j2"}
COMMAND = "python -m benchmarks paper"
KINDS = {
    TOY: "Toy data",
    IMAGES: "Images",
    SOLVER: "The solver, beside torchdiffeq",
}
COLORS = {HELD: "green", NOT_HELD: "red", NOT_RUN: "yellow"}
TARGETS = (0.1, 0.01)  # losses of toy data to which the training is timed
SEARCH, SPEED = "search", "speed"
NONE = "-"
MADE_UP = "SYNTHETIC DATA"  # marks what rests on images that are made up


@dataclass(frozen=True)
class Table:
    """A table of words and numbers.

    Attributes:
        title: What it shows.
        caption: How to read it.
        header: Names of the columns.
        rows: Cells, as they are shown.
        words: How many columns, the first ones, hold words.
        empty: What to say if there are no rows.
    """

    title: str
    caption: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    words: int
    empty: str = "There are none."


@dataclass(frozen=True)
class Shown:
    """A figure as it is shown.

    Attributes:
        id: Of the summary.
        heading: With the title.
        facts: What it was made of and with, by name.
        notes: Why its data are not the paper's.
        synthetic: Whether some of the data are synthetic.
        picture: The PNG; None if there is none.
        alt: What it shows, in words.
    """

    id: str
    heading: str
    facts: dict[str, str]
    notes: list[str]
    synthetic: bool
    picture: Path | None
    alt: str


@dataclass(frozen=True)
class Report:
    """All that the page says.

    Attributes:
        facts: Of the whole reproduction, by name.
        warnings: What a reader must know before the verdicts.
        findings: What was found to each claim, in the claims' order.
        tables: Beside the claims.
        figures: In the paper's order.
    """

    facts: dict[str, str]
    warnings: list[str]
    findings: list[tuple[Claim, Finding]]
    tables: list[Table]
    figures: list[Shown]

    def of_kind(self, kind: str) -> list[tuple[Claim, Finding]]:
        """The claims of a kind."""
        return [(claim, finding) for claim, finding in self.findings if claim.kind == kind]

    def count(self) -> dict[str, int]:
        """How many claims have each verdict."""
        found = Counter(finding.verdict for _, finding in self.findings)
        return {verdict: found[verdict] for verdict in (HELD, NOT_HELD, NOT_RUN)}


def add_command(commands: argparse._SubParsersAction[Any]) -> None:
    """Adds `report` to the subcommands of `python -m benchmarks`."""
    parser = commands.add_parser(
        "report",
        help="write the page with the paper's claims, our numbers and all figures",
        description=__doc__,
    )
    parser.add_argument(
        "folder", type=Path, nargs="?", default=FOLDER, help=f"of the summaries; default {FOLDER}"
    )
    parser.add_argument("--out", type=Path, help="folder to write into; default FOLDER")
    parser.set_defaults(run=main)


def main(args: argparse.Namespace) -> None:
    """Runs as the command line says."""
    run(args.folder, args.out or args.folder, Console())


def run(folder: Path, out: Path, console: Console) -> Report:
    """Writes the pages into `out` and prints the claims and their verdicts."""
    report = compile_report(read(folder), folder)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in render(report, out).items():
            (out / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise SystemExit(f"report: cannot write to --out {out}: {error.strerror}") from None
    console.print(_verdicts(report))
    for warning in report.warnings:
        console.print(warning, style="yellow", markup=False)
    console.print(f"{_tally(report)}. The pages are {' and '.join(str(out / x) for x in PAGES)}")
    return report


def read(folder: Path) -> dict[str, Summary]:
    """The summaries of a folder, by figure, in the paper's order.

    Raises:
        SystemExit: There are none, or one cannot be read.
    """
    found = {}
    for path in folder.glob("figure-*.json"):
        try:
            summary = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SystemExit(f"report: cannot read {path}: {error}") from None
        found[str(summary["figure"])] = summary
    if not found:
        what = "has no figure-*.json" if folder.is_dir() else "is no folder"
        raise SystemExit(f"report: {folder} {what}. Make the figures first: {COMMAND}")
    return {figure: found[figure] for figure in sorted(found, key=_order)}


def _order(figure: str) -> tuple[int, str]:
    return (int(figure), "") if figure.isdecimal() else (1000, figure)


# ---- what the report says


def compile_report(summaries: Summaries, folder: Path) -> Report:
    """Judges all claims and makes the tables.

    Args:
        summaries: By figure.
        folder: Of the pictures.
    """
    return Report(
        facts=_facts(summaries),
        warnings=_warnings(summaries),
        findings=[(claim, claim.judge(summaries)) for claim in CLAIMS],
        tables=[
            speed_table(summaries),
            nfe_table(summaries),
            time_table(summaries),
            failures_table(summaries),
        ],
        figures=[_shown(summary, folder) for summary in summaries.values()],
    )


def _facts(summaries: Summaries) -> dict[str, str]:
    every = list(summaries.values())
    days = sorted(distinct(one["date"] for one in every if one["date"]))
    versions = distinct(
        f"{name} {version}" for one in every for name, version in one["versions"].items()
    )
    return {
        "Date": " to ".join(distinct((days[0], days[-1]))) if days else NONE,
        "Scale": "; ".join(
            f"{scale}: {_figures(summaries, 'scale', scale)}"
            for scale in distinct(one["scale"] for one in every)
        ),
        "Machines": _joined(name for one in every for name in one["machines"]),
        "Versions": ", ".join(sorted(versions)) or NONE,
        "Commits": ", ".join(distinct(x for one in every for x in one["commits"])) or NONE,
    }


def _warnings(summaries: Summaries) -> list[str]:
    found = []
    if smoke := _figures(summaries, "scale", "smoke"):
        found.append(
            f"{smoke.capitalize()} at smoke scale: tiny runs, which show that everything works. "
            "Verdicts that rest on them say nothing about the paper."
        )
    if synthetic := _figures(summaries, "synthetic", True):
        found.append(
            f"Synthetic data in {synthetic}: they stand in for the paper's images, and numbers "
            "made with them cannot be compared with the paper's."
        )
    return found


def _figures(summaries: Summaries, name: str, value: object) -> str:
    """Those whose summary has this value, in words; "" if none has."""
    names = [figure for figure, one in summaries.items() if one[name] == value]
    if len(names) == len(summaries) > 1:
        return "all figures"
    return f"figure{'s' * (len(names) > 1)} {', '.join(names)}" if names else ""


def _joined(names: Iterable[str]) -> str:
    return "; ".join(distinct(names)) or NONE


def _heading(summary: Summary) -> str:
    figure = summary["figure"]
    prefix = f"Figure {figure}" if figure.isdecimal() else figure.capitalize()
    return f"{prefix}: {summary['title']}"


def _shown(summary: Summary, folder: Path) -> Shown:
    picture = folder / f"figure-{summary['figure']}.png"
    heading, data = _heading(summary), _joined(summary["data"])
    panels = distinct(group["panel"] for group in summary["groups"] if group["panel"])
    labels = distinct(group["label"] for group in summary["groups"])
    few = 0 < len(labels) <= 8
    facts = {
        "Data": data,
        "Scale": summary["scale"],
        "Machine": _joined(summary["machines"]),
        "Date": summary["date"] or NONE,
        "Command": summary["command"],
    }
    return Shown(
        id=summary["figure"],
        heading=heading,
        facts={name: text for name, text in facts.items() if text != NONE},
        notes=list(summary["notes"]),
        synthetic=summary["synthetic"],
        picture=picture if picture.is_file() else None,
        alt=f"{heading}."
        + (f" Panels: {'; '.join(panels)}." if panels else "")
        + (f" Curves: {', '.join(labels)}." if few else "")
        + (f" Data: {data}." if data != NONE else ""),
    )


# ---- tables


@dataclass(frozen=True)
class Line:
    """One line of a figure, with each solver; several figures may share it.

    Attributes:
        figures: That show it.
        panel, label: In the first of them.
        data: Short name, which says so if the data are synthetic.
        solvers: Its runs, by solver.
    """

    figures: list[str]
    panel: str
    label: str
    data: str
    solvers: dict[str, Group]

    @property
    def words(self) -> tuple[str, ...]:
        """The first cells of its rows."""
        name = f"{self.panel}: {self.label}" if self.panel else self.label
        return (name, self.data, ", ".join(self.figures))


WORDS = ("model", "data", "figures")
"""The names of these cells."""


def lines(summaries: Summaries, skip: Sequence[str] = (SEARCH,)) -> list[Line]:
    """What was trained, each setting once."""
    found: dict[str, Line] = {}
    for figure, summary in summaries.items():
        for group in summary["groups"] if figure not in skip else ():
            line = found.setdefault(_key(group), _line(group))
            line.solvers.setdefault(group["solver"], group)
            if figure not in line.figures:
                line.figures.append(figure)
    return list(found.values())


def _key(group: Group) -> str:
    return json.dumps(group["setting"], sort_keys=True)


def _line(group: Group) -> Line:
    data = group["setting"]["data"]
    return Line([], group["panel"], group["label"], MADE_UP if data == SYNTHETIC else data, {})


def nfe_table(summaries: Summaries) -> Table:
    """Losses, and the function evaluations that they take."""
    rows = []
    for line in lines(summaries):
        for solver, group in line.solvers.items():
            growth = ratio(group, {**group, "nfe": group["nfe_at_start"]}, "nfe")
            rows.append(
                (
                    *line.words,
                    solver,
                    f"{group['parameters']:,}",
                    str(group["runs"]),
                    *(_cell(group, name) for name in ("loss", "nfe_at_start", "nfe")),
                    number(growth.mean) if growth else NONE,
                )
            )
    return Table(
        "NFE against loss",
        "Mean ± standard deviation over the runs. NFE: forward evaluations of an iteration, over "
        "the first and the last point of the curve; growth: the mean of their ratios. Panels are "
        "named as in the paper; the column data says what was used.",
        (*WORDS, "solver", "parameters", "runs", "final loss", "NFE, start", "NFE, end", "growth"),
        rows,
        4,
        "Nothing has been trained.",
    )


def _cell(group: Group, name: str) -> str:
    found = values(group, name)
    return str(Spread.of(found)) if found else NONE


def speed_table(summaries: Summaries) -> Table:
    """How much longer torchdiffeq takes for the same iterations."""
    rows = []
    summary = summaries.get(SPEED, {"groups": [], "machines": []})
    for ours, theirs in pairs(summary):
        found = ratio(theirs, ours, "ms")
        rows.append(
            (
                *_line(ours).words[:2],
                str(ours["runs"]),
                _cell(ours, "ms"),
                _cell(theirs, "ms"),
                str(found) if found else NONE,
                *(number(x) if math.isfinite(x := mean_nfe(g)) else NONE for g in (ours, theirs)),
            )
        )
    return Table(
        "Wall-clock time beside torchdiffeq, at equal NFE",
        "Both trained from the same weights on the same batches, by turns in one process. ms: "
        "median of a training iteration, everything included; ratio: torchdiffeq's to ours, mean ± "
        "standard deviation over the runs. NFE: forward, mean of the whole training. "
        f"Machine: {_joined(summary['machines'])}.",
        (*WORDS[:2], "runs", f"{OURS}, ms", f"{THEIRS}, ms", "ratio", f"NFE, {OURS}")
        + (f"NFE, {THEIRS}",),
        rows,
        2,
        f"Nothing has been trained by turns: {COMMAND} {SPEED}",
    )


def time_table(summaries: Summaries) -> Table:
    """How long it takes to get to a loss."""
    rows: dict[tuple[str, float], tuple[Line, float]] = {}
    for figure, summary in summaries.items():
        if figure == SEARCH:
            continue
        for line in lines({figure: summary}):
            for target in _targets(line, summary):
                group = next(iter(line.solvers.values()))
                kept, _ = rows.setdefault((_key(group), target), (line, target))
                if figure not in kept.figures:
                    kept.figures.append(figure)
                for solver, found in line.solvers.items():
                    kept.solvers.setdefault(solver, found)
    return Table(
        "Time to a given loss",
        "Seconds of training until the mean loss curve is at or below the loss, mean over the "
        "runs. For images, the loss is the lowest that all models of the panel reach. Only the "
        "runs of figure speed took turns with each other: others may have shared their machine.",
        (*WORDS, "loss", f"{OURS}, s", f"{THEIRS}, s", "ResNet, s"),
        [
            (*line.words, number(target), *(_seconds(line, x, target) for x in SOLVED_BY))
            for line, target in rows.values()
        ],
        3,
        "Nothing has been trained.",
    )


SOLVED_BY = (OURS, THEIRS, TORCH)


def _targets(line: Line, summary: Summary) -> Iterator[float]:
    group = next(iter(line.solvers.values()))
    if group["setting"]["data"] in (*FLOWS, *TOYS):
        yield from TARGETS
        return
    panel = [one for one in summary["groups"] if one["panel"] == line.panel]
    least = [lowest(curve(one, "loss")) for one in panel]
    yield from [max(x for x in least if math.isfinite(x))] if any(map(math.isfinite, least)) else []


def _seconds(line: Line, solver: str, target: float) -> str:
    """Of training until the loss is there."""
    if solver not in line.solvers:
        return NONE
    group = line.solvers[solver]
    index = reached(curve(group, "loss"), target)
    seconds = curve(group, "seconds")
    if index is None or index >= len(seconds):
        return "not reached"
    return number(seconds[index])


def failures_table(summaries: Summaries) -> Table:
    """What failed, and why."""
    rows = []
    for line in lines(summaries, skip=()):
        for solver, group in line.solvers.items():
            if group["failures"]:
                failed = group["failures"]
                first = min(failed, key=lambda failure: failure["iteration"])
                kinds = Counter(failure["reason"].split(":")[0] for failure in failed)
                reasons = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common())
                example = f"{reasons}. First: iteration {first['iteration']}, {first['reason']}"
                rows.append((*line.words, solver, example, f"{len(failed)} of {group['runs']}"))
    return Table(
        "Failed runs",
        "A failed run ends where it failed; its last point counts in the tables above.",
        (*WORDS, "solver", "reasons", "failed"),
        rows,
        5,
        "No run failed.",
    )


# ---- rendering


def render(report: Report, out: Path) -> dict[str, str]:
    """The pages, by file name.

    Args:
        report: What they say.
        out: Where they will be: links of the Markdown start there.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=select_autoescape(enabled_extensions=("html.j2",)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "inlined": _inlined,
        "unbroken": _unbroken,
        "linked": lambda picture: _linked(picture, out),
        "md": _markdown,
    }
    context = {"report": report, "kinds": KINDS, "tally": _tally(report), "made_up": MADE_UP}
    return {
        name: environment.get_template(template).render(context) for name, template in PAGES.items()
    }


def _inlined(picture: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"


def _unbroken(text: str) -> str:
    """No line ends inside d = 2 or 0.1 ± 0.02."""
    return re.sub(" ([=±]) ", "\N{NO-BREAK SPACE}\\1\N{NO-BREAK SPACE}", text)


def _linked(picture: Path, out: Path) -> str:
    return quote(Path(os.path.relpath(picture, out)).as_posix())


def _markdown(text: str) -> str:
    """Text that means itself in Markdown, in the cell of a table too."""
    return re.sub(r"([\\`*\[\]<>|~])", r"\\\1", " ".join(text.split()))


def _tally(report: Report) -> str:
    return ", ".join(f"{count} {verdict}" for verdict, count in report.count().items())


def _verdicts(report: Report) -> RichTable:
    """The claims and what was found, for the terminal."""
    table = RichTable(title="The paper's claims", show_lines=False)
    for heading in ("claim", "verdict", "measured"):
        table.add_column(heading, no_wrap=heading == "verdict")
    for kind, title in KINDS.items():
        found = report.of_kind(kind)
        table.add_row(f"[bold]{escape(title)}[/bold]", "", "")
        for i, (claim, finding) in enumerate(found, 1):
            marked = f" [{MADE_UP}]" * finding.synthetic
            scale = f" [{finding.scale} scale]" if finding.scale not in ("", "full") else ""
            color = COLORS[finding.verdict]
            table.add_row(
                escape(claim.title),
                f"[{color}]{finding.verdict}[/{color}]",
                escape(f"{finding.measured}{scale}{marked}"),
                end_section=i == len(found),
            )
    return table
