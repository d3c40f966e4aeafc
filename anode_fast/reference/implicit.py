"""Implicit Runge-Kutta methods: fixed steps whose stage equations are solved by Newton's method.

Sources: Hairer, Wanner, Solving ODEs II, 2nd ed., IV.8 (simplified Newton iterations); Deuflhard,
Newton Methods for Nonlinear Problems (2004), 3.3 (damping by the natural monotonicity test); Saad,
Schultz, GMRES, SIAM J. Sci. Stat. Comput. 7 (1986).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from anode_fast.errors import InvalidArgument, NonlinearSolveFailed
from anode_fast.reference.step import Factor, GridStep, Interval, combine
from anode_fast.tableau import ButcherTableau
from anode_fast.vector_field import HERE, NEXT, PREV, VectorField

MOST_DENSE_UNKNOWNS = 512
"""Real unknowns of one system up to which its matrix is formed and factorised."""

MOST_KRYLOV_VECTORS = 200
"""Dimension at which GMRES gives up; the next Newton iteration starts it afresh."""

FRACTION = 0.01
"""Part of the tolerance that may be left of the error of the stage equations."""

QUICK = 0.1
"""Contraction per iteration up to which a Jacobian is kept."""


@dataclass
class ImplicitRecipe:
    """One step of an implicit Runge-Kutta method.

    The stages k_i = f(t + c_i h, y + h sum_j a_ij k_j) of a diagonally implicit tableau are solved one
    after the other, those of a fully implicit one together. Complex states are solved for as pairs of
    reals, so a field need not be holomorphic. Every iteration synchronises with the host.

    First derivatives are exact for the converged stages, by the implicit function theorem. Second ones
    are not available: asking for them raises autograd's error.

    Args:
        field: The field. Newton's method needs it to be differentiable by autograd; up to
            `MOST_DENSE_UNKNOWNS` unknowns once, above twice.
        tableau: An implicit tableau.
        linear, perturb: As in `GridStep`.
        max_iters: Most iterations for one system of stage equations.
        tolerances: rtol, atol: stages are solved to `FRACTION` of atol + rtol * |y|, or to rounding.

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
        start, ks = _to_real(y), list[Tensor]()
        slope0 = f0
        for block in _blocks(a):
            system = _Stages(self, interval, y, start, ks, block)
            if any(a[block[0]][j] for j in block):
                ks.extend(system.solve())
            elif c[block[0]] == 0 and f0 is not None:
                ks.append(_to_real(f0))
            else:
                ks.extend(system.values(system.points(None)))
                if c[block[0]] == 0:
                    slope0 = _to_state(ks[-1], y)
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
    """The equations g(k) = k - f(base + h A k) = 0 of the m stages of a block; k is [m, n]."""

    def __init__(
        self,
        recipe: ImplicitRecipe,
        interval: Interval,
        y: Tensor,
        start: Tensor,
        known: Sequence[Tensor],
        block: range,
    ) -> None:
        tableau, perturb = recipe.tableau, recipe.perturb
        sides = {0.0: NEXT, 1.0: PREV} if perturb else {}
        nodes = [tableau.c_float[i] for i in block]
        self.recipe, self.interval, self.y = recipe, interval, y
        self.times = [(*interval.at(c), sides.get(c, HERE)) for c in nodes]
        self.base = [combine(start, known, tableau.a_float[i], interval.h) for i in block]
        self.a = [[tableau.a_float[i][j] for j in block] for i in block]
        self.dt = interval.t1 - interval.t0

    def points(self, k: Tensor | None, h: Factor | None = None) -> list[Tensor]:
        """The states at which the stages are evaluated, m times [n]."""
        if k is None:
            return self.base
        step = self.dt if h is None else h
        return [
            combine(base, k.unbind(), row, step)
            for base, row in zip(self.base, self.a, strict=True)
        ]

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
        if torch.is_grad_enabled():
            points = self.points(k, self.interval.h)
            values = self.values(points)
            if any(value.requires_grad for value in values):
                if not points[0].requires_grad:
                    lin = _linearise(self, points)
                else:
                    lin = _Linearisation(points, values)
                k = _Implicit.apply(torch.stack(values), k, _linear_solver(self, lin))
        return k.unbind()


class _Implicit(torch.autograd.Function):
    """The root k of k - f(k, everything else), as a function of the value of f.

    Of dk = J_k dk + df the part df flows on to the graph of f, so dk = M^-1 df with M = 1 - J_k.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, k: Tensor, linear: _LinearSolver) -> Tensor:
        ctx.linear = linear
        return k.clone()

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.linear.solve(grad, transposed=True), None, None


# --- linear algebra -------------------------------------------------------------------------------


@dataclass
class _Linearisation:
    """Values of the field at the points of m stages, m times [n], as graphs between the two."""

    points: list[Tensor]
    values: list[Tensor]

    def vjp(self, i: int, v: Tensor, create_graph: bool = False) -> Tensor:
        """J_i^T v for v [n]."""
        return self._grad(i, v, create_graph, False)

    def jacobian(self, i: int) -> Tensor:
        """J_i, [n, n]."""
        eye = torch.eye(self.points[i].numel()).to(self.points[i])
        try:
            return self._grad(i, eye, False, True)
        except RuntimeError:  # an operation that vmap cannot batch
            return torch.stack([self.vjp(i, row) for row in eye])

    def _grad(self, i: int, v: Tensor, create_graph: bool, batched: bool) -> Tensor:
        value, point = self.values[i], self.points[i]
        if not value.requires_grad:
            return torch.zeros_like(v)
        (grad,) = torch.autograd.grad(
            value,
            point,
            v,
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
            is_grads_batched=batched,
        )
        return torch.zeros_like(v) if grad is None else grad


def _linearise(stages: _Stages, points: Sequence[Tensor]) -> _Linearisation:
    # A field can be differentiated in inference mode too, at a state made outside of it.
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [point.detach().clone().requires_grad_() for point in points]
        return _Linearisation(leaves, stages.values(leaves))


class _LinearSolver(Protocol):
    def solve(self, right: Tensor, *, transposed: bool = False) -> Tensor:
        """M^-1 right, or M^-T right, for right [m, n]."""


def _linear_solver(stages: _Stages, linearisation: _Linearisation) -> _LinearSolver:
    unknowns = len(stages.a) * linearisation.points[0].numel()
    kind = _Dense if unknowns <= MOST_DENSE_UNKNOWNS else _Krylov
    return kind(linearisation, stages.a, stages.dt)


class _Dense:
    """M = 1 - h [a_ij J_i], factorised."""

    def __init__(self, lin: _Linearisation, a: list[list[float]], h: float) -> None:
        m, n = len(a), lin.points[0].numel()
        rows = []
        for i in range(m):
            jacobian = lin.jacobian(i).detach()
            rows.append(torch.cat([jacobian * (-h * a[i][j]) for j in range(m)], dim=1))
        matrix = torch.cat(rows)
        matrix.diagonal().add_(1)
        # A singular matrix shows as nan or inf in the solution.
        self._lu, self._pivots, _ = torch.linalg.lu_factor_ex(matrix)
        self._shape = m, n

    def solve(self, right: Tensor, *, transposed: bool = False) -> Tensor:
        column = right.reshape(-1, 1)
        out = torch.linalg.lu_solve(self._lu, self._pivots, column, adjoint=transposed)
        return out.reshape(self._shape)


class _Krylov:
    """M = 1 - h [a_ij J_i] as products with vectors, for GMRES."""

    def __init__(self, lin: _Linearisation, a: list[list[float]], h: float) -> None:
        self._lin = lin
        self._ha = torch.tensor(a, dtype=torch.float64).mul(h).to(lin.points[0])
        self._dummies: list[Tensor] = []
        self._transposed: list[Tensor] = []

    def solve(self, right: Tensor, *, transposed: bool = False) -> Tensor:
        return _gmres(self._transposed_product if transposed else self._product, right)

    def _product(self, x: Tensor) -> Tensor:
        moved = self._ha @ x
        return x - torch.stack([self._jvp(i, v) for i, v in enumerate(moved.unbind())])

    def _transposed_product(self, x: Tensor) -> Tensor:
        pulled = torch.stack([self._lin.vjp(i, v) for i, v in enumerate(x.unbind())])
        return x - self._ha.T @ pulled

    def _jvp(self, i: int, v: Tensor) -> Tensor:
        """J_i v: J_i^T u is linear in u, and its derivative in the direction v is what we want."""
        if not self._dummies:
            with torch.inference_mode(False), torch.enable_grad():
                for j, value in enumerate(self._lin.values):
                    dummy = torch.zeros_like(value).requires_grad_()
                    self._dummies.append(dummy)
                    self._transposed.append(self._lin.vjp(j, dummy, create_graph=True))
        product, dummy = self._transposed[i], self._dummies[i]
        if not product.requires_grad:
            return torch.zeros_like(v)
        (out,) = torch.autograd.grad(product, dummy, v, retain_graph=True, allow_unused=True)
        return torch.zeros_like(v) if out is None else out


def _gmres(product: Any, right: Tensor) -> Tensor:
    """Solves product(x) = right from x = 0, as far as `MOST_KRYLOV_VECTORS` vectors go."""
    size = float(torch.linalg.vector_norm(right))
    if size == 0 or not math.isfinite(size):
        return right
    enough = torch.finfo(right.dtype).eps ** (2 / 3)
    basis = [right.reshape(-1) / size]
    columns: list[list[float]] = []
    rotations: list[tuple[float, float]] = []
    rest = [size]
    while len(columns) < MOST_KRYLOV_VECTORS and abs(rest[-1]) > enough * size:
        v = product(basis[-1].reshape(right.shape)).reshape(-1)
        column = [0.0] * len(basis)
        for _ in range(2):  # Gram-Schmidt, twice is enough
            parts = torch.stack(basis) @ v
            v = v - parts @ torch.stack(basis)
            column = [p + q for p, q in zip(column, parts.tolist(), strict=True)]
        below = float(torch.linalg.vector_norm(v))
        if not math.isfinite(below):
            return torch.full_like(right, math.nan)
        for i, (cos, sin) in enumerate(rotations):
            upper, lower = column[i], column[i + 1]
            column[i], column[i + 1] = cos * upper + sin * lower, cos * lower - sin * upper
        radius = math.hypot(column[-1], below)
        if radius == 0:
            return torch.full_like(right, math.nan)
        cos, sin = column[-1] / radius, below / radius
        rotations.append((cos, sin))
        column[-1] = radius
        columns.append(column)
        rest[-1:] = [cos * rest[-1], -sin * rest[-1]]
        if below == 0:
            break
        basis.append(v / below)
    weights = [0.0] * len(columns)
    for i in reversed(range(len(columns))):
        total = rest[i] - sum(columns[j][i] * weights[j] for j in range(i + 1, len(columns)))
        weights[i] = total / columns[i][i]
    return combine(None, basis, weights, 1.0).reshape(right.shape)


# --- Newton ---------------------------------------------------------------------------------------


def _newton(stages: _Stages) -> Tensor:
    """Solves the stage equations from k = 0, the state at rest; [m, n].

    A Jacobian is kept as long as corrections shrink quickly. A correction is accepted if the next one,
    by the same Jacobian, is smaller; else it is damped.
    """
    recipe = stages.recipe
    k = torch.stack([torch.zeros_like(base) for base in stages.base]).detach()
    if k.numel() == 0:
        return k
    damping, left = 1.0, recipe.max_iters
    linear: _LinearSolver | None = None
    residual, correction = k, k
    while left > 0:
        if linear is None:
            lin = _linearise(stages, stages.points(k))
            residual = k - torch.stack([value.detach() for value in lin.values])
            linear = _linear_solver(stages, lin)
            correction = -linear.solve(residual)
            left -= 1
            size, noise = _sizes(stages, k + correction, correction)
            if not math.isfinite(size):
                break
            if size < 1:
                return k + correction
        trial = k + damping * correction
        trial_residual = trial - torch.stack(stages.values(stages.points(trial)))
        following = -linear.solve(trial_residual)
        left -= 1
        size, noise = _sizes(stages, trial, correction)
        next_size, _ = _sizes(stages, trial, following)
        if damping == 1 and size > 0 and next_size <= size and next_size < 1:
            return trial + following
        contracts = next_size <= (1 - damping / 2) * size if damping < 1 else next_size < size
        if contracts:
            quick = damping == 1 and next_size < QUICK * size
            k, residual, correction = trial, trial_residual, following
            damping = min(1.0, 2 * damping)
            if not quick:
                linear = None
        elif noise < 1:
            return k
        else:
            damping /= 2
    raise _failure(stages, k, residual)


def _sizes(stages: _Stages, k: Tensor, change: Tensor) -> tuple[float, float]:
    """Largest entry of h * change, in units of what is small enough, and of what may be rounding."""
    recipe = stages.recipe
    rtol, atol = recipe.tolerances
    points = torch.stack(stages.points(k)).abs()
    y = stages.y.abs()
    tolerance = (atol + rtol * y) * FRACTION
    if stages.y.is_complex():
        tolerance = tolerance.unsqueeze(-1).expand(*tolerance.shape, 2)
    eps = max(torch.finfo(k.dtype).eps, recipe.field.noise)
    enough = torch.maximum(tolerance.reshape(-1), 4 * eps * points)
    moved = (stages.dt * change).abs()
    rounding = 100 * eps * points.max()
    return float((moved / enough).max()), float((moved / rounding).max())


def _failure(stages: _Stages, k: Tensor, residual: Tensor) -> NonlinearSolveFailed:
    recipe = stages.recipe
    t = recipe.field.user_time(stages.interval.t0)
    return NonlinearSolveFailed(
        f"stage equations of {recipe.tableau.name} not solved at t={t:.9g} with dt={stages.dt:.3g}: "
        f"after {recipe.max_iters} Newton iterations the largest residual is "
        f"{float(residual.abs().max()):.3g}. Use smaller steps (options['step_size']), raise "
        "options['max_iters'], and check that the field is smooth and that autograd can "
        "differentiate it with respect to y (no detach, no numpy)."
    )
