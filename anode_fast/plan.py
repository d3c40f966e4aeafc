"""Which backend, gradient and step control a call uses: decided once, and told to who asks."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from anode_fast import any_field, convolution, fused, steps
from anode_fast.adjoint import AdjointOptions
from anode_fast.errors import InvalidArgument
from anode_fast.fields import ConvField, MLPField
from anode_fast.kernels import gpu
from anode_fast.kernels.cpu import library
from anode_fast.problem import ADAMS, ADAPTIVE, SCIPY, Problem
from anode_fast.spec import ConvSpec

BACKENDS = ("auto", "reference", "cpu", "triton")
GRADIENTS = ("auto", "autograd", "discrete", "continuous")
STEP_CONTROLS = ("batch", "sample")

FIELDS = (MLPField, ConvField)
"""What the kernels know. Of a subclass they do not know what it does."""

_NO_GPU = "the state is not on a GPU"


@dataclass(frozen=True)
class Plan:
    """How a call is carried out.

    Attributes:
        backend: "reference", "cpu" or "triton".
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
    backward: AdjointOptions,
    is_adjoint: bool = False,
    has_adjoint_options: bool = False,
    params: Sequence[Tensor] | None = None,
) -> Plan:
    """The plan for a call.

    Args:
        problem: The call in normal form.
        backend, gradient, step_control: As the user gave them.
        backward: How the adjoint ODE would be solved.
        is_adjoint: Whether the call came through odeint_adjoint.
        has_adjoint_options: Whether it gave adjoint_rtol, _atol, _method or _options.
        params: Its adjoint_params.

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
    by_row = step_control == "sample"
    if by_row and (
        problem.family != ADAPTIVE or problem.y0.dim() < 1 or problem.layout or problem.event_fn
    ):
        raise InvalidArgument(
            'odeint: step_control="sample" needs an adaptive method, no event, and a state '
            f"[batch, ...] that is one tensor, got method {problem.method} and a state of shape "
            f"{tuple(problem.y0.shape)}{' (a tuple)' if problem.layout else ''}."
        )
    if gradient == "discrete" and problem.family in (ADAMS, SCIPY):
        raise InvalidArgument(
            f'odeint: gradient="discrete" needs a one-step method, and {problem.method} is none. '
            'Use "autograd" or "continuous".'
        )
    if gradient == "continuous" and by_row:
        raise InvalidArgument(
            'odeint: gradient="continuous" needs step_control="batch". Use gradient="discrete".'
        )
    wanted = "continuous" if gradient == "auto" and has_adjoint_options else gradient
    of_reference = wanted
    if wanted == "auto":
        of_reference, *_ = _automatic(problem, is_adjoint, has_adjoint_options, by_row, False)
    chosen, why = _choose_backend(problem, backend, wanted, of_reference, by_row, backward, params)
    if chosen == "reference" and backend != "reference":
        why = (*why, "steps: " + _how_steps(problem, by_row))
    keep_steps = True
    if gradient == "auto":
        is_known = type(problem.original) in FIELDS
        is_native = (chosen == "triton" and is_known) or (chosen == "cpu" and not _is_conv(problem))
        automatic = _automatic(problem, is_adjoint, has_adjoint_options, by_row, is_native)
        gradient, keep_steps, reason = automatic
        why = (*why, "gradient: " + reason)
    else:
        why = (*why, "gradient: asked for")
    return Plan(chosen, gradient, keep_steps, by_row, why)


def _choose_backend(
    problem: Problem,
    backend: str,
    gradient: str,
    of_reference: str,
    by_row: bool,
    backward: AdjointOptions,
    params: Sequence[Tensor] | None,
) -> tuple[str, tuple[str, ...]]:
    """The backend, and why. `of_reference`: the gradient there if none is named."""
    if backend == "reference":
        return "reference", ("backend: asked for",)
    field = problem.original
    tensors: Sequence[Tensor] = ()
    spec = None
    if isinstance(field, (MLPField, ConvField)) and type(field) in FIELDS:
        tensors, spec = field.tensors(), field.spec()
    reasons: dict[str, str] = {}
    for name in ("cpu", "triton"):
        if name == "triton" and backend == "auto" and not problem.y0.is_cuda:
            reasons[name] = _NO_GPU
            continue
        if name == "cpu" and isinstance(spec, ConvSpec):
            # The solver is the reference's, which can do everything.
            reasons[name] = convolution.why_not(field, problem.y0)
            continue
        if name == "triton" and spec is None:
            reasons[name] = _why_not_any_field(problem, backend, of_reference, by_row)
            continue
        why = fused.why_not(name, problem, spec, tensors)
        if not why and gradient == "autograd":
            why = 'gradient="autograd" goes through the reference solver\'s operations'
        if not why and gradient == "continuous":
            why = fused.why_not_adjoint(name, problem, backward)
        if not why and params is not None and {id(x) for x in params} != {id(x) for x in tensors}:
            why = "adjoint_params are not the field's own parameters"
        reasons[name] = why
    if backend != "auto" and reasons[backend]:
        raise InvalidArgument(
            f'odeint: backend="{backend}" cannot run this call: {reasons[backend]}. Use '
            '"auto" or "reference".'
        )
    chosen = [name for name in reasons if not reasons[name] and backend in ("auto", name)]
    if not chosen:
        return "reference", tuple(f"backend: not {name}: {why}" for name, why in reasons.items())
    if chosen[0] == "triton" and spec is None:
        return "triton", (
            "backend: PyTorch evaluates the field, the Triton kernels make the steps, launch by "
            "launch, and choose their sizes on the device",
        )
    if chosen[0] == "triton" and spec is not None:
        how = fused.described(problem, spec, by_row)
        return "triton", (f"backend: the Triton kernels run the whole solve: {how}",)
    if isinstance(spec, ConvSpec):
        return "cpu", (
            "backend: the C++ kernels evaluate the field, PyTorch operations make the steps",
        )
    return "cpu", ("backend: the C++ kernels run the whole solve in one call",)


def _why_not_any_field(problem: Problem, backend: str, gradient: str, by_row: bool) -> str:
    """Why the Triton kernels cannot make the steps of a field that PyTorch evaluates."""
    if by_row:
        return "every row takes its own steps"
    if gradient == "autograd" and torch.is_grad_enabled():
        return (
            'gradient="autograd" goes through the reference solver\'s operations; use '
            'gradient="discrete", odeint_adjoint or torch.no_grad()'
        )
    return any_field.why_not(problem)


def _how_steps(problem: Problem, by_row: bool) -> str:
    """What computes between the evaluations of a field that no kernel knows."""
    reason = "every row has its own" if by_row else steps.why_not(problem)
    return f"PyTorch operations: {reason}" if reason else "C++ between the field's evaluations"


def _is_conv(problem: Problem) -> bool:
    return type(problem.original) is ConvField


def _automatic(
    problem: Problem, is_adjoint: bool, has_adjoint_options: bool, by_row: bool, is_native: bool
) -> tuple[str, bool, str]:
    """Gradient, whether it keeps the steps, and why. Native: kernels run the whole solve."""
    if is_native:
        if has_adjoint_options:
            return "continuous", True, "odeint_adjoint got adjoint_* arguments for the adjoint ODE"
        if is_adjoint and problem.family != ADAPTIVE:
            return "discrete", False, "odeint_adjoint with fixed steps solves once more for it"
        return "discrete", True, "the kernels' exact gradient"
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
        f"backend cpu: missing: {library.missing()}"
        if library.missing()
        else f"backend cpu: works (C++, {library.instruction_set()}, {library.path()})",
        f"backend triton: missing: {gpu.missing()}"
        if gpu.missing()
        else f"backend triton: {gpu.describe()}",
    ]
    return "\n".join(lines)
