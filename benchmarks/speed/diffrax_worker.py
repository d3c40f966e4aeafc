"""diffrax in a process of its own: commands from stdin, answers to stdout, both pickled.

Started by `rivals.Worker`. Nothing here imports torch.
"""

from __future__ import annotations

import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

Weights = list[tuple[jax.Array, jax.Array]]


def mlp(t: jax.Array, y: jax.Array, weights: Weights) -> jax.Array:
    """What `MLPField` computes, in the same way: time's share goes into the bias."""
    (weight, bias), *others = weights
    h = y @ weight[:, 1:].T + (bias + t * weight[:, 0])
    for weight, bias in others:
        h = jax.nn.relu(h) @ weight.T + bias
    return h


class Server:
    """Carries out the commands, on the cases it was given."""

    def __init__(self) -> None:
        self.solves: list[Solve] = []

    def load(self, **arguments: Any) -> int:
        """Takes a case, compiles it, and gives the number by which to name it."""
        self.solves.append(Solve(**arguments))
        return len(self.solves) - 1

    def run(self, number: int) -> float:
        """Seconds of one run of a case."""
        return self.solves[number].run()

    def observe(self, number: int) -> tuple[np.ndarray, list, int, int]:
        """What a case gives: see `Solve.observe`."""
        return self.solves[number].observe()


class Solve:
    """A case: the solve of `mlp` from y0 over t in [0, 1], with or without the gradient."""

    def __init__(
        self,
        weights: list[tuple[np.ndarray, np.ndarray]],
        y0: np.ndarray,
        gradient: bool,
        first_step: float | None,
        rtol: float,
        atol: float,
    ) -> None:
        self.arguments = jax.tree.map(jnp.asarray, (weights, y0))
        self.gradient = gradient
        self.first_step = first_step
        self.controller = diffrax.PIDController(rtol=rtol, atol=atol)
        self.call = self._compile(mlp, gradient)
        self.run()  # compiles

    def run(self) -> float:
        """Seconds of one run."""
        start = time.perf_counter()
        jax.block_until_ready(self.call(*self.arguments))
        return time.perf_counter() - start

    def observe(self) -> tuple[np.ndarray, list, int, int]:
        """State at t = 1, gradients, evaluations of the field forward and for the gradient."""
        y1 = np.array(self._compile(mlp, gradient=False)(*self.arguments))
        gradients: list = []
        if self.gradient:
            gradients = jax.tree.map(np.array, self.call(*self.arguments)[1])
        nfe = self._count(gradient=False)
        return y1, gradients, nfe, self._count(gradient=True) - nfe if self.gradient else 0

    def _compile(self, field: Callable, gradient: bool) -> Callable:
        def solve(weights: Weights, y0: jax.Array) -> jax.Array:
            solution = diffrax.diffeqsolve(
                diffrax.ODETerm(field),
                diffrax.Dopri5(),
                t0=0.0,
                t1=1.0,
                dt0=self.first_step,
                y0=y0,
                args=weights,
                stepsize_controller=self.controller,
            )
            return solution.ys[-1]

        def loss(weights: Weights, y0: jax.Array) -> jax.Array:
            return solve(weights, y0).sum()

        return jax.jit(jax.value_and_grad(loss) if gradient else solve)

    def _count(self, gradient: bool) -> int:
        """Evaluations really made, by a callback in the field."""
        count = 0

        def counted(t: jax.Array, y: jax.Array, weights: Weights) -> jax.Array:
            def add() -> None:
                nonlocal count
                count += 1

            jax.debug.callback(add)
            return mlp(t, y, weights)

        jax.block_until_ready(self._compile(counted, gradient)(*self.arguments))
        jax.effects_barrier()
        return count


def serve() -> None:
    """Answers until the other side closes the pipe."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is not an answer
    server = Server()
    while True:
        try:
            command, arguments = pickle.load(sys.stdin.buffer)
        except (EOFError, KeyboardInterrupt):
            return
        result: tuple[str, Any]
        try:
            result = "", getattr(server, command)(**arguments)
        except Exception:
            result = traceback.format_exc(), None
        pickle.dump(result, answers)
        answers.flush()


if __name__ == "__main__":
    serve()
