"""The pictures of the figures, from their summaries alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.data import ConcentricSpheres, Separable
from benchmarks.image_data import NAMES
from benchmarks.paper.registry import is_the_papers
from benchmarks.paper.settings import ANODE, OURS, THEIRS, TORCH
from benchmarks.style import INNER, MODEL_COLORS, OUTER, SOLVER_STYLES, STYLE

Summary = dict[str, Any]
Group = dict[str, Any]

DPI = 110
WIDTH, HEIGHT = 4.4, 3.3  # of axes, inches
LEAST = 1e-7  # of a loss: the lower end of a band is often below 0
WIDE = 10  # a range of losses that is drawn on a logarithmic scale
SHOWN_BEST = 8  # of a search


def draw(summary: Summary, path: Path) -> None:
    """Draws a figure into a PNG. One whose runs are all missing says so."""
    drawn = DRAWN[summary["figure"]]
    with matplotlib.rc_context(STYLE):
        figure = drawn(summary) if summary["groups"] or drawn is _data else _empty()
        figure.text(0.995, 0.005, _origin(summary), ha="right", va="bottom", fontsize=6.5)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI)


def _empty() -> Figure:
    figure = Figure(figsize=(WIDTH, HEIGHT))
    figure.text(0.5, 0.5, "nothing trained yet", ha="center")
    return figure


def _origin(summary: Summary) -> str:
    """What the data are, and at which scale: a picture travels without its caption."""
    data = "; ".join(summary["data"][:3]) + ("; ..." if len(summary["data"]) > 3 else "")
    return f"{data}   [{summary['scale']}, seed {_seed(summary)}]" if data else ""


def _seed(summary: Summary) -> int:
    return summary["groups"][0]["setting"]["seed"] if summary["groups"] else 0


# ---- curves


def panels(summary: Summary) -> dict[str, list[Group]]:
    """Groups by panel, in their order."""
    found: dict[str, list[Group]] = {}
    for group in summary["groups"]:
        found.setdefault(group["panel"], []).append(group)
    return found


def _figure(rows: int, columns: int, width: float = WIDTH, height: float = HEIGHT) -> Figure:
    """An empty figure, with room below for the line that says what the data are."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0.1 / (height * rows), 1, 1 - 0.1 / (height * rows)))
    return figure


def _title(panel: str, groups: list[Group]) -> str:
    """The panel, and what the paper's data are replaced by."""
    data = groups[0]["setting"]["data"]
    if data not in NAMES or NAMES[data].replace("-", "") == panel:
        return panel
    return f"{NAMES[data]}\nin place of {panel}"


def _colors(groups: list[Group]) -> dict[str, Any]:
    """By label: the model's own, or along a scale where labels count something."""
    labels = list(dict.fromkeys(group["label"] for group in groups))
    if all(label.split(",")[0] in MODEL_COLORS for label in labels):
        return {label: MODEL_COLORS[label.split(",")[0]] for label in labels}
    scale = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(labels)))
    return dict(zip(labels, scale, strict=True))


def _style(group: Group) -> dict[str, Any]:
    style = dict(SOLVER_STYLES.get(group["solver"], SOLVER_STYLES[OURS]))
    if "weight decay" in group["label"]:
        style["linestyle"] = "--"
    return style


def _name(group: Group, several: bool) -> str:
    """Of the label, and of the solver where there are several."""
    name = f"{group['label']}, {group['solver']}" if several else group["label"]
    return name if group["runs"] == 1 else f"{name} ({group['runs']} runs)"


def _curves(axes: Axes, groups: list[Group], quantity: str, **kw: Any) -> None:
    """Means, with a band of a standard deviation to either side."""
    colors = _colors(groups)
    several = len({group["solver"] for group in groups} - {TORCH}) > 1
    for group in sorted(groups, key=lambda group: group["solver"] != THEIRS):
        curve = group["curves"].get(quantity)
        if not curve or not curve["mean"]:
            continue
        mean, std = (np.array(curve[name], float) for name in ("mean", "std"))
        x = group["every"] * np.arange(1, len(mean) + 1)
        color, style = colors[group["label"]], _style(group)
        axes.plot(x, mean, color=color, label=_name(group, several), **{**style, **kw})
        if group["solver"] != THEIRS:
            low = np.maximum(mean - std, LEAST) if "loss" in axes.get_ylabel() else mean - std
            axes.fill_between(x, low, mean + std, color=color, alpha=0.15, linewidth=0)
    axes.set_xlabel("iteration")
    axes.set_xlim(left=0)


def _scale(axes: Axes, groups: list[Group], quantity: str) -> None:
    """Logarithmic where the means span a lot."""
    means = [x for group in groups for x in group["curves"].get(quantity, {"mean": []})["mean"]]
    found = [x for x in means if x]
    if found and max(found) > WIDE * min(found):
        axes.set_yscale("log")


def _losses(axes: Axes, groups: list[Group]) -> None:
    axes.set_ylabel("training loss")
    _scale(axes, groups, "loss")
    _curves(axes, groups, "loss")


def _evaluations(axes: Axes, groups: list[Group]) -> None:
    axes.set_ylabel("NFE of a forward solve")
    _curves(axes, groups, "nfe")
    axes.set_ylim(bottom=0)


def _loss_by_evaluations(axes: Axes, groups: list[Group]) -> None:
    """Losses over NFE, a point for each point of the curves, paler the earlier it is."""
    colors = _colors(groups)
    for group in groups:
        x, y = (np.array(group["curves"][name]["mean"], float) for name in ("nfe", "loss"))
        color = colors[group["label"]]
        if group["solver"] == THEIRS or not len(x):
            continue
        axes.plot(x, y, color=color, linewidth=0.6, alpha=0.5)
        axes.scatter(x, y, color=color, s=9, alpha=np.linspace(0.25, 1, len(x)), linewidths=0)
    axes.set(xlabel="NFE of a forward solve", ylabel="training loss")
    _scale(axes, groups, "loss")


def _drawn_by(*plots: Callable[[Axes, list[Group]], None]) -> Callable[[Summary], Figure]:
    """A row for each plot and a column for each panel; of a single panel all in a row."""

    def figure_of(summary: Summary) -> Figure:
        found = panels(summary)
        shape = (len(plots), len(found)) if len(found) > 1 else (1, len(plots))
        figure = _figure(*shape)
        grid = figure.subplots(*shape, squeeze=False).reshape(len(plots), -1)
        for column, (panel, groups) in enumerate(found.items()):
            for axes, plot in zip(grid[:, column], plots, strict=True):
                plot(axes, groups)
            grid[0, column].set_title(_title(panel, groups))
            _legend(grid[0, column])
        return figure

    return figure_of


# ---- pictures of trained nets


def _flows_in_1d(summary: Summary) -> Figure:
    """States over time from evenly spread starts, those of the data thick."""
    figure = _figure(1, len(summary["groups"]))
    row = figure.subplots(1, len(summary["groups"]), squeeze=False, sharey=True)[0]
    for axes, group in zip(row, summary["groups"], strict=True):
        loss = fmean(x for x in group["loss"] if x is not None)
        axes.set(title=f"{group['panel']}: {group['label']}, loss {loss:.2g}", ylabel="state")
        taken = group["pictures"].get("trajectories")
        if not taken:
            _says(axes, "no picture: the run failed")
            continue
        states = np.array(taken["states"])
        layered = group["solver"] == TORCH
        x = np.arange(len(states)) if layered else np.linspace(0, 1, len(states))
        if taken["field"]:
            slopes = np.array(taken["field"])
            times = np.linspace(0, 1, len(slopes))
            heights = np.linspace(states[0].min(), states[0].max(), slopes.shape[1])
            axes.quiver(
                times, heights, np.ones_like(slopes.T), slopes.T, angles="xy", color="#BBBBBB"
            )
        axes.plot(x, states[:, :-2], color="#888888", linewidth=0.7, marker="." if layered else "")
        for values, color in zip(states[:, -2:].T, (INNER, OUTER), strict=True):
            axes.plot(x, values, color=color, linewidth=2.2, marker="o" if layered else "")
        axes.set_xlabel("layer" if layered else "t")
    return figure


def _data(summary: Summary) -> Figure:
    figure = _figure(1, 2, width=HEIGHT)
    sets = {"g(x), d = 2": ConcentricSpheres(2), "separable, d = 2": Separable(2)}
    for axes, (name, data) in zip(figure.subplots(1, 2), sets.items(), strict=True):
        _scatter(axes, data.points.numpy(), data.inner.numpy(), s=3)
        axes.set(title=name, aspect="equal", xlabel="$x_1$", ylabel="$x_2$")
    return figure


def _features(summary: Summary) -> Figure:
    """A row for each panel, a column for each snapshot."""
    groups = [group for group in summary["groups"] if group["pictures"].get("features")]
    columns = max((len(group["pictures"]["features"]) for group in groups), default=1)
    side = 2.3
    figure = Figure(figsize=(side * columns, side * max(1, len(groups)) + 0.6))
    grid = figure.add_gridspec(
        max(1, len(groups)), columns, left=0.03, right=0.98, bottom=0.12, top=0.9, hspace=0.25
    )
    for row, group in enumerate(groups):
        snapshots = group["pictures"]["features"].items()
        for column, (point, taken) in enumerate(snapshots):
            states, inner = np.array(taken["states"]), np.array(taken["inner"])
            axes = _add_axes(figure, grid[row, column], states)
            _scatter(axes, states, inner, s=5)
            at = int(point) * group["every"]
            axes.set_title(f"{group['panel']}, iteration {at}" if column == 0 else f"{at}")
    _class_legend(figure)
    return figure


def _learned_flows(summary: Summary) -> Figure:
    """Points on their way: over time in 1d, in the plane, in space."""
    groups = [group for group in summary["groups"] if group["pictures"].get("flow")]
    count = max(1, len(groups))
    figure = Figure(figsize=(WIDTH * 0.85 * count, HEIGHT * 1.15))
    grid = figure.add_gridspec(1, count, left=0.05, right=0.97, bottom=0.22, top=0.9, wspace=0.3)
    for column, group in enumerate(groups):
        taken = group["pictures"]["flow"]
        states, inner = np.array(taken["states"]), np.array(taken["inner"])
        if states.shape[2] == 1:  # over time
            times = np.broadcast_to(np.linspace(0, 1, len(states))[:, None, None], states.shape)
            states = np.concatenate([times, states], 2)
            axes = figure.add_subplot(grid[column], xlabel="t", ylabel="x")
        else:
            axes = _add_axes(figure, grid[column], states.reshape(-1, states.shape[2]))
        for path, inside in zip(states.transpose(1, 2, 0), inner, strict=True):
            axes.plot(*path, color=INNER if inside else OUTER, linewidth=0.6, alpha=0.5)
        _scatter(axes, states[-1], inner, s=7)
        name = group["label"] + (", by an augmented dimension" if group["label"] == ANODE else "")
        axes.set_title(f"{group['panel']}: {name}", fontsize=9)
    _class_legend(figure)
    return figure


def _generalisation(summary: Summary) -> Figure:
    """What the nets answer all over the plane, and the losses on removed slices."""
    plane, slices = (panels(summary).get(name, []) for name in ("plane", "slices"))
    shown = [x for x in plane if x["pictures"].get("plane") and x["solver"] == OURS]
    figure = _figure(1, len(shown) + 2, width=1.1 * HEIGHT)
    widths = [1] * len(shown) + [1.15, 1.15]
    row = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
    for axes, group in zip(row, shown, strict=False):
        taken = group["pictures"]["plane"]
        edge, values = taken["edge"], np.array(taken["values"], float).T
        picture = axes.imshow(
            values, cmap="PuOr_r", vmin=-1.5, vmax=1.5, origin="lower", extent=(-edge, edge) * 2
        )
        for radius in (0.5, 1.0, 1.5):
            turn = np.linspace(0, 2 * np.pi, 200)
            axes.plot(radius * np.cos(turn), radius * np.sin(turn), color="k", linewidth=0.5)
        axes.set(title=f"{group['label']}: output", xlabel="$x_1$", ylabel="$x_2$")
        axes.grid(visible=False)
        figure.colorbar(picture, ax=axes, shrink=0.8)
    for axes, quantity, words in zip(
        row[-2:], ("loss", "validation"), ("training", "validation"), strict=True
    ):
        axes.set(ylabel=f"{words} loss", title=f"slices removed: {words}")
        _scale(axes, slices, quantity)
        _curves(axes, slices, quantity)
        _legend(axes)
    return figure


def _image_generalisation(summary: Summary) -> Figure:
    figure = _figure(1, 2)
    for axes, quantity, words in zip(
        figure.subplots(1, 2), ("loss", "validation"), ("training", "test"), strict=True
    ):
        axes.set(ylabel=f"{words} loss", title=_title(*next(iter(panels(summary).items()))))
        _curves(axes, summary["groups"], quantity)
        _legend(axes)
    return figure


def _search(summary: Summary) -> Figure:
    """Validation losses of the best settings of each model; the paper's choice marked."""
    by_panel = panels(summary)
    shape = len(by_panel) // 2, 2  # models, and d = 1 and 2
    figure = _figure(*shape, width=1.3 * WIDTH, height=0.85 * HEIGHT)
    grid = figure.subplots(*shape, squeeze=False)
    for axes, (panel, groups) in zip(grid.T.flat, by_panel.items(), strict=True):
        losses = {
            group["label"]: [x for x in group["validation"] if x is not None] for group in groups
        }
        ranked = sorted((x for x in losses.items() if x[1]), key=lambda x: fmean(x[1]))
        chosen = {group["label"] for group in groups if is_the_papers(group["setting"])}
        shown = ranked[:SHOWN_BEST] + [x for x in ranked[SHOWN_BEST:] if x[0] in chosen]
        for y, (label, values) in enumerate(shown):
            color = OUTER if label in chosen else "#888888"
            axes.plot(values, [y] * len(values), "o", color=color, markersize=3, alpha=0.6)
            axes.plot(
                *(fmean(values), y, "|"),
                **{"color": color, "markersize": 14, "markeredgewidth": 2},
                label="the paper's choice" if label in chosen else None,
            )
        axes.set_yticks(range(len(shown)), [label for label, _ in shown], fontsize=7)
        axes.invert_yaxis()
        axes.set(title=f"{panel} ({len(ranked)} tried)", xlabel="validation loss", xscale="log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        if chosen:
            _legend(axes)
    return figure


def _stability(summary: Summary) -> Figure:
    figure = _drawn_by(_losses, _evaluations)(summary)
    words = [
        f"{group['label']}: {len(group['failures'])} of {group['runs']} runs failed"
        for group in summary["groups"]
    ]
    figure.axes[-1].set_title("\n".join(words), fontsize=8)
    return figure


def _speed(summary: Summary) -> Figure:
    """Milliseconds of a training iteration of both solvers."""
    figure = _figure(1, len(panels(summary)))
    row = figure.subplots(1, len(panels(summary)), squeeze=False)[0]
    for axes, (panel, groups) in zip(row, panels(summary).items(), strict=True):
        medians = [np.median([x for x in group["ms"] if x is not None] or [0]) for group in groups]
        for y, (group, ms) in enumerate(zip(groups, medians, strict=True)):
            alpha = SOLVER_STYLES[group["solver"]].get("alpha", 1.0)
            axes.barh(y, ms, color=MODEL_COLORS[group["label"]], alpha=alpha, height=0.7)
            nfe = fmean([x for x in group["nfe"] if x is not None] or [0])
            axes.annotate(
                f"{ms:.4g} ms, NFE {nfe:.3g}",
                (ms, y),
                (3, 0),
                textcoords="offset points",
                va="center",
            )
        axes.set_yticks(range(len(groups)), [f"{x['label']}\n{x['solver']}" for x in groups])
        axes.invert_yaxis()
        axes.margins(x=0.6)  # room for the figures beside the bars
        axes.grid(visible=False, axis="y")
        axes.set(title=_title(panel, groups), xlabel="median ms of a training iteration")
    return figure


# ---- parts of them


def _add_axes(figure: Figure, position: Any, points: np.ndarray) -> Axes:
    """Axes for points of one to three dimensions."""
    if points.shape[1] < 3:
        axes = figure.add_subplot(position)
        if points.shape[1] == 2:
            axes.set_aspect("equal", adjustable="datalim")
        axes.locator_params(nbins=4)
        axes.tick_params(labelsize=7)
        return axes
    axes = figure.add_subplot(position, projection="3d")
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.pane.set_facecolor("#F7F7F7")
        axis.set_ticklabels([])
    axes.view_init(elev=18, azim=-60)
    return axes


def _scatter(axes: Axes, points: np.ndarray, inner: np.ndarray, **kw: Any) -> None:
    if points.shape[1] == 1:  # on a line: the classes a little apart
        points = np.concatenate([points, np.where(inner, -0.1, 0.1)[:, None]], 1)
        axes.set_ylim(-1, 1)
    for mask, color in ((~inner, OUTER), (inner, INNER)):
        axes.scatter(*points[mask].T, color=color, alpha=0.7, linewidths=0, **kw)


def _class_legend(figure: Figure) -> None:
    labels = {INNER: "target $-1$", OUTER: "target $+1$"}
    dots = [Line2D([], [], marker="o", linestyle="", color=color) for color in labels]
    figure.legend(dots, labels.values(), loc="lower left", ncols=2, fontsize=8)


def _legend(axes: Axes) -> None:
    """Of the lines, where there are any: all runs may have failed at once."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    else:
        _says(axes, "no run got to its first point")


def _says(axes: Axes, words: str) -> None:
    axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", wrap=True)


DRAWN: dict[str, Callable[[Summary], Figure]] = {
    "3": _flows_in_1d,
    "4": _data,
    "5": _drawn_by(_losses),
    "6": _features,
    "7": _drawn_by(_evaluations),
    "8": _drawn_by(_losses),
    "9": _learned_flows,
    "10": _features,
    "11": _drawn_by(_evaluations),
    "12": _generalisation,
    "13": _drawn_by(_losses, _loss_by_evaluations),
    "14": _drawn_by(_losses, _loss_by_evaluations),
    "15": _drawn_by(_losses, _evaluations),
    "16": _image_generalisation,
    "17": _stability,
    "search": _search,
    "speed": _speed,
}
