"""What a measurement ran on, in words that belong beside its figures."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path


def cpu_name() -> str:
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions(*packages: str) -> dict[str, str]:
    """Versions of those packages that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit(root: Path) -> str:
    """Of the repository, with "+" if files differ from it; "unknown" where there is none."""
    hashed = _answer("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    changed = hashed and _answer("git", "-C", str(root), "status", "--porcelain")
    return hashed + ("+" if changed else "") or "unknown"


CARD = (
    *("name", "driver_version", "memory.total", "power.limit", "temperature.gpu"),
    *("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem"),
)
"""What nvidia-smi is asked."""


def cards() -> list[dict[str, str]]:
    """What nvidia-smi says of every card; nothing where it is missing."""
    text = _answer("nvidia-smi", f"--query-gpu={','.join(CARD)}", "--format=csv,noheader")
    lines = [[cell.strip() for cell in line.split(",")] for line in text.splitlines()]
    return [dict(zip(CARD, line, strict=True)) for line in lines if len(line) == len(CARD)]


def _answer(*command: str) -> str:
    """What a command prints; "" if it is missing or fails."""
    if not shutil.which(command[0]):
        return ""
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def summary(*packages: str) -> str:
    """Processor, cores, the versions of those packages that are installed, and the day."""
    found = ", ".join(f"{name} {version}" for name, version in versions(*packages).items())
    day = datetime.date.today().isoformat()
    return "; ".join([f"{cpu_name()}, {os.cpu_count()} cores", found, day])
