"""Implicit Runge-Kutta methods: fixed steps whose stage equations are solved by Newton's method.

Sources: Hairer, Wanner, Solving ODEs II, 2nd ed., IV.8 (simplified Newton iterations); Deuflhard,
Newton Methods for Nonlinear Problems (2004), 3.3 (damping by the natural monotonicity test);
Eisenstat, Elman, Schultz, SIAM J. Numer. Anal. 20 (1983) (generalised conjugate residuals).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from anode_fast.errors import InvalidArgument, NonlinearSolveFailed
from anode_fast.reference.step import GridStep, Interval, combine
from anode_fast.tableau import ButcherTableau
from anode_fast.vector_field import HERE, NEXT, PREV, VectorField

MOST_DENSE_UNKNOWNS = 512
"""Real unknowns of one system up to which its matrix is formed and factorised."""

MOST_KRYLOV_VECTORS = 200
"""Directions after which an iterative linear solve stops; the next Newton iteration goes on."""

FRACTION = 0.01
"""Part of the tolerance that may be left as error of the stage equations."""

QUICK = 0.1
"""Contraction per iteration up to which a Jacobian is kept."""

ROUNDING_DAMPING = 0.1
"""Damping below which a useless correction no larger than rounding is taken for rounding."""


@dataclass
class ImplicitRecipe:
    """One step of an implicit Runge-Kutta method.

    The stages k_i = f(t + c_i h, y + h sum_j a_ij k_j) of a diagonally implicit tableau are solved
    one after the other, those of a fully implicit one together. Complex states are solved for as
    pairs of reals, so a field need not be holomorphic. Every iteration synchronises with the host.

    First derivatives are exact for the converged stages, by the implicit function theorem. Second
    ones are not available: asking for them raises NotImplementedError.

    Args:
        field: The field. Newton's method needs it to be differentiable by autograd; up to
            `MOST_DENSE_UNKNOWNS` unknowns once, above twice.
        tableau: An implicit tableau.
        linear, perturb: As in `GridStep`.
        max_iters: Most iterations for one system of stage equations.
        tolerances: rtol, atol: stages are solved to `FRACTION` of atol + rtol * |y|, or to
            rounding.

    Raises:
        NonlinearSolveFailed: The stage equations could not be solved.
    """

    field: VectorField
    tableau: ButcherTableau
    linear: bool
    perturb: bool
    max_iters: int
    tolerances: tuple[float | Tensor, float | Tensor]

    def __call__(self, interval: Interval, y: Tensor, f0: Tensor | None) -> GridStep:
        a, c = self.tableau.a_float, self.tableau.c_float
        start, slope0 = _to_real(y), f0
        ks: list[Tensor] = []
        for block in _blocks(a):
            stages = _Stages(self, interval, y, start, ks, block)
            if any(map(any, stages.a)):
                ks.extend(stages.solve())
            elif c[block[0]] == 0:
                if slope0 is None:
                    slope0 = _to_state(stages.values(stages.base)[0], y)
                ks.append(_to_real(slope0))
            else:
                ks.extend(stages.values(stages.base))
        y1 = _to_state(combine(start, ks, self.tableau.b_float, interval.h), y)
        return GridStep(
            self.field, interval, y, y1, f0, self.linear, self.perturb, self, slope0=slope0
        )


def _blocks(a: Sequence[Sequence[float]]) -> list[range]:
    """Stages that must be solved together: each alone if none needs a later one."""
    s = len(a)
    if any(a[i][j] for i in range(s) for j in range(i + 1, s)):
        return [range(s)]
    return [range(i, i + 1) for i in range(s)]


def _to_real(x: Tensor) -> Tensor:
    """A state as one real vector, [n]."""
    if x.is_complex():
        x = torch.view_as_real(x.resolve_conj())
    return x.reshape(-1)


def _to_state(x: Tensor, like: Tensor) -> Tensor:
    if like.is_complex():
        return torch.view_as_complex(x.reshape(*like.shape, 2))
    return x.reshape(like.shape)


class _Stages:
    """The equations k = f(base + h A k) of the m stages of a block; k is [m, n]."""

    def __init__(
        self,
        recipe: ImplicitRecipe,
        interval: Interval,
        y: Tensor,
        start: Tensor,
        known: Sequence[Tensor],
        block: range,
    ) -> None:
        tableau = recipe.tableau
        sides = {0.0: NEXT, 1.0: PREV} if recipe.perturb else {}
        nodes = [tableau.c_float[i] for i in block]
        self.recipe, self.interval, self.y = recipe, interval, y
        self.times = [(*interval.at(c), sides.get(c, HERE)) for c in nodes]
        self.base = [combine(start, known, tableau.a_float[i], interval.h) for i in block]
        self.a = [[tableau.a_float[i][j] for j in block] for i in block]
        self.dt = interval.t1 - interval.t0
        rtol, atol = recipe.tolerances
        tolerance = (rtol * y.detach().abs() + atol) * FRACTION
        if y.is_complex():
            tolerance = torch.stack([tolerance, tolerance], -1)
        self.tolerance = tolerance.reshape(-1)

    def points(self, k: Tensor) -> list[Tensor]:
        """The states at which the stages are evaluated, m times [n]."""
        h, ks = self.interval.h, k.unbind()
        return [combine(base, ks, row, h) for base, row in zip(self.base, self.a, strict=True)]

    def values(self, points: Sequence[Tensor]) -> list[Tensor]:
        """The field at `points`, m times [n]."""
        return [
            _to_real(self.recipe.field(t, _to_state(point, self.y), shift, side))
            for point, (t, shift, side) in zip(points, self.times, strict=True)
        ]

    def solve(self) -> tuple[Tensor, ...]:
        """The stages, differentiable with respect to all that they depend on if grad is enabled."""
        with torch.no_grad():
            k = _newton(self)
        if k.numel() and torch.is_grad_enabled():
            points = self.points(k)
            values = self.values(points)
            if any(value.requires_grad for value in values):
                attached = points[0].requires_grad
                lin = _Linearisation(points, values) if attached else _linearise(self, points)
                solver = _linear_solver(self, lin)
                k = _Implicit.apply(torch.stack(values), k, solver)
        return k.unbind()


class _Implicit(torch.autograd.Function):
    """The root k of k = f(k, everything else), as a function of the value of f.

    dk = h A J dk + df, where df is what flows on to the graph of f; so dk = M^-1 df.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, k: Tensor, solver: _LinearSolver) -> Tensor:
        ctx.save_for_backward(value)
        ctx.solver = solver
        return k.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        with torch.no_grad():
            pulled = ctx.solver.solve(grad, transposed=True)
        if torch.is_grad_enabled():
            pulled = _Constant.apply(pulled, grad, *ctx.saved_tensors)
        return pulled, None, None


class _Constant(torch.autograd.Function):
    """A value whose dependence on `sources` is not known: better no derivative than a wrong one."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *sources: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(
            "odeint: implicit Runge-Kutta methods have first derivatives only. For second ones use "
            "an explicit method, such as dopri5."
        )


# --- linear systems -------------------------------------------------------------------------------


@dataclass
class _Linearisation:
    """Points of m stages and the field's values there, m times [n] each, with the graph between."""

    points: list[Tensor]
    values: list[Tensor]

    def vjp(self, i: int, v: Tensor, **how: bool) -> Tensor:
        """J_i^T v for v [n]; a row for each row of v if is_grads_batched."""
        value, point = self.values[i], self.points[i]
        if not value.requires_grad:  # the field does not depend on y
            return torch.zeros_like(v)
        (out,) = torch.autograd.grad(value, point, v, retain_graph=True, allow_unused=True, **how)
        return torch.zeros_like(v) if out is None else out

    def jacobian(self, i: int) -> Tensor:
        """J_i, [n, n]."""
        point = self.points[i]
        eye = torch.eye(point.numel(), dtype=point.dtype, device=point.device)
        try:
            return self.vjp(i, eye, is_grads_batched=True)
        except RuntimeError:  # an operation that vmap cannot batch
            return torch.stack([self.vjp(i, row) for row in eye])


def _linearise(stages: _Stages, points: Sequence[Tensor]) -> _Linearisation:
    # A field can be differentiated in inference mode too, at points made outside of it.
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [point.detach().clone().requires_grad_() for point in points]
        return _Linearisation(leaves, stages.values(leaves))


class _LinearSolver(Protocol):
    """Solves with M = 1 - h [a_ij J_i], the Jacobian of k - f(base + h A k)."""

    def solve(self, right: Tensor, *, transposed: bool = False) -> Tensor:
        """M^-1 right, or M^-T right; [m, n]. Not finite if M is singular."""


def _linear_solver(stages: _Stages, lin: _Linearisation) -> _LinearSolver:
    unknowns = len(stages.a) * lin.points[0].numel()
    kind = _Dense if unknowns <= MOST_DENSE_UNKNOWNS else _MatrixFree
    return kind(lin, stages.a, stages.dt)


class _Dense:
    """Forms and factorises M."""

    def __init__(self, lin: _Linearisation, a: list[list[float]], h: float) -> None:
        jacobians = [lin.jacobian(i).detach() for i in range(len(a))]
        matrix = torch.cat(
            [
                torch.cat([jacobian * (-h * weight) for weight in row], dim=1)
                for jacobian, row in zip(jacobians, a, strict=True)
            ]
        )
        matrix.diagonal().add_(1)
        self._lu, self._pivots, _ = torch.linalg.lu_factor_ex(matrix)

    def solve(self, right: Tensor, *, transposed: bool = False) -> Tensor:
        column = right.reshape(-1, 1)
        lu, pivots = self._lu, self._pivots
        solution: Tensor = torch.linalg.lu_solve(lu, pivots, column, adjoint=transposed)
        return solution.reshape_as(right)


class _MatrixFree:
    """Solves by products with M, from one backward pass through the field for each."""

    def __init__(self, lin: _Linearisation, a: list[list[float]], h: float) -> None:
        self._lin = lin
        self._ha = torch.tensor(a, dtype=lin.points[0].dtype, device=lin.points[0].device) * h
        self._pullbacks: list[tuple[Tensor, Tensor]] = []

    def solve(self, right: Tensor, *, transposed: bool = False) -> Tensor:
        return _conjugate_residuals(self._pulled if transposed else self._pushed, right)

    def _pulled(self, x: Tensor) -> Tensor:
        """M^T x, [m, n]."""
        parts = [self._lin.vjp(i, v) for i, v in enumerate(x.unbind())]
        return x - self._ha.T @ torch.stack(parts)

    def _pushed(self, x: Tensor) -> Tensor:
        """M x, [m, n]. J v is the derivative of J^T u, which is linear in u, pulled back by v."""
        if not self._pullbacks:
            with torch.inference_mode(False), torch.enable_grad():
                us = [torch.zeros_like(value).requires_grad_() for value in self._lin.values]
                pulled = [self._lin.vjp(i, u, create_graph=True) for i, u in enumerate(us)]
            self._pullbacks = list(zip(us, pulled, strict=True))
        moved = (self._ha @ x).unbind()
        return x - torch.stack(
            [_pull(p, u, v) for (u, p), v in zip(self._pullbacks, moved, strict=True)]
        )


def _pull(pulled: Tensor, u: Tensor, v: Tensor) -> Tensor:
    if not pulled.requires_grad:  # the field does not depend on y
        return torch.zeros_like(v)
    try:
        (out,) = torch.autograd.grad(pulled, u, v, retain_graph=True)
    except RuntimeError as error:
        raise InvalidArgument(
            "odeint: implicit methods differentiate the field twice for systems of over "
            f"{MOST_DENSE_UNKNOWNS} unknowns, but autograd cannot differentiate this field's "
            f"backward pass: {error} Use operations that have second derivatives, or smaller "
            "batches."
        ) from error
    return out


def _conjugate_residuals(product: Callable[[Tensor], Tensor], right: Tensor) -> Tensor:
    """Solves product(x) = right, nearly to rounding if `MOST_KRYLOV_VECTORS` directions suffice.

    Every direction p and its product q are kept, the q orthonormal, so the residual is as small as
    the directions allow (in exact arithmetic GMRES's).
    """
    residual, x = right.reshape(-1), torch.zeros_like(right).reshape(-1)
    target = torch.finfo(right.dtype).eps ** 0.75 * float(torch.linalg.vector_norm(residual))
    ps, qs = residual.new_empty(0, len(x)), residual.new_empty(0, len(x))
    while len(ps) < MOST_KRYLOV_VECTORS:
        if not float(torch.linalg.vector_norm(residual)) > target:
            break
        p, q = residual, product(residual.reshape(right.shape)).reshape(-1)
        for _ in range(2):  # twice, for orthogonality to rounding
            along = qs @ q
            p, q = p - along @ ps, q - along @ qs
        length = torch.linalg.vector_norm(q)
        ps, qs = torch.cat([ps, (p / length)[None]]), torch.cat([qs, (q / length)[None]])
        along = qs[-1] @ residual
        x, residual = x + along * ps[-1], residual - along * qs[-1]
    return x.reshape(right.shape)


# --- Newton ---------------------------------------------------------------------------------------


def _newton(stages: _Stages) -> Tensor:
    """Solves the stage equations from k = 0; [m, n].

    A correction is accepted if the next one, by the same Jacobian, is smaller; else it is damped. A
    Jacobian is kept while corrections shrink quickly, and blamed before a correction is. Damping
    finds the solution near the start of the step or, beyond a fold, none: it does not leap to a far
    one, which would solve these equations but seldom lies near the true y.

    Raises:
        NonlinearSolveFailed: The iterations are used up, or the field is not finite at a point from
            which there is no way back.
    """
    k = torch.stack([torch.zeros_like(base) for base in stages.base])
    if not k.numel():
        return k
    residual = correction = k
    damping, solver, fresh = 1.0, None, False
    iterations = 0
    while iterations < stages.recipe.max_iters:
        iterations += 1
        if solver is None:
            lin = _linearise(stages, stages.points(k))
            residual = k - torch.stack(lin.values).detach()
            solver, fresh = _linear_solver(stages, lin), True
            correction = -solver.solve(residual)
            if not bool(correction.isfinite().all()):
                break
            if _Units(stages, k + correction).left(correction) < 1:
                return k + correction
        trial = k + damping * correction
        trial_residual = trial - torch.stack(stages.values(stages.points(trial)))
        following = -solver.solve(trial_residual)
        units = _Units(stages, trial)
        size, next_size = units.left(correction), units.left(following)
        if damping == 1 and next_size < 1:
            return trial + following
        if next_size < (1 - damping / 2) * size:
            k, residual, correction, fresh = trial, trial_residual, following, False
            if damping < 1 or next_size > QUICK * size:
                solver = None
            damping = min(2 * damping, 1.0)
        elif not fresh:
            solver = None
        elif damping < ROUNDING_DAMPING and units.rounding(correction) < 1:
            return k
        else:
            damping /= 2
    raise _failure(stages, iterations, residual)


class _Units:
    """What counts as small for a change of the stages k, judged by what it moves: y."""

    def __init__(self, stages: _Stages, k: Tensor) -> None:
        eps = max(stages.recipe.field.roundoff, stages.recipe.field.noise)
        base = torch.stack(stages.base)
        terms = base.abs() + (torch.stack(stages.points(k)) - base).abs()
        least = torch.finfo(k.dtype).tiny ** 0.5  # 0 / 0 shall be 0
        self._dt = stages.dt
        self._left = torch.maximum(stages.tolerance, 4 * eps * terms).clamp_min(least)
        self._rounding = (100 * eps * terms.max()).clamp_min(least)

    def left(self, change: Tensor) -> float:
        """Largest entry relative to the error that may be left."""
        return float((change * self._dt / self._left).abs().max())

    def rounding(self, change: Tensor) -> float:
        """Largest entry relative to what rounding may have done, in any of the entries."""
        return float((change * self._dt / self._rounding).abs().max())


def _failure(stages: _Stages, iterations: int, residual: Tensor) -> NonlinearSolveFailed:
    t = stages.recipe.field.user_time(stages.interval.t0)
    return NonlinearSolveFailed(
        f"stage equations of {stages.recipe.tableau.name} not solved at t={t:.9g} with "
        f"dt={stages.dt:.3g}: after {iterations} Newton iterations the largest residual is "
        f"{float(residual.abs().max()):.3g}. Use smaller steps (options['step_size']) or raise "
        "options['max_iters']; check that the field is smooth, and that autograd can differentiate "
        "it with respect to y (no detach, no numpy)."
    )
