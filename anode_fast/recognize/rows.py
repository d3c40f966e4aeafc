"""From a field's trace to a `Program`, for a state [*batch, dim], and to an `MLPSpec` if it is one.

Every operation either works row by row, or the field is not known.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from anode_fast.kernels.program import STATE, TIME, Instruction, Program
from anode_fast.recognize.trace import (
    NotKnown,
    Weights,
    args_of,
    name_of,
    schema_of,
    shape_of,
)
from anode_fast.spec import ACTIVATIONS, MLPSpec


@dataclass(frozen=True)
class _Value:
    """A tensor of the trace as a value of the program.

    Attributes:
        number: Of the value.
        width: Its features.
        flat: Whether the tensor has no dimension for them (then there is one feature).
        same: Whether all rows are alike: its shape then may lack rows.
    """

    number: int
    width: int
    flat: bool = False
    same: bool = False


@dataclass(frozen=True)
class _Number:
    """A tensor that is one number all over."""

    number: float


_Handler = Callable[["Rows", fx.Node], Any]
_HANDLERS: dict[str, _Handler] = {}


def _handles(*names: str) -> Callable[[_Handler], _Handler]:
    def note(handler: _Handler) -> _Handler:
        _HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return note


class Rows:
    """Makes the program of a field whose state is [*batch, dim]."""

    def __init__(self, weights: Weights, y: Tensor) -> None:
        self.weights, self.y = weights, y
        self.dim = y.shape[-1] if y.dim() else 0
        self.rows = math.prod(y.shape[:-1])
        if not self.dim or not self.rows:
            raise NotKnown(f"its state has shape {tuple(y.shape)}, want [*batch, dim]")
        self.code: list[Instruction] = []
        self.widths = [1, self.dim]
        self.made: dict[Instruction, int] = {}
        self.tensors: list[fx.Node] = []
        self.env: dict[fx.Node, Any] = {}

    def lower(self) -> tuple[Program, list[fx.Node]]:
        """The program, and the nodes of the tensors that it takes."""
        inputs = iter((_Value(TIME, 1, True, True), _Value(STATE, self.dim)))
        used = self.weights.used
        for node in self.weights.graph.nodes:
            if node.op == "placeholder":
                self.env[node] = next(inputs)
            elif node.op == "output":
                (result,) = args_of(node)
                return self._finish(result)
            elif node in used and node not in self.weights.nodes:
                self._check_dtype(node)
                self.env[node] = self._handler(node)(self, node)
        raise NotKnown("its trace has no end")

    def _check_dtype(self, node: fx.Node) -> None:
        made = node.meta["val"]
        for x in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(x, Tensor) and x.dtype not in (self.y.dtype, torch.bool):
                raise NotKnown(f"it computes with {x.dtype}, the state is {self.y.dtype}")

    def _handler(self, node: fx.Node) -> _Handler:
        name = name_of(node)
        if name in _HANDLERS:
            return _HANDLERS[name]
        raise NotKnown(f"{name.split('.')[0]} is no operation that the kernels know")

    def _finish(self, result: Any) -> tuple[Program, list[fx.Node]]:
        if not isinstance(result, fx.Node):
            raise NotKnown("its value is not one tensor")
        if shape_of(result) != tuple(self.y.shape):
            raise NotKnown(f"its value has shape {shape_of(result)}, not the state's")
        last = self.value(result)
        if last.flat:
            raise NotKnown("its value has no features")
        number = self.widened(last, self.dim)
        # The last instruction makes the result.
        code, numbers = self._without_unused(number)
        if not code or numbers[number] != len(code) + 1:
            code.append(Instruction("join", (numbers[number],), self.dim))
        taken = sorted({p for x in code for p in x.parameters})
        order = {p: i for i, p in enumerate(taken)}
        code = [
            Instruction(x.op, x.inputs, x.width, tuple(order[p] for p in x.parameters), x.number)
            for x in code
        ]
        tensors = [self.tensors[p] for p in taken]
        shapes = tuple(shape_of(node) for node in tensors)
        return Program(self.dim, shapes, tuple(code)), tensors

    def _without_unused(self, result: int) -> tuple[list[Instruction], dict[int, int]]:
        used = {result}
        for value in range(len(self.widths) - 1, STATE, -1):
            if value in used:
                used.update(self.code[value - 2].inputs)
        new = {TIME: TIME, STATE: STATE}
        code: list[Instruction] = []
        for value, x in enumerate(self.code, 2):
            if value in used:
                new[value] = len(code) + 2
                inputs = tuple(new[i] for i in x.inputs)
                code.append(Instruction(x.op, inputs, x.width, x.parameters, x.number))
        return code, new

    # --- instructions

    def emit(
        self,
        op: str,
        inputs: tuple[int, ...] = (),
        width: int = 0,
        parameters: tuple[int, ...] = (),
        number: float = 0.0,
    ) -> int:
        """The value of an instruction; the same instruction is made once."""
        width = width or max(self.widths[i] for i in inputs)
        x = Instruction(op, inputs, width, parameters, float(number))
        if x not in self.made:
            self.code.append(x)
            self.widths.append(width)
            self.made[x] = len(self.widths) - 1
        return self.made[x]

    def number(self, number: float) -> int:
        """A number in every row."""
        return self.emit("constant", (), 1, (), number)

    def widened(self, value: _Value, width: int) -> int:
        """The number of the value with so many features."""
        if value.width == width:
            return value.number
        return self.emit("spread", (value.number,), width)

    def parameter(self, node: fx.Node) -> int:
        """The number of a tensor, by its node."""
        if node not in self.tensors:
            self.tensors.append(node)
        return self.tensors.index(node)

    # --- tensors of the trace

    def shape(self, x: Any) -> tuple[int, ...]:
        """Of an argument; of a number ()."""
        return shape_of(x) if isinstance(x, fx.Node) else ()

    def known(self, x: Any) -> Any:
        """What an argument is: a _Value, a _Number, a tuple of these, or a weight's node."""
        if isinstance(x, fx.Node):
            number = self.weights.number(x)
            return self.env.get(x, x) if number is None else _Number(number)
        if isinstance(x, (bool, int, float)):
            return _Number(float(x))
        raise NotKnown(f"an operation takes {x!r}")

    def value(self, x: Any) -> _Value:
        """An argument as a value."""
        found = self.known(x)
        if isinstance(found, _Value):
            return found
        if isinstance(x, fx.Node) and x.meta["val"].dtype not in (self.y.dtype, torch.bool):
            raise NotKnown(f"it computes with {x.meta['val'].dtype}, the state is {self.y.dtype}")
        if isinstance(found, _Number):
            return _Value(self.number(found.number), 1, True, True)
        if isinstance(found, fx.Node):
            return self._vector(found)
        raise NotKnown("an operation takes several tensors for one")

    def _vector(self, node: fx.Node) -> _Value:
        """A weight that is a vector over the features, or a number."""
        shape = shape_of(node)
        width = shape[-1] if shape else 1
        if math.prod(shape) != width:
            raise NotKnown(f"a tensor that it holds, {shape}, has values of its own for each row")
        if shape not in ((), (width,)):
            node = self._reshaped(node, (width,))
        number = self.emit("parameter", (), width, (self.parameter(node),))
        return _Value(number, width, not shape, True)

    def _reshaped(self, node: fx.Node, shape: tuple[int, ...]) -> fx.Node:
        """A weight's node as a tensor of another shape."""
        graph = self.weights.graph
        for user in node.users:
            if user.target is torch.ops.aten.reshape.default and args_of(user)[1] == list(shape):
                return user
        with graph.inserting_after(node):
            new = graph.call_function(torch.ops.aten.reshape.default, (node, list(shape)))
        new.meta["val"] = node.meta["val"].reshape(shape)
        self.weights.nodes.add(new)
        return new

    def is_rows(self, shape: Sequence[int], width: int) -> bool:
        """Whether a tensor of this shape has the batch's rows, in order, and so many features."""
        return bool(shape) and shape[-1] == width and math.prod(shape[:-1]) == self.rows

    def elementwise(self, node: fx.Node, op: str, *arguments: Any) -> _Value:
        """An operation feature by feature on tensors that are broadcast to the node's shape."""
        values = [self.value(x) for x in arguments]
        out = shape_of(node)
        self._check_broadcast(out, arguments, values)
        same = all(v.same for v in values)
        number = self.emit(op, tuple(v.number for v in values))
        width = self.widths[number]
        flat = width == 1 and (
            all(v.flat for v in values) if same else all(v.flat for v in values if not v.same)
        )
        return _Value(number, width, flat, same)

    def _check_broadcast(
        self, out: tuple[int, ...], arguments: Sequence[Any], values: Sequence[_Value]
    ) -> None:
        """Refuses broadcasting between rows."""
        rows = [(x, v) for x, v in zip(arguments, values, strict=True) if not v.same]
        if not rows:
            return
        flat = rows[0][1].flat
        for x, v in rows:
            shape = self.shape(x)
            fits = shape == out or (not v.flat and shape[:-1] == out[:-1] and v.width == 1)
            if v.flat != flat or not fits:
                raise NotKnown(f"it broadcasts a tensor {shape} to {out}, across rows")
        for x, v in zip(arguments, values, strict=True):
            if v.same and flat and v.width > 1:
                raise NotKnown(f"it broadcasts a tensor {self.shape(x)} across rows")

    def reshaped(self, node: fx.Node, x: Any) -> Any:
        """The value of a tensor that the node gives another shape."""
        found, shape = self.known(x), shape_of(node)
        if not isinstance(found, _Value):
            return found
        if found.same:
            if found.width > 1 and (not shape or shape[-1] != found.width):
                raise NotKnown(f"it reshapes {self.shape(x)} to {shape}")
            return _Value(found.number, found.width, found.flat and not shape, True)
        if self.is_rows(shape, found.width):
            return _Value(found.number, found.width)
        if found.width == 1 and math.prod(shape) == self.rows:
            return _Value(found.number, 1, True)
        raise NotKnown(f"it reshapes {self.shape(x)} to {shape}, which mixes rows and features")

    def last_dim(self, x: Any, dim: int) -> bool:
        """Whether a dimension is that of the features."""
        shape = self.shape(x)
        return dim % max(len(shape), 1) == len(shape) - 1 and not self.value(x).flat


# --- operations on rows ---------------------------------------------------------------------------


def _unary(op: str, number: float = 0.0) -> _Handler:
    def handle(rows: Rows, node: fx.Node) -> _Value:
        value = rows.value(args_of(node)[0])
        made = rows.emit(op, (value.number,), 0, (), number)
        return _Value(made, value.width, value.flat, value.same)

    return handle


for _op in (
    *("neg", "abs", "sign", "reciprocal", "sqrt", "exp", "expm1", "log", "log1p", "sin", "cos"),
    *("tanh", "sigmoid", "relu", "silu"),
):
    _HANDLERS[f"{_op}.default"] = _unary(_op)
_HANDLERS["sgn.default"] = _unary("sign")


def _replace(value: _Value, number: int) -> _Value:
    return _Value(number, value.width, value.flat, value.same)


def _arguments(node: fx.Node, *names: str, **defaults: Any) -> list[Any]:
    """Arguments of the node's call in this order, defaults where it does not give them."""
    schema = {a.name: i for i, a in enumerate(schema_of(node).arguments)}
    found = []
    for name in (*names, *defaults):
        i = schema[name]
        given = args_of(node)[i] if i < len(args_of(node)) else node.kwargs.get(name)
        found.append(defaults.get(name) if given is None else given)
    return found


@_handles("gelu.default")
def _gelu(rows: Rows, node: fx.Node) -> _Value:
    x, approximate = _arguments(node, "self", approximate="none")
    if approximate != "none":
        raise NotKnown("gelu with approximate='tanh' is no operation that the kernels know")
    value = rows.value(x)
    return _replace(value, rows.emit("gelu", (value.number,)))


@_handles("softplus.default")
def _softplus(rows: Rows, node: fx.Node) -> _Value:
    x, beta, threshold = _arguments(node, "self", beta=1, threshold=20)
    if threshold != 20:
        raise NotKnown("softplus with a threshold of its own is no operation that the kernels know")
    value = rows.value(x)
    number = value.number
    if beta != 1:
        number = rows.emit("mul", (number, rows.number(beta)))
    number = rows.emit("softplus", (number,))
    if beta != 1:
        number = rows.emit("div", (number, rows.number(beta)))
    return _replace(value, number)


@_handles("elu.default", "celu.default")
def _elu(rows: Rows, node: fx.Node) -> _Value:
    if name_of(node) == "celu.default":
        x, alpha = _arguments(node, "self", alpha=1.0)
        scale, input_scale = 1.0, 1.0 / alpha
    else:
        x, alpha, scale, input_scale = _arguments(
            node, "self", alpha=1.0, scale=1.0, input_scale=1.0
        )
    value = rows.value(x)
    number = value.number
    if input_scale == 1:
        number = rows.emit("elu", (number,), 0, (), alpha)
        if scale != 1:
            number = rows.emit("mul", (number, rows.number(scale)))
        return _replace(value, number)
    # Positive arguments are not scaled by input_scale, negative ones are.
    scaled = rows.emit("mul", (number, rows.number(input_scale)))
    low = rows.emit("elu", (scaled,), 0, (), alpha * scale)
    high = rows.emit("mul", (number, rows.number(scale)))
    zero = rows.number(0.0)
    return _replace(
        value, rows.emit("select", (rows.emit("gt", (number, zero)), high, low), value.width)
    )


@_handles("leaky_relu.default", "_prelu_kernel.default")
def _leaky_relu(rows: Rows, node: fx.Node) -> _Value:
    x, slope = args_of(node)[0], args_of(node)[1] if len(args_of(node)) > 1 else 0.01
    value, by = rows.value(x), rows.value(slope)
    if not by.same or by.width not in (1, value.width):
        raise NotKnown("prelu takes a slope for each row")
    low = rows.emit("mul", (value.number, by.number))
    positive = rows.emit("gt", (value.number, rows.number(0.0)))
    return _replace(value, rows.emit("select", (positive, value.number, low), value.width))


@functools.cache
def _clamp_ends_at_bounds() -> bool:
    """Whether clamp's derivative is 0 at its bounds, as hardtanh's is: torch 2.11 had 1 there."""
    with torch.enable_grad():
        x = torch.zeros((), requires_grad=True)
        return not torch.autograd.grad(x.clamp(min=0.0), x)[0]


@_handles("clamp.default", "hardtanh.default", "clamp_min.default", "clamp_max.default")
def _clamp(rows: Rows, node: fx.Node) -> _Value:
    name = name_of(node)
    if name == "hardtanh.default":
        x, low, high = _arguments(node, "self", min_val=-1.0, max_val=1.0)
    else:
        x = args_of(node)[0]
        low = _arguments(node, min=None)[0] if name != "clamp_max.default" else None
        high = _arguments(node, max=None)[0] if name != "clamp_min.default" else None
    value = rows.value(x)
    number = value.number
    # So that nan stays nan.
    beyond = "ge" if name == "hardtanh.default" or _clamp_ends_at_bounds() else "gt"
    if low is not None:
        bound = rows.number(low)
        number = rows.emit(
            "select", (rows.emit(beyond, (bound, number)), bound, number), value.width
        )
    if high is not None:
        bound = rows.number(high)
        number = rows.emit(
            "select", (rows.emit(beyond, (number, bound)), bound, number), value.width
        )
    return _replace(value, number)


@_handles("pow.Tensor_Scalar")
def _pow(rows: Rows, node: fx.Node) -> _Value:
    x, exponent = args_of(node)
    value = rows.value(x)
    a = value.number
    if not isinstance(exponent, (int, float)):
        raise NotKnown("a power with a tensor as exponent is no operation that the kernels know")
    if exponent == 0:
        return _Value(rows.number(1.0), 1, value.flat, True)
    if exponent in (1, 2, 3):
        number = a
        for _ in range(int(exponent) - 1):
            number = rows.emit("mul", (number, a))
    elif exponent == 0.5:
        number = rows.emit("sqrt", (a,))
    elif exponent == -1:
        number = rows.emit("reciprocal", (a,))
    else:
        number = rows.emit("pow", (a,), 0, (), exponent)
    return _replace(value, number)


@_handles("rsqrt.default")
def _rsqrt(rows: Rows, node: fx.Node) -> _Value:
    value = rows.value(args_of(node)[0])
    return _replace(value, rows.emit("reciprocal", (rows.emit("sqrt", (value.number,)),)))


@_handles("add.Tensor", "add.Scalar", "sub.Tensor", "sub.Scalar", "rsub.Scalar", "rsub.Tensor")
def _add(rows: Rows, node: fx.Node) -> Any:
    name = name_of(node)
    a, b = args_of(node)[:2]
    alpha = _arguments(node, alpha=1)[0]
    if name.startswith("rsub"):
        a, b = b, a
    if alpha != 1:
        raise NotKnown("add with alpha is no operation that the kernels know")
    return rows.elementwise(node, "add" if name.startswith("add") else "sub", a, b)


@_handles("mul.Tensor", "mul.Scalar")
def _mul(rows: Rows, node: fx.Node) -> Any:
    a, b = args_of(node)
    for one, other in ((a, b), (b, a)):
        # torch.ones(...) * t, the usual way to give every row the time.
        if rows.known(one) == _Number(1.0) and rows.value(other).same:
            return rows.reshaped(node, other)
    return rows.elementwise(node, "mul", a, b)


@_handles("div.Tensor", "div.Scalar")
def _div(rows: Rows, node: fx.Node) -> Any:
    a, b = args_of(node)
    return rows.elementwise(node, "div", a, b)


@_handles("gt.Scalar", "gt.Tensor", "ge.Scalar", "ge.Tensor")
def _greater(rows: Rows, node: fx.Node) -> _Value:
    return rows.elementwise(node, name_of(node)[:2], *args_of(node))


@_handles("lt.Scalar", "lt.Tensor", "le.Scalar", "le.Tensor")
def _less(rows: Rows, node: fx.Node) -> _Value:
    op = "gt" if name_of(node).startswith("lt") else "ge"
    return rows.elementwise(node, op, *reversed(args_of(node)))


@_handles("where.self", "where.ScalarOther", "where.ScalarSelf", "where.Scalar")
def _where(rows: Rows, node: fx.Node) -> _Value:
    return rows.elementwise(node, "select", *args_of(node))


@_handles("mm.default")
def _mm(rows: Rows, node: fx.Node) -> _Value:
    return _linear(rows, node, *args_of(node))


@_handles("addmm.default")
def _addmm(rows: Rows, node: fx.Node) -> _Value:
    bias, x, weight, beta, alpha = _arguments(node, "self", "mat1", "mat2", beta=1, alpha=1)
    if beta != 1 or alpha != 1:
        raise NotKnown("addmm with beta or alpha is no operation that the kernels know")
    return _linear(rows, node, x, weight, bias)


@_handles("mv.default")
def _mv(rows: Rows, node: fx.Node) -> _Value:
    weight, x = args_of(node)
    value = rows.value(x)
    if rows.rows != 1 or value.flat or not isinstance(rows.known(weight), fx.Node):
        raise NotKnown("a product of matrices that is not state times weights")
    width = shape_of(node)[0]
    return _Value(rows.emit("linear", (value.number,), width, (rows.parameter(weight),)), width)


def _linear(rows: Rows, node: fx.Node, x: Any, weight: Any, bias: Any = None) -> _Value:
    """The product of rows and weights, plus the bias."""
    matrix = rows.known(weight)
    if not isinstance(matrix, fx.Node):
        raise NotKnown("a product of matrices that is not state times weights")
    if matrix.meta["val"].dtype != rows.y.dtype:
        raise NotKnown(f"its weights are {matrix.meta['val'].dtype}, the state {rows.y.dtype}")
    value, width = rows.value(x), shape_of(node)[-1]
    if value.flat:
        raise NotKnown("a product of matrices that is not state times weights")
    inputs = rows.widened(value, rows.shape(x)[-1])
    op = "linear_t"
    if name_of(matrix) in ("t.default", "transpose.int", "permute.default") and args_of(matrix)[
        0
    ] in (rows.weights.nodes):
        op, matrix = "linear", args_of(matrix)[0]
    parameters = [rows.parameter(matrix)]
    known = rows.known(bias) if bias is not None else None
    if isinstance(known, fx.Node) and math.prod(shape_of(known)) == width:
        if shape_of(known) != (width,):
            known = rows._reshaped(known, (width,))
        parameters.append(rows.parameter(known))
    number = rows.emit(op, (inputs,), width, tuple(parameters))
    same = value.same
    if isinstance(known, _Value):
        if not known.same or known.width not in (1, width):
            raise NotKnown("a bias with a value for each row")
        number = rows.emit("add", (number, known.number))
    elif bias is not None and len(parameters) == 1:
        raise NotKnown("a bias that is no vector")
    return _Value(number, width, False, same)


@_handles(
    *("view.default", "_unsafe_view.default", "reshape.default", "unsqueeze.default"),
    *("squeeze.default", "squeeze.dim", "squeeze.dims", "squeeze_.dim"),
)
def _view(rows: Rows, node: fx.Node) -> Any:
    return rows.reshaped(node, args_of(node)[0])


@_handles(
    *("clone.default", "alias.default", "contiguous.default", "lift_fresh_copy.default"),
    "lift_fresh.default",
)
def _copy(rows: Rows, node: fx.Node) -> Any:
    return rows.known(args_of(node)[0])


@_handles("_to_copy.default")
def _convert(rows: Rows, node: fx.Node) -> Any:
    made = node.meta["val"]
    if made.dtype != rows.y.dtype or made.device != rows.y.device:
        raise NotKnown(f"it converts a tensor to {made.dtype} on {made.device}")
    return rows.known(args_of(node)[0])


@_handles("expand.default", "repeat.default")
def _expand(rows: Rows, node: fx.Node) -> Any:
    x = args_of(node)[0]
    found, shape = rows.known(x), shape_of(node)
    if not isinstance(found, _Value):
        return found
    if found.same:
        if found.width > 1 and shape[-1] != found.width:
            raise NotKnown(f"it repeats the features of {rows.shape(x)}")
        return _Value(found.number, found.width, False, True)
    if found.flat or rows.shape(x)[:-1] != shape[:-1]:
        if shape == rows.shape(x):
            return found
        raise NotKnown(f"it broadcasts a tensor {rows.shape(x)} to {shape}, across rows")
    if found.width not in (1, shape[-1]):
        raise NotKnown(f"it repeats the features of {rows.shape(x)}")
    return _Value(rows.widened(found, shape[-1]), shape[-1])


@_handles("slice.Tensor")
def _slice(rows: Rows, node: fx.Node) -> Any:
    x, dim, start, end, step = _arguments(node, "self", dim=0, start=0, end=None, step=1)
    if shape_of(node) == rows.shape(x):
        return rows.known(x)
    found = rows.known(x)
    if isinstance(found, _Number):
        return found
    if isinstance(found, _Value) and found.same and not rows.last_dim(x, dim):
        return found
    if not rows.last_dim(x, dim):
        raise NotKnown("it takes some rows of a batch")
    if step != 1:
        raise NotKnown("it takes features by a step")
    size = rows.shape(x)[-1]
    if found.width != size:  # one number, for all features
        return found
    first = start + size if start < 0 else start
    width = shape_of(node)[-1]
    number = rows.emit("slice", (found.number,), width, (), min(first, size))
    return _Value(number, width, False, found.same)


@_handles("select.int")
def _select(rows: Rows, node: fx.Node) -> Any:
    x, dim, index = args_of(node)
    found = rows.known(x)
    if isinstance(found, _Number):
        return found
    if not rows.last_dim(x, dim):
        if found.same:
            return _Value(found.number, found.width, found.flat or not shape_of(node), True)
        if rows.shape(x)[dim] == 1 and not found.flat:
            return rows.reshaped(node, x)
        raise NotKnown("it takes one row of a batch")
    if found.width == 1:
        return _Value(found.number, 1, True, found.same)
    size = rows.shape(x)[-1]
    number = rows.emit("slice", (found.number,), 1, (), index % size)
    return _Value(number, 1, True, found.same)


@_handles(
    *("split.Tensor", "split_with_sizes.default", "unbind.int", "chunk.default"),
    "unsafe_chunk.default",
)
def _split(rows: Rows, node: fx.Node) -> Any:
    x, dim = args_of(node)[0], _arguments(node, dim=0)[0]
    if not rows.last_dim(x, dim):
        raise NotKnown("it splits a batch")
    found = rows.value(x)
    parts, start = [], 0
    is_flat = name_of(node) == "unbind.int"
    for part in node.meta["val"]:
        width = 1 if is_flat else part.shape[-1]
        number = rows.emit("slice", (found.number,), width, (), start)
        parts.append(_Value(number, width, is_flat, found.same))
        start += width
    return tuple(parts)


@_handles("getitem")
def _getitem(rows: Rows, node: fx.Node) -> Any:
    x, index = args_of(node)
    found = rows.known(x)
    if not isinstance(found, tuple):
        raise NotKnown(f"{name_of(x)} is no operation that the kernels know")
    return found[index]


@_handles("cat.default", "stack.default")
def _join(rows: Rows, node: fx.Node) -> Any:
    parts, dim = args_of(node)[0], args_of(node)[1] if len(args_of(node)) > 1 else 0
    shape = shape_of(node)
    if dim % len(shape) != len(shape) - 1:
        raise NotKnown("it joins tensors along another dimension than the features'")
    is_stack = name_of(node) == "stack.default"
    values = [rows.value(x) for x in parts]
    for x, v in zip(parts, values, strict=True):
        if not v.same and v.flat != is_stack:
            raise NotKnown(f"it joins a tensor {rows.shape(x)} to others, across rows")
    numbers = tuple(
        rows.widened(v, 1 if is_stack else rows.shape(x)[-1])
        for x, v in zip(parts, values, strict=True)
    )
    same = all(v.same for v in values)
    if len(numbers) == 1:
        return _Value(numbers[0], shape[-1], False, same)
    return _Value(rows.emit("join", numbers, shape[-1]), shape[-1], False, same)


@_handles("sum.dim_IntList", "mean.dim")
def _sum(rows: Rows, node: fx.Node) -> _Value:
    x, dims, keepdim = _arguments(node, "self", dim=None, keepdim=False)
    if not dims or len(dims) != 1 or not rows.last_dim(x, dims[0]):
        raise NotKnown("a sum or mean over the batch")
    value, size = rows.value(x), rows.shape(x)[-1]
    number = rows.emit("total", (rows.widened(value, size),), 1)
    if name_of(node) == "mean.dim":
        number = rows.emit("div", (number, rows.number(size)))
    return _Value(number, 1, not keepdim, value.same)


@_handles(
    *("ones_like.default", "new_ones.default", "zeros_like.default", "new_zeros.default"),
    *("full_like.default", "new_full.default"),
)
def _filled(rows: Rows, node: fx.Node) -> _Number:
    if node.meta["val"].dtype != rows.y.dtype:
        raise NotKnown(f"it makes a tensor of {node.meta['val'].dtype}")
    name = name_of(node)
    if "full" not in name:
        return _Number(float("ones" in name))
    (fill,) = _arguments(node, "fill_value")
    if not isinstance(fill, (int, float)):
        raise NotKnown("it fills a tensor with another one's value")
    return _Number(float(fill))


# --- perceptrons ----------------------------------------------------------------------------------


def as_mlp(program: Program) -> MLPSpec | None:
    """The program as a perceptron whose tensors are in the same order, if it is one."""
    code = list(program.code)
    time = code[0] == Instruction("join", (TIME, STATE), 1 + program.dim)
    value = 2 if time else STATE
    hidden, activations, next_parameter = [], [], 0
    for place in range(int(time), len(code)):
        x = code[place]
        if x.inputs != (value,):
            return None
        value = place + 2
        if (place - int(time)) % 2:
            is_elu = x.op == "elu" and x.number == 1
            if x.op not in ACTIVATIONS or not (is_elu or x.number == 0):
                return None
            activations.append(x.op)
        elif x.op != "linear" or x.parameters != (next_parameter, next_parameter + 1):
            return None
        else:
            next_parameter += 2
            hidden.append(x.width)
    if not activations or len(set(activations)) > 1 or len(hidden) != len(activations) + 1:
        return None
    return MLPSpec(program.dim, tuple(hidden[:-1]), activations[0], time)
