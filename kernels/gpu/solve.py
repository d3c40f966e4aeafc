"""A solve on a GPU with everything fixed but the tensors: buffers, launches, and what they left.

Nothing waits for the device but the look at how an adaptive solve ended, once at its end, and, if
it takes many launches, once every `CHUNK` of them. While a CUDA graph is captured nothing waits at
all; the outcome then is in memory on the device, and a solve that failed returns nan. Fixed steps
never wait.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from anode_fast.kernels.gpu import adjoint, continuous, controller, launch, mlp, runge_kutta
from anode_fast.kernels.gpu.launch import Launch
from anode_fast.kernels.gpu.launch import why_not as why_not
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

FIRST_CHUNK, CHUNK = 8, 16
"""Launches that are queued before the host looks whether the solve has ended; at first, later."""

CHECKPOINT_BYTES = 32 << 20
"""Of the checkpoints that a solve begins with; it gets more when they are full."""

STEPS_AT_ONCE = 16
"""Steps of a tile whose weight gradients are made at the same time, after the adjoint ODE."""

MOST_CAPTURED = 256
"""Attempts that a captured solve by several programs may take: all are launched, needed or not."""

MOST_CAPTURED_BYTES = 1 << 30
"""Of the checkpoints of a captured solve, which have to hold all steps that it may take."""


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
    nfe_again: int = 0
    """Evaluations that it takes the discrete gradient to make all stages again."""
    last: tuple[Tensor, Tensor] | None = None
    """Of a failure with one step size: the last state and its derivative."""
    later: Callable[[], Result] | None = None
    """Of a captured solve, whose other counts are 0: waits for the device and finds them there."""


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

    def _configuration(
        self, kernel: str, device: torch.device, rows: int
    ) -> tuple[mlp.MLP, Launch]:
        found: tuple[mlp.MLP, Launch] = launch.configuration(
            *(kernel, rows, self.field, launch.precision(self.dtype)),
            *(self.dtype == torch.float64, _capability(device)),
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

    def _arguments(self, kernel: str, x: Tensor, rows: int) -> tuple[dict[str, Any], int]:
        """What the forward kernels have in common, and the number of programs."""
        F, config = self._configuration(kernel, x.device, rows)
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
            **config.options,
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
        arguments, programs = self._arguments("fixed", x, rows)
        plan = _plan(times, grid, self.stages, self.method.last_on_demand)
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
        evaluations = sum(last - first for _, _, first, last in plan)
        result = Result(nfe=evaluations, nfe_again=evaluations, accepted=num_steps, launches=1)
        if not _never_waits(x.device):
            bad = int(control[:, controller.OUTPUT.value].amin())
            if bad < len(times):
                result.status = NON_FINITE_INPUT if bad < 0 else NON_FINITE
                result.output = bad
        kept = Checkpoints(
            states, ends_on, plan_on, control, times_on, rows, num_steps, arguments["B"], result
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
        arguments, programs = self._arguments("adaptive", x, rows)
        is_captured = _is_captured(x.device)
        times_on = _doubles(times, x.device)
        out = _empty(x, (len(times), rows, self.dim))
        capacity = self._capacity(x, rows, is_captured) if keep else 0
        states = _empty(x, (capacity + 1 if keep else 2, 2, rows, self.dim))
        steps = _empty(x, (capacity, 2), torch.float64)
        control = _zeros(x, (CONTROL,))
        sums = _empty(x, (programs, runge_kutta.SUMS.value), torch.float64)
        arrivals = _zeros(x, (1,), torch.int32)
        launches = 0

        def queue() -> _Queue:
            return _Queue(
                runge_kutta.adaptive,
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

        def outcome() -> Result:
            state = control.tolist()
            accepted = int(state[controller.ACCEPTED.value])
            return Result(
                status=int(state[_STATUS]) - 1,
                nfe=int(state[controller.NFE.value]),
                accepted=accepted,
                rejected=int(state[controller.REJECTED.value]),
                t=state[controller.T.value],
                dt=state[controller.DT.value],
                launches=launches,
                nfe_again=accepted * (self.stages - 1) + 1,
            )

        if is_captured:
            launches = 1 if programs == 1 else self._captured_attempts() + 2
            queue().launch(launches)
            result = Result(launches=launches, later=outcome)
            out.masked_fill_(control[_STATUS] != controller.SUCCESS.value, math.nan)
        else:
            queued = queue()
            while True:
                launches += queued.launch_chunk()
                result = outcome()
                if result.status == _FULL:
                    capacity = min(2 * capacity, self._max_num_steps)
                    states = _grown(states, capacity + 1)
                    steps = _grown(steps, capacity)
                    control[_STATUS].zero_()
                    queued = queue()
                elif result.status != _RUNNING:
                    break
            if result.status != SUCCESS:
                y, f = states[result.accepted if keep else result.accepted % 2]
                result.last = y, f
        kept = Checkpoints(
            states, steps, arrivals, control, times_on, rows, 0, arguments["B"], result
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
        arguments, programs = self._arguments("by_row", x, rows)
        is_captured = _is_captured(x.device)
        times_on = _doubles(times, x.device)
        out = _empty(x, (len(times), rows, self.dim))
        capacity = self._capacity(x, rows, is_captured) if keep else 0
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
            if is_captured or not (control[:, _STATUS] == controller.FULL.value).any():
                break
            capacity = min(2 * capacity, self._max_num_steps)
            states = _grown(states, capacity + 1)
            steps = _grown(steps, capacity)

        def outcome() -> Result:
            result = self._merged(control.cpu(), row_control[3:, :rows])
            result.launches = launches
            return result

        if is_captured:
            failed = (control[:, _STATUS] != controller.SUCCESS.value).any()
            out.masked_fill_(failed, math.nan)
        result = Result(launches=launches, later=outcome) if is_captured else outcome()
        kept = Checkpoints(
            states, steps, arguments["scratch"], control, times_on, rows, 0, arguments["B"], result
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
        result.nfe_again = int(state[:, controller.ACCEPTED.value].max()) * (self.stages - 1) + 1
        return result

    def _capacity(self, x: Tensor, rows: int, is_captured: bool) -> int:
        """Steps for which there are checkpoints at first; if captured, once and for all."""
        size = max(2 * rows * self.dim * x.element_size(), 1)
        if not is_captured:
            return int(min(max(CHECKPOINT_BYTES // size, 8), 128, self._max_num_steps))
        if self._max_num_steps * size > MOST_CAPTURED_BYTES:
            raise ValueError(
                f"anode_fast: a captured solve keeps room for the checkpoints of all steps that it "
                f"may take, here {self._max_num_steps} of {size} bytes. Set "
                f"options['max_num_steps'] to {MOST_CAPTURED_BYTES // size} at most."
            )
        return self._max_num_steps

    def _captured_attempts(self) -> int:
        if self._max_num_steps > MOST_CAPTURED:
            raise ValueError(
                "anode_fast: a captured solve whose batch takes several programs makes all "
                f"attempts that it may need, here {self._max_num_steps}. Set "
                f"options['max_num_steps'] to {MOST_CAPTURED} at most, or use "
                'step_control="sample".'
            )
        return self._max_num_steps

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
        F, config = self._configuration("gradient", grad.device, rows)
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
                **config.options,
            )
            grads = self._reduced(sums, parameters) if wanted else []
        forward, launches = checkpoints.result, 2 if wanted else 1
        result = Result(nfe=forward.nfe_again, launches=launches)
        if found := forward.later:
            failed = checkpoints.control[..., _STATUS] != controller.SUCCESS.value
            _spoil(failed.any(), x_grad, *grads)
            result.later = lambda: Result(nfe=found().nfe_again, launches=launches)
        return x_grad if x is not None else None, grads, result

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
            wanted: Whether each parameter's gradient is wanted.
            grid: For fixed steps: their ends in negated time, increasing, from the last output time
                to the first; the others are among them, once, or twice where grids meet there.
            seminorm: Whether to leave the parameters' gradients out of the norm.

        Returns:
            The gradient for x or None; those of the parameters, None where not wanted; the counts.

        Raises:
            ValueError: With adaptive steps, parameters' gradients are wanted, and in the norm.
        """
        is_fixed = self.control == FIXED or len(times) == 1
        if any(wanted) and not (is_fixed or seminorm):
            raise ValueError("the adjoint ODE's norm includes the parameters, which no kernel does")
        arguments = (solution, tuple(parameters), tuple(times), grad, any(wanted))
        with _on(grad.device):
            x_grad, grads, result = (
                self._continuous_fixed(*arguments, tuple(grid))
                if is_fixed
                else self._continuous_adaptive(*arguments)
            )
        found = [g if asked else None for g, asked in zip(grads, wanted, strict=True)]
        return x_grad if x is not None else None, found, result

    def _continuous_fixed(
        self,
        solution: Tensor,
        parameters: tuple[Tensor, ...],
        times: tuple[float, ...],
        grad: Tensor,
        wanted: bool,
        grid: tuple[float, ...],
    ) -> tuple[Tensor, Sequence[Tensor | None], Result]:
        rows, S = solution.shape[1], self.stages
        shared, F, tiles = self._adjoint_arguments(grad, parameters, rows)
        record = F.record_size(shared["B"])
        size = (2 * S + 2) * shared["B"] * F.D + S * record + S
        programs = min(tiles, _most_programs(grad.device))
        ends, pieces = _adjoint_steps(times, grid)
        inner = S - 1 if self.method.last_at_solution else S
        x_grad = _empty(grad, (rows, self.data_dim))
        control = _zeros(grad, (tiles, CONTROL))
        sums = _zeros(grad, (programs, F.weights if wanted else 0), self.dtype)
        continuous.fixed[(programs,)](
            ends=_doubles(ends, grad.device),
            plan=_integers(pieces, grad.device),
            solution=solution,
            grad=grad,
            x_grad=x_grad,
            control=control,
            sums=sums,
            scratch=_empty(grad, (programs, size)),
            num_times=len(times),
            inner=inner,
            programs=programs,
            **dict(ACCUMULATE=mlp.accumulate, SIZE=record, WEIGHTS=sums.shape[1]),
            **dict(DATA=self.data_dim, SCRATCH=size),
            **shared,
        )
        grads = self._reduced(sums, parameters) if wanted else [None] * len(parameters)
        accepted = max(len(ends) - 1, 0)
        launches = 2 if wanted else 1
        result = Result(nfe=accepted * inner, accepted=accepted, launches=launches)
        if not _never_waits(grad.device):
            state = control.amax(0).tolist()  # of all tiles the worst status, the first output
            result.status = max(int(state[_STATUS]) - 1, SUCCESS)
            if result.status != SUCCESS:
                result.output = int(state[controller.OUTPUT.value])
                result.t = times[result.output]
        return x_grad, grads, result

    def _continuous_adaptive(
        self,
        solution: Tensor,
        parameters: tuple[Tensor, ...],
        times: tuple[float, ...],
        grad: Tensor,
        wanted: bool,
    ) -> tuple[Tensor, Sequence[Tensor | None], Result]:
        rows, S, pieces = solution.shape[1], self.stages, len(times) - 1
        is_captured = _is_captured(grad.device)
        shared, F, programs = self._adjoint_arguments(grad, parameters, rows)
        times_on = _doubles(times, grad.device)
        record = F.record_size(shared["B"])
        size = 2 * S * shared["B"] * F.D + record
        scratch = _empty(grad, (programs, size))
        capacity = 0
        if wanted:  # a slot has twice a solve's numbers, and the steps' limit is each piece's own
            capacity = self._capacity(grad, 2 * rows * (pieces if is_captured else 1), is_captured)
            capacity *= pieces if is_captured else 1
        x_grad = _empty(grad, (rows, self.data_dim))
        states = _empty(grad, (capacity + 1 if wanted else 2, 4, rows, self.dim))
        steps = _empty(grad, (capacity, 3), torch.float64)
        state = _zeros(grad, (CONTROL + continuous.PROGRESS.value,))
        control, progress = state[:CONTROL], state[CONTROL:]
        attempt_sums = _empty(grad, (programs, continuous.SUMS.value), torch.float64)
        arrivals = _zeros(grad, (1,), torch.int32)
        # A program for each step of a tile would leave too many sums to add up.
        at_once = min(programs * STEPS_AT_ONCE, _most_programs(grad.device))
        sums = _zeros(grad, (at_once, F.weights if wanted else 0), self.dtype)
        size_again = size + (S - 1) * record + S
        scratch_again = _empty(grad, (at_once, size_again if wanted else 0))
        grads: Sequence[Tensor | None] = [None] * len(parameters)
        launches = 0

        def queue() -> _Queue:
            return _Queue(
                continuous.adaptive,
                times=times_on,
                solution=solution,
                grad=grad,
                x_grad=x_grad,
                states=states,
                steps=steps,
                control=control,
                progress=progress,
                sums=attempt_sums,
                arrivals=arrivals,
                scratch=scratch,
                num_times=len(times),
                capacity=capacity,
                programs=programs,
                **dict(TIME_GRADIENT=mlp.time_gradient, DATA=self.data_dim, SCRATCH=size),
                **dict(KEEP=wanted, LOOP=programs == 1),
                **shared,
            )

        def weight_gradients() -> list[Tensor]:
            """Queued before it is known that the solve has ended; they do nothing until then."""
            continuous.quadrature[(at_once,)](
                times=times_on,
                states=states,
                steps=steps,
                control=control,
                progress=progress,
                sums=sums,
                scratch=scratch_again,
                programs=at_once,
                **dict(ACCUMULATE=mlp.accumulate, SIZE=record, WEIGHTS=F.weights),
                SCRATCH=size_again,
                **shared,
            )
            return self._reduced(sums, parameters)

        def outcome() -> Result:
            found = state.tolist()
            before = CONTROL + continuous.ACCEPTED_BEFORE.value
            return Result(
                status=int(found[_STATUS]) - 1,
                nfe=int(found[controller.NFE.value]),
                accepted=int(found[controller.ACCEPTED.value] + found[before]),
                rejected=int(found[controller.REJECTED.value] + found[before + 1]),
                t=-found[controller.T.value],
                dt=found[controller.DT.value],
                launches=launches,
            )

        if is_captured:
            launches = 1 if programs == 1 else pieces * (self._captured_attempts() + 1) + 1
            queue().launch(launches)
            if wanted:
                grads = weight_gradients()
                launches += 2
            _spoil(control[_STATUS] != controller.SUCCESS.value, x_grad, *grads)
            return x_grad, grads, Result(launches=launches, later=outcome)
        queued = queue()
        while True:
            launches += queued.launch_chunk()
            if wanted:
                grads = weight_gradients()
                launches += 2
            result = outcome()
            if result.status == _FULL:
                capacity = min(2 * capacity, pieces * self._max_num_steps)
                states = _grown(states, capacity + 1)
                steps = _grown(steps, capacity)
                control[_STATUS].zero_()
                queued = queue()
            elif result.status != _RUNNING:
                return x_grad, grads, result

    def _adjoint_arguments(
        self, grad: Tensor, parameters: tuple[Tensor, ...], rows: int
    ) -> tuple[dict[str, Any], mlp.MLP, int]:
        """What the kernels of continuous.py have in common; the field; the number of tiles."""
        F, config = self._configuration("continuous", grad.device, rows)
        tableau, settings = self._constants(grad.device)
        return (
            dict(
                weights=parameters,
                tableau=tableau,
                settings=settings,
                rows=rows,
                **dict(EVALUATE=mlp.evaluate, VJP=mlp.vjp, F=F, DIM=self.dim),
                **dict(S=self.stages, B=config.rows, D=F.D),
                **config.options,
            ),
            F,
            max(1, triton.cdiv(rows, config.rows)),
        )

    @staticmethod
    def _reduced(sums: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
        """The programs' weight gradients added up, shaped as the parameters."""
        programs, count = sums.shape
        flat = _empty(sums, (count,))
        blocks = triton.cdiv(count, adjoint.BLOCK.value)
        adjoint.reduce[(blocks,)](sums=sums, out=flat, programs=programs, WEIGHTS=count)
        parts = flat.split([p.numel() for p in parameters])
        return [part.view(p.shape) for part, p in zip(parts, parameters, strict=True)]

    def describe(self, rows: int, device: torch.device) -> str:
        """Which kernel solves that many rows, in how many launches, with what arithmetic."""
        kernel = {FIXED: "fixed", BATCH: "adaptive", SAMPLE: "by_row"}[self.control]
        _, config = self._configuration(kernel, device, rows)
        programs = max(1, triton.cdiv(rows, config.rows))
        launches = "1 launch"
        if self.control == BATCH and programs > 1:
            launches = "1 launch for each attempted step, and 2"
        arithmetic = {
            "tf32x3": "float32 (products of three tf32 parts)",
            "tf32": "tf32 products, float32 sums (torch's float32_matmul_precision)",
            "ieee": str(self.dtype).removeprefix("torch."),
        }[launch.precision(self.dtype)]
        return f"{kernel}, {programs} x {config.rows} rows, {launches}, {arithmetic}"


CONTROL = controller.CONTROL.value
_STATUS = controller.STATUS.value
_FULL = controller.FULL.value - 1
_RUNNING = controller.RUNNING.value - 1


class _Queue:
    """A launch, to be made again and again with the same arguments, `programs` among them."""

    def __init__(self, kernel: Any, **arguments: Any) -> None:
        self._kernel = kernel
        self._programs: int = arguments["programs"]
        self._arguments = arguments
        self._again: Callable[[], None] | None = None
        self._chunks = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def launch(self, count: int) -> None:
        """Queues it so many times."""
        for _ in range(count):
            if self._again:
                self._again()
                continue
            compiled = self._kernel[(self._programs,)](**self._arguments)
            if compiled:  # not so in the interpreter. Spares Triton to look at all arguments again
                values = [self._arguments[name] for name in self._kernel.arg_names]
                self._again = functools.partial(compiled[(self._programs, 1, 1)], *values)

    def launch_chunk(self) -> int:
        """Queues what may be enough. Returns how many launches.

        Those of one program make the whole solve. The third chunk and later ones are a CUDA graph.
        """
        if self._programs == 1:
            self.launch(1)
            return 1
        self._chunks += 1
        size = FIRST_CHUNK if self._chunks == 1 else CHUNK
        device: torch.device = self._arguments["control"].device
        if self._chunks <= 2 or device.type != "cuda":
            self.launch(size)
            return size
        if self._graph is None:
            self._graph = self._capture(size, device)
        self._graph.replay()
        return size

    def _capture(self, size: int, device: torch.device) -> torch.cuda.CUDAGraph:
        # Not by torch.cuda.graph, which empties the allocator's cache first. Nothing is allocated
        # here, and nothing runs: the kernel is compiled since the first chunk.
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            self.launch(size)
            graph.capture_end()
        return graph


def _is_captured(device: torch.device) -> bool:
    """Whether launches go into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _never_waits(device: torch.device) -> bool:
    """Whether fixed steps leave it at nan where something is not finite: on a GPU."""
    return device.type == "cuda" or _is_captured(device)


def _on(device: torch.device) -> Any:
    """Makes launches go to the device; the interpreter's numpy warns where a GPU says nothing."""
    return torch.cuda.device(device) if device.type == "cuda" else np.errstate(all="ignore")


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


def _spoil(failed: Tensor, *found: Tensor | None) -> None:
    """Makes a result nan if `failed`, a single bool on the device."""
    for tensor in found:
        if tensor is not None:
            tensor.masked_fill_(failed, math.nan)


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
def _integers(
    values: tuple[int, ...] | tuple[tuple[int, ...], ...], device: torch.device
) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


# --- plain numbers --------------------------------------------------------------------------------


def _tableau(method: Method) -> list[list[float]]:
    """A method as runge_kutta.py has it in memory."""
    stages = len(method.c)
    rows = [[*row, *[0.0] * (stages - len(row))] for row in method.a]
    euler = [1.0] + [0.0] * (stages - 1)
    powers = [list(power) for power in zip(*method.interpolant, strict=True)]
    return [*rows, list(method.b), euler, list(method.b_err), list(method.c), *powers]


def _adjoint_steps(
    times: tuple[float, ...], grid: tuple[float, ...]
) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """The steps of a grid for `continuous_gradient`: their ends, once, and where pieces begin."""
    ends = tuple(dict.fromkeys(grid))
    return ends, tuple(bisect.bisect_left(ends, -time) for time in reversed(times))


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
