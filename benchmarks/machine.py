"""What a measurement ran on, in words that belong beside its figures."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path


def cpu_name() -> str:
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def summary(*packages: str) -> str:
    """Processor, cores, the versions of those packages that are installed, and the day."""
    versions = []
    for name in packages:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    day = datetime.date.today().isoformat()
    return "; ".join([f"{cpu_name()}, {os.cpu_count()} cores", ", ".join(versions), day])
