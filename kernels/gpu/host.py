"""What the host code of all GPU solves shares: outcomes, launches, the device, memory, tables."""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anode_fast.kernels.gpu import continuous, controller
from anode_fast.kernels.interface import SUCCESS, Method

CONTROL = controller.CONTROL.value
STATUS = controller.STATUS.value
DIFFERS = controller.DIFFERS.value
FULL = controller.FULL.value - 1
RUNNING = controller.RUNNING.value - 1
"""Sizes and places in `control`; outcomes beside those of kernels/interface.py."""

FIRST_CHUNK, CHUNK = 8, 16
"""Launches that are queued before the host looks whether the solve has ended; at first, later."""

CHECKPOINT_BYTES = 32 << 20
"""Of the checkpoints that a solve begins with; it gets more when they are full."""

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
    differs: bool = False
    """Whether the first stage is not as expected; see `first_stage.py`."""
    nfe_again: int = 0
    """Evaluations that it takes the discrete gradient to make all stages again."""
    last: tuple[Tensor, Tensor] | None = None
    """Of a failure with one step size: the last state and its derivative."""
    later: Callable[[], Result] | None = None
    """Of a captured solve, whose other counts are 0: waits for the device and finds them there."""


def adjoint_result(state: Tensor, launches: int) -> Result:
    """How an adjoint ODE stands. `state`: its control, then its progress; waits for the device."""
    found = state.tolist()
    before = CONTROL + continuous.ACCEPTED_BEFORE.value
    return Result(
        status=int(found[STATUS]) - 1,
        nfe=int(found[controller.NFE.value]),
        accepted=int(found[controller.ACCEPTED.value] + found[before]),
        rejected=int(found[controller.REJECTED.value] + found[before + 1]),
        t=-found[controller.T.value],
        dt=found[controller.DT.value],
        launches=launches,
    )


class Solver:
    """What a solve of any field has: method and options as the kernels take them.

    Args:
        method: The method.
        dtype: torch.float32 or torch.float64.
        options: As the fields of the C struct Options in kernels/cpu/problem.hpp: `control`,
            `backwards`, `float_time`, `data_dim`, `rtol`, `atol`, `max_num_steps`, `first_step`,
            `safety`, `ifactor`, `dfactor`, `min_step`, `max_step`; those left out are 0.
    """

    def __init__(self, method: Method, dtype: torch.dtype, **options: float) -> None:
        self.method = method
        self.dtype = dtype
        self.control = int(options["control"])
        self.data_dim = int(options["data_dim"])
        self.stages = len(method.c)
        self._tableau = tableau_of(method)
        self._settings = [
            *(options["rtol"], options["atol"], options.get("first_step", 0.0)),
            *(options["safety"], options["ifactor"], options["dfactor"]),
            *(options.get("min_step", 0.0), options["max_step"], float(options["max_num_steps"])),
            *(1 / method.order, float(options["float_time"])),
            -1.0 if options["backwards"] else 1.0,
        ]
        self._max_num_steps = int(min(options["max_num_steps"], 2**31 - 1))
        self._on: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._compiled: dict[Any, Known] = {}

    def _known(self, tensors: Sequence[Tensor], *settings: Any) -> Known:
        """What earlier launches have compiled for arguments like these.

        Args:
            tensors: Those that come from elsewhere: memory made here is where Triton wants it.
            settings: What decides, beside the solve itself, about the code.
        """
        for tensor in tensors:
            if tensor.data_ptr() % ALIGNMENT:
                return {}
        return self._compiled.setdefault((tensors[0].device, *settings), {})

    def _constants(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Tableau and settings on the device."""
        if device not in self._on:
            self._on[device] = (
                torch.tensor(self._tableau, dtype=torch.float64, device=device),
                torch.tensor(self._settings, dtype=torch.float64, device=device),
            )
        return self._on[device]

    def _capacity(self, size: int, is_captured: bool) -> int:
        """Steps for which there are checkpoints at first; if captured, once and for all.

        Args:
            size: Bytes of one.
            is_captured: Whether launches go into a CUDA graph.
        """
        size = max(size, 1)
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


Launching = tuple[Any, tuple[int, ...], dict[str, Any]]
"""A kernel, its grid, and its arguments."""

Known = dict[Any, Any]
"""Of kernels what Triton has compiled for arguments of one kind."""

ALIGNMENT = 16
"""Bytes: Triton compiles kernels for pointers that are multiples of it, and for others."""


def launch(known: Known, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> Any:
    """Launches a kernel. Gives what is compiled of it, None from the interpreter.

    For Triton to look at the arguments, and for changes of all constants, takes longer than many a
    solve: that is for the first launch of its kind.
    """
    compiled = known.get(kernel)
    if compiled is None:
        compiled = known[kernel] = kernel[grid](**arguments)
    else:
        compiled[(*grid, 1, 1)[:3]](*[arguments[name] for name in kernel.arg_names])
    return compiled


class Queue:
    """Launches, to be made in the same order again and again with the same arguments.

    Args:
        launches: Those of one kernel differ in numbers that it is not specialized for, and in
            tensors of the same kind.
        device: Where.
        chunks: Rounds of them to queue at first, and later, before the host looks; None if one
            round is all it takes.
        known: What is compiled for arguments like these.
    """

    def __init__(
        self,
        launches: Sequence[Launching],
        device: torch.device,
        chunks: tuple[int, int] | None,
        known: Known,
    ) -> None:
        self._launches = launches
        self._device = device
        self._rounds = chunks
        self._known = known
        self._again: list[Callable[[], None]] = []
        self._chunks = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def launch(self, count: int) -> int:
        """Queues so many rounds. Returns how many launches these are."""
        for _ in range(count):
            if self._again:
                for again in self._again:
                    again()
            else:
                self._launch_first()
        return count * self.size

    def _launch_first(self) -> None:
        for kernel, grid, arguments in self._launches:
            compiled = launch(self._known, kernel, grid, arguments)
            if compiled and self._rounds:
                values = [arguments[name] for name in kernel.arg_names]
                self._again.append(functools.partial(compiled[(*grid, 1, 1)[:3]], *values))

    @property
    def size(self) -> int:
        """Launches of a round."""
        return len(self._launches)

    def launch_chunk(self, most: int | None = None) -> int:
        """Queues what may be enough. Returns how many launches.

        The third chunk and later ones are a CUDA graph, unless one is captured already.

        Args:
            most: Rounds that are certainly enough.
        """
        if self._rounds is None:
            return self.launch(1)
        self._chunks += 1
        rounds = self._rounds[0] if self._chunks == 1 else self._rounds[1]
        is_graph = self._device.type == "cuda" and not is_captured(self._device)
        if self._chunks <= 2 or not is_graph or (most is not None and most < rounds):
            return self.launch(rounds if most is None else min(rounds, most))
        if self._graph is None:
            self._graph = self._capture(rounds)
        self._graph.replay()
        return rounds * self.size

    def launch_all(self, rounds: int) -> int:
        """Queues so many rounds, chunk by chunk. Returns how many launches these are."""
        made = 0
        while made < rounds * self.size:
            made += self.launch_chunk(rounds - made // self.size)
        return made

    def _capture(self, rounds: int) -> torch.cuda.CUDAGraph:
        # Not by torch.cuda.graph, which empties the allocator's cache first. Nothing is allocated
        # here, and nothing runs: the kernels are compiled since the first chunk.
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(self._device)
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            self.launch(rounds)
            graph.capture_end()
        return graph


# --- the device -----------------------------------------------------------------------------------


def is_captured(device: torch.device) -> bool:
    """Whether launches go into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def never_waits(device: torch.device) -> bool:
    """Whether fixed steps leave it at nan where something is not finite: on a GPU."""
    return device.type == "cuda" or is_captured(device)


def on(device: torch.device) -> Any:
    """Makes launches go to the device; the interpreter's numpy warns where a GPU says nothing."""
    return torch.cuda.device(device) if device.type == "cuda" else np.errstate(all="ignore")


@functools.cache
def capability(device: torch.device) -> int:
    """Compute capability, 90 for 9.0; 0 where the interpreter runs."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def most_programs(device: torch.device, warps: int) -> int:
    """Programs of a gradient, each with sums of its own.

    As many as the multiprocessors hold at once where each thread takes all registers that it may;
    or twice as many as there are multiprocessors.
    """
    if device.type != "cuda":
        return 4
    count = int(torch.cuda.get_device_properties(device).multi_processor_count)
    return max(2, 8 // warps) * count


def sent(number: Tensor) -> Callable[[], float]:
    """Starts to copy a number on the device; what is returned waits for that, and no longer."""
    if number.device.type != "cuda":
        return number.item
    here = torch.empty((), dtype=number.dtype, pin_memory=True)
    here.copy_(number, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def wait() -> float:
        arrived.synchronize()
        return float(here)

    return wait


def failed(control: Tensor) -> Tensor:
    """Whether a solve has failed, or its field is not what it was expected to be; on the device."""
    return torch.any((control[..., STATUS] != controller.SUCCESS.value) | _differs(control))


def differs(control: Tensor) -> Tensor:
    """Whether the field of a solve is not what it was expected to be; on the device."""
    return torch.any(_differs(control))


def _differs(control: Tensor) -> Tensor:
    return control[..., DIFFERS] != 0


def spoil(failed: Tensor, *found: Tensor | None) -> None:
    """Makes a result nan if `failed`, a single bool on the device."""
    for tensor in found:
        if tensor is not None:
            tensor.masked_fill_(failed, math.nan)


# --- memory ---------------------------------------------------------------------------------------


def empty(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """Memory that a kernel fills."""
    return like.new_empty(shape, dtype=dtype or like.dtype)


def zeros(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    """Memory that holds 0."""
    return like.new_zeros(shape, dtype=dtype)


def grown(old: Tensor, size: int) -> Tensor:
    """A copy with room for more along the first dim."""
    new = empty(old, (size, *old.shape[1:]))
    new[: old.shape[0]] = old
    return new


@functools.lru_cache(maxsize=256)
def doubles(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Kept on the device: a copy costs more than a small solve."""
    return torch.tensor(values, dtype=torch.float64, device=device)


@functools.lru_cache(maxsize=256)
def integers(values: tuple[int, ...] | tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """Likewise."""
    return torch.tensor(values, dtype=torch.int32, device=device)


# --- plain numbers --------------------------------------------------------------------------------


def tableau_of(method: Method) -> list[list[float]]:
    """A method as runge_kutta.py has it in memory."""
    stages = len(method.c)
    rows = [[*row, *[0.0] * (stages - len(row))] for row in method.a]
    euler = [1.0] + [0.0] * (stages - 1)
    powers = [list(power) for power in zip(*method.interpolant, strict=True)]
    return [*rows, list(method.b), euler, list(method.b_err), list(method.c), *powers]


@functools.lru_cache(maxsize=64)
def plan_of(
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
