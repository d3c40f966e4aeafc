"""A solve on a GPU launch by launch, one for each stage: of fields whose pixels see each other.

What solve.py is for the kernels of runge_kutta.py, adjoint.py and continuous.py, this is for those
of combine.py, unwind.py and reverse.py with the field of conv.py. When it waits for the device, and
what is left of a captured solve, is the same.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from anode_fast.kernels.gpu import (
    combine,
    continuous,
    controller,
    conv,
    host,
    launch,
    reverse,
    unwind,
)
from anode_fast.kernels.gpu.launch import ConvLaunch
from anode_fast.kernels.gpu.launch import why_not as why_not
from anode_fast.kernels.interface import (
    BATCH,
    FIELD_DIFFERS,
    FIXED,
    NON_FINITE,
    NON_FINITE_INPUT,
    SAMPLE,
    SUCCESS,
    ConvField,
    Method,
)

CHUNKS = 6, 4
"""Rounds that are queued before the host looks whether the solve has ended; at first, later."""

LEAST_RTOL_OF_TF32 = 1e-3
"""Below it, tf32's rounding could pass for the error of a step: products are float32 then."""

WEIGHT_PROGRAMS = 48
"""That sum up gradients of a 3x3 convolution for three taps each; more would take more memory."""

PATIENCE = {BATCH: controller.MOST_NON_FINITE.value, SAMPLE: 2**31 - 1, FIXED: 0}
"""Attempts in a row that give nan or inf before a solve gives up, as the reference has them."""


@dataclass(frozen=True)
class Layout:
    """How the pixels of a batch are divided.

    Attributes:
        images: In a group.
        groups: Of images that take their steps together.
        pixels: Of a group.
        tiles: Of a group.
        F: The field as compiled for it.
        launch: How kernels are launched.
    """

    images: int
    groups: int
    pixels: int
    tiles: int
    F: conv.Conv
    launch: ConvLaunch

    @property
    def count(self) -> int:
        """Tiles, in all groups."""
        return self.groups * self.tiles

    @property
    def total(self) -> int:
        """Pixels, in all groups."""
        return self.groups * self.pixels

    @property
    def of_group(self) -> dict[str, int]:
        """Arguments of most kernels."""
        return dict(pixels=self.pixels, tiles=self.tiles)

    @property
    def of_images(self) -> dict[str, Any]:
        """Arguments of kernels that read or write tensors as the user has them."""
        area = self.F.height * self.F.width
        return dict(images=self.images, AREA=area, CHANNELS=self.F.channels, **self.of_group)


@dataclass
class Checkpoints:
    """What a solve keeps for its gradient, on the device."""

    layout: Layout
    weights: tuple[Tensor, ...]
    states: Tensor
    ends: Tensor
    plan: Tensor
    control: Tensor
    times: Tensor
    capacity: int
    num_steps: int
    result: host.Result


class Solve(host.Solver):
    """A solve with everything fixed but the tensors and times.

    Args:
        field: The field.
        method, dtype, options: As for host.Solver; `data_dim` is a number of channels.
    """

    def __init__(
        self, field: ConvField, method: Method, dtype: torch.dtype, **options: float
    ) -> None:
        super().__init__(method, dtype, **options)
        self.field = field
        self._rtol = options["rtol"]
        self._back: dict[torch.device, Tensor] = {}

    # --- forward

    def forward(
        self,
        x: Tensor,
        parameters: Sequence[Tensor],
        times: Sequence[float],
        grid: Sequence[float] = (),
        keep: bool = False,
        differs: Tensor | None = None,
    ) -> tuple[Tensor, host.Result, Checkpoints | None]:
        """Solves.

        Args:
            x: Data channels of the initial state, [images, data_dim, height, width], contiguous.
            parameters: Weight and bias of every convolution, contiguous.
            times: Output times, increasing.
            grid: For fixed steps: where they begin and end.
            keep: Whether to keep checkpoints.
            differs: Whether the field has turned out to be another than it was expected to be: a
                bool, 0-d, on x's device. Then the outcome is FIELD_DIFFERS; while a CUDA graph is
                captured the solution is nan.

        Returns:
            The solution [times, images, channels, height, width], counts and outcome, and the
            checkpoints, None if not asked for or if the solve failed.
        """
        arguments = (x, parameters, tuple(times), tuple(grid), keep, differs)
        with host.on(x.device):
            is_captured = host.is_captured(x.device)
            told = host.sent(differs) if differs is not None and not is_captured else None
            out, result, checkpoints = self._forward(*arguments)
            if told is not None and told():
                result.status = FIELD_DIFFERS
        return out, result, checkpoints if keep and result.status == SUCCESS else None

    def _precision(self) -> str:
        """Of matrix products."""
        wanted = launch.precision(self.dtype)
        is_rough = wanted == "tf32" and self.control != FIXED
        return "tf32x3" if is_rough and self._rtol < LEAST_RTOL_OF_TF32 else wanted

    def _layout(
        self, kernel: str, shape: Sequence[int], precision: str, device: torch.device
    ) -> Layout:
        """Of a batch of images, [images, channels, height, width], for forward or gradient."""
        images, _, height, width = shape
        F, config = launch.conv_configuration(
            *(kernel, self.field, height, width, precision, host.capability(device))
        )
        groups, of_group = (images, 1) if self.control == SAMPLE and images else (1, images)
        pixels = of_group * height * width
        tiles = max(1, triton.cdiv(pixels, config.pixels))
        return Layout(of_group, groups, pixels, tiles, F, config)

    def _packed(self, parameters: Sequence[Tensor], F: conv.Conv) -> tuple[Tensor, ...]:
        """The weights as kernels read them."""
        like, D, N = parameters[0], F.D, F.N
        parts = max(F.parts, 1)
        of_parts = torch.float16 if F.parts else self.dtype
        shapes = [(D, N), (N,), (N,), (conv.TAPS.value, N), (N, D), (D,), (D,)]
        w1, w1_time, b2, w2_time, w3, b3, w3_time = (host.empty(like, shape) for shape in shapes)
        w2, w2_transposed = (host.empty(like, (parts, 9, N, N), of_parts) for _ in range(2))
        scale = host.empty(like, (1,))
        weights = (w1, w1_time, w2, w2_transposed, scale, b2, w2_time, w3, b3, w3_time)
        arguments = dict(parameters=tuple(parameters), weights=weights, F=F)
        host.launch(self._known(parameters, F), conv.pack, (10,), arguments)
        return weights

    def _stages(
        self,
        which: Sequence[int],
        layout: Layout,
        weights: tuple[Tensor, ...],
        hidden: Tensor,
        again: bool,
        *,
        time_flows_back: bool = False,
        **buffers: Tensor,
    ) -> list[host.Launching]:
        """Launches that evaluate stages."""
        F, found = layout.F, []
        tableau, settings = self._constants(buffers["states"].device)
        if time_flows_back:
            settings = self._reversed(settings)
        ring = buffers["arguments"].shape[0]
        for s in which:
            found += self._first_layer(s, layout, weights, hidden, buffers)
            arguments = dict(
                **buffers,
                **dict(weights=weights, hidden=hidden, tableau=tableau, settings=settings, s=s),
                **dict(EVALUATE=conv.evaluate, F=F, S=self.stages, B=layout.launch.pixels, D=F.D),
                **dict(RING=ring, AGAIN=again),
                **layout.of_group,
                **layout.launch.options,
            )
            found.append((combine.stage, (layout.count,), arguments))
        return found

    def _reversed(self, settings: Tensor) -> Tensor:
        """The settings with the opposite sign of time, on their device."""
        if settings.device not in self._back:
            opposite = settings.clone()
            opposite[controller.SIGN.value] *= -1
            self._back[settings.device] = opposite
        return self._back[settings.device]

    def _first_layer(
        self,
        s: int,
        layout: Layout,
        weights: tuple[Tensor, ...],
        hidden: Tensor,
        buffers: dict[str, Tensor],
    ) -> list[host.Launching]:
        """The launch before stage s that puts the first hidden layer into memory, if it goes so."""
        if not layout.F.through_memory:
            return []
        arguments = dict(
            weights=weights,
            hidden=hidden,
            x=buffers["arguments"][s % buffers["arguments"].shape[0]],
            **_moments(buffers["cursor"], s),
            **dict(F=layout.F, B=layout.launch.pixels),
            **layout.of_group,
            **layout.launch.options,
        )
        return [(conv.first_layer, (layout.count,), arguments)]

    def _forward(
        self,
        x: Tensor,
        parameters: Sequence[Tensor],
        times: tuple[float, ...],
        grid: tuple[float, ...],
        keep: bool,
        differs: Tensor | None,
    ) -> tuple[Tensor, host.Result, Checkpoints]:
        layout = self._layout("forward", x.shape, self._precision(), x.device)
        F, S, is_fixed = layout.F, self.stages, self.control == FIXED
        is_captured = host.is_captured(x.device)
        num_steps = len(grid) - 1
        tableau, settings = self._constants(x.device)
        plan = host.plan_of(times, grid, S, self.method.last_on_demand) if is_fixed else ()
        times_on, ends_on = host.doubles(times, x.device), host.doubles(grid, x.device)
        plan_on = host.integers(plan, x.device)
        out = host.empty(x, (len(times), x.shape[0], F.channels, F.height, F.width))
        capacity = 0
        if keep:
            size = 2 * layout.total * F.D * x.element_size()
            capacity = num_steps if is_fixed else self._capacity(size, is_captured)
        states = host.empty(x, (capacity + 1 if keep else 2, 2, layout.total, F.D))
        steps = host.empty(x, (layout.groups, 0 if is_fixed else capacity, 2), torch.float64)
        control = host.zeros(x, (layout.groups, host.CONTROL))
        if differs is not None:
            control[:, host.DIFFERS] = differs
        weights = self._packed(parameters, F)
        hidden = host.empty(x, (layout.total if F.through_memory else 0, F.N))
        state = (layout.total, F.D)
        which = range(1, S)
        if is_fixed:
            which = range(min(step[2] for step in plan), max(step[3] for step in plan))
        shared = dict(
            tableau=tableau,
            settings=settings,
            cursor=host.zeros(x, (layout.groups, combine.CURSOR.value + S)),
            stages=host.empty(x, (S, *state)),
        )
        arguments = host.empty(x, (2, *state))
        sums = host.empty(x, (layout.count, combine.SUMS.value), torch.float64)
        arrivals = host.zeros(x, (layout.groups,), torch.int32)

        def queue() -> host.Queue:
            common = dict(
                **shared,
                **dict(times=times_on, plan=plan_on, out=out, states=states, control=control),
                **dict(capacity=capacity, num_times=len(times)),
                **dict(S=S, B=layout.launch.pixels, D=F.D, KEEP=keep, FIXED=is_fixed),
                **layout.of_images,
                **layout.launch.options,
            )
            begin = dict(
                x=x,
                ends=ends_on,
                steps=steps,
                arguments=arguments,
                **dict(DATA=self.data_dim, RING=2),
                **common,
            )
            finish = dict(
                sums=sums,
                arrivals=arrivals,
                num_steps=max(num_steps, 0),
                patience=PATIENCE[self.control],
                **common,
            )
            buffers = dict(states=states, arguments=arguments)
            buffers |= dict(stages=shared["stages"], cursor=shared["cursor"])
            launches = [
                (combine.begin, (layout.count,), begin),
                *self._stages(which, layout, weights, hidden, False, **buffers),
                (combine.finish, (layout.count,), finish),
            ]
            known = self._known((x,), "forward", F, layout.launch, keep)
            return host.Queue(launches, x.device, CHUNKS, known)

        launches = 1  # which packs the weights

        def outcome() -> host.Result:
            result = self._merged(control.cpu())
            result.launches = launches
            return result

        def kept(result: host.Result) -> Checkpoints:
            ends = ends_on if is_fixed else steps
            return Checkpoints(
                *(layout, weights, states, ends, plan_on, control, times_on),
                *(capacity, max(num_steps, 0), result),
            )

        queued = queue()
        if is_fixed:
            launches += queued.launch_all(num_steps)
            evaluations = sum(last - first for _, _, first, last in plan)
            result = host.Result(
                nfe=evaluations, nfe_again=evaluations, accepted=num_steps, launches=launches
            )
            if is_captured:
                host.spoil(host.differs(control), out)
            elif not host.never_waits(x.device):
                self._look_at(out, result)
            return out, result, kept(result)
        if is_captured:
            launches += queued.launch(self._captured_attempts() + 2)
            result = host.Result(launches=launches, later=outcome)
            host.spoil(host.failed(control), out)
            return out, result, kept(result)
        while True:
            launches += queued.launch_chunk()
            result = outcome()
            if result.status == host.FULL:
                capacity = min(2 * capacity, self._max_num_steps)
                states = host.grown(states, capacity + 1)
                steps = host.grown(steps.transpose(0, 1), capacity).transpose(0, 1).contiguous()
                status = control[:, host.STATUS]
                status.masked_fill_(status == controller.FULL.value, controller.RUNNING.value)
                queued = queue()
            elif result.status != host.RUNNING:
                break
        if result.status != SUCCESS and self.control == BATCH:
            slot = result.accepted if keep else result.accepted % 2
            y, f = (_images(part, layout) for part in states[slot])
            result.last = y, f
        return out, result, kept(result)

    @staticmethod
    def _look_at(out: Tensor, result: host.Result) -> None:
        """Notes which output of fixed steps is the first that is not finite."""
        bad = ~torch.isfinite(out).flatten(1).all(1)
        if bad.any():
            result.output = int(bad.int().argmax())
            result.status = NON_FINITE
            if result.output == 0:
                result.status, result.output = NON_FINITE_INPUT, -1

    def _merged(self, state: Tensor) -> host.Result:
        """The groups' outcomes as one.

        In the reference all rows are at the same attempt: the first failure ends the solve.
        """
        accepted, rejected = (
            state[:, controller.ACCEPTED.value],
            state[:, controller.REJECTED.value],
        )
        status = state[:, host.STATUS]
        failed = (status >= controller.MAX_STEPS.value) & (status != controller.FULL.value)
        attempts = accepted + rejected
        result = host.Result(accepted=int(accepted.max()), rejected=int(rejected.max()))
        made = attempts.max()
        if failed.any():
            made = attempts[failed].min()
            rows = (failed & (attempts == made)).nonzero().flatten()
            first = state[rows]
            result.status = int(first[0, host.STATUS]) - 1
            result.row, result.rows = int(rows[0]), len(rows)
            result.t, result.dt = first[0, [controller.T.value, controller.DT.value]].tolist()
            if result.status == controller.MAX_STEPS.value - 1:
                result.t = float(first[:, controller.T.value].min())
        elif (status == controller.FULL.value).any():
            result.status = host.FULL
        elif (status == controller.RUNNING.value).any():
            result.status = host.RUNNING
        evaluations = 1 if self._settings[controller.FIRST_STEP.value] else 2
        if made == 0:  # it may have ended sooner
            evaluations = int(state[:, controller.NFE.value].max())
        result.nfe = evaluations + int(made) * (self.stages - 1)
        result.nfe_again = result.accepted * (self.stages - 1) + 1
        return result

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
            grad: Cotangent of the solution, [times, images, channels, height, width], contiguous.
            x: A tensor like the gradient for x, if that is wanted.
            wanted: Whether the parameters' gradients are wanted.

        Returns:
            The gradient for x or None, those of the parameters (none if not wanted), the counts.
        """
        forward, precision = checkpoints.result, checkpoints.layout.F.precision
        layout = self._layout("gradient", grad.shape[1:], precision, grad.device)
        F, S, is_fixed = layout.F, self.stages, self.control == FIXED
        state = (layout.total, F.D)
        tableau, settings = self._constants(grad.device)
        known = self._known((grad,), "discrete", F, layout.launch, wanted)
        product = _Product(layout, checkpoints.weights, grad, wanted)
        cursor = host.zeros(grad, (layout.groups, combine.CURSOR.value + S))
        arguments, stages = (host.empty(grad, (S, *state)) for _ in range(2))
        adjoints, cotangent = host.empty(grad, (S + 1, *state)), host.empty(grad, state)
        adj_y, adj_f = (host.zeros(grad, state, grad.dtype) for _ in range(2))
        x_grad = host.empty(grad, (*grad.shape[1:2], self.data_dim, F.height, F.width))
        num_times = checkpoints.times.shape[0]
        shared = dict(
            **dict(grad=grad, times=checkpoints.times, tableau=tableau, settings=settings),
            **dict(adjoints=adjoints, cursor=cursor, num_times=num_times),
            **dict(S=S, B=layout.launch.pixels, D=F.D, FIXED=is_fixed),
            **layout.of_images,
            **layout.launch.options,
        )
        rewind = dict(
            **dict(ends=checkpoints.ends, plan=checkpoints.plan, states=checkpoints.states),
            **dict(control=checkpoints.control, arguments=arguments, stages=stages, adj_y=adj_y),
            **dict(capacity=checkpoints.capacity, num_steps=checkpoints.num_steps),
            **shared,
        )
        buffers = dict(states=checkpoints.states, arguments=arguments)
        buffers |= dict(stages=stages, cursor=cursor)

        def queue(first: int) -> host.Queue:
            """Rounds of steps whose stages before `first` come from the step before."""
            again = range(first, S - 1)
            launches = [
                (unwind.rewind, (layout.count,), rewind),
                *self._stages(again, layout, checkpoints.weights, product.hidden, True, **buffers),
            ]
            for s in reversed(range(S)):
                collect = dict(adj_f=adj_f, found=cotangent, s=s, **shared)
                launches.append((unwind.cotangent, (layout.count,), collect))
                if s >= first:
                    launches += self._first_layer(
                        s, layout, checkpoints.weights, product.hidden, buffers
                    )
                    launches += product.launches(
                        arguments[s], _moments(cursor, s), cotangent, adjoints[s], adj_y
                    )
            return host.Queue(launches, grad.device, CHUNKS, known)

        steps = self._captured_attempts() if forward.later else forward.accepted
        with host.on(grad.device):
            launches = 0
            if is_fixed or forward.later or self.control == SAMPLE:
                launches += queue(0).launch_all(steps)
            else:
                if steps > 1:
                    launches += queue(1).launch_all(steps - 1)
                launches += queue(0).launch(1)
            gather = dict(
                **dict(adj_y=adj_y, grad=grad, x_grad=x_grad, DATA=self.data_dim),
                **dict(B=layout.launch.pixels, D=F.D, **layout.of_images, **layout.launch.options),
            )
            host.launch(known, unwind.gather, (layout.count,), gather)
            grads = product.gradients(product.sums[0]) if wanted else []
        result = host.Result(nfe=forward.nfe_again, launches=launches + 1)
        if found := forward.later:
            host.spoil(host.failed(checkpoints.control), x_grad, *grads)
            result.later = lambda: dataclasses.replace(result, nfe=found().nfe_again, later=None)
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
            solution: What the solve returned, contiguous.
            parameters: As in `forward`.
            times: Output times of the solve.
            grad: Cotangent of the solution, contiguous.
            x: A tensor like the gradient for x, if that is wanted.
            wanted: Whether each parameter's gradient is wanted.
            grid: Not used: steps are adaptive.
            seminorm: Whether to leave the parameters' gradients out of the norm: they have to be.

        Returns:
            The gradient for x or None; those of the parameters, None where not wanted; the counts.

        Raises:
            ValueError: Fixed steps; or parameters' gradients are wanted, and in the norm.
        """
        if self.control == FIXED or (any(wanted) and not seminorm):
            raise ValueError("of convolutional fields only adaptive steps by seminorm have kernels")
        with host.on(grad.device):
            x_grad, grads, result = self._continuous(
                solution, parameters, tuple(times), grad, any(wanted)
            )
        found = [g if asked else None for g, asked in zip(grads, wanted, strict=True)]
        return x_grad if x is not None else None, found, result

    def _continuous(
        self,
        solution: Tensor,
        parameters: Sequence[Tensor],
        times: tuple[float, ...],
        grad: Tensor,
        wanted: bool,
    ) -> tuple[Tensor, Sequence[Tensor | None], host.Result]:
        layout = self._layout("gradient", grad.shape[1:], self._precision(), grad.device)
        F, S, pieces = layout.F, self.stages, len(times) - 1
        state, is_captured = (layout.total, F.D), host.is_captured(grad.device)
        weights = self._packed(parameters, F)
        product = _Product(layout, weights, grad, wanted, sets=S)
        tableau, settings = self._constants(grad.device)
        states = host.empty(grad, (2, 4, *state))
        arguments, a_arguments = (host.empty(grad, (2, *state)) for _ in range(2))
        stages, a_stages = (host.empty(grad, (S, *state)) for _ in range(2))
        found = host.empty(grad, state)
        of_time = host.empty(grad, (S, layout.count), torch.float64)
        cursor = host.zeros(grad, (1, combine.CURSOR.value + S))
        x_grad = host.empty(grad, (*grad.shape[1:2], self.data_dim, F.height, F.width))
        begun = host.zeros(grad, (host.CONTROL + continuous.PROGRESS.value,))
        control, progress = begun[: host.CONTROL], begun[host.CONTROL :]
        totals = torch.zeros_like(product.sums[0])
        shares = host.zeros(grad, (S + 1,))
        of_solve = dict(
            **dict(tableau=tableau, settings=settings, states=states, stages=stages),
            **dict(a_stages=a_stages, cursor=cursor, S=S, B=layout.launch.pixels, D=F.D),
            **layout.of_group,
            **layout.launch.options,
        )
        shared = dict(
            **dict(times=host.doubles(times, grad.device), num_times=len(times), grad=grad),
            **dict(control=control, progress=progress, shares=shares),
            **layout.of_images,
        )
        begin = dict(solution=solution, arguments=arguments, a_arguments=a_arguments)
        finish = dict(
            **dict(x_grad=x_grad, of_time=of_time, DATA=self.data_dim),
            sums=host.empty(grad, (layout.count, continuous.SUMS.value), torch.float64),
            arrivals=host.zeros(grad, (1,), torch.int32),
        )
        launches: list[host.Launching] = [
            (reverse.begin, (layout.count,), of_solve | shared | begin)
        ]
        buffers = dict(states=states, arguments=arguments, stages=stages, cursor=cursor)
        for s in range(1, S):
            launches += self._stages(
                [s], layout, weights, product.hidden, False, time_flows_back=True, **buffers
            )
            launches += product.launches(
                arguments[s % 2],
                _moments(cursor, s),
                a_arguments[s % 2],
                found,
                of_time=of_time[s],
                sums=s,
            )
            advance = of_solve | dict(s=s, a_arguments=a_arguments, product=found)
            del advance["stages"]
            launches.append((reverse.advance, (layout.count,), advance))
        launches.append((reverse.finish, (layout.count,), of_solve | shared | finish))
        if wanted:
            count = product.sums.shape[1]
            programs = triton.cdiv(count, reverse.BLOCK.value)
            commit = dict(sums=product.sums, totals=totals, shares=shares, count=count, S=S)
            launches.append((reverse.commit, (programs,), commit))
        # Of each tile there is a number in `of_time`: how many decides where a stage's begin.
        known = self._known((solution, grad, of_time[1]), "adjoint", F, layout.launch, wanted)
        queued, made = host.Queue(launches, grad.device, CHUNKS, known), 1

        def outcome() -> host.Result:
            return host.adjoint_result(begun, made)

        def gradients() -> list[Tensor]:
            if not wanted:
                return []
            # The kernels' a df/dy is in the solve's time, the integrals in the one that runs back.
            sign = self._settings[controller.SIGN.value]
            return product.gradients(sign * totals)

        none: list[Tensor | None] = [None] * len(parameters)
        if is_captured:
            made += queued.launch(pieces * (self._captured_attempts() + 1) + 1)
            grads = gradients()
            host.spoil(control[host.STATUS] != controller.SUCCESS.value, x_grad, *grads)
            return x_grad, grads or none, host.Result(launches=made, later=outcome)
        while True:
            made += queued.launch_chunk()
            result = outcome()
            if result.status != host.RUNNING:
                return x_grad, gradients() or none, result

    def describe(self, shape: Sequence[int], device: torch.device) -> str:
        """How a batch of images is solved: tiles, launches, arithmetic.

        Args:
            shape: [images, channels, height, width].
            device: Where it is.
        """
        layout = self._layout("forward", shape, self._precision(), device)
        launches = self.stages + 1 + layout.F.through_memory * (self.stages - 1)
        steps = {FIXED: "fixed steps", BATCH: "one step size", SAMPLE: "a step size per image"}
        arithmetic = {
            "tf32x3": "float32 (products of two 16-bit parts)",
            "tf32": "products of 16-bit numbers, float32 sums (torch's float32_matmul_precision)",
            "ieee": str(self.dtype).removeprefix("torch."),
        }[layout.F.precision]
        raised = "" if launch.precision(self.dtype) == layout.F.precision else ", raised for rtol"
        return (
            f"{steps[self.control]}, {layout.count} x {layout.launch.pixels} pixels, {launches} "
            f"launches for each attempted step, {arithmetic}{raised}"
        )


class _Product:
    """Vector-Jacobian products of a field, and the sums of its weights' gradients.

    Args:
        layout: Of the batch.
        weights: Packed.
        like: A tensor of the state's dtype, on its device.
        wanted: Whether the weights' gradients are.
        sets: Of sums.
    """

    def __init__(
        self,
        layout: Layout,
        weights: tuple[Tensor, ...],
        like: Tensor,
        wanted: bool,
        sets: int = 1,
    ) -> None:
        F, N, D = layout.F, layout.F.N, layout.F.D
        self._layout = layout
        self._weights = weights
        self._wanted = wanted
        most = host.most_programs(like.device, layout.launch.warps)
        self._programs = min(layout.count, most)
        self._weight_programs = min(layout.count, WEIGHT_PROGRAMS)
        self.hidden = host.empty(like, (layout.total if F.through_memory else 0, N))
        self._deltas = host.empty(like, (layout.total, N))
        self._largest = host.empty(like, (layout.count, 2))
        self._shapes = dict(
            inner=(self._programs, N, D),
            outer=(self._programs, N, D),
            bias=(self._programs, 2, D),
            middle=(self._weight_programs, 9, N, N),
            time=(self._weight_programs, conv.TAPS.value, N),
        )
        size = sum(map(math.prod, self._shapes.values())) if wanted else 0
        self.sums = host.zeros(like, (sets, size), like.dtype)

    def _parts(self, sums: Tensor) -> dict[str, Tensor]:
        """Of a set of sums those of each kind."""
        if not self._wanted:
            return dict.fromkeys(self._shapes, sums)
        sizes = [math.prod(shape) for shape in self._shapes.values()]
        parts = zip(self._shapes.items(), sums.split(sizes), strict=True)
        return {name: part.view(shape) for (name, shape), part in parts}

    def launches(
        self,
        x: Tensor,
        moments: dict[str, Any],
        cotangent: Tensor,
        found: Tensor,
        total: Tensor | None = None,
        *,
        of_time: Tensor | None = None,
        sums: int = 0,
    ) -> list[host.Launching]:
        """Those that take a product and add up gradients.

        Args:
            x: Argument of the evaluation.
            moments: When it was.
            cotangent: Of its value.
            found: Gets the product.
            total: Gets it added.
            of_time: Gets the product with respect to the time, of each tile.
            sums: Number of the set.
        """
        layout, F = self._layout, self._layout.F
        B, parts = layout.launch.pixels, self._parts(self.sums[sums])
        # A tile's neighbourhood is a row of pixels and one more on either side.
        near = 1 << (2 * triton.cdiv(F.width + 1, B)).bit_length()
        is_timed = of_time is not None
        shared = dict(
            **dict(weights=self._weights, x=x, deltas=self._deltas, largest=self._largest),
            **dict(F=F, B=B, count=layout.count),
            **moments,
            **layout.of_group,
            **layout.launch.options,
        )
        of_both = dict(
            of_time=of_time if is_timed else self._largest,
            **dict(programs=self._programs, WEIGHTS=self._wanted, TIME=is_timed),
            **shared,
        )
        outer = dict(
            **dict(hidden=self.hidden, cotangent=cotangent),
            **dict(sums=parts["outer"], bias_sums=parts["bias"], **of_both),
        )
        inner = dict(
            **dict(found=found, total=found if total is None else total, sums=parts["inner"]),
            **dict(NEAR=near, ADD=total is not None, **of_both),
        )
        made: list[host.Launching] = [
            (conv.vjp_outer, (self._programs,), outer),
            (conv.vjp_inner, (self._programs,), inner),
        ]
        if self._wanted:
            take = layout.launch.taps
            middle = dict(
                **dict(hidden=self.hidden, sums=parts["middle"], time_sums=parts["time"]),
                **dict(programs=self._weight_programs, TAKE=take, **shared),
            )
            made.append((conv.vjp_weights, (self._weight_programs, 9 // take), middle))
        return made

    def gradients(self, sums: Tensor) -> list[Tensor]:
        """Of all parameters, shaped as these are: the sums of all programs, in their order."""
        F = self._layout.F
        C, K = F.channels, F.filters
        parts = {name: part.sum(0) for name, part in self._parts(sums).items()}
        inner, outer, last = parts["inner"][:K], parts["outer"][:K, :C], parts["bias"]
        middle, time = parts["middle"][:, :K, :K], parts["time"][:, :K]
        w1, w3 = inner[:, :C], outer.t()
        w2 = middle.permute(2, 1, 0)  # [outputs, inputs, taps]
        if F.time:
            w1 = torch.cat([inner[:, C + 1 : C + 2], w1], 1)
            w2 = torch.cat([time[:9].t()[:, None], w2], 1)
            w3 = torch.cat([last[1, :C, None], w3], 1)
        return [
            *(w1.reshape(*w1.shape, 1, 1).contiguous(), inner[:, C].contiguous()),
            *(w2.reshape(*w2.shape[:2], 3, 3).contiguous(), time[9].contiguous()),
            *(w3.reshape(*w3.shape, 1, 1).contiguous(), last[0, :C].contiguous()),
        ]


def _moments(cursor: Tensor, s: int) -> dict[str, Any]:
    """When stage s is evaluated, of each group."""
    return dict(moments=cursor, moments_stride=cursor.shape[1], at=combine.CURSOR.value + s)


def _images(state: Tensor, layout: Layout) -> Tensor:
    """A state as the user has it, [images, channels, height, width]."""
    F = layout.F
    shape = (layout.groups * layout.images, F.height, F.width, F.D)
    return state.view(shape)[..., : F.channels].permute(0, 3, 1, 2)
