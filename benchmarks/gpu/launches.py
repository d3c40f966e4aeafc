"""What a launch costs, next to which a small solve is to be seen."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import triton

import anode_fast
from anode_fast import MLPField
from benchmarks.gpu.race import ON, by_events
from benchmarks.gpu.report import PASSED, Row, is_dry

LAUNCHES = 3 if is_dry() else 1000


@triton.jit
def _nothing(x):
    pass


def case(asked: Row) -> Row:
    """Microseconds of a launch: of the host until it is queued, and on the device in a full queue.

    The empty solve is one Euler step of no rows, the call from Python included.
    """
    x = torch.zeros(16, device=ON)
    field, y0, t = MLPField(7, 32).to(ON), torch.zeros(0, 7, device=ON), torch.tensor([0.0, 1.0])
    with torch.no_grad():
        launches = {
            "a kernel of torch, x.add_(1)": lambda: x.add_(1),
            "an empty Triton kernel": lambda: _nothing[(1,)](x),
            "an empty solve": lambda: anode_fast.odeint(
                field, y0, t, method="euler", options={"step_size": 1.0}, backend="triton"
            ),
        }
        return {
            "verdict": PASSED,
            "launches": {name: _cost(call) for name, call in launches.items()},
        }


def _cost(call: Callable[[], object]) -> Row:
    def many() -> None:
        for _ in range(LAUNCHES):
            call()

    call()
    if ON == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    many()
    host = time.perf_counter() - start
    if ON == "cuda":
        torch.cuda.synchronize()
    device = by_events(many) if ON == "cuda" else None
    return {
        "host_us": 1e6 * host / LAUNCHES,
        "device_us": device and 1e6 * device / LAUNCHES,
    }
