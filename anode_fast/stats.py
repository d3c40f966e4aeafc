"""What a solve did: `SolveStats`, and `Status`, its outcome."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor


class Status(IntEnum):
    """Outcome of a solve. Kernels return these numbers; the host turns failures into exceptions."""

    SUCCESS = 0
    MAX_STEPS = 1
    UNDERFLOW = 2
    NON_FINITE = 3


@dataclass
class SolveStats:
    """Counts of one solve. `nfe_backward` is filled in when the backward pass has run.

    Attributes:
        backend: "reference", "cpu" or "triton".
        method: Name of the integration method.
        nfe: Evaluations of the field in the forward solve, counted as torchdiffeq counts them.
        nfe_backward: Evaluations of the field in the backward pass (0 before it, and 0 for
            gradient="autograd", which evaluates nothing anew).
        accepted: Accepted steps. For step_control="sample": of the row that took most.
        rejected: Rejected steps. For step_control="sample": of the row that took most.
        launches: Native launches or calls made (0 on the reference path), both passes.
        status: Outcome; anything but SUCCESS was raised as a SolverError.
    """

    backend: str = "reference"
    method: str = ""
    nfe: int = 0
    nfe_backward: int = 0
    accepted: int = 0
    rejected: int = 0
    launches: int = 0
    status: Status = Status.SUCCESS


@dataclass
class DeviceStats(SolveStats):
    """Counts of a solve in a CUDA graph, which are on the device.

    A look at one of them waits for the device and gives those of the graph's last run. Nothing was
    raised where `status` is not SUCCESS: the solution then is nan.

    Attributes:
        later: Waits, and returns the counts by name.
    """

    later: Callable[[], dict[str, Any]] = dict

    def __getattribute__(self, name: str) -> Any:
        if name in ("nfe", "nfe_backward", "accepted", "rejected", "status"):
            vars(self).update(object.__getattribute__(self, "later")())
        return object.__getattribute__(self, name)


class GraphStats(SolveStats):
    """Counts of a solve in a compiled graph, which gives them as a tensor.

    Args:
        method: Name of the integration method.
        counts: What `counted` made of the solve's own counts.
    """

    def __init__(self, method: str, counts: Tensor) -> None:
        self.method, self.status = method, Status.SUCCESS
        self._counts = counts

    @property
    def backend(self) -> str:  # type: ignore[override]
        """As in `SolveStats`."""
        return _BACKENDS[int(self._counts[-1])]


_BACKENDS = ("reference", "cpu", "triton")
_COUNTS = ("nfe", "nfe_backward", "accepted", "rejected", "launches")
for _place, _name in enumerate(_COUNTS):
    setattr(
        GraphStats,
        _name,
        property(lambda self, place=_place: int(self._counts[place])),  # type: ignore[misc]
    )

NUM_COUNTS = len(_COUNTS) + 1
"""Numbers in a `GraphStats`."""


def counted(stats: SolveStats) -> Tensor:
    """The counts for a `GraphStats`, int64."""
    counts = [getattr(stats, name) for name in _COUNTS]
    return torch.tensor([*counts, _BACKENDS.index(stats.backend)], device="cpu")
