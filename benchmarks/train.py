"""A training loop that keeps the figures of every iteration and survives a failed solve."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]

# Parts of an iteration: each instant of it belongs to one of them.
SOLVE = "solve"  # the call of the net's block
GRADIENT = "gradient of the solve"  # from the gradient of the block's output to the parameters'
LOSS = "linear layer and loss"  # both ways
STEP = "optimizer step"
ZERO_GRAD = "zero_grad"
REST = "data and the rest"  # getting the batch, calling the net, reading the loss
PARTS = (SOLVE, GRADIENT, LOSS, STEP, ZERO_GRAD, REST)


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
        watch = _Stopwatch(device)
        batches = iter(batches)
        with _watched(net.block, watch):
            while True:
                watch.start()
                batch = next(batches, None)
                if batch is None:
                    return
                x, y = (tensor.to(device) for tensor in batch)
                watch.ends(REST)
                try:
                    optimizer.zero_grad()
                    watch.ends(ZERO_GRAD)
                    loss = loss_function(net(x), y)
                    loss.backward()
                    watch.ends(GRADIENT)
                    optimizer.step()
                    watch.ends(STEP)
                except AssertionError as error:  # torchdiffeq raises these, and SolverError is one
                    if isinstance(error, (TypeError, ValueError)):
                        raise  # a wrong argument is a mistake in the program, not a failed solve
                    self.failure = f"{type(error).__name__}: {error}"
                    return
                value = loss.item()
                watch.ends(REST)
                if not math.isfinite(value):
                    self.failure = f"loss is {value} at iteration {len(self.losses)}"
                    return
                stats = net.block.stats
                self.backend = stats.backend
                self.losses.append(value)
                self.nfe.append(stats.nfe)
                self.nfe_backward.append(stats.nfe_backward)
                self.seconds.append(sum(watch.seconds.values()))
                for part, seconds in watch.seconds.items():
                    self.parts[part].append(seconds)
                yield value


def _median_ms(seconds: list[float]) -> float:
    return 1e3 * median(seconds) if seconds else math.nan


class _Stopwatch:
    """Wall clock of the parts of an iteration. On a GPU it waits, at each mark, for what is queued.

    Attributes:
        seconds: Of each part since the start.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.start()

    def start(self) -> None:
        """Begins an iteration."""
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._last = self._now()

    def ends(self, part: str) -> None:
        """The time since the last mark was that part's."""
        now = self._now()
        self.seconds[part] += now - self._last
        self._last = now

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


@contextlib.contextmanager
def _watched(block: nn.Module, watch: _Stopwatch) -> Iterator[None]:
    """Tells the solve, and its gradient, from what is before and after them."""

    def solved(block: nn.Module, args: Any, output: Tensor) -> None:
        watch.ends(SOLVE)
        # Its gradient is there once that of loss and linear layer is done.
        output.register_hook(lambda grad: watch.ends(LOSS))

    hooks = [
        block.register_forward_pre_hook(lambda block, args: watch.ends(REST)),
        block.register_forward_hook(solved),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
