"""Concentric spheres: a neural ODE beside an augmented one, anode_fast beside torchdiffeq.

Each model is trained twice, from the same weights on the same batches in the same order, with the
same optimizer. The two trainings of a model take turns of a few iterations each, so noise of the
machine hits both alike. The time of an iteration is the whole loop's, from getting the batch to
reading the loss, and its parts are timed as well: they show how much of it a faster solver could
still save.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import math
import os
import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import numpy as np
import torch
import torchdiffeq
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import anode_fast
from anode_fast import ODENet, SolverError
from anode_fast.kernels.cpu import library
from benchmarks import machine
from benchmarks.arguments import positive, usable_device
from benchmarks.baselines import with_torchdiffeq
from benchmarks.data import ConcentricSpheres, batches
from benchmarks.results import write_json
from benchmarks.style import INNER, MODEL_COLORS, OUTER, SOLVER_STYLES, STYLE
from benchmarks.train import GRADIENT, PARTS, SOLVE, STEP, Run, in_turns

SOLVERS = ("anode_fast", "torchdiffeq")
ADJOINT = "torchdiffeq, odeint_adjoint"
ADAMS: dict[str, dict[str, Any]] = {
    "Adam": {},
    "Adam, foreach": {"foreach": True},
    "Adam, fused": {"fused": True},
}
FAST = {"epochs": 3, "varied": 20}
COMPARED = 50  # iterations over which the loss curves of the two solvers are compared
WARMUP = 5


@dataclass(frozen=True)
class Config:
    """What is trained, and how. The defaults are the paper's, from appendix E, where it has them.

    The paper speaks of the mean squared error, and of a Runge-Kutta 4 solver with a tolerance; in
    its published code that solver is dopri5.
    """

    augment_dims: dict[str, int] = field(default_factory=lambda: {"NODE": 0, "ANODE": 5})
    hidden_dim: int = 32
    method: str = "dopri5"
    tolerance: float = 1e-3
    gradient: str = "discrete"  # of anode_fast; torchdiffeq goes back through its operations
    batch_size: int = 64
    learning_rate: float = 1e-3
    epochs: int = 20  # the paper: 50; most of the time goes to torchdiffeq
    varied: int = 40  # iterations with each of the variants
    num_inner: int = 1000
    num_outer: int = 2000
    seed: int = 0
    device: str = "cpu"
    threads: int = 1  # of torch. A batch is too small to share: more only wait for each other


@dataclass
class Trained:
    """One model, trained once with each solver.

    Attributes:
        name: Of the model.
        nets: By solver, trained.
        runs: By solver, all iterations.
        variants: By solver and optimizer, the first iterations alone.
    """

    name: str
    nets: dict[str, ODENet]
    runs: dict[str, Run]
    variants: dict[tuple[str, str], Run]

    @property
    def ratio(self) -> float:
        """How many times as long torchdiffeq takes for an iteration, by the medians."""
        ours, theirs = (self.runs[solver] for solver in SOLVERS)
        return theirs.milliseconds / ours.milliseconds

    @property
    def ratio_of_totals(self) -> float:
        """The same by the time of all iterations that both made.

        On a busy machine almost every long iteration is interrupted, but few of the short ones: the
        medians then flatter the faster side. On a quiet one the two ratios agree.
        """
        ours, theirs = (self.runs[solver].seconds for solver in SOLVERS)
        count = min(len(ours), len(theirs))
        return sum(theirs[:count]) / sum(ours[:count]) if count else math.nan

    @property
    def bound(self) -> float:
        """What `ratio` would be if our solve and its gradient took no time."""
        ours, theirs = (self.runs[solver] for solver in SOLVERS)
        others = (part for part in PARTS if part not in (SOLVE, GRADIENT))
        return theirs.milliseconds / ours.milliseconds_of(*others)

    @property
    def loss_difference(self) -> float:
        """Largest difference of the two loss curves over the first iterations."""
        ours, theirs = (self.runs[solver].losses[:COMPARED] for solver in SOLVERS)
        return max((abs(a - b) for a, b in zip(ours, theirs, strict=False)), default=math.nan)

    def summary(self) -> str:
        """The ratio and what bounds it, in words."""
        ours = self.runs["anode_fast"]
        solve, step = ours.milliseconds_of(SOLVE, GRADIENT), ours.milliseconds_of(STEP)
        return (
            f"{self.name}: {self.ratio:.1f} times torchdiffeq's speed by the medians, "
            f"{self.ratio_of_totals:.1f} by the totals. The solve and its gradient take "
            f"{solve:.2f} of anode_fast's {ours.milliseconds:.2f} ms, the optimizer {step:.2f}: "
            f"even an infinitely fast solver would give at most {self.bound:.1f} times "
            f"torchdiffeq's speed. Over the first {COMPARED} iterations the two loss curves differ "
            f"by at most {self.loss_difference:.1e}."
        )


def add_command(commands: argparse._SubParsersAction) -> None:
    """Adds `quickstart` to the subcommands of `python -m benchmarks`."""
    parser = commands.add_parser(
        "quickstart",
        help="train a NODE and an ANODE on concentric spheres, with anode_fast and torchdiffeq",
        description=__doc__,
    )
    parser.add_argument("--fast", action="store_true", help=f"{FAST['epochs']} epochs, about 10 s")
    parser.add_argument(
        "--epochs", type=positive, help=f"default {Config.epochs}; the paper trains for 50"
    )
    parser.add_argument(
        "--gradient",
        choices=("discrete", "autograd", "continuous", "auto"),
        default=Config.gradient,
        help=f"how anode_fast differentiates; default {Config.gradient}, that of AugODEBlock",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, data and batches")
    parser.add_argument("--out", type=Path, default=Path("results/quickstart"), help="folder")
    parser.add_argument("--device", type=usable_device, default="cpu", help="cpu (default) or cuda")
    parser.add_argument(
        "--threads", type=positive, default=Config.threads, help=f"default {Config.threads}"
    )
    parser.set_defaults(run=main)


def main(args: argparse.Namespace) -> None:
    """Runs the benchmark as the command line says."""
    sizes = (FAST if args.fast else {}) | ({"epochs": args.epochs} if args.epochs else {})
    config = Config(
        gradient=args.gradient,
        seed=args.seed,
        device=args.device,
        threads=args.threads,
        **sizes,
    )
    run(config, args.out, Console())


def run(config: Config, out: Path, console: Console) -> list[Trained]:
    """Trains, prints the tables, and writes quickstart.json and the pictures to `out`.

    The JSON is written anew, in one piece, whenever a model's runs are complete.
    """
    start = time.perf_counter()
    torch.set_num_threads(config.threads)
    data = ConcentricSpheres(
        num_inner=config.num_inner, num_outer=config.num_outer, seed=config.seed
    )
    results: list[Trained] = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        _write_json(out / "quickstart.json", config, results)  # before the work, not after it
    except OSError as error:
        raise SystemExit(f"quickstart: cannot write to --out {out}: {error.strerror}") from None
    if library.missing():
        why = f"anode_fast runs on its reference path, in PyTorch: {library.missing()}."
        console.print(why, style="yellow", markup=False)
    for name in config.augment_dims:
        results.append(train(name, data, config))
        _write_json(out / "quickstart.json", config, results)
    for table in (_runs_table, _parts_table, _variants_table):
        console.print(table(results, config))
    for model in results:
        if all(one.seconds for one in model.runs.values()):
            console.print(model.summary(), highlight=False)
        for solver, one in model.runs.items():
            if one.failure:
                ended = f"{model.name} with {solver} ended early: {one.failure}"
                console.print(ended, style="red", markup=False)
    draw(results, data, config, out)
    seconds = time.perf_counter() - start
    where = f"{_gpu(config) or ''} {machine.summary('torch', 'torchdiffeq')}".strip()
    console.print(f"{where}; load average {_load() or 'unknown'}", markup=False)
    console.print(f"{seconds:.0f} s in all; pictures and figures are in {out}/", markup=False)
    return results


def train(name: str, data: ConcentricSpheres, config: Config) -> Trained:
    """Trains one model with both solvers, and for a few iterations with the variants."""
    torch.manual_seed(config.seed)
    net = ODENet(
        data_dim=data.points.shape[1],
        hidden_dim=config.hidden_dim,
        augment_dim=config.augment_dims[name],
        method=config.method,
        gradient=config.gradient,
        rtol=config.tolerance,
        atol=config.tolerance,
    ).to(config.device)
    nets = dict(zip(SOLVERS, (net, with_torchdiffeq(net)), strict=True))
    varied = {(solver, adam): copy.deepcopy(nets[solver]) for adam in ADAMS for solver in SOLVERS}
    varied[ADJOINT, "Adam"] = with_torchdiffeq(net, adjoint=True)
    variants = _race(f"{name}, variants", varied, data, config, config.varied)
    runs = _race(name, {(solver, "Adam"): net for solver, net in nets.items()}, data, config)
    return Trained(name, nets, {solver: run for (solver, _), run in runs.items()}, variants)


def _race(
    title: str,
    nets: Mapping[tuple[str, str], ODENet],
    data: ConcentricSpheres,
    config: Config,
    iterations: int | None = None,
) -> dict[tuple[str, str], Run]:
    """Trains nets in turns, each by `iterations` (all there are, if None).

    Nets and runs are by solver and optimizer.
    """

    def training(net: ODENet, adam: str, run: Run, iterations: int | None) -> Iterator[float]:
        order = batches(data, config.batch_size, config.epochs, seed=config.seed)
        optimizer = torch.optim.Adam(net.parameters(), lr=config.learning_rate, **ADAMS[adam])
        return run.train(net, islice(order, iterations), optimizer)

    for (_, adam), net in nets.items():  # warm up on copies: first calls load and allocate
        list(training(copy.deepcopy(net), adam, Run(), WARMUP))
    runs = {key: Run() for key in nets}
    trainings = [training(net, key[1], runs[key], iterations) for key, net in nets.items()]
    everything = config.epochs * _iterations_per_epoch(config)
    total = everything if iterations is None else min(iterations, everything)
    with tqdm(total=total, desc=f"{title:>15}", unit="it") as bar:
        for turns in in_turns(trainings):
            bar.set_postfix({"loss": f"{fmean(turn[-1] for turn in turns):.4f}"}, refresh=False)
            bar.update(max(map(len, turns)))
    return runs


# ---- tables


def _runs_table(results: list[Trained], config: Config) -> Table:
    """The figures of every run."""
    result = Table(
        title=f"Concentric spheres, {config.epochs} epochs",
        caption="loss: mean of the last epoch. NFE: mean evaluations of the field per iteration, "
        "forward + backward. ms: median per training iteration. ratio: torchdiffeq's ms to the "
        "solver's.",
    )
    for heading in ("model", "solver"):
        result.add_column(heading)
    for heading in ("final loss", "NFE", "total s", "ms/iter", "ratio"):
        result.add_column(heading, justify="right")
    for model in results:
        for solver, run in model.runs.items():
            ratio = model.ratio if solver == "anode_fast" else 1.0
            result.add_row(
                model.name,
                f"{solver} (reference)" if run.backend == "reference" else solver,
                f"{_final_loss(run, config):.5f}",
                f"{_mean(run.nfe):.1f} + {_mean(run.nfe_backward):.1f}",
                f"{sum(run.seconds):.2f}",
                f"{run.milliseconds:.2f}",
                f"{ratio:.2f}",
                end_section=solver == SOLVERS[-1],
            )
    return result


def _parts_table(results: list[Trained], config: Config) -> Table:
    """Where the time of an iteration goes."""
    result = Table(
        title="Parts of a training iteration, ms",
        caption="Medians, so they do not quite add up. share: of anode_fast's whole iteration.",
    )
    result.add_column("")
    for model in results:
        for heading in (f"{model.name}:\nanode_fast", "\nshare", "torch-\ndiffeq"):
            result.add_column(heading, justify="right")
    pairs = [[model.runs[solver] for solver in SOLVERS] for model in results]
    for part in PARTS:
        cells = []
        for ours, theirs in pairs:
            ms = ours.milliseconds_of(part)
            share = ms / ours.milliseconds
            cells += [f"{ms:.3f}", f"{share:.0%}", f"{theirs.milliseconds_of(part):.3f}"]
        result.add_row(part, *cells, end_section=part == PARTS[-1])
    totals = [(f"{a.milliseconds:.3f}", "", f"{b.milliseconds:.3f}") for a, b in pairs]
    result.add_row("whole iteration", *(cell for cells in totals for cell in cells))
    return result


def _variants_table(results: list[Trained], config: Config) -> Table:
    """What other optimizers would change, and torchdiffeq's adjoint."""
    result = Table(
        title=f"The first {config.varied} iterations with other optimizers, ms",
        caption="Both sides with the same optimizer, medians. Last row: torchdiffeq solves the "
        "adjoint ODE backwards, with Adam; anode_fast as in the first row.",
    )
    result.add_column("")
    for model in results:
        for heading in (f"{model.name}:\nanode_fast", "torch-\ndiffeq", "\nratio"):
            result.add_column(heading, justify="right")
    rows = {adam: [(solver, adam) for solver in SOLVERS] for adam in ADAMS}
    rows["odeint_adjoint"] = [("anode_fast", "Adam"), (ADJOINT, "Adam")]
    for name, sides in rows.items():
        cells = []
        for model in results:
            ours, theirs = (model.variants[side].milliseconds for side in sides)
            cells += [f"{x:.2f}" for x in (ours, theirs, theirs / ours)]
        result.add_row(name, *cells)
    return result


def _mean(values: list[int]) -> float:
    return fmean(values) if values else math.nan


def _final_loss(run: Run, config: Config) -> float:
    """Mean over the last epoch: single batches are noisy."""
    return _mean(run.losses[-_iterations_per_epoch(config) :])


def _iterations_per_epoch(config: Config) -> int:
    return -(-(config.num_inner + config.num_outer) // config.batch_size)


# ---- JSON


def _write_json(path: Path, config: Config, results: list[Trained]) -> None:
    """Writes everything known so far."""
    content: dict[str, Any] = {
        "experiment": "quickstart",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "config": asdict(config),
        "versions": {
            "anode_fast": anode_fast.__version__,
            "torch": torch.__version__,
            "torchdiffeq": torchdiffeq.__version__,
            "python": platform.python_version(),
        },
        "machine": {
            "cpu": machine.cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": _gpu(config),
            "load_average": _load(),
        },
        "comparisons": [
            {
                "model": model.name,
                "ratio": model.ratio,
                "ratio_of_totals": model.ratio_of_totals,
                "ratio_with_infinitely_fast_solver": model.bound,
                f"loss_difference_first_{COMPARED}": model.loss_difference,
            }
            for model in results
        ],
        "runs": [
            {
                "model": model.name,
                "solver": solver,
                "parameters": sum(p.numel() for p in model.nets[solver].parameters()),
                "failure": run.failure,
                "final_loss": _final_loss(run, config),
                "mean_nfe": _mean(run.nfe),
                "mean_nfe_backward": _mean(run.nfe_backward),
                "backend": run.backend,
                "ms_per_iteration": run.milliseconds,
                "ms_of_parts": {part: run.milliseconds_of(part) for part in PARTS},
                "losses": run.losses,
                "nfe": run.nfe,
                "nfe_backward": run.nfe_backward,
                "ms": [round(1e3 * seconds, 4) for seconds in run.seconds],
            }
            for model in results
            for solver, run in model.runs.items()
        ],
        "variants": [
            {
                "model": model.name,
                "solver": solver,
                "optimizer": adam,
                "mean_nfe": _mean(run.nfe),
                "mean_nfe_backward": _mean(run.nfe_backward),
                "ms_per_iteration": run.milliseconds,
                "ms_of_optimizer_step": run.milliseconds_of(STEP),
            }
            for model in results
            for (solver, adam), run in model.variants.items()
        ],
    }
    write_json(path, content)


def _load() -> float | None:
    """Processes that ran or waited to run over the last minute, where the system counts them."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _gpu(config: Config) -> str | None:
    """Name of the GPU in use, if one is."""
    return None if config.device == "cpu" else torch.cuda.get_device_name(config.device)


# ---- pictures


@dataclass
class Flow:
    """Where a trained model takes the points.

    Attributes:
        name: Of the model.
        states: [time, point, 2 or 3]: both data dimensions and, if there are augmented ones, that
            one of them which separates the classes best at the end.
        inner: Which points are in the ball.
        augmented: What the third axis shows; "" if there is none.
        failure: Why the solve failed, if it did.
    """

    name: str
    states: np.ndarray
    inner: np.ndarray
    augmented: str = ""
    failure: str | None = None

    @classmethod
    def of(cls, model: Trained, data: ConcentricSpheres, timesteps: int = 60) -> Flow:
        """The flow of the net that anode_fast trained."""
        inner = data.inner.numpy()
        net = model.nets["anode_fast"]
        points = data.points.to(next(net.parameters()).device)
        try:
            with torch.no_grad():
                states = net.block.trajectory(points, timesteps).cpu().numpy()
        except SolverError as error:
            return cls(model.name, np.empty((0, 0, 2)), inner, failure=str(error))
        if states.shape[2] == 2:
            return cls(model.name, states, inner)
        at_end = states[-1, :, 2:]
        gap = np.abs(at_end[inner].mean(0) - at_end[~inner].mean(0))
        best = int(np.argmax(gap / (at_end[inner].std(0) + at_end[~inner].std(0))))
        return cls(
            model.name, states[:, :, [0, 1, 2 + best]], inner, f"augmented dimension {best + 1}"
        )

    def add_axes(self, figure: Figure, position: SubplotSpec) -> Axes:
        """Axes of the right dimension, with equal scales."""
        if not self.augmented:
            axes = figure.add_subplot(position, xlabel="$x_1$", ylabel="$x_2$")
            axes.set_aspect("equal", adjustable="datalim")
            axes.locator_params(nbins=5)
            return axes
        axes = figure.add_subplot(position, projection="3d")
        low, high = self.states.min((0, 1)), self.states.max((0, 1))
        for axis, *limits in zip("xyz", low, high, strict=True):
            axes.set(**{f"{axis}lim": limits})
            getattr(axes, f"{axis}axis").pane.set_facecolor("#F7F7F7")
            # No numbers: crowded in perspective, and all three scales are equal.
            getattr(axes, f"{axis}axis").set_major_formatter(NullFormatter())
        axes.set_xlabel("$x_1$", labelpad=-13)
        axes.set_ylabel("$x_2$", labelpad=-13)
        axes.text2D(0.5, -0.1, f"height: {self.augmented}", transform=axes.transAxes, ha="center")
        axes.locator_params(nbins=5)
        axes.set_box_aspect(high - low, zoom=1.3)
        axes.view_init(elev=18, azim=-60)
        return axes


def draw(results: list[Trained], data: ConcentricSpheres, config: Config, out: Path) -> None:
    """Draws quickstart.png, and its parts as loss.png, nfe.png, flow.png and features.png."""
    flows = [Flow.of(model, data) for model in results]
    curves = {"loss": _plot_loss, "nfe": _plot_nfe}
    spaces = {"flow": _plot_flow, "features": _plot_features}
    with matplotlib.rc_context(STYLE):
        for name, plot in curves.items():
            figure = Figure(figsize=(6.5, 4), layout="constrained")
            axes = figure.add_subplot()
            plot(axes, results, config)
            axes.legend()
            figure.savefig(out / f"{name}.png")
        for name, plot in spaces.items():
            figure = Figure(figsize=(9, 4.5))
            grid = figure.add_gridspec(1, len(flows), left=0.07, right=0.97, bottom=0.2, top=0.93)
            for position, flow in zip(grid, flows, strict=True):
                plot(flow.add_axes(figure, position), flow)
            _add_class_legend(figure)
            figure.savefig(out / f"{name}.png")

        figure = Figure(figsize=(10, 6.5))
        top = figure.add_gridspec(
            1, 3, left=0.06, right=0.985, bottom=0.61, top=0.95, wspace=0.4, width_ratios=(6, 6, 5)
        )
        axes = figure.add_subplot(top[0])
        _plot_loss(axes, results, config)
        axes.legend(fontsize=8)
        _plot_nfe(figure.add_subplot(top[1]), results, config)
        _plot_speed(figure.add_subplot(top[2]), results)
        panels = [(flow, plot) for flow in flows for plot in spaces.values()]
        bottom = figure.add_gridspec(
            1,
            len(panels),
            left=0.06,
            right=0.97,
            bottom=0.14,
            top=0.47,
            wspace=0.25,
            width_ratios=[7.5 if flow.augmented else 6 for flow, _ in panels],
        )
        for position, (flow, plot) in zip(bottom, panels, strict=True):
            plot(flow.add_axes(figure, position), flow)
        _add_class_legend(figure)
        figure.savefig(out / "quickstart.png")


def _add_class_legend(figure: Figure) -> None:
    """Says once, below all panels, which colour is which class."""
    labels = {INNER: "inner ball, target $-1$", OUTER: "outer shell, target $+1$"}
    dots = [Line2D([], [], marker="o", linestyle="", color=color) for color in labels]
    figure.legend(dots, labels.values(), loc="lower center", ncols=2)


def _plot_curves(axes: Axes, results: list[Trained], config: Config, quantity: str) -> None:
    """Running means over an epoch: anode_fast as a thin line upon torchdiffeq's broad one."""
    for model in results:
        color = MODEL_COLORS[model.name]
        for solver, style in SOLVER_STYLES.items():
            values = getattr(model.runs[solver], quantity)
            window = min(_iterations_per_epoch(config), len(values))
            if not window:
                continue
            mean = np.convolve(values, np.full(window, 1 / window), mode="valid")
            label = f"{model.name}, {solver}"
            axes.plot(range(window, len(values) + 1), mean, color=color, label=label, **style)
    axes.set_xlabel("iteration (running mean of an epoch)")
    axes.set_xlim(left=0)


def _plot_loss(axes: Axes, results: list[Trained], config: Config) -> None:
    _plot_curves(axes, results, config, "losses")
    axes.set(title="Loss (mean squared error)", yscale="log")


def _plot_nfe(axes: Axes, results: list[Trained], config: Config) -> None:
    _plot_curves(axes, results, config, "nfe")
    axes.set(title="NFE per forward solve")
    axes.set_ylim(bottom=0)


def _plot_speed(axes: Axes, results: list[Trained]) -> None:
    """Median time of a training iteration: the solver's part, and the rest in grey."""
    bars = [(model, solver) for model in results for solver in SOLVERS]
    for y, (model, solver) in enumerate(bars):
        run = model.runs[solver]
        total, solve = run.milliseconds, run.milliseconds_of(SOLVE, GRADIENT)
        alpha = SOLVER_STYLES[solver].get("alpha", 1.0)
        axes.barh(y, solve, color=MODEL_COLORS[model.name], alpha=alpha, height=0.7)
        axes.barh(y, total - solve, left=solve, color="#999999", height=0.7)
        ratio = f" ({model.ratio:.1f}\u00d7)" if solver == "anode_fast" else ""
        axes.annotate(
            f"{total:.1f}{ratio}", (total, y), (3, 0), textcoords="offset points", va="center"
        )
    axes.set_yticks(range(len(bars)), [f"{model.name}\n{solver}" for model, solver in bars])
    axes.tick_params("y", length=0)
    axes.invert_yaxis()
    axes.margins(x=0.5)  # room for the figures beside the bars
    axes.grid(visible=False, axis="y")
    axes.set(title="Time per iteration", xlabel="median ms (grey: not the solver)")


def _plot_flow(axes: Axes, flow: Flow) -> None:
    """All points at the start, pale, and some of them on their way, the end marked."""
    axes.set_title(f"{flow.name}: flow")
    if _says_failed(axes, flow):
        return
    for mask, color, count in _classes(flow):
        axes.scatter(*flow.states[0, mask].T, color=color, s=3, alpha=0.2, linewidths=0)
        for path in flow.states[:, mask][:, :count].transpose(1, 2, 0):
            axes.plot(*path, color=color, alpha=0.55, linewidth=0.8)
        axes.scatter(*flow.states[-1, mask][:count].T, color=color, s=7, linewidths=0)


def _plot_features(axes: Axes, flow: Flow) -> None:
    """All points at the end of the flow."""
    axes.set_title(f"{flow.name}: features")
    if _says_failed(axes, flow):
        return
    for mask, color, _ in _classes(flow):
        axes.scatter(*flow.states[-1, mask].T, color=color, s=3, alpha=0.6, linewidths=0)


def _classes(flow: Flow) -> list[tuple[np.ndarray, str, int]]:
    """Points, colour, and how many trajectories to show, of either class."""
    return [(~flow.inner, OUTER, 70), (flow.inner, INNER, 35)]


def _says_failed(axes: Axes, flow: Flow) -> bool:
    """Writes the reason where the picture would be, if there is one."""
    if flow.failure:
        axes.text(0.5, 0.5, flow.failure, transform=axes.transAxes, ha="center", wrap=True)
    return bool(flow.failure)
