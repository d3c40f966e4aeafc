"""SciPy's solvers (`method="scipy_solver"`): any of `solve_ivp`'s methods, on the CPU.

No autograd graph goes through SciPy: gradients need odeint_adjoint or gradient="continuous".
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from anode_fast.errors import InvalidArgument, NonFiniteState, SolverError
from anode_fast.problem import Problem


def solve_with_scipy(problem: Problem) -> Tensor:
    """The solution at the output times, [times, *state], by `scipy.integrate.solve_ivp`.

    Raises:
        ImportError: SciPy is not installed.
        InvalidArgument: The option solver names no method of solve_ivp.
        SolverError: SciPy gave up; its message is in ours.
    """
    try:
        from scipy.integrate import solve_ivp
    except ImportError as error:
        raise ImportError('method="scipy_solver" needs SciPy: pip install scipy') from error
    options, y0 = problem.options, problem.y0
    name = options.get("solver", "LSODA")
    if name not in ("RK45", "RK23", "DOP853", "Radau", "BDF", "LSODA"):
        raise InvalidArgument(
            f"odeint: option solver is {name!r}, want one of RK45 RK23 DOP853 Radau BDF LSODA"
        )
    if y0.is_complex() and name == "LSODA":
        raise InvalidArgument(
            "odeint: SciPy's LSODA takes real states; options=dict(solver='RK45')"
        )

    field_errors: list[Exception] = []

    def field(t: float, y: np.ndarray) -> np.ndarray:
        state = torch.as_tensor(y).reshape(y0.shape).to(dtype=y0.dtype, device=y0.device)
        try:
            with torch.no_grad():
                value = problem.field(float(t), state)
        except Exception as error:
            field_errors.append(error)
            raise
        return value.detach().cpu().numpy().reshape(-1)

    limits = {key: options[key] for key in ("max_step",) if key in options}
    if name == "LSODA" and "min_step" in options:
        limits["min_step"] = options["min_step"]
    rtol, atol = (
        tol.cpu().expand(y0.shape).reshape(-1).numpy() if isinstance(tol, Tensor) else tol
        for tol in (problem.rtol, problem.atol)
    )
    times = problem.times
    try:
        result = solve_ivp(
            field,
            (times[0], times[-1]),
            y0.detach().cpu().numpy().reshape(-1),
            t_eval=times,
            method=name,
            rtol=rtol,
            atol=atol,
            **limits,
        )
    except ValueError as error:
        if field_errors:
            raise
        raise NonFiniteState(
            f"non-finite values in state: SciPy's {name} stopped: {error}"
        ) from error
    if result.status < 0 or result.y.shape[1] != len(times):
        reached = problem.field.user_time(float(result.t[-1])) if len(result.t) else times[0]
        raise SolverError(f"SciPy's {name} gave up after t={reached:.9g}: {result.message}")
    solution = torch.as_tensor(result.y.T.copy()).to(dtype=y0.dtype, device=y0.device)
    return solution.reshape(len(times), *y0.shape)
