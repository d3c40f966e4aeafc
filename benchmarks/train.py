"""A training loop that keeps the figures of every iteration and survives a failed solve."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice, pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]

# Parts of an iteration: each instant of it belongs to one of them.
SOLVE = "solve"  # the call of the net's block
GRADIENT = "its gradient"  # from the gradient of the block's output to the parameters'
LOSS = "linear and loss"  # both ways
STEP = "optimizer step"
ZERO_GRAD = "zero_grad"
REST = "data, the rest"  # getting the batch, calling the net, reading the loss
PARTS = (SOLVE, GRADIENT, LOSS, STEP, ZERO_GRAD, REST)
IN_A_ROW = 10  # iterations per turn: its own code and data are in the caches then, as when alone
_INTERVALS = (REST, ZERO_GRAD, REST, SOLVE, LOSS, GRADIENT, STEP, REST)  # as they follow in time


@dataclass
class Run:
    """What a training has given so far: a row per finished iteration, and how it ended.

    Attributes:
        losses: Before the step of that iteration.
        nfe: Evaluations of the field in the forward solve.
        nfe_backward: Evaluations of the field in the backward pass.
        seconds: Wall clock of the whole iteration, from getting the batch to reading the loss.
        parts: Wall clock of each of `PARTS`, which add up to `seconds`.
        backend: What solved, as its `SolveStats` say.
        failure: Why the training ended early; None if it did not.
    """

    losses: list[float] = field(default_factory=list)
    nfe: list[int] = field(default_factory=list)
    nfe_backward: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in PARTS})
    backend: str = ""
    failure: str | None = None

    @property
    def milliseconds(self) -> float:
        """Median of an iteration; nan if there was none."""
        return _median_ms(self.seconds)

    def milliseconds_of(self, *parts: str) -> float:
        """Sum of the medians of some of `PARTS`."""
        return sum(_median_ms(self.parts[part]) for part in parts)

    def train(
        self,
        net: nn.Module,
        batches: Iterable[tuple[Tensor, Tensor]],
        optimizer: torch.optim.Optimizer,
        loss_function: Loss = nn.functional.mse_loss,
    ) -> Iterator[float]:
        """Trains, one iteration each time it is asked for the next loss.

        That form lets two trainings take turns. A solve that fails, or a loss that is not finite,
        is written to `failure` and ends the iterations.

        Args:
            net: With a `block` that has `stats`. It stays on its device.
            batches: Input and target of each iteration, on any device.
            optimizer: Of the parameters of `net`.
            loss_function: Of prediction and target.

        Yields:
            The loss of the iteration.
        """
        device = next(net.parameters()).device
        clock = _clock(device)
        times: list[float] = []  # the ends of `_INTERVALS`, after the start of the first
        batches = iter(batches)
        with _watched(net.block, lambda: times.append(clock())):
            while True:
                times[:] = [clock()]
                batch = next(batches, None)
                if batch is None:
                    return
                x, y = (tensor.to(device) for tensor in batch)
                times.append(clock())
                try:
                    optimizer.zero_grad()
                    times.append(clock())
                    loss = loss_function(net(x), y)
                    loss.backward()
                    times.append(clock())
                    optimizer.step()
                except AssertionError as error:  # torchdiffeq raises these, and SolverError is one
                    if isinstance(error, (TypeError, ValueError)):
                        raise  # a wrong argument is a mistake in the program, not a failed solve
                    self.failure = f"{type(error).__name__}: {error}"
                    return
                times.append(clock())
                value = loss.item()
                times.append(clock())
                if not math.isfinite(value):
                    self.failure = f"loss is {value} at iteration {len(self.losses)}"
                    return
                self._record(value, net.block.stats, times)
                yield value

    def _record(self, loss: float, stats: Any, times: list[float]) -> None:
        self.backend = stats.backend
        self.losses.append(loss)
        self.nfe.append(stats.nfe)
        self.nfe_backward.append(stats.nfe_backward)
        self.seconds.append(times[-1] - times[0])
        parts = dict.fromkeys(PARTS, 0.0)
        for part, (start, end) in zip(_INTERVALS, pairwise(times), strict=True):
            parts[part] += end - start
        for part, seconds in parts.items():
            self.parts[part].append(seconds)


def _median_ms(seconds: list[float]) -> float:
    return 1e3 * median(seconds) if seconds else math.nan


def _clock(device: torch.device) -> Callable[[], float]:
    """What tells the seconds; on a GPU, once everything queued is done."""

    def synchronized() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return synchronized if device.type == "cuda" else time.perf_counter


@contextlib.contextmanager
def _watched(block: nn.Module, mark: Callable[[], None]) -> Iterator[None]:
    """Calls `mark` before the solve, after it, and before its gradient."""

    def solved(block: nn.Module, args: Any, output: Tensor) -> None:
        mark()
        # The gradient of its output is there once those of loss and linear layer are done.
        output.register_hook(lambda grad: mark())

    hooks = [
        block.register_forward_pre_hook(lambda block, args: mark()),
        block.register_forward_hook(solved),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def in_turns(
    trainings: list[Iterator[float]], in_a_row: int = IN_A_ROW
) -> Iterator[list[list[float]]]:
    """A few iterations of each, in the opposite order each time, until all have ended.

    Yields:
        The losses of each training's turn, last first.
    """
    while True:
        turns = [(training, list(islice(training, in_a_row))) for training in reversed(trainings)]
        trainings = [training for training, losses in turns if losses]
        if not trainings:
            return
        yield [losses for _, losses in turns if losses]
