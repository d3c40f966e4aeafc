"""Where the time of a training step goes, by torch.profiler: OUT/profile-<batch>.txt."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from anode_fast import AugODEBlock
from benchmarks.gpu.report import NOT_A_MEASUREMENT, PASSED, Report, Row, folder, is_dry, table

BATCHES = (3,) if is_dry() else (64, 65_536)
ON = "cpu" if is_dry() else "cuda"
STEPS = 1 if is_dry() else 10
SHOWN = 8
BY = "self_cpu_time_total" if is_dry() else "self_device_time_total"


def main() -> int:
    """Runs the step."""
    out = folder()
    report = Report("profile", out, _markdown)
    for batch in BATCHES:
        report.add(of_training(batch, out / f"profile-{batch}.txt"))
    note = ", ".join(f"profile-{batch}.txt" for batch in BATCHES)
    return report.finish(PASSED, f"{note}{f'; {NOT_A_MEASUREMENT}' if is_dry() else ''}")


def of_training(batch: int, path: Path) -> Row:
    """Profiles training steps of a small augmented neural ODE, and keeps the whole table."""
    torch.manual_seed(0)
    block = AugODEBlock.mlp(data_dim=2, hidden_dim=32, augment_dim=5, backend="triton")
    net = nn.Sequential(block, nn.Linear(7, 1)).to(ON)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    x = torch.randn(batch, 2, device=ON)
    y = x.norm(dim=1, keepdim=True)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x), y).backward()
        optimizer.step()

    for _ in range(0 if is_dry() else 5):
        step()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (ON == "cuda")
    with profile(activities=activities) as profiler:
        for _ in range(STEPS):
            step()
        if ON == "cuda":
            torch.cuda.synchronize()
    averages = profiler.key_averages()
    path.write_text(averages.table(sort_by=BY, row_limit=60, max_name_column_width=70) + "\n")
    return {"batch": batch, "steps": STEPS, "device_us": _longest(averages)}


def _longest(averages: Any) -> dict[str, float]:
    """Microseconds of a step by name, of what takes most."""
    entries = sorted(averages, key=lambda x: -getattr(x, BY))[:SHOWN]
    return {entry.key: getattr(entry, BY) / STEPS for entry in entries}


def _markdown(rows: list[Row]) -> str:
    lines = [
        (row["batch"], name, f"{time:.1f}")
        for row in rows
        for name, time in row["device_us"].items()
    ]
    of = "of the CPU, interpreted" if is_dry() else "of the device"
    return table(("batch", "kernel", f"us {of}, a training step"), lines, left=2)


if __name__ == "__main__":
    sys.exit(main())
