"""Image classification by an augmented neural ODE: anode_fast beside torchdiffeq.

Both train the paper's convolutional model from the same weights, on the same batches in the same
order, with Adam, taking turns of a few iterations. torchdiffeq calls the field as the paper's code
writes it, time concatenated to the channels, and goes back through its operations, those that
choose the steps among them: its gradient differs from the exact one within the tolerance, and with
it, slowly, the two loss curves. The images are Fashion-MNIST's, averaged down; where it is not
found, scikit-learn's digits, and the output says so. Every iteration is a line of OUT/images.jsonl
as soon as its turn is over; run again with the same options, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import TensorDataset
from tqdm import tqdm

from anode_fast import ConvODENet
from benchmarks import image_data, machine
from benchmarks.arguments import positive, usable_device
from benchmarks.baselines import ConcatenatingConvField, with_torchdiffeq
from benchmarks.data import batches
from benchmarks.image_data import Images
from benchmarks.train import IN_A_ROW, Run, in_turns

OURS, THEIRS = SOLVERS = ("anode_fast", "torchdiffeq")
COMPARED = 50  # iterations over which the two loss curves are compared
WARMUP = 2  # iterations that are not counted, on copies
SHOWN = (1, 2, 5, 10, 20, 50, 100, 200, 300, 500, 1000)
CLASSES = 10
CHOICES = {
    "dtype": ("float32", "float64"),
    "gradient": ("discrete", "autograd", "continuous", "auto"),
    "backend": ("auto", "reference", "cpu", "triton"),
}
SAVED = ("losses", "nfe", "nfe_backward", "seconds")  # lists of a Run


@dataclass(frozen=True)
class Config:
    """What is trained, and how. Small enough for a CPU; the paper's model has 28x28 and 64 filters.

    Attributes:
        augment: Channels of zeros; 0 for a plain neural ODE.
        filters: Of the field.
        size: Height and width; larger images are averaged down.
        batch: Images of an iteration.
        iterations: Steps of the optimizer.
        learning_rate: Of Adam.
        tolerance: Absolute and relative, of dopri5.
        gradient: Of anode_fast.
        backend: Of anode_fast.
        seed: Of weights and batches.
        device: Where.
        dtype: Of weights and images.
        threads: Of torch.
    """

    augment: int = 5
    filters: int = 32
    size: int = 14
    batch: int = 64
    iterations: int = 300
    learning_rate: float = 1e-3
    tolerance: float = 1e-3
    gradient: str = "discrete"
    backend: str = "auto"
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 2


def add_command(commands: argparse._SubParsersAction[Any]) -> None:
    """Adds `images` to the subcommands of `python -m benchmarks`."""
    parser = commands.add_parser(
        "images",
        help="train a convolutional ANODE on Fashion-MNIST, with anode_fast and torchdiffeq",
        description=__doc__,
    )
    for name, kind, words in (
        ("augment", _count, "augmented channels, 0 for none"),
        ("filters", positive, "of the field"),
        ("size", positive, "height and width"),
        ("batch", positive, "images of an iteration"),
        ("iterations", positive, "of training"),
        ("seed", int, "of weights and batches"),
        ("threads", positive, "of torch"),
        ("device", usable_device, "cpu or cuda"),
        ("dtype", str, "float32 or float64"),
        ("gradient", str, "of anode_fast"),
        ("backend", str, "of anode_fast"),
    ):
        default = getattr(Config, name)
        parser.add_argument(
            f"--{name}",
            type=kind,
            choices=CHOICES.get(name),
            default=default,
            help=f"{words}; default {default}",
        )
    parser.add_argument("--data", type=Path, nargs="+", help="folders to look into for the images")
    parser.add_argument(
        "--download", action="store_true", help="get Fashion-MNIST into the first of them"
    )
    parser.add_argument("--out", type=Path, default=Path("results/images"), help="folder")
    parser.add_argument("--anew", action="store_true", help="forget what OUT has of earlier runs")
    parser.add_argument("--plot", type=Path, help="draw the loss curves into this file")
    parser.set_defaults(run=main)


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"want at least 0, got {value}")
    return value


def main(args: argparse.Namespace) -> None:
    """Runs the benchmark as the command line says."""
    given = vars(args)
    config = Config(**{x.name: given[x.name] for x in fields(Config) if x.name in given})
    folders = args.data or image_data.FOLDERS
    if args.download:
        image_data.download(folders[0])
    data = image_data.load(folders, config.size)
    run(config, data, args.out, Console(), anew=args.anew, plot=args.plot)


def run(
    config: Config,
    data: Images,
    out: Path,
    console: Console,
    *,
    anew: bool = False,
    plot: Path | None = None,
) -> dict[str, Run]:
    """Trains with both solvers, prints the comparison, and returns their runs by name."""
    torch.set_num_threads(config.threads)
    if data.note:
        console.print(data.note, style="yellow", markup=False)
    out.mkdir(parents=True, exist_ok=True)
    race = Race(config, data, out, anew=anew)
    try:
        race.finish()
    finally:
        if race.done:
            console.print(table(race.runs, f"{data.name}, {data.size}x{data.size}, {config}"))
            console.print(summary(race.runs), highlight=False, markup=False)
            console.print(f"{machine.summary('torch', 'torchdiffeq')}; {_load()}", markup=False)
            console.print(f"Every iteration: {race.lines}", markup=False)
    if plot:
        draw(race.runs, data.name, plot)
        console.print(f"Loss curves: {plot}", markup=False)
    return race.runs


def _load() -> str:
    return f"load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "load unknown"


class Race:
    """The two trainings: as far as they are, and how to go on.

    Args:
        config: What to train.
        data: The images.
        out: Folder of images.jsonl, a line for each iteration and solver after one that says what
            is trained, and of images.pt, with which an interrupted run goes on.
        anew: Whether to start again whatever is there.

    Attributes:
        runs: By solver.
        lines: Path of images.jsonl.

    Raises:
        SystemExit: There is a run of another configuration.
    """

    def __init__(self, config: Config, data: Images, out: Path, *, anew: bool = False) -> None:
        self.config = config
        self.data = data
        images, labels = data.data.tensors
        self._examples = TensorDataset(images.to(getattr(torch, config.dtype)), labels)
        self.lines = out / "images.jsonl"
        self._saved = out / "images.pt"
        self._header = {"data": data.name, **asdict(config)}
        self.nets = dict(zip(SOLVERS, _nets(config, data), strict=True))
        self.optimizers = {name: self._optimizer(net) for name, net in self.nets.items()}
        self.runs = {name: Run() for name in SOLVERS}
        if anew or not self.lines.exists():
            self._saved.unlink(missing_ok=True)
            self._write([])
        else:
            self._go_on()

    @property
    def done(self) -> int:
        """Iterations that a run has made, the longer of the two."""
        return max(len(run.losses) for run in self.runs.values())

    def finish(self) -> None:
        """Trains until both have made all iterations, or a solve has failed."""
        todo = [name for name in SOLVERS if not self.runs[name].failure]
        left = self.config.iterations - self.done
        if left <= 0 or not todo:
            return
        for name in todo:  # warms up on copies: first calls load and allocate
            net = _nets(self.config, self.data)[SOLVERS.index(name)]
            list(islice(self._training(net, self._optimizer(net), Run()), WARMUP))
        trainings = [
            self._training(self.nets[name], self.optimizers[name], self.runs[name]) for name in todo
        ]
        with tqdm(total=self.config.iterations, initial=self.done, desc="images", unit="it") as bar:
            for turns in in_turns(trainings, min(IN_A_ROW, left)):
                self._save()
                bar.set_postfix({"loss": f"{fmean(turn[-1] for turn in turns):.4f}"}, refresh=False)
                bar.update(max(map(len, turns)))
        self._save()

    def _training(
        self, net: ConvODENet, optimizer: torch.optim.Optimizer, run: Run
    ) -> Iterator[float]:
        epochs = math.ceil(self.config.iterations * self.config.batch / len(self._examples))
        order: Iterator[Any] = batches(
            self._examples, self.config.batch, epochs, seed=self.config.seed
        )
        left = islice(order, len(run.losses), self.config.iterations)
        return run.train(net, left, optimizer, nn.functional.cross_entropy)

    def _optimizer(self, net: ConvODENet) -> torch.optim.Optimizer:
        return torch.optim.Adam(net.parameters(), lr=self.config.learning_rate)

    def _go_on(self) -> None:
        header = json.loads(self.lines.read_text().partition("\n")[0] or "{}")
        same = {**header, "iterations": 0} == {**self._header, "iterations": 0}
        if not same:
            raise SystemExit(
                f"images: {self.lines} is of another run, {header}. --out names another folder, "
                "--anew starts again."
            )
        if self._saved.exists():
            kept = torch.load(self._saved, map_location=self.config.device, weights_only=True)
            for name in SOLVERS:
                self.nets[name].load_state_dict(kept[name]["net"])
                self.optimizers[name].load_state_dict(kept[name]["optimizer"])
                for key, value in kept[name]["run"].items():
                    setattr(self.runs[name], key, value)
        self._write(self._rows(0))  # what was written after the weights were kept goes

    def _rows(self, start: int) -> list[dict[str, Any]]:
        """Of all iterations from `start` on, in their order."""
        rows = [
            {
                "solver": name,
                "iteration": i + 1,
                "loss": run.losses[i],
                "nfe": run.nfe[i],
                "nfe_backward": run.nfe_backward[i],
                "seconds": round(run.seconds[i], 6),
                "backend": run.backend,
            }
            for name, run in self.runs.items()
            for i in range(start, len(run.losses))
        ]
        return sorted(rows, key=lambda row: row["iteration"])

    def _write(self, rows: list[dict[str, Any]]) -> None:
        self.lines.write_text("".join(json.dumps(x) + "\n" for x in [self._header, *rows]))
        self._written = self.done

    def _save(self) -> None:
        """Adds the new lines, and keeps what going on takes."""
        with self.lines.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in self._rows(self._written))
        self._written = self.done
        kept = {
            name: {
                "net": self.nets[name].state_dict(),
                "optimizer": self.optimizers[name].state_dict(),
                "run": {key: getattr(run, key) for key in (*SAVED, "backend", "failure")},
            }
            for name, run in self.runs.items()
        }
        part = self._saved.with_suffix(".part")
        torch.save(kept, part)
        part.replace(self._saved)


def _nets(config: Config, data: Images) -> tuple[ConvODENet, ConvODENet]:
    """The model, and its twin that torchdiffeq solves."""
    torch.manual_seed(config.seed)
    net = ConvODENet(
        (1, data.size, data.size),
        config.filters,
        CLASSES,
        config.augment,
        rtol=config.tolerance,
        atol=config.tolerance,
        gradient=config.gradient,
        backend=config.backend,
    ).to(config.device, getattr(torch, config.dtype))
    return net, with_torchdiffeq(net, rewrite=ConcatenatingConvField)


# ---- what comes of it


def table(runs: dict[str, Run], title: str) -> Table:
    """Losses and evaluations of both at some iterations."""
    result = Table(
        title=title,
        title_justify="left",
        caption="loss: before the iteration's step. NFE: forward + backward.",
    )
    result.add_column("iteration", justify="right")
    for name in SOLVERS:
        result.add_column(f"{name}\nloss", justify="right")
        result.add_column("\nNFE", justify="right")
    result.add_column("difference\nof losses", justify="right")
    last = max(len(run.losses) for run in runs.values())
    for number in sorted({x for x in SHOWN if x <= last} | {last}):
        cells, losses = [], []
        for run in runs.values():
            if number > len(run.losses):
                cells += ["-", "-"]
                continue
            losses.append(run.losses[number - 1])
            nfe = f"{run.nfe[number - 1]} + {run.nfe_backward[number - 1]}"
            cells += [f"{losses[-1]:.5f}", nfe]
        difference = f"{abs(losses[0] - losses[1]):.1e}" if len(losses) == 2 else "-"
        result.add_row(str(number), *cells, difference)
    return result


def loss_difference(runs: dict[str, Run], count: int = COMPARED) -> float:
    """Largest difference of the two loss curves over the first iterations."""
    ours, theirs = (runs[name].losses[:count] for name in SOLVERS)
    return max((abs(a - b) for a, b in zip(ours, theirs, strict=False)), default=math.nan)


def summary(runs: dict[str, Run]) -> str:
    """Differences, evaluations and times of the two, in words."""
    ours, theirs = (runs[name] for name in SOLVERS)
    both = min(len(ours.losses), len(theirs.losses))
    words = [
        f"Over the first {min(both, COMPARED)} iterations the two loss curves differ by at most "
        f"{loss_difference(runs):.1e}."
    ]
    for name, run in runs.items():
        if run.losses:
            words.append(
                f"{name} ({run.backend}): {fmean(run.nfe):.1f} + {fmean(run.nfe_backward):.1f} "
                f"evaluations and {run.milliseconds:.1f} ms an iteration, mean and median."
            )
        if run.failure:
            words.append(f"{name} ended early: {run.failure}")
    if both:
        totals = sum(theirs.seconds[:both]) / sum(ours.seconds[:both])
        words.append(
            f"torchdiffeq takes {theirs.milliseconds / ours.milliseconds:.2f} times as long by the "
            f"medians, {totals:.2f} by the totals."
        )
    return "\n".join(words)


def draw(runs: dict[str, Run], title: str, path: Path) -> None:
    """The loss curves, over iterations and over time."""
    import matplotlib  # slow to import, and seldom needed

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5), sharey=True, layout="constrained")
    for (name, run), style in zip(runs.items(), ("-", "--"), strict=True):
        seconds = torch.tensor(run.seconds).cumsum(0).tolist()
        axes[0].plot(run.losses, style, label=name)
        axes[1].plot(seconds, run.losses, style, label=name)
    axes[0].set(xlabel="iteration", ylabel="loss", title=title)
    axes[1].set(xlabel="seconds of training", title="the same by time")
    axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
