"""What the summaries of our runs say to each claim of the paper.

A check sees the summaries, by figure, and answers whether the claim held and with which numbers;
or it raises `NotRun`, with the reason.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from anode_fast import ConvODENet
from benchmarks.image_data import NAMES
from benchmarks.paper.reading import (
    Group,
    NotRun,
    Spread,
    Summaries,
    curve,
    group_of,
    lowest,
    mean_nfe,
    number,
    pairs,
    ratio,
    reached,
    smooth,
    spread,
    values,
)
from benchmarks.paper.registry import CHOICES, CIFAR10, MNIST, OWN_CHOICES, is_the_papers
from benchmarks.paper.settings import ANODE, NODE, OURS, RESNET, TORCH

FITTED, UNFITTED = 0.05, 0.5  # losses of toy data, whose targets are -1 and 1
COMPARED = 0.1  # the loss to which toy models are timed, in epochs

Answer = tuple[bool, str]
"""Whether a claim held, and what was measured, in a sentence."""


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


def flow(
    summaries: Summaries, panel: str, label: str, low: float = 0.0, high: float = math.inf
) -> Answer:
    """Figure 3: the final loss lies in a range."""
    group = group_of(summaries, "3", panel, label)
    return low <= spread(group, "loss").mean <= high, f"Final loss: {_said(group, 'loss')}."


def node_cannot(summaries: Summaries) -> Answer:
    """Figure 5, d = 1: the ResNet fits g(x), the NODE does not."""
    node, resnet = (group_of(summaries, "5", g_in(1), label) for label in (NODE, RESNET))
    held = spread(node, "loss").mean >= UNFITTED and spread(resnet, "loss").mean <= FITTED
    return held, f"Final loss: {_said(node, 'loss')}, {_said(resnet, 'loss')}."


def node_struggles(summaries: Summaries) -> Answer:
    """Figure 5, d = 2: the NODE takes more epochs than the ResNet."""
    node, resnet = (group_of(summaries, "5", g_in(2), label) for label in (NODE, RESNET))
    slower = _epochs(node, COMPARED) >= 1.5 * _epochs(resnet, COMPARED)
    return slower and _epochs(node, COMPARED) < math.inf, (
        f"To a loss of {COMPARED}: NODE {_said_epochs(node, COMPARED)}, ResNet "
        f"{_said_epochs(resnet, COMPARED)}. Final loss: {_said(node, 'loss')}, "
        f"{_said(resnet, 'loss')}."
    )


def separable(summaries: Summaries, dim: int) -> Answer:
    """Figure 5: the NODE has less trouble with separable data than with g(x)."""
    hard = group_of(summaries, "5", g_in(dim), NODE)
    easy = group_of(summaries, "5", f"separable, d = {dim}", NODE)
    learned = [sum(x <= COMPARED for x in values(group, "loss")) for group in (easy, hard)]
    faster = _epochs(easy, COMPARED) < _epochs(hard, COMPARED)
    return learned[0] > learned[1] or (learned[0] == learned[1] and faster), (
        f"{learned[0]} of {_runs(easy)} end at {COMPARED} or less on separable data, {learned[1]} "
        f"of {_runs(hard)} on g(x). The mean loss gets there: {_said_epochs(easy, COMPARED)}, "
        f"{_said_epochs(hard, COMPARED)}. Final loss: {spread(easy, 'loss')}, "
        f"{spread(hard, 'loss')}."
    )


def nfe_grows(summaries: Summaries, dim: int) -> Answer:
    """Figure 7: a NODE's NFE grows."""
    node = group_of(summaries, "7", g_in(dim), NODE)
    growth = _growth(node)
    return growth.mean >= 1.25, (
        f"NFE of the first epoch {spread(node, 'nfe_at_start')}, of the last "
        f"{spread(node, 'nfe')}: {growth} times as many ({_runs(node)})."
    )


def anode_fits(summaries: Summaries, dim: int) -> Answer:
    """Figure 8: the ANODE fits g(x), better than the NODE."""
    node, anode = (group_of(summaries, "8", g_in(dim), label) for label in (NODE, ANODE))
    loss = spread(anode, "loss").mean
    held = loss <= FITTED and loss < spread(node, "loss").mean
    return held, f"Final loss: {_said(node, 'loss')}, {_said(anode, 'loss')}."


def anode_faster(summaries: Summaries, dim: int) -> Answer:
    """Figure 8: the ANODE takes fewer epochs than the NODE."""
    node, anode = (group_of(summaries, "8", g_in(dim), label) for label in (NODE, ANODE))
    ours = _epochs(anode, COMPARED)
    return ours < math.inf and ours <= _epochs(node, COMPARED) / 2, (
        f"To a loss of {COMPARED}: NODE {_said_epochs(node, COMPARED)}, ANODE "
        f"{_said_epochs(anode, COMPARED)} ({_runs(anode)})."
    )


def nfe_flat(summaries: Summaries, dim: int) -> Answer:
    """Figure 11: the NODE's NFE grows, the ANODE's hardly."""
    node, anode = (group_of(summaries, "11", g_in(dim), label) for label in (NODE, ANODE))
    held = _growth(node).mean >= 1.5 and _growth(anode).mean <= 1.25
    said = (
        f"{x['label']} {_growth(x)} times, from {spread(x, 'nfe_at_start')} to {spread(x, 'nfe')} "
        f"({_runs(x)})"
        for x in (node, anode)
    )
    return held, f"Growth of the NFE: {', '.join(said)}."


def slices(summaries: Summaries) -> Answer:
    """Figure 12: the ANODE generalises to removed slices, the NODE does not."""
    node, anode = (group_of(summaries, "12", "slices", label) for label in (NODE, ANODE))
    theirs, ours = (spread(group, "validation").mean for group in (node, anode))
    return ours <= 0.1 and theirs >= 3 * ours, (
        f"Validation loss: {_said(node, 'validation')}, {_said(anode, 'validation')}; training "
        f"loss: NODE {spread(node, 'loss')}, ANODE {spread(anode, 'loss')}."
    )


def search(summaries: Summaries, model: str, dim: int) -> Answer:
    """Appendix E: the paper's parameters are the best, or nearly."""
    if "search" not in summaries:
        raise NotRun("The search has not been made")
    solver = TORCH if model == RESNET else OURS
    groups = [
        group
        for group in summaries["search"]["groups"]
        if (group["setting"]["model"], group["setting"]["dim"]) == (model, dim)
        and group["solver"] == solver
    ]
    names = list(CHOICES | OWN_CHOICES[model])
    chosen = next((x for x in groups if is_the_papers(x["setting"])), None)
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


def g_in(dim: int) -> str:
    """The panel of g(x) in so many dimensions."""
    return f"g(x), d = {dim}"


# ---- images

COUNTS = (
    (MNIST, NODE, (1, 28, 28), 92, 0, 84_395),
    (MNIST, ANODE, (1, 28, 28), 64, 5, 84_816),
    (CIFAR10, NODE, (3, 32, 32), 125, 0, 172_358),
    (CIFAR10, ANODE, (3, 32, 32), 64, 10, 171_799),
)
"""Data, model, size of an image, filters, augmented channels, parameters; from appendix E."""


def counts(summaries: Summaries) -> Answer:
    """Appendix E: the numbers of parameters."""
    said, held = [], True
    for data, model, size, filters, augment, paper in COUNTS:
        net = ConvODENet(size, filters, 10, augment, time_dependent=False)
        count = sum(weights.numel() for weights in net.parameters())
        held &= count == paper
        said.append(f"{data} {model} {count:,} (paper: {paper:,})")
    return held, f"{'; '.join(said)}."


def faster_on_images(summaries: Summaries, panel: str, factor: float) -> Answer:
    """Figure 13: with 10 augmented channels fewer iterations are needed, by a factor."""
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


def nfe_at_equal_loss(summaries: Summaries, panel: str) -> Answer:
    """Figure 13: a loss takes fewer NFE with augmented channels."""
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


def equal_parameters(summaries: Summaries, panel: str) -> Answer:
    """Figure 14: with as many parameters the ANODE has a lower loss and fewer NFE."""
    node, anode = (group_of(summaries, "14", panel, label) for label in (NODE, ANODE))
    held = all(spread(anode, x).mean < spread(node, x).mean for x in ("loss", "nfe"))
    return held, (
        f"Final loss: {_said(node, 'loss')}, {_said(anode, 'loss')}. NFE at the end: NODE "
        f"{spread(node, 'nfe')}, ANODE {spread(anode, 'nfe')}. Parameters: {node['parameters']:,} "
        f"and {anode['parameters']:,}."
    )


def _decayed(label: str) -> str:
    return f"{label}, weight decay"


def lowest_nfe(summaries: Summaries) -> Answer:
    """Figure 15: weight decay and augmentation together have the lowest NFE."""
    labels = (_decayed(ANODE), ANODE, _decayed(NODE), NODE)
    groups = [group_of(summaries, "15", MNIST, label) for label in labels]
    ours, *others = (spread(group, "nfe").mean for group in groups)
    return ours < min(others), f"NFE at the end: {'; '.join(_said(x, 'nfe') for x in groups)}."


def price_of_decay(summaries: Summaries) -> Answer:
    """Figure 15: weight decay makes an ANODE's loss a little higher."""
    decayed, plain = (group_of(summaries, "15", MNIST, x) for x in (_decayed(ANODE), ANODE))
    factor = spread(decayed, "loss").mean / spread(plain, "loss").mean
    return 1 <= factor <= 2, (
        f"Final loss: {_said(decayed, 'loss')}; {_said(plain, 'loss')}: {number(factor)} times."
    )


def beats_decay(summaries: Summaries) -> Answer:
    """Figure 15: the ANODE is better than a NODE with weight decay."""
    node, anode = (group_of(summaries, "15", MNIST, x) for x in (_decayed(NODE), ANODE))
    held = all(spread(anode, x).mean < spread(node, x).mean for x in ("loss", "nfe"))
    return held, (
        f"Final loss: {_said(anode, 'loss')}; {_said(node, 'loss')}. NFE at the end: "
        f"{spread(anode, 'nfe')} and {spread(node, 'nfe')}."
    )


def validation(summaries: Summaries) -> Answer:
    """Figure 16: the ANODE has the lower validation loss."""
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


def stability(summaries: Summaries, label: str) -> Answer:
    """Figure 17: a NODE shows signs of instability, an ANODE none."""
    group = group_of(summaries, "17", MNIST, label)
    signs = _signs(group)
    most = number(_most_nfe(group))
    found = f"of {_runs(group).split(',')[0]}: {', '.join(signs) or 'no sign of instability'}"
    loss = f"; final loss {spread(group, 'loss')}" if values(group, "loss") else ""
    return bool(signs) == (label == NODE), f"{label}, {found}. Most NFE of a point {most}{loss}."


# ---- the solver


def parity(summaries: Summaries) -> Answer:
    """NFE equals torchdiffeq's at the trained weights."""
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


def same_start(summaries: Summaries) -> Answer:
    """The two solvers' losses start alike."""
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


def faster_solver(summaries: Summaries) -> Answer:
    """Iterations take less time than with torchdiffeq."""
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


def _name(group: Group) -> str:
    """Of a model and its data: those that were used, which a panel does not tell of images."""
    data = NAMES.get(group["setting"]["data"], group["panel"])
    return f"{group['label']} on {data}:"
