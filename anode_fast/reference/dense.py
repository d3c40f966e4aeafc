"""Solutions from steps: at the output times, or as a function of time."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from anode_fast.reference.step import Step


def solution_at(
    times: Sequence[float],
    shifts: Sequence[Tensor | None] | None,
    y0: Tensor,
    steps: Iterable[Step],
) -> Tensor:
    """The solution at increasing `times`, [len(times), *state]; y0 holds at the first of them.

    Draws steps only until the last time is reached.
    """
    shifts = shifts or [None] * len(times)
    blocks, done = [y0.unsqueeze(0)], 1
    if done == len(times):
        return blocks[0].clone()
    for step in steps:
        inside = slice(done, step.interval.inside(times).stop)
        if inside.start < inside.stop:
            blocks.append(step.interpolate(times[inside], shifts[inside]))
            done = inside.stop
        if done == len(times):
            break
    return torch.cat(blocks)


class DenseSolution:
    """The solution between the ends of a solve as a function of solver time.

    Args:
        y0: State at `t0`.
        t0, t1: Ends of the solve, t0 < t1.
        steps: All its steps. They stay in memory.
    """

    def __init__(self, y0: Tensor, t0: float, t1: float, steps: Iterable[Step]) -> None:
        self.y0, self.t0, self.t1 = y0, t0, t1
        self._steps = list(steps)
        self._ends = [step.interval.t1 for step in self._steps]

    def __call__(
        self, times: Sequence[float], shifts: Sequence[Tensor | None] | None = None
    ) -> Tensor:
        """The solution at `times`, in any order, [len(times), *state].

        `shifts` are zero-valued tensors through which a gradient with respect to the times flows.
        """
        shifts = shifts or [None] * len(times)
        members: dict[int, list[int]] = {}
        for i, t in enumerate(times):
            members.setdefault(bisect_left(self._ends, t), []).append(i)
        states: dict[int, Tensor] = {}
        for index, inside in members.items():
            block = self._steps[index].interpolate(
                [times[i] for i in inside], [shifts[i] for i in inside]
            )
            states.update(zip(inside, block.unbind(), strict=True))
        if not times:
            return self.y0.new_empty(0, *self.y0.shape)
        return torch.stack([states[i] for i in range(len(times))])
