"""Runs one of our kernels and the references on the same problem: the work behind `parity`.

`case` compares, `small` only runs (for the sanitizer's tools, which slow everything down).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import anode_fast
from anode_fast import MLPField, SolveStats
from anode_fast.errors import InvalidArgument
from benchmarks.gpu.report import FAILED, PASSED, SKIPPED, Row, is_dry

DIM = 7
FACTOR, EPS = 3.0, 32  # as in tests/helpers.py
TF32_SPACING = 2.0**-10
ON = torch.device("cpu" if is_dry() else "cuda")

Results = dict[str, Tensor]  # the solution "y", and the gradients by name

torch.set_num_threads(1)  # many of these run side by side


@dataclass(frozen=True)
class Problem:
    """What a kernel is given.

    Attributes:
        rows: Of the batch. A program takes 16 at least, and 128 at most.
        times: Output times.
        step: Prescribed size of all steps.
        arguments: Of the solve function.
        by_adjoint_ode: Whether the gradient is the continuous one.
    """

    rows: int
    times: tuple[float, ...]
    step: float
    arguments: dict[str, Any] = field(default_factory=dict)
    by_adjoint_ode: bool = False


def problem(kernel: str) -> Problem:
    """The problem that runs a kernel; in a dry run one or two steps of it."""
    times = (0.0, 0.1, 0.125) if is_dry() else (0.0, 0.3, 0.4, 1.0)
    few, many = (3, 65) if is_dry() else (16, 200)
    some = few if is_dry() else 100
    step = 0.125
    fixed = {"method": "rk4", "options": {"step_size": step}}
    return {
        "fixed": Problem(some, times, step, fixed),
        "one program": Problem(few, times, step),
        "many programs": Problem(many, times, step),
        "by row": Problem(some, times, step, {"step_control": "sample"}),
        "adjoint, fixed": Problem(some, times, step, fixed, by_adjoint_ode=True),
        "adjoint, one program": Problem(few, times, step, by_adjoint_ode=True),
        "adjoint, many programs": Problem(many, times, step, by_adjoint_ode=True),
    }[kernel]


def case(asked: Row) -> Row:
    """Compares one kernel.

    Args:
        asked: "kernel" and "precision" as in `parity`, and "width" of the hidden layers.

    Returns:
        "verdict"; for "value" and "gradient" the error, the references' and the bound, relative
        to the largest entry; "same_steps" if it chooses steps, with both counts.
    """
    dtype = torch.float64 if asked["precision"] == "float64" else torch.float32
    posed = problem(asked["kernel"])
    exact, _ = solve(posed, asked["width"], torch.float64, "reference", torch.device("cpu"))
    torch.set_float32_matmul_precision("high" if asked["precision"] == "high" else "highest")
    run = functools.partial(solve, posed, asked["width"], dtype)
    try:
        got, stats = run("triton", ON)
    except InvalidArgument as error:  # what no kernel does says so before it begins
        return {"verdict": SKIPPED, "note": str(error)}
    references = [run("reference", ON)[0]]
    if asked["precision"] != "high":
        references += _by_cpp(run)
    floor = TF32_SPACING if asked["precision"] == "high" else EPS * torch.finfo(dtype).eps
    found = {
        name: max((compared(got, references, exact, x, floor) for x in keys), key=_badness)
        for name, keys in (("value", ["y"]), ("gradient", [x for x in exact if x != "y"]))
    }
    row: Row = {**found, "rows": posed.rows, "launches": stats.launches}
    row["how"] = _how(posed, asked["width"], dtype)
    is_good = all(_badness(x) <= 1 for x in found.values())
    if "method" not in posed.arguments and not posed.by_adjoint_ode:
        row |= chosen_steps(posed, asked["width"], dtype)
        is_good &= row["same_steps"] or dtype == torch.float32
    return {"verdict": PASSED if is_good else FAILED, **row}


def compared(
    got: Results, references: list[Results], exact: Results, name: str, floor: float
) -> Row:
    """The error of a result, what it may be, and the share of the two; all of the largest entry."""
    scale = exact[name].abs().max().clamp_min(1e-30)

    def error(result: Results) -> float:
        return ((result[name] - exact[name]).abs().max() / scale).item()

    of_reference = max(error(reference) for reference in references)
    bound = FACTOR * of_reference + floor
    own = error(got)
    return {
        "name": name,
        "error": own,
        "reference": of_reference,
        "bound": bound,
        "share": own / bound,
    }


def _how(posed: Problem, width: int, dtype: torch.dtype) -> str:
    """Kernel, programs and arithmetic of the forward solve, as `explain` has it."""
    mlp, y0, _ = _inputs(posed, width)
    text = anode_fast.explain(
        mlp.to(ON, dtype),
        y0.to(ON, dtype),
        torch.tensor(posed.times),
        backend="triton",
        **posed.arguments,
    )
    return next((x.split("solve: ")[1] for x in text.splitlines() if "solve: " in x), "")


def _badness(comparison: Row) -> float:
    share = comparison["share"]
    return float(share) if share == share else float("inf")


def _by_cpp(run: Any) -> list[Results]:
    """The C++ kernels' results, if they are built."""
    try:
        return [run("cpu", torch.device("cpu"))[0]]
    except InvalidArgument:
        return []


def solve(
    posed: Problem,
    width: int,
    dtype: torch.dtype,
    backend: str,
    device: torch.device,
    options: dict[str, Any] | None = None,
    *,
    gradient: bool = True,
    **more: Any,
) -> tuple[Results, SolveStats]:
    """Solves, and differentiates a random functional of the solution.

    Args:
        posed, width, dtype: The problem.
        backend, device: Who solves it, and where.
        options: Of an adaptive method; default: the prescribed step.
        gradient: Whether to differentiate.
        more: Arguments of the solve function.

    Returns:
        All results in float64 on the CPU, and the counts.
    """
    mlp, y0, cotangent = _inputs(posed, width)
    mlp = mlp.to(device, dtype)
    y0 = y0.to(device, dtype).requires_grad_()
    t = torch.tensor(posed.times, dtype=torch.float64)
    if options is None:
        options = {name: posed.step for name in ("first_step", "min_step", "max_step")}
    arguments = {"rtol": 1e-3, "atol": 1e-3, "options": options} | posed.arguments | more
    function = anode_fast.odeint
    if posed.by_adjoint_ode:
        function, own = anode_fast.odeint_adjoint, dict(arguments["options"])
        if "method" not in posed.arguments:
            own["norm"] = "seminorm"
        arguments |= {"gradient": "continuous", "adjoint_options": own}
    elif backend == "triton":
        arguments["gradient"] = "discrete"
    y, stats = function(mlp, y0, t, backend=backend, return_stats=True, **arguments)
    results = {"y": y}
    if gradient:
        inputs = {"y0": y0, **dict(mlp.named_parameters())}
        found = torch.autograd.grad(y, tuple(inputs.values()), cotangent.to(device, dtype))
        results |= dict(zip(inputs, found, strict=True))
    return {name: x.detach().cpu().double() for name, x in results.items()}, stats


def chosen_steps(posed: Problem, width: int, dtype: torch.dtype) -> Row:
    """Whether a solve that chooses its steps makes those of the reference path."""
    tolerance = 1e-6 if dtype == torch.float64 else 1e-3
    counts = {}
    for backend in ("triton", "reference"):
        _, stats = solve(
            *(posed, width, dtype, backend, ON, {}),
            gradient=False,
            rtol=tolerance,
            atol=tolerance,
        )
        counts[backend] = [stats.nfe, stats.accepted, stats.rejected]
    return {"same_steps": counts["triton"] == counts["reference"], "steps": counts}


def small(asked: Row) -> Row:
    """Runs one kernel and its gradient on few rows, and nothing else."""
    torch.set_float32_matmul_precision("high" if asked["precision"] == "high" else "highest")
    dtype = torch.float64 if asked["precision"] == "float64" else torch.float32
    solve(problem(asked["kernel"]), asked["width"], dtype, "triton", ON)
    return {"verdict": PASSED}


def _inputs(posed: Problem, width: int) -> tuple[MLPField, Tensor, Tensor]:
    """Field, initial state and cotangent: the same numbers each time, exact in float32."""
    torch.manual_seed(0)
    # Smooth, or a row near a kink would have one gradient or another.
    mlp = MLPField(DIM, width, activation="tanh").double()
    y0 = torch.randn(posed.rows, DIM)
    cotangent = torch.randn(len(posed.times), posed.rows, DIM)
    with torch.no_grad():
        for p in mlp.parameters():
            p.copy_(p.float())
    return mlp, y0.double(), cotangent.double()
