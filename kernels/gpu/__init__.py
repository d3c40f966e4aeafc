"""Triton kernels and their launchers. The only place that imports Triton, which may be missing.

`load` imports them when they are first wanted: `import anode_fast` must work without Triton, and
need not wait for it. With TRITON_INTERPRET=1 they run on CPU tensors, slowly, in Triton's
interpreter, for tests.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType

import torch

LEAST_CAPABILITY = 8, 0
"""Of devices that the kernels are compiled for: tf32 products."""


_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@functools.cache
def load(by_stage: bool = False) -> ModuleType | None:
    """The module `solve`, or `by_stage`; None if there is no Triton."""
    if not _is_installed():
        return None
    return importlib.import_module(f"{__name__}.{'by_stage' if by_stage else 'solve'}")


@functools.cache
def load_any_field() -> ModuleType | None:
    """The module `any_field`; None if there is no Triton."""
    return importlib.import_module(f"{__name__}.any_field") if _is_installed() else None


def missing() -> str:
    """Why the kernels run nowhere in this process; "" if they run somewhere."""
    if not _is_installed():
        return "Triton is not installed"
    if _INTERPRETED:
        return ""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    devices = range(torch.cuda.device_count())
    reasons = [why_not_on(torch.device("cuda", index)) for index in devices]
    return "" if "" in reasons else reasons[0]


@functools.cache
def why_not_on(device: torch.device) -> str:
    """Why the kernels do not run on tensors of that device; "" if they do."""
    if not _is_installed():
        return "Triton is not installed"
    if device.type == "cpu":
        return "" if _INTERPRETED else "the state is on the CPU"
    if device.type != "cuda":
        return f"the state is on {device}, want a CUDA device"
    if torch.version.hip:
        return "the device is no NVIDIA GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return f"the device has compute capability {capability}, want {LEAST_CAPABILITY} at least"
    return ""


def describe() -> str:
    """Where the kernels run, if they do."""
    return "works" + (" (interpreted, on CPU tensors, for tests)" if _INTERPRETED else "")


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
