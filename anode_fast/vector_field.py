"""The user's field as the solvers see it: f(t, y) in increasing time, flat, checked and counted.

Everything that can be wrong with a field is found here, at its first evaluation, so that no solver
has to look. Everything that a field may do to its arguments is undone here too: a field that writes
into its input gets a copy, one that returns the same buffer every time has it copied.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anode_fast.errors import InvalidArgument, InvalidType

PREV, HERE, NEXT = -1, 0, 1
"""Side of t on which a field that jumps at t is evaluated."""


class Layout:
    """How a tuple of tensors lies in one flat tensor, and back.

    Args:
        parts: The tuple. Parts of different dtypes share their promoted dtype in the flat tensor;
            if only some are complex, those are stored as pairs of reals.

    Attributes:
        is_uniform: Whether all parts have the flat tensor's dtype.
    """

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self.shapes = [part.shape for part in parts]
        self.dtypes = [part.dtype for part in parts]
        complex_parts = [dtype.is_complex for dtype in self.dtypes]
        self._as_pairs = any(complex_parts) and not all(complex_parts)
        self.dtype = self.dtypes[0]
        for dtype in self.dtypes[1:]:
            self.dtype = torch.promote_types(self.dtype, dtype)
        if self._as_pairs:
            self.dtype = self.dtype.to_real()
        self.is_uniform = all(dtype is self.dtype for dtype in self.dtypes)
        self.sizes = [
            shape.numel() * (2 if self._as_pairs and is_complex else 1)
            for shape, is_complex in zip(self.shapes, complex_parts, strict=True)
        ]

    def pack(self, parts: Sequence[Tensor]) -> Tensor:
        """The parts one after the other, [sum of sizes]."""
        if self.is_uniform:
            return torch.cat([part if part.dim() == 1 else part.reshape(-1) for part in parts])
        flat = []
        for part in parts:
            if self._as_pairs and part.is_complex():
                # Not view_as_real: its gradient cannot start at an odd offset of the flat one.
                part = torch.stack((part.real, part.imag), dim=-1)
            flat.append(part.reshape(-1))
        packed = torch.cat(flat)
        return packed if packed.dtype == self.dtype else packed.to(self.dtype)

    def fits(self, parts: Sequence[Any]) -> bool:
        """Whether these are tensors like the parts, and all of one dtype."""
        return self.is_uniform and all(
            type(part) is Tensor and part.dtype is self.dtype and part.shape == shape
            for part, shape in zip(parts, self.shapes, strict=True)
        )

    def unpack(self, flat: Tensor, lead: tuple[int, ...] = ()) -> tuple[Tensor, ...]:
        """The parts of `flat`, [*lead, sum of sizes], each [*lead, *its shape]."""
        if self.is_uniform and not lead and flat.dtype is self.dtype:
            pieces = flat.split_with_sizes(self.sizes)
            return tuple(
                piece if len(shape) == 1 else piece.view(shape)
                for piece, shape in zip(pieces, self.shapes, strict=True)
            )
        parts = []
        for piece, shape, dtype in zip(
            flat.split(self.sizes, dim=-1), self.shapes, self.dtypes, strict=True
        ):
            if self._as_pairs and dtype.is_complex:
                pairs = piece.reshape((*lead, *shape, 2))
                piece = torch.complex(pairs[..., 0], pairs[..., 1])
            else:
                piece = piece.reshape((*lead, *shape))
            parts.append(piece if piece.dtype == dtype else piece.to(dtype))
        return tuple(parts)


class VectorField:
    """f(t, y) of a problem in normal form.

    Args:
        func: The user's callable (t, y) -> dy/dt. Gets t as a 0-d tensor in the state's real dtype
            on the state's device, or one per row, [batch, 1, ...], under step_control="sample".
        state_dtype: dtype in which `func` gets and returns the state.
        device: Device of the state.
        layout: For tuple states: `func` gets and returns a tuple, solvers a flat tensor.
        backwards: The user's time is minus the solver's.
        accumulate_dtype: dtype of the solver's state, if wider than `state_dtype`.

    Attributes:
        nfe: Evaluations made so far.
        noise: Unit roundoff of what the field really computes in, if coarser than the solver's
            dtype (half precision states, autocast), else 0. Known after the first evaluation.
        roundoff: That of the coarsest part of the state, in which its derivative is given.
        time_dtype: dtype in which `func` gets the time.
    """

    def __init__(
        self,
        func: Callable[..., Any],
        *,
        state_dtype: torch.dtype,
        device: torch.device,
        layout: Layout | None = None,
        backwards: bool = False,
        accumulate_dtype: torch.dtype | None = None,
    ) -> None:
        self.func = func
        self.layout = layout
        self.backwards = backwards
        self.nfe = 0
        self.noise = 0.0
        self._dtype = state_dtype
        self._solver_dtype = accumulate_dtype or state_dtype
        self.time_dtype = state_dtype.to_real() if state_dtype.is_complex else state_dtype
        self._device = device
        self._casts = self._solver_dtype != state_dtype
        if self._casts:
            self.noise = torch.finfo(state_dtype).eps
        self.roundoff = max(
            torch.finfo(d).eps for d in (layout.dtypes if layout else [state_dtype])
        )
        self._writes_input = False
        self._reuses_output = False
        self._needs_grad = False
        self._last_output: Tensor | None = None
        # Whether two evaluations have shown that the field gets and returns plain states, and
        # neither writes into one nor returns the same memory again.
        self._settled = False

    def __call__(
        self, t: float | Tensor, y: Tensor, shift: Tensor | None = None, side: int = HERE
    ) -> Tensor:
        """dy/dt at solver time t.

        Args:
            t: Solver time, a float, or a tensor that broadcasts against y.
            y: State, in the solver's dtype and form. Never written to.
            shift: Zero-valued 0-d tensor through which the gradient with respect to t flows.
            side: PREV or NEXT evaluate at the neighbouring floating point number.

        Raises:
            InvalidArgument, InvalidType: The field's value does not fit the state.
        """
        return self.at(self.time(t, shift, side), y)

    def at(self, time: Tensor, y: Tensor) -> Tensor:
        """dy/dt at the user's time, a tensor as the field gets it."""
        self.nfe += 1
        if self._settled and not y.is_inference():
            version, layout = y._version, self.layout
            try:
                found = self.func(time, layout.unpack(y) if layout else y)
            except RuntimeError as error:
                found = self._call_again(error, time, y)
            value = self._packed(layout, found) if layout else found
            if (
                type(value) is Tensor
                and value.dtype is self._dtype
                and value.shape == y.shape
                and value.device == y.device
                and y._version == version
            ):
                settled: Tensor = value
                return -settled if self.backwards else settled
            return self._finished(found, y, y, version)
        first = self.nfe == 1
        state = y.to(self._dtype) if self._casts else y
        # Inference tensors do not count writes: no telling whether the field makes some.
        tracked = not state.is_inference()
        if (first and state is y) or self._writes_input or not tracked:
            state = state.clone()
        before = state._version if tracked else None
        return self._finished(self._call(time, state), y, state, before, first)

    def _finished(
        self, value: Any, y: Tensor, state: Tensor, version: int | None, first: bool = False
    ) -> Tensor:
        if version is not None and state._version != version and not self._writes_input:
            self._note_write(first)
        checked = self._check(value, y)
        self._settled = self.nfe > 1 and not (
            self._casts or self._writes_input or self._reuses_output or self._needs_grad
        )
        return -checked if self.backwards else checked

    def flatten(self, func: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Evaluates this function, of the flat state, instead of the one of a tuple."""
        self.func, self.layout = func, None

    def user_time(self, t: float) -> float:
        """The user's time at solver time t."""
        return -t if self.backwards else t

    def time(self, t: float | Tensor, shift: Tensor | None = None, side: int = HERE) -> Tensor:
        """The user's time at solver time t, a tensor of its own."""
        if isinstance(t, Tensor):
            time = t.to(self.time_dtype, copy=True)  # the field may change it in place
            if side:
                time = torch.nextafter(time, torch.full_like(time, side * math.inf))
        else:
            if side:
                t = self._neighbour(t, side)
            time = torch.scalar_tensor(
                -t if self.backwards else t, dtype=self.time_dtype, device=self._device
            )
            if shift is None:
                return time
        if self.backwards and isinstance(t, Tensor):
            time = -time
        if shift is not None:
            shift = shift.to(device=self._device, dtype=self.time_dtype)
            time = time - shift if self.backwards else time + shift
        return time

    def _neighbour(self, t: float, side: int) -> float:
        if self.time_dtype == torch.float64:
            return math.nextafter(t, side * math.inf)
        if self.time_dtype == torch.float32:
            return float(np.nextafter(np.float32(t), np.float32(side * math.inf)))
        at = torch.scalar_tensor(t, dtype=self.time_dtype)
        return torch.nextafter(at, torch.full_like(at, side * math.inf)).item()

    def _call(self, time: Tensor, state: Tensor) -> Any:
        if self._needs_grad:
            return self._call_with_grad(time, state)
        try:
            return self.func(time, self.layout.unpack(state) if self.layout else state)
        except RuntimeError as error:
            return self._call_again(error, time, state)

    def _call_again(self, error: RuntimeError, time: Tensor, state: Tensor) -> Any:
        """A field that calls torch.autograd.grad needs a state that requires grad."""
        if self._needs_grad or "does not require grad" not in str(error):
            raise error
        self._needs_grad = True
        self._settled = False
        return self._call_with_grad(time, state)

    def _call_with_grad(self, time: Tensor, state: Tensor) -> Any:
        keep = torch.is_grad_enabled()
        with torch.enable_grad():
            if not state.requires_grad:
                state = state.detach().requires_grad_()
            value = self.func(time, self.layout.unpack(state) if self.layout else state)
        if keep:
            return value
        return tuple(v.detach() for v in value) if self.layout else value.detach()

    def _note_write(self, first: bool) -> None:
        if not first:
            raise InvalidArgument(
                "odeint: the field wrote into its input state, but not at its first evaluation, so "
                "values already computed may be spoilt. Use out-of-place operations on y (for "
                "example nn.ReLU(inplace=False)) or clone it in the field."
            )
        self._writes_input = True
        warnings.warn(
            "odeint: the field writes into its input state; it gets a copy at every evaluation. "
            "Use out-of-place operations on y (for example nn.ReLU(inplace=False)) to save that.",
            stacklevel=2,
        )

    def _check(self, value: Any, y: Tensor) -> Tensor:
        """The field's value as the solver wants it, or an error that says how it does not fit."""
        if self.layout:
            value = self._packed(self.layout, value)
        elif not isinstance(value, Tensor):
            raise InvalidType(
                f"odeint: the field returned a {type(value).__name__} for a state that is one "
                f"tensor of shape {tuple(y.shape)}. Return a tensor of that shape."
            )
        root = value if value._base is None else value._base
        if self.nfe == 1 or self._reuses_output or root is self._last_output:
            # The first value is copied to be safe until a second one shows how the field behaves.
            self._reuses_output = self._reuses_output or root is self._last_output
            self._last_output = root
            value = value.clone()
        elif self.nfe == 2:
            self._last_output = None
        if value.shape != y.shape:
            raise InvalidArgument(
                f"odeint: the field returned shape {tuple(value.shape)} for a state of shape "
                f"{tuple(y.shape)}; the two must be equal (nothing is broadcast). A field takes "
                "(t, y) in this order; SciPy's odeint has (y, t)."
            )
        if value.dtype != self._solver_dtype:
            value = self._cast(value)
        if value.device != y.device:
            raise InvalidArgument(
                f"odeint: the field returned a tensor on {value.device} for a state on {y.device}. "
                "Move the field's parameters and constants to the state's device."
            )
        checked: Tensor = value
        return checked

    def _packed(self, layout: Layout, value: Any) -> Tensor:
        if not isinstance(value, (tuple, list)):
            raise InvalidType(
                f"odeint: the state is a tuple of {len(layout.shapes)} tensors, but the field "
                f"returned a {type(value).__name__}. Return a tuple with one derivative per part."
            )
        if len(value) != len(layout.shapes):
            raise InvalidArgument(
                f"odeint: the state is a tuple of {len(layout.shapes)} tensors, but the field "
                f"returned {len(value)} parts. Return one derivative per part."
            )
        if layout.fits(value):
            return layout.pack(value)
        for i, (part, shape) in enumerate(zip(value, layout.shapes, strict=True)):
            if not isinstance(part, Tensor):
                raise InvalidType(
                    f"odeint: part {i} of the field's value is a {type(part).__name__}, want a "
                    f"tensor of shape {tuple(shape)}."
                )
            if part.shape != shape:
                raise InvalidArgument(
                    f"odeint: part {i} of the field's value has shape {tuple(part.shape)}, but "
                    f"part {i} of the state has shape {tuple(shape)}; the two must be equal."
                )
            if part.is_complex() and not layout.dtypes[i].is_complex:
                raise InvalidType(
                    f"odeint: part {i} of the field's value is complex ({part.dtype}), but part "
                    f"{i} of the state y0 is {layout.dtypes[i]}. Start from a complex y0."
                )
        return layout.pack(value)

    def _cast(self, value: Tensor) -> Tensor:
        """A value of another dtype: right for half precision and autocast, else an error."""
        want = self._dtype
        if value.is_complex() and not want.is_complex:
            raise InvalidType(
                f"odeint: the field's value is complex ({value.dtype}), but the state y0 is "
                f"{want}. Start from a complex y0, for example y0.to(torch.complex128)."
            )
        under_autocast = torch.is_autocast_enabled(self._device.type) and value.is_floating_point()
        if value.dtype != want and not under_autocast and not self.layout:
            raise InvalidType(
                f"odeint: the field returned {value.dtype} for a state of {want}. Make the field, "
                f"its parameters and y0 share one dtype, for example y0.to({value.dtype}) or "
                f"field.to({want})."
            )
        if under_autocast:
            self.noise = max(self.noise, torch.finfo(value.dtype).eps)
        return value.to(self._solver_dtype)
