"""A convolutional field on the CPU kernels: the same function of (t, y), with gradients."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from anode_fast import fused
from anode_fast.fields import ConvField, alike
from anode_fast.kernels.cpu import conv, library
from anode_fast.spec import ConvSpec

KEPT_BYTES = 256 << 20
"""Of the records that a solve's evaluations keep for its gradient. Others are made once more."""


def why_not(field: Any, y0: Tensor) -> str:
    """Why the CPU kernels cannot evaluate a field at states like y0; "" if they can.

    Args:
        field: A ConvField, or another field with a ConvSpec.
        y0: The initial state.
    """
    if absent := library.missing():
        return str(absent)
    spec = field.spec()
    if not isinstance(spec, ConvSpec):
        return "the field is no convolutional one"
    if y0.dtype not in (torch.float32, torch.float64):
        return f"the state is {y0.dtype}, want float32 or float64"
    if y0.device.type != "cpu":
        return f"the state is on {y0.device}, want the CPU"
    if y0.dim() != 4 or y0.shape[1] != spec.channels:
        return f"the state is not [batch, {spec.channels}, height, width]"
    if 0 in y0.shape[2:]:
        return "the images have no pixels"
    if why := fused.why_not_tensors(spec, y0, field.tensors()):
        return why
    if isinstance(field, ConvField) and fused.has_hooks(field):
        return "the field has hooks or a forward of its own, which would not run"
    return fused.why_not_now("cpu")


class NativeConvField:
    """A field that the CPU kernels evaluate, with its weights of now: make one for each solve.

    Args:
        field: One that `why_not` has nothing against. It goes on counting.

    Attributes:
        field: The same.
        tensors: Its weights and biases.
    """

    def __init__(self, field: Any) -> None:
        self.field = field
        self.tensors: list[Tensor] = field.tensors()
        self._spec: ConvSpec = field.spec()
        self._dtype = self.tensors[0].dtype
        self._kernels = _kernels(self._spec, self._dtype)
        self._packed = self._kernels.pack([p.detach() for p in self.tensors])
        self._room = KEPT_BYTES
        self._no_time = torch.zeros((), dtype=self._dtype)

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        """dy/dt, differentiable in t, y and the weights.

        Args:
            t: Time, 0-d, or one per image, [batch, 1, 1, 1].
            y: State, [batch, channels, height, width], in the weights' dtype, on the CPU.

        Returns:
            Like y.

        Raises:
            InvalidArgument, InvalidType: Shapes or dtypes that do not fit.
            MemoryError: There is not enough.
        """
        if not self._takes(t, y):
            value: Tensor = self.field.evaluate(self.tensors, t, y)  # which says what is wrong
            return value
        self.field.count(1)
        t = t.to(self._dtype) if self._spec.time_dependent else self._no_time
        if torch.is_grad_enabled() and any(x.requires_grad for x in (y, t, *self.tensors)):
            out: Tensor = _Evaluation.apply(self, t, y, *self.tensors)
            return out
        return self.evaluate(t, y, keep=False)[0]

    def _takes(self, t: Tensor, y: Tensor) -> bool:
        """Whether the kernels can read these: they look at nothing but the memory."""
        if y.dim() != 4 or y.shape[1] != self._spec.channels or 0 in y.shape[2:]:
            return False
        if y.dtype is not self._dtype or y.device.type != "cpu":
            return False
        if not self._spec.time_dependent:
            return True
        return isinstance(t, Tensor) and t.shape in ((), (y.shape[0], 1, 1, 1)) and t.is_cpu

    def agrees(self, t: Tensor, y: Tensor, expected: Tensor) -> bool:
        """Whether dy/dt of the first images is what is expected, but for rounding.

        Args:
            t: Time, one element.
            y: State.
            expected: dy/dt of its first images.
        """
        time = t.detach().to(self._dtype).reshape(())
        found = self.evaluate(time, y.detach()[: len(expected)], keep=False)[0]
        return bool(alike(found, expected, 4096 * torch.finfo(self._dtype).eps))

    def has_room(self, y: Tensor, evaluations: int) -> bool:
        """Whether so many evaluations at states like y may keep what their gradient needs."""
        return evaluations * self._record_bytes(self._no_time, y) <= self._room

    def lend(self, t: Tensor, y: Tensor) -> _Loan | None:
        """Room for the record of an evaluation, while the loan lives; None if there is none."""
        size = self._record_bytes(t, y)
        return _Loan(self, size) if size <= self._room else None

    def _record_bytes(self, t: Tensor, y: Tensor) -> int:
        return int(self._kernels.record_bytes(self._packed, t, y))

    def evaluate(self, t: Tensor, y: Tensor, keep: bool) -> tuple[Tensor, Tensor | None]:
        """dy/dt and, if asked for, the record for `gradient`."""
        out, record = self._kernels.evaluate(self._packed, fused.dense(t), fused.dense(y), keep)
        return out, record

    def gradient(
        self, grad: Tensor, record: Tensor, t: Tensor, y: Tensor, needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """Gradients of t, y and the tensors, None where not needed."""
        y_grad, t_grad, grads = self._kernels.vjp(
            self._packed,
            record,
            fused.dense(t),
            fused.dense(y),
            fused.dense(grad),
            needs[1],
            needs[0],
            needs[2:],
        )
        return [t_grad, y_grad, *grads]

    def differentiable_gradient(
        self, grad: Tensor, inputs: Sequence[Tensor], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """The same by autograd through torch's operations: it can be differentiated again."""
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            # Aliases: an input may be made of another one, or be the same tensor twice.
            t, y, *tensors = (x.view_as(x) for x in inputs)
            out = self.field.evaluate(tensors, t, y)
            self.field.count(-1)
            return fused.gradients_of(out, (t, y, *tensors), grad, needs, create_graph)


class _Loan:
    """Part of the memory for a solve's records, given back when this ends."""

    def __init__(self, native: NativeConvField, size: int) -> None:
        self._native, self._size = native, size
        native._room -= size

    def __del__(self) -> None:
        self._native._room += self._size


class _Evaluation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, native: NativeConvField, t: Tensor, y: Tensor, *tensors: Tensor
    ) -> Tensor:
        ctx.loan = native.lend(t, y)  # ends with the graph
        out, record = native.evaluate(t, y, keep=ctx.loan is not None)
        ctx.native = native
        ctx.save_for_backward(record, t, y, *tensors)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        native: NativeConvField = ctx.native
        record, *inputs = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled() or fused.is_batched(grad):
            return None, *native.differentiable_gradient(grad, inputs, needs)
        if record is None:
            native.field.count(1)
            _, record = native.evaluate(inputs[0], inputs[1], keep=True)
        return None, *native.gradient(grad, record, inputs[0], inputs[1], needs)


@functools.lru_cache(maxsize=64)
def _kernels(spec: ConvSpec, dtype: torch.dtype) -> Any:
    return conv.Conv(library.load(), fused.field_of("cpu", spec), dtype)
