"""A native solve with everything fixed but the tensors: the C structs and the calls.

The structs mirror problem.hpp and api.cpp field by field; tests/kernels/cpu compares their
sizes with the library's.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable, Sequence
from ctypes import c_double, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from anode_fast.kernels.cpu import lowering
from anode_fast.kernels.interface import Method
from anode_fast.kernels.program import Program

MOST_STAGES = 16

_Stages = c_double * MOST_STAGES


class _Tableau(ctypes.Structure):
    _fields_ = [
        ("stages", c_int32),
        ("order", c_int32),
        ("last_at_solution", c_int32),
        ("last_on_demand", c_int32),
        ("c", _Stages),
        ("a", _Stages * MOST_STAGES),
        ("b", _Stages),
        ("b_err", _Stages),
        ("interpolant", (c_double * 4) * MOST_STAGES),
    ]


class _Options(ctypes.Structure):
    _fields_ = [
        ("control", c_int32),
        ("backwards", c_int32),
        ("float_time", c_int32),
        ("data_dim", c_int32),
        ("rtol", c_double),
        ("atol", c_double),
        ("first_step", c_double),
        ("safety", c_double),
        ("ifactor", c_double),
        ("dfactor", c_double),
        ("min_step", c_double),
        ("max_step", c_double),
        ("max_num_steps", c_int64),
    ]


class _Plan(ctypes.Structure):
    _fields_ = [
        ("field", ctypes.POINTER(lowering.Shape)),
        ("is_double", c_int32),
        ("tableau", _Tableau),
        ("options", _Options),
    ]


class Result(ctypes.Structure):
    """Counts and outcome of a call, as in problem.hpp."""

    _fields_ = [
        ("status", c_int32),
        ("field_failed", c_int32),
        ("nfe", c_int64),
        ("accepted", c_int64),
        ("rejected", c_int64),
        ("t", c_double),
        ("dt", c_double),
        ("row", c_int64),
        ("rows", c_int64),
        ("output", c_int64),
        ("deviation", c_double),
    ]

    launches = 1
    last = later = None  # as a GPU's result has them


@functools.lru_cache(maxsize=256)
def _packer(integers: int, floats: int = 0) -> Callable[..., bytes]:
    """What makes a block of arguments: so many integers or addresses, then so many floats."""
    return struct.Struct(f"={integers}q{floats}d").pack


class Checkpoints:
    """What a solve keeps for its gradient. The memory belongs to the library and ends with this."""

    __slots__ = ("_free", "address")

    def __init__(self, address: int, free: Callable[[int], None]) -> None:
        self.address = address
        self._free = free

    def __del__(self) -> None:
        self._free(self.address)


class Solve:
    """A solve with everything fixed but the tensors and times.

    Args:
        library: From `library.load`.
        field: The field.
        method: The method.
        dtype: torch.float32 or torch.float64.
        options: Fields of the C struct Options by name; those left out are 0.

    Raises:
        ValueError: More stages than the library has room for.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        field: Program,
        method: Method,
        dtype: torch.dtype,
        **options: float,
    ) -> None:
        stages = len(method.c)
        if stages > MOST_STAGES:
            raise ValueError(f"no room for {stages} stages, want {MOST_STAGES} at most")
        self.dim = field.dim
        self.dtype = dtype
        plan = _Plan(is_double=dtype == torch.float64, options=_Options(**options))
        plan.field = ctypes.pointer(lowering.shape(field))
        self._tensors = len(field.shapes)
        tableau = plan.tableau
        tableau.stages, tableau.order = stages, method.order
        tableau.last_at_solution = method.last_at_solution
        tableau.last_on_demand = method.last_on_demand
        tableau.c, tableau.b = _Stages(*method.c), _Stages(*method.b)
        tableau.b_err = _Stages(*method.b_err)
        for i in range(stages):
            tableau.a[i] = _Stages(*method.a[i])
            tableau.interpolant[i] = (c_double * 4)(*method.interpolant[i])
        self._plan = plan
        self._address = ctypes.addressof(plan)
        self._pointers = c_void_p * self._tensors
        self._solve = library.anode_solve
        self._discrete_gradient = library.anode_discrete_gradient
        self._continuous_gradient = library.anode_continuous_gradient
        self._free = library.anode_free

    def forward(
        self,
        x: Tensor,
        parameters: Sequence[Tensor],
        times: Sequence[float],
        grid: Sequence[float] = (),
        keep: bool = False,
        expected: Tensor | None = None,
    ) -> tuple[Tensor, Result, Checkpoints | None]:
        """Solves.

        Args:
            x: Data columns of the initial state, [rows, data_dim], last stride 1.
            parameters: The field's tensors, contiguous.
            times: Output times, increasing.
            grid: For fixed steps: where they begin and end.
            keep: Whether to keep checkpoints.
            expected: dy/dt of the first rows of x at the first time, [some rows, dim], contiguous,
                by other code and in that code's time. Where the field's own values differ from it
                by more than rounding, there is no solve: the outcome is FIELD_DIFFERS.

        Returns:
            The solution [times, rows, dim], counts and outcome, and the checkpoints, None if not
            asked for or if the solve failed.
        """
        rows, n, m = x.shape[0], len(times), len(grid)
        out = x.new_empty((n, rows, self.dim))
        result = Result()
        arguments = _packer(11 + self._tensors, n + m)(
            self._address,
            rows,
            x.data_ptr(),
            x.stride(0),
            out.data_ptr(),
            keep,
            ctypes.addressof(result),
            n,
            m,
            0 if expected is None else expected.data_ptr(),
            0 if expected is None else expected.shape[0],
            *[p.data_ptr() for p in parameters],
            *times,
            *grid,
        )
        address = self._solve(arguments)
        return out, result, Checkpoints(address, self._free) if address else None

    def discrete_gradient(
        self,
        checkpoints: Checkpoints,
        parameters: Sequence[Tensor],
        grad: Tensor,
        x: Tensor | None,
        wanted: bool,
    ) -> tuple[Tensor | None, list[Tensor], Result]:
        """The exact gradient of a solve.

        Args:
            checkpoints: Of the solve.
            parameters: As in `forward`, unchanged since.
            grad: Cotangent of the solution, [times, rows, dim], contiguous.
            x: A tensor like the gradient for x, if that is wanted.
            wanted: Whether the parameters' gradients are wanted.

        Returns:
            The gradient for x or None, those of the parameters (none if not wanted), the counts.
        """
        x_grad = None if x is None else torch.empty(x.shape, dtype=self.dtype)
        grads = [torch.empty_like(p) for p in parameters] if wanted else []
        result = Result()
        arguments = _packer(6 + self._tensors + len(grads))(
            self._address,
            checkpoints.address,
            grad.data_ptr(),
            0 if x_grad is None else x_grad.data_ptr(),
            ctypes.addressof(result),
            wanted,
            *[p.data_ptr() for p in parameters],
            *[p.data_ptr() for p in grads],
        )
        self._discrete_gradient(arguments)
        return x_grad, grads, result

    def continuous_gradient(
        self,
        solution: Tensor,
        parameters: Sequence[Tensor],
        times: Sequence[float],
        grad: Tensor,
        x: Tensor | None,
        wanted: Sequence[bool],
        grid: Sequence[float] = (),
        seminorm: bool = False,
    ) -> tuple[Tensor | None, list[Tensor | None], Result]:
        """The gradient of a solve by the adjoint ODE, which this method and these options solve.

        The options `backwards` and `data_dim` are those of the solve itself, whatever its others.

        Args:
            solution: What the solve returned, [times, rows, dim], contiguous.
            parameters: As in `forward`.
            times: Output times of the solve.
            grad: Cotangent of the solution, [times, rows, dim], contiguous.
            x: A tensor like the gradient for x, if that is wanted.
            wanted: Whether each parameter's gradient is wanted. Others have no part in the norm.
            grid: For fixed steps: their ends in negated time, increasing, from the last output time
                to the first; the others are among them, once, or twice where grids meet there.
            seminorm: Whether to leave the parameters' gradients out of the norm.

        Returns:
            The gradient for x or None; those of the parameters, None where not wanted; the counts.
        """
        n = len(times)
        x_grad = None if x is None else torch.empty(x.shape, dtype=self.dtype)
        grads = [
            torch.empty_like(p) if asked else None
            for p, asked in zip(parameters, wanted, strict=True)
        ]
        result = Result()
        self._continuous_gradient(
            self._address,
            solution.shape[1],
            self._pointers(*[p.data_ptr() for p in parameters]),
            (c_double * n)(*times),
            n,
            (c_double * len(grid))(*grid) if grid else None,
            len(grid),
            solution.data_ptr(),
            grad.data_ptr(),
            seminorm,
            None if x_grad is None else x_grad.data_ptr(),
            self._pointers(*[None if p is None else p.data_ptr() for p in grads]),
            ctypes.byref(result),
        )
        return x_grad, grads, result
