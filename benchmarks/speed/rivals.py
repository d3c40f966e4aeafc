"""The solvers that are compared, each as a call that does the same work: same weights, same input.

Peers that are not installed are None (pip install -e '.[dev,peers]' has them all).
"""

from __future__ import annotations

import functools
import importlib.util
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torchdiffeq
from torch import Tensor, nn

import anode_fast
from anode_fast import MLPField

DIM = 7  # the paper's toy field: 2 data dimensions and 5 augmented ones
TOLERANCE = {"rtol": 1e-3, "atol": 1e-3}
PEERS = ("torchode", "diffrax")
CHECKED_ROWS = 64

_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Case:
    """A solve of dy/dt = MLPField(7, width)(t, y) over t in [0, 1] in float32, relu, seeded.

    Attributes:
        batch: Rows of the state.
        width: Of both hidden layers.
        method: "dopri5" with `TOLERANCE`, or "rk4" with 10 steps of 0.1.
        gradient: Whether the gradient of y(1).sum() with respect to the weights is part of it.
        threads: Of whoever solves it on a CPU.
        device: Where it is solved.
    """

    batch: int = 64
    width: int = 32
    method: str = "dopri5"
    gradient: bool = False
    threads: int = 1
    device: str = "cpu"

    def __str__(self) -> str:
        work = "forward + gradient" if self.gradient else "forward"
        where = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        if self.device != "cpu":
            where = self.device
        return f"batch {self.batch}, width {self.width}, {self.method}, {work}, {where}"

    @property
    def field(self) -> MLPField:
        """The field, with the same weights each time."""
        torch.manual_seed(0)
        return MLPField(DIM, self.width).to(self.device)

    @property
    def y0(self) -> Tensor:
        """The initial state, [batch, 7], the same each time."""
        y0 = torch.randn(self.batch, DIM, generator=torch.Generator().manual_seed(1))
        return y0.to(self.device)

    @property
    def options(self) -> dict[str, float]:
        """Of the method."""
        return {"step_size": 0.1} if self.method == "rk4" else {}

    def error(self, y1: Tensor) -> float:
        """Largest distance of y(1) to the true solution, over the first rows."""
        exact = _exact(self.batch, self.width)
        return (y1[: len(exact)].cpu().double() - exact).abs().max().item()


@functools.cache
def _exact(batch: int, width: int) -> Tensor:
    """Float64 with tolerances of 1e-9; relu's kinks make anything tighter slow."""
    case = Case(batch, width)
    y0 = case.y0[:CHECKED_ROWS].double()
    with torch.no_grad():
        field = case.field.double()
        t = torch.tensor([0.0, 1.0], dtype=torch.float64)
        return torchdiffeq.odeint(field, y0, t, rtol=1e-9, atol=1e-9)[-1]


@dataclass(frozen=True)
class Outcome:
    """What one run computed, and with how many evaluations of the field.

    Attributes:
        y1: The state at t = 1, [batch, dim].
        gradients: Of y1.sum(), one per parameter; empty without a backward pass.
        nfe: Evaluations in the forward solve; the mean if there were several.
        nfe_backward: Further evaluations for the gradient.
    """

    y1: Tensor
    gradients: tuple[Tensor, ...]
    nfe: float
    nfe_backward: float

    def agrees_with(self, other: Outcome) -> bool:
        """Whether both solved the same problem: far beyond tolerance is a mistake of the set-up."""
        pairs = ((self.y1, other.y1), (_flat(self.gradients), _flat(other.gradients)))
        return all((a - b).norm() <= 0.05 * b.norm() for a, b in pairs)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors]) if tensors else torch.zeros(1)


class TorchRival:
    """A solver in this process.

    Args:
        solve: Returns y(1), [batch, dim].
        field: With an `nfe` that counts its evaluations.
        gradient: Whether a run includes the gradient of y(1).sum() with respect to the parameters.
        threads: Of torch.
    """

    def __init__(
        self, solve: Callable[[], Tensor], field: nn.Module, *, gradient: bool, threads: int = 1
    ) -> None:
        self.solve = solve
        self.field = field
        self.parameters = tuple(field.parameters())
        self.gradient = gradient
        self.threads = threads
        self.is_cuda = self.parameters[0].is_cuda

    def __call__(self) -> None:
        """Solves once, and waits until it is done."""
        self.run()
        if self.is_cuda:
            torch.cuda.synchronize()

    def run(self) -> tuple[Tensor, ...]:
        """Solves once, on a GPU without waiting for the end: y(1) and the gradients.

        Nothing keeps autograd's graph: it would tie the parameters to this stream, and no CUDA
        graph of a gradient can be captured on another one then.
        """
        y1 = self.solve()
        gradients = torch.autograd.grad(y1.sum(), self.parameters) if self.gradient else ()
        return y1.detach(), *gradients

    def observe(self) -> Outcome:
        """Solves once and tells what came out, on the CPU."""
        self.field.nfe = 0
        y1 = self.solve()
        nfe = self.field.nfe
        gradients = torch.autograd.grad(y1.sum(), self.parameters) if self.gradient else ()
        found = tuple(gradient.cpu() for gradient in gradients)
        return Outcome(y1.detach().cpu(), found, nfe, self.field.nfe - nfe)


class AtPrecision:
    """A rival whose float32 products have a precision, as torch.set_float32_matmul_precision says.

    cuDNN's convolutions, which are in tf32 whatever that says, then follow it too.

    Args:
        rival: A rival in this process.
        precision: "highest" or "high" (tf32).
    """

    def __init__(self, rival: TorchRival, precision: str) -> None:
        self.rival = rival
        self.precision = precision
        self.threads = rival.threads

    def __call__(self) -> None:
        """Solves once, and waits until it is done."""
        self._at(self.rival)

    def run(self) -> tuple[Tensor, ...]:
        """Solves once, without waiting for the end."""
        return self._at(self.rival.run)

    def observe(self) -> Outcome:
        """Solves once and tells what came out."""
        return self._at(self.rival.observe)

    def _at(self, call: Callable[[], Any]) -> Any:
        before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision(self.precision)
        torch.backends.cudnn.allow_tf32 = self.precision != "highest"
        try:
            return call()
        finally:
            torch.set_float32_matmul_precision(before[0])
            torch.backends.cudnn.allow_tf32 = before[1]


class Compiled(nn.Module):
    """A field by way of torch.compile, its evaluations counted outside of what is compiled.

    Args:
        field: The field.
        options: Of torch.compile.
    """

    def __init__(self, field: nn.Module, **options: Any) -> None:
        super().__init__()
        self.inner = torch.compile(field, **options)
        self.nfe = 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """dy/dt."""
        self.nfe += 1
        return self.inner(t, y)


def like_torchdiffeq(
    odeint: Callable[..., Tensor],
    field: nn.Module,
    y0: Tensor,
    *,
    gradient: bool,
    threads: int = 1,
    times_on: str | None = None,
    **arguments: Any,
) -> TorchRival:
    """A solver with torchdiffeq's signature, on t in [0, 1].

    torchdiffeq wants t where y0 is; `times_on` is another device for it.
    """
    t = torch.tensor([0.0, 1.0], device=times_on or y0.device)

    def solve() -> Tensor:
        return odeint(field, y0, t, **TOLERANCE, **arguments)[-1]

    return TorchRival(solve, field, gradient=gradient, threads=threads)


def with_odeint(
    odeint: Callable[..., Tensor],
    case: Case,
    *,
    field: nn.Module | None = None,
    times_on: str | None = None,
) -> TorchRival:
    """The case, solved by an odeint with torchdiffeq's signature; `field` may stand in for its."""
    return like_torchdiffeq(
        odeint,
        field or case.field,
        case.y0,
        gradient=case.gradient,
        threads=case.threads,
        times_on=times_on,
        method=case.method,
        options=case.options,
    )


def with_anode_fast(
    case: Case, backend: str = "auto", field: nn.Module | None = None
) -> TorchRival:
    """Our side: the backend that a user gets, or a named one, and the discrete gradient.

    The times are on the CPU, where it wants to know them, whatever the device.
    """
    ours = functools.partial(anode_fast.odeint, gradient="discrete", backend=backend)
    return with_odeint(ours, case, field=field, times_on="cpu")


class UsersField(nn.Module):
    """An MLPField's function as public code writes it, with the same weights: time concatenated.

    Args:
        field: With relu and time_dependent=True. Its layers are used, not copied.
    """

    def __init__(self, field: MLPField) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = field.layers
        self.relu = nn.ReLU(inplace=True)
        self.nfe = 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """dy/dt for y [batch, dim] at a time that is 0-d."""
        self.nfe += 1
        time = torch.ones(y.shape[0], 1, device=y.device) * t
        h = self.relu(self.fc1(torch.cat([time, y], 1)))
        found: Tensor = self.fc3(self.relu(self.fc2(h)))
        return found


def first_step(case: Case) -> float:
    """The step that torchdiffeq begins with."""
    steps: list[float] = []
    field = case.field
    field.callback_step = lambda t, y, dt: steps.append(float(dt))  # torchdiffeq calls it
    with torch.no_grad():
        t = torch.tensor([0.0, 1.0], device=case.device)
        torchdiffeq.odeint(field, case.y0, t, **TOLERANCE)
    return steps[0]


def backend(case: Case) -> str:
    """The backend that solves the case on our side."""
    t = torch.tensor([0.0, 1.0])
    arguments = {"method": case.method, "options": case.options, **TOLERANCE}
    _, stats = anode_fast.odeint(case.field, case.y0, t, return_stats=True, **arguments)
    return stats.backend


def is_installed(name: str) -> bool:
    """Whether a peer is there."""
    return importlib.util.find_spec(name) is not None


def with_torchode(case: Case) -> TorchRival | None:
    """The dopri5 of torchode, eager, its integral controller's norm taken over the whole batch.

    By itself torchode steps each row on its own. With that norm all rows take the same steps, which
    are torchdiffeq's (with its default norm it took 20 evaluations here instead of 14).
    torch.compile makes it about twice as fast, and takes half a minute for each case.
    """
    if not is_installed("torchode"):
        return None
    import torchode

    field, y0 = case.field, case.y0
    term = torchode.ODETerm(lambda t, y: field(t.unsqueeze(1), y))
    controller = torchode.IntegralController(term=term, norm=_norm_of_the_batch, **TOLERANCE)
    solver = torchode.AutoDiffAdjoint(torchode.Dopri5(term=term), controller)
    times = y0.new_zeros(case.batch), y0.new_ones(case.batch)
    problem = torchode.InitialValueProblem(y0, *times, t_eval=None)

    def solve() -> Tensor:
        return solver.solve(problem).ys[:, -1]

    return TorchRival(solve, field, gradient=case.gradient, threads=case.threads)


def _norm_of_the_batch(y: Tensor) -> Tensor:
    """Root mean square of all entries, once per row: [batch]."""
    return (torch.linalg.vector_norm(y) / y.numel() ** 0.5).expand(len(y))


class Worker:
    """The process in which diffrax runs, with as many threads as it is told.

    Args:
        threads: Size of jax's thread pool.
        platform: jax's name of where to run: "cpu" or "cuda".

    Use it as a context, or `close` it.
    """

    def __init__(self, threads: int, platform: str = "cpu") -> None:
        self.threads = threads
        command = [sys.executable, "-m", "benchmarks.speed.diffrax_worker"]
        # XLA sizes its pool by NPROC. (Flags that keep XLA off the pool make it a third slower, and
        # pinning to cores would keep it from moving off a busy one.)
        environment = os.environ | {"NPROC": str(threads), "JAX_PLATFORMS": platform}
        if platform != "cpu":  # or it takes most of the memory, and makes float32 products in tf32
            environment |= {
                "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
                "JAX_DEFAULT_MATMUL_PRECISION": "highest",
            }
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd=_ROOT
        )

    def ask(self, command: str, **arguments: Any) -> Any:
        """Sends a command and waits for the answer.

        Raises:
            RuntimeError: The command failed there; its traceback is the message.
        """
        try:
            pickle.dump((command, arguments), self._process.stdin)
            self._process.stdin.flush()
            failure, answer = pickle.load(self._process.stdout)
        except (BrokenPipeError, EOFError):
            code = self._process.wait()
            raise RuntimeError(f"the diffrax process ended with exit code {code}") from None
        if failure:
            raise RuntimeError(failure)
        return answer

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(timeout=60)

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class DiffraxRival:
    """diffrax's Dopri5, solve and gradient under jax.jit, in a process of its own.

    Its PIDController with default coefficients is torchdiffeq's controller, with one step size for
    the batch; it shortens the last step to end at t = 1. The gradient is that of its default,
    RecursiveCheckpointAdjoint. A second process, because two thread pools in one would compete, and
    because jax reads the number of its threads once, at its start. Only one process works at a
    time, and the worker times itself, so the pipe between them costs nothing.

    Args:
        case: With method "dopri5".
        worker: With the case's number of threads.
        same_first_step: Hand it torchdiffeq's first step, which saves it the evaluation that finds
            it. Left to itself diffrax 0.7.2 begins with 0.01, whatever the field, and then takes 25
            evaluations here where the others take 14.
    """

    def __init__(self, case: Case, worker: Worker, *, same_first_step: bool = True) -> None:
        self.threads = case.threads
        self.worker = worker
        layers = case.field.layers
        self.number = self.worker.ask(
            "load",
            weights=[tuple(p.detach().cpu().numpy() for p in (x.weight, x.bias)) for x in layers],
            y0=case.y0.cpu().numpy(),
            gradient=case.gradient,
            first_step=first_step(case) if same_first_step else None,
            **TOLERANCE,
        )

    def __call__(self) -> float:
        """Seconds of one solve, measured over there."""
        return self.worker.ask("run", number=self.number)

    def observe(self) -> Outcome:
        """Solves once and tells what came out."""
        y1, gradients, nfe, nfe_backward = self.worker.ask("observe", number=self.number)
        flat = tuple(torch.from_numpy(array) for layer in gradients for array in layer)
        return Outcome(torch.from_numpy(y1), flat, nfe, nfe_backward)
