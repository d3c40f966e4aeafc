"""The errors of solves that cannot go on: where, what is known, what to try. For every backend."""

from __future__ import annotations

import torch
from torch import Tensor

from anode_fast.errors import MaxStepsExceeded, NonFiniteState, StepSizeUnderflow
from anode_fast.problem import Problem, underlying


def max_steps(
    problem: Problem, budget: int, t: float, dt: float, accepted: int, rejected: int
) -> MaxStepsExceeded:
    """The step budget is used up at solver time t."""
    return MaxStepsExceeded(
        f"max_num_steps exceeded ({accepted + rejected}>={budget}) at "
        f"t={problem.field.user_time(t):.9g}, dt={dt:.3g}: {accepted} steps accepted, {rejected} "
        "rejected. Loosen rtol and atol, raise options['max_num_steps'], or look at whether the "
        "field became stiff."
    )


def underflow(
    problem: Problem, t: float, dt: float, accepted: int, rejected: int, y: Tensor
) -> StepSizeUnderflow:
    """No step from solver time t and state y that still advances t meets the tolerance."""
    return StepSizeUnderflow(
        f"underflow in dt {dt:.3g} at t={problem.field.user_time(t):.9g} after {accepted} "
        f"accepted and {rejected} rejected steps: no step that still advances t "
        f"meets the tolerance{_worst_rows(problem, y)}. The solution may blow up there, "
        "the field may jump (options['jump_t']) or be stiff (an implicit method), or "
        f"rtol and atol are too tight for {y.dtype}."
    )


def non_finite(problem: Problem, t: float, dt: float, attempts: int, f: Tensor) -> NonFiniteState:
    """Every step tried from solver time t, where the derivative is f, gave nan or inf."""
    f = underlying(f)
    f_bad = ~torch.isfinite(f.detach())
    what = "the field returned nan or inf" if f_bad.any() else "a trial step became nan or inf"
    rows = ""
    if f_bad.any() and f.dim() > 1:
        rows = f" in {int(f_bad.flatten(1).any(1).sum())} of {f.shape[0]} rows"
    return NonFiniteState(
        f"non-finite values in state: {what}{rows} at t={problem.field.user_time(t):.9g}, "
        f"dt={dt:.3g}, attempt {attempts}; the last accepted state there is finite. Look at the "
        "field's weights and inputs at this t (a diverged training step, log or division), or "
        "clip them."
    )


def _worst_rows(problem: Problem, y: Tensor) -> str:
    if y.dim() < 2 or problem.layout or y.shape[0] < 2:
        return ""
    size = underlying(y).detach().abs().flatten(1).amax(1)
    return (
        f" (largest |y| in row {int(size.argmax())}: {float(size.max()):.3g}, median over "
        f"{y.shape[0]} rows {float(size.median()):.3g})"
    )


# --- one step size per row ------------------------------------------------------------------------


def max_steps_of_rows(problem: Problem, budget: int, rows: int, t: float) -> MaxStepsExceeded:
    """`rows` rows have used up the step budget, the slowest of them at solver time t."""
    return MaxStepsExceeded(
        f"max_num_steps exceeded ({budget}) in {rows} of {problem.y0.shape[0]} rows, "
        f"the slowest at t={problem.field.user_time(t):.9g}. Loosen rtol and atol or "
        "raise options['max_num_steps']."
    )


def stuck_rows(
    problem: Problem, row: int, rows: int, t: float, dt: float, is_finite: bool
) -> NonFiniteState | StepSizeUnderflow:
    """`rows` rows cannot go on, the first of them `row`, at solver time t with a step of dt.

    `is_finite` tells whether derivative and error of that row were finite.
    """
    at, where = problem.field.user_time(t), f"{rows} of {problem.y0.shape[0]} rows"
    if not is_finite:
        return NonFiniteState(
            f"non-finite values in state: the field returned nan or inf in {where}, first in row "
            f"{row}, at t={at:.9g}. Look at the field's weights and at that row of the input."
        )
    return StepSizeUnderflow(
        f"underflow in dt {dt:.3g} at t={at:.9g} in {where}, first in row {row}. The solution may "
        "blow up there, or rtol and atol are too tight for the state's dtype."
    )
