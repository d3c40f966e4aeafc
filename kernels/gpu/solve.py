"""A solve on a GPU with everything fixed but the tensors: buffers, launches, and what they left.

Nothing waits for the device but the look at how an adaptive solve ended, once at its end, and, if
it takes many launches, once every `host.CHUNK` of them. While a CUDA graph is captured nothing
waits at all; the outcome then is in memory on the device, and a solve that failed returns nan.
Fixed steps never wait.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from anode_fast.kernels.gpu import (
    adjoint,
    continuous,
    controller,
    first_stage,
    generate,
    host,
    launch,
    mlp,
    runge_kutta,
)
from anode_fast.kernels.gpu.launch import Launch
from anode_fast.kernels.gpu.launch import why_not as why_not
from anode_fast.kernels.interface import (
    BATCH,
    FIELD_DIFFERS,
    FIXED,
    NON_FINITE,
    NON_FINITE_INPUT,
    SAMPLE,
    SUCCESS,
    Field,
    Method,
)
from anode_fast.kernels.program import Program

ROUNDING_UNITS, ROUNDING_FACTOR, POINTS = 32, 16, 4
"""Of a first stage that is compared: errors let pass, in units of rounding; how much larger than
what rounding is seen to do they may be; and at how many points that is looked at."""

STEPS_AT_ONCE = 16
"""Steps of a tile whose weight gradients are made at the same time, after the adjoint ODE."""


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
    result: host.Result


class Solve(host.Solver):
    """A solve with everything fixed but the tensors and times.

    Args:
        field: The field, or its program.
        method: The method.
        dtype: torch.float32 or torch.float64.
        options: As the fields of the C struct Options in kernels/cpu/problem.hpp: `control`,
            `backwards`, `float_time`, `data_dim`, `rtol`, `atol`, `max_num_steps`, `first_step`,
            `safety`, `ifactor`, `dfactor`, `min_step`, `max_step`; those left out are 0.
    """

    def __init__(
        self, field: Field | Program, method: Method, dtype: torch.dtype, **options: float
    ) -> None:
        super().__init__(method, dtype, **options)
        self.field = field
        self.dim = field.dim

    # --- forward

    def forward(
        self,
        x: Tensor,
        parameters: Sequence[Tensor],
        times: Sequence[float],
        grid: Sequence[float] = (),
        keep: bool = False,
        expected: Tensor | None = None,
    ) -> tuple[Tensor, host.Result, Checkpoints | None]:
        """Solves.

        Args:
            x: Data columns of the initial state, [rows, data_dim], last stride 1.
            parameters: Weight and bias of every layer; or the tensors of the program; contiguous.
            times: Output times, increasing.
            grid: For fixed steps: where they begin and end.
            keep: Whether to keep checkpoints.
            expected: dy/dt of the first rows of x at the first time, [some rows, dim], contiguous,
                by other code and in that code's time. Where the field's own values differ from it
                by more than rounding, the outcome is FIELD_DIFFERS. Adaptive solves tell it with
                their outcome; one by fixed steps waits for the comparison, not for the solve: it
                has no outcome to wait for, and a wrong solution is worse. While a CUDA graph is
                captured the solution is nan instead.

        Returns:
            The solution [times, rows, dim], counts and outcome, and the checkpoints, None if not
            asked for or if the solve failed.
        """
        if expected is not None and not expected.numel():
            expected = None
        arguments = (x, tuple(parameters), tuple(times), tuple(grid), keep, expected)
        solve: Callable[..., tuple[Tensor, host.Result, Checkpoints]]
        solve = {FIXED: self._fixed, BATCH: self._batch, SAMPLE: self._sample}[self.control]
        with host.on(x.device):
            out, result, checkpoints = solve(*arguments)
            if expected is not None:
                result.launches += 1
                if result.differs and not self._is_rounding(x, parameters, times, expected):
                    result.status = FIELD_DIFFERS
        return out, result, checkpoints if keep and result.status == SUCCESS else None

    def _compare(
        self,
        x: Tensor,
        parameters: Sequence[Tensor],
        times: Sequence[float],
        expected: Tensor,
        control: Tensor,
    ) -> Tensor:
        """Queues the comparison of the first stage. Returns the field's values, like `expected`."""
        rows, dtype = expected.shape[0], x.dtype
        functions, F, config = self._configuration("fixed", x.device, rows, dtype)
        _, settings = self._constants(x.device)
        values: Tensor = host.empty(x, (rows, self.dim))
        unit = 2**-11 if F.precision == "tf32" else torch.finfo(dtype).eps
        arguments = dict(
            x=x,
            weights=tuple(parameters),
            settings=settings,
            times=host.doubles(tuple(times), x.device),
            expected=expected,
            values=values,
            control=control,
            bound=host.doubles((ROUNDING_UNITS * unit,), x.device),
            scratch=host.empty(x, (F.record_size(config.rows),)),
            x_stride=x.stride(0),
            rows=rows,
            **dict(EVALUATE=functions.evaluate, F=F, DIM=self.dim, DATA=self.data_dim),
            **dict(B=config.rows, D=F.D),
            **config.options,
        )
        known = self._known((x, expected, *parameters), "compare", F, config)
        host.launch(known, first_stage.compare, (1,), arguments)
        return values

    def _is_rounding(
        self, x: Tensor, parameters: Sequence[Tensor], times: Sequence[float], expected: Tensor
    ) -> bool:
        """Whether values differ from those expected by no more than rounding may do.

        How much that is depends on the field: sums may cancel. It is measured, as in
        kernels/cpu/first_stage.hpp, by the same field in the other precision, at several points.
        Waits for the device; fields that are the user's seldom come here.
        """
        rows, eps = expected.shape[0], torch.finfo(self.dtype).eps
        others = torch.float64 if self.dtype == torch.float32 else torch.float32
        generator = torch.Generator().manual_seed(0)
        first = x[:rows].double().repeat(POINTS, 1)
        nudge = torch.rand(first.shape, generator=generator, dtype=torch.float64) * 2**-12
        nudge[:rows] = 0
        states = (first + (first.abs() + 1) * nudge.to(x.device)).float()
        control = host.zeros(x, (host.CONTROL,))
        none = expected.new_zeros(len(states), self.dim)
        own = self._compare(states.to(self.dtype), parameters, times, none, control)
        copies = [p.to(others) for p in parameters]
        other = self._compare(states.to(others), copies, times, none.to(others), control)
        distance = (own.double() - other.double()).abs()
        finite = torch.where(distance.isfinite(), distance, 0.0)
        single = torch.finfo(torch.float32).eps
        rounding = float(finite.max()) * eps / single
        size = float(torch.where(expected.isfinite(), expected, 0.0).abs().max())
        if bool((own.isfinite() != other.isfinite()).any()):  # float32 overflows: not measured
            rounding = max(rounding, single * size)
        values = self._compare(x, parameters, times, expected, control)
        most = ROUNDING_UNITS * eps * size + ROUNDING_FACTOR * rounding
        alike = ((values - expected).abs() <= most) | (values == expected)
        return bool((alike | (values.isnan() & expected.isnan())).all())

    def _configuration(
        self,
        kernel: str,
        device: torch.device,
        rows: int,
        dtype: torch.dtype | None = None,
    ) -> tuple[Any, launch.Compiled, Launch]:
        """The module with the field's functions, the field that they take, and the launch."""
        dtype = dtype or self.dtype
        F, config = launch.configuration(
            *(kernel, rows, self.field, launch.precision(dtype)),
            *(dtype == torch.float64, host.capability(device)),
        )
        functions = mlp
        if isinstance(self.field, Program):
            functions = generate.load(self.field, F.N, F.K)
        return functions, F, config

    def _arguments(
        self, kernel: str, x: Tensor, parameters: tuple[Tensor, ...], keep: bool
    ) -> tuple[dict[str, Any], int, host.Known]:
        """What the forward kernels have in common, the number of programs, what is compiled."""
        rows = x.shape[0]
        functions, F, config = self._configuration(kernel, x.device, rows)
        S, B = self.stages, config.rows
        programs = max(1, triton.cdiv(rows, B))
        size = S * B * F.D + F.record_size(B)
        tableau, settings = self._constants(x.device)
        arguments = dict(
            x=x,
            tableau=tableau,
            settings=settings,
            scratch=host.empty(x, (programs, size)),
            x_stride=x.stride(0),
            rows=rows,
            **dict(
                EVALUATE=functions.evaluate, F=F, DIM=self.dim, DATA=self.data_dim, S=S, B=B, D=F.D
            ),
            **dict(weights=parameters, SCRATCH=size, KEEP=keep),
            **config.options,
        )
        known = self._known((x, *parameters), kernel, F, config, keep, programs == 1)
        return arguments, programs, known

    def _fixed(
        self,
        x: Tensor,
        parameters: tuple[Tensor, ...],
        times: tuple[float, ...],
        grid: tuple[float, ...],
        keep: bool,
        expected: Tensor | None,
    ) -> tuple[Tensor, host.Result, Checkpoints]:
        rows, num_steps = x.shape[0], len(grid) - 1
        arguments, programs, known = self._arguments("fixed", x, parameters, keep)
        plan = host.plan_of(times, grid, self.stages, self.method.last_on_demand)
        times_on, ends_on = (host.doubles(values, x.device) for values in (times, grid))
        plan_on = host.integers(plan, x.device)
        out = host.empty(x, (len(times), rows, self.dim))
        states = host.empty(x, (num_steps if keep else 0, 2, rows, self.dim))
        control = host.zeros(x, (programs, host.CONTROL))
        differs = None
        if expected is not None:
            self._compare(x, parameters, times, expected, control)
            if not host.is_captured(x.device):
                differs = host.sent(control[0, host.DIFFERS])
        arguments |= dict(
            times=times_on,
            ends=ends_on,
            plan=plan_on,
            out=out,
            states=states,
            control=control,
            num_times=len(times),
            num_steps=num_steps,
        )
        host.launch(known, runge_kutta.fixed, (programs,), arguments)
        if expected is not None and differs is None:
            host.spoil(host.differs(control), out)
        evaluations = sum(last - first for _, _, first, last in plan)
        result = host.Result(nfe=evaluations, nfe_again=evaluations, accepted=num_steps, launches=1)
        if not host.never_waits(x.device):
            bad = int(control[:, controller.OUTPUT.value].amin())
            if bad < len(times):
                result.status = NON_FINITE_INPUT if bad < 0 else NON_FINITE
                result.output = bad
        result.differs = differs is not None and bool(differs())
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
        expected: Tensor | None,
    ) -> tuple[Tensor, host.Result, Checkpoints]:
        rows = x.shape[0]
        arguments, programs, known = self._arguments("adaptive", x, parameters, keep)
        is_captured = host.is_captured(x.device)
        times_on = host.doubles(times, x.device)
        out = host.empty(x, (len(times), rows, self.dim))
        capacity = self._room(x, rows, is_captured) if keep else 0
        states = host.empty(x, (capacity + 1 if keep else 2, 2, rows, self.dim))
        steps = host.empty(x, (capacity, 2), torch.float64)
        control = host.zeros(x, (host.CONTROL,))
        sums = host.empty(x, (programs, runge_kutta.SUMS.value), torch.float64)
        arrivals = self._arrivals(x, programs)
        launches = 0
        if expected is not None:
            self._compare(x, parameters, times, expected, control)

        def queue() -> host.Queue:
            arguments_of = dict(
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
                LOOP=programs == 1,
                **arguments,
            )
            chunks = None if programs == 1 else (host.FIRST_CHUNK, host.CHUNK)
            launches = [(runge_kutta.adaptive, (programs,), arguments_of)]
            return host.Queue(launches, x.device, chunks, known)

        def outcome() -> host.Result:
            state = control.tolist()
            accepted = int(state[controller.ACCEPTED.value])
            return host.Result(
                status=int(state[host.STATUS]) - 1,
                nfe=int(state[controller.NFE.value]),
                accepted=accepted,
                rejected=int(state[controller.REJECTED.value]),
                t=state[controller.T.value],
                dt=state[controller.DT.value],
                launches=launches,
                nfe_again=accepted * (self.stages - 1) + 1,
                differs=bool(state[host.DIFFERS]),
            )

        if is_captured:
            launches = 1 if programs == 1 else self._captured_attempts() + 2
            queue().launch(launches)
            result = host.Result(launches=launches, later=functools.partial(_told, outcome))
            host.spoil(host.failed(control), out)
        else:
            queued = queue()
            while True:
                launches += queued.launch_chunk()
                result = outcome()
                if result.status == host.FULL:
                    capacity = min(2 * capacity, self._max_num_steps)
                    states = host.grown(states, capacity + 1)
                    steps = host.grown(steps, capacity)
                    control[host.STATUS].zero_()
                    queued = queue()
                elif result.status != host.RUNNING:
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
        expected: Tensor | None,
    ) -> tuple[Tensor, host.Result, Checkpoints]:
        rows = x.shape[0]
        arguments, programs, known = self._arguments("by_row", x, parameters, keep)
        is_captured = host.is_captured(x.device)
        times_on = host.doubles(times, x.device)
        out = host.empty(x, (len(times), rows, self.dim))
        capacity = self._room(x, rows, is_captured) if keep else 0
        states = host.empty(x, (capacity + 1, 2, rows, self.dim))
        steps = host.empty(x, (capacity, 2, rows), torch.float64)
        control = host.zeros(x, (programs, host.CONTROL))
        row_control = host.zeros(x, (5, programs * arguments["B"]))
        launches = 0
        if expected is not None:
            self._compare(x, parameters, times, expected, control)
        while True:
            arguments |= dict(
                times=times_on,
                out=out,
                states=states,
                steps=steps,
                control=control,
                row_control=row_control,
                num_times=len(times),
                capacity=capacity,
            )
            host.launch(known, runge_kutta.adaptive_by_row, (programs,), arguments)
            launches += 1
            if is_captured or not (control[:, host.STATUS] == controller.FULL.value).any():
                break
            capacity = min(2 * capacity, self._max_num_steps)
            states = host.grown(states, capacity + 1)
            steps = host.grown(steps, capacity)

        def outcome() -> host.Result:
            result = self._merged(control.cpu(), row_control[3:, :rows])
            result.launches = launches
            return result

        if is_captured:
            host.spoil(host.failed(control), out)
        later = functools.partial(_told, outcome)
        result = host.Result(launches=launches, later=later) if is_captured else outcome()
        kept = Checkpoints(
            states, steps, arguments["scratch"], control, times_on, rows, 0, arguments["B"], result
        )
        return out, result, kept

    def _merged(self, state: Tensor, counts: Tensor) -> host.Result:
        """The tiles' outcomes as one.

        In the reference all rows are at the same attempt: the first failure ends the solve.
        """
        accepted, rejected = counts.amax(1).tolist() if counts.numel() else (0, 0)
        differs = bool(state[0, host.DIFFERS])
        result = host.Result(accepted=int(accepted), rejected=int(rejected), differs=differs)
        attempts = state[:, controller.NFE.value]
        failed = state[:, host.STATUS] != controller.SUCCESS.value
        made = attempts.max()
        if failed.any():
            made = attempts[failed].min()
            first = state[failed & (attempts == made)]
            result.status = int(first[0, host.STATUS]) - 1
            result.row = int(first[0, controller.ROW.value])
            result.rows = int(first[:, controller.ROWS.value].sum())
            result.t, result.dt = first[0, [controller.T.value, controller.DT.value]].tolist()
            if result.status == controller.MAX_STEPS.value - 1:
                result.t = float(first[:, controller.T.value].min())
        evaluations = 1 if self._settings[controller.FIRST_STEP.value] else 2
        result.nfe = evaluations + int(made) * (self.stages - 1)
        result.nfe_again = int(state[:, controller.ACCEPTED.value].max()) * (self.stages - 1) + 1
        return result

    @staticmethod
    def _arrivals(like: Tensor, programs: int) -> Tensor:
        """Of programs; a single one counts none."""
        arrivals: Tensor
        if programs == 1:
            arrivals = host.integers((0,), like.device)
        else:
            arrivals = host.zeros(like, (1,), torch.int32)
        return arrivals

    def _room(self, x: Tensor, rows: int, is_captured: bool) -> int:
        """Steps for which there are checkpoints at first."""
        size = 2 * rows * self.dim * x.element_size()
        return int(self._capacity(size, is_captured))

    # --- gradients

    def discrete_gradient(
        self,
        checkpoints: Checkpoints,
        parameters: Sequence[Tensor],
        grad: Tensor,
        x: Tensor | None,
        wanted: bool,
    ) -> tuple[Tensor | None, list[Tensor], host.Result]:
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
        functions, F, config = self._configuration("gradient", grad.device, rows)
        B = min(config.rows, checkpoints.tile)
        most = host.most_programs(grad.device, config.warps)
        programs = min(max(1, triton.cdiv(rows, B)), most)
        record = F.record_size(B)
        size = (2 * S + 1) * B * F.D + S * record + S
        tableau, settings = self._constants(grad.device)
        x_grad = host.empty(grad, (rows, self.data_dim))
        wanted &= F.weights > 0
        count = F.weights if wanted else 0
        sums = host.zeros(grad, (programs, count), self.dtype)
        known = self._known((grad, *parameters), F, config, checkpoints.tile, wanted)
        with host.on(grad.device):
            arguments = dict(
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
                scratch=host.empty(grad, (programs, size)),
                rows=rows,
                num_times=checkpoints.times.shape[0],
                num_steps=checkpoints.num_steps,
                programs=programs,
                **dict(EVALUATE=functions.evaluate, VJP=functions.vjp, F=F),
                **dict(ACCUMULATE=functions.accumulate),
                **dict(SIZE=record, WEIGHTS=count, DIM=self.dim, DATA=self.data_dim),
                **dict(S=S, B=B, D=F.D, SCRATCH=size, TILE=checkpoints.tile),
                FIXED=self.control == FIXED,
                BY_ROW=self.control == SAMPLE,
                **config.options,
            )
            host.launch(known, adjoint.discrete_gradient, (programs,), arguments)
            grads = self._reduced(sums, parameters) if wanted else []
        forward, launches = checkpoints.result, 2 if wanted else 1
        result = host.Result(nfe=forward.nfe_again, launches=launches)
        if found := forward.later:
            host.spoil(host.failed(checkpoints.control), x_grad, *grads)
            result.later = lambda: host.Result(nfe=found().nfe_again, launches=launches)
        elif host.is_captured(grad.device):
            host.spoil(host.differs(checkpoints.control), x_grad, *grads)
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
    ) -> tuple[Tensor | None, list[Tensor | None], host.Result]:
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
        with host.on(grad.device):
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
    ) -> tuple[Tensor, Sequence[Tensor | None], host.Result]:
        rows, S = solution.shape[1], self.stages
        shared, functions, F, tiles = self._adjoint_arguments(grad, parameters, rows)
        tensors = (solution, grad, *parameters)
        known = self._known(tensors, F, shared["B"], shared["num_warps"], wanted)
        record = F.record_size(shared["B"])
        size = (2 * S + 2) * shared["B"] * F.D + S * record + S
        programs = min(tiles, host.most_programs(grad.device, shared["num_warps"]))
        ends, pieces = _adjoint_steps(times, grid)
        inner = S - 1 if self.method.last_at_solution else S
        x_grad = host.empty(grad, (rows, self.data_dim))
        control = host.zeros(grad, (tiles, host.CONTROL))
        sums = host.zeros(grad, (programs, F.weights if wanted else 0), self.dtype)
        arguments = dict(
            ends=host.doubles(ends, grad.device),
            plan=host.integers(pieces, grad.device),
            solution=solution,
            grad=grad,
            x_grad=x_grad,
            control=control,
            sums=sums,
            scratch=host.empty(grad, (programs, size)),
            num_times=len(times),
            inner=inner,
            programs=programs,
            **dict(ACCUMULATE=functions.accumulate, SIZE=record, WEIGHTS=sums.shape[1]),
            **dict(DATA=self.data_dim, SCRATCH=size),
            **shared,
        )
        host.launch(known, continuous.fixed, (programs,), arguments)
        grads = self._reduced(sums, parameters) if wanted else [None] * len(parameters)
        accepted = max(len(ends) - 1, 0)
        launches = 2 if wanted else 1
        result = host.Result(nfe=accepted * inner, accepted=accepted, launches=launches)
        if not host.never_waits(grad.device):
            state = control.amax(0).tolist()  # of all tiles the worst status, the first output
            result.status = max(int(state[host.STATUS]) - 1, SUCCESS)
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
    ) -> tuple[Tensor, Sequence[Tensor | None], host.Result]:
        rows, S, pieces = solution.shape[1], self.stages, len(times) - 1
        is_captured = host.is_captured(grad.device)
        shared, functions, F, programs = self._adjoint_arguments(grad, parameters, rows)
        tensors = (solution, grad, *parameters)
        known = self._known(tensors, F, shared["B"], shared["num_warps"], wanted, programs == 1)
        times_on = host.doubles(times, grad.device)
        record = F.record_size(shared["B"])
        size = 2 * S * shared["B"] * F.D + record
        scratch = host.empty(grad, (programs, size))
        capacity = 0
        if wanted:  # a slot has twice a solve's numbers, and the steps' limit is each piece's own
            capacity = self._room(grad, 2 * rows * (pieces if is_captured else 1), is_captured)
            capacity *= pieces if is_captured else 1
        x_grad = host.empty(grad, (rows, self.data_dim))
        states = host.empty(grad, (capacity + 1 if wanted else 2, 4, rows, self.dim))
        steps = host.empty(grad, (capacity, 3), torch.float64)
        state = host.zeros(grad, (host.CONTROL + continuous.PROGRESS.value,))
        control, progress = state[: host.CONTROL], state[host.CONTROL :]
        attempt_sums = host.empty(grad, (programs, continuous.SUMS.value), torch.float64)
        arrivals = self._arrivals(grad, programs)
        # A program for each step of a tile would leave too many sums to add up.
        most = host.most_programs(grad.device, shared["num_warps"])
        at_once = min(programs * STEPS_AT_ONCE, most)
        sums = host.zeros(grad, (at_once, F.weights if wanted else 0), self.dtype)
        size_again = size + (S - 1) * record + S
        scratch_again = host.empty(grad, (at_once, size_again if wanted else 0))
        grads: Sequence[Tensor | None] = [None] * len(parameters)
        launches = 0

        def queue() -> host.Queue:
            arguments_of = dict(
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
                **dict(TIME_GRADIENT=functions.time_gradient, DATA=self.data_dim, SCRATCH=size),
                **dict(KEEP=wanted, LOOP=programs == 1),
                **shared,
            )
            chunks = None if programs == 1 else (host.FIRST_CHUNK, host.CHUNK)
            launches = [(continuous.adaptive, (programs,), arguments_of)]
            return host.Queue(launches, grad.device, chunks, known)

        def weight_gradients() -> list[Tensor]:
            """Queued before it is known that the solve has ended; they do nothing until then."""
            arguments_of = dict(
                times=times_on,
                states=states,
                steps=steps,
                control=control,
                progress=progress,
                sums=sums,
                scratch=scratch_again,
                programs=at_once,
                **dict(ACCUMULATE=functions.accumulate, SIZE=record, WEIGHTS=F.weights),
                SCRATCH=size_again,
                **shared,
            )
            host.launch(known, continuous.quadrature, (at_once,), arguments_of)
            return self._reduced(sums, parameters)

        def outcome() -> host.Result:
            return host.adjoint_result(state, launches)

        if is_captured:
            launches = 1 if programs == 1 else pieces * (self._captured_attempts() + 1) + 1
            queue().launch(launches)
            if wanted:
                grads = weight_gradients()
                launches += 2
            host.spoil(control[host.STATUS] != controller.SUCCESS.value, x_grad, *grads)
            return x_grad, grads, host.Result(launches=launches, later=outcome)
        queued = queue()
        while True:
            launches += queued.launch_chunk()
            if wanted:
                grads = weight_gradients()
                launches += 2
            result = outcome()
            if result.status == host.FULL:
                capacity = min(2 * capacity, pieces * self._max_num_steps)
                states = host.grown(states, capacity + 1)
                steps = host.grown(steps, capacity)
                control[host.STATUS].zero_()
                queued = queue()
            elif result.status != host.RUNNING:
                return x_grad, grads, result

    def _adjoint_arguments(
        self, grad: Tensor, parameters: tuple[Tensor, ...], rows: int
    ) -> tuple[dict[str, Any], Any, launch.Compiled, int]:
        """What the kernels of continuous.py have in common; the field; the number of tiles."""
        functions, F, config = self._configuration("continuous", grad.device, rows)
        tableau, settings = self._constants(grad.device)
        return (
            dict(
                weights=parameters,
                tableau=tableau,
                settings=settings,
                rows=rows,
                **dict(EVALUATE=functions.evaluate, VJP=functions.vjp, F=F, DIM=self.dim),
                **dict(S=self.stages, B=config.rows, D=F.D),
                **config.options,
            ),
            functions,
            F,
            max(1, triton.cdiv(rows, config.rows)),
        )

    def _reduced(self, sums: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
        """The programs' weight gradients added up, shaped as the parameters."""
        programs, count = sums.shape
        flat = host.empty(sums, (count,))
        blocks = triton.cdiv(count, adjoint.BLOCK.value)
        arguments = dict(sums=sums, out=flat, programs=programs, WEIGHTS=count)
        host.launch(self._known((sums,)), adjoint.reduce, (blocks,), arguments)
        parts = flat.split([p.numel() for p in parameters])
        return [part.view(p.shape) for part, p in zip(parts, parameters, strict=True)]

    def describe(self, shape: Sequence[int], device: torch.device) -> str:
        """How a batch is solved: by which kernel, in how many launches, with what arithmetic.

        Args:
            shape: [rows, dim].
            device: Where it is.
        """
        rows = shape[0]
        kernel = {FIXED: "fixed", BATCH: "adaptive", SAMPLE: "by_row"}[self.control]
        _, _, config = self._configuration(kernel, device, rows)
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


def _told(outcome: Callable[[], host.Result]) -> host.Result:
    """The outcome of a captured solve; there was no look at what rounding may do to its field."""
    result = outcome()
    if result.differs:
        result.status = FIELD_DIFFERS
    return result


def _adjoint_steps(
    times: tuple[float, ...], grid: tuple[float, ...]
) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """The steps of a grid for `continuous_gradient`: their ends, once, and where pieces begin."""
    ends = tuple(dict.fromkeys(grid))
    return ends, tuple(bisect.bisect_left(ends, -time) for time in reversed(times))
