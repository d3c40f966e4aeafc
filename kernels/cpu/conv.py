"""A convolutional field on the CPU: the C structs and the calls.

The structs mirror conv.hpp and api.cpp field by field; tests/kernels/cpu compares their sizes with
the library's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from anode_fast.kernels.interface import ConvField

TENSORS = 6
"""Parameters of a field: weight and bias of three layers."""

_Pointers = c_void_p * TENSORS


class _Shape(ctypes.Structure):
    _fields_ = [
        ("channels", c_int32),
        ("filters", c_int32),
        ("activation", c_int32),
        ("time_dependent", c_int32),
    ]


class _Arguments(ctypes.Structure):
    _fields_ = [
        ("batch", c_int64),
        ("height", c_int64),
        ("width", c_int64),
        ("t", c_void_p),
        ("t_stride", c_int64),
        ("y", c_void_p),
        ("record", c_void_p),
        ("out", c_void_p),
        ("cotangent", c_void_p),
        ("y_grad", c_void_p),
        ("t_grad", c_void_p),
        ("parameter_grads", _Pointers),
    ]


class Packed:
    """Weights as the kernels read them. The memory belongs to the library and ends with this."""

    __slots__ = ("_free", "address", "differentiable")

    def __init__(self, address: int, differentiable: bool, free: Callable[[int], None]) -> None:
        self.address = address
        self.differentiable = differentiable
        self._free = free

    def __del__(self) -> None:
        self._free(self.address)


class Conv:
    """A convolutional field without its weights.

    Args:
        library: From `library.load`.
        field: The field.
        dtype: torch.float32 or torch.float64.
    """

    def __init__(self, library: ctypes.CDLL, field: ConvField, dtype: torch.dtype) -> None:
        lead = int(field.time_dependent)
        channels, filters = field.channels, field.filters
        self.dtype = dtype
        self.shapes = (
            *((filters, lead + channels, 1, 1), (filters,)),
            *((filters, lead + filters, 3, 3), (filters,)),
            *((channels, lead + filters, 1, 1), (channels,)),
        )
        self._shape = _Shape(channels, filters, field.activation, field.time_dependent)
        self._pack = library.anode_conv_pack
        self._free = library.anode_conv_free
        self._record_size = library.anode_conv_record_size
        self._evaluate = library.anode_conv_evaluate
        self._vjp = library.anode_conv_vjp

    def pack(self, parameters: Sequence[Tensor], differentiable: bool = True) -> Packed:
        """Transforms the weights, once for any number of evaluations.

        Args:
            parameters: Weight and bias of every layer, of `shapes`. They are copied.
            differentiable: Whether `vjp` is to be called.
        """
        parameters = [p.contiguous() for p in parameters]
        pointers = _Pointers(*[p.data_ptr() for p in parameters])
        is_double = self.dtype == torch.float64
        address = self._pack(ctypes.byref(self._shape), is_double, pointers, differentiable)
        if not address:
            raise MemoryError("anode_fast: no memory for the weights")
        return Packed(address, differentiable, self._free)

    def record_bytes(self, packed: Packed, t: Tensor, y: Tensor) -> int:
        """Memory that the record of an evaluation takes.

        Args:
            packed, t, y: As for `evaluate`.
        """
        arguments = self._arguments(t, y)
        size = self._record_size(packed.address, ctypes.byref(arguments))
        return int(size) * y.element_size()

    def evaluate(
        self, packed: Packed, t: Tensor, y: Tensor, keep: bool
    ) -> tuple[Tensor, Tensor | None]:
        """dy/dt.

        Args:
            packed: The weights.
            t: Time, one number or one per image.
            y: State, [batch, channels, height, width], contiguous.
            keep: Whether to keep what `vjp` needs.

        Returns:
            dy/dt like y, and the record, None if not asked for.

        Raises:
            MemoryError: There is not enough.
        """
        out = torch.empty(y.shape, dtype=y.dtype)
        arguments = self._arguments(t, y)
        arguments.out = out.data_ptr()
        record = None
        if keep:
            size = self._record_size(packed.address, ctypes.byref(arguments))
            record = torch.empty(size, dtype=y.dtype)
            arguments.record = record.data_ptr()
        if not self._evaluate(packed.address, ctypes.byref(arguments)):
            raise MemoryError("anode_fast: no memory for an evaluation")
        return out, record

    def vjp(
        self,
        packed: Packed,
        record: Tensor,
        t: Tensor,
        y: Tensor,
        cotangent: Tensor,
        y_wanted: bool = True,
        t_wanted: bool = True,
        wanted: Sequence[bool] = (True,) * TENSORS,
    ) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
        """Gradients of sum(cotangent * dy/dt).

        Args:
            packed: The weights, packed as differentiable.
            record: Of the evaluation.
            t, y: As in the evaluation.
            cotangent: Like y, contiguous.
            y_wanted, t_wanted: Whether the gradients of y and t are.
            wanted: Whether each parameter's gradient is.

        Returns:
            The gradients of y, of t, and of the parameters; None where not wanted.

        Raises:
            ValueError: The weights are not packed as differentiable.
            MemoryError: There is not enough.
        """
        if not packed.differentiable:
            raise ValueError("vjp: pack the weights with differentiable=True")
        arguments = self._arguments(t, y)
        arguments.record, arguments.cotangent = record.data_ptr(), cotangent.data_ptr()
        y_grad = t_grad = None
        if y_wanted:
            y_grad = torch.empty(y.shape, dtype=y.dtype)
            arguments.y_grad = y_grad.data_ptr()
        if t_wanted:
            t_grad = torch.empty(t.shape, dtype=t.dtype)
            arguments.t_grad = t_grad.data_ptr()
        grads = [
            torch.empty(shape, dtype=y.dtype) if asked else None
            for shape, asked in zip(self.shapes, wanted, strict=True)
        ]
        arguments.parameter_grads = _Pointers(*[None if g is None else g.data_ptr() for g in grads])
        if not self._vjp(packed.address, ctypes.byref(arguments)):
            raise MemoryError("anode_fast: no memory for a gradient")
        return y_grad, t_grad, grads

    @staticmethod
    def _arguments(t: Tensor, y: Tensor) -> _Arguments:
        batch, _, height, width = y.shape
        return _Arguments(
            batch, height, width, t.data_ptr(), 0 if t.dim() == 0 else 1, y.data_ptr()
        )
