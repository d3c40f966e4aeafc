"""The solvers that are compared on convolutional fields: same weights, images and tolerance.

torchdiffeq solves two forms of the field: the paper's, which puts time before the channels of each
convolution's input, and a cheaper one, which adds time's share to the bias and keeps images and
weights channels last, as oneDNN and cuDNN like them best.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torchdiffeq
from torch import Tensor, nn

from anode_fast import ConvField, ConvODENet, ODENet
from benchmarks.baselines import ConcatenatingConvField, with_torchdiffeq
from benchmarks.speed.rivals import (
    TOLERANCE,
    Case,
    Compiled,
    Outcome,
    TorchRival,
    with_odeint,
)
from benchmarks.train import Loss

CHECKED_IMAGES = 2  # of those whose error is known
CLASSES = 10


@dataclass(frozen=True)
class ConvCase(Case):
    """A solve of dy/dt = ConvField(channels, width)(t, y), t in [0, 1], in float32, relu, seeded.

    The defaults are the paper's augmented model for MNIST.

    Attributes:
        batch: Images.
        width: Filters.
        data_channels: Of the images, which are uniform noise.
        augmented: Channels of zeros beside them.
        size: Height and width.
        precision: Of float32 products on a GPU, as in `AtPrecision`; "" leaves torch's as it is.
        method, gradient, threads, device: As in `Case`.
    """

    batch: int = 16
    width: int = 64
    data_channels: int = 1
    augmented: int = 5
    size: int = 28
    precision: str = ""

    def __str__(self) -> str:
        where = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        if self.device != "cpu":
            where = self.device
        shape = f"{self.data_channels}+{self.augmented} x {self.size} x {self.size}"
        work = "forward + gradient" if self.gradient else "forward"
        words = [f"batch {self.batch}", shape, f"{self.width} filters", work, where, self.precision]
        return ", ".join(word for word in words if word)

    @property
    def options(self) -> dict[str, float]:
        """Of the method; Euler's takes four steps."""
        return {"step_size": 0.25} if self.method == "euler" else super().options

    @property
    def channels(self) -> int:
        """Of the state."""
        return self.data_channels + self.augmented

    @property
    def field(self) -> ConvField:  # type: ignore[override]
        """The field, with the same weights each time."""
        torch.manual_seed(0)
        return ConvField(self.channels, self.width).to(self.device)

    @property
    def images(self) -> Tensor:
        """The data, [batch, data_channels, size, size], the same each time."""
        shape = self.batch, self.data_channels, self.size, self.size
        return torch.rand(shape, generator=torch.Generator().manual_seed(1)).to(self.device)

    @property
    def y0(self) -> Tensor:
        """The initial state, [batch, channels, size, size]."""
        images = self.images
        zeros = images.new_zeros(self.batch, self.augmented, self.size, self.size)
        return torch.cat([images, zeros], 1)

    def error(self, y1: Tensor) -> float:
        """Largest distance of y(1) to the true solution, over the first images."""
        exact = _exact(self.width, self.data_channels, self.augmented, self.size, self.batch)
        return (y1[: len(exact)].cpu().double() - exact).abs().max().item()


@functools.cache
def _exact(width: int, data_channels: int, augmented: int, size: int, batch: int) -> Tensor:
    """Float64 with tolerances of 1e-7; relu's kinks make anything tighter slow."""
    case = ConvCase(
        batch=batch, width=width, data_channels=data_channels, augmented=augmented, size=size
    )
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    y0 = case.y0[:CHECKED_IMAGES].double()
    with torch.no_grad():
        found: Tensor = torchdiffeq.odeint(case.field.double(), y0, t, rtol=1e-7, atol=1e-7)
    return found[-1]


class ChannelsLast(nn.Module):
    """A `ConvField` on images whose channels are last in memory, and so are its weights'."""

    def __init__(self, field: ConvField) -> None:
        super().__init__()
        self.inner = field.to(memory_format=torch.channels_last)

    @property
    def nfe(self) -> int:
        """Evaluations so far."""
        return self.inner.nfe

    @nfe.setter
    def nfe(self, value: int) -> None:
        self.inner.nfe = value

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """dy/dt."""
        # torchdiffeq's states already are in that order once the first one is: this copies nothing.
        found: Tensor = self.inner(t, y.contiguous(memory_format=torch.channels_last))
        return found


def with_paper_field(odeint: Callable[..., Tensor], case: ConvCase) -> TorchRival:
    """The case's field as the paper's code writes it."""
    return with_odeint(odeint, case, field=ConcatenatingConvField(case.field))


def with_cheap_field(odeint: Callable[..., Tensor], case: ConvCase) -> TorchRival:
    """The case's field, time folded into the biases, channels last."""
    return with_odeint(odeint, case, field=ChannelsLast(case.field))


def with_compiled_field(case: ConvCase, **options: Any) -> TorchRival | str:
    """The paper's field by way of torch.compile and torchdiffeq; or why that cannot be."""
    torch.set_num_threads(case.threads)
    try:
        field = Compiled(ConcatenatingConvField(case.field), **options)
        rival = with_odeint(torchdiffeq.odeint, case, field=field)
        rival()
    except Exception as error:  # whatever a compiler that is missing or fails raises
        return f"does not compile: {type(error).__name__}"
    return rival


class TrainingStep:
    """A step of training: loss of a batch, its gradient, and Adam's step.

    Its learning rate is 0, which changes no work and no weight: every run does the same.

    Args:
        net: With a `block` that has `stats`.
        inputs, targets: The batch, on the net's device.
        loss_function: Of the net's outputs and the targets.
        threads: Of torch.
    """

    def __init__(
        self,
        net: ODENet | ConvODENet,
        inputs: Tensor,
        targets: Tensor,
        loss_function: Loss = nn.functional.cross_entropy,
        *,
        threads: int = 1,
    ) -> None:
        self.net = net
        self.inputs = inputs
        self.targets = targets
        self.loss_function = loss_function
        self.optimizer = torch.optim.Adam(net.parameters(), lr=0.0)
        self.threads = threads
        self.gradient = True

    def __call__(self) -> None:
        """Makes one step, and waits until it is done."""
        self.run()
        if self.inputs.is_cuda:
            torch.cuda.synchronize()

    def run(self) -> tuple[Tensor, ...]:
        """Makes one step, on a GPU without waiting for its end."""
        with torch.enable_grad():
            self.optimizer.zero_grad()
            outputs: Tensor = self.net(self.inputs)
            self.loss_function(outputs, self.targets).backward()
            self.optimizer.step()
        return (outputs,)

    def observe(self) -> Outcome:
        """Makes one step and tells what came out, on the CPU."""
        (outputs,) = self.run()
        gradients = [parameter.grad for parameter in self.net.parameters()]
        found = tuple(gradient.cpu() for gradient in gradients if gradient is not None)
        stats = self.net.block.stats
        assert stats is not None
        return Outcome(outputs.detach().cpu(), found, stats.nfe, stats.nfe_backward)


def training_steps(
    case: ConvCase, backend: str = "auto", compiling: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, TrainingStep]:
    """Our step, torchdiffeq's with the paper's field, and that with it compiled, by name.

    The labels are random.

    Args:
        case: The images and the field.
        backend: Of our side.
        compiling: Options of torch.compile.
    """
    torch.manual_seed(0)
    shape = case.data_channels, case.size, case.size
    settings = {"backend": backend, **TOLERANCE}
    net = ConvODENet(shape, case.width, CLASSES, case.augmented, **settings).to(case.device)
    nets: dict[str, ConvODENet] = {
        "anode_fast": net,
        "torchdiffeq": with_torchdiffeq(net, rewrite=ConcatenatingConvField),
        "compiled field": with_torchdiffeq(
            net, rewrite=lambda field: Compiled(ConcatenatingConvField(field), **compiling)
        ),
    }
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(CLASSES, (case.batch,), generator=generator).to(case.device)
    return {
        name: TrainingStep(net, case.images, labels, threads=case.threads)
        for name, net in nets.items()
    }
