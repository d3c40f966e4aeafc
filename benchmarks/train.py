"""A training loop that keeps the figures of every iteration and survives a failed solve."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Run:
    """What a training has given so far: a row per finished iteration, and how it ended.

    Attributes:
        losses: Before the step of that iteration.
        nfe: Evaluations of the field in the forward solve.
        nfe_backward: Evaluations of the field in the backward pass.
        seconds: Wall clock of forward, loss, backward and optimizer step.
        failure: Why the training ended early; None if it did not.
    """

    losses: list[float] = field(default_factory=list)
    nfe: list[int] = field(default_factory=list)
    nfe_backward: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    failure: str | None = None

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
        for x, y in batches:
            x, y = x.to(device), y.to(device)
            start = _now(device)
            try:
                optimizer.zero_grad()
                loss = loss_function(net(x), y)
                loss.backward()
                optimizer.step()
            except AssertionError as error:  # torchdiffeq raises these, and SolverError is one
                if isinstance(error, (TypeError, ValueError)):
                    raise  # a wrong argument is a mistake in the program, not a failed solve
                self.failure = f"{type(error).__name__}: {error}"
                return
            seconds = _now(device) - start
            value = loss.item()
            if not math.isfinite(value):
                self.failure = f"loss is {value} at iteration {len(self.losses)}"
                return
            stats = net.block.stats
            self.losses.append(value)
            self.nfe.append(stats.nfe)
            self.nfe_backward.append(stats.nfe_backward)
            self.seconds.append(seconds)
            yield value


def _now(device: torch.device) -> float:
    """Seconds, once everything queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
