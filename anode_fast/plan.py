"""Which backend, gradient and step control a call uses: decided once, and told to who asks."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
from anode_fast.recognize import Recognized
from anode_fast.spec import ConvSpec, Spec

BACKENDS = ("auto", "reference", "cpu", "triton")
GRADIENTS = ("auto", "autograd", "discrete", "continuous")
STEP_CONTROLS = ("batch", "sample")

FIELDS = (MLPField, ConvField)
"""What the kernels know. Of a subclass they do not know what it does."""

_NO_GPU = "the state is not on a GPU"
_ANY_FIELD = (
    "backend: PyTorch evaluates the field, the Triton kernels make the steps, launch by launch, "
    "and choose their sizes on the device"
)


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
        spec: What the kernels run.
    """

    backend: str
    gradient: str
    keep_steps: bool
    by_row: bool
    reasons: tuple[str, ...]
    spec: Spec | None = None


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
    field: MLPField | ConvField | Recognized | None = None,
    unknown: str = "",
) -> Plan:
    """The plan for a call.

    Args:
        problem: The call in normal form.
        backend, gradient, step_control: As the user gave them.
        backward: How the adjoint ODE would be solved.
        is_adjoint: Whether the call came through odeint_adjoint.
        has_adjoint_options: Whether it gave adjoint_rtol, _atol, _method or _options.
        params: Its adjoint_params.
        field: The field as the kernels know it; None if they do not.
        unknown: Why they do not.

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
    chosen, spec, why = _choose_backend(
        problem, field, unknown, backend, wanted, of_reference, by_row, backward, params
    )
    if chosen == "reference" and backend != "reference":
        why = (*why, "steps: " + _how_steps(problem, by_row))
    keep_steps = True
    if transform := fused.transform():
        gradient = "autograd"
        why = (*why, f"gradient: {transform}, and takes the solver's operations one by one")
    elif gradient == "auto":
        is_native = spec is not None and not (chosen == "cpu" and isinstance(spec, ConvSpec))
        automatic = _automatic(problem, is_adjoint, has_adjoint_options, by_row, is_native)
        gradient, keep_steps, reason = automatic
        why = (*why, "gradient: " + reason)
    else:
        why = (*why, "gradient: asked for")
    return Plan(chosen, gradient, keep_steps, by_row, why, spec)


def _choose_backend(
    problem: Problem,
    field: MLPField | ConvField | Recognized | None,
    unknown: str,
    backend: str,
    gradient: str,
    of_reference: str,
    by_row: bool,
    backward: AdjointOptions,
    params: Sequence[Tensor] | None,
) -> tuple[str, Spec | None, tuple[str, ...]]:
    """The backend, what it runs, and why. `of_reference`: the gradient there if none is named."""
    if backend == "reference":
        return "reference", None, ("backend: asked for",)
    specs: tuple[Spec, ...] = ()
    tensors: Sequence[Tensor] = ()
    if field is not None:
        specs = field.specs if isinstance(field, Recognized) else (field.spec(),)
        tensors = field.tensors()
    reasons: dict[str, str] = {}
    for name in ("cpu", "triton"):
        if name == "triton" and backend == "auto" and not problem.y0.is_cuda:
            reasons[name] = _NO_GPU
            continue
        reasons[name] = unknown
        for spec in specs:
            why = _why_not(name, problem, spec, field, tensors, gradient, backward)
            why = why or _why_not_params(field, tensors, params)
            if not why and backend in ("auto", name):
                return name, spec, (_how(name, problem, spec, by_row),)
            reasons[name] = why
        if name == "triton" and backend in ("auto", name) and not isinstance(field, FIELDS):
            why = _why_not_any_field(problem, backend, of_reference, by_row)
            if not why:
                return "triton", None, (_ANY_FIELD, f"backend: not in one call: {reasons[name]}")
            reasons[name] = f"{reasons[name]}; and {why}" if reasons[name] else why
    if backend != "auto":
        raise InvalidArgument(
            f'odeint: backend="{backend}" cannot run this call: {reasons[backend]}. Use '
            '"auto" or "reference".'
        )
    return "reference", None, tuple(f"backend: not {n}: {why}" for n, why in reasons.items())


def _why_not(
    backend: str,
    problem: Problem,
    spec: Spec,
    field: Any,
    tensors: Sequence[Tensor],
    gradient: str,
    backward: AdjointOptions,
) -> str:
    """Why a backend cannot run a call of a field that it knows; "" if it can."""
    if backend == "cpu" and isinstance(spec, ConvSpec):
        # The solver is the reference's, which can do everything.
        return convolution.why_not(field, problem.y0)
    if why := fused.why_not(backend, problem, spec, tensors):
        return why
    if gradient == "autograd":
        return 'gradient="autograd" goes through the reference solver\'s operations'
    if gradient == "continuous":
        return fused.why_not_adjoint(backend, problem, backward)
    return ""


def _why_not_params(field: Any, tensors: Sequence[Tensor], params: Sequence[Tensor] | None) -> str:
    """The same of adjoint_params: the kernels' gradients are those of all that a field holds."""
    if params is None:
        return ""
    given = {id(x) for x in params}
    if isinstance(field, Recognized):
        fits = given.issuperset(id(x) for x in field.leaves() if x.requires_grad)
    else:
        fits = given == {id(x) for x in tensors}
    return "" if fits else "adjoint_params are not the field's own parameters"


def _how(backend: str, problem: Problem, spec: Spec, by_row: bool) -> str:
    """What a backend does of a solve."""
    if backend == "triton":
        how = fused.described(problem, spec, by_row)
        return f"backend: the Triton kernels run the whole solve: {how}"
    if isinstance(spec, ConvSpec):
        return "backend: the C++ kernels evaluate the field, PyTorch operations make the steps"
    return "backend: the C++ kernels run the whole solve in one call"


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
