"""The command line of the paper's figures: what is asked for is trained, summarised and drawn."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks import image_data
from benchmarks.arguments import positive, usable_device
from benchmarks.paper import pool, registry
from benchmarks.paper.draw import draw, panels
from benchmarks.paper.registry import FIGURES, GROUPS, SCALES, Figure, Scale
from benchmarks.paper.runs import iterations
from benchmarks.paper.settings import OURS, THEIRS, Setting
from benchmarks.paper.summary import summarise
from benchmarks.results import write_json

OUT = Path("results/paper")
WANTED = {registry.MNIST: "mnist", registry.CIFAR10: "cifar10"}
"""What is looked for by the names of the paper."""


def add_command(commands: argparse._SubParsersAction[Any]) -> None:
    """Adds `paper` to the subcommands of `python -m benchmarks`."""
    parser = commands.add_parser(
        "paper",
        help="reproduce the figures of Augmented Neural ODEs",
        description="Trains what the figures of the paper show, writes each run, each figure's "
        "summary and its picture to --out, and goes on from there when it is called again.",
        epilog="Figures: "
        + "; ".join(f"{number}: {figure.title}" for number, figure in FIGURES.items())
        + ". Groups: "
        + "; ".join(f"{name}: {', '.join(numbers)}" for name, numbers in GROUPS.items())
        + ".",
    )
    parser.add_argument(
        "figures",
        nargs="*",
        type=known,
        metavar="FIGURE",
        help="numbers or groups, see below; default: all",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--smoke", action="store_true", help="everything, tiny: a few minutes")
    size.add_argument("--full", action="store_true", help="the paper's sizes; images want a GPU")
    parser.add_argument(
        "--solver",
        type=known_solvers,
        default=(OURS,),
        metavar="NAMES",
        help=f"comma-separated: {OURS} (default), {THEIRS}; both are trained by turns",
    )
    parser.add_argument("--device", type=usable_device, default="cpu", help="cpu (default) or cuda")
    parser.add_argument(
        "--data", type=Path, nargs="+", metavar="ROOT", help="folders to look into for images"
    )
    parser.add_argument(
        "--download", action="store_true", help="get MNIST and CIFAR10 into the first ROOT"
    )
    parser.add_argument("--repeats", type=positive, help="of each training; default: the scale's")
    parser.add_argument("--seed", type=int, default=0, help="of data, weights and batches")
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder; default {OUT}")
    parser.add_argument(
        "--processes",
        type=positive,
        help="trainings at a time; default: a core each, on a GPU 1",
    )
    parser.set_defaults(run=main)


def known(text: str) -> str:
    """An argument that names a figure or a group."""
    if text not in FIGURES and text not in GROUPS:
        raise argparse.ArgumentTypeError(
            f"no figure {text!r}; there are {', '.join([*FIGURES, *GROUPS])}"
        )
    return text


def known_solvers(text: str) -> tuple[str, ...]:
    """An argument that lists solvers."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    if set(names) - {OURS, THEIRS}:
        raise argparse.ArgumentTypeError(f"got {text!r}, want {OURS}, {THEIRS}, or both")
    return names


def main(args: argparse.Namespace) -> None:
    """Makes the figures as the command line says."""
    folders = tuple(args.data or image_data.FOLDERS)
    if args.download:
        image_data.download(folders[0], ("mnist", "cifar10"))
    scale = SCALES["smoke" if args.smoke else "full" if args.full else "reduced"]
    scale = replace(
        scale,
        seed=args.seed,
        device=args.device,
        sources={name: image_data.resolve(key, folders) for name, key in WANTED.items()},
    )
    if args.repeats:
        scale = replace(scale, repeats=args.repeats, image_repeats=args.repeats)
    chosen = args.figures or list(FIGURES)
    numbers = dict.fromkeys(x for name in chosen for x in GROUPS.get(name, (name,)))
    processes = args.processes or (1 if args.device != "cpu" else os.cpu_count() or 1)
    make(
        [FIGURES[number] for number in numbers],
        scale,
        pool.Place(args.out, folders, processes),
        args.solver,
        Console(),
        command=_command(args, scale),
    )


def _command(args: argparse.Namespace, scale: Scale) -> str:
    """The command line again, without what does not change the results."""
    words = ["python", "-m", "benchmarks", "paper", *args.figures]
    words += [f"--{scale.name}"] if scale.name != "reduced" else []
    for name, value, default in (
        ("solver", ",".join(args.solver), OURS),
        ("device", args.device, "cpu"),
        ("repeats", args.repeats, None),
        ("seed", args.seed, 0),
    ):
        words += [f"--{name}", str(value)] if value != default else []
    return shlex.join(words)


@dataclass
class _Plan:
    """A figure and what still has to be trained for it."""

    figure: Figure
    settings: set[Setting]


def make(
    figures: Sequence[Figure],
    scale: Scale,
    place: pool.Place,
    solvers: tuple[str, ...],
    console: Console,
    command: str = "",
) -> None:
    """Trains what is missing, and summarises and draws each figure as soon as it can be.

    Args:
        figures: Of the registry.
        scale: Their sizes.
        place: Where results go, and the processes.
        solvers: To train with.
        console: For tables and notes.
        command: That asked for it, for the summaries.

    Raises:
        SystemExit: The folder cannot be written.
    """
    start = time.monotonic()
    try:
        (place.folder / "runs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"paper: cannot write to --out {place.folder}: {error.strerror}") from None
    wanted = {
        figure.number: [x for entry in figure.entries(scale) for x in entry.settings]
        for figure in figures
    }
    everything = [setting for settings in wanted.values() for setting in settings]
    jobs = pool.missing(everything, solvers, place.folder)
    todo = {job.setting for job in jobs}
    plans = [_Plan(figure, todo.intersection(wanted[figure.number])) for figure in figures]
    total = sum(iterations(job.setting, place.data) * len(job.solvers) for job in jobs)

    def draw_what_is_done() -> None:
        for plan in [plan for plan in plans if not plan.settings]:
            plans.remove(plan)
            _draw(plan.figure, scale, place.folder, solvers, command)

    try:
        draw_what_is_done()
        with tqdm(total=total, unit="it", desc=f"{len(jobs)} trainings", smoothing=0.05) as bar:
            for number, job in enumerate(pool.work(jobs, place, bar.update), start=1):
                bar.set_description(f"{number} of {len(jobs)} trainings")
                for plan in plans:
                    plan.settings.discard(job.setting)
                draw_what_is_done()
    finally:
        seconds = time.monotonic() - start
        _log(place, {"command": command, "trainings": len(jobs), "seconds": round(seconds, 1)})
        for plan in plans:  # interrupted: with the runs that are there
            _draw(plan.figure, scale, place.folder, solvers, command)
    for figure in figures:
        _report(json.loads(_paths(figure, place.folder)[0].read_text()), console)
    console.print(
        f"{len(jobs)} trainings in {seconds:.0f} s, {place.processes} at a time; "
        f"pictures and summaries are in {place.folder}/. Next: python -m benchmarks report",
        markup=False,
    )


def _paths(figure: Figure, folder: Path) -> tuple[Path, Path]:
    """Of the summary and the picture."""
    name = folder / f"figure-{figure.number}"
    return name.with_suffix(".json"), name.with_suffix(".png")


def _draw(
    figure: Figure, scale: Scale, folder: Path, solvers: tuple[str, ...], command: str
) -> None:
    summary = summarise(figure, scale, folder, solvers, command)
    written, drawn = _paths(figure, folder)
    write_json(written, summary)
    draw(json.loads(written.read_text()), drawn)


def _log(place: pool.Place, line: dict[str, Any]) -> None:
    """Adds how long it took to the folder's commands.jsonl."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    with (place.folder / "commands.jsonl").open("a") as file:
        file.write(json.dumps({"date": now, "processes": place.processes, **line}) + "\n")


def _report(summary: dict[str, Any], console: Console) -> None:
    """A table of a figure's groups; columns that have nothing are left out."""
    groups = summary["groups"]
    if summary["figure"] == "search":  # of each model the best
        ranked = sorted(groups, key=lambda x: _number(x["validation"]))
        groups = [next(x for x in ranked if x["panel"] == name) for name in panels(summary)]
    columns = {
        "": [": ".join(filter(None, (x["panel"], x["label"]))) for x in groups],
        "solver": [x["solver"] if x["solver"] != OURS else "" for x in groups],
        "runs": [str(x["runs"]) for x in groups],
        "failed": [str(len(x["failures"]) or "") for x in groups],
        "loss": [_mean(x["loss"], ".2g") for x in groups],
        "held out": [_mean(x["validation"], ".2g") for x in groups],
        "NFE": [_mean(x["nfe_at_start"], ".1f") for x in groups],
        "at end": [_mean(x["nfe"], ".1f") for x in groups],
        "ms/it": [_mean(x["ms"], ".4g", of=median) for x in groups],
    }
    columns = {heading: cells for heading, cells in columns.items() if any(cells)}
    if not columns:
        return
    table = Table(
        box=SIMPLE_HEAD,
        title=f"{summary['figure']}: {summary['title']}",
        title_justify="left",
        caption="; ".join(summary["data"][:3]) + ("; ..." if len(summary["data"]) > 3 else ""),
        caption_justify="left",
    )
    for heading in columns:
        table.add_column(heading, justify="left" if heading in ("", "solver") else "right")
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    console.print(table)
    for note in summary["notes"]:
        console.print(note, style="yellow", markup=False)


def _mean(values: Sequence[float | None], form: str, of: Any = fmean) -> str:
    found = [value for value in values if value is not None]
    return format(of(found), form) if found else ""


def _number(values: Sequence[float | None]) -> float:
    """The mean, inf if there is none."""
    return float(_mean(values, "") or "inf")
