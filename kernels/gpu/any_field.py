"""A solve on a GPU of a field that PyTorch evaluates: launches between the evaluations.

The kernels are those of combine.py, with a state taken as pixels of one channel, and an evaluation
that reads what the field returned. A round is one attempt: `begin`, for each stage the field and
`stage`, and `finish`, whose last program runs the controller. The host stays a round ahead of the
device: it looks at how a round ended after it has queued the next one, which does nothing if there
is nothing left to do, apart from the field, whose values are then ignored. Fixed steps never wait.

After `ROUNDS_BEFORE_GRAPH` rounds one is captured in a CUDA graph, if it may be, and replayed. A
graph lives as long as a solve: what a field's own Python code does is settled in it.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from anode_fast.kernels.gpu import combine, controller, host
from anode_fast.kernels.interface import FIXED, SUCCESS, Method

ROUNDS_BEFORE_GRAPH = 8
"""Rounds of a solve that are queued launch by launch; capturing one costs about as much."""

REJECTIONS_BEFORE_DOUBT = 64
"""Attempts rejected in a solve after which the field may be none: not deterministic."""

TILE = 1024
"""Entries of the state that a program has."""

ALIGNED = 16
"""Bytes that Triton takes an address to be a multiple of, once it was."""

Evaluate = Callable[[Tensor, Tensor], Tensor]
MayCapture = Callable[[Callable[[], None]], bool]


@dataclass
class Checkpoints:
    """What a solve keeps of its accepted steps.

    Attributes:
        states: State and derivative at the start of each, [steps, 2, *state]. The derivative at the
            start of a fixed step holds nothing unless the step before left it.
        ends: Start and end of each, solver time.
        has_slope: Whether the derivative is there.
        last: State, and for adaptive steps the derivative, at the end of the last one.
    """

    states: Tensor
    ends: list[tuple[float, float]]
    has_slope: list[bool]
    last: tuple[Tensor, Tensor]


class _Launch:
    """A launch with the same arguments each time, but for the value of a field.

    Args:
        known: What is compiled already, by what a kernel is specialized for.
        kernel, programs, arguments: The launch.
    """

    def __init__(
        self, known: dict[Any, Any], kernel: Any, programs: int, arguments: dict[str, Any]
    ) -> None:
        self._known = known
        self._kernel = kernel
        self._grid = (programs, 1, 1)
        self._arguments = arguments
        self._compiled: Any = None
        self._runner: Any = None
        self._values: list[Any] = []
        self._place = -1

    def __call__(self, value: Tensor | None = None) -> None:
        """Queues it."""
        if value is not None:
            self._arguments["weights"] = (value,)
        if self._compiled is None:
            self._compile()
            return
        if not self._compiled:  # the interpreter
            self._kernel[self._grid[:1]](**self._arguments)
            return
        if value is not None:
            self._values[self._place] = (value,)
        self._runner(*self._values)

    def _compile(self) -> None:
        """The first launch. Spares Triton to look at all arguments if it has seen their like."""
        tensors = [x for x in self._arguments.values() if isinstance(x, Tensor)]
        key = (
            *(self._kernel, self._arguments.get("KEEP"), tensors[0].device),
            *(x.data_ptr() % ALIGNED == 0 for x in tensors),
        )
        self._compiled = self._known.get(key)
        if self._compiled is None:
            self._compiled = self._kernel[self._grid[:1]](**self._arguments) or False
            self._known[key] = self._compiled
            launched = True
        else:
            launched = False
        if self._compiled:
            self._runner = self._compiled[self._grid]
            names = self._kernel.arg_names
            self._values = [self._arguments[name] for name in names]
            self._place = names.index("weights") if "weights" in names else -1
        if not launched:
            self(None)


class Solve(host.Solver):
    """A solve with everything fixed but the field, the state and times.

    Args:
        method, dtype, options: As for host.Solver, without `data_dim`; one step size for the batch.
    """

    def __init__(self, method: Method, dtype: torch.dtype, **options: float) -> None:
        super().__init__(method, dtype, data_dim=1, **options)
        self.known: dict[Any, Any] = {}

    def forward(
        self,
        evaluate: Evaluate,
        y0: Tensor,
        times: Sequence[float],
        grid: Sequence[float] = (),
        keep: bool = False,
        f0: Tensor | None = None,
        may_capture: MayCapture | None = None,
        doubt: Callable[[], None] | None = None,
    ) -> tuple[Tensor, host.Result, Checkpoints | None]:
        """Solves. Call it under no_grad.

        Args:
            evaluate: The field in solver time: gets the user's time, 0-d in the state's dtype, and
                a state, both in memory that later evaluations write to.
            y0: Initial state, contiguous.
            times: Output times, increasing.
            grid: For fixed steps: where they begin and end.
            keep: Whether to keep checkpoints.
            f0: The derivative at the start, if it is known.
            may_capture: Runs a function that queues a round for capture, and tells whether the
                graph may be used; None: never capture.
            doubt: Called once `REJECTIONS_BEFORE_DOUBT` attempts were rejected. May raise.

        Returns:
            The solution [times, *state], counts and outcome, and the checkpoints, None if not asked
            for or if the solve failed.
        """
        with host.on(y0.device):
            run = _Run(self, evaluate, y0, tuple(times), tuple(grid), keep, may_capture)
            try:
                result = run.fixed(f0) if self.control == FIXED else run.adaptive(f0, doubt)
            finally:
                run.end()
            kept = run.checkpoints(result) if keep and result.status == SUCCESS else None
        return run.out.view(len(times), *y0.shape), result, kept

    def constants(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Tableau, settings, and settings in which the user's time is the solver's."""
        tableau, settings = self._constants(device)
        forward = settings
        if self._settings[controller.SIGN.value] < 0:
            forward = settings.clone()
            forward[controller.SIGN.value] = 1.0
        return tableau, settings, forward

    def capacity(self, size: int) -> int:
        """Steps for which there are checkpoints of so many bytes at first."""
        return int(self._capacity(size, is_captured=False))

    @property
    def has_first_step(self) -> bool:
        """Whether the first step's size is given."""
        return bool(self._settings[controller.FIRST_STEP.value])

    @property
    def max_num_steps(self) -> int:
        """Attempts that a solve may make."""
        return int(self._max_num_steps)


class _Run:
    """One solve: its memory on the device, and its launches."""

    def __init__(
        self,
        solve: Solve,
        evaluate: Evaluate,
        y0: Tensor,
        times: tuple[float, ...],
        grid: tuple[float, ...],
        keep: bool,
        may_capture: MayCapture | None,
    ) -> None:
        self.solve, self.evaluate, self.keep = solve, evaluate, keep
        self._may_capture = may_capture if y0.is_cuda and not host.is_captured(y0.device) else None
        self._graph: torch.cuda.CUDAGraph | None = None
        self.launches = 0
        self.S, self.is_fixed = solve.stages, solve.control == FIXED
        self.plan = (
            host.plan_of(times, grid, self.S, solve.method.last_on_demand) if self.is_fixed else ()
        )
        self.grid, self.n, self.y0 = grid, y0.numel(), y0
        device, n, S = y0.device, self.n, self.S
        self.programs = max(1, triton.cdiv(n, TILE))
        self.capacity = 0
        if keep:
            size = 2 * n * y0.element_size()
            self.capacity = len(self.plan) if self.is_fixed else solve.capacity(size)
        self.out = host.empty(y0, (len(times), n))
        self.states = host.empty(y0, (self.capacity + 1 if keep else 2, 2, n))
        self.steps = host.empty(y0, (0 if self.is_fixed else self.capacity, 2), torch.float64)
        self.arguments = host.empty(y0, (2, n))
        self.moments = host.zeros(y0, (S,), y0.dtype)
        self.control = host.zeros(y0, (host.CONTROL,))
        tableau, settings, forward = solve.constants(device)
        self._shared: dict[str, Any] = dict(
            tableau=tableau,
            cursor=host.zeros(y0, (combine.CURSOR.value + S,)),
            stages=host.empty(y0, (S, n)),
            **dict(pixels=n, tiles=self.programs),
            **dict(S=S, B=TILE, D=1, num_warps=4),
        )
        self._of_solve: dict[str, Any] = dict(
            **dict(settings=settings, control=self.control, out=self.out),
            **dict(times=host.doubles(times, device), plan=host.integers(self.plan, device)),
            **dict(images=n, num_times=len(times), AREA=1, CHANNELS=1),
            **dict(KEEP=keep, FIXED=self.is_fixed),
        )
        self._of_stage: dict[str, Any] = dict(settings=forward, hidden=self.moments)
        self._of_stage |= dict(EVALUATE=combine.value_of_field, F=0, RING=2, AGAIN=False)
        self._ends = host.doubles(grid, device)
        self._sums = host.empty(y0, (self.programs, combine.SUMS.value), torch.float64)
        self._arrivals = host.zeros(y0, (1,), torch.int32)
        self._bind()
        views = [x.view(y0.shape) for x in self.arguments]
        self._inputs = [(self.moments[s], views[s % 2]) for s in range(S)]

    def _bind(self) -> None:
        """Makes the launches, for the memory there is."""
        shared = dict(states=self.states, **self._shared)
        solve = dict(capacity=self.capacity, **self._of_solve, **shared)
        launch = functools.partial(_Launch, self.solve.known)
        begin = dict(x=self.y0, ends=self._ends, steps=self.steps, arguments=self.arguments)
        self._begin = launch(combine.begin, self.programs, dict(DATA=1, RING=2, **begin, **solve))
        tell = dict(cursor=self._shared["cursor"], moments=self.moments, S=self.S)
        self._tell = launch(combine.tell_times, 1, tell)
        stage = dict(arguments=self.arguments, **self._of_stage, **shared)
        self._stages = [
            launch(combine.stage, self.programs, dict(s=s, **stage)) for s in range(self.S)
        ]
        finish: dict[str, Any] = dict(sums=self._sums, arrivals=self._arrivals, **solve)
        finish |= dict(num_steps=len(self.plan), patience=controller.MOST_NON_FINITE.value)
        self._finish = launch(combine.finish, self.programs, finish)

    def _round(self, which: Sequence[int], f0: Tensor | None = None) -> None:
        """Queues a round that evaluates these stages; `f0`: the first one's value, if known."""
        self._begin()
        self._tell()
        for s in which:
            value = self.evaluate(*self._inputs[s]) if f0 is None else f0
            f0 = None
            if not value.is_contiguous() or value.is_neg() or value.data_ptr() % ALIGNED:
                value = value.resolve_neg().clone(memory_format=torch.contiguous_format)
            self._stages[s](value)
        self._finish()
        self.launches += 3 + len(which)

    def _rounds(self, which: Sequence[int]) -> Iterator[None]:
        """Queues such rounds, one each time it is drawn from."""
        done = 0
        while True:
            if done == ROUNDS_BEFORE_GRAPH and self._may_capture:
                self._try_graph(which, self._may_capture)
            elif self._graph is None:
                self._round(which)
            else:
                self._graph.replay()
                self.launches += 3 + len(which)
            done += 1
            yield

    def _try_graph(self, which: Sequence[int], may_capture: MayCapture) -> None:
        """Queues a round, and captures one for the next times if nothing speaks against it."""
        self._may_capture = None
        if not self._waits_for_nothing(which):
            may_capture(_refused)
            return
        launches, graph = self.launches, torch.cuda.CUDAGraph()
        if may_capture(functools.partial(_capture, graph, self.y0.device, self._round, which)):
            self._graph = graph
        self.launches = launches

    def _waits_for_nothing(self, which: Sequence[int]) -> bool:
        """Queues a round; whether the field never made the host wait for the device."""
        before = torch.cuda.get_sync_debug_mode()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the mode does not see all waits, it says
                torch.cuda.set_sync_debug_mode("error")
            self._round(which)
            return True
        except RuntimeError:
            pass
        finally:
            torch.cuda.set_sync_debug_mode(before)
        self._round(which)  # from its beginning: until `finish` a round only overwrites
        return False

    def end(self) -> None:
        """Gives up the graph, which may still have to run."""
        if self._graph is not None:
            _retire(self._graph)
            self._graph = None

    def fixed(self, f0: Tensor | None) -> host.Result:
        """Takes all fixed steps."""
        evaluations = 0
        before: range | None = None
        rounds: Iterator[None] = iter(())
        for _, _, first, last in self.plan:
            which = range(first, last)
            evaluations += len(which)
            if f0 is not None:
                self._round(which, f0)
                f0 = None
                continue
            if which != before:
                self.end()
                before = which
                rounds = self._rounds(which)
            next(rounds)
        return host.Result(nfe=evaluations, accepted=len(self.plan), launches=self.launches)

    def adaptive(self, f0: Tensor | None, doubt: Callable[[], None] | None) -> host.Result:
        """Takes steps until the last output time is reached, or fails."""
        last = range(self.S - 1, self.S)
        self._round(last, f0)
        if not self.solve.has_first_step:
            self._round(last)
        looks = _Looks(self.control)
        which = range(1, self.S)
        rounds = self._rounds(which)
        while True:
            status = looks.status
            if status == host.RUNNING:
                if doubt and looks.rejected >= REJECTIONS_BEFORE_DOUBT:
                    doubt()
                    doubt = None
                next(rounds)
                looks.take()
            elif status == host.FULL:
                self._grow()
                rounds = self._rounds(which)
                looks = _Looks(self.control)
            else:
                break
        return self._result()

    def _grow(self) -> None:
        """Makes room for more checkpoints."""
        self.capacity = min(2 * self.capacity, self.solve.max_num_steps)
        self.states = host.grown(self.states, self.capacity + 1)
        self.steps = host.grown(self.steps, self.capacity)
        status = self.control[host.STATUS]
        status.masked_fill_(status == controller.FULL.value, controller.RUNNING.value)
        self.end()
        self._bind()

    def _result(self) -> host.Result:
        found = self.control.tolist()
        result = host.Result(
            status=int(found[host.STATUS]) - 1,
            nfe=int(found[controller.NFE.value]),
            accepted=int(found[controller.ACCEPTED.value]),
            rejected=int(found[controller.REJECTED.value]),
            t=found[controller.T.value],
            dt=found[controller.DT.value],
            launches=self.launches,
        )
        if result.status != SUCCESS:
            slot = result.accepted if self.keep else result.accepted % 2
            y, f = self.states[slot].view(2, *self.y0.shape)
            result.last = y, f
        return result

    def checkpoints(self, result: host.Result) -> Checkpoints:
        """Of the accepted steps."""
        count = result.accepted
        states = self.states[: count + 1].view(-1, 2, *self.y0.shape)
        y, f = states[count].unbind()
        if self.is_fixed:
            ends = list(zip(self.grid[:-1], self.grid[1:], strict=True))
            has_slope = [first > 0 for _, _, first, _ in self.plan]
        else:
            ends = [(t0, t1) for t0, t1 in self.steps[:count].tolist()]
            has_slope = [True] * count
        return Checkpoints(states[:count], ends, has_slope, (y, f))


# --- graphs ---------------------------------------------------------------------------------------

_retired: list[tuple[Any, torch.cuda.CUDAGraph]] = []
"""Graphs that nobody wants any more, each with an event after its last run."""


def _retire(graph: torch.cuda.CUDAGraph) -> None:
    """Keeps a graph until it has run for the last time."""
    _retired[:] = [(event, old) for event, old in _retired if not event.query()]
    event = torch.cuda.Event()
    event.record()
    _retired.append((event, graph))


def _refused() -> None:
    """What is captured of a field that waits for the device."""
    raise RuntimeError("the field waits for the device")


def _capture(
    graph: torch.cuda.CUDAGraph,
    device: torch.device,
    queue: Callable[[Sequence[int]], None],
    which: Sequence[int],
) -> None:
    """Captures a round. Nothing of it runs. Raises what stands in the way."""
    # Not by torch.cuda.graph, which collects garbage and empties the allocator's cache first.
    stream, pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
    with torch.cuda.stream(stream):
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            queue(which)
            graph.capture_end()
        except BaseException:
            with contextlib.suppress(RuntimeError):
                graph.capture_end()
            with contextlib.suppress(RuntimeError):  # which a failed end of a capture leaves out
                torch._C._cuda_endAllocateToPool(stream.device_index, pool)
            raise


# --- looks ----------------------------------------------------------------------------------------


class _Looks:
    """The host's looks at how rounds ended, each a round late on a GPU.

    Args:
        control: Of the solve.

    Attributes:
        status, rejected: After the last round that was looked at.
    """

    def __init__(self, control: Tensor) -> None:
        self._control = control
        self._is_late = control.is_cuda
        self._taken: list[tuple[Tensor, Any]] = []
        self._free = [self._room(), self._room()] if self._is_late else []
        self.status, self.rejected = int(host.RUNNING), 0
        if not self._is_late:
            self.take()

    def _room(self) -> Tensor:
        return torch.empty(host.CONTROL, dtype=torch.float64, pin_memory=True)

    def take(self) -> None:
        """Asks how the rounds queued so far will have ended; waits for the look before."""
        if not self._is_late:
            self._read(self._control)
            return
        room = self._free.pop()
        room.copy_(self._control, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._taken.append((room, event))
        if len(self._taken) > 1:
            room, event = self._taken.pop(0)
            event.synchronize()
            self._read(room)
            self._free.append(room)

    def _read(self, control: Tensor) -> None:
        found = control.tolist()
        self.status = int(found[host.STATUS]) - 1
        self.rejected = int(found[controller.REJECTED.value])
