"""What the paper claims, and what the summaries of our runs say to each claim.

A claim's check sees the summaries, by figure, and answers whether the claim held and with which
numbers; or it raises `NotRun`, with the reason. Thresholds are ours wherever the paper gives no
number; they stand in the criterion, so that a reader can judge them too.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from anode_fast import ConvODENet
from benchmarks.paper.settings import ANODE, NODE, OURS, RESNET, THEIRS, TORCH

HELD, NOT_HELD, NOT_RUN = "held", "not held", "not run"
TOY, IMAGES, SOLVER = "toy", "images", "solver"
MNIST, CIFAR10 = "MNIST", "CIFAR10"
SYNTHETIC = "synthetic"  # short name of the images that are made up
DIMS = (1, 2)
FIGURES = (*(str(number) for number in range(3, 18)), "search", "speed")

FITTED, UNFITTED = 0.05, 0.5  # losses of toy data, whose targets are -1 and 1
COMPARED = 0.1  # the loss to which toy models are timed, in epochs
SMOOTH = 5  # points of an image's curve whose median is taken

Summary = Mapping[str, Any]
Summaries = Mapping[str, Summary]
"""By figure."""
Group = Mapping[str, Any]
Answer = tuple[bool, str]
"""Whether a claim held, and what was measured, in a sentence."""


class NotRun(Exception):
    """Why a claim cannot be judged."""


@dataclass(frozen=True)
class Finding:
    """What our runs say to a claim.

    Attributes:
        verdict: "held", "not held" or "not run".
        measured: The numbers, or why there are none.
        data: What the figures' runs were trained on, in words.
        machine: What they ran on.
        scale: Of the figures: "smoke", "reduced", "full", or several.
        synthetic: Whether synthetic data are among them.
    """

    verdict: str
    measured: str
    data: str = ""
    machine: str = ""
    scale: str = ""
    synthetic: bool = False


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, or of ours about the solver.

    Attributes:
        id: Short, for links.
        kind: "toy", "images" or "solver".
        title: In a few words.
        paper: What the paper says, in our words.
        criterion: When it counts as held.
        figures: Whose runs it is judged by; none if it is computed without any.
        check: Answers whether it held, and with which numbers.
        panels: Of the figures, the panels that it is about; none if it is about all.
    """

    id: str
    kind: str
    title: str
    paper: str
    criterion: str
    figures: tuple[str, ...]
    check: Callable[[Summaries], Answer]
    panels: tuple[str, ...] = ()

    def judge(self, summaries: Summaries) -> Finding:
        """What the summaries say to it."""
        try:
            held, measured = self.check(summaries)
        except NotRun as reason:
            return Finding(NOT_RUN, f"{reason}.")
        verdict = HELD if held else NOT_HELD
        used = [summaries[figure] for figure in self.figures if figure in summaries]
        if not used:
            return Finding(verdict, measured, "no data: computed", "any machine")
        trained_on = [data_of(one, self.panels) for one in used]
        return Finding(
            verdict,
            measured,
            "; ".join(distinct(name for names, _ in trained_on for name in names)),
            "; ".join(distinct(name for one in used for name in one["machines"])),
            ", ".join(distinct(one["scale"] for one in used)),
            any(synthetic for _, synthetic in trained_on),
        )


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


# ---- reading summaries


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


# ---- saying what was found


def _runs(group: Group) -> str:
    failed = len(group["failures"])
    count = f"{group['runs']} run{'s' * (group['runs'] != 1)}"
    return f"{count}, {failed} of them failed" if failed else count


def _runs_of(a: Group, b: Group) -> str:
    return f"{_runs(a)} each" if _runs(a) == _runs(b) else f"{_runs(a)} and {_runs(b)}"


def _said(group: Group, name: str) -> str:
    """The spread over a group's repetitions, with its label."""
    return f"{group['label']} {spread(group, name)} ({_runs(group)})"


def _growth(group: Group) -> Spread:
    """NFE at the end over NFE at the start."""
    found = ratio(group, {**group, "nfe": group["nfe_at_start"]}, "nfe")
    if found is None:
        raise NotRun(f"No run of {group['label']} ({group['panel']}) came to a first point")
    return found


def _epochs(group: Group, target: float) -> float:
    """Until the mean loss of toy data is at or below a target; inf if it never is."""
    spread(group, "loss")  # raises where there is nothing to look at
    index = reached(curve(group, "loss"), target)
    return math.inf if index is None else index + 1


def _said_epochs(group: Group, target: float) -> str:
    epochs = _epochs(group, target)
    if epochs < math.inf:
        return f"{epochs} epoch{'s' * (epochs != 1)}"
    return f"not within {len(curve(group, 'loss'))} epochs"


# ---- toy data


def _flow(
    summaries: Summaries, panel: str, label: str, low: float = 0.0, high: float = math.inf
) -> Answer:
    group = group_of(summaries, "3", panel, label)
    return low <= spread(group, "loss").mean <= high, f"Final loss: {_said(group, 'loss')}."


def _node_cannot(summaries: Summaries) -> Answer:
    node, resnet = (group_of(summaries, "5", _g(1), label) for label in (NODE, RESNET))
    held = spread(node, "loss").mean >= UNFITTED and spread(resnet, "loss").mean <= FITTED
    return held, f"Final loss: {_said(node, 'loss')}, {_said(resnet, 'loss')}."


def _node_struggles(summaries: Summaries) -> Answer:
    node, resnet = (group_of(summaries, "5", _g(2), label) for label in (NODE, RESNET))
    slower = _epochs(node, COMPARED) >= 1.5 * _epochs(resnet, COMPARED)
    return slower and _epochs(node, COMPARED) < math.inf, (
        f"To a loss of {COMPARED}: NODE {_said_epochs(node, COMPARED)}, ResNet "
        f"{_said_epochs(resnet, COMPARED)}. Final loss: {_said(node, 'loss')}, "
        f"{_said(resnet, 'loss')}."
    )


def _separable(summaries: Summaries, dim: int) -> Answer:
    hard = group_of(summaries, "5", _g(dim), NODE)
    easy = group_of(summaries, "5", f"separable, d = {dim}", NODE)
    learned = [sum(x <= COMPARED for x in values(group, "loss")) for group in (easy, hard)]
    faster = _epochs(easy, COMPARED) < _epochs(hard, COMPARED)
    return learned[0] > learned[1] or (learned[0] == learned[1] and faster), (
        f"{learned[0]} of {_runs(easy)} end at {COMPARED} or less on separable data, {learned[1]} "
        f"of {_runs(hard)} on g(x). The mean loss gets there: {_said_epochs(easy, COMPARED)}, "
        f"{_said_epochs(hard, COMPARED)}. Final loss: {spread(easy, 'loss')}, "
        f"{spread(hard, 'loss')}."
    )


def _nfe_grows(summaries: Summaries, dim: int) -> Answer:
    node = group_of(summaries, "7", _g(dim), NODE)
    growth = _growth(node)
    return growth.mean >= 1.25, (
        f"NFE of the first epoch {spread(node, 'nfe_at_start')}, of the last "
        f"{spread(node, 'nfe')}: {growth} times as many ({_runs(node)})."
    )


def _anode_fits(summaries: Summaries, dim: int) -> Answer:
    node, anode = (group_of(summaries, "8", _g(dim), label) for label in (NODE, ANODE))
    loss = spread(anode, "loss").mean
    held = loss <= FITTED and loss < spread(node, "loss").mean
    return held, f"Final loss: {_said(node, 'loss')}, {_said(anode, 'loss')}."


def _anode_faster(summaries: Summaries, dim: int) -> Answer:
    node, anode = (group_of(summaries, "8", _g(dim), label) for label in (NODE, ANODE))
    ours = _epochs(anode, COMPARED)
    return ours < math.inf and ours <= _epochs(node, COMPARED) / 2, (
        f"To a loss of {COMPARED}: NODE {_said_epochs(node, COMPARED)}, ANODE "
        f"{_said_epochs(anode, COMPARED)} ({_runs(anode)})."
    )


def _nfe_flat(summaries: Summaries, dim: int) -> Answer:
    node, anode = (group_of(summaries, "11", _g(dim), label) for label in (NODE, ANODE))
    held = _growth(node).mean >= 1.5 and _growth(anode).mean <= 1.25
    said = (
        f"{x['label']} {_growth(x)} times, from {spread(x, 'nfe_at_start')} to {spread(x, 'nfe')} "
        f"({_runs(x)})"
        for x in (node, anode)
    )
    return held, f"Growth of the NFE: {', '.join(said)}."


def _slices(summaries: Summaries) -> Answer:
    node, anode = (group_of(summaries, "12", "slices", label) for label in (NODE, ANODE))
    theirs, ours = (spread(group, "validation").mean for group in (node, anode))
    return ours <= 0.1 and theirs >= 3 * ours, (
        f"Validation loss: {_said(node, 'validation')}, {_said(anode, 'validation')}; training "
        f"loss: NODE {spread(node, 'loss')}, ANODE {spread(anode, 'loss')}."
    )


CHOICES = {"batch": 64, "learning_rate": 1e-3, "hidden": 32}
"""The best parameters of every model, says appendix E."""
OWN_CHOICES = {NODE: {}, ANODE: {"augment": 5}, RESNET: {"layers": 5}}
"""Of one model."""


def _search(summaries: Summaries, model: str, dim: int) -> Answer:
    if "search" not in summaries:
        raise NotRun("The search has not been made")
    solver = TORCH if model == RESNET else OURS
    groups = [
        group
        for group in summaries["search"]["groups"]
        if (group["setting"]["model"], group["setting"]["dim"]) == (model, dim)
        and group["solver"] == solver
    ]
    wanted = CHOICES | OWN_CHOICES[model]
    names = list(wanted)
    chosen = next((x for x in groups if all(x["setting"][k] == v for k, v in wanted.items())), None)
    if chosen is None:
        raise NotRun(f"The search has not tried the paper's choice for {model}, d = {dim}")
    # A mean over the folds that went well would flatter a setting that often fails.
    whole = [x for x in groups if len(values(x, "validation")) == len(x["validation"]) > 0]
    if chosen not in whole:
        return False, f"A fold of the paper's choice failed ({_runs(chosen)})."
    ranked = sorted(whole, key=lambda group: spread(group, "validation").mean)
    best = spread(ranked[0], "validation")
    paper = spread(chosen, "validation")
    if chosen is ranked[0]:
        said = f"The paper's choice is the best of {len(groups)}: validation loss {best}"
    else:
        ours = ", ".join(f"{k.replace('_', ' ')} {number(ranked[0]['setting'][k])}" for k in names)
        near = "within" if paper.mean <= best.mean + best.std else "not within"
        said = (
            f"Best of {len(groups)}: {ours}, validation loss {best}. The paper's choice is number "
            f"{ranked.index(chosen) + 1}, {paper}: {near} one standard deviation of the best"
        )
    left_out = len(groups) - len(whole)
    lost = f"; {left_out} with a failed fold left out" if left_out else ""
    return paper.mean <= best.mean + best.std, f"{said} ({best.count} folds{lost})."


def _g(dim: int) -> str:
    return f"g(x), d = {dim}"


# ---- images

COUNTS = (
    (MNIST, NODE, (1, 28, 28), 92, 0, 84_395),
    (MNIST, ANODE, (1, 28, 28), 64, 5, 84_816),
    (CIFAR10, NODE, (3, 32, 32), 125, 0, 172_358),
    (CIFAR10, ANODE, (3, 32, 32), 64, 10, 171_799),
)
"""Data, model, size of an image, filters, augmented channels, parameters; from appendix E."""


def _counts(summaries: Summaries) -> Answer:
    said, held = [], True
    for data, model, size, filters, augment, paper in COUNTS:
        net = ConvODENet(size, filters, 10, augment, time_dependent=False)
        count = sum(weights.numel() for weights in net.parameters())
        held &= count == paper
        said.append(f"{data} {model} {count:,} (paper: {paper:,})")
    return held, f"{'; '.join(said)}."


def _faster_on_images(summaries: Summaries, panel: str, factor: float) -> Answer:
    node, anode = (group_of(summaries, "13", panel, label) for label in ("p = 0", "p = 10"))
    theirs, ours = (smooth(curve(group, "loss")) for group in (node, anode))
    target = lowest(theirs)
    at_theirs, at_ours = reached(theirs, target), reached(ours, target)
    if at_theirs is None:
        raise NotRun(f"No run without augmentation ({panel}) came to a first point")
    made = node["every"] * (at_theirs + 1)
    said = f"The lowest loss without augmentation, {number(target)}, took {made:,} iterations"
    if at_ours is None:
        lost = f"p = 10 came down to {number(lowest(ours))} only"
        return False, f"{said}; {lost} ({_runs_of(node, anode)})."
    needed = anode["every"] * (at_ours + 1)
    return made / needed >= factor / 2, (
        f"{said}, with p = 10 it took {needed:,}: {number(made / needed)} times fewer "
        f"({_runs_of(node, anode)})."
    )


def _nfe_at_equal_loss(summaries: Summaries, panel: str) -> Answer:
    groups = [group_of(summaries, "13", panel, label) for label in ("p = 0", "p = 10")]
    losses = [smooth(curve(group, "loss")) for group in groups]
    target = max(map(lowest, losses))
    at = [reached(points, target) for points in losses]
    if not all(math.isfinite(lowest(points)) for points in losses):
        raise NotRun(f"Not both models of {panel} came to a first point")
    nfe = [smooth(curve(group, "nfe"))[i or 0] for group, i in zip(groups, at, strict=True)]
    return nfe[0] >= 1.5 * nfe[1], (
        f"At a loss of {number(target)}, the lowest that both reach: NFE {number(nfe[0])} without "
        f"augmentation, {number(nfe[1])} with p = 10: {number(nfe[0] / nfe[1])} times as many "
        f"({_runs_of(*groups)})."
    )


def _equal_parameters(summaries: Summaries, panel: str) -> Answer:
    node, anode = (group_of(summaries, "14", panel, label) for label in (NODE, ANODE))
    held = all(spread(anode, x).mean < spread(node, x).mean for x in ("loss", "nfe"))
    return held, (
        f"Final loss: {_said(node, 'loss')}, {_said(anode, 'loss')}. NFE at the end: NODE "
        f"{spread(node, 'nfe')}, ANODE {spread(anode, 'nfe')}. Parameters: {node['parameters']:,} "
        f"and {anode['parameters']:,}."
    )


def _decayed(label: str) -> str:
    return f"{label}, weight decay"


def _lowest_nfe(summaries: Summaries) -> Answer:
    labels = (_decayed(ANODE), ANODE, _decayed(NODE), NODE)
    groups = [group_of(summaries, "15", MNIST, label) for label in labels]
    ours, *others = (spread(group, "nfe").mean for group in groups)
    return ours < min(others), f"NFE at the end: {'; '.join(_said(x, 'nfe') for x in groups)}."


def _price_of_decay(summaries: Summaries) -> Answer:
    decayed, plain = (group_of(summaries, "15", MNIST, x) for x in (_decayed(ANODE), ANODE))
    factor = spread(decayed, "loss").mean / spread(plain, "loss").mean
    return 1 <= factor <= 2, (
        f"Final loss: {_said(decayed, 'loss')}; {_said(plain, 'loss')}: {number(factor)} times."
    )


def _beats_decay(summaries: Summaries) -> Answer:
    node, anode = (group_of(summaries, "15", MNIST, x) for x in (_decayed(NODE), ANODE))
    held = all(spread(anode, x).mean < spread(node, x).mean for x in ("loss", "nfe"))
    return held, (
        f"Final loss: {_said(anode, 'loss')}; {_said(node, 'loss')}. NFE at the end: "
        f"{spread(anode, 'nfe')} and {spread(node, 'nfe')}."
    )


def _validation(summaries: Summaries) -> Answer:
    found, said = [], []
    for label in (NODE, ANODE):
        group = group_of(summaries, "16", CIFAR10, label)
        points, deviations = (curve(group, "validation", part) for part in ("mean", "std"))
        least = lowest(points)
        if not math.isfinite(least):
            raise NotRun(f"No run of {label} (CIFAR10) has a validation loss")
        best = Spread(least, deviations[points.index(least)], group["runs"])
        found.append(least)
        said.append(f"{label} {best}, at the end {spread(group, 'validation')} ({_runs(group)})")
    return found[1] < found[0], f"Lowest point of the mean validation loss: {'; '.join(said)}."


SEVERAL_HUNDRED = 200


def _signs(group: Group) -> list[str]:
    """Of instability: what happened to a group's runs."""
    least = lowest(curve(group, "loss"))
    failed = {failure["repeat"] for failure in group["failures"]}
    exploded = sum(
        i not in failed and (loss is None or loss > 10 * least)
        for i, loss in enumerate(group["loss"])
    )
    signs = [f"{len(failed)} failed"] if failed else []
    signs += [f"{exploded} ended with an exploded loss"] if exploded else []
    return signs + (["several hundred NFE"] if _most_nfe(group) >= SEVERAL_HUNDRED else [])


def _most_nfe(group: Group) -> float:
    known = [x for x in curve(group, "nfe") if math.isfinite(x)] + values(group, "nfe")
    return max(known, default=0.0)


def _stability(summaries: Summaries, label: str) -> Answer:
    group = group_of(summaries, "17", MNIST, label)
    signs = _signs(group)
    most = number(_most_nfe(group))
    found = f"of {_runs(group).split(',')[0]}: {', '.join(signs) or 'no sign of instability'}"
    loss = f"; final loss {spread(group, 'loss')}" if values(group, "loss") else ""
    return bool(signs) == (label == NODE), f"{label}, {found}. Most NFE of a point {most}{loss}."


# ---- the solver


def _parity(summaries: Summaries) -> Answer:
    found: dict[tuple[str, str], Mapping[str, int]] = {}  # figures share runs
    for summary in summaries.values():
        for group in summary["groups"]:
            key = (json.dumps(group["setting"], sort_keys=True), group["solver"])
            batches = (group.get("parity") or {}).get("batches", 0)
            if batches > found.get(key, {"batches": 0})["batches"]:
                found[key] = group["parity"]
    batches, equal = (sum(one[name] for one in found.values()) for name in ("batches", "equal"))
    if not batches:
        raise NotRun("No trained net has been solved by both")
    largest = max(one["largest_difference"] for one in found.values())
    differing = f"; the largest difference is {largest}" if equal < batches else ""
    return 200 * (batches - equal) <= batches, (
        f"{equal:,} of {batches:,} batches equal, of {len(found)} trained settings{differing}."
    )


def _speed_pairs(summaries: Summaries) -> list[tuple[Group, Group]]:
    found = list(pairs(summaries["speed"])) if "speed" in summaries else []
    if not found:
        raise NotRun("Nothing has been trained by turns with torchdiffeq (figure speed)")
    return found


def _same_start(summaries: Summaries) -> Answer:
    said, differences = [], []
    for ours, theirs in _speed_pairs(summaries):
        first = [curve(group, "loss")[:1] for group in (ours, theirs)]
        if all(first):
            a, b = first[0][0], first[1][0]
            differences.append(abs(a - b) / abs(b) if b else math.inf)
            said.append(f"{_name(ours)} {differences[-1]:.2%}")
    if not differences:
        raise NotRun("No training by turns came to a first point")
    return max(differences) < 0.02, f"Relative difference: {'; '.join(said)}."


def _faster_solver(summaries: Summaries) -> Answer:
    said, ratios = [], []
    for ours, theirs in _speed_pairs(summaries):
        found = ratio(theirs, ours, "ms")
        if found is not None:
            ratios.append(found.mean)
            nfe = " and ".join(number(mean_nfe(group)) for group in (ours, theirs))
            said.append(f"{_name(ours)} {found} times (NFE {nfe}; {_runs(ours)})")
    if not ratios:
        raise NotRun("No training by turns came to a first point")
    return min(ratios) > 1, f"torchdiffeq's time over ours: {'; '.join(said)}."


def mean_nfe(group: Group) -> float:
    """Forward evaluations of an iteration, over the whole training; nan if there was none."""
    known = [point for point in curve(group, "nfe") if math.isfinite(point)]
    return statistics.fmean(known) if known else math.nan


def _name(group: Group) -> str:
    return f"{group['label']} on {group['panel']}:"


# ---- the claims

CLAIMS: tuple[Claim, ...] = (
    Claim(
        "flow-identity",
        TOY,
        "A flow learns the identity",
        "The flow of an ODE easily learns the identity in one dimension (section 3, figure 3).",
        f"Mean final loss of the NODE at most {FITTED}.",
        ("3",),
        partial(_flow, panel="identity", label=NODE, high=FITTED),
    ),
    Claim(
        "flow-crossing",
        TOY,
        "A flow cannot swap 1 and -1",
        "Trajectories cannot cross, so the flow cannot represent g_1d and maps every point to 0 "
        "(proposition 1, figure 3). The loss of that is 1.",
        "Mean final loss of the NODE between 0.9 and 1.1.",
        ("3",),
        partial(_flow, panel="g_1d", label=NODE, low=0.9, high=1.1),
    ),
    Claim(
        "resnet-crossing",
        TOY,
        "A ResNet can",
        "A ResNet makes discrete jumps, so its trajectories can cross and it represents g_1d "
        "(section 3, figure 3).",
        f"Mean final loss of the ResNet at most {FITTED}.",
        ("3",),
        partial(_flow, panel="g_1d", label=RESNET, high=FITTED),
    ),
    Claim(
        "node-cannot-1d",
        TOY,
        "NODE cannot fit g(x) in d = 1",
        "In d = 1 the ResNet easily fits g(x), the NODE cannot approximate it (figure 5).",
        f"Mean final loss of the ResNet at most {FITTED}, of the NODE at least {UNFITTED}. No "
        "monotone function of x, which is all it can learn, has a loss far below 2/3.",
        ("5",),
        _node_cannot,
        (_g(1),),
    ),
    Claim(
        "node-struggles-2d",
        TOY,
        "NODE struggles with g(x) in d = 2",
        "In d = 2 the NODE approximates g(x) in the end, but struggles compared to the ResNet "
        "(figure 5).",
        f"The mean loss of the NODE gets to {COMPARED}, in at least 1.5 times the ResNet's epochs.",
        ("5",),
        _node_struggles,
        (_g(2),),
    ),
    *(
        Claim(
            f"separable-{dim}d",
            TOY,
            f"Separable data are easier, d = {dim}",
            "The NODE has less trouble with data that can be separated without tearing the space "
            "apart (figure 5).",
            f"More of the NODE's runs end at a loss of at most {COMPARED} than on g(x), or as many "
            "and the mean loss gets there in fewer epochs.",
            ("5",),
            partial(_separable, dim=dim),
            (_g(dim), f"separable, d = {dim}"),
        )
        for dim in DIMS
    ),
    *(
        Claim(
            f"node-nfe-{dim}d",
            TOY,
            f"NODE's NFE grows, d = {dim}",
            "As training goes on, the NODE needs more and more function evaluations (figure 7).",
            "NFE of the last epoch over that of the first at least 1.25, on average.",
            ("7",),
            partial(_nfe_grows, dim=dim),
            (_g(dim),),
        )
        for dim in DIMS
    ),
    *(
        Claim(
            f"anode-fits-{dim}d",
            TOY,
            f"ANODE fits g(x), d = {dim}",
            "ANODEs fit the functions that NODEs cannot (figure 8).",
            f"Mean final loss of the ANODE at most {FITTED}, and below the NODE's.",
            ("8",),
            partial(_anode_fits, dim=dim),
            (_g(dim),),
        )
        for dim in DIMS
    ),
    *(
        Claim(
            f"anode-faster-{dim}d",
            TOY,
            f"ANODE learns g(x) faster, d = {dim}",
            "ANODEs learn much faster than NODEs, though their input is wider (figure 8).",
            f"The mean loss of the ANODE gets to {COMPARED} in at most half of the NODE's epochs.",
            ("8",),
            partial(_anode_faster, dim=dim),
            (_g(dim),),
        )
        for dim in DIMS
    ),
    *(
        Claim(
            f"anode-nfe-{dim}d",
            TOY,
            f"ANODE's NFE hardly grows, d = {dim}",
            "While training on g(x), the NFE of the ANODE hardly increases; that of the NODE "
            "nearly doubles (figure 11).",
            "NFE of the last epoch over that of the first, on average: NODE at least 1.5, ANODE at "
            "most 1.25.",
            ("11",),
            partial(_nfe_flat, dim=dim),
            (_g(dim),),
        )
        for dim in DIMS
    ),
    Claim(
        "slices",
        TOY,
        "ANODE generalises to removed slices",
        "On slices of the plane that were held out, the validation loss of the ANODE is nearly 0; "
        "the NODE has a large generalisation gap (figure 12).",
        "Mean final validation loss of the ANODE at most 0.1, of the NODE at least 3 times that.",
        ("12",),
        _slices,
    ),
    *(
        Claim(
            f"search-{model.lower()}-{dim}d",
            TOY,
            f"Best parameters of the {model}, d = {dim}",
            "The search finds batches of 64, a learning rate of 1e-3 and a hidden dimension of 32 "
            f"best{extra} (appendix E).",
            "Of all settings the paper's has the lowest mean validation loss, or is within one "
            "standard deviation (of the best one's folds) of it.",
            ("search",),
            partial(_search, model=model, dim=dim),
            (f"{model}, d = {dim}",),
        )
        for model, extra in (
            (NODE, ""),
            (ANODE, ", with 5 augmented dimensions"),
            (RESNET, ", with 5 layers"),
        )
        for dim in DIMS
    ),
    Claim(
        "parameters",
        IMAGES,
        "Parameter counts",
        "Equal numbers of parameters: MNIST 84,395 (NODE, 92 filters) and 84,816 (ANODE, 64 "
        "filters, p = 5); CIFAR10 172,358 (NODE, 125) and 171,799 (ANODE, 64, p = 10) "
        "(appendix E).",
        "Exactly these counts, of fields that do not see the time: with it they have more.",
        (),
        _counts,
    ),
    *(
        Claim(
            f"iterations-{panel.lower()}",
            IMAGES,
            f"ANODE needs fewer iterations, {panel}",
            f"With 10 augmented channels the same loss takes about {factor} times fewer iterations "
            "(section 5.2, figure 13).",
            f"At least {number(factor / 2)} times fewer, to the lowest loss of p = 0. Mean loss "
            f"curves, running median of {SMOOTH} points.",
            ("13",),
            partial(_faster_on_images, panel=panel, factor=factor),
            (panel,),
        )
        for panel, factor in ((MNIST, 10), (CIFAR10, 5))
    ),
    *(
        Claim(
            f"nfe-at-loss-{panel.lower()}",
            IMAGES,
            f"Half the NFE at equal loss, {panel}",
            words,
            "At the lowest loss that both reach, p = 0 has at least 1.5 times the NFE of p = 10. "
            f"Mean curves, running median of {SMOOTH} points.",
            ("13",),
            partial(_nfe_at_equal_loss, panel=panel),
            (panel,),
        )
        for panel, words in (
            (MNIST, "On MNIST as on CIFAR10, half the NFE serves for equal losses (figure 13)."),
            (CIFAR10, "For a loss of 0.8 the NODE takes about 100 NFE, ANODEs 50 (figure 13)."),
        )
    ),
    *(
        Claim(
            f"equal-parameters-{panel.lower()}",
            IMAGES,
            f"ANODE uses parameters better, {panel}",
            "With as many parameters, the ANODE has lower losses and fewer NFE than the NODE "
            "(figure 14).",
            "Mean final loss and mean NFE at the end are both below the NODE's.",
            ("14",),
            partial(_equal_parameters, panel=panel),
            (panel,),
        )
        for panel in (MNIST, CIFAR10)
    ),
    Claim(
        "decay-nfe",
        IMAGES,
        "Weight decay and augmentation: lowest NFE",
        "Weight decay together with augmentation has the lowest NFE (figure 15).",
        "Mean NFE at the end of ANODE with weight decay is the lowest of the four.",
        ("15",),
        _lowest_nfe,
    ),
    Claim(
        "decay-loss",
        IMAGES,
        "Weight decay and augmentation: slightly higher loss",
        "That comes at the cost of a slightly higher loss (figure 15).",
        "Mean final loss of ANODE with weight decay 1 to 2 times that of ANODE alone.",
        ("15",),
        _price_of_decay,
    ),
    Claim(
        "decay-node",
        IMAGES,
        "ANODE beats NODE with weight decay",
        "ANODEs outperform NODEs even when these use weight decay (figure 15).",
        "Mean final loss and mean NFE at the end of ANODE alone are both below those of NODE with "
        "weight decay.",
        ("15",),
        _beats_decay,
    ),
    Claim(
        "validation-cifar10",
        IMAGES,
        "ANODE generalises better on images",
        "Both overfit CIFAR10, but the ANODE has the lower validation loss: 1.18 against 1.34 "
        "(figure 16).",
        "The lowest point of the mean validation loss is lower for the ANODE.",
        ("16",),
        _validation,
    ),
    *(
        Claim(
            f"overfitting-{label.lower()}",
            IMAGES,
            title,
            words,
            f"{wanted}: a run failed, or ended with a loss over 10 times the lowest of the mean "
            f"curve, or the mean NFE of a point was {SEVERAL_HUNDRED} or more.",
            ("17",),
            partial(_stability, label=label),
        )
        for label, title, wanted, words in (
            (
                NODE,
                "NODE is unstable when overfitting",
                "At least one sign of instability",
                "NODEs that overfit MNIST become unstable: solves fail by underflow or by the cap "
                "of 1000 NFE, losses explode, flows need several hundred NFE (figure 17).",
            ),
            (
                ANODE,
                "ANODE is stable when overfitting",
                "No sign of instability",
                "ANODEs train stably to low losses with low NFE, even when they overfit "
                "(figure 17).",
            ),
        )
    ),
    Claim(
        "nfe-parity",
        SOLVER,
        "NFE equals torchdiffeq's",
        "Not in the paper, which used torchdiffeq: its NFE can only be compared with ours if both "
        "solvers take the same steps.",
        "At the trained weights, batch by batch, the NFE of at most 1 in 200 batches differs: the "
        "error ratio of a step can be within float32 rounding of 1.",
        FIGURES,
        _parity,
    ),
    Claim(
        "same-losses",
        SOLVER,
        "Losses equal torchdiffeq's",
        "Not in the paper: from the same weights on the same batches, both solvers train alike.",
        "The first points of the mean loss curves differ by less than 2 %, for every model.",
        ("speed",),
        _same_start,
    ),
    Claim(
        "faster",
        SOLVER,
        "Training is faster than with torchdiffeq",
        "Not in the paper: anode_fast's reason to be.",
        "torchdiffeq's median time of an iteration over ours is above 1 for every model; the "
        "trainings take turns in one process. NFE: forward, mean of both trainings.",
        ("speed",),
        _faster_solver,
    ),
)
