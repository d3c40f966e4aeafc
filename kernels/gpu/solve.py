"""A solve on a GPU with everything fixed but the tensors: buffers, launches, and what they left.

Nothing waits for the device but the look at how a solve ended, once at its end, and, where a solve
needs many launches, once every `CHUNK` of them. While a CUDA graph is captured nothing waits at
all: see `Solve.forward`.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from anode_fast.kernels.gpu import adjoint, controller, launch, mlp, runge_kutta
from anode_fast.kernels.gpu.launch import Launch
from anode_fast.kernels.interface import (
    BATCH,
    FIXED,
    NON_FINITE,
    NON_FINITE_INPUT,
    SAMPLE,
    SUCCESS,
    Field,
    Method,
)

CHUNK = 16
"""Launches that are queued before the host looks whether the solve has ended."""

CHECKPOINT_BYTES = 32 << 20
"""Of the checkpoints that a solve begins with; it gets more when they are full."""

MOST_CAPTURED = 256
"""Attempts that a captured solve of several programs may need at most: each one is a launch."""


@dataclass
class Result:
    """Counts and outcome of a call; the names are those of kernels/cpu/problem.hpp."""

    status: int = SUCCESS
    nfe: int = 0
    accepted: int = 0
    rejected: int = 0
    t: float = 0.0
    dt: float = 0.0
    row: int = 0
    rows: int = 0
    output: int = 0
    launches: int = 0
    last: tuple[Tensor, Tensor] | None = None
    """Of a failure with one step size: the last state and its derivative."""


@dataclass
class Checkpoints:
    """What a solve keeps for its gradient, on the device."""

    states: Tensor
    ends: Tensor
    plan: Tensor
    control: Tensor
    times: Tensor
    rows: int
    num_steps: int
    tile: int
    result: Result
    evaluations: int
    """That making its stages again takes, for fixed steps."""


class Solve:
    """A solve with everything fixed but the tensors and times.

    Args:
        field: The field.
        method: The method.
        dtype: torch.float32 or torch.float64.
        options: As the fields of the C struct Options in kernels/cpu/problem.hpp: `control`,
            `backwards`, `float_time`, `data_dim`, `rtol`, `atol`, `max_num_steps`, `first_step`,
            `safety`, `ifactor`, `dfactor`, `min_step`, `max_step`; those left out are 0.
    """

    def __init__(self, field: Field, method: Method, dtype: torch.dtype, **options: float) -> None:
        self.field = field
        self.method = method
        self.dtype = dtype
        self.dim = field.dim
        self.control = int(options["control"])
        self.data_dim = int(options["data_dim"])
        self.stages = len(method.c)
        self._tableau = _tableau(method)
        self._settings = [
            *(options["rtol"], options["atol"], options.get("first_step", 0.0)),
            *(options["safety"], options["ifactor"], options["dfactor"]),
            *(options.get("min_step", 0.0), options["max_step"], float(options["max_num_steps"])),
            *(1 / method.order, float(options["float_time"])),
            -1.0 if options["backwards"] else 1.0,
        ]
        self._max_num_steps = int(min(options["max_num_steps"], 2**31 - 1))
        self._on: dict[torch.device, tuple[Tensor, Tensor]] = {}

    # --- forward

    def forward(
        self,
        x: Tensor,
        parameters: Sequence[Tensor],
        times: Sequence[float],
        grid: Sequence[float] = (),
        keep: bool = False,
    ) -> tuple[Tensor, Result, Checkpoints | None]:
        """Solves.

        Args:
            x: Data columns of the initial state, [rows, data_dim], last stride 1.
            parameters: Weight and bias of every layer, contiguous.
            times: Output times, increasing.
            grid: For fixed steps: where they begin and end.
            keep: Whether to keep checkpoints.

        Returns:
            The solution [times, rows, dim], counts and outcome, and the checkpoints, None if not
            asked for or if the solve failed.
        """
        arguments = (x, tuple(parameters), tuple(times), tuple(grid), keep)
        solve: Callable[..., tuple[Tensor, Result, Checkpoints]]
        solve = {FIXED: self._fixed, BATCH: self._batch, SAMPLE: self._sample}[self.control]
        with _on(x.device):
            out, result, checkpoints = solve(*arguments)
        return out, result, checkpoints if keep and result.status == SUCCESS else None

    def _configuration(self, kernel: str, x: Tensor, rows: int) -> tuple[mlp.MLP, Launch]:
        found: tuple[mlp.MLP, Launch] = launch.configuration(
            *(kernel, rows, self.field, launch.precision(self.dtype)),
            *(self.dtype == torch.float64, _capability(x.device)),
        )
        return found

    def _constants(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Tableau and settings on the device."""
        if device not in self._on:
            self._on[device] = (
                torch.tensor(self._tableau, dtype=torch.float64, device=device),
                torch.tensor(self._settings, dtype=torch.float64, device=device),
            )
        return self._on[device]

    def _arguments(self, x: Tensor, rows: int) -> tuple[dict[str, Any], int]:
        """What the forward kernels have in common, and the number of programs."""
        F, config = self._configuration("forward", x, rows)
        S, B = self.stages, config.rows
        programs = max(1, triton.cdiv(rows, B))
        size = S * B * F.D + F.record_size(B)
        tableau, settings = self._constants(x.device)
        return dict(
            x=x,
            tableau=tableau,
            settings=settings,
            scratch=_empty(x, (programs, size)),
            x_stride=x.stride(0),
            rows=rows,
            **dict(EVALUATE=mlp.evaluate, F=F, DIM=self.dim, DATA=self.data_dim, S=S, B=B, D=F.D),
            SCRATCH=size,
            num_warps=config.warps,
            num_stages=1,
        ), programs

    def _fixed(
        self,
        x: Tensor,
        parameters: tuple[Tensor, ...],
        times: tuple[float, ...],
        grid: tuple[float, ...],
        keep: bool,
    ) -> tuple[Tensor, Result, Checkpoints]:
        rows, num_steps = x.shape[0], len(grid) - 1
        arguments, programs = self._arguments(x, rows)
        plan = _plan(times, grid, self.stages, self.method.last_on_demand)
        evaluations = sum(last - first for _, _, first, last in plan)
        times_on, ends_on = (_doubles(values, x.device) for values in (times, grid))
        plan_on = _integers(plan, x.device)
        out = _empty(x, (len(times), rows, self.dim))
        states = _empty(x, (num_steps if keep else 0, 2, rows, self.dim))
        control = _zeros(x, (programs, CONTROL))
        runge_kutta.fixed[(programs,)](
            weights=parameters,
            times=times_on,
            ends=ends_on,
            plan=plan_on,
            out=out,
            states=states,
            control=control,
            num_times=len(times),
            num_steps=num_steps,
            KEEP=keep,
            **arguments,
        )
        result = Result(nfe=evaluations, accepted=num_steps, launches=1)
        bad = float(control[:, controller.OUTPUT.value].amin())
        if bad < len(times):
            result.status = NON_FINITE_INPUT if bad < 0 else NON_FINITE
            result.output = int(bad)
        kept = Checkpoints(
            *(states, ends_on, plan_on, control, times_on, rows, num_steps, arguments["B"]),
            *(result, evaluations),
        )
        return out, result, kept

    def _batch(
        self,
        x: Tensor,
        parameters: tuple[Tensor, ...],
        times: tuple[float, ...],
        grid: tuple[float, ...],
        keep: bool,
    ) -> tuple[Tensor, Result, Checkpoints]:
        rows = x.shape[0]
        arguments, programs = self._arguments(x, rows)
        times_on = _doubles(times, x.device)
        out = _empty(x, (len(times), rows, self.dim))
        capacity = self._capacity(x, rows) if keep else 0
        states = _empty(x, (capacity + 1 if keep else 2, 2, rows, self.dim))
        steps = _empty(x, (capacity, 2), torch.float64)
        control = _zeros(x, (CONTROL,))
        sums = _empty(x, (programs, runge_kutta.SUMS.value), torch.float64)
        arrivals = _zeros(x, (1,), torch.int32)
        launches = 0
        while True:
            for _ in range(1 if programs == 1 else CHUNK):
                runge_kutta.adaptive[(programs,)](
                    weights=parameters,
                    times=times_on,
                    out=out,
                    states=states,
                    steps=steps,
                    control=control,
                    sums=sums,
                    arrivals=arrivals,
                    num_times=len(times),
                    capacity=capacity,
                    programs=programs,
                    KEEP=keep,
                    LOOP=programs == 1,
                    **arguments,
                )
                launches += 1
            state = control.tolist()
            if state[_STATUS] == controller.FULL.value:
                capacity = min(2 * capacity, self._max_num_steps)
                states = _grown(states, capacity + 1)
                steps = _grown(steps, capacity)
                control[_STATUS].zero_()
            elif state[_STATUS] != controller.RUNNING.value:
                break
        result = Result(
            status=int(state[_STATUS]) - 1,
            nfe=int(state[controller.NFE.value]),
            accepted=int(state[controller.ACCEPTED.value]),
            rejected=int(state[controller.REJECTED.value]),
            t=state[controller.T.value],
            dt=state[controller.DT.value],
            launches=launches,
        )
        if result.status != SUCCESS:
            y, f = states[result.accepted if keep else result.accepted % 2]
            result.last = y, f
        kept = Checkpoints(
            *(states, steps, arrivals, control, times_on, rows, 0, arguments["B"]),
            *(result, result.accepted * (self.stages - 1) + 1),
        )
        return out, result, kept

    def _sample(
        self,
        x: Tensor,
        parameters: tuple[Tensor, ...],
        times: tuple[float, ...],
        grid: tuple[float, ...],
        keep: bool,
    ) -> tuple[Tensor, Result, Checkpoints]:
        rows = x.shape[0]
        arguments, programs = self._arguments(x, rows)
        times_on = _doubles(times, x.device)
        out = _empty(x, (len(times), rows, self.dim))
        capacity = self._capacity(x, rows) if keep else 0
        states = _empty(x, (capacity + 1, 2, rows, self.dim))
        steps = _empty(x, (capacity, 2, rows), torch.float64)
        control = _zeros(x, (programs, CONTROL))
        row_control = _zeros(x, (5, programs * arguments["B"]))
        launches = 0
        while True:
            runge_kutta.adaptive_by_row[(programs,)](
                weights=parameters,
                times=times_on,
                out=out,
                states=states,
                steps=steps,
                control=control,
                row_control=row_control,
                num_times=len(times),
                capacity=capacity,
                KEEP=keep,
                **arguments,
            )
            launches += 1
            state = control.cpu()
            if not (state[:, _STATUS] == controller.FULL.value).any():
                break
            capacity = min(2 * capacity, self._max_num_steps)
            states = _grown(states, capacity + 1)
            steps = _grown(steps, capacity)
        result = self._merged(state, row_control[3:, :rows])
        result.launches = launches
        slots = int(state[:, controller.ACCEPTED.value].max())
        kept = Checkpoints(
            *(states, steps, control, control, times_on, rows, 0, arguments["B"]),
            *(result, slots * (self.stages - 1) + 1),
        )
        return out, result, kept

    def _merged(self, state: Tensor, counts: Tensor) -> Result:
        """The tiles' outcomes as one.

        In the reference all rows are at the same attempt: the first failure ends the solve.
        """
        accepted, rejected = counts.amax(1).tolist() if counts.numel() else (0, 0)
        result = Result(accepted=int(accepted), rejected=int(rejected))
        attempts = state[:, controller.NFE.value]
        failed = state[:, _STATUS] != controller.SUCCESS.value
        made = attempts.max()
        if failed.any():
            made = attempts[failed].min()
            first = state[failed & (attempts == made)]
            result.status = int(first[0, _STATUS]) - 1
            result.row = int(first[0, controller.ROW.value])
            result.rows = int(first[:, controller.ROWS.value].sum())
            result.t, result.dt = first[0, [controller.T.value, controller.DT.value]].tolist()
            if result.status == controller.MAX_STEPS.value - 1:
                result.t = float(first[:, controller.T.value].min())
        evaluations = 1 if self._settings[controller.FIRST_STEP.value] else 2
        result.nfe = evaluations + int(made) * (self.stages - 1)
        return result

    def _capacity(self, x: Tensor, rows: int) -> int:
        """Steps for which there are checkpoints at first."""
        size = max(2 * rows * self.dim * x.element_size(), 1)
        return int(min(max(CHECKPOINT_BYTES // size, 8), 128, self._max_num_steps))

    # --- gradients

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
        rows, S = checkpoints.rows, self.stages
        F, config = self._configuration("gradient", grad, rows)
        B = min(config.rows, checkpoints.tile)
        programs = min(max(1, triton.cdiv(rows, B)), _most_programs(grad.device))
        record = F.record_size(B)
        size = (2 * S + 1) * B * F.D + S * record + S
        tableau, settings = self._constants(grad.device)
        x_grad = _empty(grad, (rows, self.data_dim))
        count = F.weights if wanted else 0
        sums = _zeros(grad, (programs, count), self.dtype)
        with _on(grad.device):
            adjoint.discrete_gradient[(programs,)](
                weights=tuple(parameters),
                tableau=tableau,
                settings=settings,
                times=checkpoints.times,
                ends=checkpoints.ends,
                plan=checkpoints.plan,
                states=checkpoints.states,
                control=checkpoints.control,
                grad=grad,
                x_grad=x_grad,
                sums=sums,
                scratch=_empty(grad, (programs, size)),
                rows=rows,
                num_times=checkpoints.times.shape[0],
                num_steps=checkpoints.num_steps,
                programs=programs,
                **dict(EVALUATE=mlp.evaluate, VJP=mlp.vjp, ACCUMULATE=mlp.accumulate, F=F),
                **dict(SIZE=record, WEIGHTS=count, DIM=self.dim, DATA=self.data_dim),
                **dict(S=S, B=B, D=F.D, SCRATCH=size, TILE=checkpoints.tile),
                FIXED=self.control == FIXED,
                BY_ROW=self.control == SAMPLE,
                num_warps=config.warps,
                num_stages=1,
            )
            grads = self._reduced(sums, parameters) if wanted else []
        result = Result(nfe=checkpoints.evaluations, launches=2 if wanted else 1)
        return x_grad if x is not None else None, grads, result

    @staticmethod
    def _reduced(sums: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
        """The programs' weight gradients added up, shaped as the parameters."""
        programs, count = sums.shape
        flat = _empty(sums, (count,))
        blocks = triton.cdiv(count, adjoint.BLOCK.value)
        adjoint.reduce[(blocks,)](sums=sums, out=flat, programs=programs, WEIGHTS=count)
        parts = flat.split([p.numel() for p in parameters])
        return [part.view(p.shape) for part, p in zip(parts, parameters, strict=True)]


CONTROL = controller.CONTROL.value
_STATUS = controller.STATUS.value


def _on(device: torch.device) -> Any:
    """Makes launches go to the device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def _capability(device: torch.device) -> int:
    """Compute capability, 90 for 9.0; 0 where the interpreter runs."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def _most_programs(device: torch.device) -> int:
    """Programs of a gradient, each with sums of its own: two for each multiprocessor."""
    if device.type != "cuda":
        return 4
    return 2 * int(torch.cuda.get_device_properties(device).multi_processor_count)


# --- memory ---------------------------------------------------------------------------------------


def _empty(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """Memory that a kernel fills."""
    return like.new_empty(shape, dtype=dtype or like.dtype)


def _zeros(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    return like.new_zeros(shape, dtype=dtype)


def _grown(old: Tensor, size: int) -> Tensor:
    """A copy with room for more along the first dim."""
    new = _empty(old, (size, *old.shape[1:]))
    new[: old.shape[0]] = old
    return new


@functools.lru_cache(maxsize=256)
def _doubles(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Kept on the device: a copy costs more than a small solve."""
    return torch.tensor(values, dtype=torch.float64, device=device)


@functools.lru_cache(maxsize=256)
def _integers(values: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


# --- plain numbers --------------------------------------------------------------------------------


def _tableau(method: Method) -> list[list[float]]:
    """A method as runge_kutta.py has it in memory."""
    stages = len(method.c)
    rows = [[*row, *[0.0] * (stages - len(row))] for row in method.a]
    euler = [1.0] + [0.0] * (stages - 1)
    powers = [list(power) for power in zip(*method.interpolant, strict=True)]
    return [*rows, list(method.b), euler, list(method.b_err), list(method.c), *powers]


@functools.lru_cache(maxsize=64)
def _plan(
    times: tuple[float, ...], grid: tuple[float, ...], stages: int, last_on_demand: bool
) -> tuple[tuple[int, int, int, int], ...]:
    """Of each fixed step: the output times inside it, and the stages to evaluate.

    The first stage is there if the step before needed it for its interpolant; the last one serves
    that only.
    """
    plan = []
    output, first = 1, 0
    for t1 in grid[1:]:
        end = bisect.bisect_right(times, t1, output)
        inside = output < end and times[output] < t1
        last = stages - 1 if last_on_demand and not inside else stages
        plan.append((output, end, first, last))
        output, first = end, int(last_on_demand and inside)
    return tuple(plan)
