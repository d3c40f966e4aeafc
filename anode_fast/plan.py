"""Which backend, gradient and step control a call uses: decided once, and told to who asks."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from dataclasses import dataclass

import numpy as np
import torch

from anode_fast.errors import InvalidArgument
from anode_fast.problem import ADAMS, ADAPTIVE, SCIPY, Problem

BACKENDS = ("auto", "reference", "cpu", "triton")
GRADIENTS = ("auto", "autograd", "discrete", "continuous")
STEP_CONTROLS = ("batch", "sample")

_NOT_BUILT = {
    "cpu": "the C++ kernels are not part of this version",
    "triton": "the Triton kernels are not part of this version",
}


@dataclass(frozen=True)
class Plan:
    """How a call is carried out.

    Attributes:
        backend: "reference".
        gradient: "autograd", "discrete" or "continuous".
        keep_steps: For "discrete": whether the steps' states stay in memory until the backward
            pass.
        by_row: Whether every row takes its own steps.
        reasons: Why, one sentence each.
    """

    backend: str
    gradient: str
    keep_steps: bool
    by_row: bool
    reasons: tuple[str, ...]


def choose(
    problem: Problem,
    *,
    backend: str,
    gradient: str,
    step_control: str,
    is_adjoint: bool = False,
    has_adjoint_options: bool = False,
) -> Plan:
    """The plan for a call.

    Args:
        problem: The call in normal form.
        backend, gradient, step_control: As the user gave them.
        is_adjoint: Whether the call came through odeint_adjoint.
        has_adjoint_options: Whether it gave adjoint_rtol, _atol, _method or _options.

    Raises:
        InvalidArgument: An unknown name, or a named backend or gradient that cannot run this call.
    """
    for name, value, allowed in (
        ("backend", backend, BACKENDS),
        ("gradient", gradient, GRADIENTS),
        ("step_control", step_control, STEP_CONTROLS),
    ):
        if value not in allowed:
            raise InvalidArgument(f"odeint: {name} is {value!r}, want one of {', '.join(allowed)}")
    if backend in _NOT_BUILT:
        raise InvalidArgument(
            f'odeint: backend="{backend}" cannot run this call: {_NOT_BUILT[backend]}. Use '
            '"auto" or "reference".'
        )
    reasons = [
        "backend: asked for"
        if backend == "reference"
        else "backend: " + "; ".join(_NOT_BUILT.values())
    ]
    by_row = step_control == "sample"
    one_step = problem.family not in (ADAMS, SCIPY)
    keep_steps = True
    if gradient == "auto":
        gradient, keep_steps, reason = _automatic(problem, is_adjoint, has_adjoint_options, by_row)
        reasons.append("gradient: " + reason)
    else:
        reasons.append("gradient: asked for")
    if by_row and (
        problem.family != ADAPTIVE or problem.y0.dim() < 1 or problem.layout or problem.event_fn
    ):
        raise InvalidArgument(
            'odeint: step_control="sample" needs an adaptive method, no event, and a state '
            f"[batch, ...] that is one tensor, got method {problem.method} and a state of shape "
            f"{tuple(problem.y0.shape)}{' (a tuple)' if problem.layout else ''}."
        )
    if gradient == "discrete" and not one_step:
        raise InvalidArgument(
            f'odeint: gradient="discrete" needs a one-step method, and {problem.method} is none. '
            'Use "autograd" or "continuous".'
        )
    if gradient == "continuous" and by_row:
        raise InvalidArgument(
            'odeint: gradient="continuous" needs step_control="batch". Use gradient="discrete".'
        )
    return Plan("reference", gradient, keep_steps, by_row, tuple(reasons))


def _automatic(
    problem: Problem, is_adjoint: bool, has_adjoint_options: bool, by_row: bool
) -> tuple[str, bool, str]:
    """Gradient, whether it keeps the steps, and why."""
    if not is_adjoint:
        return "autograd", True, "odeint differentiates through the solver's own operations"
    if by_row:
        return (
            "discrete",
            True,
            'step_control="sample" has no adjoint ODE; its steps are made again',
        )
    if problem.family in (ADAPTIVE, ADAMS, SCIPY):
        return "continuous", True, "odeint_adjoint integrates the adjoint ODE"
    if has_adjoint_options:
        return "continuous", True, "odeint_adjoint got adjoint_* arguments for the adjoint ODE"
    reason = "odeint_adjoint with fixed steps makes them again: exact, in constant memory"
    return "discrete", False, reason


def describe(problem: Problem, plan: Plan) -> str:
    """What `explain` prints."""
    state = "a tuple state, " if problem.layout else ""
    lines = [
        f"method: {problem.method} ({problem.family} steps)",
        f"backend: {plan.backend}",
        f"gradient: {plan.gradient}"
        + (", solving once more in the backward pass" if not plan.keep_steps else ""),
        "step control: "
        f"{'one step size per row' if plan.by_row else 'one step size for the batch'}",
        f"state: {state}{tuple(problem.y0.shape)} {problem.y0.dtype} on {problem.y0.device}",
        "because:",
        *(f"  {reason}" for reason in plan.reasons),
    ]
    return "\n".join(lines)


def show_config() -> str:
    """Versions, devices, and which backends work and why others do not. Prints nothing."""
    from_cuda = (
        ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        if torch.cuda.is_available()
        else "none"
    )
    triton = "installed" if importlib.util.find_spec("triton") else "not installed"
    lines = [
        f"python {platform.python_version()} on {sys.platform} {platform.machine()}",
        f"torch {torch.__version__}, numpy {np.__version__}, triton {triton}",
        f"cpu: {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"instruction set {torch.backends.cpu.get_cpu_capability()}",
        f"gpu: {from_cuda}",
        "backend reference: works (pure PyTorch, any device)",
        *(f"backend {name}: missing: {why}" for name, why in _NOT_BUILT.items()),
    ]
    return "\n".join(lines)
