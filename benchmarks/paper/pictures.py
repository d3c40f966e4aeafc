"""What the figures show of a trained net beside its curves, as small lists for JSON."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.paper.settings import FLOWS, RESNET, SLICES, TOYS, Setting

SHOWN = 60, 120  # points of either class
MOVING = 20, 40  # of those of a flow, which has every point many times
TIMES = 25  # of a flow
GRID, EDGE = 61, 2.0  # of the plane: points along a side, and from -EDGE to EDGE
STARTS, LIMIT = 13, 1.6  # of the flows in 1d: trajectories, from -LIMIT to LIMIT
ARROWS = 13  # of their vector field, along either axis
SNAPSHOTS = (0.0, 0.04, 0.1, 0.2, 0.4, 1.0)  # of the training, when features are kept
DECIMALS = 3
TINY = 1e-6


def wanted(setting: Setting) -> bool:
    """Whether pictures are taken: of the first repetition, where the data can be drawn."""
    fold = setting.holdout not in ("", SLICES)
    return setting.repeat == 0 and setting.data in (*FLOWS, *TOYS) and setting.dim <= 2 and not fold


def snapshots(points: int) -> set[int]:
    """After which points of the curves features are kept; 0 is before the training."""
    return {round(share * points) for share in SNAPSHOTS}


def features(net: nn.Module, inputs: Tensor, inner: Tensor) -> dict[str, Any]:
    """Final states of some points: the data's dimensions and, if augmented, the telling one."""
    shown, classes = _some(inputs, inner, SHOWN)
    with torch.no_grad():
        states = _projected(net.block(shown)[None], inputs.shape[1], classes)
    return {"states": _list(states[0]), "inner": classes.tolist()}


def at_the_end(setting: Setting, net: nn.Module, inputs: Tensor, inner: Tensor) -> dict[str, Any]:
    """The pictures of a trained net, by name: flow and plane, or the flow in 1d."""
    with torch.no_grad():
        if setting.data in FLOWS:
            return {"trajectories": _trajectories(setting, net, inputs.dtype)}
        shown, classes = _some(inputs, inner, MOVING)
        taken: dict[str, Any] = {}
        if setting.model != RESNET:
            states = _projected(net.block.trajectory(shown, TIMES), setting.dim, classes)
            taken["flow"] = {"states": _list(states), "inner": classes.tolist()}
        if setting.dim == 2:
            side = torch.linspace(-EDGE, EDGE, GRID)
            plane = torch.cartesian_prod(side, side).to(inputs)
            taken["plane"] = {"edge": EDGE, "values": _list(net(plane).view(GRID, GRID))}
        return taken


def _trajectories(setting: Setting, net: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
    """States from evenly spread starts, and the field between them."""
    device = next(net.parameters()).device
    starts = torch.linspace(-LIMIT, LIMIT, STARTS, dtype=dtype, device=device)
    starts = torch.cat([starts, starts.new_tensor([-1.0, 1.0])]).unsqueeze(1)  # last: the data's
    if setting.model == RESNET:
        states = net.block.trajectory(starts)
        return {"states": _list(states.squeeze(2)), "field": None}
    states = net.block.trajectory(starts, TIMES)
    y = torch.linspace(-LIMIT, LIMIT, ARROWS, dtype=dtype, device=device).unsqueeze(1)
    times = torch.linspace(*map(float, net.block.t), ARROWS, dtype=dtype, device=device)
    slopes = torch.stack([net.block.field(t, y).squeeze(1) for t in times])
    return {"states": _list(states.squeeze(2)), "field": _list(slopes)}


def _some(inputs: Tensor, inner: Tensor, counts: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The first few points of either class, and which of them are inner ones."""
    few = [(inner == flag).nonzero().flatten()[:n] for flag, n in zip((1, 0), counts, strict=True)]
    index = torch.cat(few)
    return inputs[index.to(inputs.device)], inner[index]


def _projected(states: Tensor, dim: int, inner: Tensor) -> Tensor:
    """Of [time, point, column] the first `dim` columns, which are the data's, and one more.

    That is the augmented one which separates the classes best at the end, if there are any.
    """
    augmented = states[-1, :, dim:].cpu()
    if not augmented.shape[1]:
        return states
    inside, outside = augmented[inner], augmented[~inner]
    gap = (inside.mean(0) - outside.mean(0)).abs()
    best = int((gap / (inside.std(0) + outside.std(0) + TINY)).argmax())
    return states[:, :, [*range(dim), dim + best]]


def _list(values: Tensor) -> Any:
    return values.double().cpu().round(decimals=DECIMALS).tolist()
